//! Names of new images: who has them already, and what a source's name means when its conversion has taken it.

use std::collections::HashSet;

use serde_json::json;

use super::After;
use crate::{
    error::JobError,
    openstack::{
        Change, Image, Session,
        marks::{REPLACES, REPLACES_NAME, SOURCE_HASH, SOURCE_ID},
    },
    ownership::{Content, Family, claim::is_claimed, is_marked, proof_of},
    text::{printable, shell_word},
};

/// Longest name that Glance keeps, characters.
pub const NAME_CHARS_MAX: usize = 255;

/// All images of this name, hidden ones too.
///
/// # Errors
/// [`JobError::Usage`] if the name cannot be an image's: empty, too long, or a UUID.
pub async fn images_of_name(session: &Session, name: &str) -> Result<Vec<Image>, JobError> {
    check_word(name)?;
    let mut images = session.images_and_hidden(&[("name", name)]).await?;
    // some filters match more than the name itself: what is asked for is equality
    images.retain(|image| image.name.as_deref() == Some(name));
    Ok(images)
}

fn check_word(name: &str) -> Result<(), JobError> {
    if name.is_empty() {
        return Err(JobError::Usage("glance: needs a name for the new image, as in glance:my-server-qcow2".to_owned()));
    }
    if name.chars().count() > NAME_CHARS_MAX {
        return Err(JobError::Usage("the new image's name is longer than Glance's 255 characters".to_owned()));
    }
    if uuid::Uuid::parse_str(name).is_ok() {
        return Err(JobError::Usage(format!(
            "{name} is an id: a conversion always makes a new image and never writes into one that is there. Give it a name"
        )));
    }
    Ok(())
}

/// Of the images of one name: the active ones that are in the way of a new one, which are not of its family, of other bytes, or neither marked nor claimed. A
/// source that is to be replaced is not in the way.
pub fn in_the_way<'a>(named: &'a [Image], family: &Family, source: Option<&Image>, after: After) -> Vec<&'a Image> {
    let ids: HashSet<String> = family.ids().into_iter().collect();
    let hash = source.and_then(Image::hash_text);
    let is_own = |image: &Image| {
        ids.contains(&image.id)
            && hash.as_deref().is_none_or(|hash| image.property(SOURCE_HASH) == Some(hash))
            && (proof_of(image, None).is_some() || is_claimed(image))
    };
    let replaced = |image: &Image| after == After::Replace && source.is_some_and(|source| source.id == image.id);
    named.iter().filter(|image| image.status == "active" && !is_own(image) && !replaced(image)).collect()
}

/// The refusal of a name that images have which are in the way.
#[must_use]
pub fn taken(name: &str, others: &[&Image], source: Option<&Image>) -> JobError {
    let lines: Vec<String> = others.iter().map(|image| format!("\n    {}", image.line())).collect();
    let itself = source.is_some_and(|source| others.iter().any(|other| other.id == source.id));
    let replace = if itself { ", or put it in the source's place with --replace" } else { "" };
    JobError::Usage(format!(
        "an image called {} is there already; choose another name{replace}, or make a second one with --force:{}",
        printable(name),
        lines.concat()
    ))
}

/// Is this a finished conversion that has taken its source's name, with the source gone? Then the name means nothing to convert.
///
/// # Errors
/// [`JobError::Api`].
pub async fn has_replaced(session: &Session, image: &Image) -> Result<bool, JobError> {
    let Some(replaced) = image.property(REPLACES) else { return Ok(false) };
    Ok(is_marked(image, session.whoami().project_id.as_deref()) && session.image_if_there(replaced).await?.is_none())
}

/// A source that is not there: did an earlier run convert and delete it? `name_or_id`: the source, as it was written; `made`: ids of images that earlier runs of
/// the very same command made; `new_name`: what the new image is called, unless it gets the source's name.
///
/// What an earlier release left between a source's deletion and the new name is finished.
///
/// # Errors
/// [`JobError`] if Glance cannot be asked, or the name cannot be set.
pub async fn conversion_of_gone(
    source_session: &Session,
    session: &Session,
    name_or_id: &str,
    made: &[String],
    new_name: Option<&str>,
) -> Result<Option<Image>, JobError> {
    let name_or_id = name_or_id.strip_prefix("glance:").unwrap_or(name_or_id);
    let project = session.whoami().project_id.as_deref();
    let is_called = |image: &Image| new_name.is_none_or(|name| image.name.as_deref() == Some(name));
    let mut candidates = Vec::new();
    for key in [REPLACES, REPLACES_NAME, SOURCE_ID] {
        let mut found = session.images_and_hidden(&[(key, name_or_id)]).await?;
        found.retain(|image| image.property(key) == Some(name_or_id) && is_marked(image, project) && is_called(image));
        candidates.extend(sole_result(found, project));
    }
    // what was deleted tells its name to nobody any more
    let ids: Vec<&str> = made.iter().map(String::as_str).collect();
    let mut found = session.images_of_ids(&ids).await?;
    found.retain(|image| is_marked(image, project) && is_called(image));
    candidates.extend(sole_result(found, project));
    for image in candidates {
        // it may only be called otherwise by now
        let Some(source) = image.property(REPLACES).or(image.property(SOURCE_ID)) else { continue };
        if source_session.image_if_there(source).await?.is_none() {
            finish_rename(session, &image).await?;
            return Ok(Some(image));
        }
    }
    Ok(None)
}

/// Of finished conversions, the one that they all are: two runs may have marked one each, and the highest is the result. Those of several sources, or names, are
/// none.
fn sole_result(found: Vec<Image>, project: Option<&str>) -> Option<Image> {
    let of = |image: &Image| (image.property(SOURCE_ID).map(str::to_owned), image.name.clone());
    let first = of(found.first()?);
    if found.iter().any(|image| of(image) != first) {
        return None;
    }
    let (source, name) = (first.0.unwrap_or_default(), first.1.unwrap_or_default());
    let family = Family::of_image(&source, project.unwrap_or_default(), &name, Content::Exact);
    found.into_iter().max_by_key(|image| family.generation(&image.id))
}

/// The last step of a replacement that an earlier release was killed in: the name. Whether there was one to set.
///
/// # Errors
/// [`JobError::Refused`], which says what to type.
pub async fn finish_rename(session: &Session, image: &Image) -> Result<bool, JobError> {
    let Some(name) = image.property(REPLACES_NAME) else { return Ok(false) };
    let mut changes = vec![Change::Set("name".to_owned(), json!(name)), Change::Remove(REPLACES_NAME.to_owned())];
    changes.extend(image.property(REPLACES).map(|_| Change::Remove(REPLACES.to_owned())));
    match session.change_image(&image.id, &changes).await {
        Ok(_) => Ok(true),
        Err(error) => Err(JobError::Refused(format!(
            "the source is deleted and image {id} is its verified conversion, but giving it the source's name failed ({error}): virta image set --name {} {id}",
            shell_word(&printable(name)),
            id = image.shown_id()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openstack::marks;

    fn image(id: &str, status: &str, replaces: Option<&str>) -> Image {
        serde_json::from_value(json!({ "id": id, "status": status, "name": "n", REPLACES: replaces })).unwrap()
    }

    #[test]
    fn of_two_marked_images_of_one_conversion_the_highest_is_the_result() {
        let family = Family::of_image("s", "p", "n", Content::Exact);
        let made = |id: &str, source: &str| -> Image {
            serde_json::from_value(json!({ "id": id, "status": "active", "name": "n", SOURCE_ID: source })).unwrap()
        };
        let both = vec![made(&family.id(2), "s"), made(&family.id(5), "s"), made(&family.id(0), "s")];
        assert_eq!(sole_result(both.clone(), Some("p")).unwrap().id, family.id(5));
        assert_eq!(sole_result([both, vec![made("x", "t")]].concat(), Some("p")), None, "of two sources");
        assert_eq!(sole_result(Vec::new(), None), None);
    }

    #[test]
    fn a_name_is_taken_by_active_images_outside_of_the_family() {
        let family = Family::of_image("s", "p", "n", Content::Exact);
        let mut own = image(&family.id(3), "active", None);
        own.properties.insert(marks::CLAIM_S.to_owned(), json!("3600"));
        let named = [image("s", "active", None), own, image("half", "saving", None)];
        let ids =
            |after| in_the_way(&named, &family, Some(&named[0]), after).iter().map(|image| image.id.as_str()).collect::<Vec<_>>();
        assert_eq!(ids(After::Keep), ["s"]);
        assert!(ids(After::Replace).is_empty());
        let stripped = [image(&family.id(3), "active", None)];
        assert_eq!(
            in_the_way(&stripped, &family, None, After::Keep).len(),
            1,
            "neither marked nor claimed: nobody knows what it is"
        );
    }
}
