//! Relations whose changes the stream brings and that are left out of the copy, each for a known
//! reason.

use super::{SyncEngine, cycle::with_deadline, schema::Place};
use crate::{
    Lsn, change::followed::Untracked, olap::OlapEngine, pgoutput::relation::Relation,
    pipeline::EngineError, source::CdcConsumer,
};

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Returns whether the copy of a table is known to hold what was committed at `commit_lsn`.
    fn is_in_copy(&self, oid: u32, commit_lsn: Lsn) -> bool {
        let spec = self.catalogs.as_ref().and_then(|catalogs| catalogs.spec(oid));
        spec.is_some_and(|spec| commit_lsn < spec.copy_lsn && spec.copy_xids.is_none())
    }

    /// Finds out what the relations are whose changes came and were not taken: a relation is left
    /// out only if the reason is known. Returns a reason to attach again when one of the relations
    /// is a table to copy, or a part of one.
    pub(super) async fn place_untracked(&mut self) -> Result<Option<String>, EngineError> {
        let untracked = self.consumer.assembler().take_untracked();

        let Some(catalogs) = self.catalogs.as_mut().filter(|_| !untracked.is_empty()) else {
            return Ok(None);
        };

        let relations: Vec<&Relation> =
            untracked.iter().map(|untracked| &untracked.relation).collect();
        let Some(places) = with_deadline(catalogs.places(&relations)).await? else {
            self.consumer.assembler().put_back_untracked(untracked);
            return Ok(None);
        };

        let (mut reasons, mut copies) = (Vec::new(), Vec::new());
        for (Untracked { relation, changes, last_change }, place) in untracked.iter().zip(places) {
            match place {
                Place::AwaitsCopy => {}
                Place::LeftOut(reason) => self.left_out.add(&relation.name, reason, *changes),
                Place::New => reasons.push(format!("table {} is new", relation.name)),
                // The copy of the table holds the changes that came before it.
                Place::PartOf(root) if self.is_in_copy(root, *last_change) => {}
                Place::PartOf(root) => {
                    let why = format!("rows came for its partition {} alone", relation.name);
                    if !copies.iter().any(|(oid, _)| *oid == root) {
                        copies.push((root, why));
                    }
                }
            }
        }

        self.copy_again(copies).await?;
        Ok((!reasons.is_empty()).then(|| reasons.join("; ")))
    }
}
