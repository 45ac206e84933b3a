//! One conversion from its first look to its end: the loop around [`next_step`].

use reqwest::StatusCode;

use super::maker::Maker;
use crate::{
    error::{FailureKind, JobError},
    openstack::{ApiError, Image, Session, marks::RUN},
    ownership::{Action, Answer, End, GENERATIONS, Goal, Mark, OTHER, Sighting, State, Step, claim, next_step},
    run::run_of,
    text::{causes, counted},
};

/// What filling an image came to.
pub(super) enum Filled {
    /// It has all bytes, and is proven.
    Proven(Mark),
    /// It takes no data any more: another one is needed.
    Useless,
}

/// What the look at source and result shows.
pub(super) enum Both {
    /// Both are as they were.
    AsProven,
    /// The source is not there.
    SourceGone,
    /// The result is not there.
    ResultGone,
}

/// The bytes of a new image, and what becomes of their source.
pub(super) trait Work {
    /// Fills the image, and proves it.
    async fn fill(&mut self, maker: &Maker<'_>, id: &str) -> Result<Filled, JobError>;

    /// Reads an image that another run made, and compares it with the source.
    async fn prove(&mut self, result: &Image) -> Result<bool, JobError>;

    /// What belongs to the result before the source may go: members.
    async fn settle(&mut self, result: &Image) -> Result<(), JobError>;

    /// Looks at both, right before the source is deleted.
    async fn look_at_both(&mut self, result: &Image) -> Result<Both, JobError>;

    /// The source, where it is an image.
    fn source(&self) -> Option<(&Session, &Image)>;
}

/// What a conversion ended in.
pub(super) enum Finished {
    /// The image that this run made.
    Made(Image),
    /// One that was there.
    Earlier(Image),
}

/// A DELETE of the source, each after a look.
const DELETE_TRIES: u32 = 4;
/// Looks before this run gives up: a person, or another tool, works against it.
const LOOKS_MAX: u32 = 200;
/// Marks that are sent before this run gives up.
const MARK_TRIES: u32 = 6;

struct Drive<'a, 'b, W> {
    maker: &'a mut Maker<'b>,
    work: &'a mut W,
    goal: Goal,
    sighting: Sighting,
    /// The plan's list, while nothing was looked at since.
    known: Option<Vec<Image>>,
    mark: Option<Mark>,
    marks: u32,
    /// The generation that this run marked.
    own: Option<u8>,
    result: Option<Image>,
    deletes: u32,
    /// A DELETE of the source may have been heard.
    going: bool,
    /// A POST may still be on its way.
    unheard: bool,
    /// The image under way was begun by this run: its POST was answered, or found.
    begun: bool,
    looks: u32,
    error: Option<JobError>,
    /// Own images that could not be deleted, and why.
    left: Vec<(String, Option<ApiError>)>,
}

/// Takes a conversion to its end. `known`: a list from just now, in place of the first look.
pub(super) async fn drive<W: Work>(
    maker: &mut Maker<'_>,
    work: &mut W,
    goal: Goal,
    known: Option<Vec<Image>>,
) -> Result<Finished, JobError> {
    let mut state = State::new(maker.abandoned());
    let mut action = Action::Look;
    let mut drive = Drive {
        maker,
        work,
        goal,
        sighting: Sighting::default(),
        known,
        mark: None,
        marks: 0,
        own: None,
        result: None,
        deletes: 0,
        going: false,
        unheard: false,
        begun: false,
        looks: 0,
        error: None,
        left: Vec::new(),
    };
    loop {
        if let Action::End(end) = action {
            return drive.conclude(end).await;
        }
        let answered = drive.carry_out(state, &action).await;
        let answer = match &answered {
            Ok(None) => Answer::Seen(&drive.sighting),
            Ok(Some(answer)) => *answer,
            Err(_) => Answer::Failed,
        };
        let next = next_step(goal, state, answer);
        if let Err(error) = answered {
            // a later one says more: the first was tried again
            drive.error = Some(error);
        }
        (state, action) = next;
    }
}

impl<W: Work> Drive<'_, '_, W> {
    /// Does what is to be done; `None`: it is a look, and its sighting is kept.
    async fn carry_out(&mut self, state: State, action: &Action) -> Result<Option<Answer<'static>>, JobError> {
        let answer = match action {
            Action::Look => {
                let own = match state.step {
                    Step::LookingBefore(own) | Step::LookingAfter(own) => Some(own),
                    _ => None,
                };
                self.looks += 1;
                if self.looks > LOOKS_MAX {
                    return Err(JobError::Refused(format!(
                        "the images of this conversion change faster than they can be looked at: {LOOKS_MAX} looks"
                    )));
                }
                self.sighting = self.maker.look(own.is_none(), own, self.known.take()).await?;
                return Ok(None);
            }
            Action::Post(generation) => {
                let answer = self.maker.post(*generation).await;
                self.begun = false;
                self.unheard = match &answer {
                    Ok(answer) => *answer == Answer::Unheard,
                    Err(error) => matches!(error.failure_kind(), FailureKind::Interrupted | FailureKind::Transient),
                };
                answer?
            }
            Action::Check(generation) => self.maker.check(*generation).await?,
            Action::Make(generation) => {
                (self.unheard, self.begun) = (false, true);
                self.fill(*generation).await?
            }
            Action::Mark(generation) => {
                self.marks += 1;
                if self.marks > 1 {
                    self.maker.guard(tokio::time::sleep(self.maker.patience.pause_after(self.marks - 1, None))).await?;
                }
                if self.marks > MARK_TRIES {
                    return Err(JobError::Refused("Glance took the change, and does not show it".to_owned()));
                }
                self.maker.mark(*generation, self.mark()?).await?
            }
            Action::Confirm(generation) => {
                let (answer, image) = self.maker.confirm(*generation, self.mark()?).await?;
                if image.is_some() {
                    self.own = Some(*generation);
                    self.result = image;
                }
                answer
            }
            Action::Clear(lower) => {
                let Step::Clearing { result, proven } = state.step else { return Err(JobError::bug("nothing to clear")) };
                self.take(result)?;
                self.maker.clear(lower).await;
                // nothing is handed out that is yet to be proven
                if proven {
                    let result = self.result()?.clone();
                    self.work.settle(&result).await?;
                }
                Answer::Done
            }
            Action::Prove(_) => self.prove().await?,
            Action::LookAtBoth(_) => {
                let result = self.result()?.clone();
                match self.work.look_at_both(&result).await? {
                    Both::AsProven if self.deletes >= DELETE_TRIES => {
                        return Err(self.error.take().unwrap_or_else(|| JobError::bug("the source stayed for no reason")));
                    }
                    Both::AsProven => Answer::AsProven,
                    Both::SourceGone => Answer::SourceGone,
                    Both::ResultGone => Answer::Missing,
                }
            }
            Action::DeleteSource => self.delete_source().await?,
            Action::Abandon(generation) => {
                let hasty = matches!(self.error, Some(JobError::Interrupted(_)));
                if let Err(left) = self.maker.abandon(*generation, self.begun, self.unheard, hasty).await {
                    self.left.push((self.maker.id(*generation), left));
                }
                Answer::Done
            }
            Action::End(_) => return Err(JobError::bug("an end is no action")),
        };
        Ok(Some(answer))
    }

    fn mark(&self) -> Result<&Mark, JobError> {
        self.mark.as_ref().ok_or_else(|| JobError::bug("nothing is proven"))
    }

    fn result(&self) -> Result<&Image, JobError> {
        self.result.as_ref().ok_or_else(|| JobError::bug("there is no result"))
    }

    /// The id of a result, or of an image of the family.
    fn id_of(&self, generation: u8) -> String {
        match (&self.sighting.other, generation) {
            (Some((id, _)), OTHER) => id.clone(),
            _ => self.maker.id(generation),
        }
    }

    /// The result's record, as the look had it.
    fn take(&mut self, result: u8) -> Result<(), JobError> {
        let id = self.id_of(result);
        let seen = self.maker.seen(&id).cloned();
        self.result = Some(seen.ok_or_else(|| JobError::bug("a result that was not listed"))?);
        Ok(())
    }

    async fn fill(&mut self, generation: u8) -> Result<Answer<'static>, JobError> {
        let id = self.maker.id(generation);
        match self.work.fill(self.maker, &id).await {
            Ok(Filled::Proven(mark)) => {
                self.mark = Some(mark);
                Ok(Answer::Proven)
            }
            Ok(Filled::Useless) => {
                self.maker.retries.say(format!("image {id} cannot take the data any more: a new one is made"));
                Ok(Answer::Useless)
            }
            Err(error) if !self.maker.cancel.is_cancelled() && self.is_source_gone().await => {
                self.maker.reporter.note(&format!("the source is gone: {}", causes(&error)));
                Ok(Answer::SourceGone)
            }
            // another run's mark overtook it, or a person deleted it: the next look tells
            Err(error) if !self.maker.cancel.is_cancelled() && self.is_gone(self.maker.session, &id).await => {
                self.maker.retries.say(format!("image {id} was deleted while it was made: {}", causes(&error)));
                Ok(Answer::Useless)
            }
            Err(error) => Err(error),
        }
    }

    /// Is an image not there any more? What cannot be told is no.
    async fn is_gone(&self, session: &Session, id: &str) -> bool {
        let looking = tokio::time::timeout(self.maker.patience.silence, session.image_if_there(id));
        matches!(self.maker.guard(looking).await, Ok(Ok(Ok(None))))
    }

    async fn is_source_gone(&self) -> bool {
        let Some((session, source)) = self.work.source() else { return false };
        self.is_gone(session, &source.id).await
    }

    async fn prove(&mut self) -> Result<Answer<'static>, JobError> {
        let result = self.result()?.clone();
        self.maker.reporter.note(&format!(
            "image {} was made by an earlier run and is not proven as strictly as this one asks: it is read and compared with the source",
            result.shown_id()
        ));
        match self.work.prove(&result).await {
            Ok(true) => {
                self.work.settle(&result).await?;
                Ok(Answer::Proven)
            }
            Ok(false) => Ok(Answer::Differs),
            Err(error) if self.maker.cancel.is_cancelled() => Err(error),
            Err(error) => match self.maker.guard(self.maker.session.image_if_there(&result.id)).await?? {
                None => Ok(Answer::Missing),
                Some(_) if self.is_source_gone().await => Ok(Answer::SourceGone),
                Some(_) => Err(error),
            },
        }
    }

    /// One DELETE, right after a look at both.
    async fn delete_source(&mut self) -> Result<Answer<'static>, JobError> {
        let Some((session, source)) = self.work.source() else { return Err(JobError::bug("there is no source to delete")) };
        let (shown, id) = (source.shown(), source.shown_id());
        self.deletes += 1;
        let deleting = session.delete_image_once(&source.id);
        let error = match self.maker.patience.to_its_end(self.maker.cancel, deleting).await {
            Some(Ok(())) => {
                self.maker.reporter.note(&format!("deleted the source image {shown} ({id})"));
                return Ok(Answer::Done);
            }
            Some(Err(error)) => error,
            None => {
                self.going = true;
                return Err(JobError::interrupted());
            }
        };
        if !error.may_have_been_heard() {
            return Err(error.into());
        }
        // no answer says nothing, nor does that of a gateway
        self.going |= error.status().is_none_or(|status| status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT);
        let pause = self.maker.patience.pause_after(self.deletes, error.retry_after_s());
        self.error = Some(error.into());
        if self.maker.cancel.is_cancelled() {
            return Err(JobError::interrupted());
        }
        self.maker.guard(tokio::time::sleep(pause)).await?;
        Ok(Answer::Unheard)
    }

    async fn conclude(mut self, end: End) -> Result<Finished, JobError> {
        let error = self.error.take();
        if end != End::Failed {
            for (id, why) in &self.left {
                let why = why.as_ref().map_or_else(|| "not in time".to_owned(), |error| causes(error));
                self.maker
                    .reporter
                    .warn(&format!("image {id}, which this run began, was not deleted ({why}): virta image delete {id}"));
            }
        }
        match end {
            End::Result(result) => {
                let Some(image) = self.result else { return Err(JobError::bug("there is no result")) };
                let others: Vec<String> =
                    self.sighting.marked().filter(|other| *other != result).map(|other| self.maker.id(other)).collect();
                if !others.is_empty() {
                    let others = others.join(" ");
                    self.maker.reporter.warn(&format!(
                        "two runs finished this conversion; image {} is the result, and not needed is {others}: virta image delete {others}",
                        image.shown_id()
                    ));
                }
                Ok(if self.own == Some(result) { Finished::Made(image) } else { Finished::Earlier(image) })
            }
            End::Held(generation) => {
                let id = self.id_of(generation);
                let image = self.maker.seen(&id);
                let run = image.and_then(|image| image.property(RUN)).map_or("unknown", run_of).to_owned();
                let until = image.and_then(claim::end).map_or_else(String::new, |until| until.to_string());
                Err(JobError::Held { image: id, run, until })
            }
            End::Deactivated(generation) => Err(JobError::Refused(format!(
                "image {} is this source's finished conversion, and is deactivated: an administrator knows why",
                self.id_of(generation)
            ))),
            End::Full => {
                let ids: Vec<&str> = self.maker.seen.iter().map(|image| image.id.as_str()).collect();
                let way = match ids.as_slice() {
                    [] => "Their ids are spent: choose another name".to_owned(),
                    ids => format!("Delete what no run is making: virta image delete {}", ids.join(" ")),
                };
                Err(JobError::Refused(format!(
                    "{} of this source were begun, and none is finished. {way}",
                    counted(usize::from(GENERATIONS), "conversion"),
                )))
            }
            End::SourceGone => Err(error.unwrap_or_else(|| {
                JobError::Refused(
                    "the source image was deleted while it was read, and there is no finished conversion of it".to_owned(),
                )
            })),
            End::Differs(_) => Err(JobError::Verification(format!(
                "image {} does not show what the source shows; the source is not deleted",
                self.result.map_or_else(String::new, |image| image.shown_id())
            ))),
            End::Failed => {
                let error = error.unwrap_or_else(JobError::interrupted);
                let mut left = self.left;
                let ids: Vec<String> = left.iter().map(|(id, _)| id.clone()).collect();
                Err(match left.pop() {
                    Some((_, left)) => JobError::LeftBehind { id: ids.join(" "), error: Box::new(error), left },
                    None => error,
                })
            }
            End::Unconfirmed(generation) => Err(JobError::Unconfirmed {
                image: self.id_of(generation),
                error: Box::new(error.unwrap_or_else(JobError::interrupted)),
            }),
            End::Kept(_) => {
                let error = error.unwrap_or_else(JobError::interrupted);
                let Some(image) = self.result else { return Err(error) };
                Err(match (self.going, self.goal.deletes_source) {
                    (true, _) => JobError::SourceGoing { new_id: image.id, error: Box::new(error) },
                    (false, deletes) => JobError::SourceKept { new_id: image.id, deletes, error: Box::new(error) },
                })
            }
        }
    }
}
