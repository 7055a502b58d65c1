//! What happened at the source: the words that `source` and `olap` share. No I/O, no clock.
//!
//! `table` says what a table looks like, `followed` what a relation of the stream means for it,
//! `assemble` turns messages into whole source transactions (`transaction` is one of them on its
//! way), `net_effect` keeps at most one delete and one insert per key of the rows in an `arena`,
//! `columns` turns survivors into Arrow.

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

/// Whole source transactions, reduced to their net effect: what one target transaction applies. Or
/// a part of a source transaction that is too large for memory: the target transaction stays open
/// until the batch that ends it.
///
/// Applying it to the state at the previous checkpoint gives the source's state at `end_lsn`.
#[derive(Debug, Clone)]
pub struct ChangeBatch {
    /// More of the same source transaction follows: this is neither to be committed nor to move the
    /// checkpoint.
    pub is_part: bool,
    /// Parts of its first source transaction went before it.
    pub continues: bool,
    /// The checkpoint that this batch leads to: `end_lsn` of its last source transaction, or, when
    /// it is idle, a position up to which the server has nothing more for us (trap 26).
    pub end_lsn: Lsn,
    /// Commit times of its source transactions, in order, microseconds since 2000-01-01 UTC.
    pub commit_times_us: Vec<i64>,
    /// How many source transactions it holds, those that changed nothing of ours included.
    pub source_transactions: u64,
    /// Tables that take another shape, in order, before anything else of the batch is applied.
    pub schema_changes: Vec<SchemaChange>,
    /// One entry per table that changed, in its last shape. The order does not matter: they are
    /// applied in one transaction.
    pub tables: Vec<TableChanges>,
    /// Tables that cannot go on from here. None of their changes in this batch are among `tables`;
    /// they are paused in the same target transaction, and the others go on.
    pub failed: Vec<TableFailure>,
}

impl ChangeBatch {
    /// Nothing to write but, perhaps, a newer checkpoint.
    pub fn is_idle(&self) -> bool {
        self.tables.is_empty() && self.failed.is_empty() && self.schema_changes.is_empty()
    }
}

/// Why a table is paused, for the operator: what happened and what mends it. Names the row's key
/// where it can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFailure {
    pub oid: u32,
    pub table: QualifiedName,
    pub reason: String,
    pub remedy: Remedy,
}

/// Who brings a table back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Only the operator can: the table is paused.
    Operator,
    /// It is paused, for a value that the target has no room for. The settings may let NULL take
    /// its place, and then a new copy brings it back.
    AllowNulls,
    /// A new copy does: it begins at once.
    CopyAgain,
    /// The same, however often: the source has altered the table so that only a new copy is exact.
    CopyAltered,
}

impl Remedy {
    /// A new copy begins at once, and the table is not paused.
    pub fn is_copy(self) -> bool {
        matches!(self, Self::CopyAgain | Self::CopyAltered)
    }
}

/// Why a table is paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// For people.
    pub reason: String,
    /// What brings it back; never another copy ([`Remedy::is_copy`]).
    pub remedy: Remedy,
}

impl Pause {
    /// For the operator to look at.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), remedy: Remedy::Operator }
    }
}

/// Net effect on one table. Applied in this order: truncate, read what `patch` lacks from the
/// target, delete, insert.
#[derive(Debug, Clone)]
pub struct TableChanges {
    pub table: Arc<TableSpec>,
    /// The transaction of the last TRUNCATE in the batch. Every row that the table had before the
    /// batch goes; there are no `deletes` and no `patch` then.
    pub truncate: Option<u32>,
    /// Rows that stood before the batch and go, or are replaced.
    pub deletes: Deletes,
    /// Complete rows to insert, in the order of `table.columns`, field names = `target_name`. May
    /// be empty.
    pub inserts: Vec<RecordBatch>,
    /// Rows to insert whose unchanged TOAST values must be read from the target before the deletes
    /// (trap 51).
    pub patch: Option<Patch>,
    /// Values that the target has no room for and that became NULL, as the settings allow.
    pub nulled: Vec<Nulled>,
    /// What the source did, for the report.
    pub counts: RowCounts,
}

impl TableChanges {
    /// Whether the batch inserts, updates or deletes rows of the table, besides a TRUNCATE.
    pub fn has_rows(&self) -> bool {
        let (Deletes::ByKey(deletes) | Deletes::Rows(deletes)) = &self.deletes;
        self.patch.is_some()
            || deletes.iter().chain(&self.inserts).any(|batch| batch.num_rows() > 0)
    }
}

/// Values of one column that became NULL because the target has no room for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nulled {
    pub column: String,
    pub values: u64,
    /// The first of them: what it was, and its row.
    pub first: String,
}

impl Nulled {
    /// Adds counts to counts.
    pub fn add(all: &mut Vec<Self>, more: Vec<Self>) {
        for nulled in more {
            match all.iter_mut().find(|known| known.column == nulled.column) {
                Some(known) => known.values += nulled.values,
                None => all.push(nulled),
            }
        }
    }
}

/// Rows to delete.
#[derive(Debug, Clone)]
pub enum Deletes {
    /// One row per key: the key columns in the order of [`Key::Columns`], field names =
    /// `target_name`. No key occurs twice, and each must hit exactly one row of the target; else
    /// the copy has diverged.
    ByKey(Vec<RecordBatch>),
    /// Keyless table: whole rows in the order of `table.columns`, and a last `Int64` column
    /// [`COUNT_COLUMN`] that says how many equal rows go. No row occurs twice; exactly the sum of
    /// the counts must go.
    Rows(Vec<RecordBatch>),
}

/// Name of the last column of [`Deletes::Rows`].
pub const COUNT_COLUMN: &str = "_rhei_count";
/// Prefix of the columns of [`Patch::rows`] that hold the key under which the row stood before the
/// batch.
pub const ORIGIN_PREFIX: &str = "_rhei_origin_";

/// Name of the last column of [`Patch::rows`].
pub const PATTERN_COLUMN: &str = "_rhei_pattern";

/// Rows to insert that lack values the wire left out.
#[derive(Debug, Clone)]
pub struct Patch {
    /// Each is the indexes into `table.columns` of the values that rows lack, and that are read
    /// from the target. Never empty.
    pub patterns: Vec<Vec<usize>>,
    /// `table.columns` (NULL where unchanged), then the key columns of the row before the batch,
    /// named [`ORIGIN_PREFIX`] + `target_name`, and a last `Int64` column [`PATTERN_COLUMN`], an
    /// index into `patterns`. Each origin key is also among the deletes, and must be found.
    pub rows: RecordBatch,
}

impl Patch {
    /// The patterns that lack a column.
    pub fn lacking(&self, column: usize) -> Vec<usize> {
        let lacks = |(_, unchanged): &(usize, &Vec<usize>)| unchanged.contains(&column);
        self.patterns.iter().enumerate().filter(lacks).map(|(pattern, _)| pattern).collect()
    }
}

/// Row changes of the source before they were reduced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowCounts {
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
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
