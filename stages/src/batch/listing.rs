//! What the project has, as one list told it.
//!
//! A plan is made of it, and what begins soon afterwards does not ask again what it told: two requests for each image, of which Glance does a few
//! dozen a second. What another batch did in between, the claim finds (its id is taken then); what changed in the source's bytes, the look at
//! it when it was read; and who may have the new name by now is asked in any case.

use std::time::Duration;

use crate::{
    error::JobError,
    openstack::{Image, Moment, Session, marks::SOURCE_ID},
};

/// The largest page that Glance gives (`api_limit_max`).
const PAGE: &str = "1000";
/// So long it is believed.
const RECENT: Duration = Duration::from_secs(30);

/// All images that a project may see, and when that was.
#[derive(Clone, Debug)]
pub struct Listing {
    /// As Glance listed them, hidden ones too.
    pub images: Vec<Image>,
    taken: Moment,
}

impl Listing {
    /// Asks Glance: one request for each thousand images, and one for those that are hidden.
    ///
    /// # Errors
    /// [`JobError::Api`].
    pub async fn of_project(session: &Session) -> Result<Self, JobError> {
        let taken = Moment::now();
        Ok(Self { images: session.images_and_hidden(&[("limit", PAGE)]).await?, taken })
    }

    /// Is it from just now?
    #[must_use]
    pub fn is_recent(&self) -> bool {
        self.taken.elapsed() < RECENT
    }

    /// The source, if that is all there is to know before it is converted: nothing is made of it, and no other image is called `new_name`.
    pub(super) fn untouched(&self, source: &Image, new_name: &str) -> Option<Image> {
        let listed = self.images.iter().find(|image| image.id == source.id).filter(|_| self.is_recent())?;
        let touches = |image: &&Image| {
            image.id != source.id && (image.property(SOURCE_ID) == Some(&source.id) || image.name.as_deref() == Some(new_name))
        };
        (!self.images.iter().any(|image| touches(&image))).then(|| listed.clone())
    }
}
