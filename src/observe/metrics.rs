//! Every metric that `/metrics` shows, in one list: names, types, labels and what they mean.
//! docs/observing.md holds the list as a table, and a test keeps the two equal.

/// The type of a metric, as Prometheus has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric. Its name ends in its unit, as the convention of Prometheus has it.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// The labels, with their values where those are few.
    pub labels: &'static str,
    pub help: &'static str,
}

const fn counter(name: &'static str, labels: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, labels, help }
}

const fn gauge(name: &'static str, labels: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, labels, help }
}

const fn histogram(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram, labels: "", help }
}

/// The histograms, with the upper ends of their buckets.
pub const COMMIT_TO_VISIBLE: &str = "rhei_commit_to_visible_seconds";
pub const COMMIT_SECONDS: &str = "rhei_target_commit_seconds";
pub const CYCLE_SECONDS: &str = "rhei_cycle_seconds";
pub const BATCH_ROWS: &str = "rhei_batch_rows";
pub const STATEMENT_SECONDS: &str = "rhei_reader_statement_seconds";

const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
const ROWS: [f64; 11] =
    [1.0, 10.0, 100.0, 1000.0, 5000.0, 10_000.0, 50_000.0, 100_000.0, 500_000.0, 1e6, 1e7];
pub const BUCKETS: [(&str, &[f64]); 5] = [
    (COMMIT_TO_VISIBLE, &SECONDS),
    (COMMIT_SECONDS, &SECONDS),
    (CYCLE_SECONDS, &SECONDS),
    (BATCH_ROWS, &ROWS),
    (STATEMENT_SECONDS, &SECONDS),
];

/// All metrics, in the order of the documentation.
pub const METRICS: &[Metric] = &[
    gauge("rhei_build_info", "version", "Always 1; the label is the version of rhei."),
    gauge(
        "rhei_engine_state",
        "state: attaching, streaming, waiting, ended",
        "1 for the state that the engine is in, 0 for the others.",
    ),
    gauge("rhei_ready", "", "1 when /readyz answers 200, else 0."),
    gauge("rhei_source_up", "", "1 when the last look at the source succeeded, else 0."),
    gauge(
        "rhei_source_last_seen_timestamp_seconds",
        "",
        "When the source last answered, in seconds since 1970.",
    ),
    gauge(
        "rhei_wal_position_bytes",
        "rung: head, sent, received, decoded, applied, durable",
        "How far each rung of the lag ladder is, as a number of bytes of WAL: the source's end, \
         what it has sent, what has arrived, the last source transaction that is decoded, what is \
         in the copy, and what was acknowledged to the source as durable.",
    ),
    gauge(
        "rhei_lag_bytes",
        "rung: sent, received, decoded, applied, durable",
        "Bytes of WAL from the rung to the source's end.",
    ),
    gauge(
        "rhei_lag_seconds",
        "rung: sent, received, decoded, applied, durable",
        "Seconds since the source's end was where the rung is now; 0 when the rung has reached \
         the end. Measured by one clock, that of rhei.",
    ),
    gauge(
        "rhei_last_commit_timestamp_seconds",
        "",
        "When the last applied source transaction committed, in seconds since 1970 by the clock \
         of the source.",
    ),
    histogram(
        COMMIT_TO_VISIBLE,
        "Seconds from the commit of a source transaction until readers of the copy can see it.",
    ),
    gauge("rhei_slot_active", "", "1 when a connection uses the replication slot, else 0."),
    gauge("rhei_slot_held_bytes", "", "Bytes of WAL that the source keeps for the slot."),
    gauge(
        "rhei_slot_limit_bytes",
        "",
        "max_slot_wal_keep_size of the source; absent when there is no limit.",
    ),
    gauge(
        "rhei_slot_left_bytes",
        "",
        "Bytes of WAL that may still be written before the source may throw away what the slot \
         needs; absent when there is no limit.",
    ),
    gauge(
        "rhei_slot_left_seconds",
        "",
        "Seconds until that happens, if the source goes on writing WAL as in the last ten minutes \
         and the slot stays where it is; absent when there is no limit, or when no WAL is \
         written.",
    ),
    gauge(
        "rhei_slot_wal_status",
        "status: reserved, extended, unreserved, lost",
        "1 for the wal_status of the slot, 0 for the others.",
    ),
    counter("rhei_received_bytes_total", "", "Bytes of the stream that were received."),
    counter(
        "rhei_source_transactions_total",
        "",
        "Source transactions that were applied, including those that changed no followed table.",
    ),
    counter("rhei_cycles_total", "", "Cycles, including those that had nothing to commit."),
    counter(
        "rhei_commits_total",
        "",
        "Target transactions that brought changes or a newer checkpoint.",
    ),
    histogram(
        CYCLE_SECONDS,
        "Seconds of each cycle that brought rows, including the wait for its changes.",
    ),
    histogram(
        COMMIT_SECONDS,
        "Seconds for which the stream waited until the target had written and committed a batch.",
    ),
    histogram(BATCH_ROWS, "Row changes of the source in each batch that was committed."),
    counter(
        "rhei_table_rows_total",
        "table; kind: insert, update, delete, copy",
        "Rows of each table that the source inserted, updated or deleted and that were applied, \
         and rows that copies have read.",
    ),
    counter(
        "rhei_table_bytes_total",
        "table; kind: insert, delete, copy",
        "Bytes of rows that went into the target (new versions of updated rows too), of keys by \
         which rows were deleted, both as Arrow holds them, and of copies as they came over the \
         wire.",
    ),
    counter("rhei_table_truncates_total", "table", "TRUNCATEs of each table."),
    counter(
        "rhei_target_rows_total",
        "kind: insert, delete",
        "Rows that entered and left target tables with the stream; an updated row does both.",
    ),
    gauge(
        "rhei_tables",
        "state: pending, copying, catching_up, live, resync, error, dropped",
        "Tables in each state.",
    ),
    gauge(
        "rhei_table_paused",
        "table",
        "1 for each table that is paused (state error); absent for the others.",
    ),
    gauge("rhei_copies", "", "Copies that are under way."),
    gauge("rhei_copies_paused", "", "1 when copies are paused by `rhei pause`, else 0."),
    gauge("rhei_copy_rows", "", "Rows that the copies under way have read so far."),
    gauge(
        "rhei_copy_estimated_rows",
        "",
        "Rows of the tables that are copied, by the statistics of the source.",
    ),
    gauge("rhei_copy_chunks", "", "Chunks of the copies under way."),
    gauge("rhei_copy_done_chunks", "", "Chunks of them that are loaded."),
    gauge(
        "rhei_copy_left_seconds",
        "",
        "Seconds until the copies under way are done, at their speed so far; absent until they \
         have rows.",
    ),
    gauge(
        "rhei_jobs",
        "status: pending, running, done, failed, cancelled",
        "Jobs that the file keeps (those that ended, for 7 days), by status.",
    ),
    gauge(
        "rhei_verified_tables",
        "verdict: equal, different, not_verified",
        "Tables by the result of their last verification.",
    ),
    gauge(
        "rhei_last_verification_timestamp_seconds",
        "",
        "When a verification last ended, in seconds since 1970; absent when there was none.",
    ),
    gauge(
        "rhei_buffer_bytes",
        "buffer: queue, batch",
        "Bytes in rhei's own buffers: of the stream that wait to be decoded, and of the batch \
         that is decoded or applied.",
    ),
    gauge("rhei_buffer_limit_bytes", "", "[sync] memory_limit."),
    gauge("rhei_duckdb_memory_bytes", "", "Memory that DuckDB uses, by its own account."),
    gauge(
        "rhei_spilled_bytes",
        "by: rhei, duckdb",
        "Bytes on disk of source transactions that have not ended, and of what has no room in \
         DuckDB's memory.",
    ),
    gauge("rhei_file_bytes", "", "Size of the DuckDB file, or of the files of a lake."),
    gauge("rhei_file_free_bytes", "", "Bytes of the file that are free for new rows."),
    gauge("rhei_file_log_bytes", "", "Size of DuckDB's write-ahead log beside the file."),
    gauge(
        "rhei_file_stored_rows",
        "",
        "Rows in the file, including deleted rows whose row group is not rewritten yet.",
    ),
    gauge(
        "rhei_file_dead_rows",
        "",
        "Deleted rows among them, in tables with at least one full row group; counted every few \
         minutes.",
    ),
    gauge(
        "rhei_lake_files",
        "kind: data, deletes, old",
        "Files of a lake: with rows, with the positions of deleted rows, and those that no \
         snapshot needs and that wait to be deleted. Only for a lake.",
    ),
    gauge("rhei_lake_snapshots", "", "Snapshots that a lake keeps. Only for a lake."),
    gauge("rhei_lake_catalog_bytes", "", "Size of a lake's catalog, if it is PostgreSQL."),
    gauge(
        "rhei_file_last_seen_timestamp_seconds",
        "",
        "When the figures of the file, its tables and its jobs were last read, in seconds since \
         1970: they stand still while the writer is in a long step.",
    ),
    counter("rhei_sessions_total", "", "Sessions that began to stream."),
    counter(
        "rhei_session_failures_total",
        "",
        "Sessions that ended with an error; another one begins after a pause.",
    ),
    counter(
        "rhei_duckdb_restarts_total",
        "",
        "How often DuckDB was started again after a bug of its own.",
    ),
    counter(
        "rhei_log_events_total",
        "event; level: warn, error",
        "Warnings and errors of the log by their stable names (docs/logs.md).",
    ),
    gauge("rhei_reader_sessions", "", "Sessions of readers that are open."),
    counter("rhei_reader_sessions_total", "", "Sessions of readers that were opened."),
    counter(
        "rhei_reader_statements_total",
        "outcome: ok, failed",
        "Statements of readers that ended well, and that failed or were cancelled.",
    ),
    histogram(
        STATEMENT_SECONDS,
        "Seconds of each statement of a reader, from its start to its last row.",
    ),
    gauge("process_start_time_seconds", "", "When the process began, in seconds since 1970."),
    counter("process_cpu_seconds_total", "", "CPU time of the process (Linux)."),
    gauge("process_resident_memory_bytes", "", "Memory of the process that is in RAM (Linux)."),
    gauge("process_open_fds", "", "Open file descriptors of the process (Linux)."),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Returns the table of docs/observing.md.
    fn table() -> String {
        let mut table = String::from("| metric | type | labels | meaning |\n|---|---|---|---|\n");
        for Metric { name, kind, labels, help } in METRICS {
            let kind = format!("{kind:?}").to_lowercase();
            table += &format!("| `{name}` | {kind} | {labels} | {help} |\n");
        }
        table
    }

    #[test]
    fn each_metric_has_one_entry_and_counters_end_in_total() {
        let names: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());

        for Metric { name, kind, help, .. } in METRICS {
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            assert!(help.ends_with('.'), "{name}: {help}");
            let has_buckets = BUCKETS.iter().any(|(histogram, _)| histogram == name);
            assert_eq!(has_buckets, *kind == Kind::Histogram, "{name}");
        }
    }

    #[test]
    fn docs_observing_lists_the_metrics_as_they_are() {
        const PATH: &str = "docs/observing.md";
        let document = std::fs::read_to_string(PATH).unwrap();
        let (before, rest) = document.split_once("<!-- metrics -->\n").unwrap();
        let (listed, after) = rest.split_once("<!-- end of metrics -->\n").unwrap();

        if std::env::var_os("RHEI_BLESS").is_some() {
            let parts =
                [before, "<!-- metrics -->\n", &table(), "<!-- end of metrics -->\n", after];
            std::fs::write(PATH, parts.concat()).unwrap();
            return;
        }
        assert_eq!(listed, table(), "{PATH} is not as the code: run with RHEI_BLESS=1");
    }
}
