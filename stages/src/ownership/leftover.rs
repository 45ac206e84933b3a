//! Unfinished images, and which of them may be deleted without asking.

use std::collections::HashMap;

use jiff::Timestamp;

use super::{Content, Family, Lookout, UNFINISHED, claim, look, proof_of};
use crate::openstack::{
    Image,
    marks::{BENCH, RUN, SOURCE_ID, VERIFIED},
};

/// Why an unfinished image may be deleted, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftover {
    /// Its run is dead, and died here (R6).
    OfDeadRun,
    /// A finished conversion of the same source stands above it (R4).
    BelowResult,
    /// Its run may be at it until then.
    Claimed(Timestamp),
    /// Only a person can tell.
    Unclaimed,
}

impl Leftover {
    /// May it be deleted without asking?
    #[must_use]
    pub const fn may_go(self) -> bool {
        matches!(self, Self::OfDeadRun | Self::BelowResult)
    }
}

/// Is this an image that a run of Virta has begun, and that was never marked? What Nova copies marks onto carries another image's.
#[must_use]
pub fn is_unfinished(image: &Image, project: Option<&str>) -> bool {
    image.property(RUN).is_some()
        && proof_of(image, project).is_none()
        && (claim::is_claimed(image)
            || image.property(BENCH).is_some()
            || (image.property(SOURCE_ID).is_some() && image.property(VERIFIED).is_none()))
}

/// The unfinished ones of a project's images, and what may become of each. `died_here`: did a run of this boot of this machine make this very image, and is it dead? What
/// Nova copies `virta_run` onto is no such image.
#[must_use]
pub fn leftovers<'a>(
    images: &'a [Image],
    project: Option<&str>,
    now: Timestamp,
    died_here: &dyn Fn(&Image) -> bool,
) -> Vec<(&'a Image, Leftover)> {
    let own = |image: &&Image| project.is_none() || image.owner.as_deref() == project;
    let mut of_source: HashMap<&str, Vec<Image>> = HashMap::new();
    for image in images.iter().filter(own) {
        if let Some(source) = image.property(SOURCE_ID) {
            of_source.entry(source).or_default().push(image.clone());
        }
    }
    let is_below = |image: &Image| {
        let named = image.property(SOURCE_ID).zip(image.name.as_deref().and_then(|name| name.strip_suffix(UNFINISHED)));
        let Some((source, name)) = named else { return false };
        let family = Family::of_image(source, project.unwrap_or_default(), name, Content::Exact);
        let Some(generation) = family.generation(&image.id) else { return false };
        let lookout = Lookout { family: &family, project, now, is_over: &|_| false, source_hash: None, any_name: None };
        look(&lookout, of_source.get(source).map_or(&[], Vec::as_slice), &[]).lower().contains(&generation)
    };
    let of_dead_run = |image: &Image| {
        let begun = matches!(image.status.as_str(), "queued" | "saving") || image.property(BENCH).is_some();
        begun && proof_of(image, project).is_none() && died_here(image)
    };
    let judge = |image: &Image| {
        if of_dead_run(image) {
            return Leftover::OfDeadRun;
        }
        if is_below(image) {
            return Leftover::BelowResult;
        }
        claim::good_until(image, now).map_or(Leftover::Unclaimed, Leftover::Claimed)
    };
    let unfinished = images.iter().filter(own).filter(|image| is_unfinished(image, project) || of_dead_run(image));
    unfinished.map(|image| (image, judge(image))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn image(id: &str, more: Value) -> Image {
        let mut record = json!({
            "id": id, "status": "active", "owner": "p", "name": "n (unfinished)", "os_hash_algo": "sha512", "os_hash_value": "ab",
            "updated_at": "2026-01-01T00:00:00Z", "virta_source_id": "s", "virta_run": "r", "virta_claim_s": "3600",
        });
        let more = more.as_object().unwrap().clone();
        for (key, value) in more {
            match value {
                Value::Null => record.as_object_mut().unwrap().remove(&key),
                value => record.as_object_mut().unwrap().insert(key, value),
            };
        }
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn only_what_a_dead_run_of_this_machine_began_or_a_result_stands_above_may_go() {
        let id = |generation| Family::of_image("s", "p", "n", Content::Exact).id(generation);
        let marked = json!({ "name": "n", "virta_verified": "hash:sha512:ab", "virta_claim_s": null });
        let images = [
            image(&id(0), json!({ "virta_run": "dead", "status": "saving" })),
            image(&id(1), json!({ "virta_run": "dead" })),
            image(&id(2), marked.clone()),
            image(&id(3), json!({ "virta_run": "dead" })),
            image(&id(4), json!({})),
            image("of another project", json!({ "owner": "q", "virta_run": "dead", "status": "queued" })),
            image("a bench's", json!({ "virta_run": "dead", "virta_bench": "yes", "virta_source_id": null })),
            image("an upload", json!({ "virta_run": "dead", "virta_source_id": null, "virta_claim_s": null })),
            image("nova's copy", json!({ "virta_verified": "hash:sha512:cd", "virta_claim_s": null })),
            // the snapshot of a server that was booted from a dead run's conversion, while Nova uploads it
            image(
                "nova's upload",
                json!({ "virta_run": "dead", "status": "saving", "virta_verified": "hash:sha512:cd", "virta_claim_s": null }),
            ),
            image(
                "nova's other",
                json!({ "virta_run": "dead", "status": "queued", "virta_source_id": null, "virta_claim_s": null }),
            ),
            image(
                "a snapshot's",
                json!({ "virta_run": "dead", "status": "queued", "virta_source_id": null, "virta_claim_s": null }),
            ),
            image("of an earlier release", json!({ "name": "n", "virta_claim_s": null })),
        ];
        let found = |now: &str| -> Vec<(String, Leftover)> {
            let now = now.parse().unwrap();
            let made_here = |image: &Image| image.property(RUN) == Some("dead") && !image.id.starts_with("nova");
            let found = leftovers(&images, Some("p"), now, &made_here);
            found.into_iter().map(|(image, leftover)| (image.id.clone(), leftover)).collect()
        };
        let claimed = Leftover::Claimed("2026-01-01T01:00:00Z".parse().unwrap());
        let expected = [
            (id(0), Leftover::OfDeadRun),
            (id(1), Leftover::BelowResult),
            (id(3), claimed),
            (id(4), claimed),
            ("a bench's".to_owned(), Leftover::OfDeadRun),
            ("a snapshot's".to_owned(), Leftover::OfDeadRun),
            ("of an earlier release".to_owned(), Leftover::Unclaimed),
        ];
        assert_eq!(found("2026-01-01T00:30:00Z"), expected);
        assert_eq!(found("2026-01-01T02:00:00Z")[2], (id(3), Leftover::Unclaimed), "active: only a person can tell");
        assert!(!Leftover::Unclaimed.may_go() && !claimed.may_go());
    }
}
