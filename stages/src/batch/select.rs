//! Wishes out of what the project has: the snapshots of its servers.

use jiff::{SignedDuration, Timestamp};

use crate::openstack::{Image, Session};

/// Which of the project's snapshots.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Those of other users of the project, too.
    pub all_users: bool,
    /// Only larger ones, bytes.
    pub larger_than: Option<u64>,
    /// Only those that are older.
    pub older_than: Option<SignedDuration>,
    /// Only those that have this in their name.
    pub name: Option<String>,
    /// Only those of this server, by its id.
    pub instance: Option<String>,
}

/// What a filter chose, and what it left out.
#[derive(Debug, Default)]
pub struct Selected {
    /// Chosen.
    pub images: Vec<Image>,
    /// Snapshots of other users.
    pub of_others: usize,
    /// Snapshots that the filters left out.
    pub filtered: usize,
}

/// Is it a snapshot that Nova made?
fn is_snapshot(image: &Image) -> bool {
    image.property("image_type") == Some("snapshot")
}

/// Snapshots of this project's servers out of `images`. Conversions that were made of snapshots look like snapshots, but are qcow2: the plan
/// says so of those that are chosen.
#[must_use]
pub fn snapshots(session: &Session, images: &[Image], filter: &Filter) -> Selected {
    let who = session.whoami();
    let mut selected = Selected::default();
    let own = |image: &&Image| who.project_id.is_none() || image.owner == who.project_id;
    // what virta made is no candidate, and a hundred lines that say so help nobody
    let made = |image: &Image| {
        image.disk_format.as_deref() == Some("qcow2") && image.property(crate::openstack::marks::SOURCE_ID).is_some()
    };
    for image in images.iter().filter(own).filter(|image| is_snapshot(image) && !made(image)) {
        let mine = match (image.property("user_id"), &who.user_id) {
            (Some(user), Some(me)) => user == me,
            _ => false,
        };
        if !mine && !filter.all_users {
            selected.of_others += 1;
        } else if filter.takes(image, Timestamp::now()) {
            selected.images.push(image.clone());
        } else {
            selected.filtered += 1;
        }
    }
    selected
}

impl Filter {
    fn takes(&self, image: &Image, now: Timestamp) -> bool {
        let large = self.larger_than.is_none_or(|bytes| image.size.unwrap_or(0) > bytes);
        let named = self
            .name
            .as_ref()
            .is_none_or(|text| image.name.as_deref().unwrap_or_default().to_lowercase().contains(&text.to_lowercase()));
        let of_server = self.instance.as_ref().is_none_or(|server| image.property("instance_uuid") == Some(server));
        let old = self.older_than.is_none_or(|age| {
            let made: Option<Timestamp> = image.created_at.as_deref().and_then(|at| at.parse().ok());
            made.is_some_and(|made| now.duration_since(made) > age)
        });
        large && named && of_server && old
    }
}

/// An age: `90d`, `2w`, `36h`.
///
/// # Errors
/// A text that shows how it is written.
pub fn parse_age(text: &str) -> Result<SignedDuration, String> {
    let bad = || format!("{text:?} is no age: write for example 90d, 2w or 36h");
    let cut = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
    let number: i64 = text[..cut].parse().map_err(|_| bad())?;
    let hours = match text[cut..].trim() {
        "h" => 1,
        "d" => 24,
        "w" => 24 * 7,
        _ => return Err(bad()),
    };
    number.checked_mul(hours).filter(|hours| *hours < 1 << 24).map(SignedDuration::from_hours).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_say_what_they_take() {
        let image: Image = serde_json::from_value(serde_json::json!({
            "id": "i", "status": "active", "name": "web-1", "size": 5_000_000, "created_at": "2026-01-01T00:00:00Z", "instance_uuid": "s"
        }))
        .unwrap();
        let now: Timestamp = "2026-01-11T00:00:00Z".parse().unwrap();
        let takes = |filter: Filter| filter.takes(&image, now);
        assert!(takes(Filter::default()));
        assert!(takes(Filter { larger_than: Some(4_999_999), ..Filter::default() }));
        assert!(!takes(Filter { larger_than: Some(5_000_000), ..Filter::default() }));
        assert!(takes(Filter { older_than: Some(parse_age("9d").unwrap()), ..Filter::default() }));
        assert!(!takes(Filter { older_than: Some(parse_age("2w").unwrap()), ..Filter::default() }));
        assert!(takes(Filter { name: Some("web".into()), ..Filter::default() }));
        assert!(takes(Filter { name: Some("Web".into()), ..Filter::default() }));
        assert!(!takes(Filter { name: Some("db".into()), ..Filter::default() }));
        assert!(!takes(Filter { instance: Some("t".into()), ..Filter::default() }));
    }

    #[test]
    fn ages_are_read_as_documented() {
        assert_eq!(parse_age("36h"), Ok(SignedDuration::from_hours(36)));
        assert_eq!(parse_age("2w"), Ok(SignedDuration::from_hours(336)));
        for text in ["", "d", "3", "3m", "-1d", "99999999999999999999d", "9999999w"] {
            assert!(parse_age(text).is_err(), "{text}");
        }
    }
}
