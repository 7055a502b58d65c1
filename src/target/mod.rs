//! DuckDB: transactions, apply, state.
//!
//! `duckdb` opens and locks the file and holds the one writer, `arrow_scan` has it read Arrow in
//! place, `apply` turns a change batch into statements, `ddl` is the only place that quotes the
//! target's identifiers, `pace` sets DuckDB for the work at hand, `compact` writes the file anew,
//! `new_file` makes one, `state`, `tables`, `jobs` and `pending` (changes of tables that are still
//! being copied) are the only places that touch `_rhei`.

pub mod apply;
mod arrow_scan;
pub mod compact;
pub mod ddl;
pub mod duckdb;
pub mod jobs;
mod new_file;
mod pace;
mod pending;
pub mod state;
mod tables;

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use arrow::record_batch::RecordBatch;

use crate::{
    Checkpoint, Lsn,
    change::{ChangeBatch, Key, Pause, Remedy, TableSpec, xids::XidSnapshot},
    checkpoint::DurableLsn,
    pgoutput::QualifiedName,
    types::{Mapping, ValueError},
};

pub use self::{
    compact::{Compacted, Space},
    duckdb::DuckDb,
    jobs::{Loader, NewJob, StoredJob},
};

/// The target. Plain blocking calls, made from one writer thread.
///
/// Data and checkpoint reach it through one call, so changes cannot be written without saying up to
/// where. Each call is one transaction: it happens whole or not at all.
pub trait OlapEngine: Send {
    /// What the file says of itself; `None` when rhei never wrote to it.
    fn state(&mut self) -> Result<Option<StoredState>, TargetError>;

    /// Replaces the pipeline row (slot, identities, phase, checkpoint) and, when given, the rows of
    /// these tables.
    fn put_state(&mut self, pipeline: &Pipeline, tables: &[StoredTable])
    -> Result<(), TargetError>;

    /// Replaces the rows of these tables; nothing of their data changes.
    fn note(&mut self, tables: &[StoredTable]) -> Result<(), TargetError>;

    /// Replaces what is stored of the shape of these tables, which are otherwise as they were.
    fn note_shapes(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError>;

    /// Renames tables, all at once, from the name given to the target that their new row says, and
    /// replaces their rows.
    fn rename(&mut self, moves: &[(QualifiedName, StoredTable)]) -> Result<(), TargetError>;

    /// Begins copies. One that is not resumed gets an empty shadow, keeps changes from now on, and
    /// becomes `copying`, or `resync` when an older copy of it is there. Jobs of an earlier begin
    /// that are still open are cancelled. Returns the ids of each copy's jobs, in order; or why a
    /// table cannot be copied, which is in `error` then.
    fn begin_copies(
        &mut self,
        copies: &[NewCopy],
    ) -> Result<Vec<Result<Vec<u64>, String>>, TargetError>;

    /// The chunks that are in the shadow of a table, as their jobs describe them, and their rows.
    fn done_chunks(
        &mut self,
        oid: u32,
        copy_lsn: Lsn,
    ) -> Result<Vec<(serde_json::Value, u64)>, TargetError>;

    /// Keys of rows that changed while the table was copied and have values that only the source
    /// can tell: `most` of them.
    fn open_keys(
        &mut self,
        table: &TableSpec,
        most: usize,
    ) -> Result<Vec<Vec<String>>, TargetError>;

    /// The rows under `asked` of those keys, as the source has them at the checkpoint.
    fn fill_open(
        &mut self,
        table: &TableSpec,
        rows: &[RecordBatch],
        asked: usize,
    ) -> Result<(), TargetError>;

    /// Every chunk of these tables is in their shadows: they are `catching_up`.
    fn finish_loads(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError>;

    /// Merges some of what changed meanwhile into shadows that are loaded, `most_rows` in all.
    /// Where nothing is left, the shadow takes the table's place, and the table is `live` as of the
    /// checkpoint; returns the oids of those.
    fn merge(
        &mut self,
        tables: &[Arc<TableSpec>],
        most_rows: u64,
    ) -> Result<BTreeSet<u32>, TargetError>;

    /// Throws copies away, by the oids of their tables. With a reason a table is in `error`; else
    /// it waits to be copied anew.
    fn abandon_copies(&mut self, copies: &[(u32, Option<Pause>)]) -> Result<(), TargetError>;

    /// All jobs that are kept, oldest first.
    fn jobs(&mut self) -> Result<Vec<StoredJob>, TargetError>;

    /// Somebody who loads chunks into shadows, beside this writer and others.
    fn loader(&mut self) -> Result<Loader, TargetError>;

    /// Brings tables into their new shapes, applies a batch (or keeps it for later, for tables that
    /// are being copied), marks the batch's failed tables, replaces the checkpoint, records the
    /// cycle, commits. All in one transaction. After a part of a source transaction
    /// ([`ChangeBatch::is_part`]) that stays open for the batch that comes next, and ends without a
    /// trace when something else is called, or the batch fails.
    fn apply(
        &mut self,
        batch: &ChangeBatch,
        checkpoint: &Checkpoint,
    ) -> Result<Applied, TargetError>;

    /// Opens the file once more, as DuckDB wants it after its disk has failed it.
    fn reopen(&mut self) -> Result<(), TargetError>;

    /// Drops jobs that ended long ago. Returns how many.
    fn prune(&mut self) -> Result<u64, TargetError>;

    /// Takes back the parts of a source transaction that will not be ended, and whatever a panic
    /// left open.
    fn roll_back(&mut self) -> Result<(), TargetError>;

    /// Writes DuckDB's write-ahead log into the file. May be refused by an old reader; that is no
    /// error.
    fn tidy(&mut self, compaction: Compaction) -> Result<(), TargetError>;

    /// Whether a table has, in any of these columns of text or of lists of text, a value that is
    /// not among `allowed`.
    fn holds_other_values(
        &mut self,
        table: &TableSpec,
        columns: &[usize],
        allowed: &[String],
    ) -> Result<bool, TargetError>;

    /// How large the file is.
    fn space(&mut self) -> Result<Space, TargetError>;

    /// Writes the file anew without what deletes left behind, proves the new one equal and puts it
    /// in the old one's place. Whatever fails leaves the old one as it was.
    fn compact(&mut self) -> Result<Compacted, TargetError>;
}

/// How much of what deletes left behind is tidied up, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compaction {
    None,
    /// Some row groups; the commit that does it stays short.
    Some,
    /// As many row groups as so many updated and deleted rows leave work for.
    For {
        changed_rows: u64,
    },
}

/// A copy that is to begin, or to go on.
#[derive(Debug, Clone)]
pub struct NewCopy {
    pub spec: Arc<TableSpec>,
    /// Its shadow, and what it kept of changes, stay.
    pub is_resumed: bool,
    /// Names in DuckDB of columns whose values are long: it compresses them in another way.
    pub long_columns: BTreeSet<String>,
    pub jobs: Vec<NewJob>,
}

/// Rows on their way into a shadow. An error ends the load and rolls it back.
pub type RowStream =
    Box<dyn Iterator<Item = Result<RecordBatch, Box<dyn std::error::Error + Send + Sync>>> + Send>;

/// What [`OlapEngine::apply`] did.
#[derive(Debug, Clone)]
pub struct Applied {
    /// The new checkpoint, now durable; after a part, the one before it.
    pub durable: DurableLsn,
    /// Rows deleted from and inserted into target tables, by the parts before it too.
    pub deleted_rows: u64,
    pub inserted_rows: u64,
    /// Rows of `_rhei.cycles` dropped by retention.
    pub pruned: u64,
}

/// `_rhei` as it is stored.
#[derive(Debug, Clone)]
pub struct StoredState {
    pub pipeline: Pipeline,
    pub tables: Vec<StoredTable>,
}

/// One row: what this file is a copy of, and how far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pipeline {
    pub slot: String,
    pub publications: Vec<String>,
    /// Opaque; changes when the publication does (trap 41).
    pub publication_fingerprint: String,
    /// `IDENTIFY_SYSTEM.systemid`.
    pub system_id: String,
    pub database: String,
    pub database_oid: u32,
    pub timeline: u32,
    pub phase: Phase,
    pub checkpoint: Checkpoint,
}

/// Where the pipeline stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The intent to make the slot is written; the slot may or may not exist. On restart: drop it,
    /// start over.
    Creating,
    /// The slot exists and belongs to this file.
    Running,
    /// `backfill --no-slot`: a copy that nothing follows.
    PlainCopy,
}

/// A table in `_rhei.tables` with its rows of `_rhei.columns`.
#[derive(Debug, Clone)]
pub struct StoredTable {
    pub oid: u32,
    pub source: QualifiedName,
    pub target: QualifiedName,
    pub state: TableState,
    pub copy_lsn: Lsn,
    /// See [`TableSpec::copy_xids`].
    pub copy_xids: Option<Arc<XidSnapshot>>,
    pub epoch: u32,
    pub replica_identity: crate::pgoutput::ReplicaIdentity,
    /// `WholeRow` and `AppendOnly` tables have no key columns; this tells them apart.
    pub whole_row_key: bool,
    /// Opaque; what the catalogs said of the table beside its columns.
    pub fingerprint: String,
    pub columns: Vec<StoredColumn>,
    pub excluded: Vec<String>,
    /// Rows that the last copy loaded.
    pub copied_rows: u64,
    /// A shadow is being filled, and changes from `copy_lsn` on are kept for it.
    pub has_shadow: bool,
    /// The transaction whose TRUNCATE was applied last, since the fingerprint was stored.
    pub truncated_by: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredColumn {
    pub attnum: i16,
    pub name: String,
    pub type_oid: u32,
    pub typmod: i32,
    pub not_null: bool,
    /// Position in the key, from 0; none when it is no key column.
    pub key_position: Option<u32>,
    pub target_name: String,
    pub mapping: Mapping,
}

impl StoredTable {
    /// What is stored of a table.
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

/// State of a table, as users see it in `status` and in `_rhei.tables`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableState {
    /// Known, nothing copied yet. Entered when the table is first seen; left by `begin_copies`.
    Pending,
    /// Rows are being loaded into the shadow, and changes are kept beside it. Left by
    /// `finish_loads`.
    Copying,
    /// Every row of the snapshot is in the shadow; the changes that were kept are being merged into
    /// it. Left by `merge`.
    CatchingUp,
    /// The table is the source at the checkpoint.
    Live,
    /// As `Copying` (or about to be), with an old copy that stays as it is and readable until the
    /// swap.
    Resync,
    /// Paused with a reason; the other tables go on. Left by a new copy.
    Error(Pause),
    /// Gone from the source or the publication; the copy is kept as it was.
    Dropped,
}

impl TableState {
    /// The word in `_rhei.tables` and in `status`.
    pub fn word(&self) -> &'static str {
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

/// Anything that goes wrong at the target. After an error of `apply` the transaction is rolled
/// back.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("{}", refused(.0))]
    Query(#[from] ::duckdb::Error),
    #[error("target {} is a folder\nhint: name a file in it with --target", .path.display())]
    IsFolder { path: PathBuf },
    #[error("cannot make target {}: there is no folder {}\nhint: make the folder \
             first", .path.display(), .folder.display())]
    NoFolder { path: PathBuf, folder: PathBuf },
    #[error("there is no target {}\nhint: `rhei sync` makes it; --target names another \
             one", .path.display())]
    NoFile { path: PathBuf },
    #[error("target {} is in use by process {holder}\ndetail: One process at a time may write a \
             DuckDB file, and nobody may read it meanwhile.\nhint: stop that process, or name \
             another file with --target", .path.display())]
    Locked { path: PathBuf, holder: String },
    #[error("target {} is not a DuckDB database\nhint: name another file with --target; this one \
             was not touched", .path.display())]
    NotADatabase { path: PathBuf },
    #[error("target {}, or the log beside it, is damaged; neither was touched\nhint: restore both \
             from a backup; or move them away, drop the slot (SELECT \
             pg_drop_replication_slot('..')) and copy again with `rhei sync`", .path.display())]
    Damaged { path: PathBuf, source: ::duckdb::Error },
    #[error("target {} cannot be written\nhint: check the permissions of the file and its \
             folder", .path.display())]
    NotWritable { path: PathBuf },
    #[error(transparent)]
    Raw(#[from] arrow_scan::RawError),
    #[error("cannot open target {}", .path.display())]
    Open { path: PathBuf, source: ::duckdb::Error },
    #[error(
        "the copy was written by rhei {written_by} in format {found}, and this rhei knows formats \
         up to {known}\nhint: use that version or a newer one"
    )]
    NewerFormat { found: i32, written_by: String, known: i32 },
    #[error(
        "the copy was written by rhei {written_by} in format {found}, which this rhei no longer \
         reads\nhint: name a new file with --target, and drop the old one with its slot"
    )]
    OlderFormat { found: i32, written_by: String },
    #[error(
        "the copy's state makes no sense: {reason}\nhint: copy again with `rhei backfill --force`"
    )]
    Corrupt { reason: String },
    #[error("table {table} is in {} already, and rhei did not put it there\nhint: give the copy \
             another name with `target` in its [tables.\"..\"] section, or another \
             file", .path.display())]
    ForeignTable { table: String, path: PathBuf },
    #[error("the checkpoint would go back from {from} to {to}")]
    Backwards { from: Lsn, to: Lsn },
    #[error("the copy differs from the source: {expected} {what}, {found} found")]
    Diverged { what: &'static str, expected: u64, found: u64 },
    #[error("target {} is closed, and cannot be opened again", .path.display())]
    Closed { path: PathBuf, source: Box<TargetError> },
    #[error("the file was not compacted: {reason}")]
    NotCompacted { reason: String },
    #[error("the file could not be compacted, and is as it was")]
    CompactionFailed { source: Box<TargetError> },
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the work was cancelled")]
    Cancelled,
    #[error("the rows to load broke off")]
    Rows { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("table {table} cannot be applied")]
    Table { oid: u32, table: String, source: Box<TargetError> },
}

/// DuckDB says what kind an error is before its first colon. What comes after may hold values of
/// the source.
fn is_of_kind(text: &str, kinds: &[&str]) -> bool {
    text.split_once(':').is_some_and(|(kind, _)| kinds.contains(&kind))
}

fn is_of_disk(text: &str) -> bool {
    // After any failure of a file checkpoint DuckDB says of each statement that the database has
    // been invalidated.
    if let Some((_, original)) = text.split_once("Original error:")
        && ["Out of Memory Error", "INTERNAL Error"].iter().any(|kind| original.contains(kind))
    {
        return false;
    }
    const WORDS: [&str; 7] = [
        "No space left",
        "quota exceeded",
        "Could not write",
        "Could not truncate",
        "Could not sync",
        "FSYNC",
        "has been invalidated",
    ];
    // A COMMIT that cannot be written is an error of its transaction.
    is_of_kind(text, &["IO Error", "FATAL Error", "TransactionContext Error"])
        && WORDS.iter().any(|words| text.contains(words))
}

/// Checksums that do not match, and files that end too soon.
fn is_damage(text: &str) -> bool {
    const WORDS: [&str; 3] =
        ["Corrupt", "Could not read enough bytes", "Failure while replaying WAL"];
    is_of_kind(text, &["IO Error"]) && WORDS.iter().any(|words| text.contains(words))
}

fn refused(error: &::duckdb::Error) -> &'static str {
    if is_of_disk(&error.to_string()) {
        "the target's disk does not take what is written\nhint: make room; nothing that was \
         committed is lost"
    } else if error.to_string().contains("Out of Memory Error") {
        "DuckDB has no memory left\nhint: raise [target] duckdb_memory_limit, or lower [target] \
         threads"
    } else if is_damage(&error.to_string()) {
        "the target is damaged\nhint: restore it with its log from a backup, or copy again into a \
         new file"
    } else {
        "DuckDB refused a statement"
    }
}

impl TargetError {
    /// Ties an error to the table whose statements met it. What concerns the whole file stays so.
    fn of(self, table: &TableSpec) -> Self {
        let is_of_file = match &self {
            Self::Query(error) => {
                const KINDS: [&str; 5] = [
                    "IO Error",
                    "Out of Memory Error",
                    "FATAL Error",
                    "INTERNAL Error",
                    "INTERRUPT Error",
                ];
                let text = error.to_string();
                is_of_disk(&text) || is_of_kind(&text, &KINDS)
            }
            Self::Diverged { .. } | Self::Rows { .. } => false,
            _ => true,
        };
        if is_of_file {
            return self;
        }
        Self::Table { oid: table.oid, table: table.source.to_string(), source: Box::new(self) }
    }

    /// As [`Self::of`], for the copy of a table. What broke off before it came here is not the
    /// table's, and a copy that does not fit begins anew.
    fn of_copy(self, table: &TableSpec) -> Self {
        match self {
            Self::Rows { .. } | Self::Diverged { .. } => self,
            other => other.of(table),
        }
    }

    /// Whether the error is about what one table holds. Another transaction that was in the way is
    /// not.
    pub fn is_of_table(&self) -> bool {
        self.table().is_some() && !self.is_conflict()
    }

    /// The disk does not take what is written: it is full, or broken; or the file is closed. It has
    /// to be opened once more, and that may have to be tried again.
    pub fn is_of_disk(&self) -> bool {
        match self {
            Self::Query(error) | Self::Open { source: error, .. } => is_of_disk(&error.to_string()),
            Self::Table { source, .. } | Self::CompactionFailed { source } => source.is_of_disk(),
            Self::Closed { .. } => true,
            Self::Io(error) => {
                matches!(
                    error.kind(),
                    std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
                )
            }
            _ => false,
        }
    }

    /// Another transaction was at the same row, or has replaced the table.
    pub fn is_conflict(&self) -> bool {
        match self {
            Self::Query(error) => {
                let text = error.to_string();
                is_of_kind(&text, &["TransactionContext Error"]) && !is_of_disk(&text)
            }
            Self::Table { source, .. } => source.is_conflict(),
            _ => false,
        }
    }

    /// DuckDB had no memory left, or met a bug of its own; the file may have to be opened again.
    /// Nothing is wrong with what was to be written.
    pub fn is_internal(&self) -> bool {
        match self {
            Self::Query(error) | Self::Open { source: error, .. } => {
                let text = error.to_string();
                is_of_kind(&text, &["Out of Memory Error", "INTERNAL Error", "FATAL Error"])
                    && !is_of_disk(&text)
            }
            Self::Table { source, .. } | Self::CompactionFailed { source } => source.is_internal(),
            _ => false,
        }
    }

    /// The copy does not hold what the stream says of it.
    pub fn is_diverged(&self) -> bool {
        match self {
            Self::Diverged { .. } => true,
            Self::Table { source, .. } => source.is_diverged(),
            _ => false,
        }
    }

    /// Who brings the table back that it concerns.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Table { source, .. } => source.remedy(),
            Self::Rows { source } => match source.downcast_ref::<ValueError>() {
                Some(error) if error.is_unrepresentable() => Remedy::AllowNulls,
                _ => Remedy::Operator,
            },
            _ => Remedy::Operator,
        }
    }

    /// As if DuckDB had refused a statement with this.
    #[cfg(test)]
    pub fn saying(text: &str) -> Self {
        Self::Query(::duckdb::Error::DuckDBFailure(
            ::duckdb::ffi::Error::new(1),
            Some(text.to_owned()),
        ))
    }

    /// The oid of the one table that this error concerns, if it does.
    pub fn table(&self) -> Option<u32> {
        match self {
            Self::Table { oid, .. } => Some(*oid),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(sql: &str) -> TargetError {
        ::duckdb::Connection::open_in_memory().unwrap().execute_batch(sql).unwrap_err().into()
    }

    #[test]
    fn a_file_checkpoint_that_had_no_memory_is_no_full_disk() {
        let invalidated = |original: &str| {
            format!(
                "FATAL Error: Failed: database has been invalidated because of a previous fatal \
                 error. The database must be \
                 restarted prior to being used again.\nOriginal error: \"{original}\""
            )
        };
        assert!(is_of_disk(&invalidated(
            "IO Error: Could not write all bytes: No space left on device"
        )));
        assert!(!is_of_disk(&invalidated(
            "Out of Memory Error: failed to pin block of size 256.0 KiB"
        )));
        assert!(!is_of_disk(&invalidated("INTERNAL Error: Attempted to access index 1")));
    }

    /// DuckDB's messages hold what they could not read.
    #[test]
    fn a_value_of_the_source_does_not_pass_for_a_disk_that_is_full_or_a_file_that_is_damaged() {
        for words in [
            "No space left",
            "quota exceeded",
            "FATAL Error",
            "IO Error: Corrupt",
            "TransactionContext Error",
        ] {
            let error = error(&format!("SELECT CAST('{words}' AS INTEGER)"));
            let TargetError::Query(source) = &error else { panic!("{error}") };
            assert!(source.to_string().contains(words), "{source}");
            assert!(!error.is_of_disk() && !error.is_conflict(), "{source}");
            assert_eq!(error.to_string(), "DuckDB refused a statement");
        }
    }
}
