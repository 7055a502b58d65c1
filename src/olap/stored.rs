//! The pipeline and its tables as `_rhei` keeps them.

#![deny(missing_docs)]

use std::sync::Arc;

use crate::{
    Checkpoint, Lsn,
    change::{Key, Pause, TableSpec, xids::XidSnapshot},
    pgoutput::QualifiedName,
    types::Mapping,
};

/// The content of `_rhei`.
#[derive(Debug, Clone)]
pub struct StoredState {
    /// The source of the copy, and how far the copy is.
    pub pipeline: Pipeline,
    /// All tables that the copy knows, including dropped ones, in the order of their source names.
    pub tables: Vec<StoredTable>,
}

/// The one row of the pipeline: the source that this file is a copy of, and how far the copy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pipeline {
    /// The name of the replication slot at the source; empty for a plain copy.
    pub slot: String,
    /// The names of the publications when the slot was made; empty for a plain copy.
    pub publications: Vec<String>,
    /// An opaque text that changes when the publication does (trap 41).
    pub publication_fingerprint: String,
    /// The value of `IDENTIFY_SYSTEM.systemid`.
    pub system_id: String,
    /// The name of the database at the source.
    pub database: String,
    /// The oid of that database: another database of the same name has another oid.
    pub database_oid: u32,
    /// The timeline of the source when rhei attached last; 0 for a plain copy.
    pub timeline: u32,
    /// How far the setup of the pipeline has come, which says whose the slot is.
    pub phase: Phase,
    /// The position that the copy has reached; 0/0 before the slot exists, and for a plain copy.
    pub checkpoint: Checkpoint,
}

/// The phase of the pipeline's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The intent to make the slot is written; the slot may or may not exist. A restart drops the
    /// slot and starts again.
    Creating,
    /// The slot exists and belongs to this file.
    Running,
    /// The file is a copy by `backfill --no-slot`, which no stream follows.
    PlainCopy,
}

/// A table in `_rhei.tables` with its rows of `_rhei.columns`.
#[derive(Debug, Clone)]
pub struct StoredTable {
    /// The oid of the table at the source.
    pub oid: u32,
    /// The name of the table at the source.
    pub source: QualifiedName,
    /// The name of the table in DuckDB.
    pub target: QualifiedName,
    /// How far the copy of the table is.
    pub state: TableState,
    /// See [`TableSpec::copy_lsn`]; 0/0 until the table is copied for the first time.
    pub copy_lsn: Lsn,
    /// See [`TableSpec::copy_xids`].
    pub copy_xids: Option<Arc<XidSnapshot>>,
    /// See [`TableSpec::epoch`].
    pub epoch: u32,
    /// The replica identity of the table at the source.
    pub replica_identity: crate::pgoutput::ReplicaIdentity,
    /// `WholeRow` and `AppendOnly` tables have no key columns; this tells them apart.
    pub whole_row_key: bool,
    /// An opaque text of what the catalogs state about the table apart from its columns.
    pub fingerprint: String,
    /// The copied columns, in the order of their `attnum`; empty until the table is copied.
    pub columns: Vec<StoredColumn>,
    /// The names of the source's columns that the settings leave out.
    pub excluded: Vec<String>,
    /// The number of rows that the last copy loaded.
    pub copied_rows: u64,
    /// A shadow is being filled, and changes from `copy_lsn` on are kept for it.
    pub has_shadow: bool,
    /// The transaction whose TRUNCATE was applied last, since the fingerprint was stored.
    pub truncated_by: Option<u32>,
}

/// A copied column, as a row of `_rhei.columns`; see [`ColumnSpec`](crate::change::ColumnSpec).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredColumn {
    /// The number of the column in `pg_attribute`, from 1.
    pub attnum: i16,
    /// The name of the column at the source.
    pub name: String,
    /// The oid of the column's type at the source.
    pub type_oid: u32,
    /// The type modifier of the column; -1 when it has none.
    pub typmod: i32,
    /// Whether the column is NOT NULL at the source.
    pub not_null: bool,
    /// The position in the key, from 0; None when the column is not a key column.
    pub key_position: Option<u32>,
    /// The name of the column in DuckDB.
    pub target_name: String,
    /// How the column's values are decoded, and the column's type in DuckDB.
    pub mapping: Mapping,
}

impl StoredTable {
    /// Returns the stored form of a table.
    pub fn of(spec: &TableSpec, state: TableState) -> Self {
        let column = |(index, column): (usize, &crate::change::ColumnSpec)| StoredColumn {
            attnum: column.attnum,
            name: column.name.clone(),
            type_oid: column.type_oid,
            typmod: column.typmod,
            not_null: column.not_null,
            key_position: spec
                .key_columns()
                .iter()
                .position(|&key| key == index)
                .map(|position| position as u32),
            target_name: column.target_name.clone(),
            mapping: column.mapping.clone(),
        };

        Self {
            oid: spec.oid,
            source: spec.source.clone(),
            target: spec.target.clone(),
            state,
            copy_lsn: spec.copy_lsn,
            copy_xids: spec.copy_xids.clone(),
            epoch: spec.epoch,
            replica_identity: spec.replica_identity,
            whole_row_key: spec.key == Key::WholeRow,
            fingerprint: spec.fingerprint.clone(),
            columns: spec.columns.iter().enumerate().map(column).collect(),
            excluded: spec.excluded.clone(),
            copied_rows: 0,
            has_shadow: false,
            truncated_by: None,
        }
    }
}

/// The state of a table, as users see it in `status` and in `_rhei.tables`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableState {
    /// The table is known, but no row is copied yet. The state begins when the table is first seen;
    /// `begin_copies` ends it.
    Pending,
    /// Rows are being loaded into the shadow, and changes are kept beside it. `finish_loads` ends
    /// the state.
    Copying,
    /// Every row of the snapshot is in the shadow; the changes that were kept are being merged into
    /// it. `merge` ends the state.
    CatchingUp,
    /// The table equals the source at the checkpoint.
    Live,
    /// The table is as in `Copying` (or about to be), with an old copy that stays unchanged and
    /// readable until the swap.
    Resync,
    /// The table is paused with a reason; the other tables go on. A new copy ends the state.
    Error(Pause),
    /// The table is gone from the source or the publication; the copy is kept as it was.
    Dropped,
}

impl TableState {
    /// Returns the word for the state in `_rhei.tables` and in `status`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Copying => "copying",
            Self::CatchingUp => "catching_up",
            Self::Live => "live",
            Self::Resync => "resync",
            Self::Error(_) => "error",
            Self::Dropped => "dropped",
        }
    }
}

/// The result of comparing one table with its source, as `_rhei.verifications` keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredVerification {
    /// The name at the source.
    pub table: QualifiedName,
    /// When the verification ended, in microseconds since 1970; none: it ends now.
    pub finished_at_us: Option<i64>,
    /// The LSN at which both sides were compared.
    pub lsn: String,
    /// `equal`, `different` or `not_verified`.
    pub verdict: String,
    /// Why the table was not compared, or not as a whole.
    pub reason: Option<String>,
    /// The number of the part of the rows that was compared, from 0 on.
    pub part: u32,
    /// The number of parts.
    pub parts: u32,
    /// The compared rows of the source.
    pub source_rows: u64,
    /// The compared rows of the copy.
    pub copy_rows: u64,
    /// Rows that the copy lacks.
    pub missing: u64,
    /// Rows that only the copy has.
    pub extra: u64,
    /// Rows of one key that differ in other columns.
    pub different: u64,
    /// Rows that a repair replaced, after which the table was found equal.
    pub repaired: u64,
    /// How long the comparison took.
    pub seconds: f64,
}
