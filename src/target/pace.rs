//! How DuckDB is set for the work at hand: its threads, how large its log may grow, and what file checkpoints compact.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use duckdb::Connection;

use super::{Applied, Compaction, TargetError, apply, compact, ddl};
use crate::change::{ChangeBatch, QualifiedName, TableChanges};

/// Few row groups are compacted per file checkpoint while busy: the worst commit falls from 7.4 s to 0.8 s (duckdb.md 1.5).
const VACUUM_TASKS: u32 = 8;

/// Rows that take so many bytes of the log are wide. 122,880 of them, which is a row group, can be gigabytes; and whenever DuckDB
/// compacts, it merges a small row group with the one before it, if both fit into one. So 64 MB of new rows of 16 kB had up to
/// 2 GB written anew, in one commit. While wide rows come, nothing is compacted that is not worth it.
const WIDE_BYTES: u64 = 1000;
/// Worth it: a table has so many row groups more than it would have if each had so many rows, or so many bytes, that are alive.
/// So wide rows are written two or three times in all, and dead ones take about as much room as live ones.
const SPARE_ROW_GROUPS: u64 = 16;
const ROW_GROUP_ROWS: u64 = 122_880;
const ROW_GROUP_BYTES: u64 = 16 << 20;
/// DuckDB's, unless a file was made otherwise.
const BLOCK_BYTES: u64 = 256 << 10;
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(60);

/// How large DuckDB's log may grow before a commit writes it into the file, in MB: half of the file, within these bounds. A log
/// that is larger than its file holds nothing but rows that were written several times; and what is in it is in memory, too.
const CALM_THRESHOLD: std::ops::RangeInclusive<u64> = 16..=64;
/// The same while tables are copied: their commits are many, and cycles of the stream would wait for each of these writes.
const COPYING_THRESHOLD: u64 = 512;
/// Batches of so many row changes, or bytes, come when there is much to catch up with: the file can wait, for so long after the
/// last one.
const HURRIED_ROWS: u64 = 20_000;
const HURRIED_BYTES: usize = 4_000_000;
const HURRY: Duration = Duration::from_secs(10);

/// A batch that took so long to apply gets all threads the next time, until so many threads are no longer needed for that. DuckDB's
/// caller spins while another thread works for it, so a second thread costs more than it gives until joins are large (ARCHITECTURE.md).
const SLOW: Duration = Duration::from_millis(500);

/// What is set, and what it follows from.
#[derive(Debug)]
pub(super) struct Pace {
    /// `threads`, and the most that it may be.
    threads: u32,
    most_threads: u32,
    /// Batches take long.
    is_slow: bool,
    /// `checkpoint_threshold`, in MB; none yet.
    threshold: Option<u64>,
    /// When the last large batch came.
    hurried_at: Option<Instant>,
    /// `max_vacuum_tasks`; none yet.
    vacuum_tasks: Option<u32>,
    /// Rows that the log has got since it was last written into the file.
    logged_rows: u64,
    is_wide: bool,
    /// When it was last looked at whether it is worth compacting, though rows are wide; and the answer.
    looked_at: Option<Instant>,
    is_worth_it: bool,
}

impl Pace {
    pub(super) fn new(connection: &Connection) -> Result<Self, TargetError> {
        let threads = connection.query_row("SELECT current_setting('threads')::UINTEGER", [], |row| row.get(0))?;
        Ok(Self {
            threads,
            most_threads: threads,
            is_slow: false,
            threshold: None,
            hurried_at: None,
            vacuum_tasks: None,
            logged_rows: 0,
            is_wide: false,
            looked_at: None,
            is_worth_it: false,
        })
    }

    /// Takes notice of a batch that is to be applied.
    pub(super) fn expect(&mut self, batch: &ChangeBatch) {
        let changed = |changes: &TableChanges| {
            let counts = changes.counts;
            counts.inserted + counts.updated + counts.deleted
        };
        let bytes: usize = batch.tables.iter().map(|changes| apply::bytes(&changes.inserts)).sum();
        let rows: u64 = batch.tables.iter().map(|changes| apply::total(&changes.inserts)).sum();
        if batch.tables.iter().map(changed).sum::<u64>() >= HURRIED_ROWS || bytes >= HURRIED_BYTES {
            self.hurried_at = Some(Instant::now());
        }
        self.is_wide |= bytes >= HURRIED_BYTES && bytes as u64 >= rows * WIDE_BYTES;
    }

    /// Takes notice of a commit. `log_bytes`: the size of the log before it, and after it.
    pub(super) fn applied(&mut self, applied: &Applied, log_bytes: (u64, u64)) {
        let (before, after) = log_bytes;
        if after < before {
            // It was written into the file.
            self.compacted_if_allowed();
            self.logged_rows = 0;
            return;
        }
        self.logged_rows += applied.inserted_rows;
        if self.logged_rows > 0 {
            self.is_wide = after >= self.logged_rows * WIDE_BYTES;
        }
    }

    /// Takes notice of how long the last batch took, or a part of it.
    pub(super) fn took(&mut self, took: Duration) {
        self.is_slow = took > SLOW || self.is_slow && took * self.most_threads * 2 > SLOW;
    }

    fn compacted_if_allowed(&mut self) {
        if self.vacuum_tasks.is_some_and(|tasks| tasks > 0) {
            (self.looked_at, self.is_worth_it) = (Some(Instant::now()), false);
        }
    }

    /// Sets what fits: for the next batch, or while tables are copied.
    pub(super) fn set(&mut self, connection: &Connection, path: &Path, is_copying: bool) -> Result<(), TargetError> {
        self.set_threads(connection, if is_copying || self.is_slow { self.most_threads } else { 1 })?;
        if self.is_wide && self.looked_at.is_none_or(|at| at.elapsed() >= LOOK) {
            self.look(connection)?;
        }
        self.set_vacuum_tasks(connection, if self.is_wide && !self.is_worth_it { 0 } else { VACUUM_TASKS })?;
        let is_hurried = self.hurried_at.is_some_and(|at| at.elapsed() < HURRY);
        let threshold = if is_copying {
            COPYING_THRESHOLD
        } else if is_hurried {
            *CALM_THRESHOLD.end()
        } else {
            let file_mb = compact::size(path) / 1_000_000;
            (file_mb / 2).next_power_of_two().clamp(*CALM_THRESHOLD.start(), *CALM_THRESHOLD.end())
        };
        if self.threshold != Some(threshold) {
            connection.execute_batch(&format!("SET GLOBAL checkpoint_threshold = '{threshold}MB'"))?;
            self.threshold = Some(threshold);
        }
        Ok(())
    }

    /// Sets what a file checkpoint needs that comes now.
    pub(super) fn set_for_tidying(
        &mut self,
        connection: &Connection,
        compaction: Compaction,
    ) -> Result<(), TargetError> {
        // Of two threads there is no gain, since one of them spins; and each that compacts holds a row group in memory.
        self.set_threads(connection, if self.most_threads > 2 && !self.is_wide { self.most_threads } else { 1 })?;
        // A CHECKPOINT compacts as much as it may, and with an empty write-ahead log does nothing (duckdb.md 1.5).
        let tasks = match compaction {
            Compaction::None => 0,
            _ if self.is_wide && !self.look(connection)? => 0,
            Compaction::Some => VACUUM_TASKS,
            Compaction::All => 100,
        };
        self.set_vacuum_tasks(connection, tasks)
    }

    /// After the file checkpoint.
    pub(super) fn tidied(&mut self, connection: &Connection, is_done: bool) -> Result<(), TargetError> {
        if is_done {
            self.compacted_if_allowed();
            self.logged_rows = 0;
        }
        self.set_vacuum_tasks(connection, VACUUM_TASKS)
    }

    /// Until the next batch.
    pub(super) fn use_all_threads(&mut self, connection: &Connection) -> Result<(), TargetError> {
        self.set_threads(connection, self.most_threads)
    }

    fn set_threads(&mut self, connection: &Connection, threads: u32) -> Result<(), TargetError> {
        if threads != self.threads {
            connection.execute_batch(&format!("SET GLOBAL threads = {threads}"))?;
            self.threads = threads;
        }
        Ok(())
    }

    fn set_vacuum_tasks(&mut self, connection: &Connection, tasks: u32) -> Result<(), TargetError> {
        if self.vacuum_tasks != Some(tasks) {
            connection.execute_batch(&format!("SET GLOBAL max_vacuum_tasks = {tasks}"))?;
            self.vacuum_tasks = Some(tasks);
        }
        Ok(())
    }

    fn look(&mut self, connection: &Connection) -> Result<bool, TargetError> {
        (self.looked_at, self.is_worth_it) = (Some(Instant::now()), is_worth_compacting(connection)?);
        Ok(self.is_worth_it)
    }
}

/// Whether a table has many row groups that are small, or full of dead rows. Nothing of its data is read.
fn is_worth_compacting(connection: &Connection) -> Result<bool, TargetError> {
    let mut tables = connection.prepare(
        "SELECT schema_name, table_name, estimated_size::UBIGINT FROM duckdb_tables() WHERE database_name = current_database()",
    )?;
    let tables: Vec<(String, String, u64)> =
        tables.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect::<Result<_, _>>()?;
    for (schema, name, stored_rows) in tables {
        let table = ddl::table(&QualifiedName::new(schema, name));
        let live_rows: u64 = connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0))?;
        let sql = format!(
            "SELECT count(DISTINCT row_group_id), (count(DISTINCT block_id) + sum(len(additional_block_ids)))::UBIGINT * {BLOCK_BYTES} \
             FROM pragma_storage_info({})",
            ddl::literal(&table)
        );
        let (row_groups, bytes): (u64, Option<u64>) =
            connection.query_row(&sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let live_bytes = bytes.unwrap_or_default() as f64 * live_rows as f64 / stored_rows.max(1) as f64;
        let needed = (live_rows / ROW_GROUP_ROWS).max(live_bytes as u64 / ROW_GROUP_BYTES);
        if row_groups > needed + SPARE_ROW_GROUPS {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Lsn,
        checkpoint::DurableLsn,
        target::{DuckDb, duckdb::TargetOptions},
    };

    struct Bed {
        target: DuckDb,
        path: std::path::PathBuf,
        _folder: tempfile::TempDir,
    }

    impl Bed {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("copy.duckdb");
            let target = DuckDb::open(&TargetOptions { path: path.clone(), ..TargetOptions::default() }).unwrap();
            target
                .connection
                .execute_batch("CREATE TABLE rhei_target.\"it's\" (id BIGINT, v VARCHAR); CHECKPOINT")
                .unwrap();
            Self { target, path, _folder: folder }
        }

        /// Rows of `bytes` each, and what a batch of them does to the pace, then a file checkpoint by whoever makes it.
        fn insert(&mut self, rows: u64, bytes: u64) {
            let DuckDb { connection, pace, .. } = &mut self.target;
            let log_bytes = || compact::size(&compact::beside(&self.path, ".wal"));
            pace.set(connection, &self.path, false).unwrap();
            let before = log_bytes();
            let insert = format!(
                "INSERT INTO rhei_target.\"it's\" SELECT i, repeat(chr(97 + (i % 26)::INT), {bytes}) FROM range({rows}) r(i)"
            );
            connection.execute_batch(&insert).unwrap();
            let applied =
                Applied { durable: DurableLsn::committed(Lsn(1)), deleted_rows: 0, inserted_rows: rows, pruned: 0 };
            pace.applied(&applied, (before, log_bytes()));
            pace.set(connection, &self.path, false).unwrap();
            connection.execute_batch("CHECKPOINT").unwrap();
            pace.applied(&applied, (u64::MAX, 0));
        }

        fn row_groups(&self) -> u64 {
            let sql = "SELECT count(DISTINCT row_group_id) FROM pragma_storage_info('rhei_target.\"it''s\"')";
            self.target.connection.query_row(sql, [], |row| row.get(0)).unwrap()
        }
    }

    #[test]
    fn file_checkpoints_leave_row_groups_of_wide_rows_as_they_are() {
        let mut bed = Bed::new();
        for _ in 0..4 {
            bed.insert(1000, 4000);
        }
        assert_eq!(bed.row_groups(), 4);
    }

    #[test]
    fn file_checkpoints_merge_row_groups_of_narrow_rows() {
        let mut bed = Bed::new();
        for _ in 0..4 {
            bed.insert(1000, 40);
        }
        assert!(bed.row_groups() < 4);
    }

    #[test]
    fn row_groups_of_wide_rows_are_merged_once_many_are_small() {
        let mut bed = Bed::new();
        for _ in 0..SPARE_ROW_GROUPS + 1 {
            bed.insert(10, 4000);
        }
        assert_eq!(bed.row_groups(), SPARE_ROW_GROUPS + 1);
        // As if the minute were over.
        bed.target.pace.looked_at = None;
        bed.insert(10, 4000);
        assert!(bed.row_groups() < SPARE_ROW_GROUPS);
        assert!(!bed.target.pace.is_worth_it);
    }
}
