//! What a pipeline has done and does, in plain numbers, for those who watch it.
//!
//! Every number is counted once for each batch, cycle or statement, never for each row, and is read
//! without waiting for the engine. Distributions are kept elsewhere: whoever watches the pipeline
//! hands in what takes their values ([`Meter::distribute`]), and nothing is recorded before.

#![deny(missing_docs)]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::Histogram;

use super::CycleReport;
use crate::{
    Lsn,
    change::{Deletes, RowCounts, TableChanges},
    pgoutput::QualifiedName,
    source::StreamFigures,
};

/// The tables that are counted one by one: those that change or are copied first. All further
/// tables are counted together, so that a source of many tables does not make as many series.
pub const MAX_TABLES: usize = 500;

/// The numbers of a pipeline. A clone shares them.
#[derive(Debug, Clone, Default)]
pub struct Meter(Arc<Values>);

#[derive(Debug, Default)]
struct Values {
    stream: StreamFigures,
    readers: Readers,
    tables: Mutex<Tables>,
    engine: Mutex<Engine>,
    distributions: OnceLock<Distributions>,
    applied: AtomicU64,
    /// Microseconds since 2000; 0 until it is known.
    committed_at_us: AtomicU64,
    cycles: AtomicU64,
    commits: AtomicU64,
    source_transactions: AtomicU64,
    target_inserted: AtomicU64,
    target_deleted: AtomicU64,
    sessions: AtomicU64,
    session_failures: AtomicU64,
    duckdb_restarts: AtomicU64,
}

#[derive(Debug, Default)]
struct Tables {
    single: BTreeMap<QualifiedName, TableMeter>,
    others: TableMeter,
}

/// What came for one table, or for several, since the process began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableMeter {
    /// The changes of the source before they were reduced to their net effect.
    pub changes: RowCounts,
    /// The rows that copies have read.
    pub copied_rows: u64,
    /// The bytes that the target took of inserted and updated rows, as Arrow holds them.
    pub inserted_bytes: u64,
    /// The bytes of the keys or rows by which the target deleted rows, as Arrow holds them.
    pub deleted_bytes: u64,
    /// The bytes of copies as they came over the wire.
    pub copied_bytes: u64,
}

impl TableMeter {
    fn add(&mut self, more: &Self) {
        self.changes += more.changes;
        self.copied_rows += more.copied_rows;
        self.inserted_bytes += more.inserted_bytes;
        self.deleted_bytes += more.deleted_bytes;
        self.copied_bytes += more.copied_bytes;
    }

    /// Returns what a batch brings for a table.
    pub fn of(changes: &TableChanges) -> Self {
        let (Deletes::ByKey(deletes) | Deletes::Rows(deletes)) = &changes.deletes;
        let patch = changes.patch.iter().map(|patch| &patch.rows);
        let bytes = |batch: &arrow::record_batch::RecordBatch| batch.get_array_memory_size() as u64;

        Self {
            changes: changes.counts,
            inserted_bytes: changes.inserts.iter().chain(patch).map(bytes).sum(),
            deleted_bytes: deletes.iter().map(bytes).sum(),
            ..Self::default()
        }
    }
}

/// What the engine does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum EngineState {
    /// No session has begun to stream yet, or another one is about to.
    #[default]
    Attaching,
    /// A session follows the stream.
    Streaming,
    /// A session has ended with this error; another one begins after a pause.
    Waiting(String),
    /// The engine has ended: nothing follows the source.
    Ended,
}

impl EngineState {
    /// Returns the word for the state.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Streaming => "streaming",
            Self::Waiting(_) => "waiting",
            Self::Ended => "ended",
        }
    }
}

#[derive(Debug)]
struct Engine {
    state: EngineState,
    since: Instant,
}

impl Default for Engine {
    fn default() -> Self {
        Self { state: EngineState::default(), since: Instant::now() }
    }
}

/// What takes the values of distributions, each in the unit of its name.
#[derive(Debug)]
pub struct Distributions {
    /// Source row changes of each batch that was committed.
    pub batch_rows: Histogram,
    /// Seconds of each cycle that committed something.
    pub cycle_seconds: Histogram,
    /// Seconds of each statement of a reader.
    pub statement_seconds: Histogram,
}

/// A copy of the counters that have no labels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Cycles, including those that had nothing to commit.
    pub cycles: u64,
    /// Target transactions that brought changes or a newer checkpoint.
    pub commits: u64,
    /// Source transactions that were applied, including those that changed no followed table.
    pub source_transactions: u64,
    /// Rows that entered target tables from the stream.
    pub target_inserted: u64,
    /// Rows that left target tables.
    pub target_deleted: u64,
    /// Sessions that began to stream.
    pub sessions: u64,
    /// Sessions that ended with an error.
    pub session_failures: u64,
    /// How often DuckDB was started again after a bug of its own.
    pub duckdb_restarts: u64,
}

impl Meter {
    /// Returns what the stream tells of itself.
    pub fn stream(&self) -> &StreamFigures {
        &self.0.stream
    }

    /// Returns the numbers of the readers.
    pub fn readers(&self) -> &Readers {
        &self.0.readers
    }

    /// Has the values of distributions recorded from now on. Only the first call does.
    pub fn distribute(&self, distributions: Distributions) {
        let _ = self.0.distributions.set(distributions);
    }

    /// Counts a cycle. `applied` is the position up to which every change is in the copy.
    pub fn cycle(&self, report: &CycleReport, applied: Lsn, commit_time_us: Option<i64>) {
        let values = &self.0;
        let add = |place: &AtomicU64, count: u64| place.fetch_add(count, Ordering::Relaxed);

        add(&values.cycles, 1);
        values.applied.fetch_max(applied.0, Ordering::Relaxed);
        if let Some(at) = commit_time_us.and_then(|at| u64::try_from(at).ok()) {
            values.committed_at_us.store(at, Ordering::Relaxed);
        }

        if report.duration_ms == 0 && report.wal_released_bytes == 0 {
            return;
        }
        add(&values.commits, 1);
        add(&values.source_transactions, report.source_transactions);
        add(&values.target_inserted, report.target_inserted_rows);
        add(&values.target_deleted, report.target_deleted_rows);

        let rows = report.inserted + report.updated + report.deleted;
        if let Some(distributions) = values.distributions.get().filter(|_| rows > 0) {
            distributions.batch_rows.record(rows as f64);
            distributions.cycle_seconds.record(report.duration_ms as f64 / 1000.0);
        }
    }

    /// Returns the position up to which every change is in the copy; zero before the first cycle.
    pub fn applied(&self) -> Lsn {
        Lsn(self.0.applied.load(Ordering::Relaxed))
    }

    /// Returns when the last applied source transaction committed, in microseconds since 2000 by
    /// the clock of the source.
    pub fn committed_at_us(&self) -> Option<u64> {
        Some(self.0.committed_at_us.load(Ordering::Relaxed)).filter(|at| *at > 0)
    }

    /// Counts what was committed for a table.
    pub fn changed(&self, table: &QualifiedName, meter: &TableMeter) {
        self.add(table, meter);
    }

    /// Counts rows that a copy has read.
    pub fn copied(&self, table: &QualifiedName, rows: u64, bytes: u64) {
        let copied = TableMeter { copied_rows: rows, copied_bytes: bytes, ..TableMeter::default() };
        self.add(table, &copied);
    }

    fn add(&self, table: &QualifiedName, meter: &TableMeter) {
        let mut tables = self.0.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tables.single.get_mut(table) {
            known.add(meter);
        } else if tables.single.len() < MAX_TABLES {
            tables.single.insert(table.clone(), *meter);
        } else {
            tables.others.add(meter);
        }
    }

    /// Returns what came for each table that is counted by itself, and for all others together.
    pub fn tables(&self) -> (BTreeMap<QualifiedName, TableMeter>, TableMeter) {
        let tables = self.0.tables.lock().unwrap_or_else(PoisonError::into_inner);
        (tables.single.clone(), tables.others)
    }

    /// Records what the engine does from now on.
    pub fn set_engine(&self, state: EngineState) {
        match &state {
            EngineState::Streaming => self.0.sessions.fetch_add(1, Ordering::Relaxed),
            EngineState::Waiting(_) => self.0.session_failures.fetch_add(1, Ordering::Relaxed),
            EngineState::Attaching | EngineState::Ended => 0,
        };
        *self.0.engine.lock().unwrap_or_else(PoisonError::into_inner) =
            Engine { state, since: Instant::now() };
    }

    /// Returns what the engine does, and for how long.
    pub fn engine(&self) -> (EngineState, Duration) {
        let engine = self.0.engine.lock().unwrap_or_else(PoisonError::into_inner);
        (engine.state.clone(), engine.since.elapsed())
    }

    /// Counts a new start of DuckDB.
    pub fn duckdb_restarted(&self) {
        self.0.duckdb_restarts.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a statement of a reader.
    pub fn statement(&self, took: Duration, is_ok: bool) {
        let readers = &self.0.readers;
        let place = if is_ok { &readers.statements } else { &readers.failed_statements };
        place.fetch_add(1, Ordering::Relaxed);
        if let Some(distributions) = self.0.distributions.get() {
            distributions.statement_seconds.record(took.as_secs_f64());
        }
    }

    /// Returns the counters that have no labels.
    pub fn totals(&self) -> Totals {
        let values = &self.0;
        let get = |place: &AtomicU64| place.load(Ordering::Relaxed);
        Totals {
            cycles: get(&values.cycles),
            commits: get(&values.commits),
            source_transactions: get(&values.source_transactions),
            target_inserted: get(&values.target_inserted),
            target_deleted: get(&values.target_deleted),
            sessions: get(&values.sessions),
            session_failures: get(&values.session_failures),
            duckdb_restarts: get(&values.duckdb_restarts),
        }
    }
}

/// The numbers of the readers that the endpoint serves.
#[derive(Debug, Default)]
pub struct Readers {
    opened: AtomicU64,
    closed: AtomicU64,
    statements: AtomicU64,
    failed_statements: AtomicU64,
}

impl Readers {
    /// Counts a session that was opened.
    pub fn open(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a session that has ended.
    pub fn close(&self) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the sessions that were opened since the process began.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Returns the sessions that are open.
    pub fn now(&self) -> u64 {
        let closed = self.closed.load(Ordering::Relaxed);
        self.opened().saturating_sub(closed)
    }

    /// Returns the statements that ended well, and those that failed or were cancelled.
    pub fn statements(&self) -> (u64, u64) {
        let failed = self.failed_statements.load(Ordering::Relaxed);
        (self.statements.load(Ordering::Relaxed), failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inserted(rows: u64) -> TableMeter {
        let changes = RowCounts { inserted: rows, ..RowCounts::default() };
        TableMeter { changes, ..TableMeter::default() }
    }

    #[test]
    fn tables_beyond_the_limit_are_counted_together() {
        let meter = Meter::default();
        let table = |number: usize| QualifiedName::new("public", format!("t{number}"));
        for round in 0..2 {
            for number in 0..MAX_TABLES + 7 {
                meter.changed(&table(number), &inserted(1 + round));
            }
        }

        let (single, others) = meter.tables();
        assert_eq!(single.len(), MAX_TABLES);
        assert!(single.values().all(|table| table.changes.inserted == 3), "{single:?}");
        assert_eq!(others.changes.inserted, 7 * 3);
    }

    #[test]
    fn a_cycle_that_commits_nothing_is_a_cycle_and_no_commit() {
        let meter = Meter::default();
        meter.cycle(&CycleReport::default(), Lsn(7), None);
        assert_eq!(meter.totals(), Totals { cycles: 1, ..Totals::default() });

        let report = CycleReport {
            inserted: 3,
            source_transactions: 2,
            wal_released_bytes: 9,
            ..CycleReport::default()
        };
        meter.cycle(&report, Lsn(16), Some(5));
        let expected =
            Totals { cycles: 2, commits: 1, source_transactions: 2, ..Totals::default() };
        assert_eq!(meter.totals(), expected);
        assert_eq!((meter.applied(), meter.committed_at_us()), (Lsn(16), Some(5)));
    }

    #[test]
    fn each_session_and_each_failure_is_counted() {
        let meter = Meter::default();
        for state in [
            EngineState::Streaming,
            EngineState::Waiting("the stream broke".to_owned()),
            EngineState::Attaching,
            EngineState::Streaming,
        ] {
            meter.set_engine(state);
        }
        let expected = Totals { sessions: 2, session_failures: 1, ..Totals::default() };
        assert_eq!((meter.totals(), meter.engine().0), (expected, EngineState::Streaming));
    }
}
