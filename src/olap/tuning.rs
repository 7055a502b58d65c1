//! Sets DuckDB for its present work: the number of threads, the size that the log may reach, and
//! what file checkpoints compact.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

use duckdb::Connection;

use super::{Applied, Compaction, TargetError, compact, names, stage};
use crate::{
    change::{ChangeBatch, TableChanges},
    pgoutput::QualifiedName,
};

/// Few row groups are compacted per file checkpoint while busy: the worst commit falls from 7.4 s
/// to 0.8 s (docs/traps.md, DuckDB).
const VACUUM_TASKS: u32 = 8;

/// The number of compactions that a row group of dead rows pays for. Each compaction rewrites up to
/// four row groups, and leaves one row group less. Measured with 300,000 random updates at a time
/// of 3,000,000 rows: a fifth of the rows stay dead, and it takes half the CPU of compacting all
/// that can be compacted, whose worst time is three times longer and whose file is larger by a
/// quarter.
const TASKS_PER_ROW_GROUP: u64 = 3;
const MAX_VACUUM_TASKS: u32 = 100;

/// Rows that take at least this many bytes of the log each are wide. A row group has 122,880 rows,
/// so a row group of wide rows can be gigabytes. Whenever DuckDB compacts, it merges a small row
/// group with the one before it, if both fit into one; so 64 MB of new rows of 16 kB made one
/// commit rewrite up to 2 GB. While wide rows come, DuckDB compacts only where compacting is worth
/// the work.
const WIDE_BYTES: u64 = 1000;
/// A commit takes as much of the log for itself as this number of rows.
const COMMIT_ROWS: u64 = 4;
/// Compacting is worth the work once three quarters of a table's row groups, which is what DuckDB
/// can merge them into, are this many more than the table needs for its live rows, at
/// [`ROW_GROUP_ROWS`] rows or [`ROW_GROUP_BYTES`] bytes each.
const SPARE_ROW_GROUPS: u64 = 16;
const ROW_GROUP_ROWS: u64 = 122_880;
const ROW_GROUP_BYTES: u64 = 16 << 20;
/// The default block size of DuckDB, unless a file was made with another one.
const BLOCK_BYTES: u64 = 256 << 10;
/// The time between two checks of whether compacting is worth the work.
const LOOK: Duration = Duration::from_secs(60);

/// The size at which a commit writes DuckDB's log into the file, in MB: half of the file, within
/// these bounds. A log that is larger than its file holds only rows that were written several
/// times; and the content of the log is in memory, too.
const WAL_LIMIT_MB: std::ops::RangeInclusive<u64> = 16..=64;
/// The same limit while tables are copied: copies make many commits, and cycles of the stream would
/// wait for each of these writes.
const COPYING_WAL_LIMIT_MB: u64 = 512;
/// DuckDB keeps new rows of small tables in memory until it writes them into the file. There these
/// rows count for the memory limit and cannot spill: about 50 kB for a table of ten rows, and 500
/// MB for 10,000 such tables. Once these rows take more than this part of DuckDB's memory limit,
/// DuckDB writes them into the file although tables are being copied. Each such write goes through
/// all tables, so it must not happen more often than necessary.
const MAX_UNSPILLABLE_PART: u64 = 4;
/// The limit of the log in that case. The limit is low, since a commit that finds another commit in
/// progress cannot write the log: the log is written about every three thousand tables.
const CROWDED_WAL_LIMIT_MB: u64 = 1;
/// Batches with at least this many row changes, or bytes, come when the stream has much to catch up
/// with: writing the file can wait, until [`HURRY`] has passed since the last such batch.
const CATCH_UP_ROWS: u64 = 20_000;
const CATCH_UP_BYTES: usize = 4_000_000;
const HURRY: Duration = Duration::from_secs(10);

/// A batch that took longer than this to apply gets all threads the next time, until batches no
/// longer need that many threads. DuckDB's caller spins while another thread works for it, so a
/// second thread costs more than it gives until joins are large (docs/decisions.md).
const SLOW: Duration = Duration::from_millis(500);

/// The present settings, and the observations that they follow from.
#[derive(Debug)]
pub(super) struct Tuning {
    /// The setting `threads`, and the highest value that it may have.
    threads: u32,
    most_threads: u32,
    /// Batches take long to apply.
    is_slow: bool,
    /// The setting `checkpoint_threshold`, in MB; None before it is set.
    threshold: Option<u64>,
    /// The time when the last large batch came.
    hurried_at: Option<Instant>,
    /// The setting `max_vacuum_tasks`; None before it is set.
    vacuum_tasks: Option<u32>,
    /// The rows that were written to the log since DuckDB last wrote the log into the file, with
    /// [`COMMIT_ROWS`] for each commit; and the bytes of these rows.
    logged_rows: u64,
    logged_bytes: u64,
    /// The row changes since the last commit.
    expected_rows: u64,
    is_wide: bool,
    /// The tables that got rows since [`Self::look`] last ran.
    written: BTreeSet<QualifiedName>,
    /// When [`Self::look`] last checked whether compacting is worth the work although rows are
    /// wide; and the answer.
    looked_at: Option<Instant>,
    should_compact: bool,
    /// In bytes: [`MAX_UNSPILLABLE_PART`] of DuckDB's memory limit, except in tests.
    most_unspillable: u64,
}

impl Tuning {
    pub(super) fn new(connection: &Connection) -> Result<Self, TargetError> {
        let threads =
            connection
                .query_row("SELECT current_setting('threads')::UINTEGER", [], |row| row.get(0))?;

        Ok(Self {
            threads,
            most_threads: threads,
            is_slow: false,
            threshold: None,
            hurried_at: None,
            vacuum_tasks: None,
            logged_rows: 0,
            logged_bytes: 0,
            expected_rows: 0,
            is_wide: false,
            written: BTreeSet::new(),
            looked_at: None,
            should_compact: false,
            most_unspillable: memory_limit(connection)? / MAX_UNSPILLABLE_PART,
        })
    }

    /// Takes notice of a batch before it is applied.
    pub(super) fn before_apply(&mut self, batch: &ChangeBatch) {
        let changed = |changes: &TableChanges| {
            let counts = changes.counts;
            counts.inserted + counts.updated + counts.deleted
        };

        let bytes: usize = batch.tables.iter().map(|changes| stage::bytes(&changes.inserts)).sum();
        let rows: u64 = batch.tables.iter().map(|changes| stage::total(&changes.inserts)).sum();
        let all_changed = batch.tables.iter().map(changed).sum::<u64>();
        self.expected_rows += all_changed;

        for changes in &batch.tables {
            if !self.written.contains(&changes.table.target) {
                self.written.insert(changes.table.target.clone());
            }
        }

        if all_changed >= CATCH_UP_ROWS || bytes >= CATCH_UP_BYTES {
            self.hurried_at = Some(Instant::now());
        }

        self.is_wide |= bytes >= CATCH_UP_BYTES && bytes as u64 >= rows * WIDE_BYTES;
    }

    /// Takes notice of a commit. `log_bytes`: the sizes of the log before and after the commit.
    pub(super) fn applied(&mut self, applied: &Applied, log_bytes: (u64, u64)) {
        let (before, after) = log_bytes;
        // Some of the expected rows go into the shadow of a copy, or cancel each other out.
        let rows = std::mem::take(&mut self.expected_rows)
            .max(applied.inserted_rows + applied.deleted_rows);

        if after < before || after == before && rows > 0 {
            // DuckDB wrote the log into the file.
            self.compacted_if_allowed();
            (self.logged_rows, self.logged_bytes) = (0, 0);
            return;
        }

        self.logged_rows += rows + COMMIT_ROWS;
        self.logged_bytes += after - before;
        self.is_wide = self.logged_bytes >= self.logged_rows * WIDE_BYTES;
    }

    /// Takes notice of the time that the last batch, or a part of it, took.
    pub(super) fn after_apply(&mut self, took: Duration) {
        self.is_slow = took > SLOW || self.is_slow && took * self.most_threads * 2 > SLOW;
    }

    fn compacted_if_allowed(&mut self) {
        if self.vacuum_tasks.is_some_and(|tasks| tasks > 0) {
            (self.looked_at, self.should_compact) = (Some(Instant::now()), false);
        }
    }

    /// Sets DuckDB for the next batch, or for the time while tables are copied.
    pub(super) fn set(
        &mut self,
        connection: &Connection,
        path: &Path,
        is_copying: bool,
    ) -> Result<(), TargetError> {
        self.set_threads(
            connection,
            if is_copying || self.is_slow { self.most_threads } else { 1 },
        )?;

        self.set_vacuum_tasks(
            connection,
            if self.is_wide && !self.should_compact { 0 } else { VACUUM_TASKS },
        )?;

        let is_hurried = self.hurried_at.is_some_and(|at| at.elapsed() < HURRY);
        let threshold = if is_copying {
            if unspillable_bytes(connection)? > self.most_unspillable {
                CROWDED_WAL_LIMIT_MB
            } else {
                COPYING_WAL_LIMIT_MB
            }
        } else if is_hurried {
            *WAL_LIMIT_MB.end()
        } else {
            let file_mb = compact::size(path) / 1_000_000;
            (file_mb / 2).next_power_of_two().clamp(*WAL_LIMIT_MB.start(), *WAL_LIMIT_MB.end())
        };

        if self.threshold != Some(threshold) {
            connection
                .execute_batch(&format!("SET GLOBAL checkpoint_threshold = '{threshold}MB'"))?;
            self.threshold = Some(threshold);
        }
        Ok(())
    }

    /// Checks whether compacting is worth the work, if the check is due. The caller calls this
    /// between transactions.
    pub(super) fn look_if_due(&mut self, connection: &Connection) {
        if self.is_wide && self.looked_at.is_none_or(|at| at.elapsed() >= LOOK) {
            self.look(connection);
        }
    }

    /// Sets DuckDB for a file checkpoint that follows.
    pub(super) fn set_for_tidying(
        &mut self,
        connection: &Connection,
        compaction: Compaction,
        is_copying: bool,
    ) -> Result<(), TargetError> {
        if self.is_wide && compaction != Compaction::Skip {
            self.look(connection);
        }

        // A CHECKPOINT compacts as much as it may, and with an empty write-ahead log does nothing
        // (docs/traps.md, DuckDB).
        let tasks = match compaction {
            Compaction::Skip => 0,
            _ if self.is_wide && !self.should_compact => 0,
            Compaction::Incremental => VACUUM_TASKS,
            Compaction::For { changed_rows } => tasks_for(changed_rows),
        };

        // Two threads gain nothing where DuckDB compacts little, since one of the threads spins.
        // Each thread that compacts holds a row group in memory, which matters only if rows are
        // wide.
        let is_much = self.most_threads > 2 || tasks > VACUUM_TASKS;
        self.set_threads(
            connection,
            if is_copying || is_much && !self.is_wide { self.most_threads } else { 1 },
        )?;
        self.set_vacuum_tasks(connection, tasks)
    }

    /// Restores the settings after the file checkpoint.
    pub(super) fn tidied(
        &mut self,
        connection: &Connection,
        is_done: bool,
    ) -> Result<(), TargetError> {
        if is_done {
            self.compacted_if_allowed();
            (self.logged_rows, self.logged_bytes) = (0, 0);
        }
        self.set_vacuum_tasks(connection, VACUUM_TASKS)
    }

    /// Lets DuckDB use all threads until the next batch.
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

    /// Checks the tables that got rows. An error of DuckDB in this check is no reason to stop.
    fn look(&mut self, connection: &Connection) {
        let mut should_compact = false;
        for table in std::mem::take(&mut self.written) {
            match is_worth_compacting(connection, &table) {
                Ok(is) => should_compact |= is,
                Err(error) => tracing::debug!(%table, %error, "its row groups were not counted"),
            }
        }

        // A positive answer of an earlier check stays until DuckDB compacts.
        (self.looked_at, self.should_compact) =
            (Some(Instant::now()), self.should_compact || should_compact);
    }
}

/// Returns DuckDB's memory limit in bytes; a small one when DuckDB prints it in an unknown form.
fn memory_limit(connection: &Connection) -> Result<u64, TargetError> {
    const UNKNOWN: u64 = 512 << 20;

    let sql = "SELECT current_setting('memory_limit')";
    let text: String = connection.query_row(sql, [], |row| row.get(0))?;
    Ok(parse_bytes(&text).unwrap_or(UNKNOWN))
}

/// Reads a size as DuckDB prints it: `1.8 GiB`.
fn parse_bytes(text: &str) -> Option<u64> {
    const UNITS: [&str; 6] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (number, unit) = text.trim().split_once(' ')?;
    let power = UNITS.iter().position(|known| *known == unit || unit == "byte")?;
    let bytes = number.parse::<f64>().ok()? * 1024_f64.powi(i32::try_from(power).ok()?);
    Some(bytes as u64)
}

/// Returns the memory of rows that are only in the log yet, in parts that DuckDB cannot write to
/// its temporary files.
fn unspillable_bytes(connection: &Connection) -> Result<u64, TargetError> {
    let sql = "SELECT coalesce(sum(memory_usage_bytes), 0)::UBIGINT FROM duckdb_memory() WHERE tag \
               = 'IN_MEMORY_TABLE'";
    Ok(connection.query_row(sql, [], |row| row.get(0))?)
}

/// Returns at least one task, so that the dead rows of many small changes are removed as well.
fn tasks_for(changed_rows: u64) -> u32 {
    let tasks = 1 + changed_rows.saturating_mul(TASKS_PER_ROW_GROUP) / ROW_GROUP_ROWS;
    u32::try_from(tasks).unwrap_or(MAX_VACUUM_TASKS).min(MAX_VACUUM_TASKS)
}

/// Returns whether a table has many row groups that are small, or full of dead rows. For that
/// DuckDB reads the heads of some columns' segments.
fn is_worth_compacting(
    connection: &Connection,
    table: &QualifiedName,
) -> Result<bool, TargetError> {
    // DuckDB 1.5.5 does not accept a quote within a quoted name here.
    if table.schema.contains('"') || table.name.contains('"') {
        return Ok(false);
    }

    let name = names::table(table);
    let (live_rows, stored_rows): (u64, u64) = connection.query_row(
        &format!(
            "SELECT (SELECT count(*) FROM {name}), coalesce((SELECT estimated_size \
             FROM duckdb_tables() \
             WHERE database_name = current_database() AND schema_name = ? AND table_name = ?), \
             0)::UBIGINT"
        ),
        duckdb::params![table.schema, table.name],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;

    let sql = format!(
        "SELECT count(DISTINCT row_group_id), \
         coalesce(count(DISTINCT block_id) + sum(len(additional_block_ids)), 0)::UBIGINT * \
         {BLOCK_BYTES} FROM pragma_storage_info({})",
        names::literal(&name)
    );
    let (row_groups, bytes): (u64, u64) =
        connection.query_row(&sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;

    let live_bytes = bytes as f64 * live_rows as f64 / stored_rows.max(1) as f64;
    let needed = (live_rows / ROW_GROUP_ROWS).max(live_bytes as u64 / ROW_GROUP_BYTES);
    // DuckDB merges at least four row groups into three.
    Ok(row_groups * 3 / 4 > needed + SPARE_ROW_GROUPS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Lsn,
        checkpoint::DurableLsn,
        olap::{DuckDb, TargetOptions},
    };

    #[test]
    fn a_size_that_duckdb_prints_is_read() {
        assert_eq!(parse_bytes("0 bytes"), Some(0));
        assert_eq!(parse_bytes("512.0 KiB"), Some(512 << 10));
        assert_eq!(parse_bytes("1.5 GiB"), Some(3 << 29));
        assert_eq!(parse_bytes("much"), None);

        for limit in ["100MB", "1GB", "3TB"] {
            let connection = Connection::open_in_memory().unwrap();
            connection.execute_batch(&format!("SET memory_limit = '{limit}'")).unwrap();
            let text = "SELECT current_setting('memory_limit')";
            let text: String = connection.query_row(text, [], |row| row.get(0)).unwrap();
            assert_eq!(parse_bytes(&text), Some(memory_limit(&connection).unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_compacted_follows_from_what_was_changed() {
        assert_eq!([0, 100, 300_000, 1_000_000, u64::MAX].map(tasks_for), [1, 1, 8, 25, 100]);
    }

    struct Bed {
        target: DuckDb,
        path: std::path::PathBuf,
        _folder: tempfile::TempDir,
    }

    impl Bed {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("copy.duckdb");
            let target =
                DuckDb::open(&TargetOptions { path: path.clone(), ..TargetOptions::default() })
                    .unwrap();

            target
                .connection
                .execute_batch(
                    "CREATE TABLE rhei_target.\"it's\" (id BIGINT, v VARCHAR); CHECKPOINT",
                )
                .unwrap();

            Self { target, path, _folder: folder }
        }

        /// Inserts rows of `bytes` each, applies their effect to the tuning as a batch does, and
        /// then makes a file checkpoint as its caller does.
        fn insert(&mut self, rows: u64, bytes: u64) {
            let DuckDb { connection, tuning, .. } = &mut self.target;
            let log_bytes = || compact::size(&compact::sibling(&self.path, ".wal"));

            tuning.written.insert(QualifiedName::new("main", "it's"));
            tuning.look_if_due(connection);
            tuning.set(connection, &self.path, false).unwrap();
            let before = log_bytes();

            let insert = format!(
                "INSERT INTO rhei_target.\"it's\" SELECT i, repeat(chr(97 + (i % 26)::INT), \
                 {bytes}) FROM range({rows}) r(i)"
            );
            connection.execute_batch(&insert).unwrap();

            let applied = Applied {
                durable: DurableLsn::committed(Lsn(1)),
                deleted_rows: 0,
                inserted_rows: rows,
                pruned: 0,
            };

            tuning.applied(&applied, (before, log_bytes()));
            tuning.look_if_due(connection);
            tuning.set(connection, &self.path, false).unwrap();

            connection.execute_batch("CHECKPOINT").unwrap();
            tuning.applied(&applied, (u64::MAX, 0));
        }

        fn row_groups(&self) -> u64 {
            let sql = "SELECT count(DISTINCT row_group_id) FROM \
                       pragma_storage_info('rhei_target.\"it''s\"')";
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
    fn a_table_that_duckdb_cannot_tell_of_is_passed_over() {
        let mut bed = Bed::new();
        let target = &mut bed.target;
        target.connection.execute_batch("CREATE TABLE rhei_target.\"a\"\"b\" (id BIGINT)").unwrap();

        for name in ["a\"b", "gone"] {
            target.tuning.written.insert(QualifiedName::new("main", name));
            target.tuning.look(&target.connection);
            assert!(!target.tuning.should_compact);
        }
    }

    #[test]
    fn what_a_commit_logs_of_its_own_does_not_make_rows_wide() {
        let mut bed = Bed::new();
        let tuning = &mut bed.target.tuning;
        let one = Applied {
            durable: DurableLsn::committed(Lsn(1)),
            deleted_rows: 0,
            inserted_rows: 1,
            pruned: 0,
        };

        tuning.applied(&one, (0, 3000));
        assert!(!tuning.is_wide);
        tuning.applied(&one, (3000, 30_000));
        assert!(tuning.is_wide);
    }

    #[test]
    fn row_groups_of_wide_rows_are_merged_once_many_are_small() {
        let mut bed = Bed::new();
        for _ in 0..SPARE_ROW_GROUPS * 2 {
            bed.insert(10, 4000);
        }
        assert_eq!(bed.row_groups(), SPARE_ROW_GROUPS * 2);

        // The test acts as if the minute were over.
        bed.target.tuning.looked_at = None;
        bed.insert(10, 4000);
        assert!(bed.row_groups() < SPARE_ROW_GROUPS);
        assert!(!bed.target.tuning.should_compact);
    }

    /// New rows of small tables count for DuckDB's limit until the file is written, and no limit
    /// makes DuckDB write the file.
    #[test]
    fn rows_of_many_small_tables_do_not_pile_up_in_memory_while_they_are_copied() {
        let mut bed = Bed::new();
        let DuckDb { connection, tuning, .. } = &mut bed.target;
        tuning.most_unspillable = 8 << 20;
        let mut most = 0;

        for round in 0..20 {
            tuning.set(connection, &bed.path, true).unwrap();

            let fill = |table| {
                format!(
                    "CREATE TABLE rhei_target.t{table} AS SELECT i, repeat(i::VARCHAR, 400) AS v \
                     FROM range(10) r(i);"
                )
            };

            let tables: String = (round * 50..(round + 1) * 50).map(fill).collect();
            connection.execute_batch(&format!("BEGIN; {tables} COMMIT;")).unwrap();
            most = most.max(unspillable_bytes(connection).unwrap());
        }

        assert!(most > 8 << 20, "{most} bytes: the test makes too few tables");
        assert!(most < 20 << 20, "{most} bytes");
    }
}
