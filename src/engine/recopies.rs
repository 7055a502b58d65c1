//! Tables that are copied again: which tables wait for another copy, and how often a table was
//! copied again because a change could not be applied. A cause that stays leads to copies without
//! end, each of which reads the whole table at the source.

use std::collections::BTreeSet;

use super::SyncEngine;
use crate::{change::Pause, olap::OlapEngine, pipeline::EngineError, source::CdcConsumer};

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Marks tables that only another copy makes equal to the source, for these reasons. Their old
    /// copies stay readable until then, and all other tables go on.
    pub(super) async fn copy_again(
        &mut self,
        copies: Vec<(u32, String)>,
    ) -> Result<(), EngineError> {
        let Some(catalogs) = self.catalogs.as_ref().filter(|_| !copies.is_empty()) else {
            return Ok(());
        };

        for (oid, reason) in &copies {
            let table = catalogs.spec(*oid).map(|spec| spec.source.to_string()).unwrap_or_default();
            tracing::info!(event = "table_recopied", %table, reason, "copying the table again");
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
        self.consumer.untrack(oid);
        if let Some(catalogs) = &mut self.catalogs {
            catalogs.forget(oid);
        }
        self.to_copy.insert(oid);
    }

    /// Takes the tables that wait for another copy, since the last call.
    pub fn take_to_copy(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.to_copy)
    }

    /// Returns whether tables wait for another copy.
    pub fn has_to_copy(&self) -> bool {
        !self.to_copy.is_empty()
    }
}
