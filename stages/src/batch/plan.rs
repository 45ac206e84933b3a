//! What becomes of each request, told before anything is done.
//!
//! It is made of one list of the project's images, the journal, and nothing else: a hundred images cost a request or two.

use std::collections::HashMap;

use super::{Journal, Listing, Request};
use crate::{
    convert::{
        After, Options,
        names::{finish_rename, in_the_way},
        source::sole_source,
        to_glance::family_of,
    },
    error::JobError,
    openstack::{
        Image, Session,
        marks::{REPLACES, REPLACES_NAME, SOURCE_ID},
    },
    ownership::{Lookout, Member, is_marked, look, refuse_unmarked},
    text::{counted, printable},
};

/// What is to be done about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Convert it.
    Convert,
    /// Converted already; its source is still to go.
    Finish {
        /// The conversion.
        made: String,
    },
    /// Nothing is left to do.
    Done {
        /// The conversion.
        made: String,
    },
    /// Not a thing to convert.
    Skip {
        /// Why.
        reason: String,
    },
    /// It cannot be done.
    Fail {
        /// Why.
        reason: String,
    },
}

/// A request, its image, and what is to be done about it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What was typed, or the id that a filter chose.
    pub request: Request,
    /// The image, if there is one.
    pub image: Option<Image>,
    /// The new image's name.
    pub new_name: String,
    /// The options for this one.
    pub options: Options,
    /// What is to be done.
    pub verdict: Verdict,
}

impl Entry {
    /// Its size, bytes; 0 where it has none.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.image.as_ref().and_then(|image| image.size).unwrap_or(0)
    }

    /// Is there anything to do?
    #[must_use]
    pub const fn is_work(&self) -> bool {
        matches!(self.verdict, Verdict::Convert | Verdict::Finish { .. })
    }

    /// Its name for people.
    #[must_use]
    pub fn shown(&self) -> String {
        self.image.as_ref().map_or_else(|| printable(&self.request.image), Image::shown)
    }
}

/// A plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In the order of the requests.
    pub entries: Vec<Entry>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// What it was made of.
    pub listing: Listing,
}

/// Replacements that an earlier release left between the deletion of the source and the new name: they are finished.
///
/// Returns whether there were any.
///
/// # Errors
/// [`JobError`].
pub async fn finish_replacements(session: &Session, images: &[Image]) -> Result<bool, JobError> {
    let project = session.whoami().project_id.as_deref();
    let done = |image: &&Image| is_marked(image, project);
    let mut any = false;
    for image in images.iter().filter(done).filter(|image| image.property(REPLACES_NAME).is_some()) {
        let replaced = image.property(REPLACES).or(image.property(SOURCE_ID)).unwrap_or_default();
        if !images.iter().any(|image| image.id == replaced) {
            any |= finish_rename(session, image).await?;
        }
    }
    Ok(any)
}

/// Fills a name template: `{name}`, `{id}`, `{date}` (of the source, `YYYY-MM-DD`).
///
/// # Errors
/// A text that names the field that is not known.
pub fn fill_template(template: &str, image: &Image) -> Result<String, String> {
    let mut text = String::new();
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        text.push_str(&rest[..start]);
        let end = rest[start..].find('}').ok_or_else(|| format!("the name template {template:?} has a {{ without its }}"))?;
        match &rest[start + 1..start + end] {
            "name" => text.push_str(image.name.as_deref().filter(|name| !name.is_empty()).unwrap_or(&image.id)),
            "id" => text.push_str(&image.id),
            "date" => text.push_str(image.created_at.as_deref().unwrap_or_default().get(..10).unwrap_or_default()),
            other => return Err(format!("the name template knows {{name}}, {{id}} and {{date}}, not {{{other}}}")),
        }
        rest = &rest[start + end + 1..];
    }
    text.push_str(rest);
    Ok(text)
}

struct Project<'a> {
    session: &'a Session,
    by_id: HashMap<&'a str, &'a Image>,
    by_name: HashMap<&'a str, Vec<&'a Image>>,
    by_source: HashMap<&'a str, Vec<&'a Image>>,
}

impl<'a> Project<'a> {
    fn new(session: &'a Session, images: &'a [Image]) -> Self {
        let (mut by_id, mut by_name, mut by_source) = (HashMap::new(), HashMap::<_, Vec<_>>::new(), HashMap::<_, Vec<_>>::new());
        for image in images {
            by_id.insert(image.id.as_str(), image);
            if let Some(name) = image.name.as_deref() {
                by_name.entry(name).or_default().push(image);
            }
            if let Some(source) = image.property(SOURCE_ID) {
                by_source.entry(source).or_default().push(image);
            }
        }
        Self { session, by_id, by_name, by_source }
    }

    fn conversions<'b>(&'b self, source: &'b str) -> impl Iterator<Item = &'a Image> + 'b {
        self.by_source.get(source).into_iter().flatten().copied().filter(move |image| image.id != source)
    }
}

impl Plan {
    /// Makes a plan for `requests` out of what the project has.
    ///
    /// `options` are those for all; `template` names what has no name of its own.
    ///
    /// # Errors
    /// [`JobError::Usage`] for a request that contradicts itself, or a template that makes no sense.
    pub fn make(
        session: &Session,
        listing: Listing,
        requests: Vec<Request>,
        options: &Options,
        template: &str,
        journal: Option<&Journal>,
    ) -> Result<Self, JobError> {
        let project = Project::new(session, &listing.images);
        let (mut entries, mut notes) = (Vec::<Entry>::new(), Vec::new());
        let mut ids: HashMap<String, usize> = HashMap::new();
        let mut new_names: HashMap<String, usize> = HashMap::new();
        for request in requests {
            let word = request.image.clone();
            let usage = |what: String| JobError::Usage(format!("{}: {what}", printable(&word)));
            let own = request.options(options).map_err(usage)?;
            let found = project.find(&request, template, journal, &mut notes);
            let (image, mut verdict) = match found {
                Ok(image) => (Some(image), None),
                Err(verdict) => (None, Some(verdict)),
            };
            let new_name = match (&request.name, image) {
                // the mark gives it the source's name at once
                (_, Some(image)) if own.after == After::Replace => image.name.clone().unwrap_or_default(),
                (Some(name), _) => name.clone(),
                (None, Some(image)) => fill_template(template, image).map_err(usage)?,
                (None, None) => String::new(),
            };
            if let Some(image) = image {
                if let Some(first) = ids.insert(image.id.clone(), entries.len()) {
                    ids.insert(image.id.clone(), first);
                    verdict = Some(skip("it is in the list twice"));
                }
                let judged = || project.judge(image, &new_name, &own, request.name.is_none());
                let judged = verdict.unwrap_or_else(judged);
                verdict = Some(match judged {
                    Verdict::Convert => match new_names.get(&new_name) {
                        Some(other) => {
                            let id = entries[*other].image.as_ref().map(Image::shown_id).unwrap_or_default();
                            Verdict::Fail {
                                reason: format!(
                                    "its new name, {}, is also that of the conversion of {id}: put {{id}} or {{date}} into --name-template",
                                    printable(&new_name)
                                ),
                            }
                        }
                        None => {
                            new_names.insert(new_name.clone(), entries.len());
                            Verdict::Convert
                        }
                    },
                    other => other,
                });
            }
            let verdict = verdict.unwrap_or(Verdict::Fail { reason: "there is no such image".to_owned() });
            let options = Options { any_name: request.name.is_none(), ..own };
            entries.push(Entry { request, image: image.cloned(), new_name, options, verdict });
        }
        Ok(Self { entries, notes, listing })
    }

    /// Sources that would go although they are shared with other projects, which would lose them: a request for each that may be. Where Glance does not
    /// say, the run will find out.
    pub async fn refuse_shared(&mut self, session: &Session) {
        for entry in self.entries.iter_mut().filter(|entry| entry.is_work()) {
            let Entry { image: Some(image), options, .. } = &*entry else { continue };
            let stays = options.after == After::Keep || options.copy_members;
            if stays || image.visibility.as_deref() != Some("shared") {
                continue;
            }
            let members = session.members(&image.id).await.map_or(0, |members| members.len());
            if members > 0 {
                let reason = format!(
                    "it is shared with {}, which would lose it: carry them over with --copy-members",
                    counted(members, "project")
                );
                entry.verdict = Verdict::Fail { reason };
            }
        }
    }

    /// Indices of what is to be done, in the order in which it is begun: the largest and the smallest by turns, the smallest first
    /// where `smallest_first`.
    #[must_use]
    pub fn order(&self, smallest_first: bool) -> Vec<usize> {
        let mut work: Vec<usize> = (0..self.entries.len()).filter(|index| self.entries[*index].is_work()).collect();
        work.sort_by_key(|index| (self.entries[*index].bytes(), *index));
        if smallest_first {
            return work;
        }
        let mut order = Vec::with_capacity(work.len());
        let (mut small, mut large) = (0, work.len());
        while small < large {
            large -= 1;
            order.push(work[large]);
            if small < large {
                order.push(work[small]);
                small += 1;
            }
        }
        order
    }

    /// Bytes that are to be read.
    #[must_use]
    pub fn work_bytes(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.is_work()).map(Entry::bytes).sum()
    }

    /// Does any source go?
    #[must_use]
    pub fn deletes(&self) -> bool {
        self.entries.iter().any(|entry| entry.is_work() && entry.options.after != After::Keep)
    }
}

fn skip(reason: &str) -> Verdict {
    Verdict::Skip { reason: reason.to_owned() }
}

impl<'a> Project<'a> {
    /// The image that a request means; else what is to be said of it.
    fn find(
        &self,
        request: &Request,
        template: &str,
        journal: Option<&Journal>,
        notes: &mut Vec<String>,
    ) -> Result<&'a Image, Verdict> {
        // an image may be called glance:…
        let literal = self.by_name.contains_key(request.image.as_str());
        let word = request.image.strip_prefix("glance:").filter(|_| !literal).unwrap_or(&request.image);
        if let Ok(id) = uuid::Uuid::parse_str(word) {
            let id = id.hyphenated().to_string();
            if let Some(image) = self.by_id.get(id.as_str()) {
                self.tell_renamed(image, journal, notes);
                return Ok(image);
            }
            if let Some(gone) = self.gone(&id, journal) {
                return Err(gone);
            }
        }
        // of two of one name, one that takes the place of the other is not what was meant
        let mut named = self.by_name.get(word).cloned().unwrap_or_default();
        let owned: Vec<Image> = named.iter().map(|image| (*image).clone()).collect();
        if let Some(source) = sole_source(&owned) {
            named.retain(|image| image.id == source.id);
        }
        // the journal has what was typed
        let before = journal.map(|journal| journal.meanings(&request.image)).unwrap_or_default();
        match named.as_slice() {
            [image] => {
                // another one than when this batch began: is that one dealt with?
                let others: Vec<&String> = before.iter().filter(|id| **id != image.id).collect();
                for other in others.iter().filter_map(|id| self.by_id.get(id.as_str())) {
                    if !self.is_converted(other) {
                        return Err(Verdict::Fail {
                            reason: format!(
                                "when this batch began, the name meant image {}, called {} now, and now it means {}: use an id",
                                other.shown_id(),
                                other.shown(),
                                image.shown_id()
                            ),
                        });
                    }
                }
                if let Some(other) = others.last().filter(|_| before.last() != Some(&image.id)) {
                    notes.push(format!(
                        "{} means image {} now, and meant {} when this batch began",
                        printable(word),
                        image.shown_id(),
                        printable(other)
                    ));
                }
                return Ok(image);
            }
            [] => {}
            several => {
                let ids: Vec<String> = several.iter().map(|image| image.shown_id()).collect();
                let reason = format!("there are {} images of that name: use an id ({})", several.len(), ids.join(", "));
                return Err(Verdict::Fail { reason });
            }
        }
        // nothing is called so now: what did it mean when it was last seen?
        if let Some(id) = before.last() {
            if let Some(image) = self.by_id.get(id.as_str()) {
                self.tell_renamed(image, journal, notes);
                return Ok(image);
            }
            if let Some(gone) = self.gone(id, journal) {
                return Err(gone);
            }
        }
        // without a journal that knows it: an image of the name that the conversion would have, whose source is gone
        let new_name = request.name.clone().unwrap_or_else(|| template.replace("{name}", word));
        let made = self.by_name.get(new_name.as_str()).into_iter().flatten().find(|made| {
            let source = made.property(SOURCE_ID);
            source.is_some_and(|source| !self.by_id.contains_key(source)) && self.is_proven(made)
        });
        match made {
            Some(made) => Err(Verdict::Done { made: made.id.clone() }),
            None => Err(Verdict::Fail { reason: "there is no image of that name or id in this project".to_owned() }),
        }
    }

    /// Is it active, with a valid mark?
    fn is_proven(&self, image: &Image) -> bool {
        is_marked(image, self.session.whoami().project_id.as_deref())
    }

    fn is_converted(&self, source: &Image) -> bool {
        self.conversions(&source.id).any(|made| self.is_proven(made))
    }

    fn tell_renamed(&self, image: &Image, journal: Option<&Journal>, notes: &mut Vec<String>) {
        let before = journal.and_then(|journal| journal.known(&image.id)?.name.clone());
        if let Some(before) = before.filter(|before| Some(before) != image.name.as_ref()) {
            notes.push(format!(
                "image {} is called {} now; it was {} when this batch began",
                image.shown_id(),
                image.shown(),
                printable(&before)
            ));
        }
    }

    /// An image that is not there: was it converted, or did somebody delete it? `None`: nobody knows of it.
    fn gone(&self, id: &str, journal: Option<&Journal>) -> Option<Verdict> {
        let known = journal.and_then(|journal| journal.known(id));
        let proven = |made: &&Image| self.is_proven(made);
        let by_journal = known.and_then(|known| self.by_id.get(known.made.as_deref()?)).copied();
        if let Some(made) = self.conversions(id).find(proven).or(by_journal.filter(proven)) {
            return Some(Verdict::Done { made: made.id.clone() });
        }
        if let Some(made) = by_journal {
            let reason = format!(
                "it was converted and is gone; its conversion ({}) is {}, and not verified any more",
                made.shown_id(),
                made.status
            );
            return Some(Verdict::Fail { reason });
        }
        if let Some(made) = known.and_then(|known| known.made.as_deref()) {
            let reason = format!("it was converted and is gone, and so is its conversion ({})", printable(made));
            return Some(Verdict::Fail { reason });
        }
        let name = known?.name.clone().unwrap_or_else(|| "without a name".to_owned());
        Some(Verdict::Fail { reason: format!("it is gone; when this batch began it was called {}", printable(&name)) })
    }

    fn judge(&self, image: &Image, new_name: &str, options: &Options, any_name: bool) -> Verdict {
        let fail = |reason: String| Verdict::Fail { reason };
        if image.is_volume_backed() {
            return skip("the snapshot of a volume-backed server: it has no bytes of its own");
        }
        if image.disk_format.as_deref() == Some("qcow2") {
            return skip("already qcow2");
        }
        match image.status.as_str() {
            "active" => {}
            other => return skip(&format!("it is {}, not active", printable(other))),
        }
        if image.disk_format.as_deref() != Some("raw") || image.container_format.as_deref() != Some("bare") {
            let format = |format: &Option<String>| printable(format.as_deref().unwrap_or("unset"));
            return skip(&format!(
                "it is {} in a {} container, not a raw disk",
                format(&image.disk_format),
                format(&image.container_format)
            ));
        }
        if image.size.unwrap_or(0) == 0 {
            return skip("it is empty");
        }
        if let Err(unfinished) = refuse_unmarked(self.session, image) {
            return skip(&unfinished.to_string());
        }
        let goes = options.after != After::Keep;
        if image.property(REPLACES).is_some_and(|replaced| !self.by_id.contains_key(replaced)) && self.is_proven(image) {
            return Verdict::Done { made: image.id.clone() };
        }
        if let Some((made, proven)) = self.made_earlier(image, new_name, options, any_name) {
            return match (goes, image.protected) {
                (false, _) if proven => Verdict::Done { made },
                (false, _) => Verdict::Finish { made },
                (true, Some(true)) => skip(&format!(
                    "converted already ({made}), but the source is protected and stays; if it may go: virta image set --unprotected {}",
                    image.shown_id()
                )),
                (true, _) => Verdict::Finish { made },
            };
        }
        if goes && image.protected == Some(true) {
            return skip(&format!(
                "it is protected, and would have to be deleted; if it may be: virta image set --unprotected {}",
                image.shown_id()
            ));
        }
        let project = &self.session.whoami().project_id;
        if goes && project.is_some() && image.owner != *project {
            return skip("it belongs to another project, and would have to be deleted");
        }
        if new_name.is_empty() || new_name.chars().count() > 255 || uuid::Uuid::parse_str(new_name).is_ok() {
            return fail(format!("{:?} cannot be the new image's name", printable(new_name)));
        }
        let named: Vec<Image> = self.by_name.get(new_name).into_iter().flatten().map(|image| (*image).clone()).collect();
        let family = family_of(Some(image), self.session, new_name, options.force);
        if let Some(other) = in_the_way(&named, &family, Some(image), options.after).first()
            && !options.force
        {
            return fail(format!("an image called {} is there already ({})", printable(new_name), other.shown_id()));
        }
        Verdict::Convert
    }

    /// The finished conversion that answers a request, and whether nothing is left to do but what becomes of the source: it is proven as strictly as asked, and no
    /// unfinished one stands below it. By the look that the conversion itself would begin with.
    fn made_earlier(&self, image: &Image, new_name: &str, options: &Options, any_name: bool) -> Option<(String, bool)> {
        let family = family_of(Some(image), self.session, new_name, options.force);
        let asked = options.verify.proof();
        let hash = image.hash_text();
        let lookout = Lookout {
            family: &family,
            project: self.session.whoami().project_id.as_deref(),
            now: self.session.now(),
            is_over: &|_| false,
            source_hash: hash.as_deref(),
            any_name: (any_name && options.after != After::Replace).then_some(asked),
        };
        let made: Vec<Image> = self.conversions(&image.id).cloned().collect();
        let of_source: &[Image] = if options.force { &[] } else { &made };
        let sighting = look(&lookout, &made, of_source);
        match (sighting.highest(), sighting.other.clone()) {
            (Some((generation, proof)), _) => Some((family.id(generation), proof >= asked && sighting.lower().is_empty())),
            (None, Some((id, Member::Marked(proof)))) => Some((id, proof >= asked)),
            _ => None,
        }
    }
}
