//! Image records: create, list, change, delete, with Glance's rules and words.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use hyper::{Response, StatusCode};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::answer::{Body, refuse};

type Refusal<T> = Result<T, Box<Response<Body>>>;

/// Attributes nobody may set.
const READ_ONLY: [&str; 12] = [
    "id",
    "checksum",
    "size",
    "virtual_size",
    "status",
    "created_at",
    "updated_at",
    "self",
    "file",
    "schema",
    "direct_url",
    "stores",
];
/// Formats that Glance knows.
const DISK_FORMATS: [&str; 12] = ["ami", "ari", "aki", "vhd", "vhdx", "vmdk", "raw", "qcow2", "vdi", "iso", "ploop", "gpt"];

/// An image.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its attributes and properties, as they are shown.
    pub shown: Map<String, Value>,
    /// Its bytes.
    pub data: Option<PathBuf>,
    /// A refused upload left a file in the store: each further PUT fails.
    pub spoiled: bool,
    /// Projects that it is shared with, and what each said to that: `pending`, `accepted`, `rejected`.
    pub members: Vec<(String, String)>,
    /// Others use it: it cannot be deleted.
    pub in_use: bool,
}

impl Record {
    /// A text attribute.
    #[must_use]
    pub fn text(&self, key: &str) -> &str {
        self.shown.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// Number of bytes, if there are any.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.shown.get("size").and_then(Value::as_u64)
    }

    /// Its members, as the API shows them to a project: the owner sees all, a member itself.
    #[must_use]
    pub fn members_shown(&self, project: &str) -> Value {
        let seen = self.members.iter().filter(|(member, _)| self.is_owned_by(project) || member == project);
        let shown: Vec<Value> = seen.map(|(member, status)| self.member_shown(member, status)).collect();
        json!({ "members": shown, "schema": "/v2/schemas/members" })
    }

    fn member_shown(&self, member: &str, status: &str) -> Value {
        json!({
            "member_id": member, "image_id": self.text("id"), "status": status, "schema": "/v2/schemas/member",
            "created_at": self.shown["created_at"], "updated_at": self.shown["updated_at"],
        })
    }

    /// Is it this project's?
    #[must_use]
    pub fn is_owned_by(&self, project: &str) -> bool {
        self.text("owner") == project
    }

    /// What a project said to the sharing; `None` for one that it is not shared with.
    #[must_use]
    pub fn member_status(&self, project: &str) -> Option<&str> {
        let shared = self.text("visibility") == "shared";
        let member = self.members.iter().find(|(member, _)| shared && member == project);
        member.map(|(_, status)| status.as_str())
    }

    /// May this project read it by its id? A member may before it has accepted.
    #[must_use]
    pub fn is_visible_to(&self, project: &str) -> bool {
        self.is_owned_by(project)
            || matches!(self.text("visibility"), "public" | "community")
            || self.member_status(project).is_some()
    }

    /// Sets an attribute.
    pub fn set(&mut self, key: &str, value: Value) {
        // each change of the record's state shows in its date
        if key == "status" {
            self.shown.insert("updated_at".to_owned(), now());
        }
        self.shown.insert(key.to_owned(), value);
    }
}

/// A query's value, with everything escaped that could mean something else.
fn encoded(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    value.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// All images, by id; and the ids of deleted ones, which stay taken.
#[derive(Debug, Default)]
pub struct Images(pub BTreeMap<String, Record>, BTreeSet<String>);

fn now() -> Value {
    json!(Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// The error for an image that is not there.
pub fn no_image<T>(id: &str) -> Refusal<T> {
    refuse(StatusCode::NOT_FOUND, format!("No image found with ID {id}"))
}

fn check_settable(key: &str, value: &Value, project: &str) -> Refusal<()> {
    if READ_ONLY.contains(&key) {
        return refuse(StatusCode::FORBIDDEN, format!("Attribute '{key}' is read-only."));
    }
    if key.starts_with("os_glance_") || matches!(key, "locations" | "location" | "deleted" | "deleted_at") {
        return refuse(StatusCode::FORBIDDEN, format!("Attribute '{key}' is reserved."));
    }
    let good = match key {
        "min_disk" | "min_ram" => value.as_u64().is_some(),
        "protected" | "os_hidden" => value.is_boolean(),
        "tags" => value.as_array().is_some_and(|tags| tags.iter().all(Value::is_string)),
        "name" | "disk_format" | "container_format" | "kernel_id" | "ramdisk_id" => value.is_string() || value.is_null(),
        _ => value.as_str().is_some_and(|text| text.chars().count() <= 255),
    };
    if !good {
        return refuse(
            StatusCode::BAD_REQUEST,
            format!("Provided object does not match schema 'image': {value} is not valid for '{key}'"),
        );
    }
    if key == "disk_format" && !value.is_null() && !DISK_FORMATS.contains(&value.as_str().unwrap_or_default()) {
        return refuse(
            StatusCode::BAD_REQUEST,
            format!("Provided object does not match schema 'image': {value} is not one of {DISK_FORMATS:?}"),
        );
    }
    if key == "visibility" && !matches!(value.as_str(), Some("private" | "shared" | "community" | "public")) {
        return refuse(StatusCode::BAD_REQUEST, "Provided object does not match schema 'image': visibility");
    }
    if key == "visibility" && value == "public" {
        return refuse(StatusCode::FORBIDDEN, "You are not authorized to complete publicize_image action.");
    }
    if key == "owner" && value != project {
        return refuse(StatusCode::FORBIDDEN, "You are not permitted to create images owned by another project.");
    }
    Ok(())
}

impl Images {
    /// The image with this id.
    ///
    /// # Errors
    /// 404.
    pub fn get(&self, id: &str) -> Refusal<&Record> {
        self.0.get(id).map_or_else(|| no_image(id), Ok)
    }

    /// The image with this id, for a project that may read it.
    ///
    /// # Errors
    /// 404.
    pub fn get_for(&self, id: &str, project: &str) -> Refusal<&Record> {
        self.0.get(id).filter(|record| record.is_visible_to(project)).map_or_else(|| no_image(id), Ok)
    }

    /// The image with this id, to change.
    ///
    /// # Errors
    /// 404.
    pub fn get_mut(&mut self, id: &str) -> Refusal<&mut Record> {
        if self.0.contains_key(id) { Ok(self.0.get_mut(id).expect("just seen")) } else { no_image(id) }
    }

    /// The image with this id, for a project that may change it.
    ///
    /// # Errors
    /// 404, and 403 for a member.
    pub fn get_mut_for(&mut self, id: &str, project: &str) -> Refusal<&mut Record> {
        if !self.get_for(id, project)?.is_owned_by(project) {
            return refuse(StatusCode::FORBIDDEN, "You are not authorized to complete modify_image action.");
        }
        self.get_mut(id)
    }

    /// POST /v2/images.
    ///
    /// # Errors
    /// 400, 403, 409 as Glance has them.
    pub fn create(&mut self, wanted: &Value, project: &str) -> Refusal<Value> {
        let Some(wanted) = wanted.as_object() else { return refuse(StatusCode::BAD_REQUEST, "Expected JSON object") };
        let id = match wanted.get("id") {
            Some(id) => match id.as_str().and_then(|id| Uuid::parse_str(id).ok()) {
                Some(id) => id.hyphenated().to_string(),
                None => return refuse(StatusCode::BAD_REQUEST, "Provided object does not match schema 'image': id"),
            },
            None => Uuid::new_v4().hyphenated().to_string(),
        };
        if self.0.contains_key(&id) || self.1.contains(&id) {
            return refuse(StatusCode::CONFLICT, format!("Image ID {id} already exists!"));
        }
        let mut shown = Map::new();
        for (key, value) in [
            ("name", Value::Null),
            ("disk_format", Value::Null),
            ("container_format", Value::Null),
            ("visibility", json!("shared")),
            ("size", Value::Null),
            ("virtual_size", Value::Null),
            ("status", json!("queued")),
            ("checksum", Value::Null),
            ("protected", json!(false)),
            ("min_ram", json!(0)),
            ("min_disk", json!(0)),
            ("owner", json!(project)),
            ("os_hidden", json!(false)),
            ("os_hash_algo", Value::Null),
            ("os_hash_value", Value::Null),
            ("id", json!(id)),
            ("created_at", now()),
            ("updated_at", now()),
            ("tags", json!([])),
            ("self", json!(format!("/v2/images/{id}"))),
            ("file", json!(format!("/v2/images/{id}/file"))),
            ("schema", json!("/v2/schemas/image")),
        ] {
            shown.insert(key.to_owned(), value);
        }
        for (key, value) in wanted {
            // the hashes are dropped without a word
            if key == "id" || key == "os_hash_algo" || key == "os_hash_value" {
                continue;
            }
            check_settable(key, value, project)?;
            shown.insert(key.clone(), value.clone());
        }
        self.0.insert(id, Record { shown: shown.clone(), data: None, spoiled: false, members: Vec::new(), in_use: false });
        Ok(Value::Object(shown))
    }

    /// PATCH /v2/images/ID.
    ///
    /// # Errors
    /// 400, 403, 404, 409 as Glance has them.
    pub fn patch(&mut self, id: &str, operations: &Value, project: &str) -> Refusal<Value> {
        let record = self.get_mut_for(id, project)?;
        // A change while the image is being saved is answered with 200 and lost.
        let lost = record.text("status") == "saving";
        let mut shown = record.shown.clone();
        for operation in operations.as_array().into_iter().flatten() {
            let path = operation["path"].as_str().unwrap_or_default();
            let key = path.trim_start_matches('/').replace("~1", "/").replace("~0", "~");
            let there = shown.contains_key(&key);
            match operation["op"].as_str() {
                Some("add" | "replace") => {
                    if operation["op"] == "replace" && !there {
                        return refuse(StatusCode::CONFLICT, format!("Property {key} does not exist."));
                    }
                    check_settable(&key, &operation["value"], project)?;
                    let fixed = matches!(key.as_str(), "disk_format" | "container_format") && record.text("status") != "queued";
                    if fixed {
                        return refuse(
                            StatusCode::FORBIDDEN,
                            format!("Attribute {key} can be only replaced for a queued image."),
                        );
                    }
                    shown.insert(key, operation["value"].clone());
                }
                Some("remove") if there => {
                    shown.remove(&key);
                }
                Some("remove") => return refuse(StatusCode::CONFLICT, format!("Property {key} does not exist.")),
                _ => return refuse(StatusCode::BAD_REQUEST, "Operations must be JSON objects."),
            }
        }
        shown.insert("updated_at".to_owned(), now());
        if !lost {
            record.shown = shown;
        }
        Ok(Value::Object(record.shown.clone()))
    }

    /// POST /v2/images/ID/members.
    ///
    /// # Errors
    /// 403 for an image that is not shared, 404, 409 for one who is a member already.
    pub fn add_member(&mut self, id: &str, member: &str, project: &str) -> Refusal<Value> {
        let record = self.get_mut_for(id, project)?;
        if record.text("visibility") != "shared" {
            return refuse(StatusCode::FORBIDDEN, "Only shared images have members.");
        }
        if record.members.iter().any(|(known, _)| known == member) {
            return refuse(StatusCode::CONFLICT, format!("Member {member} is duplicated for image {id}"));
        }
        record.members.push((member.to_owned(), "pending".to_owned()));
        Ok(record.member_shown(member, "pending"))
    }

    /// PUT /v2/images/ID/members/MEMBER: only a member answers, and for itself.
    ///
    /// # Errors
    /// 400 for a status that there is not, 403 for anybody else, 404.
    pub fn answer_sharing(&mut self, id: &str, member: &str, status: &str, project: &str) -> Refusal<Value> {
        if !matches!(status, "pending" | "accepted" | "rejected") {
            return refuse(StatusCode::BAD_REQUEST, format!("Unexpected status: {status}"));
        }
        let record = self.get_for(id, project)?;
        if record.is_owned_by(project) && member != project {
            return refuse(StatusCode::FORBIDDEN, "You are not authorized to complete modify_member action.");
        }
        if record.member_status(member).is_none() || member != project {
            return refuse(StatusCode::NOT_FOUND, format!("{member} not found in the member list of the image {id}."));
        }
        let record = self.get_mut(id)?;
        record.members.iter_mut().filter(|(known, _)| known == member).for_each(|(_, known)| status.clone_into(known));
        Ok(record.member_shown(member, status))
    }

    /// DELETE /v2/images/ID/members/MEMBER.
    ///
    /// # Errors
    /// 404.
    pub fn remove_member(&mut self, id: &str, member: &str, project: &str) -> Refusal<()> {
        let record = self.get_mut_for(id, project)?;
        let before = record.members.len();
        record.members.retain(|(known, _)| known != member);
        if record.members.len() == before {
            return refuse(StatusCode::NOT_FOUND, format!("{member} not found in the member list of the image {id}."));
        }
        Ok(())
    }

    /// DELETE /v2/images/ID.
    ///
    /// # Errors
    /// 403 if it is protected, 404, 409 if others use it.
    pub fn delete(&mut self, id: &str, project: &str) -> Refusal<()> {
        if !self.get_for(id, project)?.is_owned_by(project) {
            return refuse(StatusCode::FORBIDDEN, "You are not authorized to complete delete_image action.");
        }
        if self.get(id)?.shown["protected"] == true {
            return refuse(StatusCode::FORBIDDEN, format!("Image {id} is protected and cannot be deleted."));
        }
        if self.get(id)?.in_use {
            return refuse(
                StatusCode::CONFLICT,
                format!(
                    "Image {id} could not be deleted because it is in use: The image cannot be deleted because it is in use through the backend store outside of Glance."
                ),
            );
        }
        self.1.insert(id.to_owned());
        if let Some(record) = self.0.remove(id)
            && let Some(path) = record.data
        {
            // a GET that is running has the file open and goes on
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    }

    /// GET /v2/images with filters.
    #[must_use]
    pub fn list(&self, query: &[(String, String)], project: &str) -> Value {
        let find = |key: &str| query.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        let limit = find("limit").and_then(|limit| limit.parse::<usize>().ok()).unwrap_or(25).min(1000);
        let matches = |record: &&Record| {
            query.iter().all(|(key, wanted)| {
                if matches!(key.as_str(), "os_hidden" | "limit" | "marker" | "sort" | "sort_key" | "sort_dir" | "member_status") {
                    return true;
                }
                if key == "size_min" {
                    return record.size().unwrap_or(0) >= wanted.parse().unwrap_or(0);
                }
                if key == "tag" {
                    return record.shown["tags"].as_array().is_some_and(|tags| tags.iter().any(|tag| tag == wanted.as_str()));
                }
                let value = match record.shown.get(key) {
                    Some(Value::String(text)) => text.clone(),
                    Some(other) => other.to_string(),
                    None => String::new(),
                };
                let has_operators = matches!(key.as_str(), "name" | "id" | "status" | "container_format" | "disk_format");
                match wanted.split_once(':').filter(|_| has_operators) {
                    Some(("in", list)) => list.split(',').any(|item| item.trim_matches('"') == value),
                    Some(("eq", wanted)) => value.eq_ignore_ascii_case(wanted),
                    // Glance answers 400
                    Some(_) => false,
                    None => value.eq_ignore_ascii_case(wanted),
                }
            })
        };
        // a shared image is listed once it was accepted, unless other ones are asked for
        let wanted_status = find("member_status").unwrap_or("accepted");
        let listed = |record: &&Record| {
            let of_member = record.member_status(project).is_some_and(|status| wanted_status == "all" || status == wanted_status);
            let community = record.text("visibility") == "community" && find("visibility") == Some("community");
            record.is_owned_by(project) || record.text("visibility") == "public" || community || of_member
        };
        let hidden = find("os_hidden").is_some_and(|hidden| hidden.eq_ignore_ascii_case("true"));
        let mut found: Vec<&Record> = self
            .0
            .values()
            .filter(|record| hidden == (record.shown["os_hidden"] == true))
            .filter(listed)
            .filter(matches)
            .collect();
        if let Some(marker) = find("marker") {
            let at = found.iter().position(|record| record.text("id") == marker).map_or(0, |at| at + 1);
            found.drain(..at);
        }
        let more = found.len() > limit;
        found.truncate(limit);
        let mut answer = json!({ "first": "/v2/images", "schema": "/v2/schemas/images" });
        if more && let Some(last) = found.last() {
            let kept = query.iter().filter(|(key, _)| !matches!(key.as_str(), "limit" | "marker"));
            let kept: String = kept.map(|(key, value)| format!("&{key}={}", encoded(value))).collect();
            answer["next"] = json!(format!("/v2/images?marker={}&limit={limit}{kept}", last.text("id")));
        }
        answer["images"] = found.iter().map(|record| Value::Object(record.shown.clone())).collect();
        answer
    }
}
