//! Which cloud and whose credentials: the files and variables that `openstack` reads, in its order
//! (openstacksdk, `openstack/config/loader.py`).
//!
//! Files: `$OS_CLIENT_CONFIG_FILE`, then `clouds.yaml`, `clouds.yml`, `clouds.json` in the working folder, the user's
//! configuration folder, `/etc/xdg/openstack` and `/etc/openstack`; the first that can be read is the one, nothing is
//! merged across folders. `secure.yaml` (`$OS_CLIENT_SECURE_FILE`) is found the same way and merged over it.

use std::{fmt, path::PathBuf};

use serde_json::{Map, Value};

use super::ConfigError;
pub use super::environment::Environment;
use super::environment::{AUTH_KEYS, env_cloud, load_files, merge};

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself, for the request that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// What flags say about the cloud; each goes before files and variables.
#[derive(Clone, Debug, Default)]
pub struct CloudFlags {
    /// `--os-cloud`
    pub cloud: Option<String>,
    /// `--os-region-name`
    pub region_name: Option<String>,
    /// `--os-interface`
    pub interface: Option<String>,
    /// `--os-cacert`
    pub cacert: Option<String>,
    /// `--insecure`
    pub insecure: bool,
}

/// Whom to sign in as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// With a password; `None` if it has to be asked for.
    Password {
        /// The user, by id or by name and domain.
        user: User,
        /// The password.
        password: Option<Secret>,
    },
    /// With an application credential, which carries its own project.
    ApplicationCredential {
        /// Its id; or its name together with the user.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
        /// Whose, if it is given by name.
        user: Option<User>,
        /// Its secret.
        secret: Secret,
    },
    /// With a ready token.
    Token {
        /// The token.
        token: Secret,
    },
}

/// A user as Keystone wants it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct User {
    /// By id,
    pub id: Option<String>,
    /// or by name
    pub name: Option<String>,
    /// in a domain, by id
    pub domain_id: Option<String>,
    /// or name.
    pub domain_name: Option<String>,
}

/// A project as Keystone wants it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Project {
    /// By id,
    pub id: Option<String>,
    /// or by name
    pub name: Option<String>,
    /// in a domain, by id
    pub domain_id: Option<String>,
    /// or name.
    pub domain_name: Option<String>,
}

/// A cloud, ready to sign in to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudConfig {
    /// Its name in the file, or `envvars`.
    pub name: String,
    /// Keystone's URL, as given.
    pub auth_url: String,
    /// Whom to sign in as.
    pub identity: Identity,
    /// The scope; application credentials have their own.
    pub project: Option<Project>,
    /// The region, if one is chosen.
    pub region_name: Option<String>,
    /// `public`, `internal` or `admin`.
    pub interface: String,
    /// Where Glance is, whatever the catalog says.
    pub image_endpoint_override: Option<String>,
    /// A PEM file of certificate authorities, in addition to the system's.
    pub cacert: Option<PathBuf>,
    /// A PEM file with a client certificate, and its key if that is in another.
    pub client_cert: Option<(PathBuf, Option<PathBuf>)>,
    /// Certificates are not checked.
    pub insecure: bool,
    /// What the user should know about what was read.
    pub notices: Vec<String>,
}

/// Keys with dashes are keys with underscores; `tenant` is `project`.
fn normalise(map: &Map<String, Value>) -> Map<String, Value> {
    map.iter()
        .map(|(key, value)| {
            let key = key.replace('-', "_").replace("tenant_", "project_");
            let value = match value {
                Value::Object(inner) => Value::Object(normalise(inner)),
                other => other.clone(),
            };
            (key, value)
        })
        .collect()
}

/// A scalar as text: passwords and ids may look like numbers.
fn scalar(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

fn truth(value: Option<&Value>) -> Option<bool> {
    match value? {
        Value::Bool(flag) => Some(*flag),
        Value::String(text) => Some(text.eq_ignore_ascii_case("true") || text == "1"),
        _ => None,
    }
}

impl CloudConfig {
    /// Chooses the cloud: `--os-cloud`, `OS_CLOUD`, the `OS_*` variables, the only one in the file.
    ///
    /// # Errors
    /// [`ConfigError`], each saying what to do.
    pub fn resolve(flags: &CloudFlags, environment: &Environment) -> Result<Self, ConfigError> {
        let wanted = flags.cloud.clone().or_else(|| environment.var("OS_CLOUD").map(str::to_owned));
        let (file, mut clouds) = load_files(environment)?;
        let env_cloud = env_cloud(environment);
        let (name, section, mut notices) = match (wanted, env_cloud) {
            (Some(name), _) if clouds.contains_key(&name) => {
                let section = clouds.remove(&name).unwrap_or_default();
                (name, section, Vec::new())
            }
            (Some(name), _) => return Err(ConfigError::NoSuchCloud { name, names: clouds.keys().cloned().collect() }),
            (None, Some((section, notices))) => ("envvars".to_owned(), section, notices),
            (None, None) if clouds.len() == 1 => {
                let (name, section) = clouds.into_iter().next().unwrap_or_default();
                (name, section, Vec::new())
            }
            (None, None) if clouds.is_empty() => return Err(ConfigError::Nothing),
            (None, None) => return Err(ConfigError::Choose { file, names: clouds.keys().cloned().collect() }),
        };
        let from_file = name != "envvars";
        let mut cloud = Cloud { name, section: normalise(&section) };
        cloud.apply_profile(environment)?;
        // openstackclient lays these over what the file says
        for (key, flag, variable) in [
            ("region_name", &flags.region_name, "OS_REGION_NAME"),
            ("interface", &flags.interface, "OS_INTERFACE"),
            ("cacert", &flags.cacert, "OS_CACERT"),
        ] {
            if let Some(value) = flag.as_deref().or_else(|| environment.var(variable)) {
                cloud.section.insert(key.to_owned(), Value::String(value.to_owned()));
            }
        }
        if flags.insecure {
            cloud.section.insert("insecure".to_owned(), Value::Bool(true));
        }
        if from_file
            && cloud.auth("password").is_none()
            && let Some(password) = environment.var("OS_PASSWORD")
        {
            cloud.set_auth("password", password);
        }
        cloud.finish(&mut notices)
    }

    /// A user that a password has to be asked for.
    #[must_use]
    pub fn wants_password_of(&self) -> Option<String> {
        match &self.identity {
            Identity::Password { user, password: None } => {
                Some(user.name.clone().or_else(|| user.id.clone()).unwrap_or_else(|| "this user".to_owned()))
            }
            _ => None,
        }
    }

    /// Gives the password that was asked for.
    pub fn set_password(&mut self, secret: Secret) {
        if let Identity::Password { password, .. } = &mut self.identity {
            *password = Some(secret);
        }
    }
}

/// A cloud's section while it is being made sense of.
struct Cloud {
    name: String,
    section: Map<String, Value>,
}

impl Cloud {
    /// A key of the `auth` section; one outside of it goes before, as openstacksdk has it.
    fn auth(&self, key: &str) -> Option<String> {
        let inside = || scalar(self.section.get("auth").and_then(|auth| auth.get(key)));
        if AUTH_KEYS.contains(&key) { scalar(self.section.get(key)).or_else(inside) } else { inside() }
    }

    fn set_auth(&mut self, key: &str, value: &str) {
        let auth = self.section.entry("auth").or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(auth) = auth {
            auth.insert(key.to_owned(), Value::String(value.to_owned()));
        }
    }

    fn key(&self, key: &str) -> Option<String> {
        scalar(self.section.get(key))
    }

    /// `profile:` names a section of clouds-public.yaml that lies under this one.
    fn apply_profile(&mut self, environment: &Environment) -> Result<(), ConfigError> {
        let Some(profile) = self.key("profile").or_else(|| self.key("cloud")) else { return Ok(()) };
        let public = environment.first_file(None, "clouds-public")?;
        let section = public.and_then(|(_, map)| match map.get("public-clouds")?.get(&profile)? {
            Value::Object(section) => Some(normalise(section)),
            _ => None,
        });
        match section {
            Some(mut under) => {
                merge(&mut under, &self.section);
                self.section = under;
            }
            None if self.auth("auth_url").is_none() => {
                return Err(ConfigError::File {
                    file: format!("cloud {}", self.name),
                    what: format!("profile {profile} is in no clouds-public.yaml, and there is no auth_url: add auth.auth_url"),
                });
            }
            None => {}
        }
        Ok(())
    }

    fn user(&self) -> User {
        // `domain_*` stands in for both
        let domain =
            |kind: &str, what: &str| self.auth(&format!("{kind}_domain_{what}")).or_else(|| self.auth(&format!("domain_{what}")));
        let default = || self.auth("default_domain_id").or_else(|| self.auth("default_domain"));
        let id = self.auth("user_id");
        let domain_id = domain("user", "id");
        let domain_name = domain("user", "name");
        let domain_id = if domain_id.is_none() && domain_name.is_none() { default() } else { domain_id };
        User { id, name: self.auth("username"), domain_id, domain_name }
    }

    fn project(&self) -> Option<Project> {
        let (id, name) = (self.auth("project_id"), self.auth("project_name"));
        if id.is_none() && name.is_none() {
            return None;
        }
        let mut domain_id = self.auth("project_domain_id").or_else(|| self.auth("domain_id"));
        let domain_name = self.auth("project_domain_name").or_else(|| self.auth("domain_name"));
        if domain_id.is_none() && domain_name.is_none() {
            domain_id = self.auth("default_domain_id").or_else(|| self.auth("default_domain"));
        }
        // by name and without a domain: most clouds have one, and the user's is the best guess there is
        let user = self.user();
        let (domain_id, domain_name) = if domain_id.is_none() && domain_name.is_none() {
            (user.domain_id, user.domain_name)
        } else {
            (domain_id, domain_name)
        };
        Some(Project { id, name, domain_id, domain_name })
    }

    fn missing(&self, what: &'static str, env: Option<&'static str>) -> ConfigError {
        ConfigError::Missing { cloud: self.name.clone(), what, env }
    }

    fn finish(self, notices: &mut Vec<String>) -> Result<CloudConfig, ConfigError> {
        let auth_url = self.auth("auth_url").ok_or_else(|| self.missing("auth.auth_url", Some("OS_AUTH_URL")))?;
        let auth_type = self.key("auth_type").unwrap_or_else(|| {
            let has = |key| self.auth(key).is_some();
            let found = if has("application_credential_secret") {
                "v3applicationcredential"
            } else if has("token") && !has("password") {
                "v3token"
            } else {
                "password"
            };
            found.to_owned()
        });
        let identity = match auth_type.as_str() {
            "password" | "v3password" => {
                let user = self.user();
                if user.id.is_none() && user.name.is_none() {
                    return Err(self.missing("auth.username", Some("OS_USERNAME")));
                }
                Identity::Password { user, password: self.auth("password").map(Secret::new) }
            }
            "v3applicationcredential" => {
                let (id, name) = (self.auth("application_credential_id"), self.auth("application_credential_name"));
                if id.is_none() && name.is_none() {
                    return Err(self.missing("auth.application_credential_id", Some("OS_APPLICATION_CREDENTIAL_ID")));
                }
                let secret = self.auth("application_credential_secret").ok_or_else(|| {
                    self.missing("auth.application_credential_secret", Some("OS_APPLICATION_CREDENTIAL_SECRET"))
                })?;
                let user = id.is_none().then(|| self.user());
                Identity::ApplicationCredential { id, name, user, secret: Secret::new(secret) }
            }
            "token" | "v3token" | "admin_token" => {
                let token = self.auth("token").ok_or_else(|| self.missing("auth.token", Some("OS_TOKEN")))?;
                Identity::Token { token: Secret::new(token) }
            }
            other => return Err(ConfigError::AuthType { cloud: self.name.clone(), auth_type: other.to_owned() }),
        };
        let project = match identity {
            Identity::ApplicationCredential { .. } => None,
            _ => self.project(),
        };
        if project.is_none() && matches!(identity, Identity::Password { .. }) {
            return Err(self.missing("auth.project_id or auth.project_name", Some("OS_PROJECT_ID")));
        }
        let region_name = self.key("region_name").or_else(|| self.only_region());
        let interface = self.key("image_interface").or_else(|| self.key("interface")).or_else(|| self.key("endpoint_type"));
        let interface = interface.unwrap_or_else(|| "public".to_owned());
        let interface = interface.trim_end_matches("URL").to_owned(); // publicURL is the old spelling
        let insecure = truth(self.section.get("insecure")) == Some(true) || truth(self.section.get("verify")) == Some(false);
        if insecure {
            notices
                .push("certificates are not checked (insecure): whoever is in between can read and change everything".to_owned());
        }
        let path = |key: &str| self.key(key).map(|path| expand_home(&path));
        Ok(CloudConfig {
            auth_url,
            identity,
            project,
            region_name,
            interface,
            image_endpoint_override: self.key("image_endpoint_override").or_else(|| self.key("image_endpoint")),
            cacert: path("cacert"),
            client_cert: path("cert").map(|cert| (cert, path("key"))),
            insecure,
            notices: std::mem::take(notices),
            name: self.name,
        })
    }

    /// The region, if `regions:` lists one alone. Its items are names, or mappings with a `name`.
    fn only_region(&self) -> Option<String> {
        match self.section.get("regions")? {
            Value::Array(regions) if regions.len() == 1 => {
                scalar(regions.first()).or_else(|| scalar(regions.first()?.get("name")))
            }
            _ => None,
        }
    }
}

fn expand_home(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// What Horizon hands out (project/api_access and identity/application_credentials, its templates rendered).
    const CLOUDS_YAML: &str = include_str!("fixtures/clouds.yaml");
    const OPENRC: &str = include_str!("fixtures/openrc.sh");
    const OPENRC_APPLICATION_CREDENTIAL: &str = include_str!("fixtures/app-cred-openrc.sh");

    struct Place {
        folder: tempfile::TempDir,
        environment: Environment,
    }

    fn place(env: &[(&str, &str)]) -> Place {
        let folder = tempfile::tempdir().unwrap();
        let mut env: BTreeMap<String, String> = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        env.insert("HOME".to_owned(), folder.path().join("home").display().to_string());
        env.insert("XDG_CONFIG_DIRS".to_owned(), folder.path().join("site").display().to_string());
        let cwd = folder.path().join("cwd");
        std::fs::create_dir_all(&cwd).unwrap();
        Place { environment: Environment { env, cwd }, folder }
    }

    impl Place {
        fn write(&self, path: &str, text: &str) {
            let path = self.folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn resolve(&self) -> Result<CloudConfig, ConfigError> {
            CloudConfig::resolve(&CloudFlags::default(), &self.environment)
        }
    }

    /// The variables that a shell has after it sourced an openrc file and was given a password.
    fn sourced(openrc: &str) -> Vec<(String, String)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("openrc.sh");
        std::fs::write(&path, openrc).unwrap();
        let script = format!("source {} >/dev/null <<< 's3cret $x'; env -0", path.display());
        let output =
            std::process::Command::new("bash").args(["-c", &script]).env_clear().env("PATH", "/usr/bin:/bin").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split('\0').filter_map(|pair| pair.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    fn with_sourced(openrc: &str) -> Place {
        let variables = sourced(openrc);
        let pairs: Vec<(&str, &str)> = variables.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        place(&pairs)
    }

    #[test]
    fn horizons_openrc_signs_in_with_its_password() {
        let cloud = with_sourced(OPENRC).resolve().unwrap();
        assert_eq!(cloud.auth_url, "https://pouta.csc.fi:5001/v3");
        let Identity::Password { user, password } = &cloud.identity else { panic!("{cloud:?}") };
        assert_eq!(user.name.as_deref(), Some("jdoe"));
        assert_eq!(user.domain_name.as_deref(), Some("Default"));
        assert_eq!(password.as_ref().unwrap().reveal(), "s3cret $x");
        assert_eq!(cloud.project.as_ref().unwrap().id.as_deref(), Some("3f5a0d5b7c1e4a56b2c9d8e7f6a5b4c3"));
        assert_eq!((cloud.region_name.as_deref(), cloud.interface.as_str()), (Some("regionOne"), "public"));
        assert!(!format!("{cloud:?}").contains("s3cret"), "secrets are never printed");
    }

    #[test]
    fn horizons_application_credential_openrc_ignores_what_another_openrc_left() {
        let mut place = with_sourced(OPENRC_APPLICATION_CREDENTIAL);
        let cloud = place.resolve().unwrap();
        assert!(matches!(&cloud.identity, Identity::ApplicationCredential { id: Some(_), user: None, .. }));
        assert!(cloud.notices.is_empty() && cloud.project.is_none());
        for (key, value) in
            [("OS_USERNAME", "jdoe"), ("OS_PASSWORD", "x"), ("OS_PROJECT_ID", "y"), ("OS_PROJECT_DOMAIN_ID", "default")]
        {
            place.environment.env.insert(key.to_owned(), value.to_owned());
        }
        let cloud = place.resolve().unwrap();
        assert!(cloud.notices[0].contains("OS_USERNAME") && cloud.notices[0].contains("OS_PROJECT_ID"), "{:?}", cloud.notices);
        assert!(cloud.project.is_none());
    }

    #[test]
    fn horizons_clouds_yaml_has_a_regions_list_a_cloud_called_openstack_and_no_password() {
        let place = place(&[]);
        place.write("home/.config/openstack/clouds.yaml", CLOUDS_YAML);
        let mut cloud = place.resolve().unwrap();
        assert_eq!((cloud.name.as_str(), cloud.region_name.as_deref()), ("openstack", Some("regionOne")));
        assert_eq!(cloud.wants_password_of().as_deref(), Some("jdoe"));
        cloud.set_password(Secret::new("x"));
        assert_eq!(cloud.wants_password_of(), None);
        // secure.yaml beside it, or the variable, and nobody is asked
        place.write("home/.config/openstack/secure.yaml", "clouds: {openstack: {auth: {password: 1234}}}");
        let Identity::Password { password, .. } = place.resolve().unwrap().identity else { panic!() };
        assert_eq!(password.unwrap().reveal(), "1234", "a password that looks like a number");
    }

    #[test]
    fn the_first_readable_file_is_the_one_and_nothing_is_merged_across_folders() {
        let cloud = |url: &str, name: &str| {
            format!(
                "clouds: {{{name}: {{auth: {{auth_url: '{url}', username: u, password: p, project_name: x, user_domain_name: D}}}}}}"
            )
        };
        let mut place = place(&[]);
        place.write("site/openstack/clouds.yaml", &cloud("http://site", "a"));
        assert_eq!(place.resolve().unwrap().auth_url, "http://site");
        place.write("home/.config/openstack/clouds.yml", &cloud("http://home", "b"));
        assert_eq!(place.resolve().unwrap().auth_url, "http://home");
        place.write(
            "cwd/clouds.json",
            r#"{"clouds":{"c":{"auth":{"auth_url":"http://cwd","username":"u","password":"p","project_id":"x"}}}}"#,
        );
        assert_eq!(place.resolve().unwrap().auth_url, "http://cwd");
        place.write("elsewhere/my.yaml", &cloud("http://named", "d"));
        let named = place.folder.path().join("elsewhere/my.yaml").display().to_string();
        place.environment.env.insert("OS_CLIENT_CONFIG_FILE".to_owned(), named);
        assert_eq!(place.resolve().unwrap().auth_url, "http://named");
        place.environment.env.insert("OS_CLOUD".to_owned(), "a".to_owned());
        let error = place.resolve().unwrap_err().to_string();
        assert!(error.contains("cloud a is in none") && error.contains("there are: d"), "{error}");
        place.environment.env.insert("OS_CLIENT_CONFIG_FILE".to_owned(), "/nowhere".to_owned());
        assert!(matches!(place.resolve(), Err(ConfigError::File { .. })), "a file that was named has to be there");
    }

    #[test]
    fn flags_and_variables_go_before_the_file_and_dashes_are_underscores() {
        let mut place = place(&[("OS_CLOUD", "b"), ("OS_INTERFACE", "internal")]);
        place.write(
            "cwd/clouds.yaml",
            "clouds:\n  a: {}\n  b:\n    auth: {auth-url: 'http://x', username: u, password: 0x1, tenant-name: t, domain_id: d}\n    \
             region-name: one\n    image_endpoint_override: http://glance\n    verify: false\n    cacert: /ca.pem\n    interface: publicURL\n",
        );
        let flags = CloudFlags { region_name: Some("two".to_owned()), ..CloudFlags::default() };
        let cloud = CloudConfig::resolve(&flags, &place.environment).unwrap();
        assert_eq!((cloud.region_name.as_deref(), cloud.interface.as_str()), (Some("two"), "internal"));
        assert_eq!(cloud.image_endpoint_override.as_deref(), Some("http://glance"));
        assert_eq!(
            cloud.project.unwrap(),
            Project { name: Some("t".to_owned()), domain_id: Some("d".to_owned()), ..Project::default() }
        );
        assert!(cloud.insecure && cloud.notices[0].contains("not checked"));
        place.environment.env.remove("OS_CLOUD");
        assert!(matches!(place.resolve(), Err(ConfigError::Choose { names, .. }) if names == ["a", "b"]));
    }

    #[test]
    fn with_nothing_configured_the_error_asks_whether_the_openrc_was_sourced() {
        let error = place(&[]).resolve().unwrap_err().to_string();
        assert!(error.contains("Did you `source` the openrc file in this shell?"), "{error}");
        let error = place(&[("OS_AUTH_URL", "http://x"), ("OS_AUTH_TYPE", "v3oidcpassword")]).resolve().unwrap_err().to_string();
        assert!(error.contains("application credential"), "{error}");
    }
}
