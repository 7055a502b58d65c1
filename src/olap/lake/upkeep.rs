//! The upkeep of a lake: without it each commit would leave files and snapshots behind for ever.
//!
//! One step at a time, between two transactions of the writer and never beside an open one:
//! compaction beside an open transaction makes its commit fail, and expiry beside one would lose
//! rows that it deletes. Only tables of this copy are compacted, since others may belong to another
//! writer. A step that a crash cuts off leaves a readable lake, and at most files that no snapshot
//! names; the last step finds those.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    time::{Duration, Instant},
};

use duckdb::Connection;

use super::{
    CatalogKind, LakeOptions,
    files::{self, DataFile, LeftBehind},
    inlining::INLINED_ROWS,
    open_transactions,
};
use crate::{
    failpoint::reached,
    olap::{
        Space, TargetError,
        connection::TargetConnection,
        names::{CATALOG, literal, quoted},
    },
    pgoutput::QualifiedName,
};

/// A table is looked after once this number of commits has changed it, or this number of them has
/// made files, or this time after the first of them. A commit whose keys lie all over works on each
/// file of the table.
const COMMITS: u32 = 100;
const FILE_COMMITS: u32 = 25;
const AT_THE_LATEST: Duration = Duration::from_secs(300);
/// The files of a table are looked at once this number of rows was deleted since the last look.
const DELETED_ROWS: u64 = 50_000;
/// The state is looked after once this number of commits has changed it; every commit does.
const STATE_COMMITS: u32 = 1000;
/// How often snapshots expire, unless they are kept for less than ten times as long.
const EXPIRY: Duration = Duration::from_secs(600);
const SHORTEST_EXPIRY: Duration = Duration::from_secs(5);

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Writes what is inlined in the catalog into a file.
    Flush(QualifiedName),
    /// Rewrites files many of whose rows are deleted.
    Rewrite(QualifiedName, RewriteRule),
    /// Makes one file of several small ones.
    Merge(QualifiedName),
    /// Deletes rows of the state, in this schema, that no snapshot sees any more. The state stays
    /// inlined in the catalog: a file of it could be lost (see `lost_files`).
    Prune(String),
    /// Forgets snapshots that are older than they are kept.
    Expire,
    /// Deletes the files that no snapshot needs any more.
    DeleteOldFiles,
    /// Deletes files that no snapshot ever named: a transaction that did not end has left them.
    DeleteOrphans,
}

/// Which files are rewritten.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RewriteRule {
    /// Those for which that pays, after commits have written this number of positions of deleted
    /// rows to the files of the table.
    ByCost(u64),
    /// Those of whose rows this share is deleted, until this number of bytes is written again.
    ByShare(f64, u64),
}

/// What has changed since a table was looked after.
#[derive(Debug, Clone, Copy)]
struct Changed {
    since: Instant,
    commits: u32,
    /// Those of the commits that have made a file with rows.
    file_commits: u32,
}

impl Changed {
    fn now() -> Self {
        Self { since: Instant::now(), commits: 0, file_commits: 0 }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.commits >= COMMITS
            || self.file_commits >= FILE_COMMITS
            || now.duration_since(self.since) >= AT_THE_LATEST
    }
}

/// The rows of a table that a commit has written.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChangedRows {
    pub inserted: u64,
    pub deleted: u64,
    /// Not even few rows of this table stay in the catalog.
    pub is_never_inlined: bool,
}

/// How many rows were deleted in a table, since its files were last written again for that.
#[derive(Debug, Clone, Copy, Default)]
struct Deleted {
    rows: u64,
    /// The positions that commits have written: each those of all deleted rows, unless it kept its
    /// own in the catalog.
    written: u64,
    /// The number at the last look.
    looked_at: u64,
}

/// What is due, and when.
#[derive(Debug)]
pub struct Upkeep {
    changed: BTreeMap<QualifiedName, Changed>,
    deleted: BTreeMap<QualifiedName, Deleted>,
    state_commits: u32,
    queue: VecDeque<Step>,
    /// What steps have left, for when nothing else is due.
    unfinished: VecDeque<Step>,
    expired_at: Option<Instant>,
    /// Whether the work that is left from before is known.
    backlog: Backlog,
}

/// What is known of the work that was left behind, and is looked for before the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backlog {
    /// Nothing: earlier processes may have left something.
    Unknown,
    /// All but the files, of which copies make many.
    UnknownFiles,
    Known,
}

impl Upkeep {
    pub fn new() -> Self {
        Self {
            changed: BTreeMap::new(),
            deleted: BTreeMap::new(),
            state_commits: 0,
            queue: VecDeque::new(),
            unfinished: VecDeque::new(),
            expired_at: None,
            backlog: Backlog::Unknown,
        }
    }

    /// Notes that a commit has changed these tables.
    pub fn note<'a>(&mut self, tables: impl Iterator<Item = (&'a QualifiedName, ChangedRows)>) {
        let is_a_file = |rows: u64| rows > u64::from(INLINED_ROWS);
        self.state_commits += 1;
        for (table, rows) in tables {
            let changed = self.changed.entry(table.clone()).or_insert_with(Changed::now);
            changed.commits += 1;
            let makes_file = is_a_file(rows.inserted) || rows.is_never_inlined && rows.inserted > 0;
            changed.file_commits += u32::from(makes_file);

            if rows.deleted > 0 {
                let deleted = self.deleted.entry(table.clone()).or_default();
                deleted.rows += rows.deleted;
                if is_a_file(rows.deleted) {
                    deleted.written += deleted.rows;
                }
            }
        }
    }

    /// Notes that these tables have new copies, which are of many files.
    pub fn copied<'a>(&mut self, tables: impl Iterator<Item = &'a QualifiedName>) {
        for table in tables {
            self.deleted.remove(table);
        }
        if self.backlog == Backlog::Known {
            self.backlog = Backlog::UnknownFiles;
        }
    }

    /// Has what earlier processes have left behind looked after, and what copies have left: each
    /// call of `sync` is a process of its own.
    pub fn find_backlog(
        &mut self,
        connection: &TargetConnection,
        options: &LakeOptions,
    ) -> Result<(), TargetError> {
        if self.backlog != Backlog::Known {
            self.want(files::left_behind(connection, options, self.backlog)?);
            self.backlog = Backlog::Known;
        }
        Ok(())
    }

    /// Has tables looked after at the next occasion.
    fn want(&mut self, left: LeftBehind) {
        for table in left.tables {
            self.changed.insert(table, Changed { commits: COMMITS, ..Changed::now() });
        }
        if left.is_state_full {
            self.state_commits = STATE_COMMITS;
        }
    }

    /// Returns the next step, if one is due at `now`.
    pub fn next(&mut self, state: &str, options: &LakeOptions, now: Instant) -> Option<Step> {
        if self.queue.is_empty() {
            self.plan(state, options, now);
        }
        self.queue.pop_front().or_else(|| self.unfinished.pop_front())
    }

    /// Notes what a step has done.
    pub fn done(&mut self, step: &Step, outcome: StepOutcome) {
        match (step, &outcome) {
            (Step::Rewrite(table, _), StepOutcome::Done | StepOutcome::Left(_)) => {
                self.deleted.remove(table);
            }
            (Step::Flush(table), _) => {
                if let Some(deleted) = self.deleted.get_mut(table) {
                    deleted.written += deleted.rows;
                }
            }
            _ => {}
        }
        if let StepOutcome::Left(rest) = outcome {
            self.unfinished.push_back(rest);
        }
    }

    fn plan(&mut self, state: &str, options: &LakeOptions, now: Instant) {
        let due = self.changed.iter().filter(|(_, changed)| changed.is_due(now));
        let due = due.min_by_key(|(_, changed)| changed.since);
        if let Some(table) = due.map(|(table, _)| table.clone()) {
            self.changed.remove(&table);
            self.queue.extend(self.steps_of(&table));
            return;
        }

        let is_due_for_rewrite =
            |deleted: &Deleted| deleted.rows - deleted.looked_at >= DELETED_ROWS;
        if let Some((table, deleted)) =
            self.deleted.iter_mut().find(|(_, it)| is_due_for_rewrite(it))
        {
            deleted.looked_at = deleted.rows;
            let rule = RewriteRule::ByCost(deleted.written);
            // Also the deletions that are in the catalog are then in files, where they are counted.
            let steps = [Step::Flush(table.clone()), Step::Rewrite(table.clone(), rule)];
            self.queue.extend(steps);
            return;
        }

        if self.state_commits >= STATE_COMMITS {
            self.state_commits = 0;
            self.queue.push_back(Step::Prune(state.to_owned()));
            return;
        }

        let interval = (options.keep_snapshots / 10).clamp(SHORTEST_EXPIRY, EXPIRY);
        if self.expired_at.is_none_or(|at| now.duration_since(at) >= interval) {
            self.expired_at = Some(now);
            self.queue.extend([Step::Expire, Step::DeleteOldFiles]);
        }
    }

    fn steps_of(&self, table: &QualifiedName) -> [Step; 3] {
        let written = self.deleted.get(table).map_or(0, |deleted| deleted.written);
        let rule = RewriteRule::ByCost(written);
        [Step::Flush(table.clone()), Step::Rewrite(table.clone(), rule), Step::Merge(table.clone())]
    }

    /// Returns every step for these tables, as for an operator who asks for them: every file is
    /// written again of which rows are deleted.
    pub fn all_steps(&mut self, state: &str, tables: Vec<QualifiedName>) -> Vec<Step> {
        (self.changed, self.deleted) = (BTreeMap::new(), BTreeMap::new());
        self.queue.clear();
        self.unfinished.clear();
        self.state_commits = 0;
        let of_table = |table: QualifiedName| {
            let rewrite = Step::Rewrite(table.clone(), RewriteRule::ByShare(0.0, u64::MAX));
            [Step::Flush(table.clone()), rewrite, Step::Merge(table)]
        };
        let mut steps: Vec<Step> = tables.into_iter().flat_map(of_table).collect();
        let state = Step::Prune(state.to_owned());
        steps.extend([Step::Expire, state, Step::DeleteOldFiles, Step::DeleteOrphans]);
        steps
    }
}

/// What a step has done.
#[derive(Debug, PartialEq)]
pub enum StepOutcome {
    /// Nothing: there was nothing to do.
    Idle,
    Done,
    /// A part; this is left for another step.
    Left(Step),
}

impl Step {
    /// Runs the step, in transactions of its own.
    pub fn run(
        &self,
        connection: &TargetConnection,
        options: &LakeOptions,
    ) -> Result<StepOutcome, TargetError> {
        let older =
            |time: Duration| format!("older_than => now() - INTERVAL {} SECOND", time.as_secs());
        match self {
            Self::Flush(table) => {
                flush(connection, table)?;
                reached("upkeep.flushed");
            }
            Self::Rewrite(table, rule) => {
                let outcome = rewrite(connection, table, *rule)?;
                reached("upkeep.rewritten");
                return Ok(outcome);
            }
            Self::Merge(table) => {
                let outcome = merge(connection, table, options)?;
                reached("upkeep.merged");
                return Ok(outcome);
            }
            Self::Prune(state) => prune(connection, state)?,
            Self::Expire => {
                // Transactions that are open for longer than files are left are on their own.
                let needed = open_transactions::needed_for(connection, options)?;
                let needed = needed.map_or(options.clean_after, |age| age.min(options.clean_after));
                let kept = options.keep_snapshots.max(needed);
                call(connection, "expire_snapshots", &older(kept))?;
                reached("upkeep.expired");
            }
            Self::DeleteOldFiles => {
                call(connection, "cleanup_old_files", &older(options.clean_after))?;
                reached("upkeep.cleaned");
            }
            Self::DeleteOrphans => {
                delete_orphans(connection, &older(options.clean_after))?;
                reached("upkeep.ended");
            }
        }
        Ok(StepOutcome::Done)
    }
}

/// Calls a function of DuckLake. Not prepared before: DuckLake scans a table only in the
/// transaction that planned the scan.
fn call(connection: &TargetConnection, function: &str, arguments: &str) -> Result<(), TargetError> {
    let call = format!("CALL ducklake_{function}('{CATALOG}', {arguments})");
    connection.autocommit(&call)
}

/// Deletes files that no snapshot ever named.
///
/// # Errors
/// The lake names one of these files by another spelling of its path: DuckLake compares paths as
/// texts. Nothing is deleted then.
fn delete_orphans(connection: &TargetConnection, older: &str) -> Result<(), TargetError> {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    let found = format!(
        "CREATE OR REPLACE TEMP TABLE _rhei_orphans AS \
         FROM ducklake_delete_orphaned_files('{CATALOG}', {older}, dry_run => true)"
    );
    connection.execute_batch(&found)?;
    let named: u64 = connection.query_row(
        &format!(
            "SELECT count(*) FROM _rhei_orphans WHERE parse_filename(path) IN \
             (SELECT parse_filename(path) FROM {metadata}.ducklake_data_file UNION ALL \
             SELECT parse_filename(path) FROM {metadata}.ducklake_delete_file)"
        ),
        [],
        |row| row.get(0),
    )?;
    connection.execute_batch("DROP TABLE _rhei_orphans")?;

    if named > 0 {
        let reason = format!(
            "{named} files that the lake names are listed under other paths in its data_path, so \
             no file that it does not name was deleted\nhint: the rest of the compaction is done; \
             the lake was made with a data_path that is no plain path"
        );
        return Err(TargetError::NotCompacted { reason });
    }
    call(connection, "delete_orphaned_files", older)
}

/// Writes what is inlined into a file.
fn flush(connection: &TargetConnection, table: &QualifiedName) -> Result<(), TargetError> {
    let (schema, name) = (literal(&table.schema), literal(&table.name));
    let table = format!("schema_name => {schema}, table_name => {name}");
    call(connection, "flush_inlined_data", &table)
}

/// Writes files again of which rows are deleted, as many as one step takes.
fn rewrite(
    connection: &TargetConnection,
    table: &QualifiedName,
    rule: RewriteRule,
) -> Result<StepOutcome, TargetError> {
    let found = files::of_table(connection, table)?;
    let (least, most_bytes) = match rule {
        RewriteRule::ByCost(written) => {
            let least = files::rewrite_threshold(&found, written);
            // More may be due by the end, which is the work of another time.
            (least, files::rewrite_bytes(&found, least))
        }
        RewriteRule::ByShare(share, bytes) => (share, bytes),
    };
    let Some(portion) = files::next_rewrite(&found, least) else { return Ok(StepOutcome::Idle) };

    let (name, schema) = (literal(&table.name), literal(&table.schema));
    let share = portion.deleted_share;
    let arguments = format!("{name}, schema => {schema}, delete_threshold => {share:.12}");
    call(connection, "rewrite_data_files", &arguments)?;
    if files::of_table(connection, table)? == found {
        return Ok(StepOutcome::Idle);
    }

    let left = most_bytes.saturating_sub(portion.bytes);
    let rest = Step::Rewrite(table.clone(), RewriteRule::ByShare(least, left));
    Ok(if portion.is_last || left == 0 { StepOutcome::Done } else { StepOutcome::Left(rest) })
}

/// Merges small files into one.
fn merge(
    connection: &TargetConnection,
    table: &QualifiedName,
    options: &LakeOptions,
) -> Result<StepOutcome, TargetError> {
    let is_wanted = |files: &[DataFile]| !files::mergeable(files, options.file_bytes).is_empty();
    if !is_wanted(&files::of_table(connection, table)?) {
        return Ok(StepOutcome::Idle);
    }

    // DuckLake merges no file of which deletions are in the catalog.
    flush(connection, table)?;
    let found = files::of_table(connection, table)?;
    let (name, schema) = (literal(&table.name), literal(&table.schema));
    for sizes in files::mergeable(&found, options.file_bytes) {
        // One new file at a time.
        let Range { start: from, end: below } = sizes;
        let arguments = format!(
            "{name}, schema => {schema}, max_compacted_files => 1, min_file_size => {from}, \
             max_file_size => {below}"
        );
        set_file_bytes(connection, below)?;
        let merged = call(connection, "merge_adjacent_files", &arguments);
        set_file_bytes(connection, options.file_bytes)?;
        merged?;

        // Small files of different partitions, or of different shapes, stay apart.
        if files::of_table(connection, table)?.len() < found.len() {
            return Ok(StepOutcome::Left(Step::Merge(table.clone())));
        }
    }
    Ok(StepOutcome::Idle)
}

/// Sets the size at which DuckLake begins another file, for this connection: loaders have others.
fn set_file_bytes(connection: &Connection, bytes: u64) -> Result<(), TargetError> {
    let set = format!("SET SESSION ducklake_target_file_size = '{bytes}B'");
    Ok(connection.execute_batch(&set)?)
}

/// Deletes inlined rows of the state that end before the oldest snapshot.
fn prune(connection: &TargetConnection, state: &str) -> Result<(), TargetError> {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    let mut statement = connection.prepare(&format!(
        "SELECT i.table_name FROM {metadata}.ducklake_inlined_data_tables i \
         JOIN {metadata}.ducklake_table t USING (table_id) \
         JOIN {metadata}.ducklake_schema s USING (schema_id) \
         WHERE s.schema_name = ? AND s.end_snapshot IS NULL AND t.end_snapshot IS NULL"
    ))?;
    let inlined = statement.query_map([state], |row| row.get(0))?;
    let inlined = inlined.collect::<Result<Vec<String>, _>>()?;

    let oldest: u64 = connection.query_row(
        &format!("SELECT min(snapshot_id) FROM {metadata}.ducklake_snapshot"),
        [],
        |row| row.get(0),
    )?;
    for table in inlined {
        connection.autocommit(&format!(
            "DELETE FROM {metadata}.{} WHERE end_snapshot <= {oldest}",
            quoted(&table)
        ))?;
    }
    Ok(())
}

/// The files and snapshots of a lake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct LakeSpace {
    /// The files with rows.
    pub files: u64,
    /// The files that say which rows are deleted.
    pub delete_files: u64,
    /// Files that wait to be deleted.
    pub old_files: u64,
    pub snapshots: u64,
    /// The size of the catalog in bytes; unknown where it is not PostgreSQL.
    pub catalog_bytes: Option<u64>,
}

/// Returns the size of a lake: of the files that make it up now, and what else there is of it.
pub fn space(connection: &TargetConnection, options: &LakeOptions) -> Result<Space, TargetError> {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    let (files, delete_files, bytes) = connection.query_row(
        &format!(
            "SELECT f.files, d.files, (f.bytes + d.bytes)::UBIGINT FROM (SELECT count(*) AS files, \
             coalesce(sum(file_size_bytes), 0) AS bytes FROM {metadata}.ducklake_data_file \
             WHERE end_snapshot IS NULL) f, (SELECT count(*) AS files, \
             coalesce(sum(file_size_bytes), 0) AS bytes FROM {}) d",
            files::current_deletes()
        ),
        [],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )?;

    let (old_files, snapshots) = connection.query_row(
        &format!(
            "SELECT (SELECT count(*) FROM {metadata}.ducklake_files_scheduled_for_deletion), \
             (SELECT count(*) FROM {metadata}.ducklake_snapshot)"
        ),
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;

    let catalog_bytes = if options.catalog_kind() == CatalogKind::Postgres {
        let sql = format!(
            "SELECT * FROM postgres_query('{metadata}', \
             'SELECT pg_database_size(current_database())')"
        );
        Some(connection.query_row(&sql, [], |row| row.get(0))?)
    } else {
        None
    };
    let stored_rows = connection.query_row(
        "SELECT coalesce(sum(estimated_size), 0)::UBIGINT FROM duckdb_tables() \
         WHERE database_name = current_database()",
        [],
        |row| row.get(0),
    )?;
    let lake = LakeSpace { files, delete_files, old_files, snapshots, catalog_bytes };
    Ok(Space { file_bytes: bytes, stored_rows, lake: Some(lake), ..Space::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(keep: u64) -> LakeOptions {
        LakeOptions { keep_snapshots: Duration::from_secs(keep), ..LakeOptions::sample() }
    }

    fn rows(inserted: u64, deleted: u64) -> ChangedRows {
        ChangedRows { inserted, deleted, is_never_inlined: false }
    }

    fn drain(upkeep: &mut Upkeep, options: &LakeOptions, now: Instant) -> Vec<Step> {
        std::iter::from_fn(|| upkeep.next("_rhei", options, now)).collect()
    }

    #[test]
    fn a_table_is_looked_after_when_many_commits_or_much_time_have_passed() {
        let (options, mut upkeep, start) = (options(86_400), Upkeep::new(), Instant::now());
        let orders = QualifiedName::new("public", "orders");
        let steps = [
            Step::Flush(orders.clone()),
            Step::Rewrite(orders.clone(), RewriteRule::ByCost(0)),
            Step::Merge(orders.clone()),
        ];
        drain(&mut upkeep, &options, start);

        upkeep.note([(&orders, rows(0, 0))].into_iter());
        assert_eq!(drain(&mut upkeep, &options, start), []);
        let later = start + AT_THE_LATEST + Duration::from_secs(1);
        assert_eq!(drain(&mut upkeep, &options, later), steps);

        (0..COMMITS).for_each(|_| upkeep.note([(&orders, rows(0, 0))].into_iter()));
        assert_eq!(drain(&mut upkeep, &options, later), steps);
        assert_eq!(drain(&mut upkeep, &options, later), []);

        (1..FILE_COMMITS).for_each(|_| upkeep.note([(&orders, rows(101, 0))].into_iter()));
        upkeep.note([(&orders, rows(100, 0))].into_iter());
        assert_eq!(drain(&mut upkeep, &options, start), []);
        upkeep.note([(&orders, rows(101, 0))].into_iter());
        assert_eq!(drain(&mut upkeep, &options, start), steps);

        upkeep.want(LeftBehind { tables: vec![orders.clone()], is_state_full: false });
        assert_eq!(drain(&mut upkeep, &options, later), steps);
    }

    #[test]
    fn files_are_looked_at_when_many_rows_were_deleted() {
        let (options, mut upkeep, now) = (options(86_400), Upkeep::new(), Instant::now());
        let orders = QualifiedName::new("public", "orders");
        drain(&mut upkeep, &options, now);
        let rewrite = |written| Step::Rewrite(orders.clone(), RewriteRule::ByCost(written));
        let steps = |written| [Step::Flush(orders.clone()), rewrite(written)];
        let half = DELETED_ROWS / 2;

        upkeep.note([(&orders, rows(0, half))].into_iter());
        assert_eq!(drain(&mut upkeep, &options, now), []);
        upkeep.note([(&orders, rows(0, half))].into_iter());
        assert_eq!(drain(&mut upkeep, &options, now), steps(3 * half));
        assert_eq!(drain(&mut upkeep, &options, now), []);

        upkeep.done(&rewrite(3 * half), StepOutcome::Idle);
        upkeep.note([(&orders, rows(0, 2 * half))].into_iter());
        assert_eq!(drain(&mut upkeep, &options, now), steps(7 * half));

        let rest = Step::Rewrite(orders.clone(), RewriteRule::ByShare(0.1, 7));
        upkeep.done(&rewrite(7 * half), StepOutcome::Left(rest.clone()));
        assert_eq!(drain(&mut upkeep, &options, now), [rest]);
        upkeep.note([(&orders, rows(0, 2 * half))].into_iter());
        assert_eq!(drain(&mut upkeep, &options, now), steps(2 * half));
    }

    #[test]
    fn snapshots_expire_ten_times_while_they_are_kept() {
        let (options, mut upkeep, start) = (options(100), Upkeep::new(), Instant::now());
        let all = [Step::Expire, Step::DeleteOldFiles];
        assert_eq!(drain(&mut upkeep, &options, start), all);
        assert_eq!(drain(&mut upkeep, &options, start + Duration::from_secs(9)), []);
        assert_eq!(drain(&mut upkeep, &options, start + Duration::from_secs(10)), all);
    }
}
