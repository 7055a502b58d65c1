//! Tables that are copied again: which ones wait for that, and how often it was because a change
//! could not be applied. A cause that stays makes copies without end, each of which reads the whole
//! table at the source.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{EngineError, SyncEngine};
use crate::{change::Pause, source::CdcConsumer, target::OlapEngine};

/// How often a table is copied again within an hour before it is paused.
pub const MAX_RECOPIES: usize = 5;
const WINDOW: Duration = Duration::from_secs(3600);

/// Of all tables of a pipeline, over all of its sessions.
#[derive(Debug, Clone, Default)]
pub struct Recopies(Arc<Mutex<HashMap<u32, VecDeque<Instant>>>>);

impl Recopies {
    /// Whether the table was copied again too often to be copied once more.
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

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Marks tables that only another copy makes equal to the source, for these reasons. Their old
    /// copies stay readable until then, and everything else goes on.
    pub(super) async fn copy_again(
        &mut self,
        copies: Vec<(u32, String)>,
    ) -> Result<(), EngineError> {
        let Some(catalogs) = self.catalogs.as_ref().filter(|_| !copies.is_empty()) else {
            return Ok(());
        };
        for (oid, reason) in &copies {
            let table = catalogs.spec(*oid).map(|spec| spec.source.to_string()).unwrap_or_default();
            tracing::info!("table {table} is copied again: {reason}");
        }

        let abandoned: Vec<(u32, Option<Pause>)> =
            copies.iter().map(|(oid, _)| (*oid, None)).collect();
        self.target.call(move |target| target.abandon_copies(&abandoned)).await?;
        copies.into_iter().for_each(|(oid, _)| self.wait_for_copy(oid));
        Ok(())
    }

    /// Stops following a table until its next copy begins.
    pub(super) fn wait_for_copy(&mut self, oid: u32) {
        self.copying.remove(&oid);
        self.catching_up.remove(&oid);
        self.consumer.assembler().unfollow(oid);
        if let Some(catalogs) = &mut self.catalogs {
            catalogs.forget(oid);
        }
        self.to_copy.insert(oid);
    }

    /// Tables that wait for another copy, since the last call.
    pub fn take_to_copy(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.to_copy)
    }

    /// Whether there are such tables.
    pub fn has_to_copy(&self) -> bool {
        !self.to_copy.is_empty()
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
