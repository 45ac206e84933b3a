//! What a run tells, and to whom.

use crate::run::FoundServer;

/// Who is told what is going on, a line at a time: decisions at the start, retries, warnings.
pub trait Notices: Send + Sync {
    /// Something worth a line.
    fn note(&self, line: &str);

    /// Something that goes into the report's `warnings`, too.
    fn warn(&self, line: &str) {
        self.note(line);
    }

    /// An image is made, or about to be: whoever keeps a record of runs writes its id down before the request leaves.
    fn making(&self, image_id: &str) {
        let _ = image_id;
    }

    /// Is this run known to be dead? A record of this machine's runs knows; nothing knows of other machines'.
    fn is_dead(&self, run: &str) -> bool {
        let _ = run;
        false
    }

    /// A server is about to be changed; `None`: it is as it was found again. Whoever keeps a record of runs writes it down before the request
    /// leaves, and can bring the server back when the run was killed.
    /// `false`: it could not be written down.
    fn holding(&self, server: Option<&FoundServer>) -> bool {
        let _ = server;
        true
    }
}

/// Tells nobody.
impl Notices for () {
    fn note(&self, _: &str) {}
}
