//! Bounded re-sequencing of what parallel workers deliver out of order.

use std::collections::BTreeMap;

/// An item that came twice, overlapped or came too far ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("item [{start:#x}, {end:#x}) does not fit: next expected is {next:#x}, {held} held of {limit}")]
pub struct OrderError {
    /// The item's first position.
    pub start: u64,
    /// One past its last.
    pub end: u64,
    /// The position that is due.
    pub next: u64,
    /// Items held back now.
    pub held: usize,
    /// The most that may be held.
    pub limit: usize,
}

/// Takes items that each cover `[start, end)` in any order, gives them back in order, without gap or overlap.
///
/// What it holds back is bounded: an item past the limit is an error, never a silent growth. Choose the limit from
/// what bounds the producers' disorder.
#[derive(Debug)]
pub struct Reorder<T> {
    held: BTreeMap<u64, (u64, T)>,
    next: u64,
    limit: usize,
}

impl<T> Reorder<T> {
    /// Expects position 0 first.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { held: BTreeMap::new(), next: 0, limit }
    }

    /// Takes an item that covers `[start, end)`.
    ///
    /// # Errors
    /// [`OrderError`] if it is empty, was delivered already, overlaps what comes next, or too much is held.
    pub fn push(&mut self, start: u64, end: u64, item: T) -> Result<(), OrderError> {
        let error = OrderError { start, end, next: self.next, held: self.held.len(), limit: self.limit };
        let before = self.held.range(..=start).next_back().map_or(self.next, |(_, (end, _))| *end);
        let after = self.held.range(start..).next().map_or(u64::MAX, |(start, _)| *start);
        if start >= end || start < before || end > after || (start != self.next && self.held.len() >= self.limit) {
            return Err(error);
        }
        self.held.insert(start, (end, item));
        Ok(())
    }

    /// The item that is due, if it is here.
    pub fn pop(&mut self) -> Option<T> {
        let entry = self.held.first_entry()?;
        if *entry.key() != self.next {
            return None;
        }
        let (end, item) = entry.remove();
        self.next = end;
        Some(item)
    }

    /// The position that is due: everything before it was delivered.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Items held back.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_out_in_order_without_gap_or_overlap() {
        let mut order = Reorder::new(2);
        order.push(10, 20, 'b').unwrap();
        assert_eq!(order.pop(), None);
        order.push(20, 25, 'c').unwrap();
        assert!(order.push(30, 40, 'x').is_err(), "two are held already");
        assert!(order.push(5, 11, 'x').is_err(), "overlaps what is held");
        assert!(order.push(12, 13, 'x').is_err(), "overlaps what is held");
        order.push(0, 10, 'a').unwrap();
        assert_eq!(std::iter::from_fn(|| order.pop()).collect::<String>(), "abc");
        assert_eq!((order.next(), order.held()), (25, 0));
        assert!(order.push(0, 10, 'a').is_err(), "delivered already");
    }
}
