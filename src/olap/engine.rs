//! What rhei asks of a target, and what crosses that line.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;

use super::{Compacted, NewJob, Pipeline, Space, StoredJob, StoredState, StoredTable, TargetError};
use crate::{
    Checkpoint, Lsn,
    change::{ChangeBatch, Pause, TableSpec},
    checkpoint::DurableLsn,
    pgoutput::QualifiedName,
};

/// A target that a pipeline can follow its source into. Plain blocking calls, made from one writer
/// thread.
///
/// Data and checkpoint reach it through one call, so changes cannot be written without saying up to
/// where. Each call is one transaction: it happens whole or not at all.
pub trait OlapEngine: TargetState + CopyTarget + ApplyTarget + FileMaintenance {}

impl<T: TargetState + CopyTarget + ApplyTarget + FileMaintenance> OlapEngine for T {}

/// What the target says of itself: the pipeline and its tables.
pub trait TargetState: Send {
    /// What the file says of itself; `None` when rhei never wrote to it.
    fn state(&mut self) -> Result<Option<StoredState>, TargetError>;

    /// Replaces the pipeline row (slot, identities, phase, checkpoint) and, when given, the rows of
    /// these tables.
    fn put_state(&mut self, pipeline: &Pipeline, tables: &[StoredTable])
    -> Result<(), TargetError>;

    /// Replaces the rows of these tables; nothing of their data changes.
    fn put_tables(&mut self, tables: &[StoredTable]) -> Result<(), TargetError>;

    /// Replaces what is stored of the shape of these tables, which are otherwise as they were.
    fn put_shapes(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError>;

    /// Renames tables, all at once, from the name given to the target that their new row says, and
    /// replaces their rows.
    fn rename(&mut self, moves: &[(QualifiedName, StoredTable)]) -> Result<(), TargetError>;
}

/// Copies of tables, which are loaded beside the stream and merged with what changed meanwhile.
pub trait CopyTarget: Send {
    /// Loads chunks beside the writer.
    type Loader: CopyLoader;

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
    fn loader(&mut self) -> Result<Self::Loader, TargetError>;

    /// Drops jobs that ended long ago. Returns how many.
    fn prune(&mut self) -> Result<u64, TargetError>;
}

/// Change batches, each in one transaction with its checkpoint.
pub trait ApplyTarget: Send {
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

    /// Takes back the parts of a source transaction that will not be ended, and whatever a panic
    /// left open.
    fn roll_back(&mut self) -> Result<(), TargetError>;

    /// Whether a table has, in any of these columns of text or of lists of text, a value that is
    /// not among `allowed`.
    fn holds_other_values(
        &mut self,
        table: &TableSpec,
        columns: &[usize],
        allowed: &[String],
    ) -> Result<bool, TargetError>;
}

/// The upkeep of what the target keeps its tables in.
pub trait FileMaintenance: Send {
    /// Opens the file once more, as DuckDB wants it after its disk has failed it.
    fn reopen(&mut self) -> Result<(), TargetError>;

    /// Writes DuckDB's write-ahead log into the file. May be refused by an old reader; that is no
    /// error.
    fn checkpoint_file(&mut self, compaction: Compaction) -> Result<(), TargetError>;

    /// How large the file is.
    fn space(&mut self) -> Result<Space, TargetError>;

    /// Writes the file anew without what deletes left behind, proves the new one equal and puts it
    /// in the old one's place. Whatever fails leaves the old one as it was.
    fn compact(&mut self) -> Result<Compacted, TargetError>;
}

/// Loads chunks of copies, through a connection of its own: beside the writer and other loaders.
pub trait CopyLoader: Send + 'static {
    /// A job is begun, once more. `false`: it was cancelled meanwhile.
    fn begin(&self, job: u64) -> Result<bool, TargetError>;

    /// Whether nobody wants the job to be done any more.
    fn is_cancelled(&self, job: u64) -> Result<bool, TargetError>;

    /// Appends rows to the shadow of a table and marks the job as done, in one transaction. Rows
    /// have the order and the target names of `table.columns`.
    ///
    /// # Errors
    /// Also when the job was cancelled, or is while it is loaded: its shadow is another one then.
    fn load(
        &mut self,
        table: &Arc<TableSpec>,
        job: u64,
        rows: RowStream,
    ) -> Result<u64, TargetError>;

    /// As [`Self::load`], for chunks of several small tables, all in one transaction: each with its
    /// job and its rows. Their jobs go from `pending` to `done`: `reading` is how long it took to
    /// read the rows.
    fn load_all(
        &mut self,
        chunks: &[(Arc<TableSpec>, u64, Vec<RecordBatch>)],
        reading: Duration,
    ) -> Result<(), TargetError>;

    /// A job could not be done, this time (`pending`) or for good (`failed`, `cancelled`).
    fn give_up(&self, job: u64, status: &str, error: &str) -> Result<(), TargetError>;
}

/// How much of what deletes left behind is tidied up, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compaction {
    Skip,
    /// Some row groups; the commit that does it stays short.
    Incremental,
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

/// What [`ApplyTarget::apply`] did.
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
