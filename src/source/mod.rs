//! PostgreSQL: bytes in, acknowledgements out.
//!
//! `connection` reaches a server, `wire` speaks the replication protocol: it reads what comes,
//! acknowledges, and runs COPY. `spool` keeps transactions that have not ended, `pg_consumer` makes
//! change batches of them (`recorded_consumer` does so from a file), `copy_binary` reads the rows
//! of COPY, `sqlstate` tells refusals of the server apart, `slot`, `catalog` and `ddl_trigger` ask
//! and arrange at the source.

pub mod catalog;
pub mod connection;
pub mod copy_binary;
pub mod ddl_trigger;
pub mod error;
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

use crate::{
    Lsn,
    change::{ChangeBatch, assemble::Assembler, followed::SchemaQuery},
    checkpoint::DurableLsn,
};

pub use error::SourceError;

/// Where a change batch has to end.
#[derive(Debug, Clone)]
pub struct BatchLimits {
    /// Row changes after which the batch ends at the next source commit.
    pub max_rows: u64,
    /// Bytes of buffered tuples after which the batch ends at the next source commit.
    pub max_bytes: usize,
    /// How long to collect once something arrived, and how long to wait for something to arrive.
    pub linger: Duration,
    /// No more than this is waited for: a batch that has come so far goes out.
    pub until: Option<Lsn>,
    /// No more than one whole source transaction is waited for.
    pub any: bool,
    /// Ask the server at short intervals how far it is, so that the end of the WAL is noticed at
    /// once.
    pub hurry: bool,
}

/// Where the stream has to wait for somebody else: no source transaction with `commit_lsn >= hold`
/// is taken up. A batch that was cut there, or an idle one, has `end_lsn = hold` once the stream is
/// known to be past it.
#[derive(Debug, Clone)]
pub struct LsnBarrier(Arc<AtomicU64>);

impl Default for LsnBarrier {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(u64::MAX)))
    }
}

impl LsnBarrier {
    pub fn set(&self, lsn: Lsn) {
        self.0.store(lsn.0, Ordering::Release);
    }

    pub fn release(&self) {
        self.0.store(u64::MAX, Ordering::Release);
    }

    pub fn get(&self) -> Option<Lsn> {
        Some(Lsn(self.0.load(Ordering::Acquire))).filter(|lsn| lsn.0 < u64::MAX)
    }
}

/// What a consumer hands over.
#[derive(Debug)]
pub enum Delivery {
    Batch(ChangeBatch),
    /// The stream describes a relation: nothing is read on before [`Assembler::answer`].
    SchemaQuery(SchemaQuery),
    /// The stream has ended for good (a recorded stream that was read to its end).
    Ended,
}

/// Reads whole source transactions, in commit order, from the checkpoint on.
///
/// Guaranteed delivery: the position at the source moves only past what was acknowledged, and only
/// a durable checkpoint can be acknowledged. A consumer that is dropped and made anew from the
/// checkpoint goes on without a gap.
pub trait CdcConsumer: Send {
    /// The next batch, or a question that comes before it.
    /// An idle batch (no tables) still carries the position that the source has reached.
    ///
    /// # Errors
    /// The stream broke or made no sense. Nothing was lost: make a new consumer from the
    /// checkpoint.
    fn next_batch(
        &mut self,
        limits: &BatchLimits,
    ) -> impl Future<Output = Result<Delivery, SourceError>> + Send;

    /// Reads on until the next batch, or a question, is there to be taken. May be dropped half way:
    /// nothing is lost.
    ///
    /// # Errors
    /// As [`Self::next_batch`].
    fn gather(
        &mut self,
        limits: &BatchLimits,
    ) -> impl Future<Output = Result<(), SourceError>> + Send;

    /// What has been read. Answers and new shapes go to it, and tables that are to be followed or
    /// no longer.
    fn assembler(&mut self) -> &mut Assembler;

    /// Tells the source what is durable. Does not wait.
    fn acknowledge(&self, durable: DurableLsn);

    /// The rungs of the lag ladder that lie on this side.
    fn position(&self) -> SourcePosition;
}

/// How far the stream is, for lag.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourcePosition {
    /// End of the server's WAL, as it said last.
    pub head: Lsn,
    /// End of the last source transaction that arrived whole.
    pub decoded: Lsn,
    /// What the server was told to be durable.
    pub acknowledged: Lsn,
    /// Nothing is read that was not in a batch.
    pub has_no_open_work: bool,
    /// The server waits for an acknowledgement, as it does before it can shut down (trap 25).
    pub reply_requested: bool,
}
