//! Tokens and the catalog, as Keystone gives them.

use std::{collections::HashMap, time::Duration};

use hyper::{Response, StatusCode, header::HeaderValue};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::answer::{Body, json as json_response};

/// The user's name, and its project's.
pub const USER: &str = "demo";
/// Its password: this service holds nothing worth protecting.
pub const PASSWORD: &str = "demo";
/// The project's id.
pub const PROJECT_ID: &str = "d3a0d0d3a0d0d3a0d0d3a0d0d3a0d0d3";
/// Another user, with a project of the same name to share images with; the password is the name.
pub const OTHER_USER: &str = "other";
/// That project's id.
pub const OTHER_PROJECT_ID: &str = "07e507e507e507e507e507e507e507e5";
/// An application credential's id and secret.
pub const APPLICATION_CREDENTIAL: (&str, &str) = ("a99c4ed0a99c4ed0a99c4ed0a99c4ed0", "demo-secret");

/// Tokens handed out: until when, and for which project.
#[derive(Debug, Default)]
pub struct Tokens(HashMap<String, (Timestamp, &'static str)>);

/// The name of a project, and of its user.
#[must_use]
pub fn name_of(project: &str) -> &'static str {
    if project == OTHER_PROJECT_ID { OTHER_USER } else { USER }
}

/// GET /v3/auth/projects: where the owner of a token may go.
#[must_use]
pub fn projects(project: &str) -> Value {
    let name = name_of(project);
    json!({ "projects": [{ "id": project, "name": name, "domain_id": "default", "enabled": true }] })
}

fn text(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S.000000Z").to_string()
}

impl Tokens {
    /// Is this token good now?
    #[must_use]
    pub fn is_good(&self, token: &str) -> bool {
        self.project(token).is_some()
    }

    /// The project of a token that is good now.
    #[must_use]
    pub fn project(&self, token: &str) -> Option<&'static str> {
        self.0.get(token).filter(|(end, _)| *end > Timestamp::now()).map(|(_, project)| *project)
    }

    /// POST /v3/auth/tokens.
    pub fn sign_in(&mut self, body: &Value, base: &str, life: Duration, clock_ahead: SignedDuration) -> Response<Body> {
        let identity = &body["auth"]["identity"];
        let user = &identity["password"]["user"];
        let credential = &identity["application_credential"];
        let project = match identity["methods"][0].as_str() {
            Some("password") if user["name"] == USER && user["password"] == PASSWORD => Some(PROJECT_ID),
            Some("password") if user["name"] == OTHER_USER && user["password"] == OTHER_USER => Some(OTHER_PROJECT_ID),
            Some("application_credential") => {
                let (id, secret) = APPLICATION_CREDENTIAL;
                let good = credential["id"] == id && credential["secret"] == secret && body["auth"]["scope"].is_null();
                good.then_some(PROJECT_ID)
            }
            Some("token") => identity["token"]["id"].as_str().and_then(|token| self.project(token)),
            _ => None,
        };
        let Some(project) = project else {
            let message = "The request you have made requires authentication.";
            return json_response(
                StatusCode::UNAUTHORIZED,
                &json!({ "error": { "code": 401, "message": message, "title": "Unauthorized" } }),
            );
        };
        let now = Timestamp::now();
        let life = SignedDuration::try_from(life).unwrap_or(SignedDuration::from_hours(1));
        let end = now.checked_add(life).unwrap_or(Timestamp::MAX);
        let told = |at: Timestamp| text(at.checked_add(clock_ahead).unwrap_or(at));
        let token = Uuid::new_v4().simple().to_string();
        self.0.insert(token.clone(), (end, project));
        let endpoint = |url: String| json!([{ "id": "e", "interface": "public", "region": "RegionOne", "region_id": "RegionOne", "url": url }]);
        let domain = json!({ "id": "default", "name": "Default" });
        let answer = json!({ "token": {
            "methods": identity["methods"],
            "user": { "id": name_of(project), "name": name_of(project), "domain": domain },
            "project": { "id": project, "name": name_of(project), "domain": domain },
            "roles": [{ "id": "r", "name": "member" }],
            "issued_at": told(now),
            "expires_at": told(end),
            "catalog": [
                { "id": "k", "type": "identity", "name": "keystone", "endpoints": endpoint(format!("{base}/v3")) },
                { "id": "n", "type": "compute", "name": "nova", "endpoints": endpoint(format!("{base}/compute/v2.1")) },
                { "id": "g", "type": "image", "name": "glance", "endpoints": endpoint(base.to_owned()) },
            ],
        } });
        let mut response = json_response(StatusCode::CREATED, &answer);
        if let Ok(value) = HeaderValue::from_str(&token) {
            response.headers_mut().insert("x-subject-token", value);
        }
        response
    }
}
