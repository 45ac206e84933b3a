//! Sharing: an image's members, and their side of it.
//!
//! An image that is `shared` has members, projects of whatever kind of id: Glance takes any string for one and never asks
//! whether it exists. A member can read the image by its id at once; accepting only puts it into the member's lists
//! (docs.openstack.org/api-ref/image/v2, "Sharing").

use reqwest::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{ApiError, Session};

/// A project that an image is shared with.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct Member {
    /// The project's id.
    pub member_id: String,
    /// `pending`, `accepted` or `rejected`.
    pub status: String,
    /// When it was added.
    #[serde(default)]
    pub created_at: Option<String>,
    /// When it last answered.
    #[serde(default)]
    pub updated_at: Option<String>,
}

/// Does this look like a project's id? Keystone makes them of 32 hexadecimal digits; a UUID with hyphens is one, too. What else some
/// cloud may have cannot be told from a name, and a name as member shares with nobody.
#[must_use]
pub fn is_project_id(text: &str) -> bool {
    uuid::Uuid::try_parse(text).is_ok() && matches!(text.len(), 32 | 36)
}

impl Session {
    /// Projects that an image is shared with, and what they said to that.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn memberships(&self, id: &str) -> Result<Vec<Member>, ApiError> {
        let url = self.image_url(&["images", id, "members"]);
        let answer = self.call(Method::GET, &url, None).await?;
        let members = answer.get("members").cloned().unwrap_or_else(|| json!([]));
        serde_json::from_value(members).map_err(|error| ApiError::Answer {
            method: Method::GET,
            path: url.path().to_owned(),
            what: format!("the answer has no members: {error}"),
        })
    }

    /// Ids of the projects that an image is shared with.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn members(&self, id: &str) -> Result<Vec<String>, ApiError> {
        Ok(self.memberships(id).await?.into_iter().map(|member| member.member_id).collect())
    }

    /// Shares an image with a project, which then has to accept it. A project that is a member already stays one.
    ///
    /// # Errors
    /// [`ApiError`]: 403 for an image that is not `shared`.
    pub async fn add_member(&self, id: &str, project: &str) -> Result<(), ApiError> {
        let url = self.image_url(&["images", id, "members"]);
        let body = json!({ "member": project });
        let add = || self.call(Method::POST, &url, Some(("application/json", &body)));
        let known = |result: Result<Value, ApiError>| match result {
            Err(error) if error.status() == Some(StatusCode::CONFLICT) => Ok(()),
            other => other.map(|_| ()),
        };
        match known(add().await) {
            // the answer may have been lost: adding twice is adding
            Err(error) if error.is_retryable() => known(add().await),
            other => other,
        }
    }

    /// Takes the sharing with a project back. A project that is no member is none afterwards either.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn remove_member(&self, id: &str, project: &str) -> Result<bool, ApiError> {
        match self.call(Method::DELETE, &self.image_url(&["images", id, "members", project]), None).await {
            Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// Answers a sharing for the signed-in project: `accepted`, `rejected`, `pending`.
    ///
    /// # Errors
    /// [`ApiError`]: 404 for an image that is not shared with it.
    pub async fn answer_sharing(&self, id: &str, status: &str) -> Result<(), ApiError> {
        let project = self.whoami().project_id.clone().unwrap_or_default();
        let url = self.image_url(&["images", id, "members", &project]);
        self.call(Method::PUT, &url, Some(("application/json", &json!({ "status": status })))).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_project_id() {
        assert!(is_project_id("d3a0d0d3a0d0d3a0d0d3a0d0d3a0d0d3"));
        assert!(is_project_id("d3a0d0d3-a0d0-d3a0-d0d3-a0d0d3a0d0d3"));
        for text in ["project_2001234", "", "default", "{d3a0d0d3-a0d0-d3a0-d0d3-a0d0d3a0d0d3}", "d3a0"] {
            assert!(!is_project_id(text), "{text}");
        }
    }
}
