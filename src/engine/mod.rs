//! Decides what happens next.
//!
//! `attach` proves that this file and this source belong together (or makes it so), `tables` plans what is copied,
//! this file holds one cycle, `replicate` the long run and the catch-up.

pub mod attach;
pub mod replicate;
pub mod tables;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;

use crate::{
    Checkpoint, Lsn,
    change::{ChangeBatch, RowCounts, TableFailure},
    config::TablePattern,
    source::{BatchLimits, CdcConsumer, SourceError, connect::SourceOptions},
    target::{Applied, OlapEngine, TargetError, duckdb::TargetOptions},
};

/// What a pipeline needs to know of the settings.
#[derive(Debug, Clone)]
pub struct Options {
    pub source: SourceOptions,
    pub target: TargetOptions,
    pub publications: Vec<String>,
    pub slot: String,
    pub tables: Vec<TablePattern>,
    pub exclude: Vec<TablePattern>,
    pub table_settings: BTreeMap<String, tables::TableSettings>,
    pub interval: Duration,
    pub max_batch_rows: u64,
    pub memory_limit_bytes: usize,
    pub workers: usize,
    /// Where progress goes; who listens draws it.
    pub events: tokio::sync::mpsc::UnboundedSender<Event>,
}

/// What happens on the way, for progress displays and logs.
#[derive(Debug, Clone)]
pub enum Event {
    /// Slot creation waits for transactions of the source that are still open (trap 12).
    WaitingForTransactions {
        what: String,
    },
    CopyStarted {
        table: String,
        estimated_rows: u64,
    },
    CopyProgress {
        table: String,
        rows: u64,
        bytes: u64,
    },
    CopyFinished {
        table: String,
        rows: u64,
    },
    CopyFailed {
        table: String,
        reason: String,
    },
    Cycle(CycleReport),
    /// A stream has begun or begun again at this checkpoint.
    Streaming {
        checkpoint: Lsn,
    },
}

/// What one cycle did. Every count is of what its name says: source rows unless it says target.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CycleReport {
    pub source_transactions: u64,
    /// Row changes of the source before they were reduced.
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    /// TRUNCATEs of tables.
    pub truncated: u64,
    /// Rows that left and entered target tables.
    pub target_deleted_rows: u64,
    pub target_inserted_rows: u64,
    /// Rows of history tables and finished jobs that retention dropped.
    pub pruned: u64,
    /// WAL that the source may recycle since this cycle, as far as this slot is concerned.
    pub wal_released_bytes: u64,
    pub checkpoint: Lsn,
    /// WAL between the checkpoint and the source's end as last heard.
    pub lag_bytes: u64,
    pub duration_ms: u64,
    /// More was waiting: the next cycle should follow at once.
    pub is_behind: bool,
    /// Tables that went live, and tables that were paused with the reason.
    pub went_live: Vec<u32>,
    #[serde(skip)]
    pub paused: Vec<TableFailure>,
    /// The consumer has nothing more and never will (a recorded stream).
    pub is_ended: bool,
    /// The stop signal came before anything was applied.
    pub is_stopped: bool,
}

/// Anything that ends a session.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Plan(#[from] tables::TablePlanError),
    #[error("{0}")]
    Setup(String),
    #[error("{what} ended without a result")]
    TaskLost { what: &'static str },
}

impl EngineError {
    /// Whether a new session from the checkpoint may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Source(error) => error.is_transient(),
            Self::TaskLost { .. } => true,
            Self::Target(_) | Self::Plan(_) | Self::Setup(_) => false,
        }
    }
}

macro_rules! from_source {
    ($($error:ty),*) => {$(
        impl From<$error> for EngineError {
            fn from(error: $error) -> Self {
                Self::Source(error.into())
            }
        }
    )*};
}
from_source!(
    crate::source::connect::ConnectError,
    crate::source::wire::WireError,
    crate::source::slot::SlotError,
    crate::source::catalog::CatalogError,
    tokio_postgres::Error
);

/// The target, used by one caller at a time and never from an async thread.
pub struct Writer<T>(Arc<Mutex<T>>);

impl<T> Clone for Writer<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: OlapEngine + 'static> Writer<T> {
    pub fn new(target: T) -> Self {
        Self(Arc::new(Mutex::new(target)))
    }

    /// Runs `work` on a thread that may block. A call that has begun is always finished, even when nobody waits.
    pub async fn call<R: Send + 'static, E: Send + 'static>(
        &self,
        work: impl FnOnce(&mut T) -> Result<R, E> + Send + 'static,
    ) -> Result<R, EngineError>
    where
        EngineError: From<E>,
    {
        let target = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || {
            // A panic inside a call leaves no open transaction: DuckDB rolls back what was not committed.
            work(&mut target.lock().unwrap_or_else(PoisonError::into_inner))
        });
        done.await.map_err(|_| EngineError::TaskLost { what: "a call to DuckDB" })?.map_err(EngineError::from)
    }
}

/// Read for cycles, write for whatever changes the shape of tables or rewrites the file.
pub type DdlLock = Arc<RwLock<()>>;

/// How far an idle checkpoint may lie behind what the source has proven to hold nothing for us (trap 26).
const IDLE_BYTES: u64 = 16 << 20;
const IDLE_TIME: Duration = Duration::from_secs(10);

/// Applies what a consumer yields. One cycle is one target transaction.
pub struct SyncEngine<C, T> {
    pub consumer: C,
    target: Writer<T>,
    ddl_lock: DdlLock,
    checkpoint: Checkpoint,
    /// Copied tables that wait for the checkpoint to reach their `copy_lsn`.
    catching_up: BTreeMap<u32, Lsn>,
    /// Tables that DuckDB refused to go on with; their changes are dropped until they are copied again.
    paused: BTreeSet<u32>,
    limits: BatchLimits,
    last_saved: Instant,
}

/// How a cycle is to be run.
#[derive(Debug, Clone, Copy, Default)]
pub struct CycleOptions {
    /// How long to wait for something to arrive.
    pub linger: Duration,
    /// Ask the source how far it is, again and again.
    pub hurry: bool,
    /// Save the reached position even when nothing changed and no time has passed.
    pub save_idle: bool,
}

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    pub fn new(
        consumer: C,
        target: Writer<T>,
        ddl_lock: DdlLock,
        checkpoint: Checkpoint,
        catching_up: BTreeMap<u32, Lsn>,
        options: &Options,
    ) -> Self {
        let limits = BatchLimits {
            max_rows: options.max_batch_rows,
            // Decoding needs about as much again as what is buffered.
            max_bytes: options.memory_limit_bytes / 2,
            linger: Duration::ZERO,
            stop_at: None,
            hurry: false,
        };
        let (paused, last_saved) = (BTreeSet::new(), Instant::now());
        Self { consumer, target, ddl_lock, checkpoint, catching_up, paused, limits, last_saved }
    }

    pub fn checkpoint(&self) -> Checkpoint {
        self.checkpoint
    }

    /// One cycle: take a batch, apply it with its checkpoint, acknowledge.
    ///
    /// # Errors
    /// The stream broke or the target refused. Nothing was applied in part; start again from the checkpoint.
    pub async fn sync_once(
        &mut self,
        cycle: CycleOptions,
        stop: &CancellationToken,
    ) -> Result<CycleReport, EngineError> {
        let started = Instant::now();
        let stop_at = self.catching_up.values().copied().filter(|&lsn| lsn > self.checkpoint.lsn).min();
        let limits = BatchLimits { linger: cycle.linger, hurry: cycle.hurry, stop_at, ..self.limits.clone() };
        let batch = tokio::select! {
            biased;
            // What was read and not applied comes again: the checkpoint has not moved.
            () = stop.cancelled() => {
                return Ok(CycleReport { is_stopped: true, checkpoint: self.checkpoint.lsn, ..CycleReport::default() });
            }
            batch = self.consumer.next_batch(&limits) => batch?,
        };
        let Some(mut batch) = batch else {
            return Ok(CycleReport { is_ended: true, checkpoint: self.checkpoint.lsn, ..CycleReport::default() });
        };
        batch.tables.retain(|changes| !self.paused.contains(&changes.table.oid));
        let position = self.consumer.position();
        let mut report = CycleReport {
            checkpoint: self.checkpoint.lsn,
            source_transactions: batch.source_transactions,
            lag_bytes: position.head.bytes_since(batch.end_lsn),
            ..CycleReport::default()
        };
        if !self.is_worth_a_commit(&batch, cycle, position.reply_requested) {
            return Ok(report);
        }
        let is_full = batch
            .tables
            .iter()
            .map(|changes| changes.counts)
            .fold(0, |rows, counts: RowCounts| rows + counts.inserted + counts.updated + counts.deleted)
            >= self.limits.max_rows;
        let before = self.checkpoint.lsn;
        let (applied, batch) = self.apply(batch).await?;
        self.consumer.acknowledge(applied.durable);
        for oid in &applied.went_live {
            self.catching_up.remove(oid);
        }
        let mut counts = RowCounts::default();
        batch.tables.iter().for_each(|changes| counts += changes.counts);
        report.inserted = counts.inserted;
        report.updated = counts.updated;
        report.deleted = counts.deleted;
        report.truncated = counts.truncates;
        report.target_deleted_rows = applied.deleted_rows;
        report.target_inserted_rows = applied.inserted_rows;
        report.pruned = applied.pruned;
        report.checkpoint = self.checkpoint.lsn;
        report.wal_released_bytes = self.checkpoint.lsn.bytes_since(before);
        report.went_live = applied.went_live;
        report.paused = batch.failed.clone();
        // A batch that was cut for a swap, or was full, has more behind it.
        report.is_behind = is_full || stop_at.is_some_and(|stop_at| self.checkpoint.lsn >= stop_at);
        report.duration_ms = started.elapsed().as_millis() as u64;
        Ok(report)
    }

    /// An idle position is saved now and then, not at every look (traps 10, 25, 26).
    fn is_worth_a_commit(&self, batch: &ChangeBatch, cycle: CycleOptions, reply_requested: bool) -> bool {
        let ahead = batch.end_lsn.bytes_since(self.checkpoint.lsn);
        let is_swap_due = self.catching_up.values().any(|&lsn| lsn <= batch.end_lsn);
        !batch.is_idle()
            || is_swap_due
            || ahead > 0
                && (cycle.save_idle || reply_requested || ahead >= IDLE_BYTES || self.last_saved.elapsed() >= IDLE_TIME)
    }

    /// Applies a batch. A table that DuckDB cannot go on with is paused in the same transaction, and the others go on.
    async fn apply(&mut self, batch: ChangeBatch) -> Result<(Applied, ChangeBatch), EngineError> {
        let checkpoint = Checkpoint {
            lsn: batch.end_lsn.max(self.checkpoint.lsn),
            commit_time_us: batch.commit_time_us.or(self.checkpoint.commit_time_us),
        };
        let mut batch = Arc::new(batch);
        let swaps = self.catching_up.values().any(|&lsn| lsn <= checkpoint.lsn);
        loop {
            let applied = {
                let (_cycle, _shape);
                if swaps {
                    _shape = self.ddl_lock.write().await;
                } else {
                    _cycle = self.ddl_lock.read().await;
                }
                let work = Arc::clone(&batch);
                self.target.call(move |target| target.apply(&work, &checkpoint)).await
            };
            match applied {
                Ok(applied) => {
                    self.checkpoint = checkpoint;
                    self.last_saved = Instant::now();
                    let batch = Arc::try_unwrap(batch).unwrap_or_else(|shared| (*shared).clone());
                    return Ok((applied, batch));
                }
                Err(EngineError::Target(error)) => {
                    let failed = error.table().filter(|oid| !self.paused.contains(oid)).and_then(|oid| {
                        batch.tables.iter().find(|changes| changes.table.oid == oid).map(|changes| &changes.table)
                    });
                    let Some(table) = failed else { return Err(error.into()) };
                    let reason = format!(
                        "{}; copy it again with `rhei backfill --table {} --force`",
                        with_causes(&error),
                        table.source
                    );
                    tracing::error!(table = %table.source, reason, "table paused");
                    let failure = TableFailure { oid: table.oid, table: table.source.clone(), reason };
                    self.paused.insert(failure.oid);
                    let mut rest = (*batch).clone();
                    rest.tables.retain(|changes| changes.table.oid != failure.oid);
                    rest.failed.push(failure);
                    batch = Arc::new(rest);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives the consumer back, for its shutdown.
    pub fn into_consumer(self) -> C {
        self.consumer
    }
}

/// An error and its causes on one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let next = inner.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = inner.source();
    }
    text
}
