//! The changes of the source, in terms that `source` and `olap` share. The module does no I/O and
//! reads no clock.
//!
//! `table` describes the shape of a table, `followed` the meaning of a relation of the stream for
//! the table, `assemble` turns messages into whole source transactions (`transaction` is a
//! transaction that is not complete yet), `net_effect` keeps at most one delete and one insert per
//! key of the rows in an `arena`, `columns` turns survivors into Arrow.

pub mod arena;
pub mod assemble;
pub mod columns;
pub mod followed;
pub mod net_effect;
pub mod table;
mod transaction;
pub mod xids;

use std::sync::Arc;

use arrow::record_batch::RecordBatch;

use crate::{Lsn, pgoutput::QualifiedName};

pub use table::{ColumnOrigin, ColumnSpec, Key, SchemaChange, TableSpec};

/// Whole source transactions, reduced to their net effect, which one target transaction applies. Or
/// a part of a source transaction that is too large for memory: the target transaction stays open
/// until the batch that ends it.
///
/// Applying the batch to the state at the previous checkpoint gives the source's state at
/// `end_lsn`.
#[derive(Debug, Clone)]
pub struct ChangeBatch {
    /// Whether more of the same source transaction follows: this part must neither be committed nor
    /// move the checkpoint.
    pub is_part: bool,
    /// Whether parts of its first source transaction were delivered before this batch.
    pub continues: bool,
    /// The checkpoint that this batch leads to: `end_lsn` of its last source transaction, or, when
    /// the batch is idle, a position up to which the server has nothing more for rhei (trap 26).
    pub end_lsn: Lsn,
    /// The commit times of its source transactions, in order, in microseconds since 2000-01-01 UTC.
    pub commit_times_us: Vec<i64>,
    /// The number of its source transactions, including those that changed no followed table.
    pub source_transactions: u64,
    /// The tables that take another shape, in order, before any other part of the batch is applied.
    pub schema_changes: Vec<SchemaChange>,
    /// One entry per table that changed, in its last shape. The order does not matter: one
    /// transaction applies all entries.
    pub tables: Vec<TableChanges>,
    /// The tables that cannot continue from here. None of their changes in this batch are among
    /// `tables`; these tables are paused in the same target transaction, and the other tables
    /// continue.
    pub failed: Vec<TableFailure>,
}

impl ChangeBatch {
    /// Returns whether the batch holds nothing to write except, perhaps, a newer checkpoint.
    pub fn is_idle(&self) -> bool {
        self.tables.is_empty() && self.failed.is_empty() && self.schema_changes.is_empty()
    }
}

/// Why a table is paused, for the operator: the cause and the remedy. The text names the row's key
/// where possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFailure {
    /// The oid of the table at the source.
    pub oid: u32,
    /// The name of the table at the source.
    pub table: QualifiedName,
    /// The cause, often with the command that brings the table back, as text for the operator.
    pub reason: String,
    /// How the table is brought back: it decides whether the table is paused or copied again.
    pub remedy: Remedy,
}

/// How a table is brought back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Only the operator can bring the table back: it is paused.
    Operator,
    /// The table is paused because of a value that the target cannot represent. The settings may
    /// let NULL replace the value, and then a new copy brings the table back.
    AllowNulls,
    /// The source refused to let this role read the table. The next start tries again.
    NextStart,
    /// A new copy brings the table back, and begins at once.
    CopyAgain,
    /// A new copy brings the table back, however often: the source has altered the table so that
    /// only a new copy is exact.
    CopyAltered,
}

impl Remedy {
    /// Returns whether a new copy begins at once, so that the table is not paused.
    pub fn is_copy(self) -> bool {
        matches!(self, Self::CopyAgain | Self::CopyAltered)
    }
}

/// Why a table is paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// The reason, as text for people.
    pub reason: String,
    /// How the table is brought back; never by another copy ([`Remedy::is_copy`]).
    pub remedy: Remedy,
}

impl Pause {
    /// Makes a pause that the operator has to examine.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), remedy: Remedy::Operator }
    }
}

/// The net effect on one table. It is applied in this order: truncate, read the values that `patch`
/// lacks from the target, delete, insert.
#[derive(Debug, Clone)]
pub struct TableChanges {
    /// The shape of all rows of this entry: the last one that the table has in the batch.
    pub table: Arc<TableSpec>,
    /// The transaction of the last TRUNCATE in the batch. The truncate deletes every row that the
    /// table had before the batch; there are no `deletes` and no `patch` then.
    pub truncate: Option<u32>,
    /// The rows from before the batch that are deleted or replaced.
    pub deletes: Deletes,
    /// The complete rows to insert, in the order of `table.columns`, field names = `target_name`.
    /// The list may be empty.
    pub inserts: Vec<RecordBatch>,
    /// The rows to insert whose unchanged TOAST values must be read from the target before the
    /// deletes (trap 51).
    pub patch: Option<Patch>,
    /// The values that the target cannot represent and that became NULL, as the settings allow.
    pub nulled: Vec<Nulled>,
    /// The number of changes at the source, for the report.
    pub counts: RowCounts,
}

impl TableChanges {
    /// Returns whether the batch inserts, updates or deletes rows of the table, besides a TRUNCATE.
    pub fn has_rows(&self) -> bool {
        let (Deletes::ByKey(deletes) | Deletes::Rows(deletes)) = &self.deletes;
        self.patch.is_some()
            || deletes.iter().chain(&self.inserts).any(|batch| batch.num_rows() > 0)
    }
}

/// The values of one column that became NULL because the target cannot represent them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nulled {
    /// The name of the column at the source.
    pub column: String,
    /// The number of these values, in one batch or in one copy of the table.
    pub values: u64,
    /// The first of these values, and its row.
    pub first: String,
}

impl Nulled {
    /// Adds the counts of `more` to those of `all`.
    pub fn add(all: &mut Vec<Self>, more: Vec<Self>) {
        for nulled in more {
            match all.iter_mut().find(|known| known.column == nulled.column) {
                Some(known) => known.values += nulled.values,
                None => all.push(nulled),
            }
        }
    }
}

/// The rows to delete.
#[derive(Debug, Clone)]
pub enum Deletes {
    /// One row per key: the key columns in the order of [`Key::Columns`], field names =
    /// `target_name`. No key occurs twice, and each must match exactly one row of the target;
    /// otherwise the copy has diverged.
    ByKey(Vec<RecordBatch>),
    /// The whole rows of a keyless table in the order of `table.columns`, and a last `Int64` column
    /// [`COUNT_COLUMN`] with the number of equal rows to delete. No row occurs twice; exactly the
    /// sum of the counts must be deleted.
    Rows(Vec<RecordBatch>),
}

/// The name of the last column of [`Deletes::Rows`].
pub const COUNT_COLUMN: &str = "_rhei_count";
/// The prefix of the columns of [`Patch::rows`] that hold the key that the row had before the
/// batch.
pub const ORIGIN_PREFIX: &str = "_rhei_origin_";

/// The name of the last column of [`Patch::rows`].
pub const PATTERN_COLUMN: &str = "_rhei_pattern";

/// The rows to insert that lack values which the wire left out.
#[derive(Debug, Clone)]
pub struct Patch {
    /// Each pattern is the indexes into `table.columns` of the values that rows lack, and that are
    /// read from the target. A pattern is never empty.
    pub patterns: Vec<Vec<usize>>,
    /// The rows hold `table.columns` (NULL where unchanged), then the key columns of the row before
    /// the batch, named [`ORIGIN_PREFIX`] + `target_name`, and a last `Int64` column
    /// [`PATTERN_COLUMN`], an index into `patterns`. Each origin key is also among the deletes, and
    /// must be found.
    pub rows: RecordBatch,
}

impl Patch {
    /// Returns the patterns that lack a column.
    pub fn lacking(&self, column: usize) -> Vec<usize> {
        let lacks = |(_, unchanged): &(usize, &Vec<usize>)| unchanged.contains(&column);
        self.patterns.iter().enumerate().filter(lacks).map(|(pattern, _)| pattern).collect()
    }
}

/// The row changes of the source before they were reduced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowCounts {
    /// The number of rows that the source inserted.
    pub inserted: u64,
    /// The number of rows that the source updated; a row counts once for each of its updates.
    pub updated: u64,
    /// The number of rows that the source deleted, without those that a TRUNCATE removed.
    pub deleted: u64,
    /// The number of TRUNCATEs; one that names several tables counts once for each of them.
    pub truncates: u64,
}

impl std::ops::AddAssign for RowCounts {
    fn add_assign(&mut self, other: Self) {
        self.inserted += other.inserted;
        self.updated += other.updated;
        self.deleted += other.deleted;
        self.truncates += other.truncates;
    }
}
