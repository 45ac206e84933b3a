//! Records of new images: made under an id that is known before the request leaves, and removed if nothing comes of them.
//!
//! The id is random, or it is a [`Claim`]'s: then the POST itself is what keeps others away.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU32, Ordering::SeqCst},
};

use engine::CancelToken;
use reqwest::StatusCode;
use serde_json::{Map, Value, json};

use super::{
    JobError, Notices,
    claim::{self, Claim},
    names::carries_its_own_proof,
};
use crate::{
    clock::seen_in_time,
    glance::{Patience, Retries},
    openstack::{
        ApiError, Image, Session,
        image::{CLAIM_UNTIL, RUN, VERIFIED},
    },
    text::{causes, printable},
};

/// Images of one claim that were made and deleted before this one; more than that is no accident.
const GENERATIONS_MAX: u32 = 10_000;

/// How often an image of no use is asked to be deleted.
const REMOVE_TRIES: u32 = 4;

/// Makes one image, several times if it has to.
pub(super) struct Maker<'a> {
    pub(super) session: &'a Session,
    /// The image's record, without its id.
    pub(super) record: Map<String, Value>,
    /// Properties that stay behind where Glance refuses them.
    pub(super) droppable: Vec<String>,
    pub(super) patience: Patience,
    pub(super) cancel: &'a CancelToken,
    pub(super) notices: &'a Arc<dyn Notices>,
    pub(super) retries: &'a Retries,
    /// The source is claimed by making the image.
    pub(super) claim: Option<Claim>,
    /// Ids of images that were made, or that were about to be.
    made: Mutex<Vec<String>>,
    generation: AtomicU32,
}

/// What a POST came to.
enum Posted {
    Made,
    /// The id is taken, or was.
    Taken,
}

/// What the look before a DELETE has seen.
struct Last {
    image: Option<Image>,
    /// It is whole, and its source is gone: what is the only copy is never half made, whatever its marks say.
    alone: bool,
}

impl<'a> Maker<'a> {
    pub(super) fn new(
        session: &'a Session,
        record: Map<String, Value>,
        patience: Patience,
        cancel: &'a CancelToken,
        notices: &'a Arc<dyn Notices>,
        retries: &'a Retries,
    ) -> Self {
        let (droppable, claim, made) = (Vec::new(), None, Mutex::default());
        Self { session, record, droppable, patience, cancel, notices, retries, claim, made, generation: AtomicU32::new(0) }
    }

    pub(super) fn run(&self) -> &str {
        self.record.get(RUN).and_then(Value::as_str).unwrap_or_default()
    }

    /// Makes the image; when the run is cancelled meanwhile, its answer is still waited for, for a while: the image that it
    /// makes has to be there before it can be deleted.
    pub(super) async fn create_or_stop(&self) -> Result<String, JobError> {
        let create = self.create();
        tokio::pin!(create);
        tokio::select! {
            result = &mut create => result,
            () = self.cancel.cancelled() => {
                let _ = tokio::time::timeout(self.patience.clean_up / 2, create).await;
                Err(JobError::interrupted())
            }
        }
    }

    async fn create(&self) -> Result<String, JobError> {
        let Some(claim) = &self.claim else {
            let id = uuid::Uuid::new_v4().hyphenated().to_string();
            return match self.post(&id).await? {
                Posted::Made => Ok(id),
                Posted::Taken => Err(JobError::Refused(format!("image id {id}, chosen at random, is taken: this cannot be"))),
            };
        };
        loop {
            let generation = self.generation.fetch_add(1, SeqCst);
            if generation > GENERATIONS_MAX {
                return Err(JobError::Refused(format!("{generation} conversions of this source were made and deleted already")));
            }
            let id = claim.image_id(generation);
            if let Posted::Made = self.post(&id).await? {
                return Ok(id);
            }
            self.not_ours(&id);
            // one that is not there was made once, and deleted: its id is spent
            if let Some(image) = self.session.image_if_there(&id).await? {
                self.take_over(&image).await?;
            }
        }
    }

    /// An image has the claimed id already. Returns if it was removed because nobody needs it; the next generation is free then.
    async fn take_over(&self, image: &Image) -> Result<(), JobError> {
        // an earlier try of this very run left it, and this run works on a source once at a time
        let own = image.property(RUN) == Some(self.run());
        if !own && let Some(held) = claim::held(image, self.session.now(), &**self.notices) {
            return Err(held);
        }
        if image.status == "deactivated" {
            return Err(JobError::Refused(format!(
                "image {} would be this source's conversion, and is deactivated: an administrator knows why",
                image.shown_id()
            )));
        }
        // an own one that an earlier try could not remove goes; a finished one never, nor one that this run took on from another
        let going = || self.notices.was_deleting(self.run(), &image.id) || image.property(VERIFIED).is_none();
        let half_made =
            matches!(image.status.as_str(), "queued" | "saving" | "killed") || (own && !carries_its_own_proof(image) && going());
        if !half_made {
            // another run has just come to its end: the next look finds out what it came to
            return Err(JobError::JustEnded {
                image: image.id.clone(),
                run: image.property(RUN).unwrap_or("unknown").to_owned(),
            });
        }
        // written down, and looked at once more: whoever goes on with it meanwhile has either seen that, or changed it
        self.notices.deleting(&image.id);
        let again = self.last_look(&image.id).await;
        let half_made_now = |now: &Image| {
            let unfinished = matches!(now.status.as_str(), "queued" | "saving" | "killed");
            let unchanged = own && now.status == image.status && !carries_its_own_proof(now);
            now.property(RUN) == image.property(RUN) && (unfinished || unchanged)
        };
        // a run that woke up may have renewed its claim
        let held_now = |now: &Image| if own { None } else { claim::held(now, self.session.now(), &**self.notices) };
        match again {
            Ok(Last { image: Some(now), alone: false }) if half_made_now(&now) && held_now(&now).is_none() => {}
            other => {
                self.notices.not_deleting(&image.id);
                let Some(now) = other?.image else { return Ok(()) };
                if let Some(held) = held_now(&now) {
                    return Err(held);
                }
                return Err(JobError::JustEnded {
                    image: now.id.clone(),
                    run: now.property(RUN).unwrap_or("unknown").to_owned(),
                });
            }
        }
        match self.send_delete(&image.id).await {
            // protected since it was looked at: the other run lives
            Err(refused) if !own && refused.status() == Some(StatusCode::FORBIDDEN) => {
                if let Some(now) = self.session.image_if_there(&image.id).await? {
                    if carries_its_own_proof(&now) && claim::held(&now, self.session.now(), &**self.notices).is_none() {
                        let run = now.property(RUN).unwrap_or("unknown").to_owned();
                        return Err(JobError::JustEnded { image: now.id, run });
                    }
                    let in_the_way = || {
                        JobError::Refused(format!(
                            "image {} of a run that is over ({}) stands in the way, and Glance does not let it be deleted ({}): virta image show {0}",
                            now.shown_id(),
                            printable(now.property(RUN).unwrap_or("unknown")),
                            causes(&refused)
                        ))
                    };
                    return Err(claim::held(&now, self.session.now(), &**self.notices).unwrap_or_else(in_the_way));
                }
            }
            deleted => deleted?,
        }
        self.notices.note(&format!(
            "image {} of a run that is over ({}) was {}: it is removed, and its source taken over",
            image.shown_id(),
            printable(image.property(RUN).unwrap_or("unknown")),
            printable(&image.status)
        ));
        Ok(())
    }

    /// Somebody else has this id: it is not ours to clean up.
    fn not_ours(&self, id: &str) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).retain(|made| made != id);
    }

    async fn post(&self, id: &str) -> Result<Posted, JobError> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(id.to_owned());
        self.notices.making(id);
        let mut record = self.record.clone();
        record.insert("id".to_owned(), json!(id));
        if let Some(claim) = &self.claim {
            record.insert(CLAIM_UNTIL.to_owned(), json!(claim.first_end(self.session.now())));
        }
        let mut lost = false;
        loop {
            let error = match self.session.create_image(&record).await {
                Ok(_) => return Ok(Posted::Made),
                Err(error) => error,
            };
            // a property that is not ours to set here (policies differ between clouds) stays behind
            if let Some(key) = self.refused_property(&error, &record) {
                record.remove(&key);
                self.notices.warn(&format!("property {} was not taken over: {}", printable(&key), causes(&error)));
                continue;
            }
            let taken = error.status() == Some(StatusCode::CONFLICT);
            // The answer may have been lost on its way: the run's name in the image tells whose it is, and the claim's end, that it was made just now, and not
            // by an earlier try.
            let ours = async || {
                let same = |image: &Image, key: &str| image.property(key) == record.get(key).and_then(Value::as_str);
                let found = self.session.image(id).await;
                found.is_ok_and(|image| [RUN, CLAIM_UNTIL].iter().all(|key| same(&image, key)) && image.status == "queued")
            };
            if taken && lost && ours().await {
                return Ok(Posted::Made);
            }
            if taken && self.claim.is_some() {
                return Ok(Posted::Taken);
            }
            if !error.is_retryable() || lost {
                return Err(error.into());
            }
            if ours().await {
                return Ok(Posted::Made);
            }
            lost = true;
            self.retries.note(format!("making the image tried again: {}", causes(&error)));
        }
    }

    /// The property that Glance's refusal names, if it names one that may stay behind.
    fn refused_property(&self, error: &ApiError, record: &Map<String, Value>) -> Option<String> {
        let ApiError::Status(refusal) = error else { return None };
        if !matches!(refusal.status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST) {
            return None;
        }
        let named = |key: &&String| {
            let quoted = [format!("'{key}'"), format!("\"{key}\""), format!(" {key} ")];
            quoted.iter().any(|quoted| refusal.text.contains(quoted.as_str()))
        };
        self.droppable.iter().filter(|key| record.contains_key(*key)).find(named).cloned()
    }

    /// How many images of this claim were tried, this one included.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(SeqCst)
    }

    /// The id of the image that was made last.
    pub(super) fn last_made(&self) -> String {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).last().cloned().unwrap_or_default()
    }

    /// Removes images that were made on the way, but for the one that counts.
    pub(super) async fn remove_all_but(&self, id: &str) {
        let others = self.made.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for other in others.iter().filter(|other| *other != id) {
            if let Some(cause) = self.patience.failure_of(self.cancel, self.remove(other)).await {
                self.notices.left(other);
                self.notices.warn(&format!(
                    "an earlier try left image {other} half made, and deleting it failed ({cause}): virta clean removes it, or: virta image \
                     delete {other}"
                ));
            }
        }
    }

    /// Deletes an image that this run made, and tries that several times; each time it is looked at anew.
    pub(super) async fn remove(&self, id: &str) -> Result<(), ApiError> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.remove_once(id).await {
                Err(error) if error.is_retryable() && tries < REMOVE_TRIES => {
                    tokio::time::sleep(self.patience.pause_after(tries, error.retry_after_s())).await;
                }
                other => return other,
            }
        }
    }

    /// It may be another run's by now, which finished what this one could not, and its source may be gone: such an image is left alone.
    async fn remove_once(&self, id: &str) -> Result<(), ApiError> {
        if self.own(id).await?.is_none() {
            return Ok(());
        }
        // written down first: whoever goes on with it meanwhile has either seen that, or is seen here
        self.notices.deleting(id);
        match self.may_go(id).await {
            Ok(true) => self.send_delete(id).await,
            stays => {
                self.notices.not_deleting(id);
                stays.map(drop)
            }
        }
    }

    async fn may_go(&self, id: &str) -> Result<bool, ApiError> {
        let last = self.last_look(id).await?;
        Ok(!last.alone && last.image.is_some_and(|image| self.is_own(&image)))
    }

    /// Right before a DELETE. Of an image that is whole, the source is looked at, too, and then the image again, last: all that within the time that
    /// a look is believed.
    async fn last_look(&self, id: &str) -> Result<Last, ApiError> {
        let look = || async {
            let image = self.session.image_if_there(id).await?;
            let whole = image.as_ref().is_some_and(|image| matches!(image.status.as_str(), "active" | "deactivated"));
            let Some(claim) = self.claim.as_ref().filter(|_| whole) else { return Ok(Last { image, alone: false }) };
            let alone = self.session.image_if_there(claim.source()).await?.is_none();
            Ok(Last { image: self.session.image_if_there(id).await?, alone })
        };
        seen_in_time(look).await?.ok_or_else(|| self.session.too_slow(id))
    }

    /// Deletes what others may come to depend on, and what was written down: asked for once, since a repetition might land after that.
    async fn send_delete(&self, id: &str) -> Result<(), ApiError> {
        let deleted = self.session.delete_image_once(id).await;
        if deleted.as_ref().err().is_none_or(|error| !error.may_have_been_heard()) {
            self.notices.settled(id);
        }
        deleted
    }

    /// The image, if it is there, still this run's, and nobody's finished conversion.
    async fn own(&self, id: &str) -> Result<Option<Image>, ApiError> {
        let found = self.session.image_if_there(id).await?;
        Ok(found.filter(|image| self.is_own(image)))
    }

    fn is_own(&self, image: &Image) -> bool {
        image.property(RUN) == Some(self.run()) && !carries_its_own_proof(image)
    }

    /// Removes everything that was made, whatever happened, and says so if even that fails.
    pub(super) async fn clean_up(&self, error: JobError) -> JobError {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if made.is_empty() {
            return error;
        }
        let deleting = async {
            let mut left = Vec::new();
            // the last one first: an earlier one that cannot be deleted takes its time
            for id in made.iter().rev() {
                if let Err(error) = self.remove(id).await {
                    left.push((id.clone(), error));
                }
            }
            // a POST that was still on its way may land behind the DELETE
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            if let Some(id) = made.last()
                && let Err(error) = self.remove(id).await
                && left.iter().all(|(known, _)| known != id)
            {
                left.push((id.clone(), error));
            }
            left
        };
        // an interrupt is answered within seconds; otherwise a service that stumbles gets the time to get up again
        let within = match error {
            JobError::Interrupted(_) => self.patience.clean_up,
            _ => self.patience.silence.max(self.patience.clean_up),
        };
        match tokio::time::timeout(within, deleting).await {
            Ok(left) if left.is_empty() => error,
            Ok(mut left) => {
                left.iter().for_each(|(id, _)| self.notices.left(id));
                let ids: Vec<String> = left.iter().map(|(id, _)| id.clone()).collect();
                let first = left.swap_remove(0).1;
                JobError::LeftBehind { id: ids.join(" "), error: Box::new(error), left: Some(first) }
            }
            Err(_) => {
                made.iter().for_each(|id| self.notices.left(id));
                JobError::LeftBehind { id: made.join(" "), error: Box::new(error), left: None::<ApiError> }
            }
        }
    }
}
