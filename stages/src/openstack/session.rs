//! A signed-in session: one token for all connections, renewed before it ends and after a 401, one renewal at a time.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jiff::Timestamp;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url, header::HeaderMap};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::{
    config::{CloudConfig, Identity, Project, Secret, User},
    error::ApiError,
    http::{CALL_TIMEOUT, Clients},
    rate::RateLimit,
};
use crate::{
    openstack::{ConfigError, Moment},
    retry::Patience,
};

/// A token with less than this left is renewed first (keystoneauth, `MIN_TOKEN_LIFE_SECONDS`).
const MIN_TOKEN_LIFE_S: i64 = 120;
/// The same for what is asked once, right after a look that had such a token: signing in takes time.
const MIN_TOKEN_LIFE_ONCE_S: i64 = 60;
/// Largest answer to a small call: a page of a thousand images is about 2 MiB.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Tries of a small call that failed on the way.
const CALL_TRIES: u32 = 4;

/// Why signing in failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignInError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Keystone refused.
    #[error("signing in to {cloud} as {user} was refused: check user, password and project")]
    Refused {
        /// The cloud.
        cloud: String,
        /// Whom.
        user: String,
        /// What Keystone said.
        #[source]
        source: ApiError,
    },
    /// Keystone did not answer as it should.
    #[error("signing in to {cloud} at {auth_url}")]
    Call {
        /// The cloud.
        cloud: String,
        /// Where.
        auth_url: String,
        /// What happened.
        #[source]
        source: ApiError,
    },
    /// There is no image service in the catalog, or none that fits.
    #[error("{0}")]
    Catalog(String),
}

/// A service's entry in the catalog.
#[derive(Clone, Debug, Deserialize)]
struct Service {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, Deserialize)]
struct Endpoint {
    #[serde(default)]
    interface: String,
    #[serde(default)]
    region_id: Option<String>,
    /// The old name; Keystone sends both.
    #[serde(default)]
    region: Option<String>,
    #[serde(default)]
    url: String,
}

impl Endpoint {
    fn region_name(&self) -> Option<&str> {
        self.region_id.as_deref().or(self.region.as_deref())
    }
}

/// Who is signed in, and where: the line that a run begins with.
#[derive(Clone, Debug, Default)]
pub struct Whoami {
    /// Cloud's name.
    pub cloud: String,
    /// Region, if known.
    pub region: Option<String>,
    /// Project's name and id.
    pub project: String,
    /// Project's id.
    pub project_id: Option<String>,
    /// User's name.
    pub user: String,
    /// User's id.
    pub user_id: Option<String>,
    /// When the password ends, if it does.
    pub password_expires_at: Option<String>,
}

#[derive(Clone)]
struct Token {
    secret: Secret,
    expires_at: Option<Timestamp>,
    /// The cloud's time when it came, and that moment.
    came: (Timestamp, Moment),
}

struct Inner {
    cloud: CloudConfig,
    clients: Clients,
    token: RwLock<Token>,
    /// Held while somebody renews.
    renewing: Mutex<()>,
    image_url: Url,
    compute_url: Option<Url>,
    whoami: Whoami,
}

/// A signed-in session. Clones are the same session.
#[derive(Clone)]
pub struct Session(Arc<Inner>, Option<RateLimit>);

/// What Keystone answered.
struct SignedIn {
    token: Token,
    catalog: Vec<Service>,
    whoami: Whoami,
}

impl Session {
    /// Signs in and finds the image service.
    ///
    /// # Errors
    /// [`SignInError`].
    pub async fn sign_in(cloud: CloudConfig) -> Result<Self, SignInError> {
        let clients = Clients::new(&cloud)?;
        let signed_in = sign_in(&cloud, &clients).await?;
        let image_url = versioned(image_endpoint(&cloud, &signed_in.catalog)?);
        // a cloud without servers is a cloud, too
        let compute_url = endpoint(&cloud, &signed_in.catalog, "compute").ok();
        Ok(Self(
            Arc::new(Inner {
                cloud,
                clients,
                token: RwLock::new(signed_in.token),
                renewing: Mutex::new(()),
                image_url,
                compute_url,
                whoami: signed_in.whoami,
            }),
            None,
        ))
    }

    /// The same session, whose image data, both ways and of all clones together, is moved no faster than this.
    #[must_use]
    pub fn limited_to(&self, bytes_per_s: u64) -> Self {
        Self(Arc::clone(&self.0), Some(RateLimit::new(bytes_per_s)))
    }

    /// The time of the cloud, as its identity service told it with the token, and gone on since, whatever becomes of this machine's clock. Within what that
    /// request took it is this machine's own, and all of it is where the service does not say.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.token_now().now()
    }

    /// The limit for image data, if there is one.
    #[must_use]
    pub fn rate_bytes_per_s(&self) -> Option<u64> {
        self.1.as_ref().map(RateLimit::bytes_per_s)
    }

    /// Waits until so many bytes of image data may be moved.
    ///
    /// # Cancel safety
    /// Safe; the bytes count as moved.
    pub async fn pace(&self, bytes: u64) {
        if let Some(limit) = &self.1 {
            limit.take(bytes).await;
        }
    }

    /// Who is signed in, and where.
    #[must_use]
    pub fn whoami(&self) -> &Whoami {
        &self.0.whoami
    }

    /// The address of a path below `/v2` of the image service. Segments are escaped.
    ///
    /// # Panics
    /// Never for the endpoints that signing in accepts.
    #[must_use]
    pub fn image_url(&self, segments: &[&str]) -> Url {
        let mut url = self.0.image_url.clone();
        url.path_segments_mut().expect("an http address has segments").pop_if_empty().extend(segments);
        url
    }

    /// The address of a path of the compute service; `None` where the catalog has none.
    #[must_use]
    pub fn compute_url(&self, segments: &[&str]) -> Option<Url> {
        let mut url = self.0.compute_url.clone()?;
        url.path_segments_mut().ok()?.pop_if_empty().extend(segments);
        Some(url)
    }

    fn token_now(&self) -> Token {
        self.0.token.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A token with some life left.
    ///
    /// # Errors
    /// [`SignInError`] if it had to be renewed and that failed.
    pub async fn token(&self) -> Result<Secret, SignInError> {
        self.token_for(MIN_TOKEN_LIFE_S).await
    }

    async fn token_for(&self, seconds: i64) -> Result<Secret, SignInError> {
        let token = self.token_now();
        if !token.ends_within(seconds) {
            return Ok(token.secret);
        }
        self.renew(&token.secret).await
    }

    /// A new token after `rejected` got a 401. Whoever comes second gets the first one's.
    ///
    /// # Errors
    /// [`SignInError`].
    pub async fn renew(&self, rejected: &Secret) -> Result<Secret, SignInError> {
        let _one_at_a_time = self.0.renewing.lock().await;
        let token = self.token_now();
        if token.secret != *rejected {
            return Ok(token.secret);
        }
        let signed_in = sign_in(&self.0.cloud, &self.0.clients).await?;
        let secret = signed_in.token.secret.clone();
        *self.0.token.write().unwrap_or_else(PoisonError::into_inner) = signed_in.token;
        Ok(secret)
    }

    /// A request with this token, without a time-out: for bodies.
    pub fn request(&self, method: Method, url: &Url, token: &Secret) -> RequestBuilder {
        self.0.clients.of(url).request(method, url.clone()).header("x-auth-token", token.reveal())
    }

    /// A small call: renews the token after a 401, tries again what can be tried again, reads the answer's JSON
    /// (`Null` for an empty one).
    ///
    /// # Errors
    /// [`ApiError`].
    ///
    /// # Cancel safety
    /// Dropped in the middle, the service may or may not have acted.
    pub async fn call(&self, method: Method, url: &Url, content: Option<(&'static str, &Value)>) -> Result<Value, ApiError> {
        Ok(self.call_with(method, url, content, &[]).await?.body)
    }

    /// [`Self::call`] with more headers, and with those of the answer.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn call_with(
        &self,
        method: Method,
        url: &Url,
        content: Option<(&'static str, &Value)>,
        headers: &[(&'static str, String)],
    ) -> Result<Answer, ApiError> {
        // What a second POST would do after a lost answer is for the caller to know.
        let repeatable = method != Method::POST;
        let tries = if repeatable { CALL_TRIES } else { 1 };
        let refused = |error: &SignInError| sign_in_failed(&method, url, error);
        let ask = || async {
            let token = self.token().await.map_err(|error| refused(&error))?;
            match self.send(&method, url, content, headers, &token).await {
                Err(error) if error.status() == Some(StatusCode::UNAUTHORIZED) => {
                    let token = self.renew(&token).await.map_err(|error| refused(&error))?;
                    self.send(&method, url, content, headers, &token).await
                }
                other => other,
            }
        };
        Patience::default().retried(tries, ask).await
    }

    async fn send(
        &self,
        method: &Method,
        url: &Url,
        content: Option<(&'static str, &Value)>,
        headers: &[(&'static str, String)],
        token: &Secret,
    ) -> Result<Answer, ApiError> {
        let mut request = self.request(method.clone(), url, token);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        if let Some((kind, body)) = content {
            request = request.header("content-type", kind).body(body.to_string());
        }
        answer(method, url, request).await
    }

    /// Sends a request once: what is not answered is not repeated. For what must not land later than it was meant.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn call_once(&self, method: Method, url: &Url, content: Option<(&'static str, &Value)>) -> Result<Value, ApiError> {
        let token = self.token_for(MIN_TOKEN_LIFE_ONCE_S).await.map_err(|error| sign_in_failed(&method, url, &error))?;
        Ok(self.send(&method, url, content, &[], &token).await?.body)
    }

    /// Projects that the signed-in user may work in, as id and name; none where Keystone does not tell.
    pub async fn own_projects(&self) -> Vec<(String, String)> {
        let Ok(url) = identity_url(&self.0.cloud, "auth/projects") else { return Vec::new() };
        let Ok(answer) = self.call(Method::GET, &url, None).await else { return Vec::new() };
        let projects = answer["projects"].as_array().cloned().unwrap_or_default();
        let text = |project: &Value, key: &str| project[key].as_str().map(str::to_owned);
        projects.iter().filter_map(|project| Some((text(project, "id")?, text(project, "name")?))).collect()
    }

    /// When the token ends; it is renewed before that. With an application credential or a password that is no end of anything.
    #[must_use]
    pub fn token_expires_at(&self) -> Option<Timestamp> {
        self.token_now().expires_at
    }

    /// What one is signed in with, and when that ends, where it does and Keystone tells.
    pub async fn credential(&self) -> (&'static str, Option<String>) {
        match &self.0.cloud.identity {
            Identity::Password { .. } => ("password", self.0.whoami.password_expires_at.clone()),
            Identity::Token { .. } => ("token", self.token_expires_at().map(|end| end.to_string())),
            Identity::ApplicationCredential { id, .. } => {
                let asking = async {
                    let user = self.0.whoami.user_id.as_ref()?;
                    let path = format!("users/{user}/application_credentials/{}", id.as_ref()?);
                    let answer = self.call(Method::GET, &identity_url(&self.0.cloud, &path).ok()?, None).await.ok()?;
                    answer["application_credential"]["expires_at"].as_str().map(str::to_owned)
                };
                ("application credential", asking.await)
            }
        }
    }

    /// Addresses of the services in use, for whoever looks into a configuration.
    #[must_use]
    pub fn endpoints(&self) -> (Url, Option<Url>) {
        (self.0.image_url.clone(), self.0.compute_url.clone())
    }
}

/// A small answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its headers.
    pub headers: HeaderMap,
    /// Its JSON; `Null` for none.
    pub body: Value,
}

fn sign_in_failed(method: &Method, url: &Url, error: &SignInError) -> ApiError {
    use std::error::Error as _;
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    let (method, path) = (method.clone(), url.path().to_owned());
    let what = format!("the token could not be renewed: {error}{cause}");
    match error {
        SignInError::Refused { .. } | SignInError::Config(_) => ApiError::Credentials { method, path, what },
        SignInError::Call { .. } | SignInError::Catalog(_) => ApiError::Answer { method, path, what },
    }
}

/// Sends a small request and reads its JSON.
async fn answer(method: &Method, url: &Url, request: RequestBuilder) -> Result<Answer, ApiError> {
    let whole = async {
        let mut response = request.send().await.map_err(|error| ApiError::connection(method.clone(), url, error))?;
        if !response.status().is_success() {
            return Err(ApiError::from_response(method.clone(), url, response).await);
        }
        let headers = response.headers().clone();
        let bytes = bounded_body(method, url, &mut response).await?;
        if bytes.is_empty() {
            return Ok(Answer { headers, body: Value::Null });
        }
        let body = serde_json::from_slice(&bytes).map_err(|error| ApiError::Answer {
            method: method.clone(),
            path: url.path().to_owned(),
            what: format!("the answer is no JSON: {error}"),
        })?;
        Ok(Answer { headers, body })
    };
    match tokio::time::timeout(CALL_TIMEOUT, whole).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::Silence { method: method.clone(), path: url.path().to_owned(), seconds: CALL_TIMEOUT.as_secs() }),
    }
}

/// A small body. One that does not end is no answer.
async fn bounded_body(method: &Method, url: &Url, response: &mut Response) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| ApiError::broken(method.clone(), url, error))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > ANSWER_BYTES_MAX {
            let what = format!("the answer is longer than {ANSWER_BYTES_MAX} bytes");
            return Err(ApiError::Answer { method: method.clone(), path: url.path().to_owned(), what });
        }
    }
    Ok(bytes)
}

impl Token {
    fn now(&self) -> Timestamp {
        let (then, moment) = self.came;
        then.checked_add(moment.elapsed()).unwrap_or(Timestamp::MAX)
    }

    fn ends_within(&self, seconds: i64) -> bool {
        self.expires_at.is_some_and(|end| end.as_second() - self.now().as_second() < seconds)
    }
}

/// An address below `/v3` of the identity service.
fn identity_url(cloud: &CloudConfig, path: &str) -> Result<Url, ConfigError> {
    let base = cloud.auth_url.trim_end_matches('/');
    let base = if base.ends_with("/v3") { base.to_owned() } else { format!("{}/v3", base.trim_end_matches("/v2.0")) };
    Url::parse(&format!("{base}/{path}")).map_err(|error| ConfigError::File {
        file: format!("cloud {}", cloud.name),
        what: format!("auth_url {} is no address: {error}", cloud.auth_url),
    })
}

/// POST /v3/auth/tokens.
async fn sign_in(cloud: &CloudConfig, clients: &Clients) -> Result<SignedIn, SignInError> {
    let url = identity_url(cloud, "auth/tokens")?;
    let user = user_text(&cloud.identity);
    if let Some(user) = cloud.wants_password_of() {
        return Err(ConfigError::NoPassword { cloud: cloud.name.clone(), user }.into());
    }
    let body = auth_body(cloud);
    let asking = || async {
        let asked = Moment::now();
        let sent = clients.of(&url).post(url.clone()).json(&body).timeout(CALL_TIMEOUT).send().await;
        match sent.map_err(|error| ApiError::connection(Method::POST, &url, error))? {
            response if response.status().is_success() => Ok((response, asked)),
            response => Err(ApiError::from_response(Method::POST, &url, response).await),
        }
    };
    let asked = Patience::default().retried(CALL_TRIES, asking).await;
    let (response, asked) = asked.map_err(|source| match source.status() {
        Some(StatusCode::UNAUTHORIZED) => SignInError::Refused { cloud: cloud.name.clone(), user, source },
        _ => SignInError::Call { cloud: cloud.name.clone(), auth_url: cloud.auth_url.clone(), source },
    })?;
    read_token(cloud, &url, response, asked).await
}

/// The cloud's time when an answer came that took so long, and said that it was `issued` in between: this machine's, if that may be.
fn time_there(here: Timestamp, issued: Timestamp, took: Duration) -> Timestamp {
    here.clamp(issued, issued.checked_add(took).unwrap_or(Timestamp::MAX))
}

async fn read_token(cloud: &CloudConfig, url: &Url, mut response: Response, asked: Moment) -> Result<SignedIn, SignInError> {
    let (here, moment) = (Timestamp::now(), Moment::now());
    let took = asked.elapsed();
    let bad = |what: String| SignInError::Call {
        cloud: cloud.name.clone(),
        auth_url: cloud.auth_url.clone(),
        source: ApiError::Answer { method: Method::POST, path: url.path().to_owned(), what },
    };
    let secret = response.headers().get("x-subject-token").and_then(|value| value.to_str().ok()).map(Secret::new);
    let secret = secret.ok_or_else(|| bad("the answer has no X-Subject-Token".to_owned()))?;
    let body = bounded_body(&Method::POST, url, &mut response).await.map_err(|error| bad(error.to_string()))?;
    let body: Value = serde_json::from_slice(&body).map_err(|error| bad(format!("the answer is no JSON: {error}")))?;
    let token = &body["token"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let expires_at = token["expires_at"].as_str().and_then(|end| end.parse().ok());
    let issued = token["issued_at"].as_str().and_then(|issued| issued.parse().ok());
    let came = (issued.map_or(here, |issued| time_there(here, issued, took)), moment);
    let catalog = match &token["catalog"] {
        Value::Null => Vec::new(), // an unscoped token
        catalog => serde_json::from_value(catalog.clone()).map_err(|error| bad(format!("its catalog: {error}")))?,
    };
    let project_id = text(&token["project"]["id"]);
    let whoami = Whoami {
        cloud: cloud.name.clone(),
        region: cloud.region_name.clone(),
        project: text(&token["project"]["name"]).or_else(|| project_id.clone()).unwrap_or_else(|| "none".to_owned()),
        project_id,
        user: text(&token["user"]["name"]).unwrap_or_else(|| user_text(&cloud.identity)),
        user_id: text(&token["user"]["id"]),
        password_expires_at: text(&token["user"]["password_expires_at"]),
    };
    Ok(SignedIn { token: Token { secret, expires_at, came }, catalog, whoami })
}

fn user_text(identity: &Identity) -> String {
    match identity {
        Identity::Password { user, .. } => user.name.clone().or_else(|| user.id.clone()).unwrap_or_default(),
        Identity::ApplicationCredential { id, name, .. } => {
            format!("application credential {}", id.as_deref().or(name.as_deref()).unwrap_or_default())
        }
        Identity::Token { .. } => "the owner of the token".to_owned(),
    }
}

/// The request body of a sign-in (keystoneauth1, identity/v3).
fn auth_body(cloud: &CloudConfig) -> Value {
    let domain = |id: &Option<String>, name: &Option<String>| match (id, name) {
        (Some(id), _) => json!({ "id": id }),
        (None, Some(name)) => json!({ "name": name }),
        (None, None) => json!({ "id": "default" }),
    };
    let user_json = |user: &User| match &user.id {
        Some(id) => json!({ "id": id }),
        None => json!({ "name": user.name, "domain": domain(&user.domain_id, &user.domain_name) }),
    };
    let project_json = |project: &Project| match &project.id {
        Some(id) => json!({ "id": id }),
        None => json!({ "name": project.name, "domain": domain(&project.domain_id, &project.domain_name) }),
    };
    let identity = match &cloud.identity {
        Identity::Password { user, password } => {
            let mut user = user_json(user);
            user["password"] = json!(password.as_ref().map_or("", Secret::reveal));
            json!({ "methods": ["password"], "password": { "user": user } })
        }
        Identity::ApplicationCredential { id, name, user, secret } => {
            let credential = match id {
                Some(id) => json!({ "id": id, "secret": secret.reveal() }),
                None => json!({ "name": name, "user": user.as_ref().map(user_json), "secret": secret.reveal() }),
            };
            json!({ "methods": ["application_credential"], "application_credential": credential })
        }
        Identity::Token { token } => json!({ "methods": ["token"], "token": { "id": token.reveal() } }),
    };
    // an application credential has its scope; a second one is an error
    match &cloud.project {
        Some(project) => json!({ "auth": { "identity": identity, "scope": { "project": project_json(project) } } }),
        None => json!({ "auth": { "identity": identity } }),
    }
}

/// Where Glance is.
fn image_endpoint(cloud: &CloudConfig, catalog: &[Service]) -> Result<Url, SignInError> {
    match &cloud.image_endpoint_override {
        Some(address) => parse_endpoint("image", address),
        None => endpoint(cloud, catalog, "image"),
    }
}

fn parse_endpoint(kind: &str, text: &str) -> Result<Url, SignInError> {
    let url = Url::parse(text).map_err(|error| SignInError::Catalog(format!("{kind} endpoint {text} is no address: {error}")))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(SignInError::Catalog(format!("{kind} endpoint {text} has scheme {other}, not http or https"))),
    }
}

/// Where a service of this kind is.
fn endpoint(cloud: &CloudConfig, catalog: &[Service], kind: &str) -> Result<Url, SignInError> {
    let all: Vec<&Endpoint> = catalog
        .iter()
        .filter(|service| service.kind == kind)
        .flat_map(|service| &service.endpoints)
        .filter(|endpoint| endpoint.interface.trim_end_matches("URL") == cloud.interface && !endpoint.url.is_empty())
        .collect();
    let regions = || {
        let mut names: Vec<&str> = all.iter().filter_map(|endpoint| endpoint.region_name()).collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    let name = &cloud.name;
    if all.is_empty() {
        let interface = &cloud.interface;
        return Err(SignInError::Catalog(format!(
            "cloud {name} has no {kind} service with a {interface} endpoint in its catalog"
        )));
    }
    let chosen = match &cloud.region_name {
        Some(region) => all.iter().find(|endpoint| endpoint.region_name() == Some(region)).ok_or_else(|| {
            SignInError::Catalog(format!(
                "cloud {name} has no {kind} service in region {region}; there are: {}",
                regions().join(", ")
            ))
        })?,
        None if regions().len() > 1 => {
            return Err(SignInError::Catalog(format!(
                "cloud {name} has several regions: choose one with --os-region-name or OS_REGION_NAME ({})",
                regions().join(", ")
            )));
        }
        None => &all[0],
    };
    parse_endpoint(kind, &chosen.url)
}

/// The endpoint with `/v2`. Many catalogs leave it out; what discovery links say behind a proxy may carry an internal
/// host, so only the path counts, and `/v2` is all that Glance ever had.
fn versioned(mut url: Url) -> Url {
    let path = url.path().trim_end_matches('/').to_owned();
    let last = path.rsplit('/').next().unwrap_or_default();
    let has_version = last.strip_prefix('v').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let base = if has_version { path[..path.len() - last.len() - 1].to_owned() } else { path };
    url.set_path(&format!("{base}/v2"));
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_takes_makes_no_clock_wrong() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let there = |issued| time_there(at(130), at(issued), Duration::from_secs(30)).as_second();
        assert_eq!([70, 100, 115, 130, 190].map(there), [100, 130, 130, 130, 190]);
    }

    fn cloud() -> CloudConfig {
        CloudConfig {
            name: "c".to_owned(),
            auth_url: "http://k".to_owned(),
            identity: Identity::Token { token: Secret::new("t") },
            project: None,
            region_name: None,
            interface: "public".to_owned(),
            image_endpoint_override: None,
            cacert: None,
            client_cert: None,
            insecure: false,
            notices: Vec::new(),
        }
    }

    fn catalog(endpoints: &[(&str, &str, &str)]) -> Vec<Service> {
        let endpoint = |(interface, region, url): &(&str, &str, &str)| Endpoint {
            interface: (*interface).to_owned(),
            region_id: Some((*region).to_owned()),
            region: Some((*region).to_owned()),
            url: (*url).to_owned(),
        };
        vec![Service { kind: "image".to_owned(), endpoints: endpoints.iter().map(endpoint).collect() }]
    }

    #[test]
    fn several_regions_have_to_be_chosen_from() {
        let two = catalog(&[("public", "a", "http://a"), ("public", "b", "http://b"), ("internal", "a", "http://i")]);
        let error = image_endpoint(&cloud(), &two).unwrap_err().to_string();
        assert!(error.contains("(a, b)"), "{error}");
        let chosen = CloudConfig { region_name: Some("b".to_owned()), ..cloud() };
        assert_eq!(image_endpoint(&chosen, &two).unwrap().as_str(), "http://b/");
        let wrong = CloudConfig { region_name: Some("x".to_owned()), ..cloud() };
        assert!(image_endpoint(&wrong, &two).unwrap_err().to_string().contains("there are: a, b"));
        let internal = CloudConfig { interface: "internal".to_owned(), ..cloud() };
        assert_eq!(image_endpoint(&internal, &two).unwrap().as_str(), "http://i/");
        assert!(image_endpoint(&cloud(), &[]).unwrap_err().to_string().contains("no image service"));
    }

    #[test]
    fn v2_is_appended_where_the_catalog_leaves_it_out() {
        for (given, expected) in [
            ("http://h:9292", "http://h:9292/v2"),
            ("http://h:9292/", "http://h:9292/v2"),
            ("http://h/image/v2/", "http://h/image/v2"),
            ("http://h/image", "http://h/image/v2"),
        ] {
            assert_eq!(versioned(Url::parse(given).unwrap()).as_str(), expected);
        }
    }

    #[test]
    fn an_application_credential_is_never_sent_with_a_scope() {
        let identity =
            Identity::ApplicationCredential { id: Some("i".to_owned()), name: None, user: None, secret: Secret::new("s") };
        let body = auth_body(&CloudConfig { identity, ..cloud() });
        assert_eq!(body["auth"].as_object().unwrap().len(), 1, "{body}");
    }
}
