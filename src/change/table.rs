//! The shape of a table as rhei applies it.

#![deny(missing_docs)]

use std::sync::Arc;

use super::xids::XidSnapshot;
use crate::{
    Lsn,
    pgoutput::{QualifiedName, ReplicaIdentity},
    types::Mapping,
};

/// How the rows of a table are identified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// The indexes into [`TableSpec::columns`], in that order; never empty. All key columns are NOT
    /// NULL.
    Columns(Vec<usize>),
    /// The table has REPLICA IDENTITY FULL without a usable primary key: rows are matched whole, as
    /// a multiset (traps 53, 54).
    WholeRow,
    /// No column identifies a row: only INSERT and TRUNCATE can arrive (trap 54).
    AppendOnly,
}

/// A table as rhei copies and applies it, at one epoch.
#[derive(Debug, Clone)]
pub struct TableSpec {
    /// The oid of the table at the source, by which the stream names the table.
    pub oid: u32,
    /// The name of the table at the source.
    pub source: QualifiedName,
    /// The name of the table in DuckDB.
    pub target: QualifiedName,
    /// The version of the shape, raised by each Relation message that differs.
    pub epoch: u32,
    /// The replica identity of the table at the source, from which `key` follows.
    pub replica_identity: ReplicaIdentity,
    /// How UPDATE and DELETE find their rows in the target.
    pub key: Key,
    /// The copied columns, in the order of the source's `attnum`.
    pub columns: Vec<ColumnSpec>,
    /// The names of the source's columns that the settings leave out (`exclude_columns`).
    pub excluded: Vec<String>,
    /// The state of the table in the catalogs beside its columns, which `engine::schema` compares;
    /// the text is opaque here.
    pub fingerprint: String,
    /// Whether values that the target cannot represent become NULL and are counted, rather than
    /// pause the table.
    pub null_unrepresentable: bool,
    /// The snapshot of the copy: changes of the table in transactions with `commit_lsn < copy_lsn`
    /// are already in the copy and are skipped (trap 15). See `copy_xids`.
    pub copy_lsn: Lsn,
    /// For a snapshot that has no position in the WAL, the transactions before `copy_lsn` that it
    /// sees. The others are not in the copy. None means that the snapshot sees all of them.
    pub copy_xids: Option<Arc<XidSnapshot>>,
}

impl TableSpec {
    /// Returns how a table is copied whose copy could not be made, as a part of a sentence.
    pub fn copy_hint(&self) -> String {
        let table = &self.source;
        format!("`rhei backfill --table {table}` copies the table once that is mended")
    }

    /// Returns the remedy for a table that cannot continue, as the end of a sentence.
    pub fn recopy_hint(&self) -> String {
        format!("copy it again with `rhei backfill --table {} --force`", self.source)
    }

    /// Returns whether the copy began with the changes of this transaction.
    pub fn has_copied(&self, commit_lsn: Lsn, xid: u32) -> bool {
        commit_lsn < self.copy_lsn && self.copy_xids.as_ref().is_none_or(|xids| xids.sees(xid))
    }
}

/// One copied column.
#[derive(Debug, Clone)]
pub struct ColumnSpec {
    /// The name at the source.
    pub name: String,
    /// The number of the column in `pg_attribute`, from 1; a dropped column leaves a gap.
    pub attnum: i16,
    /// The oid of the column's type in `pg_type` of the source.
    pub type_oid: u32,
    /// The type modifier, such as the length of a varchar; -1 when the column has none.
    pub typmod: i32,
    /// Whether the column is NOT NULL at the source.
    pub not_null: bool,
    /// The name in DuckDB.
    pub target_name: String,
    /// How the column's values are decoded, and the column's type in DuckDB.
    pub mapping: Mapping,
}

impl TableSpec {
    /// Returns the indexes of the key columns; none for keyless tables.
    pub fn key_columns(&self) -> &[usize] {
        match &self.key {
            Key::Columns(columns) => columns,
            Key::WholeRow | Key::AppendOnly => &[],
        }
    }
}

/// A table that continues in another shape: every stored row can be converted to the new shape
/// without reading the source.
#[derive(Debug, Clone)]
pub struct SchemaChange {
    /// The shape in which the rows are stored until now.
    pub before: Arc<TableSpec>,
    /// The shape in which the table continues.
    pub after: Arc<TableSpec>,
    /// For each column of `after`, the origin of the values of older rows. Columns of `before` that
    /// do not occur are dropped.
    pub columns: Vec<ColumnOrigin>,
}

/// The origin of a column's values when the shape of its table changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColumnOrigin {
    /// The index into the columns before the change.
    Kept(usize),
    /// The column is new, and older rows hold this value, in the server's text. `None` is NULL.
    Added(Option<String>),
}

impl SchemaChange {
    /// Returns whether other columns than before identify the rows.
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
