//! Relations whose changes the stream brings and that are left out of the copy, each for a reason
//! that is known.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;

use super::{EngineError, SyncEngine, in_time, schema::Place};
use crate::{
    Lsn,
    change::assemble::Untracked,
    pgoutput::{QualifiedName, relation::Relation},
    source::CdcConsumer,
    target::OlapEngine,
};

/// Why a relation is no table of the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// `[source] tables` and `exclude` leave it out.
    Excluded,
    /// It was published when it was changed, and is not any more.
    NotPublished,
}

/// Changes that were left out since this process began.
#[derive(Debug, Clone, Default)]
pub struct LeftOut(Arc<Mutex<BTreeMap<String, Entry>>>);

#[derive(Debug, Clone, Copy, Serialize)]
struct Entry {
    reason: Reason,
    changes: u64,
}

impl LeftOut {
    /// Counts changes of a relation, and logs the first.
    pub fn add(&self, relation: &QualifiedName, reason: Reason, changes: u64) {
        let name = relation.to_string();
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.entry(name.clone()).or_insert_with(|| {
            let why = match reason {
                Reason::Excluded => "the settings leave it out",
                Reason::NotPublished => "it is not published any more",
            };
            tracing::info!(
                relation = name,
                "changes of a relation are left out of the copy: {why}"
            );
            Entry { reason, changes: 0 }
        });
        *entry = Entry { reason, changes: entry.changes + changes };
    }

    /// For `rhei status --json`: reason and number of changes, by name.
    pub fn describe(&self) -> serde_json::Value {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::json!(*entries)
    }
}

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Whether the copy of a table is known to hold what was committed at `commit_lsn`.
    fn is_in_copy(&self, oid: u32, commit_lsn: Lsn) -> bool {
        let spec = self.catalogs.as_ref().and_then(|catalogs| catalogs.spec(oid));
        spec.is_some_and(|spec| commit_lsn < spec.copy_lsn && spec.copy_xids.is_none())
    }

    /// Finds out what the relations are whose changes came and were not taken: none is left out
    /// that is not known to be. A reason to attach anew: one of them is a table to copy, or a part
    /// of one.
    pub(super) async fn place_untracked(&mut self) -> Result<Option<String>, EngineError> {
        let untracked = self.consumer.assembler().take_untracked();
        let Some(catalogs) = self.catalogs.as_mut().filter(|_| !untracked.is_empty()) else {
            return Ok(None);
        };
        let relations: Vec<&Relation> =
            untracked.iter().map(|untracked| &untracked.relation).collect();
        let Some(places) = in_time(catalogs.places(&relations)).await? else {
            self.consumer.assembler().put_back_untracked(untracked);
            return Ok(None);
        };

        let (mut reasons, mut copies) = (Vec::new(), Vec::new());
        for (Untracked { relation, changes, last_change }, place) in untracked.iter().zip(places) {
            match place {
                Place::AwaitsCopy => {}
                Place::LeftOut(reason) => self.left_out.add(&relation.name, reason, *changes),
                Place::New => reasons.push(format!("table {} is new", relation.name)),
                // What came before its copy is in it.
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
