//! What [`next_step`](crate::ownership::next_step) says, carried out: looks, POST, mark, deletions. The rules are on the page of [`crate::ownership`].

use std::{sync::Arc, time::Duration};

use engine::CancelToken;
use reqwest::StatusCode;
use serde_json::{Map, Value, json};

use crate::{
    error::JobError,
    openstack::{
        ApiError, Change, Image, Session,
        marks::{CLAIM_S, REPLACES, RUN, SOURCE_ID, VERIFIED},
    },
    ownership::{Answer, Family, GENERATIONS, Lookout, Mark, Proof, Sighting, look},
    reporter::Reporter,
    retry::{Patience, Retries},
    run::{ThisRun, run_of},
    text::{causes, printable},
};

/// How often an image of no use is asked to be deleted.
const DELETE_TRIES: u32 = 4;
/// A POST that was not answered may land so much later.
const LATE_POST: Duration = Duration::from_millis(300);

/// Sends what a conversion's rules say.
pub(super) struct Maker<'a> {
    pub(super) session: &'a Session,
    pub(super) family: Family,
    pub(super) run: ThisRun,
    /// The new image's record, without id, name and claim.
    pub(super) record: Map<String, Value>,
    /// Properties that stay behind where Glance refuses them.
    pub(super) droppable: Vec<String>,
    pub(super) claim: Duration,
    /// The source's id, and its hash as it is written in images, where it is one.
    pub(super) source: Option<(String, Option<String>)>,
    /// A conversion under any name will do, if it is proven so.
    pub(super) any_name: Option<Proof>,
    /// The mark names the source as replaced.
    pub(super) replaces: bool,
    /// The new image cannot be deleted.
    pub(super) protected: bool,
    /// Claims of other runs are passed by.
    pub(super) take_over: bool,
    pub(super) patience: Patience,
    pub(super) cancel: &'a CancelToken,
    pub(super) reporter: &'a Arc<dyn Reporter>,
    pub(super) retries: &'a Retries,
    /// What the last look listed of the family.
    pub(super) seen: Vec<Image>,
    /// What else it listed that names the source.
    pub(super) of_source: Vec<Image>,
    pub(super) failed_posts: u32,
}

impl Maker<'_> {
    pub(super) fn id(&self, generation: u8) -> String {
        self.family.id(generation)
    }

    /// Generations that earlier tries of this run have abandoned, a bit each.
    pub(super) fn abandoned(&self) -> u64 {
        let abandoned = (0..GENERATIONS).filter(|generation| self.run.has_abandoned(&self.id(*generation)));
        abandoned.fold(0, |mask, generation| mask | 1 << generation)
    }

    /// Work that an interrupt breaks off.
    pub(super) async fn guard<T>(&self, work: impl Future<Output = T>) -> Result<T, JobError> {
        self.cancel.guard(work).await.map_err(|_| JobError::interrupted())
    }

    /// Is the run that makes this image known to be over?
    pub(super) fn is_over(&self, image: &Image) -> bool {
        self.take_over || self.run.made(image) || image.property(RUN).is_some_and(|run| self.run.record().is_dead(run_of(run)))
    }

    /// Lists the family; where `first`, what else answers the wish, too. `known`: such a list from just now.
    pub(super) async fn look(&mut self, first: bool, own: Option<u8>, known: Option<Vec<Image>>) -> Result<Sighting, JobError> {
        let mut of_source = Vec::new();
        self.seen = match known {
            Some(images) => {
                of_source = images.clone();
                images
            }
            // nobody else can come to its ids
            None if self.family.is_alone() => match own {
                Some(own) => self.guard(self.session.image_if_there(&self.id(own))).await??.into_iter().collect(),
                None => Vec::new(),
            },
            None => {
                let ids = self.family.ids();
                let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
                let listed = self.guard(self.session.images_of_ids(&ids)).await??;
                if let (true, Some((source, _))) = (first, &self.source) {
                    of_source = self.guard(self.session.images_and_hidden(&[(SOURCE_ID, source)])).await??;
                }
                listed
            }
        };
        let lookout = Lookout {
            family: &self.family,
            project: self.session.whoami().project_id.as_deref(),
            now: self.session.now(),
            is_over: &|image| self.is_over(image),
            source_hash: self.source.as_ref().and_then(|(_, hash)| hash.as_deref()),
            any_name: self.any_name,
        };
        let is_source = |image: &Image| self.source.as_ref().is_some_and(|(source, _)| *source == image.id);
        of_source.retain(|image| !is_source(image));
        let sighting = look(&lookout, &self.seen, if first && !self.family.is_alone() { &of_source } else { &[] });
        self.seen.retain(|image| self.family.generation(&image.id).is_some());
        self.of_source = of_source;
        Ok(sighting)
    }

    /// An image of the last look.
    pub(super) fn seen(&self, id: &str) -> Option<&Image> {
        self.seen.iter().chain(&self.of_source).find(|image| image.id == id)
    }

    /// Makes the image's record. After an interrupt its answer is waited for a while: an image has to be there before it can be deleted.
    pub(super) async fn post(&mut self, generation: u8) -> Result<Answer<'static>, JobError> {
        let id = self.id(generation);
        self.run.record().making(&id);
        loop {
            let mut record = self.record.clone();
            record.insert("id".to_owned(), json!(id));
            record.insert("name".to_owned(), json!(self.family.working_name()));
            record.insert(RUN.to_owned(), json!(self.run.text()));
            record.insert(CLAIM_S.to_owned(), json!(self.claim.as_secs().to_string()));
            let error = match self.patience.to_its_end(self.cancel, self.session.create_image(&record)).await {
                Some(Ok(_)) => return if self.cancel.is_cancelled() { Err(JobError::interrupted()) } else { Ok(Answer::Posted) },
                Some(Err(error)) => error,
                None => return Err(JobError::interrupted()),
            };
            if error.status() == Some(StatusCode::CONFLICT) {
                return Ok(Answer::Taken);
            }
            // a property that is not ours to set here (policies differ between clouds) stays behind
            if let Some(key) = self.refused_property(&error) {
                self.record.remove(&key);
                self.reporter.warn(&format!("property {} was not taken over: {}", printable(&key), causes(&error)));
                continue;
            }
            self.failed_posts += 1;
            if !error.is_retryable() || self.failed_posts >= self.patience.tries {
                return Err(error.into());
            }
            self.retries.note(format!("making the image tried again: {}", causes(&error)));
            self.guard(tokio::time::sleep(self.patience.pause_after(self.failed_posts, error.retry_after_s()))).await?;
            return Ok(Answer::Unheard);
        }
    }

    /// The property that Glance's refusal names, if it names one that may stay behind.
    fn refused_property(&self, error: &ApiError) -> Option<String> {
        let ApiError::Status(refusal) = error else { return None };
        if !matches!(refusal.status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST) {
            return None;
        }
        let named = |key: &&String| {
            let quoted = [format!("'{key}'"), format!("\"{key}\""), format!(" {key} ")];
            quoted.iter().any(|quoted| refusal.text.contains(quoted.as_str()))
        };
        self.droppable.iter().filter(|key| self.record.contains_key(*key)).find(named).cloned()
    }

    /// Whose is the image of an id that was asked for?
    pub(super) async fn check(&self, generation: u8) -> Result<Answer<'static>, JobError> {
        let id = self.id(generation);
        let found = self.guard(self.session.image_if_there(&id)).await??;
        Ok(match found {
            None => Answer::Missing,
            // no list of this project's shows it, and it goes only when its own project lets it go
            Some(image) if !self.session.owns(&image) => Answer::Missing,
            // what an earlier try of this run may have marked is not queued any more
            Some(image)
                if image.status == "queued" && image.property(RUN) == Some(&self.run.text()) && !self.run.has_abandoned(&id) =>
            {
                Answer::Own
            }
            Some(_) => Answer::Others,
        })
    }

    /// Sends the mark, once. What was heard of it is no matter: whether it is there is looked at.
    pub(super) async fn mark(&self, generation: u8, mark: &Mark) -> Result<Answer<'static>, JobError> {
        let mut changes = vec![
            Change::Set("name".to_owned(), json!(self.family.name())),
            Change::Set(VERIFIED.to_owned(), json!(mark.verified)),
            Change::Remove(CLAIM_S.to_owned()),
        ];
        if self.protected {
            changes.push(Change::Set("protected".to_owned(), json!(true)));
        }
        if let (true, Some((source, _))) = (self.replaces, &self.source) {
            changes.push(Change::Set(REPLACES.to_owned(), json!(source)));
        }
        let id = self.id(generation);
        let marking = self.session.change_image(&id, &changes);
        match self.patience.to_its_end(self.cancel, marking).await {
            // gone, or marked by the try before, which took the claim off
            Some(Err(error))
                if !error.may_have_been_heard()
                    && !matches!(error.status(), Some(StatusCode::NOT_FOUND | StatusCode::CONFLICT)) =>
            {
                Err(error.into())
            }
            _ => Ok(Answer::Sent),
        }
    }

    /// Is the mark there? Not broken off by an interrupt at once: what was marked is told.
    pub(super) async fn confirm(&self, generation: u8, mark: &Mark) -> Result<(Answer<'static>, Option<Image>), JobError> {
        let id = self.id(generation);
        let looking = self.patience.to_its_end(self.cancel, self.session.image_if_there(&id)).await;
        let found = looking.unwrap_or_else(|| Ok(None)).map_err(JobError::from)?;
        if self.cancel.is_cancelled() && found.is_none() {
            return Err(JobError::interrupted());
        }
        Ok(match found {
            None => (Answer::Missing, None),
            Some(image) if image.property(VERIFIED) == Some(&mark.verified) => (Answer::Marked, Some(image)),
            Some(_) => (Answer::Unmarked, None),
        })
    }

    /// Deletes this run's own image. `begun`: it is known to be; `late`: its POST was not answered, and may land yet. `hasty`: after an interrupt.
    ///
    /// # Errors
    /// [`ApiError`]; `None`: not in time, or not there yet.
    pub(super) async fn abandon(&self, generation: u8, begun: bool, late: bool, hasty: bool) -> Result<(), Option<ApiError>> {
        let id = self.id(generation);
        self.run.abandon(&id);
        let deleting = async {
            let mut was_there = self.delete_own(&id, begun).await?;
            if !was_there && late {
                tokio::time::sleep(LATE_POST).await;
                was_there = self.delete_own(&id, begun).await?;
            }
            Ok::<_, ApiError>(was_there || !late)
        };
        let within = if hasty { self.patience.clean_up } else { self.patience.silence.max(self.patience.clean_up) };
        match tokio::time::timeout(within, deleting).await.map_err(|_| None)?.map_err(Some)? {
            true => Ok(()),
            false => Err(None),
        }
    }

    /// Whether it was there. Another run's image under that id is left alone, and one that an earlier try of this run may have marked.
    async fn delete_own(&self, id: &str, begun: bool) -> Result<bool, ApiError> {
        let session = self.session;
        let delete = async || match session.image_if_there(id).await? {
            Some(image) if image.property(RUN) == Some(&self.run.text()) && (begun || image.status == "queued") => {
                session.delete_image(id).await.map(|()| true)
            }
            Some(_) => Ok(true),
            None => Ok(false),
        };
        self.patience.retried(DELETE_TRIES, delete).await
    }

    /// Deletes what R4 allows.
    pub(super) async fn clear(&self, lower: &[u8]) {
        for id in lower.iter().map(|generation| self.id(*generation)) {
            let status = self.seen(&id).map_or_else(String::new, |image| format!(", {}", printable(&image.status)));
            match self.patience.failure_of(self.cancel, self.session.delete_image(&id)).await {
                None => self.reporter.note(&format!("deleted image {id}, an unfinished conversion of the same source{status}")),
                Some(cause) => self.reporter.warn(&format!(
                    "image {id} is an unfinished conversion of the same source, and deleting it failed ({cause}): virta clean, or: virta image delete {id}"
                )),
            }
        }
    }
}
