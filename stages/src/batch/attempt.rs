//! One try at one entry of a plan.

use std::sync::Arc;

use engine::CancelToken;

use super::{
    Entry,
    event::{Event, Listener},
};
use crate::{
    convert::{
        Conversion, Job, Options, Report, Source,
        names::conversion_of_gone,
        retire,
        to_glance::{Known, to_glance_knowing},
    },
    error::JobError,
    openstack::{Image, Session, image::ImageError},
    progress::Progress,
    reporter::Reporter,
    text::printable,
};

/// How one try ended, if it did not fail.
pub(super) enum Ended {
    Made(Box<Report>),
    Earlier(String),
}

/// A conversion's reporter are the batch's, with its index.
pub(super) struct ItemReporter {
    pub(super) index: usize,
    pub(super) listener: Listener,
    pub(super) warnings: std::sync::Mutex<Vec<String>>,
}

impl Reporter for ItemReporter {
    fn note(&self, line: &str) {
        (self.listener)(&Event::Note { index: self.index, line, warning: false });
    }

    fn warn(&self, line: &str) {
        self.warnings.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(line.to_owned());
        (self.listener)(&Event::Note { index: self.index, line, warning: true });
    }
}

/// One try at one entry. `untouched`: its source, if it is known that nothing is made of it.
pub(super) async fn convert_one(
    session: &Session,
    entry: &Entry,
    untouched: Option<Image>,
    options: Options,
    progress: &Progress,
    reporter: &Arc<dyn Reporter>,
    cancel: &CancelToken,
) -> Result<Ended, JobError> {
    let Some(image) = &entry.image else { return Err(JobError::bug("an entry without an image was begun")) };
    let converting = async {
        // the list told already that nothing is made of it, and that the name is free
        let known = match &untouched {
            Some(_) => Known { named: Some(Vec::new()), made: Some(Vec::new()) },
            None => Known::default(),
        };
        let finding = async {
            match untouched {
                Some(source) => Source::image(session, source),
                None => Source::glance(session, &image.id).await,
            }
        };
        let source = cancel.guard(finding).await.map_err(|_| JobError::interrupted())??;
        let job = Job::new(source, options, progress, reporter, cancel);
        let checking = cancel.guard(retire::check(&job, job.options.force)).await;
        checking.unwrap_or_else(|_| Err(JobError::interrupted()))?;
        to_glance_knowing(&job, session, &entry.new_name, known).await
    };
    match converting.await {
        Ok(Conversion::Made(report)) => {
            reporter.note(&format!("made {}", printable(&report.destination)));
            Ok(Ended::Made(report))
        }
        Ok(Conversion::Earlier(image)) => Ok(Ended::Earlier(image.id)),
        // gone before it was begun
        Err(JobError::Image(ImageError::NotFound { .. })) => {
            let found = conversion_of_gone(session, session, &image.id, &[], None).await?;
            found.map(|done| Ended::Earlier(done.id)).ok_or_else(|| {
                JobError::Refused(format!("image {} ({}) is gone: it was deleted meanwhile", image.shown(), image.shown_id()))
            })
        }
        Err(error) => Err(error),
    }
}
