//! The upkeep of a lake: without it each commit would leave files and snapshots behind for ever.
//!
//! One step at a time, between two transactions of the writer and never beside an open one:
//! compaction beside an open transaction makes its commit fail, and expiry beside one would lose
//! rows that it deletes. Only tables of this copy are compacted, since others may belong to another
//! writer. A step that a crash cuts off leaves a readable lake, and at most files that no snapshot
//! names; the last step finds those.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::LakeOptions;
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
/// The same for the state, which every commit changes.
const STATE_COMMITS: u32 = 1000;
/// A file is written again when this part of its rows is deleted.
const DELETED_PART: f64 = 0.1;
/// The most files that one step merges, so that the stream does not wait for long.
const MERGED_FILES: u32 = 64;
/// How often snapshots expire, unless they are kept for less than ten times as long.
const EXPIRY: Duration = Duration::from_secs(600);
const SHORTEST_EXPIRY: Duration = Duration::from_secs(5);

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Writes what is inlined in the catalog into a file.
    Flush(QualifiedName),
    /// Writes files again of whose rows many are deleted.
    Rewrite(QualifiedName),
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

/// What has changed since a table was looked after.
#[derive(Debug, Clone, Copy)]
struct Changed {
    since: Instant,
    commits: u32,
}

/// What is due, and when.
#[derive(Debug)]
pub struct Upkeep {
    changed: BTreeMap<QualifiedName, Changed>,
    state_commits: u32,
    queue: VecDeque<Step>,
    expired_at: Option<Instant>,
}

impl Upkeep {
    pub fn new() -> Self {
        Self {
            changed: BTreeMap::new(),
            state_commits: 0,
            queue: VecDeque::new(),
            expired_at: None,
        }
    }

    /// Notes that a commit has changed these tables.
    pub fn note<'a>(&mut self, tables: impl Iterator<Item = &'a QualifiedName>) {
        self.state_commits += 1;
        for table in tables {
            match self.changed.get_mut(table) {
                Some(changed) => changed.commits += 1,
                None => {
                    let changed = Changed { since: Instant::now(), commits: 1 };
                    self.changed.insert(table.clone(), changed);
                }
            }
        }
    }

    /// Returns the next step, if one is due at `now`.
    pub fn next(&mut self, state: &str, options: &LakeOptions, now: Instant) -> Option<Step> {
        if self.queue.is_empty() {
            self.plan(state, options, now);
        }
        self.queue.pop_front()
    }

    fn plan(&mut self, state: &str, options: &LakeOptions, now: Instant) {
        let is_due = |changed: &Changed| {
            changed.commits >= COMMITS || now.duration_since(changed.since) >= AT_THE_LATEST
        };
        let due = self.changed.iter().find(|(_, changed)| is_due(changed));
        if let Some(table) = due.map(|(table, _)| table.clone()) {
            self.changed.remove(&table);
            self.queue.extend(steps_of(&table));
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

    /// Returns every step for these tables, as for an operator who asks for them.
    pub fn all_steps(&mut self, state: &str, tables: Vec<QualifiedName>) -> Vec<Step> {
        self.changed.clear();
        self.queue.clear();
        self.state_commits = 0;
        let mut steps: Vec<Step> = tables.iter().flat_map(steps_of).collect();
        let state = Step::Prune(state.to_owned());
        steps.extend([Step::Expire, state, Step::Clean, Step::Orphans]);
        steps
    }
}

fn steps_of(table: &QualifiedName) -> [Step; 3] {
    [Step::Flush(table.clone()), Step::Rewrite(table.clone()), Step::Merge(table.clone())]
}

impl Step {
    /// Runs the step, in transactions of its own.
    pub fn run(
        &self,
        connection: &TargetConnection,
        options: &LakeOptions,
    ) -> Result<(), TargetError> {
        // Not prepared before: DuckLake scans a table only in the transaction that planned the
        // scan.
        let call = |call: String| -> Result<(), TargetError> {
            Ok(connection.execute_batch(&format!("CALL {call}"))?)
        };
        let seconds = |time: Duration| format!("now() - INTERVAL {} SECOND", time.as_secs());
        let of = |table: &QualifiedName| {
            format!("'{CATALOG}', {}, schema => {}", literal(&table.name), literal(&table.schema))
        };

        match self {
            Self::Flush(table) => {
                call(format!(
                    "ducklake_flush_inlined_data('{CATALOG}', schema_name => {}, table_name => {})",
                    literal(&table.schema),
                    literal(&table.name)
                ))?;
                reached("upkeep.flushed");
            }
            Self::Rewrite(table) => {
                call(format!(
                    "ducklake_rewrite_data_files({}, delete_threshold => {DELETED_PART})",
                    of(table)
                ))?;
                reached("upkeep.rewritten");
            }
            Self::Merge(table) => {
                call(format!(
                    "ducklake_merge_adjacent_files({}, max_compacted_files => {MERGED_FILES})",
                    of(table)
                ))?;
                reached("upkeep.merged");
            }
            Self::Prune(state) => prune(connection, state)?,
            Self::Expire => {
                // Never beside a transaction of another writer that is open for longer.
                let before = seconds(options.keep_snapshots.max(options.clean_after));
                call(format!("ducklake_expire_snapshots('{CATALOG}', older_than => {before})"))?;
                reached("upkeep.expired");
            }
            Self::Clean => {
                let before = seconds(options.clean_after);
                call(format!("ducklake_cleanup_old_files('{CATALOG}', older_than => {before})"))?;
                reached("upkeep.cleaned");
            }
            Self::Orphans => {
                let before = seconds(options.clean_after);
                call(format!(
                    "ducklake_delete_orphaned_files('{CATALOG}', older_than => {before})"
                ))?;
                reached("upkeep.ended");
            }
        }
        Ok(())
    }
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
            "SELECT coalesce(sum(file_count), 0)::UBIGINT, \
             coalesce(sum(delete_file_count), 0)::UBIGINT, \
             coalesce(sum(file_size_bytes + delete_file_size_bytes), 0)::UBIGINT \
             FROM {CATALOG}.table_info()"
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
        drain(&mut upkeep, &options, start);

        upkeep.note([&orders].into_iter());
        assert_eq!(drain(&mut upkeep, &options, start), []);
        let later = start + AT_THE_LATEST + Duration::from_secs(1);
        assert_eq!(drain(&mut upkeep, &options, later), steps_of(&orders));

        (0..COMMITS).for_each(|_| upkeep.note([&orders].into_iter()));
        assert_eq!(drain(&mut upkeep, &options, later), steps_of(&orders));
        assert_eq!(drain(&mut upkeep, &options, later), []);
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
