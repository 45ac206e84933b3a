//! The mark: what an image says of its own proof.
//!
//! `virta_verified` is `HOW:ALGORITHM:DIGEST`, where the digest is that of the very image that carries it (`os_hash_value`), or `HOW:id:ID` where Glance
//! computes none. Nova copies an image's properties onto the snapshots of servers that boot from it, marks included; so a mark that names another image's
//! digest says nothing.

use crate::openstack::{
    Image, Session,
    marks::{SOURCE_HASH, SOURCE_ID, VERIFIED},
};

/// Characters of a property that Glance keeps.
const PROPERTY_CHARS: usize = 255;

/// How a marked image was proven, from weak to strong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proof {
    /// Glance has what was sent; what was read was compared with nothing.
    Sent,
    /// What was read has the source's hash, as far as it has one, and Glance has what was sent.
    Hash,
    /// That, and the image was read back and decodes to what was read.
    Readback,
}

impl Proof {
    const fn word(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Hash => "hash",
            Self::Readback => "readback",
        }
    }
}

/// A mark that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The value of `virta_verified`.
    pub verified: String,
    /// How the image was proven.
    pub proof: Proof,
}

impl Mark {
    /// The mark of `image`, proven so. Where Glance records no hash, nothing but reading back proves.
    #[must_use]
    pub fn of(image: &Image, proof: Proof) -> Self {
        let proof = match (proof, image.hash_text()) {
            (Proof::Hash, None) => Proof::Sent,
            (proof, _) => proof,
        };
        Self { verified: value(image, proof), proof }
    }
}

fn value(image: &Image, proof: Proof) -> String {
    let of = image.hash_text().unwrap_or_else(|| format!("id:{}", image.id));
    format!("{}:{of}", proof.word()).chars().take(PROPERTY_CHARS).collect()
}

/// How an image of the own project is proven, as its valid mark says; `None` for one without a valid mark, whatever its status.
#[must_use]
pub fn proof_of(image: &Image, project: Option<&str>) -> Option<Proof> {
    let own = project.is_none() || image.owner.as_deref() == project;
    let marked = image.property(VERIFIED).filter(|_| own)?;
    let hashed = image.hash_text().is_some();
    [Proof::Sent, Proof::Hash, Proof::Readback]
        .into_iter()
        .find(|proof| value(image, *proof) == marked)
        .filter(|proof| hashed || *proof != Proof::Hash)
}

/// Is it an active image of the own project with a valid mark?
#[must_use]
pub fn is_marked(image: &Image, project: Option<&str>) -> bool {
    image.status == "active" && proof_of(image, project).is_some()
}

/// Does `made` say that it was made of this source, and of these bytes where a hash tells? One image id may be in two clouds, and mean two disks.
pub(super) fn is_made_of(made: &Image, source: &str, hash: Option<&str>) -> bool {
    made.property(SOURCE_ID) == Some(source) && hash.is_none_or(|hash| made.property(SOURCE_HASH) == Some(hash))
}

/// Is `made` an active conversion of `source`, proven at least so?
#[must_use]
pub fn is_conversion(session: &Session, made: &Image, source: &Image, at_least: Proof) -> bool {
    let project = session.whoami().project_id.as_deref();
    made.status == "active"
        && made.id != source.id
        && is_made_of(made, &source.id, source.hash_text().as_deref())
        && proof_of(made, project).is_some_and(|proof| proof >= at_least)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn image(hash: Option<&str>, verified: &str) -> Image {
        serde_json::from_value(json!({
            "id": "i", "status": "active", "owner": "p", "os_hash_algo": hash.map(|_| "sha512"), "os_hash_value": hash, VERIFIED: verified,
        }))
        .unwrap()
    }

    #[test]
    fn a_mark_names_the_image_that_carries_it() {
        for proof in [Proof::Sent, Proof::Hash, Proof::Readback] {
            let mark = Mark::of(&image(Some("ab"), ""), proof);
            assert_eq!(mark.proof, proof);
            assert_eq!(proof_of(&image(Some("ab"), &mark.verified), Some("p")), Some(proof));
            assert_eq!(proof_of(&image(Some("ab"), &mark.verified), Some("another")), None, "of another project");
            assert_eq!(proof_of(&image(Some("cd"), &mark.verified), Some("p")), None, "copied by Nova");
        }
        assert_eq!(proof_of(&image(Some("ab"), "hash:sha512:ab"), None), Some(Proof::Hash), "as releases before wrote it");
        for not in ["sha512 of what was sent", "size:1", "hash:", "hash:sha512:a", "booted:sha512:ab", ""] {
            assert_eq!(proof_of(&image(Some("ab"), not), Some("p")), None, "{not}");
        }
    }

    #[test]
    fn where_glance_has_no_hash_only_reading_back_proves() {
        assert_eq!(Mark::of(&image(None, ""), Proof::Hash), Mark { verified: "sent:id:i".to_owned(), proof: Proof::Sent });
        assert_eq!(proof_of(&image(None, "readback:id:i"), Some("p")), Some(Proof::Readback));
        assert_eq!(proof_of(&image(None, "sent:id:i"), Some("p")), Some(Proof::Sent));
        assert_eq!(proof_of(&image(None, "hash:id:i"), Some("p")), None);
        assert_eq!(proof_of(&image(None, "readback:id:j"), Some("p")), None, "copied by Nova");
    }
}
