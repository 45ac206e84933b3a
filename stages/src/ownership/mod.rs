//! Whose image it is: who may mark, rename and delete an image that Virta makes, and who may delete its source.
//!
//! This is the one page about it. The functions here decide; they send nothing, and time is an argument. `convert::maker` carries out what they say, and
//! the model in `model.rs` calls the very same functions in every order that a slow, lossy Glance and killed runs can bring about.
//!
//! # Words
//! | word | meaning |
//! |---|---|
//! | [`Family`] | the images that one conversion may end in: 64 ids that follow from source, project, name and content, one for each *generation* |
//! | maker | the one run whose POST of a generation was answered 201. Each start of the program is a new run |
//! | [`look()`] | what two lists of the family's ids show. One answer for all of them: only a snapshot shows the highest mark |
//! | claim | in the POST: how long others leave this image alone. Never renewed ([`claim`]) |
//! | [`Mark`] | one PATCH: name, `virta_verified`, `protected`, `virta_replaces`; the claim goes. Until then the image is called `NAME (unfinished)` |
//! | marked | active, with a mark that names this very image, of this source's id and hash |
//! | unmarked | with a claim, over or not, and no mark. Of any other image under one of the ids nothing is known: it is passed by |
//! | [`Proof`] | how the marked image was proven, written in the mark |
//!
//! # Rules
//! - **R1** Until it is marked, an image is changed by its maker alone, by the mark alone; it is nobody's source to delete.
//! - **R2** A maker sends its image the mark or a DELETE, never both, whatever it hears afterwards.
//! - **R3** A run looks first. Marked: done already, the highest mark is the result. Else it walks the generations upwards: claim good: another run has it.
//!   Claim over, or id spent: the next one. Free: POST. A generation that is passed by is left alone.
//! - **R4** A maker looks before its mark (marked: it deletes its own image) and after its mark is confirmed: the highest mark is the result, and it deletes
//!   generations *below* it that the same look shows unmarked.
//! - **R5** The source is deleted only by a run that has seen a mark, proven as strictly as this run asks, and then looks at both images once more.
//! - **R6** `virta clean` deletes what R4 allows, and `queued` and `saving` images of runs of this boot of this machine that are dead.
//!
//! # Why that is enough
//! The highest generation that is ever marked is never deleted: another run would have to have seen a higher mark (R4), and its maker sends no DELETE (R2). So
//! the highest mark in one look is final, every run reports it, and a source goes only while it stands. No clock and no lock is needed for that. Claims only save
//! work, and passing by a run that lives is always safe: it costs a second image, which the last look tells.
//!
//! # States of one conversion
//! | [`Step`] | action under way | next |
//! |---|---|---|
//! | `Looking` | [`Action::Look`] | a mark: `Clearing`; a good claim: the end; free: `Posting`; else the end |
//! | `Posting` | [`Action::Post`] | 201: `Making`; 409 or no answer: `Checking` |
//! | `Checking` | [`Action::Check`] | this run's: `Making`; another's: `Looking`; not there: spent after 409, else `Posting` again |
//! | `Making` | [`Action::Make`] | proven: `LookingBefore`; useless: `Abandoning`, then `Looking` |
//! | `LookingBefore` | [`Action::Look`] | a mark: `Abandoning`, then `Clearing`; none: `Marking` |
//! | `Marking` | [`Action::Mark`] | `Confirming`, whatever was answered |
//! | `Confirming` | [`Action::Confirm`] | marked: `LookingAfter`; not: `Marking` again; gone: `Looking` |
//! | `LookingAfter` | [`Action::Look`] | `Clearing` |
//! | `Clearing` | [`Action::Clear`] | `Proving`, `LookingLast`, or the end |
//! | `Proving` | [`Action::Prove`] | proven: `LookingLast`, or the end; it differs: the end |
//! | `LookingLast` | [`Action::LookAtBoth`] | `DeletingSource`; the result is gone: `Looking` |
//! | `DeletingSource` | [`Action::DeleteSource`] | the end; no answer, or worth another try: `LookingLast` |
//! | `Abandoning` | [`Action::Abandon`] | what came before says |
//!
//! An error or an interrupt before the mark was sent leads to `Abandoning`, then to the end; from then on straight to the end (R2).
//!
//! # What this does not guard against
//! People and other tools that change or delete these images in the same seconds; a machine that was resumed twice from one memory image; releases of Virta
//! before these rules that run at the same time. Two marked images stay where a run was passed by and lived; an unmarked one stays above the highest mark if its
//! maker died. Glance keeps deleted ids until its operator purges them: an id that was purged within one conversion is one more misfortune than this counts on.

pub mod claim;
mod family;
pub mod leftover;
mod look;
mod mark;
#[cfg(test)]
mod model;
mod step;

use crate::{
    error::JobError,
    openstack::{Image, Session},
};

pub use family::{Content, Family, GENERATIONS, UNFINISHED};
pub use look::{Lookout, Member, Sighting, look};
pub use mark::{Mark, Proof, is_conversion, is_marked, proof_of};
pub use step::{Action, Answer, End, Goal, OTHER, State, Step, next_step};

/// R1: an image that a run may be making is changed by nobody else.
///
/// # Errors
/// [`JobError::Refused`].
pub fn refuse_unmarked(session: &Session, image: &Image) -> Result<(), JobError> {
    if !claim::is_claimed(image) || proof_of(image, session.whoami().project_id.as_deref()).is_some() {
        return Ok(());
    }
    Err(JobError::Refused(format!(
        "image {} ({id}) is unfinished: a run is making it, or has died. Wait for it (virta status), or: virta image delete {id}",
        image.shown(),
        id = image.shown_id()
    )))
}
