//! Claims: a source is converted by one run at a time, on whatever machine, and Glance is the only judge.
//!
//! # How
//! The claim is the POST that makes the new image. Its id follows from the source: UUIDv5 of source id, project and generation. Glance
//! answers 409 to whoever comes second, and also where an image of that id was deleted (glance/db/sqlalchemy: ids of deleted images stay
//! taken). So of two runs that want generation `g`, one gets it; and whoever takes a dead one over deletes `g` and makes `g + 1`, which
//! again only one can.
//!
//! ```text
//! POST g ── 201 ── survey (claim renewed) ── claim set far ahead ── PUT ── active ┬─ proven: mark on, claim off, in one request
//!   │                                                                             └─ (renewed) proven, protected, an hour ahead ── source goes ── claim off
//!   └── 409: gone ─> g + 1 · claim good: held by another · claim over, queued or saving: DELETE g, POST g + 1
//! ```
//! `virta_claim_until` says how long others have to keep away. It is renewed while the image is `queued`, and while it is `active` if that may last (it is
//! read back, or hashed anew); the mark sets it an hour ahead where the source is to go. A change while it is `saving` is lost, so before the PUT it is set
//! to an hour or four times the estimate from then on, whichever is more. The claim on a small source, which is surveyed before it would have to be renewed,
//! is made so long at once: a change of an image is the dearest request that Glance answers. What is left when the image is `active` mostly lasts for what
//! comes next. How long this run believes a claim to be good is counted from before the request that said so: its answer may have been waited for, or slept
//! through, for long.
//!
//! # What cannot happen
//! - *Two conversions of one source*: two POSTs of one id do not both succeed.
//! - *A takeover that deletes the only copy*: an image whose source is about to be deleted is `protected` first, so a DELETE that was on its
//!   way is refused (403); and if it came before, the source's run finds its image gone and lets the source be.
//! - *Two owners*: a run whose image was deleted under it gets 404 or 410 to whatever it asks next, and ends.
//!
//! - *A late hand*: whoever cleans up looks first, and removes only an image that still carries its own run's name, is not proven, and
//!   whose source is there; a DELETE is sent once, and repeated only after another look. Who continues another run's image, claimed or not, puts its own name into
//!   it before, claims it for as long as the proof may take, and protects it where the source goes; both come off again whatever came of that,
//!   90 s later where the other run's DELETE may still be on its way: for a minute its answer is waited for, and what a look took more than 30 s for is looked
//!   at again before it. Whoever was overtaken so writes no mark, deletes no source, and takes nothing
//!   off.
//!
//! The same time is kept by the run that made an image if its claim was ever over (a suspended machine, an upload that took longer than
//! reckoned with): whoever saw that may be about to delete the image, and its DELETE may land when all is done. Where the source stays, and so the image
//! has no protection, it is looked at again after that time.
//!
//! What is left: a run that is stopped (a suspended machine) between its last look and its DELETE, for longer than that; a DELETE that lies somewhere on its
//! way when its client has given it up; and the 90 s
//! that somebody interrupts and takes the protection off.
//!
//! Claims are in the time of the cloud, which Keystone tells with each token ([`Session::now`]): a machine's own clock may be wrong. What machines
//! may still differ by, the time that signing in takes, is far less than [`GRACE_S`]. From a token on, a clock counts that goes on while a machine sleeps and
//! that nobody sets. What it does not show is that a hypervisor paused its guest: such a machine takes it to be so much earlier until its next token, and its
//! claims are over for others before it knows: it may lose work. That Glance has seen more time pass between the image's making and its last change than this
//! machine has tells it; a pause behind that change stays unseen, and so does one between a token and the image's making.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use engine::{CancelToken, Cause};
use jiff::{SignedDuration, Timestamp};
use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::{JobError, Notices};
use crate::{
    clock::Moment,
    openstack::{
        Change, Image, Session,
        image::{CLAIM_UNTIL, RUN},
    },
};

/// How far what machines take for the time may be apart, seconds.
pub const GRACE_S: i64 = 60;
/// The least time that a claim is set ahead before a transfer.
const TRANSFER_MIN: Duration = Duration::from_secs(3600);
/// What was seen so long ago holds.
const JUST_NOW: Duration = Duration::from_secs(2);
/// How long a renewal that is under way is waited for.
const LEAVE_WITHIN: Duration = Duration::from_secs(120);
/// A transfer is expected to be at least so fast, bytes a second; where it is not, and somebody takes over, the next one is given twice the
/// time, so that two runs cannot take each other's uploads away for ever.
const TRANSFER_BYTES_PER_S: u64 = 4 << 20;
/// Transfers that share a limit for bytes a second.
const SHARED_BY: u64 = 8;

/// A claim on a source, from before its image is made until nothing is left to do.
pub(super) struct Claim {
    source: String,
    project: String,
    /// How long it is good each time it is renewed.
    life: Duration,
    /// The same while its image is `queued`.
    queued_life: Duration,
    standing: Arc<Standing>,
    renewing: Mutex<Option<Renewing>>,
    /// When the image was last seen to be this run's.
    seen: Mutex<Option<Moment>>,
    /// Before the request that made it last.
    made: Mutex<Moment>,
}

/// How a claim stands, for whoever renews it.
#[derive(Default)]
struct Standing {
    /// Its end, as it was last set.
    end: Mutex<Moment>,
    /// Its image was deleted by somebody else.
    lost: AtomicBool,
    /// It may have been over once.
    doubted: AtomicBool,
}

impl Standing {
    fn end(&self) -> Moment {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        Moment::now() > self.end()
    }

    fn set(&self, end: Moment) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = end;
    }

    /// It was renewed by a request that left at `asked`: it was heard, but may have been heard late.
    fn renewed(&self, asked: Moment, life: Duration) {
        if self.is_over() {
            self.doubted.store(true, SeqCst);
        }
        self.set(asked.after(life));
    }
}

/// The task that renews a claim.
struct Renewing {
    task: JoinHandle<()>,
    stop: CancelToken,
}

/// The id of the image that claims `source` for `project`, at its `generation`th try.
#[must_use]
pub fn claimed_id(source: &str, project: &str, generation: u32) -> String {
    let space = Uuid::new_v5(&Uuid::NAMESPACE_OID, b"virta claim");
    Uuid::new_v5(&space, format!("{source}/{project}/{generation}").as_bytes()).hyphenated().to_string()
}

fn text(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The end of a claim that is good for `by` from now on.
pub(super) fn ahead(now: Timestamp, by: Duration) -> String {
    let by = SignedDuration::try_from(by).unwrap_or(SignedDuration::from_hours(1));
    text(now.checked_add(by).unwrap_or(Timestamp::MAX))
}

/// How long a transfer of `bytes` takes at most, as far as one can tell.
fn expected(rate_limit: Option<u64>, bytes: u64) -> Duration {
    let limit = rate_limit.map_or(u64::MAX, |limit| limit / SHARED_BY);
    Duration::from_secs(bytes / limit.clamp(1 << 15, TRANSFER_BYTES_PER_S))
}

/// How long a claim has to be good that is not renewed while `bytes` are transferred, the `tried`th time.
pub(super) fn long_enough(rate_limit: Option<u64>, bytes: u64, tried: u32) -> Duration {
    TRANSFER_MIN.max(expected(rate_limit, bytes) * (1 << tried.saturating_sub(1).min(6)) * 4)
}

/// How long a claim on a source of `bytes` is good each time it is renewed while its image is `queued`: where that ends before the first renewal, as
/// long as the upload behind it may take, too.
fn while_queued(rate_limit: Option<u64>, bytes: u64, life: Duration) -> Duration {
    if expected(rate_limit, bytes) > renewed_every(life) { life } else { life + long_enough(rate_limit, bytes, 1) }
}

/// A claim that is good for `life` is renewed so often.
fn renewed_every(life: Duration) -> Duration {
    life / 4
}

/// The end of a claim whose image is proven and protected, and whose source goes now. It is not renewed: a renewal that lands late would undo
/// other changes of the image.
pub(super) fn last_end(now: Timestamp) -> String {
    ahead(now, TRANSFER_MIN)
}

/// Until when the claim on an image is good; `None` for one that has none, or none any more. `now`: [`Session::now`].
#[must_use]
pub fn good_until(image: &Image, now: Timestamp) -> Option<Timestamp> {
    let until = image.property(CLAIM_UNTIL)?;
    if holds(until, now) { until.parse().ok() } else { None }
}

/// Is a claim good that ends then, as it is written in an image?
#[must_use]
pub fn holds(until: &str, now: Timestamp) -> bool {
    let grace = SignedDuration::from_secs(GRACE_S);
    until.parse().is_ok_and(|until: Timestamp| until.checked_add(grace).unwrap_or(Timestamp::MAX) > now)
}

/// The refusal of an image that another run, which may live, has claimed. A run of this machine that is known to be dead has none.
#[must_use]
pub fn held(image: &Image, now: Timestamp, notices: &dyn Notices) -> Option<JobError> {
    let until = good_until(image, now)?;
    let run = image.property(RUN).unwrap_or("unknown");
    (!notices.is_dead(run)).then(|| JobError::Held { image: image.id.clone(), run: run.to_owned(), until: text(until) })
}

/// Why an image's protection is not to be taken off yet, nor its claim: it is [`held`], or, of a run that is dead, somebody's DELETE of it may be on
/// its way. `own`: the run that asks, which has it no longer.
pub(crate) fn protects(image: &Image, now: Timestamp, own: Option<&str>, notices: &dyn Notices) -> Option<String> {
    let until = good_until(image, now)?;
    let run = image.property(RUN).unwrap_or("unknown");
    if notices.was_doubted(run, &image.id) {
        return Some(format!("until {} a run elsewhere might still delete it", text(until)));
    }
    held(image, now, notices).filter(|_| own != Some(run)).map(|held| held.to_string())
}

/// Does the claim on an image last as long as a renewal would make it?
pub(super) fn lasts(image: &Image, now: Timestamp, life: Duration) -> bool {
    let until = image.property(CLAIM_UNTIL).and_then(|until| until.parse::<Timestamp>().ok());
    let enough = SignedDuration::try_from(life).ok().and_then(|life| now.checked_add(life).ok());
    until.zip(enough).is_some_and(|(until, enough)| until >= enough)
}

/// An image that carries another run's name is that run's.
fn refuse_other(image: &Image, run: &str) -> Result<(), JobError> {
    match image.property(RUN) {
        Some(other) if other != run => Err(JobError::GoneOnWith { image: image.id.clone(), run: other.to_owned() }),
        _ => Ok(()),
    }
}

/// How old the image was, by Glance's clock, when it was last changed.
fn lived(image: &Image) -> Option<Duration> {
    let made: Timestamp = image.created_at.as_deref()?.parse().ok()?;
    let changed: Timestamp = image.property("updated_at")?.parse().ok()?;
    changed.duration_since(made).try_into().ok()
}

impl Claim {
    /// On a source of `bytes`; `life`: how long it is good each time.
    pub(super) fn new(source: &str, project: &str, bytes: u64, rate_limit: Option<u64>, life: Duration) -> Self {
        Self {
            source: source.to_owned(),
            project: project.to_owned(),
            life,
            queued_life: while_queued(rate_limit, bytes, life),
            standing: Arc::default(),
            renewing: Mutex::default(),
            seen: Mutex::default(),
            made: Mutex::default(),
        }
    }

    /// Since the image was made, has Glance seen more time pass than this machine? Then its clock stood still, and the claim may have been over.
    fn stood_still(&self, image: &Image) -> bool {
        let made = *self.made.lock().unwrap_or_else(PoisonError::into_inner);
        lived(image).is_some_and(|lived| lived > made.elapsed() + Duration::from_secs(GRACE_S.unsigned_abs()))
    }

    /// May somebody's DELETE of the image be on its way?
    pub(super) fn is_doubted(&self) -> bool {
        self.standing.doubted.load(SeqCst)
    }

    /// For whoever goes on with the image should this run be killed.
    pub(super) fn write_doubts_down(&self, notices: &dyn Notices, image_id: &str) {
        if self.is_doubted() {
            notices.doubted(image_id);
        }
    }

    pub(super) fn image_id(&self, generation: u32) -> String {
        claimed_id(&self.source, &self.project, generation)
    }

    /// The end of a claim that is made now.
    pub(super) fn first_end(&self, now: Timestamp) -> String {
        let now_here = Moment::now();
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = now_here;
        self.standing.set(now_here.after(self.queued_life));
        ahead(now, self.queued_life)
    }

    /// Is there nothing to renew for so long?
    fn is_good_for(&self, life: Duration) -> bool {
        self.standing.end() >= Moment::now().after(life)
    }

    /// The source's id.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Was the image taken away by somebody else?
    pub(super) fn is_lost(&self) -> bool {
        self.standing.lost.load(SeqCst)
    }

    /// Renews it again and again while the image is `queued`; when the image is gone, the job is cancelled.
    pub(super) fn keep_queued(&self, session: &Session, image_id: &str, cancel: &CancelToken, notices: &Arc<dyn Notices>) {
        self.keep(session, image_id, cancel, notices, self.queued_life);
    }

    /// The same while the image is `active`.
    pub(super) fn keep_active(&self, session: &Session, image_id: &str, cancel: &CancelToken, notices: &Arc<dyn Notices>) {
        self.keep(session, image_id, cancel, notices, self.life);
    }

    fn keep(&self, session: &Session, image_id: &str, cancel: &CancelToken, notices: &Arc<dyn Notices>, life: Duration) {
        let (session, id, cancel, notices) = (session.clone(), image_id.to_owned(), cancel.clone(), Arc::clone(notices));
        let (every, standing) = (renewed_every(self.life), Arc::clone(&self.standing));
        let stop = CancelToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            while stopped.guard(tokio::time::sleep(every)).await.is_ok() {
                // the machine may have slept: then others may be at it by now, and this run has to let go
                if standing.is_over() {
                    standing.lost.store(true, SeqCst);
                    cancel.cancel(Cause::Requested(format!("the claim by image {id} could not be renewed in time")));
                    return;
                }
                let asked = Moment::now();
                match session.set_property(&id, CLAIM_UNTIL, &json!(ahead(session.now(), life))).await {
                    Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => {
                        standing.lost.store(true, SeqCst);
                        cancel.cancel(Cause::Requested(format!("image {id} was deleted by somebody else")));
                        return;
                    }
                    Ok(()) => {
                        standing.renewed(asked, life);
                        if standing.doubted.load(SeqCst) {
                            notices.doubted(&id);
                        }
                    }
                    // a service that stumbles is asked again; until it gets up, the claim is still good for a while
                    Err(_) => {}
                }
            }
        });
        if let Some(before) = self.renewing.lock().unwrap_or_else(PoisonError::into_inner).replace(Renewing { task, stop }) {
            before.task.abort();
        }
    }

    /// Goes on with the image, as it was just found: whoever goes on has to have the claim, and renews it unless it lasts as long as a renewal
    /// anyway. What was set ahead for an upload mostly does, when the upload is over.
    ///
    /// A run whose claim was over meanwhile may find another one's name in its image: that one has proven it, and its proof, which may be all that is
    /// left to show for a source that went, is not to be written over, nor its claim.
    pub(super) async fn go_on(&self, session: &Session, image: &Image, run: &str, notices: &dyn Notices) -> Result<(), JobError> {
        refuse_other(image, run)?;
        let seen = Moment::now();
        // before it is renewed: then nobody sees that it was over
        if !lasts(image, session.now(), Duration::ZERO) || self.stood_still(image) {
            self.standing.doubted.store(true, SeqCst);
            self.write_doubts_down(notices, &image.id);
        }
        if !lasts(image, session.now(), self.life) {
            // looked at once more, and last: nobody else's claim is to be cut short
            let found = session.image_if_there(&image.id).await?;
            refuse_other(&found.ok_or_else(|| JobError::Lost { image: image.id.clone() })?, run)?;
            let renewal = Change::Set(CLAIM_UNTIL.to_owned(), json!(ahead(session.now(), self.life)));
            let renewed = match session.change_image(&image.id, &[renewal]).await {
                Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => {
                    return Err(JobError::Lost { image: image.id.clone() });
                }
                other => other?,
            };
            refuse_other(&renewed, run)?;
            if self.stood_still(&renewed) {
                self.standing.doubted.store(true, SeqCst);
            }
        }
        // the renewal may have taken until after its end
        if !lasts(image, session.now(), Duration::ZERO) {
            self.standing.doubted.store(true, SeqCst);
        }
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
        self.standing.set(seen.after(self.life));
        Ok(())
    }

    /// Right before the image is marked: is it still this run's? It was looked at just now, or it is looked at again: a machine that slept in between
    /// has to ask.
    pub(super) async fn assure(
        &self,
        session: &Session,
        image_id: &str,
        run: &str,
        notices: &dyn Notices,
    ) -> Result<(), JobError> {
        let seen = *self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.is_some_and(|seen| seen.elapsed() < JUST_NOW) {
            return Ok(());
        }
        let found = session.image_if_there(image_id).await?;
        let image = found.ok_or_else(|| JobError::Lost { image: image_id.to_owned() })?;
        self.go_on(session, &image, run, notices).await
    }

    /// Stops renewing it, because nothing comes of it. A renewal that is under way is waited for `within`.
    pub(super) async fn leave_within(&self, within: Duration) {
        let renewing = self.renewing.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Renewing { mut task, stop }) = renewing {
            stop.cancel(Cause::Requested("the claim is left".to_owned()));
            if tokio::time::timeout(within, &mut task).await.is_err() {
                task.abort();
            }
        }
    }

    /// Stops renewing it. A renewal that is under way is waited for: landing behind what comes next, it would undo it.
    pub(super) async fn leave(&self) {
        self.leave_within(LEAVE_WITHIN).await;
    }

    /// Before a PUT of `bytes`: while it lasts, nothing can be renewed.
    pub(super) async fn set_ahead(
        &self,
        session: &Session,
        image_id: &str,
        bytes: u64,
        tried: u32,
        notices: &dyn Notices,
    ) -> Result<(), JobError> {
        self.leave().await;
        let life = long_enough(session.rate_bytes_per_s(), bytes, tried);
        if self.is_good_for(life) {
            return Ok(());
        }
        // before it is renewed: then nobody sees that it was over
        if self.standing.is_over() {
            self.standing.doubted.store(true, SeqCst);
        }
        self.write_doubts_down(notices, image_id);
        let asked = Moment::now();
        session.set_property(image_id, CLAIM_UNTIL, &json!(ahead(session.now(), life))).await?;
        self.standing.renewed(asked, life);
        self.write_doubts_down(notices, image_id);
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(renewing) = self.renewing.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            renewing.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(until: &str) -> Image {
        serde_json::from_value(json!({ "id": "i", "status": "queued", CLAIM_UNTIL: until, RUN: "r" })).unwrap()
    }

    #[test]
    fn ids_follow_from_source_project_and_generation_alone() {
        let id = claimed_id("s", "p", 0);
        // every version on every machine has to come to the same: python3: uuid5(uuid5(NAMESPACE_OID, "virta claim"), "s/p/0")
        assert_eq!(id, "cf402b63-6a98-5413-aca1-1a8ba4a8a4e3");
        for other in [claimed_id("s", "p", 1), claimed_id("s", "q", 0), claimed_id("t", "p", 0)] {
            assert_ne!(id, other);
        }
        assert_eq!(Uuid::parse_str(&id).unwrap().get_version_num(), 5);
    }

    #[test]
    fn a_claim_is_good_until_its_end_and_a_minute_for_clocks_that_differ() {
        let now = Timestamp::now();
        let seconds = |by: i64| text(now.checked_add(SignedDuration::from_secs(by)).unwrap());
        assert!(good_until(&image(&seconds(5)), now).is_some());
        assert!(good_until(&image(&seconds(5 - GRACE_S)), now).is_some());
        assert!(good_until(&image(&seconds(-5 - GRACE_S)), now).is_none());
        assert!(good_until(&image("soon"), now).is_none());
    }

    #[test]
    fn a_claim_lasts_if_no_renewal_makes_it_longer() {
        let (now, life) = (Timestamp::now(), Duration::from_secs(600));
        assert!(lasts(&image(&ahead(now, Duration::from_secs(3600))), now, life));
        assert!(!lasts(&image(&ahead(now, Duration::from_secs(590))), now, life));
        assert!(!lasts(&image("soon"), now, life));
        assert!(refuse_other(&image("soon"), "r").is_ok());
        assert!(matches!(refuse_other(&image("soon"), "s"), Err(JobError::GoneOnWith { .. })));
    }

    #[test]
    fn an_image_that_has_lived_longer_than_this_machine_knows_tells_of_a_pause() {
        let claim = Claim::new("s", "p", 1, None, Duration::from_secs(600));
        claim.first_end(Timestamp::now());
        let changed = |at: &str| {
            let image = json!({ "id": "i", "status": "active", "created_at": "2026-01-01T00:00:00Z", "updated_at": at });
            claim.stood_still(&serde_json::from_value(image).unwrap())
        };
        assert!(!changed("2026-01-01T00:00:00Z"), "whatever the clocks say: this machine has seen as much pass");
        assert!(!changed("2026-01-01T00:00:59Z"), "within what machines may differ by");
        assert!(changed("2026-01-01T00:10:00Z"));
        assert!(!changed("2025-12-31T00:00:00Z") && !changed("soon"));
        assert!(!claim.stood_still(&image("soon")), "nothing is said");
    }

    #[test]
    fn a_claim_on_a_small_source_is_made_for_its_upload_too() {
        let (life, hour) = (Duration::from_secs(600), Duration::from_secs(3600));
        // what comes within 150 seconds at 4 MiB/s
        assert_eq!(while_queued(None, 600 << 20, life), life + hour);
        assert_eq!(while_queued(None, 604 << 20, life), life, "renewed while it is surveyed, and set ahead before the PUT");
        // one of eight that share 8 MiB/s
        assert_eq!(while_queued(Some(8 << 20), 150 << 20, life), life + hour);
        assert_eq!(while_queued(Some(8 << 20), 151 << 20, life), life);
        assert_eq!(long_enough(None, 3600 << 20, 1), hour, "four times a quarter of an hour");
        assert_eq!(long_enough(None, 3600 << 20, 2), hour * 2, "somebody took over: the next one is given more");
        for (bytes, good) in [(600 << 20, true), (604 << 20, false)] {
            let claim = Claim::new("s", "p", bytes, None, life);
            assert!(!claim.is_good_for(Duration::ZERO), "there is none yet");
            let now = Timestamp::now();
            let end = claim.first_end(now);
            assert_eq!(claim.is_good_for(hour), good, "{bytes} bytes");
            assert_eq!(lasts(&image(&end), now, hour), good, "the image says the same: {end}");
        }
    }

    struct Dead;

    impl Notices for Dead {
        fn note(&self, _: &str) {}

        fn is_dead(&self, run: &str) -> bool {
            run == "r"
        }
    }

    #[test]
    fn a_run_that_is_known_to_be_dead_holds_nothing() {
        let now = Timestamp::now();
        let until = ahead(now, Duration::from_secs(600));
        assert!(matches!(held(&image(&until), now, &()), Some(JobError::Held { .. })));
        assert!(held(&image(&until), now, &Dead).is_none());
    }
}
