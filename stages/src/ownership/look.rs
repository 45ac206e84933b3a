//! A look: what the lists of a family's images show.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{Family, Proof, claim, mark::is_made_of, proof_of};
use crate::openstack::{
    Image,
    marks::{CLAIM_UNTIL, SOURCE_HASH},
};

/// One image, as a look shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Member {
    /// Active, with a valid mark.
    Marked(Proof),
    /// With a valid mark, and deactivated by an administrator.
    Deactivated,
    /// Unmarked: its run may be at it until then.
    Claimed(Timestamp),
    /// Unmarked, and its claim is over, or its run is known to be dead.
    Unclaimed,
    /// Another project's, one of another source's bytes, unmarked and hidden by a person, or with neither mark nor claim: it is passed by, and left alone.
    Foreign,
}

/// What a look shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sighting {
    /// The family's images that are there, by generation.
    pub members: BTreeMap<u8, Member>,
    /// An image outside of the family that answers the same wish: what an earlier release made, or, where any name will do, under another name. Its id, and how
    /// it stands.
    pub other: Option<(String, Member)>,
}

/// Who looks, and at what.
#[derive(Clone, Copy)]
pub struct Lookout<'a> {
    /// The family.
    pub family: &'a Family,
    /// The project whose images count.
    pub project: Option<&'a str>,
    /// The time of the cloud.
    pub now: Timestamp,
    /// Is the run that makes this image known to be over, whatever its claim says?
    pub is_over: &'a dyn Fn(&Image) -> bool,
    /// The source's hash, `ALGORITHM:DIGEST`.
    pub source_hash: Option<&'a str>,
    /// A conversion of any name will do, if it is proven so.
    pub any_name: Option<Proof>,
}

impl Lookout<'_> {
    fn member(&self, image: &Image) -> Member {
        if self.project.is_some() && image.owner.as_deref() != self.project {
            return Member::Foreign;
        }
        match (proof_of(image, self.project), image.status.as_str()) {
            (Some(_), _) if !self.is_of_source(image) => Member::Foreign,
            (Some(proof), "active") => Member::Marked(proof),
            (Some(_), "deactivated") => Member::Deactivated,
            // only the list of visible images is one snapshot with the marks in it
            _ if image.os_hidden == Some(true) => Member::Foreign,
            // whoever took its claim off made it something else
            _ if !claim::is_claimed(image) => Member::Foreign,
            _ if (self.is_over)(image) => Member::Unclaimed,
            _ => claim::good_until(image, self.now).map_or(Member::Unclaimed, Member::Claimed),
        }
    }

    fn is_of_source(&self, image: &Image) -> bool {
        self.family.is_alone() || is_made_of(image, self.family.source(), self.source_hash)
    }

    /// Does an image outside of the family answer the wish?
    fn answers(&self, image: &Image) -> bool {
        match (self.member(image), self.any_name) {
            (Member::Marked(proof), Some(wanted)) => proof >= wanted,
            (Member::Marked(_), None) => {
                image.name.as_deref() == Some(self.family.name()) && image.property(SOURCE_HASH) == self.source_hash
            }
            (Member::Claimed(_), any_name) => any_name.is_some() || image.property(CLAIM_UNTIL).is_some(),
            _ => false,
        }
    }
}

/// What stands: `images` are those of the family's ids, `of_source` those that name the source as theirs, in any order, and each as often as lists have it.
#[must_use]
pub fn look(lookout: &Lookout<'_>, images: &[Image], of_source: &[Image]) -> Sighting {
    let ids = lookout.family.ids();
    let generation = |image: &Image| ids.iter().position(|id| *id == image.id).and_then(|at| u8::try_from(at).ok());
    let mut sighting = Sighting::default();
    for image in images {
        if let Some(generation) = generation(image) {
            sighting.members.insert(generation, lookout.member(image));
        }
    }
    for image in of_source.iter().filter(|image| generation(image).is_none() && lookout.answers(image)) {
        let member = lookout.member(image);
        let is_marked = matches!(member, Member::Marked(_));
        let better = match &sighting.other {
            None => true,
            Some((_, Member::Marked(_))) => false,
            Some(_) => is_marked,
        };
        if better {
            sighting.other = Some((image.id.clone(), member));
        }
    }
    sighting
}

impl Sighting {
    /// The highest marked generation, which is the result, and how it is proven.
    #[must_use]
    pub fn highest(&self) -> Option<(u8, Proof)> {
        self.members.iter().rev().find_map(|(generation, member)| match member {
            Member::Marked(proof) => Some((*generation, *proof)),
            _ => None,
        })
    }

    /// Marked generations.
    pub fn marked(&self) -> impl Iterator<Item = u8> + '_ {
        self.members.iter().filter(|(_, member)| matches!(member, Member::Marked(_))).map(|(generation, _)| *generation)
    }

    /// Generations below the highest mark that are unmarked, and may go (R4). None without a mark.
    #[must_use]
    pub fn lower(&self) -> Vec<u8> {
        let Some((highest, _)) = self.highest() else { return Vec::new() };
        let unmarked = |member: &Member| matches!(member, Member::Claimed(_) | Member::Unclaimed);
        self.members.range(..highest).filter(|(_, member)| unmarked(member)).map(|(generation, _)| *generation).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::ownership::Content;

    fn image(id: &str, more: Value) -> Image {
        let mut record = json!({
            "id": id, "status": "active", "owner": "p", "name": "n", "os_hash_algo": "sha512", "os_hash_value": "ab",
            "updated_at": "2026-01-01T00:00:00Z", "virta_source_id": "s", "virta_run": "r",
        });
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(record).unwrap()
    }

    fn seen(any_name: Option<Proof>, images: &[Image], of_source: &[Image]) -> Sighting {
        let family = Family::of_image("s", "p", "n", Content::Exact);
        let lookout = Lookout {
            family: &family,
            project: Some("p"),
            now: "2026-01-01T00:30:00Z".parse().unwrap(),
            is_over: &|image| image.property("virta_run") == Some("dead"),
            source_hash: Some("sha512:cd"),
            any_name,
        };
        look(&lookout, images, of_source)
    }

    #[test]
    fn a_look_tells_marked_claimed_and_abandoned_images_apart() {
        let id = |generation| Family::of_image("s", "p", "n", Content::Exact).id(generation);
        let until = "2026-01-01T01:00:00Z".parse().unwrap();
        let claim = |seconds: &str, run: &str| json!({ "status": "saving", "virta_claim_s": seconds, "virta_run": run });
        let images = [
            image(&id(0), claim("3600", "r")),
            image(&id(1), claim("60", "r")),
            image(&id(2), claim("3600", "dead")),
            image(&id(3), json!({ "virta_verified": "hash:sha512:ab", "virta_source_hash": "sha512:cd" })),
            image(
                &id(4),
                json!({ "virta_source_hash": "sha512:cd", "virta_verified": "readback:sha512:ab", "status": "deactivated" }),
            ),
            image(&id(5), json!({ "owner": "q" })),
            image(&id(6), json!({ "status": "saving", "os_hidden": true, "virta_claim_s": "60" })),
            // the same image id in another cloud, of other bytes; and an image that a person took for something else
            image(&id(8), json!({ "virta_verified": "hash:sha512:ab", "virta_source_hash": "sha512:ee" })),
            image(&id(9), json!({ "virta_verified": "hash:sha512:ab", "virta_source_id": "t" })),
            image(&id(10), json!({})),
            image("of nobody", json!({})),
        ];
        let sighting = seen(None, &images, &[]);
        let expected = [
            Member::Claimed(until),
            Member::Unclaimed,
            Member::Unclaimed,
            Member::Marked(Proof::Hash),
            Member::Deactivated,
            Member::Foreign,
            Member::Foreign,
            Member::Foreign,
            Member::Foreign,
            Member::Foreign,
        ];
        let generations = (0..7).chain(8..);
        assert_eq!(sighting.members.into_iter().collect::<Vec<_>>(), generations.zip(expected).collect::<Vec<_>>());
        let mut images = images.to_vec();
        images.push(image(&id(7), json!({ "virta_verified": "sent:sha512:ab", "virta_source_hash": "sha512:cd" })));
        let sighting = seen(None, &images, &[]);
        assert_eq!(sighting.highest(), Some((7, Proof::Sent)));
        assert_eq!(sighting.lower(), [0, 1, 2], "neither marked nor hidden ones, nor another project's, nor of other bytes");
        assert_eq!(sighting.marked().collect::<Vec<_>>(), [3, 7]);
        assert_eq!(seen(None, &images[..3], &[]).lower(), [] as [u8; 0], "nothing goes without a mark");
    }

    #[test]
    fn images_of_earlier_releases_and_of_other_names_answer_where_they_may() {
        let marked = |more: Value| {
            let mut record = json!({ "virta_verified": "hash:sha512:ab", "virta_source_hash": "sha512:cd" });
            record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            image("old", record)
        };
        let other = |any_name, image: Image| seen(any_name, &[], &[image]).other.map(|(_, member)| member);
        let hash = Some(Member::Marked(Proof::Hash));
        assert_eq!(other(None, marked(json!({}))), hash);
        assert_eq!(other(None, marked(json!({ "name": "m" }))), None, "another name was wished for");
        assert_eq!(other(None, marked(json!({ "virta_source_hash": "sha512:ee" }))), None, "of another source");
        assert_eq!(other(Some(Proof::Hash), marked(json!({ "name": "m" }))), hash, "any name will do");
        assert_eq!(other(Some(Proof::Readback), marked(json!({ "name": "m" }))), None, "not as strict");
        let until = json!({ "status": "queued", "virta_claim_until": "2026-01-01T00:40:00Z" });
        let claimed = Some(Member::Claimed("2026-01-01T00:40:00Z".parse().unwrap()));
        assert_eq!(other(None, image("old", until.clone())), claimed);
        assert_eq!(other(None, image("old", json!({ "status": "queued", "virta_claim_s": "3600" }))), None, "of another name");
        assert!(other(Some(Proof::Hash), image("old", json!({ "status": "queued", "virta_claim_s": "3600" }))).is_some());
        // a mark goes before a claim, whatever the order
        let both = [image("claimed", until), marked(json!({}))];
        assert_eq!(seen(None, &[], &both).other.unwrap().0, "old");
    }
}
