//! Extents that landed, in guest order again.

use std::{collections::BTreeMap, path::PathBuf};

use engine::{BlockingStage, Inlet, Outlet, StageContext, StageError};

use super::{kept::Mark, land::stored_extent};
use crate::{
    extent::{EXTENT_BYTES, StoredExtent},
    progress::Progress,
    units::GuestRange,
};

/// How often it is written down how far the file is whole.
pub(super) const MARK_EVERY: u64 = 64 << 20;

/// Puts extents into order for the hash, and writes down how far the file is whole.
pub(super) struct Order {
    pub(super) start: u64,
    pub(super) mark: Option<(PathBuf, Mark)>,
    pub(super) progress: Progress,
}

impl Order {
    pub(super) fn note(&mut self, whole_bytes: u64) {
        if let Some((partial, mark)) = &mut self.mark {
            mark.whole_bytes = whole_bytes;
            // it is a help for another run, no need of this one
            let _ = mark.write(partial);
        }
    }
}

impl BlockingStage for Order {
    type In = StoredExtent;
    type Out = StoredExtent;
    type Report = ();

    fn run(mut self, inlet: Inlet<StoredExtent>, outlet: Outlet<StoredExtent>, _: StageContext) -> Result<(), StageError> {
        let mut at = 0;
        while at < self.start {
            let guest = GuestRange::new(at, EXTENT_BYTES.min(self.start - at));
            at = guest.end.0;
            self.progress.add_surveyed(guest.bytes());
            outlet.send_blocking(stored_extent(guest))?;
        }
        let mut early = BTreeMap::new();
        let mut marked = at;
        let result = loop {
            match inlet.recv_blocking() {
                Ok(Some(stored_extent)) => _ = early.insert(stored_extent.guest.start.0, stored_extent),
                Ok(None) if early.is_empty() => break Ok(()),
                Ok(None) => return Err(StageError::bug("extents are missing between others")),
                Err(error) => break Err(error),
            }
            while let Some(stored_extent) = early.remove(&at) {
                at = stored_extent.guest.end.0;
                if let Err(error) = outlet.send_blocking(stored_extent) {
                    self.note(at);
                    return Err(error.into());
                }
            }
            if at - marked >= MARK_EVERY {
                self.note(at);
                marked = at;
            }
        };
        // also when the run ends before its time: that is when it is needed
        self.note(at);
        result?;
        outlet.finish();
        Ok(())
    }
}
