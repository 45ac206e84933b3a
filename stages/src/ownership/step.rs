//! One conversion's way through the rules, a step at a time: no I/O, no clock.

use super::{GENERATIONS, Member, Proof, Sighting};

/// Stands for a result outside of the family ([`Sighting::other`]), where a generation is meant otherwise.
pub const OTHER: u8 = GENERATIONS;

/// What a run asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goal {
    /// How strictly the result has to be proven.
    pub proof: Proof,
    /// The source is to be deleted.
    pub deletes_source: bool,
    /// Only what this run has proven itself will do: the source has no hash, and what another run read of it once may have been wrong.
    pub own_proof: bool,
}

impl Goal {
    /// Is a result proven as strictly as this run asks that another run made?
    const fn is_met_by(self, proof: Proof) -> bool {
        !self.own_proof && proof as u8 >= self.proof as u8
    }
}

/// Where a conversion stands. A number is a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// It looks who has the source.
    Looking,
    /// It makes an image.
    Posting(u8),
    /// It looks what became of its POST. `refused`: that was answered 409.
    Checking {
        /// The generation.
        generation: u8,
        /// The id is taken, or spent.
        refused: bool,
    },
    /// It fills its image, and proves it.
    Making(u8),
    /// Its image is proven: it looks before it marks it.
    LookingBefore(u8),
    /// It sends the mark.
    Marking(u8),
    /// It looks whether the mark is there.
    Confirming(u8),
    /// The mark is there: it looks for the highest.
    LookingAfter(u8),
    /// It deletes what R4 allows. `proven`: the result is proven as strictly as this run asks.
    Clearing {
        /// The result.
        result: u8,
        /// As strictly as this run asks.
        proven: bool,
    },
    /// It proves the result, which another run made, again.
    Proving(u8),
    /// It looks at source and result, right before the source goes.
    LookingLast(u8),
    /// It deletes the source.
    DeletingSource(u8),
    /// It deletes its own unmarked image, and goes on so.
    Abandoning(Then),
    /// It is over.
    Ended(End),
}

/// What comes after an image was abandoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Then {
    /// It begins again.
    Look,
    /// Another run's result is taken, which is proven as strictly as this run asks, or not.
    Take(u8, bool),
    /// It ends with the error that it met.
    Fail,
}

/// Where a conversion stands, and what it has learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct State {
    /// Where it stands.
    pub step: Step,
    /// Generations that this run does not touch (again), a bit each: their id is spent, or it sent a DELETE for them (R2).
    pub passed: u64,
    /// The source was seen to be gone.
    pub source_gone: bool,
}

impl State {
    /// The beginning. `passed`: what earlier tries of this run have learned.
    #[must_use]
    pub const fn new(passed: u64) -> Self {
        Self { step: Step::Looking, passed, source_gone: false }
    }
}

/// What is to be done next. A number is a generation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// List the family: [`Answer::Seen`].
    Look,
    /// Make the image's record: [`Answer::Posted`], [`Answer::Taken`], [`Answer::Unheard`].
    Post(u8),
    /// Look at this one id: [`Answer::Own`], [`Answer::Others`], [`Answer::Missing`].
    Check(u8),
    /// Fill the image, and prove it: [`Answer::Proven`], [`Answer::Useless`], [`Answer::SourceGone`].
    Make(u8),
    /// Send the mark: [`Answer::Sent`], whatever was heard.
    Mark(u8),
    /// Look whether the mark is there: [`Answer::Marked`], [`Answer::Unmarked`], [`Answer::Missing`].
    Confirm(u8),
    /// Delete these: [`Answer::Done`].
    Clear(Vec<u8>),
    /// Read source and image, and compare: [`Answer::Proven`], [`Answer::Differs`], [`Answer::SourceGone`], [`Answer::Missing`].
    Prove(u8),
    /// Look at both: [`Answer::AsProven`], [`Answer::SourceGone`], [`Answer::Missing`].
    LookAtBoth(u8),
    /// Delete the source: [`Answer::Done`], [`Answer::Unheard`].
    DeleteSource,
    /// Delete this run's own unmarked image: [`Answer::Done`].
    Abandon(u8),
    /// Nothing more.
    End(End),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum End {
    /// This is the result.
    Result(u8),
    /// Another run has the source.
    Held(u8),
    /// The marked image was deactivated.
    Deactivated(u8),
    /// All generations are taken, and none is marked.
    Full,
    /// The source is gone, and no image of it is marked.
    SourceGone,
    /// The result does not show what the source shows.
    Differs(u8),
    /// An error, or an interrupt, before a mark was sent: nothing is left, as far as it could be deleted.
    Failed,
    /// An error, or an interrupt, when the mark was sent, and not confirmed.
    Unconfirmed(u8),
    /// An error, or an interrupt, or a refusal, with the result there.
    Kept(u8),
}

/// What an action came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// What the look shows.
    Seen(&'a Sighting),
    /// 201.
    Posted,
    /// 409.
    Taken,
    /// No answer, or one that says nothing.
    Unheard,
    /// The image is this run's, and no DELETE was sent for it.
    Own,
    /// It is another run's.
    Others,
    /// It is not there.
    Missing,
    /// It is proven.
    Proven,
    /// It takes no data any more.
    Useless,
    /// The source is gone.
    SourceGone,
    /// The mark left.
    Sent,
    /// It is there.
    Marked,
    /// It is not there.
    Unmarked,
    /// It does not show what the source shows.
    Differs,
    /// Both are as they were proven.
    AsProven,
    /// It is done, as far as it could be.
    Done,
    /// An error that is no answer, an interrupt, or a refusal.
    Failed,
}

/// The next state, and what is to be done in it.
#[must_use]
pub fn next_step(goal: Goal, state: State, answer: Answer<'_>) -> (State, Action) {
    let go = |step: Step, action: Action| (State { step, ..state }, action);
    let end = |end: End| (State { step: Step::Ended(end), ..state }, Action::End(end));
    let look = || go(Step::Looking, Action::Look);
    // R2: whatever becomes of this DELETE, its generation is not touched again
    let abandon = |generation: u8, then: Then| {
        let passed = state.passed | 1 << generation;
        (State { step: Step::Abandoning(then), passed, ..state }, Action::Abandon(generation))
    };
    let clear = |result: u8, proven: bool, lower: Vec<u8>| go(Step::Clearing { result, proven }, Action::Clear(lower));
    let may_go = |result: u8| match goal.deletes_source {
        true => go(Step::LookingLast(result), Action::LookAtBoth(result)),
        false => end(End::Result(result)),
    };
    match (state.step, answer) {
        (Step::Looking, Answer::Seen(sighting)) => {
            if let Some((result, proof)) = sighting.highest() {
                return clear(result, goal.is_met_by(proof), sighting.lower());
            }
            if let Some((_, Member::Marked(proof))) = sighting.other {
                return clear(OTHER, goal.is_met_by(proof), Vec::new());
            }
            walk(state, sighting)
        }
        (Step::Posting(generation), Answer::Posted) => go(Step::Making(generation), Action::Make(generation)),
        (Step::Posting(generation), answer @ (Answer::Taken | Answer::Unheard)) => {
            go(Step::Checking { generation, refused: answer == Answer::Taken }, Action::Check(generation))
        }
        (Step::Checking { generation, .. }, Answer::Own) => go(Step::Making(generation), Action::Make(generation)),
        (Step::Checking { .. }, Answer::Others) => look(),
        (Step::Checking { generation, refused: true }, Answer::Missing) => {
            let passed = state.passed | 1 << generation;
            (State { step: Step::Looking, passed, ..state }, Action::Look)
        }
        (Step::Checking { generation, refused: false }, Answer::Missing) => {
            go(Step::Posting(generation), Action::Post(generation))
        }
        (Step::Making(generation), Answer::Proven) => go(Step::LookingBefore(generation), Action::Look),
        (Step::Making(generation), Answer::Useless) => abandon(generation, Then::Look),
        (Step::Making(generation), Answer::SourceGone) => {
            let (state, action) = abandon(generation, Then::Look);
            (State { source_gone: true, ..state }, action)
        }
        (Step::LookingBefore(generation), Answer::Seen(sighting)) => match sighting.highest() {
            Some((result, proof)) => abandon(generation, Then::Take(result, goal.is_met_by(proof))),
            None if !sighting.members.contains_key(&generation) => abandon(generation, Then::Look),
            None => go(Step::Marking(generation), Action::Mark(generation)),
        },
        (Step::Marking(generation), Answer::Sent) => go(Step::Confirming(generation), Action::Confirm(generation)),
        (Step::Confirming(generation), Answer::Marked) => go(Step::LookingAfter(generation), Action::Look),
        (Step::Confirming(generation), Answer::Unmarked) => go(Step::Marking(generation), Action::Mark(generation)),
        (Step::Confirming(generation), Answer::Missing) => {
            let passed = state.passed | 1 << generation;
            (State { step: Step::Looking, passed, ..state }, Action::Look)
        }
        (Step::LookingAfter(own), Answer::Seen(sighting)) => match sighting.highest() {
            // what this run itself has marked is proven as it asks
            Some((result, proof)) => clear(result, result == own || goal.is_met_by(proof), sighting.lower()),
            None => look(),
        },
        (Step::Abandoning(Then::Look), Answer::Done | Answer::Failed) => look(),
        // its DELETE is sent; the generations below are the next look's, of which none is needed to take the result
        (Step::Abandoning(Then::Take(result, proven)), Answer::Done | Answer::Failed) => clear(result, proven, Vec::new()),
        (Step::Abandoning(Then::Fail), Answer::Done | Answer::Failed) => end(End::Failed),
        (Step::Clearing { result, proven: true }, Answer::Done) => may_go(result),
        (Step::Clearing { result, proven: false }, Answer::Done) => go(Step::Proving(result), Action::Prove(result)),
        (Step::Proving(result), Answer::Proven) => may_go(result),
        (Step::Proving(result), Answer::Differs) => end(End::Differs(result)),
        (Step::Proving(result) | Step::LookingLast(result), Answer::SourceGone) => end(End::Result(result)),
        (Step::Proving(_) | Step::LookingLast(_), Answer::Missing) => look(),
        (Step::LookingLast(result), Answer::AsProven) => go(Step::DeletingSource(result), Action::DeleteSource),
        (Step::DeletingSource(result), Answer::Done) => end(End::Result(result)),
        (Step::DeletingSource(result), Answer::Unheard) => go(Step::LookingLast(result), Action::LookAtBoth(result)),

        // an error, or an interrupt
        (
            Step::Posting(generation)
            | Step::Checking { generation, .. }
            | Step::Making(generation)
            | Step::LookingBefore(generation),
            _,
        ) => abandon(generation, Then::Fail),
        (Step::Marking(generation) | Step::Confirming(generation), _) => end(End::Unconfirmed(generation)),
        (
            Step::LookingAfter(result)
            | Step::Clearing { result, .. }
            | Step::Proving(result)
            | Step::LookingLast(result)
            | Step::DeletingSource(result),
            _,
        ) => end(End::Kept(result)),
        (Step::Looking | Step::Abandoning(_) | Step::Ended(_), _) => end(End::Failed),
    }
}

/// R3: upwards, to the first generation that is free.
fn walk(state: State, sighting: &Sighting) -> (State, Action) {
    let end = |end: End| (State { step: Step::Ended(end), ..state }, Action::End(end));
    if let Some((_, Member::Claimed(_))) = sighting.other {
        return end(End::Held(OTHER));
    }
    if state.source_gone {
        return end(End::SourceGone);
    }
    for generation in 0..GENERATIONS {
        if state.passed & 1 << generation != 0 {
            continue;
        }
        match sighting.members.get(&generation) {
            None => return (State { step: Step::Posting(generation), ..state }, Action::Post(generation)),
            Some(Member::Claimed(_)) => return end(End::Held(generation)),
            Some(Member::Deactivated) => return end(End::Deactivated(generation)),
            Some(Member::Unclaimed | Member::Foreign | Member::Marked(_)) => {}
        }
    }
    end(End::Full)
}
