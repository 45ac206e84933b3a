//! Where a cloud's configuration comes from: files in openstacksdk's search order, and the `OS_*` variables of an openrc file.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::ConfigError;

/// The process's environment, as far as they matter here; a value, so that tests need not change the process.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// Working folder.
    pub cwd: PathBuf,
}

impl Environment {
    /// Does the environment choose a cloud?
    #[must_use]
    pub fn names_a_cloud(&self) -> bool {
        ["OS_CLOUD", "OS_AUTH_URL"].iter().any(|name| self.env.get(*name).is_some_and(|value| !value.is_empty()))
    }

    /// The real ones.
    #[must_use]
    pub fn current() -> Self {
        let env =
            std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?))).collect();
        Self { env, cwd: std::env::current_dir().unwrap_or_default() }
    }

    /// The same without the variables that choose a cloud or say something about the chosen one: for a second cloud, whose password and
    /// region are not the first one's.
    #[must_use]
    pub fn without_a_cloud(mut self) -> Self {
        self.env.retain(|name, _| !name.starts_with("OS_") || name.starts_with("OS_CLIENT_"));
        self
    }

    /// A variable that is set and not empty.
    pub(super) fn var(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Folders that are searched, in order.
    fn folders(&self) -> Vec<PathBuf> {
        let home = self.var("SNAP_REAL_HOME").or_else(|| self.var("HOME")).map(PathBuf::from);
        let config = home.as_ref().map(|home| home.join(".config"));
        let mut folders = vec![self.cwd.clone()];
        folders
            .extend(self.var("XDG_CONFIG_HOME").map(PathBuf::from).or_else(|| config.clone()).map(|path| path.join("openstack")));
        folders.extend(config.map(|path| path.join("openstack")));
        let site = self.var("XDG_CONFIG_DIRS").unwrap_or("/etc/xdg");
        folders.extend(site.split(':').filter(|path| !path.is_empty()).map(|path| Path::new(path).join("openstack")));
        folders.push(PathBuf::from("/etc/openstack"));
        folders
    }

    /// The first readable file of these names, parsed; with `named` first.
    pub(super) fn first_file(&self, named: Option<&str>, stem: &str) -> Result<Option<ConfigFile>, ConfigError> {
        let explicit = named.map(|path| self.cwd.join(path));
        let found = ["yaml", "yml", "json"];
        let candidates = explicit
            .clone()
            .into_iter()
            .chain(self.folders().into_iter().flat_map(|folder| found.map(|suffix| folder.join(format!("{stem}.{suffix}")))));
        for path in candidates {
            let named_explicitly = explicit.as_ref() == Some(&path);
            let error = |what: String| ConfigError::File { file: path.display().to_string(), what };
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                // as openstacksdk: what cannot be opened is passed over; but a file that was named is wanted
                Err(source) if named_explicitly => return Err(error(source.to_string())),
                Err(_) => continue,
            };
            let value: Value = if path.extension().is_some_and(|extension| extension == "json") {
                serde_json::from_str(&text).map_err(|source| error(source.to_string()))?
            } else {
                // a file of comments alone is null
                serde_saphyr::from_str::<Option<Value>>(&text).map_err(|source| error(source.to_string()))?.unwrap_or(Value::Null)
            };
            return match value {
                Value::Object(map) => Ok(Some((path, map))),
                Value::Null => Ok(None),
                _ => Err(error("is no mapping with a `clouds:` section".to_owned())),
            };
        }
        Ok(None)
    }
}

/// `a` deep-merged under `b`.
pub(super) fn merge(a: &mut Map<String, Value>, b: &Map<String, Value>) {
    for (key, value) in b {
        match (a.get_mut(key), value) {
            (Some(Value::Object(old)), Value::Object(new)) => merge(old, new),
            _ => {
                a.insert(key.clone(), value.clone());
            }
        }
    }
}

/// A configuration file's path and content.
pub(super) type ConfigFile = (PathBuf, Map<String, Value>);
pub(super) type Clouds = BTreeMap<String, Map<String, Value>>;

/// clouds.yaml with secure.yaml over it.
pub(super) fn load_files(environment: &Environment) -> Result<(String, Clouds), ConfigError> {
    let clouds = environment.first_file(environment.var("OS_CLIENT_CONFIG_FILE"), "clouds")?;
    let secure = environment.first_file(environment.var("OS_CLIENT_SECURE_FILE"), "secure")?;
    let file = clouds.as_ref().map_or_else(|| "clouds.yaml".to_owned(), |(path, _)| path.display().to_string());
    let mut merged = clouds.map(|(_, map)| map).unwrap_or_default();
    if let Some((_, secure)) = secure {
        merge(&mut merged, &secure);
    }
    let sections = match merged.remove("clouds") {
        Some(Value::Object(sections)) => sections,
        None | Some(Value::Null) => Map::new(),
        Some(_) => return Err(ConfigError::File { file, what: "`clouds:` is no mapping of names to clouds".to_owned() }),
    };
    let clouds = sections.into_iter().filter_map(|(name, value)| match value {
        Value::Object(section) => Some((name, section)),
        _ => None,
    });
    Ok((file, clouds.collect()))
}

/// The cloud that the `OS_*` variables of an openrc file make, if they make one.
pub(super) fn env_cloud(environment: &Environment) -> Option<(Map<String, Value>, Vec<String>)> {
    environment.var("OS_AUTH_URL")?;
    let mut section = Map::new();
    let mut auth = Map::new();
    for (name, value) in &environment.env {
        let Some(key) = name.strip_prefix("OS_") else { continue };
        if value.is_empty() || matches!(key, "CLOUD" | "CLIENT_CONFIG_FILE" | "CLIENT_SECURE_FILE" | "CLOUD_NAME") {
            continue;
        }
        let key = key.to_ascii_lowercase().replace("tenant_", "project_");
        let value = Value::String(value.clone());
        if AUTH_KEYS.contains(&key.as_str()) {
            auth.insert(key, value)
        } else {
            section.insert(key, value)
        };
    }
    let mut notices = Vec::new();
    let application_credential = auth.contains_key("application_credential_id")
        || auth.contains_key("application_credential_name")
        || section.get("auth_type").and_then(Value::as_str) == Some("v3applicationcredential");
    if application_credential && auth.contains_key("application_credential_secret") {
        section.entry("auth_type").or_insert_with(|| Value::String("v3applicationcredential".to_owned()));
        let by_name = !auth.contains_key("application_credential_id");
        let left_over: Vec<String> = auth
            .keys()
            .filter(|key| match key.as_str() {
                "password" => true,
                "username" | "user_id" | "user_domain_id" | "user_domain_name" => !by_name,
                other => other.starts_with("project_") || other == "domain_id" || other == "domain_name",
            })
            .cloned()
            .collect();
        if !left_over.is_empty() {
            let names = left_over.iter().map(|key| format!("OS_{}", key.to_ascii_uppercase())).collect::<Vec<_>>().join(", ");
            notices
                .push(format!("signing in with the application credential; left over from another openrc and ignored: {names}"));
            for key in left_over {
                auth.remove(&key);
            }
        }
    }
    section.insert("auth".to_owned(), Value::Object(auth));
    Some((section, notices))
}

/// Keys that belong into a cloud's `auth` section.
pub(super) const AUTH_KEYS: [&str; 20] = [
    "auth_url",
    "username",
    "user_id",
    "user_domain_id",
    "user_domain_name",
    "password",
    "passcode",
    "project_id",
    "project_name",
    "project_domain_id",
    "project_domain_name",
    "domain_id",
    "domain_name",
    "default_domain_id",
    "default_domain",
    "application_credential_id",
    "application_credential_name",
    "application_credential_secret",
    "token",
    "trust_id",
];
