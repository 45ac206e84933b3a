//! Tokens and the catalog, as Keystone gives them.

use std::{collections::HashMap, time::Duration};

use hyper::{Response, StatusCode, header::HeaderValue};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::answer::{Body, json as json_response};

/// The one user's name, and its password.
pub const USER: &str = "demo";
/// Its password: this service holds nothing worth protecting.
pub const PASSWORD: &str = "demo";
/// The one project's id.
pub const PROJECT_ID: &str = "d3a0d0d3a0d0d3a0d0d3a0d0d3a0d0d3";
/// An application credential's id and secret.
pub const APPLICATION_CREDENTIAL: (&str, &str) = ("a99c4ed0a99c4ed0a99c4ed0a99c4ed0", "demo-secret");

/// Tokens handed out.
#[derive(Debug, Default)]
pub struct Tokens(HashMap<String, Timestamp>);

fn text(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S.000000Z").to_string()
}

impl Tokens {
    /// Is this token good now?
    #[must_use]
    pub fn is_good(&self, token: &str) -> bool {
        self.0.get(token).is_some_and(|end| *end > Timestamp::now())
    }

    /// POST /v3/auth/tokens.
    pub fn sign_in(&mut self, body: &Value, base: &str, life: Duration) -> Response<Body> {
        let identity = &body["auth"]["identity"];
        let user = &identity["password"]["user"];
        let credential = &identity["application_credential"];
        let good = match identity["methods"][0].as_str() {
            Some("password") => user["name"] == USER && user["password"] == PASSWORD,
            Some("application_credential") => {
                let (id, secret) = APPLICATION_CREDENTIAL;
                credential["id"] == id && credential["secret"] == secret && body["auth"]["scope"].is_null()
            }
            Some("token") => identity["token"]["id"].as_str().is_some_and(|token| self.is_good(token)),
            _ => false,
        };
        if !good {
            let message = "The request you have made requires authentication.";
            return json_response(
                StatusCode::UNAUTHORIZED,
                &json!({ "error": { "code": 401, "message": message, "title": "Unauthorized" } }),
            );
        }
        let now = Timestamp::now();
        let life = SignedDuration::try_from(life).unwrap_or(SignedDuration::from_hours(1));
        let end = now.checked_add(life).unwrap_or(Timestamp::MAX);
        let token = Uuid::new_v4().simple().to_string();
        self.0.insert(token.clone(), end);
        let endpoint = |url: String| json!([{ "id": "e", "interface": "public", "region": "RegionOne", "region_id": "RegionOne", "url": url }]);
        let domain = json!({ "id": "default", "name": "Default" });
        let answer = json!({ "token": {
            "methods": identity["methods"],
            "user": { "id": "u", "name": USER, "domain": domain },
            "project": { "id": PROJECT_ID, "name": USER, "domain": domain },
            "roles": [{ "id": "r", "name": "member" }],
            "issued_at": text(now),
            "expires_at": text(end),
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
