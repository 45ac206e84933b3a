//! Images as Glance keeps them: find, create, change, delete; and what a converted image takes over from its source.

use std::{borrow::Cow, collections::BTreeMap};

use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{Session, error::ApiError};
use crate::{
    hash::ExpectedHash,
    text::{printable, size},
};

/// An image's record. Everything but `id` and `status` may be missing or null.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Image {
    /// Its id.
    pub id: String,
    /// `queued`, `saving`, `active`, `deactivated`, …
    pub status: String,
    /// Its name, which need not be unique.
    #[serde(default)]
    pub name: Option<String>,
    /// Bytes; null while there are none.
    #[serde(default)]
    pub size: Option<u64>,
    /// Size of the disk in it, bytes.
    #[serde(default)]
    pub virtual_size: Option<u64>,
    /// MD5; null for images that came through a location.
    #[serde(default)]
    pub checksum: Option<String>,
    /// `sha512`, mostly.
    #[serde(default)]
    pub os_hash_algo: Option<String>,
    /// Its value.
    #[serde(default)]
    pub os_hash_value: Option<String>,
    /// `raw`, `qcow2`, …
    #[serde(default)]
    pub disk_format: Option<String>,
    /// `bare`, …
    #[serde(default)]
    pub container_format: Option<String>,
    /// GiB that a flavor's disk has to have.
    #[serde(default)]
    pub min_disk: Option<u64>,
    /// MiB that a flavor's memory has to have.
    #[serde(default)]
    pub min_ram: Option<u64>,
    /// `private`, `shared`, …
    #[serde(default)]
    pub visibility: Option<String>,
    /// The project that owns it.
    #[serde(default)]
    pub owner: Option<String>,
    /// Cannot be deleted.
    #[serde(default)]
    pub protected: Option<bool>,
    /// Not in ordinary lists.
    #[serde(default)]
    pub os_hidden: Option<bool>,
    /// Tags.
    #[serde(default)]
    pub tags: Vec<String>,
    /// When it was made.
    #[serde(default)]
    pub created_at: Option<String>,
    /// All other properties.
    #[serde(flatten)]
    pub properties: BTreeMap<String, Value>,
}

/// A change of an image's record.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Sets an attribute or a property, whether it is there or not.
    Set(String, Value),
    /// Takes a property off.
    Remove(String),
}

impl Change {
    /// The operation of a JSON patch.
    fn operation(&self) -> Value {
        let path = |key: &str| format!("/{}", key.replace('~', "~0").replace('/', "~1"));
        match self {
            // add overwrites what is there
            Self::Set(key, value) => json!({ "op": "add", "path": path(key), "value": value }),
            Self::Remove(key) => json!({ "op": "remove", "path": path(key) }),
        }
    }
}

/// The kind of content of a change.
const PATCH_TYPE: &str = "application/openstack-images-v2.1-json-patch";

fn patch(changes: &[Change]) -> Value {
    changes.iter().map(Change::operation).collect()
}

/// Why no single image was found, or none that will do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Glance.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// None of that name or id.
    #[error("there is no image {what} in this project: `virta image list` shows what there is")]
    NotFound {
        /// What was looked for.
        what: String,
    },
    /// Several of that name.
    #[error("there are {} images called {name}: use an id instead ({})", .ids.len(), .ids.join(", "))]
    Ambiguous {
        /// The name.
        name: String,
        /// Their ids.
        ids: Vec<String>,
    },
}

impl Image {
    /// Its name, or its id if it has none, harmless for a terminal.
    #[must_use]
    pub fn shown(&self) -> String {
        printable(self.name.as_deref().filter(|name| !name.is_empty()).unwrap_or(&self.id))
    }

    /// The digest to check what is read against: os_hash_value, else checksum, else none.
    #[must_use]
    pub fn expected_hash(&self) -> Option<ExpectedHash> {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let (Some(algorithm), Some(value)) = (filled(&self.os_hash_algo), filled(&self.os_hash_value))
            && crate::hash::Hasher::new(&algorithm).is_some()
        {
            return Some(ExpectedHash { algorithm, value });
        }
        Some(ExpectedHash { algorithm: "md5".to_owned(), value: filled(&self.checksum)? })
    }

    /// [`Self::expected_hash`] as it is written in properties: `ALGORITHM:DIGEST`.
    #[must_use]
    pub fn hash_text(&self) -> Option<String> {
        self.expected_hash().map(|hash| format!("{}:{}", hash.algorithm, hash.value))
    }

    /// What tells that `now` is not this image any more: its data, in short. `updated_at` moves with every tag.
    #[must_use]
    pub fn differs_from(&self, now: &Self) -> Option<&'static str> {
        let moved = |before: &Option<String>, now: &Option<String>| before.is_some() && before != now;
        [
            ("id", self.id != now.id),
            ("size", self.size != now.size),
            ("creation date", self.created_at != now.created_at),
            ("checksum", moved(&self.checksum, &now.checksum)),
            ("hash", moved(&self.os_hash_value, &now.os_hash_value)),
        ]
        .into_iter()
        .find_map(|(what, differs)| differs.then_some(what))
    }

    /// Its id, harmless for a terminal and a shell.
    #[must_use]
    pub fn shown_id(&self) -> String {
        crate::text::shell_word(&printable(&self.id))
    }

    /// A property as text.
    #[must_use]
    pub fn property(&self, key: &str) -> Option<&str> {
        self.properties.get(key).and_then(Value::as_str)
    }

    /// A line that tells it from others: id, size, date.
    #[must_use]
    pub fn line(&self) -> String {
        let bytes = self.size.map_or_else(|| "no data".to_owned(), size);
        printable(&format!("{}  {bytes}  {}  {}", self.id, self.created_at.as_deref().unwrap_or("?"), self.status))
    }

    /// Is it the snapshot of a volume-backed server? Such an image has no bytes of its own: it points at volume snapshots
    /// (nova/compute/api.py, `snapshot_volume_backed`).
    #[must_use]
    pub fn is_volume_backed(&self) -> bool {
        self.property("block_device_mapping").is_some_and(|mapping| !matches!(mapping.trim(), "" | "[]"))
            && self.size.unwrap_or(0) == 0
    }
}

fn parse(value: Value, method: Method, path: &str) -> Result<Image, ApiError> {
    serde_json::from_value(value).map_err(|error| ApiError::Answer {
        method,
        path: path.to_owned(),
        what: format!("the answer is no image: {error}"),
    })
}

/// Ids in one question: an address of some kB is short enough for every proxy.
const IDS_AT_ONCE: usize = 64;

/// Pages of images that are asked for, each of up to 1000.
const PAGES_MAX: usize = 1000;

impl Session {
    /// The image with this id.
    ///
    /// # Errors
    /// [`ApiError`]; 404 if there is none that this project may see.
    pub async fn image(&self, id: &str) -> Result<Image, ApiError> {
        let url = self.image_url(&["images", id]);
        parse(self.call(Method::GET, &url, None).await?, Method::GET, url.path())
    }

    /// The image with this id; `None` if there is none that this project may see.
    ///
    /// # Errors
    /// [`ApiError`], but for a 404.
    pub async fn image_if_there(&self, id: &str) -> Result<Option<Image>, ApiError> {
        match self.image(id).await {
            Ok(image) => Ok(Some(image)),
            Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Does the image belong to the project that one is signed in for? Without a project, as far as anybody can tell.
    #[must_use]
    pub fn owns(&self, image: &Image) -> bool {
        self.whoami().project_id.as_ref().is_none_or(|project| image.owner.as_ref() == Some(project))
    }

    /// All images of this very name that the project may see.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn images_named(&self, name: &str) -> Result<Vec<Image>, ApiError> {
        let mut images = self.images_where("name", name).await?;
        // some filters match more than the name itself: what is asked for is equality
        images.retain(|image: &Image| image.name.as_deref() == Some(name));
        Ok(images)
    }

    /// All images that the project may see and whose attribute or property `key` matches `value`, as Glance filters them.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn images_where(&self, key: &str, value: &str) -> Result<Vec<Image>, ApiError> {
        self.images_matching(&[(key, value)]).await
    }

    /// All images that the project may see and that match every filter, as Glance has them.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn images_matching(&self, filters: &[(&str, &str)]) -> Result<Vec<Image>, ApiError> {
        let mut url = self.image_url(&["images"]);
        for (key, value) in filters {
            url.query_pairs_mut().append_pair(key, &filter(key, value));
        }
        let mut images = Vec::new();
        let mut asked = std::collections::HashSet::new();
        loop {
            // pages that lead back to one that was there have no end
            if !asked.insert(url.clone()) || asked.len() > PAGES_MAX {
                let what = format!("its list of images has no end: {} pages, and it goes on", asked.len());
                return Err(ApiError::Answer { method: Method::GET, path: url.path().to_owned(), what });
            }
            let page = self.call(Method::GET, &url, None).await?;
            let list = page["images"].as_array().cloned().unwrap_or_default();
            for value in list {
                images.push(parse(value, Method::GET, url.path())?);
            }
            let Some(next) = page["next"].as_str() else { break };
            // `next` is a path with a query; only the query is taken, whatever host a proxy put there
            let query = next.split_once('?').map(|(_, query)| query.to_owned());
            url.set_query(query.as_deref());
        }
        Ok(images)
    }

    /// [`Self::images_matching`], hidden images too: Glance lists one kind or the other. The second list, of visible ones, is what counts for an image that
    /// changed sides in between.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn images_and_hidden(&self, filters: &[(&str, &str)]) -> Result<Vec<Image>, ApiError> {
        let hidden: Vec<(&str, &str)> = filters.iter().copied().chain([("os_hidden", "true")]).collect();
        let mut images = self.images_matching(&hidden).await?;
        let visible = self.images_matching(filters).await?;
        images.retain(|image| visible.iter().all(|seen| seen.id != image.id));
        images.extend(visible);
        Ok(images)
    }

    /// Those of these images that the project may see, hidden ones too.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn images_of_ids(&self, ids: &[&str]) -> Result<Vec<Image>, ApiError> {
        let mut images = Vec::new();
        for some in ids.chunks(IDS_AT_ONCE) {
            let (wanted, limit) = (format!("in:{}", some.join(",")), IDS_AT_ONCE.to_string());
            images.extend(self.images_and_hidden(&[("id", &wanted), ("limit", &limit)]).await?);
        }
        Ok(images)
    }

    /// The image with this id, or the only one of this name.
    ///
    /// # Errors
    /// [`ImageError`]; two of one name is an error that lists both ids.
    pub async fn find_image(&self, name_or_id: &str) -> Result<Image, ImageError> {
        // as images are written elsewhere on the command line, and as reports name them
        let name_or_id = name_or_id.strip_prefix("glance:").unwrap_or(name_or_id);
        if let Ok(id) = Uuid::parse_str(name_or_id)
            && let Some(image) = self.image_if_there(&id.hyphenated().to_string()).await?
        {
            return Ok(image);
        }
        let mut images = self.images_named(name_or_id).await?;
        match images.len() {
            0 => Err(ImageError::NotFound { what: printable(name_or_id) }),
            1 => Ok(images.remove(0)),
            _ => Err(ImageError::Ambiguous {
                name: printable(name_or_id),
                ids: images.into_iter().map(|image| image.id).collect(),
            }),
        }
    }

    /// Makes an image's record. The id is in `record`, so that the image can be found even if the answer is lost.
    ///
    /// # Errors
    /// [`ApiError`]: 403 for properties that are not ours to set, 409 for an id that is taken, 413 for a full quota.
    pub async fn create_image(&self, record: &Map<String, Value>) -> Result<Image, ApiError> {
        let url = self.image_url(&["images"]);
        let body = Value::Object(record.clone());
        parse(self.call(Method::POST, &url, Some(("application/json", &body))).await?, Method::POST, url.path())
    }

    /// Sets a property or an attribute of an image; tried again like a GET, for setting twice is setting. Lost while the image is `saving`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn set_property(&self, id: &str, key: &str, value: &Value) -> Result<(), ApiError> {
        self.change_image(id, &[Change::Set(key.to_owned(), value.clone())]).await.map(|_| ())
    }

    /// Changes several properties and attributes at once: all of them, or none.
    ///
    /// # Errors
    /// [`ApiError`]: 403 for what is not the caller's to change, 409 for a property to remove that is not there.
    pub async fn change_image(&self, id: &str, changes: &[Change]) -> Result<Image, ApiError> {
        let url = self.image_url(&["images", id]);
        parse(self.call(Method::PATCH, &url, Some((PATCH_TYPE, &patch(changes)))).await?, Method::PATCH, url.path())
    }

    /// Deletes an image. One that is gone already counts as deleted.
    ///
    /// # Errors
    /// [`ApiError`]: 403 if it is protected, 409 if it is in use.
    pub async fn delete_image(&self, id: &str) -> Result<(), ApiError> {
        match self.call(Method::DELETE, &self.image_url(&["images", id]), None).await {
            Err(error) if matches!(error.status(), Some(StatusCode::NOT_FOUND | StatusCode::GONE)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// [`Self::delete_image`], asked once: a repetition might land when somebody else's work has come to depend on the image.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn delete_image_once(&self, id: &str) -> Result<(), ApiError> {
        match self.call_once(Method::DELETE, &self.image_url(&["images", id]), None).await {
            Err(error) if matches!(error.status(), Some(StatusCode::NOT_FOUND | StatusCode::GONE)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Bytes that the quota still allows for image data; `None` where the service does not say or sets no limit.
    pub async fn quota_left_bytes(&self) -> Option<u64> {
        let usage = self.call(Method::GET, &self.image_url(&["info", "usage"]), None).await.ok()?;
        let total = &usage["usage"]["image_size_total"];
        let limit = total["limit"].as_u64()?; // -1 is no limit
        Some(limit.saturating_sub(total["usage"].as_u64()?).saturating_mul(1 << 20))
    }
}

/// A filter's value as Glance takes it: what stands before the first colon of a name is an operator, if nobody says which one.
fn filter<'a>(key: &str, value: &'a str) -> Cow<'a, str> {
    match key == "name" && value.contains(':') {
        true => Cow::Owned(format!("eq:{value}")),
        false => Cow::Borrowed(value),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::openstack) fn snapshot() -> Image {
        serde_json::from_value(json!({
            "id": "s", "status": "active", "name": "snap", "size": 85899345920_u64, "disk_format": "raw", "checksum": null,
            "os_hash_algo": "sha512", "os_hash_value": "ab", "min_disk": 80, "min_ram": 2048, "tags": ["a"], "protected": true,
            "owner": "o", "visibility": "shared", "file": "/v2/images/s/file", "schema": "/v2/schemas/image", "self": "/v2/images/s",
            "updated_at": "x", "created_at": "y", "virtual_size": null,
            "hw_disk_bus": "virtio", "os_distro": "ubuntu", "instance_uuid": "i", "image_type": "snapshot", "base_image_ref": "b",
            "image_location": "snapshot", "image_state": "available", "kernel_id": "", "ramdisk_id": null, "owner_id": "o", "user_id": "u",
            "img_signature": "x", "img_signature_key_type": "y", "cinder_encryption_key_id": "z", "os_glance_importing_to_stores": "",
            "owner_specified.openstack.md5": "m", "virta_verified": "old", "stores": "file"
        }))
        .unwrap()
    }

    #[test]
    fn hashes_are_optional_and_the_strong_one_goes_first() {
        let mut image = snapshot();
        assert_eq!(image.expected_hash().unwrap().algorithm, "sha512");
        image.os_hash_value = None;
        assert_eq!(image.expected_hash(), None, "as after a direct Ceph snapshot");
        image.checksum = Some("0f".to_owned());
        assert_eq!(image.expected_hash().unwrap().algorithm, "md5");
    }

    #[test]
    fn a_volume_backed_snapshot_is_told_by_its_mapping_and_its_size() {
        let mut image = snapshot();
        image.properties.insert("block_device_mapping".to_owned(), json!("[{\"snapshot_id\": \"x\"}]"));
        assert!(!image.is_volume_backed(), "it has bytes");
        image.size = Some(0);
        assert!(image.is_volume_backed());
    }
}
