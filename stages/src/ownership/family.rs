//! A family: the ids and names of the images that one conversion may end in.

use serde_json::json;
use uuid::Uuid;

/// Generations of a family. All of them taken and none marked is no accident.
pub const GENERATIONS: u8 = 64;
/// What an unfinished image has behind its name.
pub const UNFINISHED: &str = " (unfinished)";
/// Characters of a name that Glance keeps.
const NAME_CHARS: usize = 255;

/// What of the source's bytes the image shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All of them.
    Exact,
    /// Those that a filesystem uses.
    SkipFree,
}

/// The images that one conversion may end in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    source: String,
    project: String,
    name: String,
    content: Content,
    /// Nobody else can come to the ids of this family.
    random: Option<String>,
}

impl Family {
    /// Of the conversion of image `source` into an image called `name` in `project`.
    #[must_use]
    pub fn of_image(source: &str, project: &str, name: &str, content: Content) -> Self {
        Self { source: source.to_owned(), project: project.to_owned(), name: name.to_owned(), content, random: None }
    }

    /// One that no other run can come to: of a file or a pipe, or of a second image that was asked for.
    #[must_use]
    pub fn alone(self) -> Self {
        Self { random: Some(Uuid::new_v4().hyphenated().to_string()), ..self }
    }

    /// Is it one that no other run can come to?
    #[must_use]
    pub const fn is_alone(&self) -> bool {
        self.random.is_some()
    }

    /// The source's id.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The name that the marked image has.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The id of a generation: UUIDv5 over a JSON array, the same on every machine and in every release.
    #[must_use]
    pub fn id(&self, generation: u8) -> String {
        let content = match self.content {
            Content::Exact => "exact",
            Content::SkipFree => "skip-free",
        };
        let mut parts = vec![json!(self.source), json!(self.project), json!(self.name), json!(content), json!(generation)];
        parts.extend(self.random.as_ref().map(|random| json!(random)));
        let space = Uuid::new_v5(&Uuid::NAMESPACE_OID, b"virta family");
        Uuid::new_v5(&space, serde_json::Value::from(parts).to_string().as_bytes()).hyphenated().to_string()
    }

    /// All ids, in the order of their generations.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        (0..GENERATIONS).map(|generation| self.id(generation)).collect()
    }

    /// The generation that has this id.
    #[must_use]
    pub fn generation(&self, id: &str) -> Option<u8> {
        (0..GENERATIONS).find(|generation| self.id(*generation) == id)
    }

    /// What an image is called until it is marked.
    #[must_use]
    pub fn working_name(&self) -> String {
        let kept = NAME_CHARS - UNFINISHED.chars().count();
        self.name.chars().take(kept).chain(UNFINISHED.chars()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_from_source_project_name_content_and_generation_alone() {
        let family = Family::of_image("s", "p", "n", Content::Exact);
        // python3: uuid5(uuid5(NAMESPACE_OID, "virta family"), '["s","p","n","exact",0]')
        assert_eq!(family.id(0), "b6806320-5d43-5e82-9aed-dfd8a488b2fb");
        let others = [
            Family::of_image("t", "p", "n", Content::Exact),
            Family::of_image("s", "q", "n", Content::Exact),
            Family::of_image("s", "p", "m", Content::Exact),
            Family::of_image("s", "p", "n", Content::SkipFree),
            family.clone().alone(),
            family.clone().alone(),
        ];
        let mut ids: Vec<String> = others.iter().map(|other| other.id(0)).chain(family.ids()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), others.len() + usize::from(GENERATIONS));
        assert_eq!(family.generation(&family.id(63)), Some(63));
        assert_eq!(family.generation(&others[0].id(0)), None);
    }

    #[test]
    fn a_working_name_fits_into_glance() {
        let named = |name: &str| Family::of_image("s", "p", name, Content::Exact).working_name();
        assert_eq!(named("web"), "web (unfinished)");
        let long = named(&"ä".repeat(255));
        assert_eq!(long.chars().count(), 255);
        assert!(long.ends_with("ä (unfinished)"));
    }
}
