//! What is compared of one table, which both sides have in common.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{SourceTypes, TableRule};
use crate::change::{ColumnSpec, TableSpec};

/// A table, and how its rows and keys are hashed.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) spec: Arc<TableSpec>,
    pub(super) row: TableRule,
    /// The rows of a table without a key are their own keys.
    pub(super) key: TableRule,
    /// The rules of each column alone, in the order of the columns.
    pub(super) columns: Vec<TableRule>,
    /// The part of the rows that is compared; none: all rows.
    pub(super) part: Option<Part>,
}

impl Shape {
    pub(super) fn new(spec: Arc<TableSpec>, types: SourceTypes<'_>, part: Option<Part>) -> Self {
        let row = TableRule::new(&spec, types);
        let key = TableRule::of_key(&spec, types);

        // A key whose columns have no common form tells no rows apart.
        let is_key = !spec.key_columns().is_empty() && key.undecidable().next().is_none();
        let key = if is_key { key } else { row.clone() };

        let alone = |at| TableRule::of_columns(&spec, &[at], types);
        let columns = (0..spec.columns.len()).map(alone).collect();
        Self { spec, row, key, columns, part }
    }

    pub(super) fn column(&self, at: usize) -> Option<&ColumnSpec> {
        self.spec.columns.get(at)
    }

    /// Returns whether a row with this hash of its key is compared.
    pub(super) fn has(&self, key: u64) -> bool {
        self.part.is_none_or(|part| part.has(key))
    }
}

/// One of several parts of all rows, by the hashes of their keys. Other bits of the hash choose the
/// bucket of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The number of the part, from 0 on.
    pub number: u32,
    /// The number of parts.
    pub of: u32,
}

impl Part {
    fn has(self, key: u64) -> bool {
        (key >> 32) % u64::from(self.of.max(1)) == u64::from(self.number)
    }

    /// Returns the same condition at the source, where `key` is the hash as a `bigint`.
    pub(super) fn condition(self, key: &str) -> String {
        let Self { number, of } = self;
        // A shift of a `bigint` keeps its sign.
        format!("(({key} >> 32) & 4294967295) % {} = {number}", of.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_in_one_part() {
        for key in [0, 1, 1 << 31, 1 << 32, 3 << 32, u64::MAX, 0xDEAD_BEEF_0000_0000] {
            for of in [1, 2, 7, 100] {
                let parts = (0..of).filter(|&number| Part { number, of }.has(key));
                assert_eq!(parts.count(), 1, "{key:x} of {of}");
            }
        }
    }
}
