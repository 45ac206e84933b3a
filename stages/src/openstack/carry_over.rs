//! What a converted image takes over from its source.

use serde_json::{Map, Value, json};

use super::{
    image::Image,
    marks::{SOURCE_HASH, SOURCE_ID},
};

/// Properties that describe the old bytes, the old place or the old image's life, and that must not or cannot be set on
/// another (glance/api/v2/images.py; nova/compute/utils.py).
pub(super) fn stays_behind(key: &str) -> bool {
    const NAMES: [&str; 27] = [
        "block_device_mapping",
        "bdm_v2",
        "root_device_name",
        "mappings",
        "image_location",
        "image_state",
        "direct_url",
        "locations",
        "location",
        "stores",
        "self",
        "file",
        "schema",
        "updated_at",
        "deleted",
        "deleted_at",
        "cinder_encryption_key_id",
        "cinder_encryption_key_deletion_policy",
        "owner_specified.openstack.md5",
        "owner_specified.openstack.sha256",
        "owner_specified.openstack.object",
        "checksum",
        "virtual_size",
        "os_hash_algo",
        "os_hash_value",
        "created_at",
        "size",
    ];
    // a signature covers the old bytes, and Glance would check it
    NAMES.contains(&key) || key.starts_with("img_signature") || key.starts_with("os_glance") || key.starts_with("virta_")
}

/// Properties that hold ids of users, servers and images of the cloud that they are in.
pub(super) fn is_of_its_cloud(key: &str) -> bool {
    matches!(
        key,
        "owner_id"
            | "user_id"
            | "instance_uuid"
            | "base_image_ref"
            | "kernel_id"
            | "ramdisk_id"
            | "owner_project_name"
            | "owner_user_name"
    )
}

/// May these properties be set on a converted image by hand?
///
/// # Errors
/// A text that names the one that may not, and what to do.
pub fn check_properties(properties: &[(String, String)]) -> Result<(), String> {
    for (key, _) in properties {
        let attribute = matches!(
            key.as_str(),
            "id" | "name"
                | "disk_format"
                | "container_format"
                | "status"
                | "owner"
                | "visibility"
                | "protected"
                | "min_disk"
                | "min_ram"
                | "tags"
                | "os_hidden"
        );
        if attribute {
            return Err(format!(
                "--property {key}: that is an attribute which the conversion sets; change it afterwards with `virta image set`"
            ));
        }
        if stays_behind(key) {
            return Err(format!("--property {key}: that name is reserved"));
        }
    }
    Ok(())
}

/// The record of a converted image: visible, bare, qcow2, with the source's properties, tags and requirements. Name, run and claim are its maker's; `protected` comes
/// with the mark. `elsewhere`: it goes into another cloud, where the source's ids mean nothing.
#[must_use]
pub fn converted_record(
    source: Option<&Image>,
    visibility: &str,
    virtual_bytes: u64,
    properties: &[(String, String)],
    elsewhere: bool,
) -> Map<String, Value> {
    let mut record = Map::new();
    record.insert("disk_format".to_owned(), json!("qcow2"));
    record.insert("container_format".to_owned(), json!("bare"));
    record.insert("visibility".to_owned(), json!(visibility));
    let virtual_gib = virtual_bytes.div_ceil(1 << 30);
    record.insert("min_disk".to_owned(), json!(source.and_then(|source| source.min_disk).unwrap_or(0).max(virtual_gib)));
    if let Some(source) = source {
        record.insert("min_ram".to_owned(), json!(source.min_ram.unwrap_or(0)));
        record.insert("tags".to_owned(), json!(source.tags));
        for (key, value) in &source.properties {
            // values are strings; Nova leaves kernel_id and ramdisk_id null or empty, which a POST refuses
            if let Value::String(text) = value
                && !stays_behind(key)
                && !(elsewhere && is_of_its_cloud(key))
                && !(text.is_empty() && matches!(key.as_str(), "kernel_id" | "ramdisk_id"))
            {
                record.insert(key.clone(), json!(text));
            }
        }
        record.insert(SOURCE_ID.to_owned(), json!(source.id));
        if let Some(hash) = source.hash_text() {
            record.insert(SOURCE_HASH.to_owned(), json!(hash));
        }
    }
    for (key, value) in properties {
        record.insert(key.clone(), json!(value));
    }
    record
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openstack::image::tests::snapshot;

    #[test]
    fn a_converted_image_takes_over_what_describes_the_machine_and_nothing_that_describes_the_bytes() {
        let record = converted_record(
            Some(&snapshot()),
            "private",
            (80 << 30) + 1,
            &[("os_distro".to_owned(), "debian".to_owned())],
            false,
        );
        let keys: Vec<&str> = record.keys().map(String::as_str).collect();
        let mut expected = vec![
            "disk_format",
            "container_format",
            "visibility",
            "min_disk",
            "min_ram",
            "tags",
            "hw_disk_bus",
            "os_distro",
            "instance_uuid",
            "image_type",
            "base_image_ref",
            "owner_id",
            "user_id",
            SOURCE_ID,
            SOURCE_HASH,
        ];
        expected.sort_unstable();
        let mut sorted = keys.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, expected);
        assert_eq!(record["min_disk"], 81, "at least the virtual size");
        assert_eq!(record["visibility"], "private");
        assert_eq!(record["os_distro"], "debian", "--property goes before the source's");
        assert_eq!(record[SOURCE_HASH], "sha512:ab");
    }
}
