//! Servers as Nova has them: find, look at, stop, start, make an image of.
//!
//! Microversions are negotiated once a session ([`Compute::connect`]): with 2.45 `createImage` answers with the image's id, before with
//! a `Location` whose host may be internal, so that only its last part counts; with 2.47 the flavor comes with the server; with 2.84
//! the events of an action tell why it failed. A service without microversions is asked without
//! (docs.openstack.org/api-ref/compute; nova/api/openstack/compute/rest_api_version_history.rst).

use reqwest::{Method, StatusCode, Url};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{ApiError, Session};
use crate::{retry::Retryable, text::printable};

/// The highest microversion that anything here is written for.
const VERSION_MAX: u32 = 84;

/// Nova, for one session.
#[derive(Clone)]
pub struct Compute {
    session: Session,
    /// `2.N`; `None` for a service without.
    version: Option<u32>,
    base: Url,
}

/// A server.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Its id.
    pub id: String,
    /// Its name, which need not be unique.
    pub name: String,
    /// `ACTIVE`, `SHUTOFF`, `PAUSED`, `SUSPENDED`, …
    pub status: String,
    /// What is done with it just now.
    pub task_state: Option<String>,
    /// The image that it was built from; `None` where its root disk is a volume.
    pub image_id: Option<String>,
    /// Nobody but an administrator may do anything with it; `None` where an old service does not say.
    pub locked: Option<bool>,
    /// Ids of volumes attached to it.
    pub volumes: Vec<String>,
    /// The flavor's disks.
    pub disks: Option<Disks>,
    /// What went wrong, if Nova says so.
    pub fault: Option<String>,
}

/// Disks that a flavor gives a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disks {
    /// Root disk, GiB.
    pub root_gib: u64,
    /// Ephemeral disk, GiB.
    pub ephemeral_gib: u64,
    /// Swap, MiB.
    pub swap_mib: u64,
}

/// Why no single server was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// Nova.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// No Nova.
    #[error("this cloud has no compute service in its catalog: there are no servers")]
    NoCompute,
    /// None of that name or id.
    #[error("there is no server {what} in this project: `openstack server list` shows what there is")]
    NotFound {
        /// What was looked for.
        what: String,
    },
    /// Several of that name.
    #[error("there are {} servers called {name}: use an id instead ({})", .ids.len(), .ids.join(", "))]
    Ambiguous {
        /// The name.
        name: String,
        /// Their ids.
        ids: Vec<String>,
    },
}

/// What can be done with a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Shuts it down; a guest that does not obey is cut off.
    Stop,
    /// Starts a stopped one.
    Start,
    /// Wakes a suspended one.
    Resume,
    /// Lets a paused one go on.
    Unpause,
}

impl Action {
    const fn name(self) -> &'static str {
        match self {
            Self::Stop => "os-stop",
            Self::Start => "os-start",
            Self::Resume => "resume",
            Self::Unpause => "unpause",
        }
    }

    /// What a server is then.
    #[must_use]
    pub const fn done(self) -> &'static str {
        match self {
            Self::Stop => "stopped",
            Self::Start => "started",
            Self::Resume => "resumed",
            Self::Unpause => "unpaused",
        }
    }

    /// What brings a server from this status back to `ACTIVE`; `None` where nothing simple does.
    #[must_use]
    pub fn back_from(status: &str) -> Option<Self> {
        match status {
            "SHUTOFF" => Some(Self::Start),
            "SUSPENDED" => Some(Self::Resume),
            "PAUSED" => Some(Self::Unpause),
            _ => None,
        }
    }
}

impl Server {
    fn parse(value: &Value) -> Option<Self> {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let image_id = value["image"]["id"].as_str().map(str::to_owned);
        let volumes = value["os-extended-volumes:volumes_attached"].as_array().into_iter().flatten();
        Some(Self {
            id: text("id")?,
            name: text("name").unwrap_or_default(),
            status: text("status")?,
            task_state: text("OS-EXT-STS:task_state"),
            image_id,
            locked: value["locked"].as_bool(),
            volumes: volumes.filter_map(|volume| volume["id"].as_str().map(str::to_owned)).collect(),
            disks: Disks::parse(&value["flavor"]),
            fault: value["fault"]["message"].as_str().map(str::to_owned),
        })
    }

    /// Its name, or its id if it has none, harmless for a terminal.
    #[must_use]
    pub fn shown(&self) -> String {
        printable(if self.name.is_empty() { &self.id } else { &self.name })
    }
}

impl Disks {
    fn parse(flavor: &Value) -> Option<Self> {
        // before 2.47 there is only an id, and a flavor of its own says "" for no swap
        let number = |key: &str| flavor[key].as_u64();
        Some(Self {
            root_gib: number("disk")?,
            ephemeral_gib: number("ephemeral").or_else(|| number("OS-FLV-EXT-DATA:ephemeral")).unwrap_or(0),
            swap_mib: number("swap").unwrap_or(0),
        })
    }
}

impl Retryable for ServerError {
    fn is_retryable(&self) -> bool {
        matches!(self, Self::Api(error) if error.is_retryable())
    }

    fn retry_after_s(&self) -> Option<u64> {
        match self {
            Self::Api(error) => error.retry_after_s(),
            _ => None,
        }
    }
}

impl Compute {
    /// Finds Nova and the microversion to talk to it with.
    ///
    /// # Errors
    /// [`ServerError::NoCompute`] where the catalog has none.
    pub async fn connect(session: &Session) -> Result<Self, ServerError> {
        let base = session.compute_url(&[]).ok_or(ServerError::NoCompute)?;
        let base = without_project(base, session.whoami().project_id.as_deref());
        // a service that does not tell is asked as the first one was
        let answer = session.call(Method::GET, &base, None).await.unwrap_or(Value::Null);
        let of =
            |value: &Value| value.as_str().and_then(|text| text.strip_prefix("2.")).and_then(|minor| minor.parse::<u32>().ok());
        let (min, max) = (of(&answer["version"]["min_version"]), of(&answer["version"]["version"]));
        let version = max.map(|max| max.min(VERSION_MAX)).filter(|version| min.is_some_and(|min| min <= *version));
        Ok(Self { session: session.clone(), version, base })
    }

    fn url(&self, segments: &[&str]) -> Result<Url, ServerError> {
        let mut url = self.base.clone();
        url.path_segments_mut().map_err(|()| ServerError::NoCompute)?.pop_if_empty().extend(segments);
        Ok(url)
    }

    fn headers(&self) -> Vec<(&'static str, String)> {
        match self.version {
            // the second is what services before 2.27 listen to
            Some(minor) => vec![
                ("openstack-api-version", format!("compute 2.{minor}")),
                ("x-openstack-nova-api-version", format!("2.{minor}")),
            ],
            None => Vec::new(),
        }
    }

    async fn get(&self, url: &Url) -> Result<Value, ServerError> {
        Ok(self.session.call_with(Method::GET, url, None, &self.headers()).await?.body)
    }

    /// The server with this id.
    ///
    /// # Errors
    /// [`ServerError`]; 404 if there is none that this project may see.
    pub async fn server(&self, id: &str) -> Result<Server, ServerError> {
        let url = self.url(&["servers", id])?;
        let answer = self.get(&url).await?;
        Server::parse(&answer["server"]).ok_or_else(|| {
            let what = "the answer is no server".to_owned();
            ApiError::Answer { method: Method::GET, path: url.path().to_owned(), what }.into()
        })
    }

    /// The server with this id, or the only one of this name.
    ///
    /// # Errors
    /// [`ServerError`]; two of one name is an error that lists both ids.
    pub async fn find(&self, name_or_id: &str) -> Result<Server, ServerError> {
        if let Ok(id) = Uuid::parse_str(name_or_id) {
            match self.server(&id.hyphenated().to_string()).await {
                Err(ServerError::Api(error)) if error.status() == Some(StatusCode::NOT_FOUND) => {}
                other => return other,
            }
        }
        // Nova takes a regular expression and finds parts of names, too: what is asked for is equality. A service that takes none gets the name itself
        let mut ids: Vec<String> = Vec::new();
        for pattern in [format!("^{}$", regex_escaped(name_or_id)), name_or_id.to_owned()] {
            let mut url = self.url(&["servers"])?;
            url.query_pairs_mut().append_pair("name", &pattern);
            let answer = self.get(&url).await?;
            let all = answer["servers"].as_array().into_iter().flatten();
            let same = all.filter(|server| server["name"].as_str() == Some(name_or_id));
            ids = same.filter_map(|server| server["id"].as_str().map(str::to_owned)).collect();
            if !ids.is_empty() {
                break;
            }
        }
        match ids.len() {
            0 => Err(ServerError::NotFound { what: printable(name_or_id) }),
            1 => self.server(&ids.remove(0)).await,
            _ => Err(ServerError::Ambiguous { name: printable(name_or_id), ids }),
        }
    }

    /// Disks of a server's flavor, where the server itself does not tell (before 2.47).
    pub async fn disks(&self, server: &Server) -> Option<Disks> {
        if server.disks.is_some() {
            return server.disks;
        }
        let shown = self.get(&self.url(&["servers", &server.id]).ok()?).await.ok()?;
        let flavor = shown["server"]["flavor"]["id"].as_str()?;
        Disks::parse(&self.get(&self.url(&["flavors", flavor]).ok()?).await.ok()?["flavor"])
    }

    /// Asks for something to be done; Nova goes on with it after the answer.
    ///
    /// # Errors
    /// [`ServerError`]: 409 for a server in another state, busy or locked.
    pub async fn act(&self, id: &str, action: Action) -> Result<(), ServerError> {
        let url = self.url(&["servers", id, "action"])?;
        let body = json!({ action.name(): null });
        self.session.call_with(Method::POST, &url, Some(("application/json", &body)), &self.headers()).await?;
        Ok(())
    }

    /// Asks for an image of a server's root disk; returns its id, which is there while Nova goes on.
    ///
    /// # Errors
    /// [`ServerError`]: 409 for a server that is busy, locked, or in a state that Nova makes no images of; 403 for a full quota.
    pub async fn create_image(&self, id: &str, name: &str, metadata: &[(&str, &str)]) -> Result<String, ServerError> {
        let url = self.url(&["servers", id, "action"])?;
        let metadata: serde_json::Map<String, Value> =
            metadata.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        let body = json!({ "createImage": { "name": name, "metadata": metadata } });
        let answer = self.session.call_with(Method::POST, &url, Some(("application/json", &body)), &self.headers()).await?;
        let location = answer.headers.get("location").and_then(|value| value.to_str().ok());
        let from_location = location.and_then(|location| location.trim_end_matches('/').rsplit('/').next());
        let image = answer.body["image_id"].as_str().or(from_location).and_then(|id| Uuid::parse_str(id).ok());
        image.map(|id| id.hyphenated().to_string()).ok_or_else(|| {
            let what = "the answer names no image".to_owned();
            ApiError::Answer { method: Method::POST, path: url.path().to_owned(), what }.into()
        })
    }

    /// Why the latest action of this name failed, as far as Nova tells an ordinary user.
    pub async fn why_it_failed(&self, id: &str, action: &str) -> Option<String> {
        if let Ok(Server { fault: Some(fault), .. }) = self.server(id).await {
            return Some(printable(&fault));
        }
        let actions = self.get(&self.url(&["servers", id, "os-instance-actions"]).ok()?).await.ok()?;
        let latest = actions["instanceActions"].as_array()?.iter().find(|found| found["action"] == action)?.clone();
        let request = latest["request_id"].as_str()?;
        let detail = self.get(&self.url(&["servers", id, "os-instance-actions", request]).ok()?).await.unwrap_or(Value::Null);
        let events = detail["instanceAction"]["events"].as_array().into_iter().flatten();
        let told = events.filter_map(|event| event["details"].as_str()).find(|text| !text.is_empty()).map(str::to_owned);
        let text = told.or_else(|| latest["message"].as_str().map(str::to_owned))?;
        Some(printable(&format!("{text} (request {request})")))
    }
}

impl Session {
    /// Servers of this project that were built from an image, as `name (id)`; `None` where the cloud has no compute service.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn servers_of_image(&self, id: &str) -> Result<Option<Vec<String>>, ApiError> {
        let Some(mut url) = self.compute_url(&["servers"]) else { return Ok(None) };
        url.query_pairs_mut().append_pair("image", id);
        let answer = self.call(Method::GET, &url, None).await?;
        let servers = answer["servers"].as_array().cloned().unwrap_or_default();
        let line = |server: &Value| {
            printable(&format!("{} ({})", server["name"].as_str().unwrap_or_default(), server["id"].as_str().unwrap_or_default()))
        };
        Ok(Some(servers.iter().map(line).collect()))
    }
}

/// Old catalogs put the project behind the version: microversions are told one level up, and paths work without it.
fn without_project(mut url: Url, project: Option<&str>) -> Url {
    let path = url.path().trim_end_matches('/').to_owned();
    if let Some(project) = project
        && let Some(shorter) = path.strip_suffix(project).and_then(|path| path.strip_suffix('/'))
        && shorter.rsplit('/').next().is_some_and(|last| last.starts_with("v2"))
    {
        url.set_path(shorter);
    }
    url
}

/// A name as a regular expression that matches it alone. MySQL's and SQLite's dialects agree on these characters.
fn regex_escaped(name: &str) -> String {
    name.chars().flat_map(|c| if "\\.+*?()|[]{}^$".contains(c) { vec!['\\', c] } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_record_is_read_with_and_without_microversions() {
        let new = json!({
            "id": "s", "name": "web", "status": "ACTIVE", "OS-EXT-STS:task_state": null, "image": { "id": "i" }, "locked": true,
            "flavor": { "disk": 80, "ephemeral": 20, "swap": 512 }, "os-extended-volumes:volumes_attached": [{ "id": "v" }],
        });
        let server = Server::parse(&new).unwrap();
        assert_eq!((server.image_id.as_deref(), server.locked), (Some("i"), Some(true)));
        assert_eq!(server.disks, Some(Disks { root_gib: 80, ephemeral_gib: 20, swap_mib: 512 }));
        assert_eq!(server.volumes, ["v"]);
        let old = json!({ "id": "s", "status": "SHUTOFF", "image": "", "flavor": { "id": "f" } });
        let server = Server::parse(&old).unwrap();
        assert_eq!((server.image_id, server.locked, server.disks), (None, None, None), "volume-backed, and nothing is made up");
        assert!(Server::parse(&json!({ "id": "s" })).is_none());
    }

    #[test]
    fn an_old_catalogs_project_is_taken_off_the_address() {
        let url = |text: &str| Url::parse(text).unwrap();
        assert_eq!(without_project(url("http://n:8774/v2.1/p1"), Some("p1")).as_str(), "http://n:8774/v2.1");
        assert_eq!(without_project(url("http://n/compute/v2.1"), Some("p1")).as_str(), "http://n/compute/v2.1");
        assert_eq!(without_project(url("http://n/p1"), Some("p1")).as_str(), "http://n/p1");
    }

    #[test]
    fn a_name_with_dots_is_no_pattern() {
        assert_eq!(regex_escaped("web.1 (a)"), "web\\.1 \\(a\\)");
    }
}
