//! What a table looks like as rhei applies it.

use std::sync::Arc;

use super::xids::XidSnapshot;
use crate::{
    Lsn,
    pgoutput::{QualifiedName, ReplicaIdentity},
    types::Mapping,
};

/// How the rows of a table are told apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// Indexes into [`TableSpec::columns`], in that order; never empty. All of them NOT NULL.
    Columns(Vec<usize>),
    /// REPLICA IDENTITY FULL without a usable primary key: rows are matched whole, as a multiset
    /// (traps 53, 54).
    WholeRow,
    /// Nothing identifies a row: only INSERT and TRUNCATE can come (trap 54).
    AppendOnly,
}

/// A table as rhei copies and applies it, at one epoch.
#[derive(Debug, Clone)]
pub struct TableSpec {
    pub oid: u32,
    pub source: QualifiedName,
    pub target: QualifiedName,
    /// Version of the shape, raised by each Relation that differs.
    pub epoch: u32,
    pub replica_identity: ReplicaIdentity,
    pub key: Key,
    /// The columns that are copied, in the order of the source's `attnum`.
    pub columns: Vec<ColumnSpec>,
    /// Names of the source's columns that the settings leave out (`exclude_columns`).
    pub excluded: Vec<String>,
    /// What the catalogs said of the table beside its columns, for `engine::schema` to compare;
    /// opaque here.
    pub fingerprint: String,
    /// Values that the target has no room for become NULL and are counted, rather than pause the
    /// table.
    pub null_unrepresentable: bool,
    /// The snapshot that the table was copied at: its changes in transactions with `commit_lsn <
    /// copy_lsn` are already in the copy and are skipped (trap 15). See `copy_xids`.
    pub copy_lsn: Lsn,
    /// Of a snapshot that no place in the WAL belongs to: which of the transactions before
    /// `copy_lsn` it sees. The others are not in the copy. None: it sees all of them.
    pub copy_xids: Option<Arc<XidSnapshot>>,
}

impl TableSpec {
    /// What the operator can do about a table that cannot go on: the end of a sentence.
    pub fn recopy_hint(&self) -> String {
        format!("copy it again with `rhei backfill --table {} --force`", self.source)
    }

    /// Whether the copy was begun with what this transaction did.
    pub fn has_copied(&self, commit_lsn: Lsn, xid: u32) -> bool {
        commit_lsn < self.copy_lsn && self.copy_xids.as_ref().is_none_or(|xids| xids.sees(xid))
    }
}

/// One column that is copied.
#[derive(Debug, Clone)]
pub struct ColumnSpec {
    /// Name at the source.
    pub name: String,
    pub attnum: i16,
    pub type_oid: u32,
    pub typmod: i32,
    pub not_null: bool,
    /// Name in DuckDB.
    pub target_name: String,
    pub mapping: Mapping,
}

impl TableSpec {
    /// Indexes of the key columns; empty for keyless tables.
    pub fn key_columns(&self) -> &[usize] {
        match &self.key {
            Key::Columns(columns) => columns,
            Key::WholeRow | Key::AppendOnly => &[],
        }
    }
}

/// A table that goes on in another shape: every stored row can be brought into it without a look at
/// the source.
#[derive(Debug, Clone)]
pub struct SchemaChange {
    pub before: Arc<TableSpec>,
    pub after: Arc<TableSpec>,
    /// For each column of `after`, where the values of older rows come from. Columns of `before`
    /// that do not occur are dropped.
    pub columns: Vec<ColumnOrigin>,
}

/// Where a column's values come from when the shape of its table changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColumnOrigin {
    /// Index into the columns before.
    Kept(usize),
    /// The column is new; older rows hold this, in the server's text. `None` is NULL.
    Added(Option<String>),
}

impl SchemaChange {
    /// Rows are told apart by other columns than before.
    pub fn changes_key(&self) -> bool {
        let of = |spec: &TableSpec| match &spec.key {
            Key::Columns(_) => Some(
                spec.key_columns()
                    .iter()
                    .filter_map(|&at| spec.columns.get(at))
                    .map(|c| c.attnum)
                    .collect(),
            ),
            Key::WholeRow => Some(Vec::new()),
            Key::AppendOnly => None,
        };
        of(&self.before) != of(&self.after)
    }
}
