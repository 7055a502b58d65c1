//! How often tables were copied again because a change could not be applied. A cause that stays
//! leads to copies without end, each of which reads the whole table at the source.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
/// How often a table is copied again within an hour before it is paused.
pub const MAX_RECOPIES: usize = 5;

const WINDOW: Duration = Duration::from_secs(3600);

/// The copies of all tables of a pipeline, over all of its sessions.
#[derive(Debug, Clone, Default)]
pub struct Recopies(Arc<Mutex<HashMap<u32, VecDeque<Instant>>>>);

impl Recopies {
    /// Returns whether the table was copied again too often to be copied once more.
    pub fn is_spent(&self, oid: u32) -> bool {
        self.is_spent_at(oid, Instant::now())
    }

    /// Counts another copy of the table.
    pub fn count(&self, oid: u32) {
        self.count_at(oid, Instant::now());
    }

    fn is_spent_at(&self, oid: u32, now: Instant) -> bool {
        let mut by_table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = by_table.entry(oid).or_default();
        while counted.front().is_some_and(|&at| now.duration_since(at) > WINDOW) {
            counted.pop_front();
        }
        counted.len() >= MAX_RECOPIES
    }

    fn count_at(&self, oid: u32, now: Instant) {
        let mut by_table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        by_table.entry(oid).or_default().push_back(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_copied_again_a_few_times_an_hour_and_others_beside_it() {
        let (recopies, start) = (Recopies::default(), Instant::now());
        for _ in 0..MAX_RECOPIES {
            assert!(!recopies.is_spent_at(1, start));
            recopies.count_at(1, start);
        }
        assert!(recopies.is_spent_at(1, start + WINDOW));
        assert!(!recopies.is_spent_at(2, start));
        assert!(!recopies.is_spent_at(1, start + WINDOW + Duration::from_secs(1)));
    }
}
