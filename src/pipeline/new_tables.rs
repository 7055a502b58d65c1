//! Tables that the settings choose and that no publication holds, so that they are not followed.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::pgoutput::QualifiedName;

/// The tables that stay out of the copy, each with the SQL that publishes it.
#[derive(Debug, Clone, Default)]
pub struct Unpublished(Arc<Mutex<BTreeMap<String, String>>>);

impl Unpublished {
    /// Records the tables that are not published now, and logs those that were not known yet.
    pub fn set(&self, tables: impl IntoIterator<Item = (QualifiedName, &'static str, String)>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = BTreeMap::new();

        for (table, reason, sql) in tables {
            let name = table.to_string();
            if !known.contains_key(&name) {
                tracing::warn!(
                    event = "table_not_published",
                    table = name,
                    reason,
                    sql,
                    "the settings choose a table that is not published, so it is not copied"
                );
            }
            now.insert(name, sql);
        }

        *known = now;
    }

    /// Returns the SQL that publishes each of the tables, by their names, for
    /// `rhei status --json`.
    pub fn describe(&self) -> serde_json::Value {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::json!(*known)
    }
}
