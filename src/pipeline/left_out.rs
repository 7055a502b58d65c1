//! Relations whose changes the stream brings and that are left out of the copy.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;

use crate::pgoutput::QualifiedName;

/// Why a relation is no table of the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The settings `[source] tables` and `exclude` leave the relation out.
    Excluded,
    /// The relation was published when it was changed, and is not published any more.
    NotPublished,
    /// The relation has no column that is published.
    NoColumns,
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
                Reason::NoColumns => "it has no column that is published",
            };

            tracing::info!(
                event = "changes_left_out",
                relation = name,
                reason = why,
                "changes of a relation are left out of the copy"
            );
            Entry { reason, changes: 0 }
        });

        *entry = Entry { reason, changes: entry.changes + changes };
    }

    /// Returns the reason and the number of changes, by name, for `rhei status --json`.
    pub fn describe(&self) -> serde_json::Value {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::json!(*entries)
    }
}
