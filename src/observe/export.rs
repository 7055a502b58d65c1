//! `/metrics`: what was seen last, in Prometheus's text format.
//!
//! Counters and gauges are written afresh for each answer, so that a table that is gone leaves no
//! series behind. Histograms gather their values in a recorder of their own, for as long as the
//! process lives.

use metrics::{Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use super::{
    log_watch,
    metrics::{
        BATCH_ROWS, BUCKETS, COMMIT_SECONDS, COMMIT_TO_VISIBLE, CYCLE_SECONDS, Kind, METRICS,
        STATEMENT_SECONDS,
    },
    status,
    watch::{FileSeen, Watched},
};
use crate::{
    olap::TableState,
    pipeline::{
        Context,
        meter::{Distributions, MAX_TABLES, TableMeter},
    },
};

/// The label of the tables that are counted together.
pub const OTHERS: &str = "(others)";

/// Microseconds from 1970 to 2000, where PostgreSQL's times begin.
const TO_2000_US: u64 = 946_684_800_000_000;

static METADATA: Metadata<'static> = Metadata::new("rhei", Level::INFO, None);

/// The histograms of a pipeline.
#[derive(Debug, Clone)]
pub struct Histograms(PrometheusHandle);

impl Histograms {
    /// Begins to gather the values of a pipeline.
    ///
    /// # Errors
    /// A histogram has no buckets.
    pub fn start(context: &Context) -> Result<Self, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, bounds) in BUCKETS {
            let matcher = Matcher::Full(name.to_owned());
            builder = builder.set_buckets_for_metric(matcher, bounds)?;
        }

        let recorder = builder.build_recorder();
        describe(&recorder, |kind| kind == Kind::Histogram);
        let histogram =
            |name: &'static str| recorder.register_histogram(&Key::from_name(name), &METADATA);

        context.latency.distribute(histogram(COMMIT_TO_VISIBLE), histogram(COMMIT_SECONDS));
        context.meter.distribute(Distributions {
            batch_rows: histogram(BATCH_ROWS),
            cycle_seconds: histogram(CYCLE_SECONDS),
            statement_seconds: histogram(STATEMENT_SECONDS),
        });
        Ok(Self(recorder.handle()))
    }

    /// Sorts the values that came since the last call into their buckets. Without it they would
    /// wait in memory for the next answer.
    pub fn tidy(&self) {
        self.0.run_upkeep();
    }
}

fn describe(recorder: &PrometheusRecorder, is_wanted: impl Fn(Kind) -> bool) {
    for metric in METRICS.iter().filter(|metric| is_wanted(metric.kind)) {
        let (name, unit, help) = (metric.name.into(), None::<Unit>, metric.help.into());
        match metric.kind {
            Kind::Counter => recorder.describe_counter(name, unit, help),
            Kind::Gauge => recorder.describe_gauge(name, unit, help),
            Kind::Histogram => recorder.describe_histogram(name, unit, help),
        }
    }
}

/// Returns the text of `/metrics`.
pub fn render(watched: &Watched, histograms: &Histograms) -> String {
    let answer = Answer { recorder: PrometheusBuilder::new().build_recorder() };
    describe(&answer.recorder, |kind| kind != Kind::Histogram);

    answer.engine(watched);
    answer.lag(watched);
    answer.slot(watched);
    answer.stream(watched);
    answer.tables(watched);
    answer.copies(watched);
    answer.memory(watched);
    if let Some(file) = watched.file() {
        answer.file(watched, &file);
    }
    answer.readers(watched);
    answer.process(watched);

    answer.recorder.handle().render() + &histograms.0.render()
}

/// An answer that is being written.
struct Answer {
    recorder: PrometheusRecorder,
}

type Labels<'a> = &'a [(&'static str, &'a str)];

impl Answer {
    fn key(&self, name: &'static str, labels: Labels<'_>, kind: Kind) -> Key {
        debug_assert!(
            METRICS.iter().any(|metric| metric.name == name && metric.kind == kind),
            "{name} is not listed as a {kind:?}"
        );
        let labels = labels.iter().map(|(name, value)| Label::new(*name, (*value).to_owned()));
        Key::from_parts(name, labels.collect::<Vec<_>>())
    }

    fn counter(&self, name: &'static str, labels: Labels<'_>, value: u64) {
        let key = self.key(name, labels, Kind::Counter);
        self.recorder.register_counter(&key, &METADATA).absolute(value);
    }

    fn gauge(&self, name: &'static str, labels: Labels<'_>, value: f64) {
        let key = self.key(name, labels, Kind::Gauge);
        self.recorder.register_gauge(&key, &METADATA).set(value);
    }

    /// Writes a gauge whose value may be unknown.
    fn known(&self, name: &'static str, value: Option<f64>) {
        if let Some(value) = value {
            self.gauge(name, &[], value);
        }
    }

    /// Writes 1 for one of several values of a label, and 0 for the others.
    fn one_of(&self, name: &'static str, label: &'static str, all: &[&str], now: Option<&str>) {
        for value in all {
            let is_now = now == Some(*value);
            self.gauge(name, &[(label, value)], f64::from(u8::from(is_now)));
        }
    }

    fn engine(&self, watched: &Watched) {
        let meter = &watched.context.meter;
        let (state, _) = meter.engine();
        let states = ["attaching", "streaming", "waiting", "ended"];
        self.gauge("rhei_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        self.one_of("rhei_engine_state", "state", &states, Some(state.as_str()));
        self.gauge("rhei_ready", &[], bit(status::unready(watched).is_none()));

        let source = watched.source();
        self.gauge("rhei_source_up", &[], bit(source.at.is_some() && source.error.is_none()));
        self.known("rhei_source_last_seen_timestamp_seconds", source.at_unix);

        let totals = meter.totals();
        self.counter("rhei_sessions_total", &[], totals.sessions);
        self.counter("rhei_session_failures_total", &[], totals.session_failures);
        self.counter("rhei_duckdb_restarts_total", &[], totals.duckdb_restarts);
        for ((event, level), count) in log_watch::counts() {
            let labels = [("event", event.as_str()), ("level", level)];
            self.counter("rhei_log_events_total", &labels, count);
        }
    }

    fn lag(&self, watched: &Watched) {
        if let Some(head) = watched.heads().last() {
            self.gauge("rhei_wal_position_bytes", &[("rung", "head")], head.0 as f64);
        }
        for rung in status::ladder(watched) {
            let label = [("rung", rung.name)];
            self.gauge("rhei_wal_position_bytes", &label, rung.lsn.0 as f64);
            if let (Some(bytes), Some(lag)) = (rung.lag_bytes, rung.lag) {
                self.gauge("rhei_lag_bytes", &label, bytes as f64);
                self.gauge("rhei_lag_seconds", &label, lag.as_secs_f64());
            }
        }

        let committed = watched.context.meter.committed_at_us();
        let committed = committed.map(|at| (at + TO_2000_US) as f64 / 1e6);
        self.known("rhei_last_commit_timestamp_seconds", committed);
    }

    fn slot(&self, watched: &Watched) {
        let Some(slot) = watched.source().slot else { return };
        let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
        let statuses = ["reserved", "extended", "unreserved", "lost"];

        self.gauge("rhei_slot_active", &[], bit(slot.active));
        self.known("rhei_slot_held_bytes", bytes(slot.held_bytes));
        self.known("rhei_slot_limit_bytes", bytes(slot.limit_bytes));
        self.known("rhei_slot_left_bytes", bytes(slot.left_bytes));
        self.known("rhei_slot_left_seconds", status::slot_left_seconds(watched));
        self.one_of("rhei_slot_wal_status", "status", &statuses, slot.wal_status.as_deref());
    }

    fn stream(&self, watched: &Watched) {
        let meter = &watched.context.meter;
        let totals = meter.totals();
        self.counter("rhei_received_bytes_total", &[], meter.stream().received_bytes());
        self.counter("rhei_source_transactions_total", &[], totals.source_transactions);
        self.counter("rhei_cycles_total", &[], totals.cycles);
        self.counter("rhei_commits_total", &[], totals.commits);
        self.counter("rhei_target_rows_total", &[("kind", "insert")], totals.target_inserted);
        self.counter("rhei_target_rows_total", &[("kind", "delete")], totals.target_deleted);
    }

    fn tables(&self, watched: &Watched) {
        let (single, others) = watched.context.meter.tables();
        for (table, meter) in &single {
            self.table(&table.to_string(), meter);
        }
        if others != TableMeter::default() {
            self.table(OTHERS, &others);
        }
    }

    fn table(&self, table: &str, meter: &TableMeter) {
        let counts = &meter.changes;
        for (kind, rows) in [
            ("insert", counts.inserted),
            ("update", counts.updated),
            ("delete", counts.deleted),
            ("copy", meter.copied_rows),
        ] {
            let labels = [("table", table), ("kind", kind)];
            self.counter("rhei_table_rows_total", &labels, rows);
        }
        for (kind, bytes) in [
            ("insert", meter.inserted_bytes),
            ("delete", meter.deleted_bytes),
            ("copy", meter.copied_bytes),
        ] {
            let labels = [("table", table), ("kind", kind)];
            self.counter("rhei_table_bytes_total", &labels, bytes);
        }
        self.counter("rhei_table_truncates_total", &[("table", table)], counts.truncates);
    }

    fn copies(&self, watched: &Watched) {
        let progress = &watched.context.copy_progress;
        let (copies, total) = progress.progress().unwrap_or_default();
        self.gauge("rhei_copies", &[], copies.len() as f64);
        self.gauge("rhei_copies_paused", &[], bit(progress.is_paused()));
        self.gauge("rhei_copy_rows", &[], total.rows as f64);
        self.gauge("rhei_copy_estimated_rows", &[], total.estimated_rows as f64);
        self.gauge("rhei_copy_chunks", &[], total.chunks as f64);
        self.gauge("rhei_copy_done_chunks", &[], total.chunks_done as f64);
        self.known("rhei_copy_left_seconds", total.seconds_left);
    }

    fn memory(&self, watched: &Watched) {
        let stream = watched.context.meter.stream();
        let limit = watched.context.options.memory_limit_bytes;
        let buffer = |name| [("buffer", name)];
        self.gauge("rhei_buffer_bytes", &buffer("queue"), stream.queue_bytes() as f64);
        self.gauge("rhei_buffer_bytes", &buffer("batch"), stream.batch_bytes() as f64);
        self.gauge("rhei_buffer_limit_bytes", &[], limit as f64);
        self.gauge("rhei_spilled_bytes", &[("by", "rhei")], stream.spooled_bytes() as f64);
    }

    fn file(&self, watched: &Watched, file: &FileSeen) {
        let (space, memory) = (&file.space, &file.memory);
        self.gauge("rhei_file_bytes", &[], space.file_bytes as f64);
        self.gauge("rhei_file_free_bytes", &[], space.free_bytes as f64);
        self.gauge("rhei_file_log_bytes", &[], space.log_bytes as f64);
        self.gauge("rhei_file_stored_rows", &[], space.stored_rows as f64);
        self.known("rhei_file_dead_rows", watched.dead_rows().map(|rows| rows as f64));
        if let Some(lake) = &space.lake {
            let kinds =
                [("data", lake.files), ("deletes", lake.delete_files), ("old", lake.old_files)];
            for (kind, count) in kinds {
                self.gauge("rhei_lake_files", &[("kind", kind)], count as f64);
            }
            self.gauge("rhei_lake_snapshots", &[], lake.snapshots as f64);
            self.known("rhei_lake_catalog_bytes", lake.catalog_bytes.map(|bytes| bytes as f64));
        }
        self.gauge("rhei_file_last_seen_timestamp_seconds", &[], file.at_unix);
        self.gauge("rhei_duckdb_memory_bytes", &[], memory.used_bytes as f64);
        self.gauge("rhei_spilled_bytes", &[("by", "duckdb")], memory.spilled_bytes as f64);

        let tables = || file.state.iter().flat_map(|state| &state.tables);
        for state in ["pending", "copying", "catching_up", "live", "resync", "error", "dropped"] {
            let count = tables().filter(|table| table.state.as_str() == state).count();
            self.gauge("rhei_tables", &[("state", state)], count as f64);
        }
        let paused = tables().filter(|table| matches!(table.state, TableState::Error(_)));
        for table in paused.take(MAX_TABLES) {
            self.gauge("rhei_table_paused", &[("table", &table.source.to_string())], 1.0);
        }

        for status in ["pending", "running", "done", "failed", "cancelled"] {
            let count = file.jobs.get(status).copied().unwrap_or_default();
            self.gauge("rhei_jobs", &[("status", status)], count as f64);
        }
        for verdict in ["equal", "different", "not_verified"] {
            let count = file.verified.iter().filter(|result| result.verdict == verdict).count();
            self.gauge("rhei_verified_tables", &[("verdict", verdict)], count as f64);
        }
        let last = file.verified.iter().filter_map(|result| result.finished_at_us).max();
        let last = last.map(|at| at as f64 / 1e6);
        self.known("rhei_last_verification_timestamp_seconds", last);
    }

    fn readers(&self, watched: &Watched) {
        let readers = watched.context.meter.readers();
        let (ok, failed) = readers.statements();
        self.gauge("rhei_reader_sessions", &[], readers.now() as f64);
        self.counter("rhei_reader_sessions_total", &[], readers.opened());
        self.counter("rhei_reader_statements_total", &[("outcome", "ok")], ok);
        self.counter("rhei_reader_statements_total", &[("outcome", "failed")], failed);
    }

    fn process(&self, watched: &Watched) {
        let process = &watched.process;
        self.gauge("process_start_time_seconds", &[], process.started_at);
        let resident = process.resident_bytes().map(|bytes| bytes as f64);
        self.known("process_resident_memory_bytes", resident);
        self.known("process_open_fds", process.open_files().map(|files| files as f64));
        if let Some(seconds) = process.cpu_seconds() {
            self.counter("process_cpu_seconds_total", &[], seconds);
        }
    }
}

fn bit(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}
