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
    LakeOptions,
    files::{self, DataFile, LeftBehind},
    inlining::INLINED_ROWS,
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

/// A table is looked after once this number of commits has changed it, or this time after the first
/// of them.
const COMMITS: u32 = 100;
const AT_THE_LATEST: Duration = Duration::from_secs(300);
/// Its files are looked at once this number of rows was deleted since the last look.
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
    /// Writes files again of whose rows many are deleted.
    Rewrite(QualifiedName, Worn),
    /// Makes one file of several small ones.
    Merge(QualifiedName),
    /// Deletes rows of the state, in this schema, that no snapshot sees any more. The state stays
    /// inlined in the catalog: a file of it could be lost (see `lost_files`).
    Prune(String),
    /// Forgets snapshots that are older than they are kept.
    Expire,
    /// Deletes the files that no snapshot needs any more.
    Clean,
    /// Deletes files that no snapshot ever named: a transaction that did not end has left them.
    Orphans,
}

/// Which files are written again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Worn {
    /// Those for which that pays, after commits have written this number of positions of deleted
    /// rows to the files of the table.
    Written(u64),
    /// Those of whose rows this part is deleted, until this number of bytes is written again.
    Part(f64, u64),
}

/// What has changed since a table was looked after.
#[derive(Debug, Clone, Copy)]
struct Changed {
    since: Instant,
    commits: u32,
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
    rests: VecDeque<Step>,
    expired_at: Option<Instant>,
    /// Whether what there is as a whole is known.
    look: Look,
}

/// What is looked at as a whole, before the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// All that earlier processes have left.
    All,
    /// The files, of which copies make many.
    Files,
    Nothing,
}

impl Upkeep {
    pub fn new() -> Self {
        Self {
            changed: BTreeMap::new(),
            deleted: BTreeMap::new(),
            state_commits: 0,
            queue: VecDeque::new(),
            rests: VecDeque::new(),
            expired_at: None,
            look: Look::All,
        }
    }

    /// Notes that a commit has changed these tables, and how many of their rows it has deleted.
    pub fn note<'a>(&mut self, tables: impl Iterator<Item = (&'a QualifiedName, u64)>) {
        self.state_commits += 1;
        for (table, rows) in tables {
            match self.changed.get_mut(table) {
                Some(changed) => changed.commits += 1,
                None => {
                    let changed = Changed { since: Instant::now(), commits: 1 };
                    self.changed.insert(table.clone(), changed);
                }
            }
            if rows > 0 {
                let deleted = self.deleted.entry(table.clone()).or_default();
                deleted.rows += rows;
                if rows > u64::from(INLINED_ROWS) {
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
        if self.look == Look::Nothing {
            self.look = Look::Files;
        }
    }

    /// Has what earlier processes have left behind looked after, and what copies have left: each
    /// call of `sync` is a process of its own.
    pub fn look(
        &mut self,
        connection: &TargetConnection,
        options: &LakeOptions,
    ) -> Result<(), TargetError> {
        if self.look != Look::Nothing {
            self.want(files::left_behind(connection, options, self.look)?);
            self.look = Look::Nothing;
        }
        Ok(())
    }

    /// Has tables looked after at the next occasion.
    fn want(&mut self, left: LeftBehind) {
        for table in left.tables {
            let changed = Changed { since: Instant::now(), commits: COMMITS };
            self.changed.insert(table, changed);
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
        self.queue.pop_front().or_else(|| self.rests.pop_front())
    }

    /// Notes what a step has done.
    pub fn done(&mut self, step: &Step, outcome: Outcome) {
        match (step, &outcome) {
            (Step::Rewrite(table, _), Outcome::Done | Outcome::Left(_)) => {
                self.deleted.remove(table);
            }
            (Step::Flush(table), _) => {
                if let Some(deleted) = self.deleted.get_mut(table) {
                    deleted.written += deleted.rows;
                }
            }
            _ => {}
        }
        if let Outcome::Left(rest) = outcome {
            self.rests.push_back(rest);
        }
    }

    fn plan(&mut self, state: &str, options: &LakeOptions, now: Instant) {
        let is_due = |changed: &Changed| {
            changed.commits >= COMMITS || now.duration_since(changed.since) >= AT_THE_LATEST
        };
        let due = self.changed.iter().filter(|(_, changed)| is_due(changed));
        let due = due.min_by_key(|(_, changed)| changed.since);
        if let Some(table) = due.map(|(table, _)| table.clone()) {
            self.changed.remove(&table);
            self.queue.extend(self.steps_of(&table));
            return;
        }

        let is_worn = |deleted: &Deleted| deleted.rows - deleted.looked_at >= DELETED_ROWS;
        if let Some((table, deleted)) = self.deleted.iter_mut().find(|(_, it)| is_worn(it)) {
            deleted.looked_at = deleted.rows;
            let worn = Worn::Written(deleted.written);
            // Also the deletions that are in the catalog are then in files, where they are counted.
            let steps = [Step::Flush(table.clone()), Step::Rewrite(table.clone(), worn)];
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
            self.queue.extend([Step::Expire, Step::Clean]);
        }
    }

    fn steps_of(&self, table: &QualifiedName) -> [Step; 3] {
        let written = self.deleted.get(table).map_or(0, |deleted| deleted.written);
        let worn = Worn::Written(written);
        [Step::Flush(table.clone()), Step::Rewrite(table.clone(), worn), Step::Merge(table.clone())]
    }

    /// Returns every step for these tables, as for an operator who asks for them: every file is
    /// written again of which rows are deleted.
    pub fn all_steps(&mut self, state: &str, tables: Vec<QualifiedName>) -> Vec<Step> {
        (self.changed, self.deleted) = (BTreeMap::new(), BTreeMap::new());
        self.queue.clear();
        self.rests.clear();
        self.state_commits = 0;
        let of_table = |table: QualifiedName| {
            let rewrite = Step::Rewrite(table.clone(), Worn::Part(0.0, u64::MAX));
            [Step::Flush(table.clone()), rewrite, Step::Merge(table)]
        };
        let mut steps: Vec<Step> = tables.into_iter().flat_map(of_table).collect();
        let state = Step::Prune(state.to_owned());
        steps.extend([Step::Expire, state, Step::Clean, Step::Orphans]);
        steps
    }
}

/// What a step has done.
#[derive(Debug, PartialEq)]
pub enum Outcome {
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
    ) -> Result<Outcome, TargetError> {
        let older =
            |time: Duration| format!("older_than => now() - INTERVAL {} SECOND", time.as_secs());
        match self {
            Self::Flush(table) => {
                flush(connection, table)?;
                reached("upkeep.flushed");
            }
            Self::Rewrite(table, worn) => {
                let outcome = rewrite(connection, table, *worn)?;
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
                // Never beside a transaction of another writer that is open for longer.
                let kept = options.keep_snapshots.max(options.clean_after);
                call(connection, "expire_snapshots", &older(kept))?;
                reached("upkeep.expired");
            }
            Self::Clean => {
                call(connection, "cleanup_old_files", &older(options.clean_after))?;
                reached("upkeep.cleaned");
            }
            Self::Orphans => {
                call(connection, "delete_orphaned_files", &older(options.clean_after))?;
                reached("upkeep.ended");
            }
        }
        Ok(Outcome::Done)
    }
}

/// Calls a function of DuckLake. Not prepared before: DuckLake scans a table only in the
/// transaction that planned the scan.
fn call(connection: &TargetConnection, function: &str, arguments: &str) -> Result<(), TargetError> {
    let call = format!("CALL ducklake_{function}('{CATALOG}', {arguments})");
    Ok(connection.execute_batch(&call)?)
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
    worn: Worn,
) -> Result<Outcome, TargetError> {
    let found = files::of_table(connection, table)?;
    let (least, most_bytes) = match worn {
        Worn::Written(written) => {
            let least = files::worn_part(&found, written);
            // More may be worn by the end, which is the work of another time.
            (least, files::worn_bytes(&found, least))
        }
        Worn::Part(part, bytes) => (part, bytes),
    };
    let Some(portion) = files::worn(&found, least) else { return Ok(Outcome::Idle) };

    let (name, schema) = (literal(&table.name), literal(&table.schema));
    let part = portion.deleted_part;
    let arguments = format!("{name}, schema => {schema}, delete_threshold => {part:.12}");
    call(connection, "rewrite_data_files", &arguments)?;
    if files::of_table(connection, table)? == found {
        return Ok(Outcome::Idle);
    }

    let left = most_bytes.saturating_sub(portion.bytes);
    let rest = Step::Rewrite(table.clone(), Worn::Part(least, left));
    Ok(if portion.is_last || left == 0 { Outcome::Done } else { Outcome::Left(rest) })
}

/// Merges small files into one.
fn merge(
    connection: &TargetConnection,
    table: &QualifiedName,
    options: &LakeOptions,
) -> Result<Outcome, TargetError> {
    let is_wanted = |files: &[DataFile]| !files::mergeable(files, options.file_bytes).is_empty();
    if !is_wanted(&files::of_table(connection, table)?) {
        return Ok(Outcome::Idle);
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
            return Ok(Outcome::Left(Step::Merge(table.clone())));
        }
    }
    Ok(Outcome::Idle)
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
        connection.execute_batch(&format!(
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

    let catalog_bytes = if options.catalog.starts_with("ducklake:postgres:") {
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

    fn drain(upkeep: &mut Upkeep, options: &LakeOptions, now: Instant) -> Vec<Step> {
        std::iter::from_fn(|| upkeep.next("_rhei", options, now)).collect()
    }

    #[test]
    fn a_table_is_looked_after_when_many_commits_or_much_time_have_passed() {
        let (options, mut upkeep, start) = (options(86_400), Upkeep::new(), Instant::now());
        let orders = QualifiedName::new("public", "orders");
        let steps = [
            Step::Flush(orders.clone()),
            Step::Rewrite(orders.clone(), Worn::Written(0)),
            Step::Merge(orders.clone()),
        ];
        drain(&mut upkeep, &options, start);

        upkeep.note([(&orders, 0)].into_iter());
        assert_eq!(drain(&mut upkeep, &options, start), []);
        let later = start + AT_THE_LATEST + Duration::from_secs(1);
        assert_eq!(drain(&mut upkeep, &options, later), steps);

        (0..COMMITS).for_each(|_| upkeep.note([(&orders, 0)].into_iter()));
        assert_eq!(drain(&mut upkeep, &options, later), steps);
        assert_eq!(drain(&mut upkeep, &options, later), []);

        upkeep.want(LeftBehind { tables: vec![orders.clone()], is_state_full: false });
        assert_eq!(drain(&mut upkeep, &options, later), steps);
    }

    #[test]
    fn files_are_looked_at_when_many_rows_were_deleted() {
        let (options, mut upkeep, now) = (options(86_400), Upkeep::new(), Instant::now());
        let orders = QualifiedName::new("public", "orders");
        drain(&mut upkeep, &options, now);
        let rewrite = |written| Step::Rewrite(orders.clone(), Worn::Written(written));
        let steps = |written| [Step::Flush(orders.clone()), rewrite(written)];
        let half = DELETED_ROWS / 2;

        upkeep.note([(&orders, half)].into_iter());
        assert_eq!(drain(&mut upkeep, &options, now), []);
        upkeep.note([(&orders, half)].into_iter());
        assert_eq!(drain(&mut upkeep, &options, now), steps(3 * half));
        assert_eq!(drain(&mut upkeep, &options, now), []);

        upkeep.done(&rewrite(3 * half), Outcome::Idle);
        upkeep.note([(&orders, 2 * half)].into_iter());
        assert_eq!(drain(&mut upkeep, &options, now), steps(7 * half));

        let rest = Step::Rewrite(orders.clone(), Worn::Part(0.1, 7));
        upkeep.done(&rewrite(7 * half), Outcome::Left(rest.clone()));
        assert_eq!(drain(&mut upkeep, &options, now), [rest]);
        upkeep.note([(&orders, 2 * half)].into_iter());
        assert_eq!(drain(&mut upkeep, &options, now), steps(2 * half));
    }

    #[test]
    fn snapshots_expire_ten_times_while_they_are_kept() {
        let (options, mut upkeep, start) = (options(100), Upkeep::new(), Instant::now());
        let all = [Step::Expire, Step::Clean];
        assert_eq!(drain(&mut upkeep, &options, start), all);
        assert_eq!(drain(&mut upkeep, &options, start + Duration::from_secs(9)), []);
        assert_eq!(drain(&mut upkeep, &options, start + Duration::from_secs(10)), all);
    }
}
