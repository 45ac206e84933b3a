//! What a run tells, and to whom.

/// Hears what is going on, a line at a time: decisions at the start, retries, warnings.
pub trait Reporter: Send + Sync {
    /// Something worth a line.
    fn note(&self, line: &str);

    /// Something that goes into the report's `warnings`, too.
    fn warn(&self, line: &str) {
        self.note(line);
    }
}

/// Tells nobody.
impl Reporter for () {
    fn note(&self, _: &str) {}
}
