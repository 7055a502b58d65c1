//! PostgreSQL: bytes in, acknowledgements out.
//!
//! `connection` connects to a server, `wire` speaks the replication protocol: it reads the stream,
//! acknowledges, and runs COPY. `spool` keeps transactions that have not ended, `pg_consumer` makes
//! change batches of them (`recorded_consumer` does so from a file), `copy_binary` reads the rows
//! of COPY, `figures` are what a stream tells of itself, `sqlstate` classifies refusals of the
//! server, `slot`, `catalog` and `ddl_trigger` query the source and set it up.

pub mod catalog;
pub mod connection;
pub mod copy_binary;
pub mod ddl_trigger;
pub mod error;
mod figures;
pub mod pg_consumer;
pub mod quote;
pub mod recorded_consumer;
pub mod recording;
pub mod slot;
pub mod spool;
pub mod sqlstate;
pub mod wire;

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::{
    Lsn,
    change::{
        ChangeBatch, SchemaChange, TableSpec,
        assemble::Assembler,
        followed::{SchemaQuery, SchemaResolution, Untracked},
    },
    checkpoint::DurableLsn,
};

pub use error::SourceError;
pub use figures::StreamFigures;

/// The limits at which a change batch has to end.
#[derive(Debug, Clone)]
pub struct BatchLimits {
    /// Row changes after which the batch ends at the next source commit.
    pub max_rows: u64,
    /// Bytes of buffered tuples after which the batch ends at the next source commit.
    pub max_bytes: usize,
    /// How long the consumer collects once something arrived, and how long it waits for something
    /// to arrive.
    pub linger: Duration,
    /// The consumer waits no longer than for this LSN: a batch that has reached it is delivered.
    pub until: Option<Lsn>,
    /// The consumer waits for no more than one whole source transaction.
    pub stop_after_one: bool,
    /// The consumer asks the server for its position at short intervals, so that it notices the end
    /// of the WAL at once.
    pub request_keepalives: bool,
}

/// A position at which the stream has to wait for another task: the consumer takes up no source
/// transaction with `commit_lsn >= hold`. A batch that was cut there, or an idle one, has
/// `end_lsn = hold` once the stream is known to be past it.
#[derive(Debug, Clone)]
pub struct LsnBarrier {
    lsn: Arc<AtomicU64>,
    claim: Arc<Mutex<()>>,
}

impl Default for LsnBarrier {
    fn default() -> Self {
        Self { lsn: Arc::new(AtomicU64::new(u64::MAX)), claim: Arc::default() }
    }
}

impl LsnBarrier {
    /// Waits until no other task holds the stream. The stream is released when the claim is
    /// dropped, however the task ends.
    pub async fn claim(&self) -> BarrierClaim {
        let guard = Arc::clone(&self.claim).lock_owned().await;
        BarrierClaim { barrier: self.clone(), _guard: guard }
    }

    /// Holds the stream at `lsn`, whatever the position before was.
    pub fn set(&self, lsn: Lsn) {
        self.lsn.store(lsn.0, Ordering::Release);
    }

    /// Lets the stream go on.
    pub fn release(&self) {
        self.lsn.store(u64::MAX, Ordering::Release);
    }

    /// Returns the position at which the stream is held; `None` while it is free.
    pub fn get(&self) -> Option<Lsn> {
        Some(Lsn(self.lsn.load(Ordering::Acquire))).filter(|lsn| lsn.0 < u64::MAX)
    }
}

/// The right of one task to hold the stream at a barrier.
pub struct BarrierClaim {
    barrier: LsnBarrier,
    _guard: OwnedMutexGuard<()>,
}

impl Drop for BarrierClaim {
    fn drop(&mut self) {
        self.barrier.release();
    }
}

/// What a consumer returns.
#[derive(Debug)]
pub enum Delivery {
    /// Whole source transactions or a part of a large one; or an idle batch, which only brings a
    /// position.
    Batch(ChangeBatch),
    /// The stream describes a relation: the consumer reads no further before
    /// [`CdcConsumer::answer`].
    SchemaQuery(SchemaQuery),
    /// The stream has ended for good (a recorded stream that was read to its end).
    Ended,
}

/// Reads whole source transactions, in commit order, from the checkpoint on.
///
/// Guaranteed delivery: the position at the source moves only past acknowledged changes, and only a
/// durable checkpoint can be acknowledged. A consumer that is dropped and recreated from the
/// checkpoint continues without a gap.
pub trait CdcConsumer: Send {
    /// Returns the next batch, or a question that comes before it. An idle batch (no tables) still
    /// carries the position that the source has reached.
    ///
    /// # Errors
    /// The stream broke or was invalid. No change is lost: make a new consumer from the checkpoint.
    fn next_batch(
        &mut self,
        limits: &BatchLimits,
    ) -> impl Future<Output = Result<Delivery, SourceError>> + Send;

    /// Reads on until the next batch, or a question, can be taken. The caller may drop the future
    /// midway without losing changes.
    ///
    /// # Errors
    /// The errors of [`Self::next_batch`].
    fn fill(
        &mut self,
        limits: &BatchLimits,
    ) -> impl Future<Output = Result<(), SourceError>> + Send;

    /// Tells the source which LSN is durable, without waiting.
    fn acknowledge(&self, durable: DurableLsn);

    /// Returns the rungs of the lag ladder that lie on the side of the source.
    fn position(&self) -> SourcePosition;

    /// Returns what the consumer knows of tables and relations. The methods below work on it.
    #[doc(hidden)]
    fn assembler(&mut self) -> &mut Assembler;

    /// Answers the question of [`Delivery::SchemaQuery`]; the consumer reads on after that.
    fn answer(&mut self, resolution: SchemaResolution) {
        self.assembler().answer(resolution);
    }

    /// Takes rows of a table in another shape from here on. The next batch holds the change.
    fn change_shape(&mut self, change: SchemaChange) {
        self.assembler().reshape(change);
    }

    /// Takes the rows of a table from here on.
    fn track(&mut self, table: Arc<TableSpec>) {
        self.assembler().track(table);
    }

    /// Takes no more rows of a table.
    fn untrack(&mut self, oid: u32) {
        self.assembler().untrack(oid);
    }

    /// Returns whether a change of the table in a source transaction with `commit_lsn >= since` may
    /// have passed.
    fn may_have_missed(&mut self, oid: u32, since: Lsn) -> bool {
        self.assembler().may_have_missed(oid, since)
    }

    /// Takes the relations whose changes were passed over since the last call.
    fn take_untracked(&mut self) -> Vec<Untracked> {
        self.assembler().take_untracked()
    }

    /// Gives back relations whose meaning could not be found out yet.
    fn put_back_untracked(&mut self, untracked: Vec<Untracked>) {
        self.assembler().put_back_untracked(untracked);
    }
}

/// The position of the stream, from which the lag is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourcePosition {
    /// The end of the server's WAL, as the server reported it last.
    pub head: Lsn,
    /// The end of the last source transaction that arrived whole.
    pub decoded: Lsn,
    /// The LSN that was acknowledged to the server as durable.
    pub acknowledged: Lsn,
    /// Every change that was read has been in a batch.
    pub has_no_open_work: bool,
    /// The server waits for an acknowledgement, as it does before it can shut down (trap 25).
    pub reply_requested: bool,
}
