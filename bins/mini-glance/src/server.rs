//! The service: start, address, stop; routes.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http_body_util::{BodyExt, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::{
    answer::{Answer, Body, empty, html, json as json_response},
    compute::{Behaviour, Compute, Server},
    data::Storing,
    faults::Faults,
    identity::{PROJECT_ID, Tokens, projects},
    images::Images,
    transfer::{download, upload},
};

/// Largest JSON body.
const JSON_BYTES_MAX: usize = 1 << 20;

/// How to start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Port on loopback; 0 for a free one.
    pub port: u16,
    /// Folder of the store; `None` for a new one that is removed when the service stops.
    pub store: Option<PathBuf>,
    /// How long tokens live.
    pub token_life: Duration,
    /// Where that new folder is made; `None` for the system's place for temporary files.
    pub temporary_in: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self { port: 0, store: None, token_life: Duration::from_secs(3600), temporary_in: None }
    }
}

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The port is taken, or the like.
    #[error("listening on 127.0.0.1:{port}")]
    Listen {
        /// The port asked for.
        port: u16,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No folder for the store.
    #[error("making a folder for the image store")]
    Store(#[source] io::Error),
}

pub(crate) struct State {
    tokens: Tokens,
    pub(crate) images: Images,
    pub(crate) faults: Faults,
    requests: Vec<String>,
    compute: Compute,
}

impl State {
    /// What the project may still store, where there is a limit.
    pub(crate) fn quota_left(&self, project: &str) -> Option<u64> {
        let all = self.faults.quota_bytes?;
        let own = self.images.0.values().filter(|record| record.is_owned_by(project));
        Some(all.saturating_sub(own.filter_map(crate::images::Record::size).sum()))
    }
}

pub(crate) struct Shared {
    state: Mutex<State>,
    base: String,
    pub(crate) store: PathBuf,
    token_life: Duration,
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `act` have servers and images at once, as one who reads and writes both databases.
    pub(crate) fn compute<T>(&self, act: impl FnOnce(&mut Compute, &mut Images) -> T) -> T {
        let state = &mut *self.state();
        act(&mut state.compute, &mut state.images)
    }

    /// Gives an image that Nova makes its bytes: `queued`, `saving`, `active`, unless somebody deletes it meanwhile.
    pub(crate) fn store_image(&self, id: &str, bytes: &[u8]) -> io::Result<bool> {
        let path = self.store.join(id);
        let mut storing = Storing::create(&path)?;
        storing.write(bytes)?;
        let stored = storing.finish()?;
        let mut state = self.state();
        if state.images.get(id).is_err() {
            let _ = std::fs::remove_file(path);
            return Ok(false);
        }
        activate(&mut state, id, &path, &stored);
        Ok(true)
    }
}

/// A running service. Stops when it is dropped.
pub struct MiniGlance {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
    _folder: Option<tempfile::TempDir>,
}

impl MiniGlance {
    /// Starts the service on the current tokio runtime.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let port = config.port;
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let listener = listener.await.map_err(|source| StartError::Listen { port, source })?;
        let address = listener.local_addr().map_err(|source| StartError::Listen { port, source })?;
        let (store, folder) = match config.store {
            Some(store) => (store, None),
            None => {
                let mut builder = tempfile::Builder::new();
                builder.prefix("mini-glance-");
                let folder = match &config.temporary_in {
                    Some(place) => builder.tempdir_in(place),
                    None => builder.tempdir(),
                };
                let folder = folder.map_err(StartError::Store)?;
                (folder.path().to_owned(), Some(folder))
            }
        };
        std::fs::create_dir_all(&store).map_err(StartError::Store)?;
        let state = State {
            tokens: Tokens::default(),
            images: Images::default(),
            faults: Faults::default(),
            requests: Vec::new(),
            compute: Compute::default(),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            base: format!("http://{address}"),
            store,
            token_life: config.token_life,
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { shared, task, _folder: folder })
    }

    /// Its address, for `OS_AUTH_URL` with `/v3` behind it.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.shared.base
    }

    /// A clouds.yaml for it, with one cloud called `mini`.
    #[must_use]
    pub fn clouds_yaml(&self) -> String {
        use crate::identity::{PASSWORD, PROJECT_ID, USER};
        format!("clouds:\n{}", self.cloud_yaml("mini", USER, PASSWORD, PROJECT_ID))
    }

    /// The same with a second one, `other`, which signs in to another project.
    #[must_use]
    pub fn two_clouds_yaml(&self) -> String {
        use crate::identity::{OTHER_PROJECT_ID, OTHER_USER};
        format!("{}{}", self.clouds_yaml(), self.cloud_yaml("other", OTHER_USER, OTHER_USER, OTHER_PROJECT_ID))
    }

    fn cloud_yaml(&self, name: &str, user: &str, password: &str, project: &str) -> String {
        format!(
            "  {name}:\n    auth:\n      auth_url: {}/v3\n      username: {user}\n      password: {password}\n      project_id: {project}\n      \
             user_domain_name: Default\n    region_name: RegionOne\n    interface: public\n    identity_api_version: 3\n",
            self.base()
        )
    }

    /// Changes the faults.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.state().faults);
    }

    /// Has the request come that is never answered?
    #[must_use]
    pub fn held(&self) -> bool {
        self.shared.state().faults.held
    }

    /// Requests so far: method, path, range.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.shared.state().requests.clone()
    }

    /// The images' records.
    #[must_use]
    pub fn images(&self) -> Vec<Value> {
        self.shared.state().images.0.values().map(|record| Value::Object(record.shown.clone())).collect()
    }

    /// Changes an attribute behind the service's back, as an operator with a database would.
    pub fn set(&self, id: &str, key: &str, value: Value) {
        if let Some(record) = self.shared.state().images.0.get_mut(id) {
            record.set(key, value);
        }
    }

    /// Takes an image away behind the service's back.
    pub fn remove(&self, id: &str) {
        self.shared.state().images.0.remove(id);
    }

    /// Adds a running server that was built from an image.
    pub fn add_server(&self, name: &str, image: &str) -> String {
        self.shared.state().compute.add(name, image)
    }

    /// Changes a server behind the service's back.
    pub fn server(&self, id: &str, change: impl FnOnce(&mut Server)) {
        if let Some(server) = self.shared.state().compute.servers.get_mut(id) {
            change(server);
        }
    }

    /// Status and task state of a server.
    #[must_use]
    pub fn server_state(&self, id: &str) -> (String, Option<String>) {
        let state = self.shared.state();
        state
            .compute
            .servers
            .get(id)
            .map_or_else(Default::default, |server| (server.status().to_owned(), server.task_state.map(str::to_owned)))
    }

    /// Changes how the compute service behaves.
    pub fn nova(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.state().compute.behaviour);
    }

    /// Makes an image one that others use: it cannot be deleted.
    pub fn set_in_use(&self, id: &str) {
        if let Some(record) = self.shared.state().images.0.get_mut(id) {
            record.in_use = true;
        }
    }

    /// Shares an image with a project.
    pub fn add_member(&self, id: &str, project: &str) {
        if let Some(record) = self.shared.state().images.0.get_mut(id) {
            record.members.push((project.to_owned(), "pending".to_owned()));
        }
    }

    /// Who an image is shared with.
    #[must_use]
    pub fn members(&self, id: &str) -> Vec<String> {
        let state = self.shared.state();
        let members = state.images.0.get(id).map(|record| record.members.iter().map(|(member, _)| member.clone()).collect());
        members.unwrap_or_default()
    }

    /// Where an image's bytes are.
    #[must_use]
    pub fn data_path(&self, id: &str) -> Option<PathBuf> {
        self.shared.state().images.0.get(id)?.data.clone()
    }

    /// Adds an active image without going through HTTP: `fill` produces its bytes in order.
    ///
    /// # Errors
    /// If the store is full; nothing is added then.
    pub fn add_image(&self, record: &Value, fill: impl FnOnce(&mut Storing) -> io::Result<()>) -> io::Result<String> {
        let made =
            self.shared.state().images.create(record, PROJECT_ID).map_err(|_| io::Error::other("the record is not accepted"))?;
        let id = made["id"].as_str().unwrap_or_default().to_owned();
        let path = self.shared.store.join(&id);
        let stored = (|| {
            let mut storing = Storing::create(&path)?;
            fill(&mut storing)?;
            storing.finish()
        })();
        match stored {
            Ok(stored) => {
                activate(&mut self.shared.state(), &id, &path, &stored);
                Ok(id)
            }
            Err(error) => {
                self.shared.state().images.0.remove(&id);
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    /// Runs until the process is told to stop.
    pub async fn wait(&mut self) {
        let _ = (&mut self.task).await;
    }
}

impl Drop for MiniGlance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Bytes that wait unread on a connection of a worker that is to die.
const DYING_TAKES_IN: usize = 64 << 10;

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        if shared.state().faults.dying_puts > 0 {
            // who dies halfway must not have been sent everything already
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&stream, DYING_TAKES_IN);
        }
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move { handle(&shared, request).await }
            });
            // as the real one under uWSGI: one response a connection
            let _ = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

pub(crate) fn activate(state: &mut State, id: &str, path: &Path, stored: &crate::data::Stored) {
    let null_hashes = state.faults.null_hashes;
    let Some(record) = state.images.0.get_mut(id) else { return };
    record.data = Some(path.to_owned());
    record.set("size", json!(stored.bytes));
    let virtual_size = match stored.head.get(24..32).filter(|_| stored.head.starts_with(b"QFI\xfb")) {
        Some(bytes) => bytes.try_into().map_or(0, u64::from_be_bytes),
        None => stored.bytes,
    };
    record.set("virtual_size", json!(virtual_size));
    if !null_hashes {
        record.set("checksum", json!(stored.md5));
        record.set("os_hash_algo", json!("sha512"));
        record.set("os_hash_value", json!(stored.sha512));
    }
    record.set("stores", json!("file"));
    record.set("status", json!("active"));
}

/// `a=b&c=d`, decoded.
pub(crate) fn query(request: &Request<Incoming>) -> Vec<(String, String)> {
    let decode = |text: &str| {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((&first, after)) = rest.split_first() {
            let hex =
                after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()).and_then(|hex| u8::from_str_radix(hex, 16).ok());
            match (first, hex) {
                (b'%', Some(byte)) => {
                    bytes.push(byte);
                    rest = &after[2..];
                }
                (b'+', _) => {
                    bytes.push(b' ');
                    rest = after;
                }
                _ => {
                    bytes.push(first);
                    rest = after;
                }
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let pairs = request.uri().query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(key, value)| (decode(key), decode(value))).collect()
}

pub(crate) async fn read_json(request: Request<Incoming>) -> io::Result<Value> {
    let bytes = Limited::new(request.into_body(), JSON_BYTES_MAX).collect().await.map_err(io::Error::other)?.to_bytes();
    Ok(serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

async fn handle(shared: &Arc<Shared>, request: Request<Incoming>) -> Answer {
    let path = request.uri().path().trim_end_matches('/').to_owned();
    let range = request.headers().get("range").and_then(|range| range.to_str().ok()).unwrap_or_default().to_owned();
    let (latency, hold) = {
        let mut state = shared.state();
        state.requests.push(format!("{} {path} {range}", request.method()).trim_end().to_owned());
        let hold = if path.starts_with("/v3") { None } else { state.faults.holds_this_one() };
        state.faults.held |= hold == Some(false);
        (state.faults.latency, hold)
    };
    if hold == Some(false) {
        // as long as the client lives; when it is gone, this future goes with its connection
        std::future::pending::<()>().await;
    }
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    let id_header = HeaderValue::from_str(&format!("req-{}", uuid::Uuid::new_v4())).map_err(io::Error::other)?;
    let mut response = route(shared, request, &path, &range).await?;
    if hold == Some(true) {
        shared.state().faults.held = true;
        std::future::pending::<()>().await;
    }
    response.headers_mut().insert("x-openstack-request-id", id_header);
    Ok(response)
}

async fn route(shared: &Arc<Shared>, request: Request<Incoming>, path: &str, range: &str) -> Answer {
    let base = &shared.base;
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let link = |path: &str| json!([{ "rel": "self", "href": format!("{base}{path}") }]);
    match (request.method(), segments.as_slice()) {
        (&Method::GET, ["v3"]) => {
            let version = json!({ "version": { "id": "v3.14", "status": "stable", "links": link("/v3/") } });
            return Ok(json_response(StatusCode::OK, &version));
        }
        (&Method::GET, [] | ["versions"]) => {
            let versions = json!({ "versions": [{ "id": "v2.9", "status": "CURRENT", "links": link("/v2/") }] });
            return Ok(json_response(StatusCode::MULTIPLE_CHOICES, &versions));
        }
        (&Method::POST, ["v3", "auth", "tokens"]) => {
            let body = read_json(request).await?;
            let life = shared.token_life;
            let mut state = shared.state();
            let clock_ahead = state.faults.clock_ahead;
            return Ok(state.tokens.sign_in(&body, base, life, clock_ahead));
        }
        _ => {}
    }
    let project = {
        let mut state = shared.state();
        let token = request.headers().get("x-auth-token").and_then(|token| token.to_str().ok()).unwrap_or_default();
        let expired = state.tokens.is_good(token) && Faults::take(&mut state.faults.expired_tokens);
        let project = state.tokens.project(token).filter(|_| !expired);
        let Some(project) = project else {
            let mut response = html(
                StatusCode::UNAUTHORIZED,
                "This server could not verify that you are authorized to access the document you requested.",
            );
            let value = HeaderValue::from_str(&format!("Keystone uri=\"{base}/v3\"")).map_err(io::Error::other)?;
            response.headers_mut().insert("www-authenticate", value);
            return Ok(response);
        };
        if state.faults.fails_this_one() {
            return Ok(html(StatusCode::SERVICE_UNAVAILABLE, "The server is currently unavailable."));
        }
        project
    };
    let unbox = |result: Result<Response<Body>, Box<Response<Body>>>| result.unwrap_or_else(|refusal| *refusal);
    let method = request.method().clone();
    match (method, segments.as_slice()) {
        (Method::GET, ["v2", "images"]) => {
            Ok(json_response(StatusCode::OK, &shared.state().images.list(&query(&request), project)))
        }
        (Method::POST, ["v2", "images"]) => {
            let body = read_json(request).await?;
            let mut state = shared.state();
            if Faults::take(&mut state.faults.failing_posts) {
                return Ok(html(StatusCode::SERVICE_UNAVAILABLE, "The server is currently unavailable."));
            }
            if let Some(key) = state.faults.refused_properties.iter().find(|key| body.get(key.as_str()).is_some()) {
                return Ok(html(StatusCode::FORBIDDEN, &format!("Attribute '{key}' is reserved.")));
            }
            let created = state.images.create(&body, project);
            Ok(unbox(created.map(|image| json_response(StatusCode::CREATED, &image))))
        }
        (Method::GET, ["v2", "images", id]) => {
            let state = shared.state();
            let found = state
                .images
                .get_for(id, project)
                .map(|record| json_response(StatusCode::OK, &Value::Object(record.shown.clone())));
            Ok(unbox(found))
        }
        (Method::PATCH, ["v2", "images", id]) => {
            let id = (*id).to_owned();
            let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
            if !kind.starts_with("application/openstack-images-v2") {
                return Ok(html(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Unsupported Content-Type"));
            }
            let body = read_json(request).await?;
            if Faults::take(&mut shared.state().faults.failing_patches) {
                return Ok(html(StatusCode::SERVICE_UNAVAILABLE, "The server is currently unavailable."));
            }
            let speaks_of = |(key, _): &mut (String, bool)| body.to_string().contains(key.as_str());
            let lost = shared.state().faults.lost_patch_of.take_if(speaks_of);
            if let Some((_, acted_upon)) = lost {
                if acted_upon {
                    let _ = shared.state().images.patch(&id, &body, project);
                }
                return Ok(html(StatusCode::SERVICE_UNAVAILABLE, "The server is currently unavailable."));
            }
            let patched = shared.state().images.patch(&id, &body, project);
            Ok(unbox(patched.map(|image| json_response(StatusCode::OK, &image))))
        }
        (Method::DELETE, ["v2", "images", id]) => {
            if Faults::take(&mut shared.state().faults.failing_deletes) {
                return Ok(html(StatusCode::SERVICE_UNAVAILABLE, "The server is currently unavailable."));
            }
            let mut state = shared.state();
            let deleted = state.images.delete(id, project);
            if std::mem::take(&mut state.faults.lost_delete) {
                return Ok(html(StatusCode::SERVICE_UNAVAILABLE, "The server is currently unavailable."));
            }
            Ok(unbox(deleted.map(|()| empty(StatusCode::NO_CONTENT))))
        }
        (Method::GET, ["v2", "images", id, "file"]) => download(shared, id, range, project),
        (Method::PUT, ["v2", "images", id, "file"]) => {
            let id = (*id).to_owned();
            upload(shared, &id, request, project).await
        }
        (Method::PUT | Method::DELETE, ["v2", "images", id, "tags", tag]) => {
            let mut state = shared.state();
            let adds = request.method() == Method::PUT;
            let tagged = state.images.get_mut_for(id, project).map(|record| {
                if let Some(tags) = record.shown.get_mut("tags").and_then(Value::as_array_mut) {
                    tags.retain(|old| old != tag);
                    if adds {
                        tags.push(json!(tag));
                    }
                }
                empty(StatusCode::NO_CONTENT)
            });
            Ok(unbox(tagged))
        }
        (Method::GET, ["v2", "images", id, "members"]) => {
            let state = shared.state();
            let found = state.images.get_for(id, project);
            Ok(unbox(found.map(|record| json_response(StatusCode::OK, &record.members_shown(project)))))
        }
        (Method::POST, ["v2", "images", id, "members"]) => {
            let id = (*id).to_owned();
            let body = read_json(request).await?;
            let member = body["member"].as_str().unwrap_or_default().to_owned();
            let added = shared.state().images.add_member(&id, &member, project);
            Ok(unbox(added.map(|member| json_response(StatusCode::OK, &member))))
        }
        (Method::GET, ["v2", "images", id, "members", member]) => {
            let state = shared.state();
            let found = state.images.get_for(id, project).map(|record| record.members_shown(project)["members"].clone());
            let found =
                found.map(|shown| shown.as_array().into_iter().flatten().find(|shown| shown["member_id"] == *member).cloned());
            Ok(unbox(found.map(|shown| match shown {
                Some(shown) => json_response(StatusCode::OK, &shown),
                None => html(StatusCode::NOT_FOUND, &format!("{member} not found in the member list of the image {id}.")),
            })))
        }
        (Method::PUT, ["v2", "images", id, "members", member]) => {
            let (id, member) = ((*id).to_owned(), (*member).to_owned());
            let body = read_json(request).await?;
            let status = body["status"].as_str().unwrap_or_default();
            let answered = shared.state().images.answer_sharing(&id, &member, status, project);
            Ok(unbox(answered.map(|member| json_response(StatusCode::OK, &member))))
        }
        (Method::DELETE, ["v2", "images", id, "members", member]) => {
            let removed = shared.state().images.remove_member(id, member, project);
            Ok(unbox(removed.map(|()| empty(StatusCode::NO_CONTENT))))
        }
        (Method::GET, ["v3", "auth", "projects"]) => Ok(json_response(StatusCode::OK, &projects(project))),
        (_, ["compute", rest @ ..]) => {
            let rest: Vec<String> = rest.iter().map(|segment| (*segment).to_owned()).collect();
            crate::compute::route(shared, request, &rest, project).await
        }
        (Method::GET, ["v2", "info", "usage"]) => {
            let left = {
                let state = shared.state();
                state.faults.quota_left_bytes.or(state.quota_left(project))
            };
            let usage = match left {
                Some(left) => json!({ "usage": { "image_size_total": { "limit": (left >> 20) + 1000, "usage": 1000 } } }),
                None => json!({ "usage": {} }),
            };
            Ok(json_response(StatusCode::OK, &usage))
        }
        (Method::GET, ["v2", "info", "import"]) => {
            Ok(json_response(StatusCode::OK, &json!({ "import-methods": { "type": "array", "value": [] } })))
        }
        (Method::GET, ["v2", "info", "stores"]) => {
            Ok(html(StatusCode::NOT_FOUND, "Multi backend is not supported at this site."))
        }
        (Method::GET, ["v2", "schemas", name]) => Ok(json_response(StatusCode::OK, &json!({ "name": name, "properties": {} }))),
        (_, ["v2", "images", ..]) => Ok(html(StatusCode::METHOD_NOT_ALLOWED, "The method is not allowed for this resource.")),
        _ => Ok(html(StatusCode::NOT_FOUND, "The resource could not be found.")),
    }
}
