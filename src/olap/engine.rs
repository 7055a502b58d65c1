//! The interface between rhei and a target, and the data that crosses it.

#![deny(missing_docs)]

use std::{collections::BTreeSet, ops::RangeInclusive, sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;

use super::{
    Compacted, Memory, NewJob, Pipeline, Publisher, Space, StoredJob, StoredState, StoredTable,
    StoredVerification, TargetError,
};
use crate::{
    Checkpoint, Lsn,
    change::{ChangeBatch, Pause, TableSpec},
    checkpoint::DurableLsn,
    pgoutput::QualifiedName,
};

/// A target into which a pipeline can replicate its source. All calls are plain blocking calls from
/// one writer thread.
///
/// Data and checkpoint reach the target through one call, so changes cannot be written without the
/// position that they reach. Each call is one transaction: it happens completely or not at all.
pub trait OlapEngine:
    TargetState + CopyTarget + ApplyTarget + ReadTarget + FileMaintenance
{
}

impl<T: TargetState + CopyTarget + ApplyTarget + ReadTarget + FileMaintenance> OlapEngine for T {}

/// The state that the target stores: the pipeline and its tables.
pub trait TargetState: Send {
    /// Returns the state that the file stores; `None` if rhei never wrote to the file.
    fn state(&mut self) -> Result<Option<StoredState>, TargetError>;

    /// Replaces the row of the pipeline (slot, identities, phase, checkpoint) and the rows of these
    /// tables, if any are given.
    fn put_state(&mut self, pipeline: &Pipeline, tables: &[StoredTable])
    -> Result<(), TargetError>;

    /// Replaces the rows of these tables; the data of the tables does not change.
    fn put_tables(&mut self, tables: &[StoredTable]) -> Result<(), TargetError>;

    /// Replaces the stored shape of these tables and keeps the rest of their state.
    fn put_shapes(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError>;

    /// Renames tables, all at once, from the given name to the target name of their new row, and
    /// replaces their rows.
    fn rename(&mut self, moves: &[(QualifiedName, StoredTable)]) -> Result<(), TargetError>;

    /// Keeps the results of a verification that ended now.
    fn put_verifications(&mut self, results: &[StoredVerification]) -> Result<(), TargetError>;

    /// Returns the last result of each table that was ever verified.
    fn verifications(&mut self) -> Result<Vec<StoredVerification>, TargetError>;

    /// Returns which of `parts` parts was compared last, of each table of which one was.
    fn last_parts(&mut self, parts: u32) -> Result<Vec<(QualifiedName, u32)>, TargetError>;
}

/// Copies of tables, which are loaded beside the stream and merged with the changes that came
/// meanwhile.
pub trait CopyTarget: Send {
    /// Loads chunks beside the writer.
    type Loader: CopyLoader;

    /// Begins copies. A copy that is not resumed gets an empty shadow, and keeps changes from now
    /// on; its table becomes `copying`, or `resync` when an older copy of the table exists. Jobs of
    /// an earlier begin that are still open are cancelled. Returns the ids of the jobs of each
    /// copy, in order; or the reason why a table cannot be copied, which is then in `error`.
    fn begin_copies(
        &mut self,
        copies: &[NewCopy],
    ) -> Result<Vec<Result<Vec<u64>, String>>, TargetError>;

    /// Returns the chunks that are in the shadow of a table, as their jobs describe them, and their
    /// numbers of rows.
    fn done_chunks(
        &mut self,
        oid: u32,
        copy_lsn: Lsn,
    ) -> Result<Vec<(serde_json::Value, u64)>, TargetError>;

    /// Returns at most `most` keys of rows that changed while the table was copied and that have
    /// values which only the source knows.
    fn keys_with_unchanged_toast(
        &mut self,
        table: &TableSpec,
        most: usize,
    ) -> Result<Vec<Vec<String>>, TargetError>;

    /// Fills in the rows under `asked` of those keys, as the source has the rows at the checkpoint.
    fn fill_open(
        &mut self,
        table: &TableSpec,
        rows: &[RecordBatch],
        asked: usize,
    ) -> Result<(), TargetError>;

    /// Marks these tables as `catching_up`: every chunk of them is in their shadows.
    fn finish_loads(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError>;

    /// Merges at most `most_rows` of the changes that came meanwhile into shadows that are loaded.
    /// If no change of a table is left, its shadow takes the place of the table, and the table is
    /// `live` as of the checkpoint; returns the oids of these tables.
    fn merge(
        &mut self,
        tables: &[Arc<TableSpec>],
        most_rows: u64,
    ) -> Result<BTreeSet<u32>, TargetError>;

    /// Drops copies, by the oids of their tables. A table with a reason is then in `error`; a table
    /// without one waits to be copied again.
    fn abandon_copies(&mut self, copies: &[(u32, Option<Pause>)]) -> Result<(), TargetError>;

    /// Returns all jobs that are kept, oldest first.
    fn jobs(&mut self) -> Result<Vec<StoredJob>, TargetError>;

    /// Returns a loader, which loads chunks into shadows beside this writer and other loaders.
    fn loader(&mut self) -> Result<Self::Loader, TargetError>;

    /// Drops jobs that ended long ago. Returns the number of dropped jobs.
    fn prune(&mut self) -> Result<u64, TargetError>;
}

/// Applies change batches, each in one transaction with its checkpoint.
pub trait ApplyTarget: Send {
    /// Brings tables into their new shapes, applies a batch (or keeps its changes for later, for
    /// tables that are being copied), marks the batch's failed tables, replaces the checkpoint,
    /// records the cycle, and commits. All steps are in one transaction. After a part of a source
    /// transaction ([`ChangeBatch::is_part`]) this transaction stays open for the next batch; it
    /// ends without a trace if another method is called, or if the batch fails.
    fn apply(
        &mut self,
        batch: &ChangeBatch,
        checkpoint: &Checkpoint,
    ) -> Result<Applied, TargetError>;

    /// Rolls back the parts of a source transaction that will not be ended, and a transaction that
    /// a panic left open.
    fn roll_back(&mut self) -> Result<(), TargetError>;

    /// Deletes rows that differ from the source, appends the rows of the source in their place, and
    /// keeps a record of both in `_rhei.repairs`. The checkpoint stays. Returns `None`, and does
    /// nothing, when the target is at another checkpoint than the repair.
    fn repair(&mut self, repair: Repair<'_>) -> Result<Option<Repaired>, TargetError>;

    /// Returns whether a table has, in any of these columns of text or of lists of text, a value
    /// that is not among `allowed`.
    fn holds_other_values(
        &mut self,
        table: &TableSpec,
        columns: &[usize],
        allowed: &[String],
    ) -> Result<bool, TargetError>;
}

/// Reads what the target holds, beside the writer.
pub trait ReadTarget: Send {
    /// Reads through a connection of its own.
    type Reader: TargetReader;

    /// Returns readers that all see the target as it is now, between two transactions of the
    /// writer, and its checkpoint; `None` if rhei never wrote to the file.
    fn readers(&mut self, count: usize) -> Result<Option<Readers<Self::Reader>>, TargetError>;
}

/// Rows that are replaced.
pub struct Repair<'a> {
    /// The new rows are as of every checkpoint in this range: the source committed nothing between
    /// its ends.
    pub checkpoints: RangeInclusive<Lsn>,
    /// The shape of the table.
    pub table: &'a Arc<TableSpec>,
    /// What `is_wrong` needs of each row, as a list of columns in the target's SQL.
    pub select: &'a str,
    /// Returns for each row of a batch whether the row is deleted.
    pub is_wrong: IsWrong<'a>,
    /// The rows of the source.
    pub rows: &'a [RecordBatch],
}

/// Returns for each row of a batch whether it is deleted.
pub type IsWrong<'a> = &'a mut dyn FnMut(&RecordBatch) -> Result<Vec<bool>, TargetError>;

/// The rows that a repair replaced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Repaired {
    /// The number of rows that were deleted.
    pub deleted_rows: u64,
    /// The number of rows that were inserted.
    pub inserted_rows: u64,
}

/// Readers that see the target at one checkpoint.
pub struct Readers<R> {
    /// The checkpoint that the target had when the readers were made.
    pub checkpoint: Checkpoint,
    /// The readers.
    pub readers: Vec<R>,
}

/// A reader that sees the target at one checkpoint for as long as the reader lives. The writer goes
/// on; the file is not rewritten meanwhile.
pub trait TargetReader: Send + 'static {
    /// Runs a query in the target's SQL, and calls `each` with its rows as they come. An error of
    /// `each` ends the query.
    fn select(
        &mut self,
        sql: &str,
        each: &mut dyn FnMut(RecordBatch) -> Result<(), TargetError>,
    ) -> Result<(), TargetError>;
}

/// The maintenance of the file that holds the target's tables.
pub trait FileMaintenance: Send {
    /// Opens the file again, as DuckDB requires after an error of its disk.
    fn reopen(&mut self) -> Result<(), TargetError>;

    /// Returns the error to act on for an error of another method: that a lake cannot be used now,
    /// where its catalog or its store is the cause, or else the error itself.
    fn classify(&self, error: TargetError) -> TargetError;

    /// Does what is due now and then between two transactions, if something is: a lake merges its
    /// files and forgets old snapshots. A step takes seconds at most. Returns whether another step
    /// is due.
    fn upkeep(&mut self) -> Result<bool, TargetError>;

    /// Writes DuckDB's write-ahead log into the file. An old reader may prevent the write; that is
    /// no error.
    fn checkpoint_file(&mut self, compaction: Compaction) -> Result<(), TargetError>;

    /// Returns the size of the file.
    fn space(&mut self) -> Result<Space, TargetError>;

    /// Returns the memory that the target uses, and what it has spilled to disk.
    fn memory(&mut self) -> Result<Memory, TargetError>;

    /// Rewrites the file without the space of deleted rows, proves that the new file is equal and
    /// puts it in the place of the old one. Any failure leaves the old file as it was.
    fn compact(&mut self) -> Result<Compacted, TargetError>;

    /// Returns what publishes the copy, beside the writer, as it is at one moment.
    fn publisher(&mut self) -> Result<Publisher, TargetError>;
}

/// Loads chunks of copies, through a connection of its own: beside the writer and other loaders.
pub trait CopyLoader: Send + 'static {
    /// Begins a job, also one that was begun before. Returns `false` if the job was cancelled
    /// meanwhile.
    fn begin(&self, job: u64) -> Result<bool, TargetError>;

    /// Returns whether the job was cancelled, so that no task needs its result any more.
    fn is_cancelled(&self, job: u64) -> Result<bool, TargetError>;

    /// Appends rows to the shadow of a table and marks the job as done, in one transaction. The
    /// rows have the order and the target names of `table.columns`.
    ///
    /// # Errors
    /// The load also fails when the job was cancelled, or is cancelled while it is loaded: the
    /// table then has another shadow.
    fn load(
        &mut self,
        table: &Arc<TableSpec>,
        job: u64,
        rows: RowStream,
    ) -> Result<u64, TargetError>;

    /// Works as [`Self::load`], for chunks of several small tables, all in one transaction: each
    /// chunk with its job and its rows. The jobs go from `pending` to `done`: `reading` is the time
    /// that it took to read the rows.
    fn load_all(
        &mut self,
        chunks: &[(Arc<TableSpec>, u64, Vec<RecordBatch>)],
        reading: Duration,
    ) -> Result<(), TargetError>;

    /// Records that a job could not be done, this time (`pending`) or for good (`failed`,
    /// `cancelled`).
    fn fail_job(&self, job: u64, status: &str, error: &str) -> Result<(), TargetError>;
}

/// How much of the space of deleted rows a file checkpoint reclaims as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compaction {
    /// Compacts no row group.
    Skip,
    /// Compacts some row groups; the commit that does it stays short.
    Incremental,
    /// Compacts as many row groups as this number of updated and deleted rows leaves work for.
    For {
        /// The number of rows that the source updated and deleted, and that the target has applied.
        changed_rows: u64,
    },
}

/// A copy that begins, or that is resumed.
#[derive(Debug, Clone)]
pub struct NewCopy {
    /// The shape of the table; its `copy_lsn` is the LSN of the snapshot.
    pub spec: Arc<TableSpec>,
    /// The shadow of the copy, and the changes that the copy kept, stay.
    pub is_resumed: bool,
    /// The names in DuckDB of the columns whose values are long: DuckDB compresses these in another
    /// way.
    pub long_columns: BTreeSet<String>,
    /// One job per chunk; a resumed copy has jobs only for chunks that are not in its shadow.
    pub jobs: Vec<NewJob>,
}

/// The rows that are loaded into a shadow. An error ends the load and rolls it back.
pub type RowStream =
    Box<dyn Iterator<Item = Result<RecordBatch, Box<dyn std::error::Error + Send + Sync>>> + Send>;

/// The result of [`ApplyTarget::apply`].
#[derive(Debug, Clone)]
pub struct Applied {
    /// The new checkpoint, which is now durable; after a part, the checkpoint before it.
    pub durable: DurableLsn,
    /// The rows deleted from target tables, including those of earlier parts.
    pub deleted_rows: u64,
    /// The rows inserted into target tables, including those of earlier parts.
    pub inserted_rows: u64,
    /// The rows of `_rhei.cycles` that retention dropped.
    pub pruned: u64,
}
