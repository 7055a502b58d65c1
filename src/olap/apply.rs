//! Turns a change batch into statements: stage, read unchanged TOAST values, DELETE USING, INSERT.
//! One transaction holds all tables.
//!
//! Staged keys are unique and each key must match exactly one row. DuckDB would accept any other
//! number in silence, so this module compares the counts; a difference means that the copy has
//! diverged, and the transaction keeps nothing of the batch.

use std::{collections::BTreeSet, time::Instant};

use arrow::record_batch::RecordBatch;

use super::{
    Applied, DuckDb, TableState, TargetError,
    connection::TargetConnection,
    jobs, names, pending,
    reshape::alter_table,
    stage::{
        Rows, STAGE, StagingViews, column_list, key_match, patched_value, stage, stage_columns,
        stage_patch, stage_values, total,
    },
    state::{self, Cycle},
};
use crate::{
    Checkpoint,
    change::{
        COUNT_COLUMN, ChangeBatch, Deletes, ORIGIN_PREFIX, Patch, Pause, Remedy, RowCounts,
        TableChanges, TableSpec,
    },
    checkpoint::DurableLsn,
    failpoint::reached,
};

const PATCHED: &str = "_rhei_patched";

/// What a transaction has done until now: one batch, or several parts of a source transaction.
#[derive(Debug)]
pub(super) struct Progress {
    started: Instant,
    counts: RowCounts,
    pub(super) deleted_rows: u64,
    pub(super) inserted_rows: u64,
    /// A table that is being copied was truncated, or failed.
    pub(super) ends_a_copy: bool,
}

impl Default for Progress {
    fn default() -> Self {
        let (deleted_rows, inserted_rows, ends_a_copy) = (0, 0, false);
        Self {
            started: Instant::now(),
            counts: RowCounts::default(),
            deleted_rows,
            inserted_rows,
            ends_a_copy,
        }
    }
}

/// Applies the rows of a batch; the first part of the transaction of [`super::ApplyTarget::apply`].
pub(super) fn apply(
    target: &mut DuckDb,
    batch: &ChangeBatch,
    progress: &mut Progress,
) -> Result<(), TargetError> {
    // ALTER comes before any other statement on a table of this transaction (trap 69).
    for reshape in &batch.schema_changes {
        alter_table(&target.connection, reshape).map_err(|source| source.of(&reshape.after))?;
        target.tables()?.put_shape(&reshape.after);
        reached("apply.reshaped");
    }

    for changes in &batch.tables {
        progress.counts += changes.counts;
        if let Some(xid) = changes.truncate {
            target.tables()?.set_truncated(changes.table.oid, xid);
        }

        if let Some(&is_loaded) = target.copying.get(&changes.table.oid) {
            progress.ends_a_copy |= changes.truncate.is_some();
            capture_pending(target, changes, is_loaded)
                .map_err(|source| source.of(&changes.table))?;
            if changes.truncate.is_some() {
                target.tables()?.set_state(changes.table.oid, TableState::CatchingUp, Some(0));
            }
            continue;
        }

        let (deleted, inserted) = apply_table(&target.connection, changes, &target.views)
            .map_err(|source| source.of(&changes.table))?;
        progress.deleted_rows += deleted;
        progress.inserted_rows += inserted;
    }

    for failure in &batch.failed {
        let state = match failure.remedy {
            remedy @ (Remedy::Operator | Remedy::AllowNulls | Remedy::NextStart) => {
                TableState::Error(Pause { reason: failure.reason.clone(), remedy })
            }
            Remedy::CopyAgain | Remedy::CopyAltered => TableState::Resync,
        };

        if target.copying.contains_key(&failure.oid) {
            progress.ends_a_copy = true;
            target.drop_shadows(&[failure.oid])?;
        }
        target.tables()?.set_state(failure.oid, state, None);
    }
    Ok(())
}

/// Writes the checkpoint and the record of the cycle; the second part of that transaction.
pub(super) fn finish(
    target: &mut DuckDb,
    batch: &ChangeBatch,
    checkpoint: &Checkpoint,
    progress: &Progress,
) -> Result<Applied, TargetError> {
    let Some(mut pipeline) = target.pipeline.clone() else {
        return Err(TargetError::Corrupt {
            reason: "changes came before the pipeline was set up".to_owned(),
        });
    };

    let before = pipeline.checkpoint.lsn;
    if checkpoint.lsn < before {
        return Err(TargetError::Backwards { from: before, to: checkpoint.lsn });
    }

    let Progress { started, counts, deleted_rows, inserted_rows, .. } = *progress;
    pipeline.checkpoint = *checkpoint;
    let fence = target.lake.as_mut().map(|lake| &mut lake.fence);
    state::put_pipeline(&target.connection, &pipeline, fence)?;
    let mut pruned = 0;

    if !batch.is_idle() || counts != RowCounts::default() {
        let duration_ms = started.elapsed().as_millis() as u64;
        let source_transactions = batch.source_transactions;
        let cycle = Cycle { source_transactions, counts, deleted_rows, inserted_rows, duration_ms };
        match &mut target.lake {
            Some(lake) => lake.describe(&cycle),
            None => pruned = state::put_cycle(&target.connection, checkpoint, &cycle)?,
        }
    }

    target.pipeline = Some(pipeline);
    // `ApplyTarget::apply` hands this out only after COMMIT has returned.
    Ok(Applied {
        durable: DurableLsn::committed(checkpoint.lsn),
        deleted_rows,
        inserted_rows,
        pruned,
    })
}

/// Captures the changes of a table that is still being copied. A TRUNCATE ends the copy: every row
/// of the snapshot is gone, and all rows that exist come through the stream.
fn capture_pending(
    target: &mut DuckDb,
    changes: &TableChanges,
    is_loaded: bool,
) -> Result<(), TargetError> {
    let spec = &changes.table;
    if changes.truncate.is_some() {
        // A loader that is loading a chunk meanwhile fails at its commit: its table is gone, or, in
        // a lake, the job that it would mark as done.
        let shadow = names::shadow_of(&spec.target);
        target.connection.execute_batch(&if target.lake.is_some() {
            format!("DELETE FROM {}", names::table(&shadow))
        } else {
            let create = names::create_shadow(spec, &BTreeSet::new());
            format!("{} {create}", names::drop_table(&shadow))
        })?;
        target.drop_pending(spec.oid)?;
        jobs::cancel(&target.connection, &[spec.oid], "the table was truncated")?;
    }

    // Most tables do not change while they are copied.
    if !changes.has_rows() {
        return Ok(());
    }

    if !target.tables()?.has_pending(spec.oid) {
        pending::create_table(&target.connection, spec)?;
        target.tables()?.set_pending(spec.oid, true);
    }

    pending::capture(&target.connection, changes, is_loaded || changes.truncate.is_some())
}

/// Applies the changes of one table. Returns the numbers of deleted and inserted rows.
fn apply_table(
    connection: &TargetConnection,
    changes: &TableChanges,
    views: &StagingViews,
) -> Result<(u64, u64), TargetError> {
    let table = TargetTable::new(connection, &changes.table, views);

    let mut deleted = 0;
    if changes.truncate.is_some() {
        deleted += table.delete_all()?;
    }

    // The unchanged values are read before any row is deleted, under the keys that the rows had
    // before the batch.
    let mut patched = 0;
    if let Some(patch) = &changes.patch {
        patched = table.read_patched(patch)?;
    }

    deleted += table.delete(&changes.deletes)?;
    let mut inserted = table.insert(&changes.inserts)?;
    if changes.patch.is_some() {
        inserted += table.insert_patched()?;
    }

    let expected = total(&changes.inserts) + patched;
    if inserted != expected {
        return Err(TargetError::Diverged { what: "rows to insert", expected, found: inserted });
    }
    Ok((deleted, inserted))
}

/// A table of the target, and the statements that bring changes into it.
struct TargetTable<'a> {
    connection: &'a TargetConnection,
    spec: &'a TableSpec,
    views: &'a StagingViews,
    /// The full name, as SQL spells it.
    name: String,
    /// The indexes of all columns.
    all: Vec<usize>,
}

impl<'a> TargetTable<'a> {
    fn new(connection: &'a TargetConnection, spec: &'a TableSpec, views: &'a StagingViews) -> Self {
        let name = names::table(&spec.target);
        Self { connection, spec, views, name, all: (0..spec.columns.len()).collect() }
    }

    fn delete_all(&self) -> Result<u64, TargetError> {
        Ok(self.connection.execute(&format!("DELETE FROM {}", self.name), [])? as u64)
    }

    /// Makes the temporary table of the patched rows, whose unchanged values come from this table.
    /// Returns the number of these rows.
    fn read_patched(&self, patch: &Patch) -> Result<u64, TargetError> {
        stage_patch(self.connection, self.spec, patch)?;
        let values: Vec<String> = self
            .spec
            .columns
            .iter()
            .enumerate()
            .map(|(at, column)| {
                let name = names::quoted(&column.target_name);
                let value = patched_value(patch, column, at, &format!("t.{name}"));
                format!("{value} AS {name}")
            })
            .collect();

        let found = self.connection.execute(
            &format!(
                "CREATE TEMP TABLE {PATCHED} AS SELECT {} FROM {STAGE} s JOIN {} t ON {}",
                values.join(", "),
                self.name,
                key_match(self.spec, ORIGIN_PREFIX)
            ),
            [],
        )? as u64;

        self.connection.execute_batch(&format!("DROP TABLE {STAGE}"))?;
        let found: u64 = match found {
            0 => self.connection.query_row(
                &format!("SELECT count(*) FROM {PATCHED}"),
                [],
                |row| row.get(0),
            )?,
            found => found,
        };

        let expected = patch.rows.num_rows() as u64;
        if found != expected {
            return Err(TargetError::Diverged {
                what: "rows with unchanged values",
                expected,
                found,
            });
        }
        Ok(found)
    }

    /// Deletes rows, each of which must be there. Returns their number.
    fn delete(&self, deletes: &Deletes) -> Result<u64, TargetError> {
        let (staged, rows) = match deletes {
            Deletes::ByKey(batches) => (total(batches), self.delete_by_key(batches)?),
            Deletes::Rows(batches) => self.delete_rows(batches)?,
        };

        if staged != rows {
            return Err(TargetError::Diverged {
                what: "rows to delete",
                expected: staged,
                found: rows,
            });
        }
        Ok(rows)
    }

    fn delete_by_key(&self, batches: &[RecordBatch]) -> Result<u64, TargetError> {
        if total(batches) == 0 {
            return Ok(0);
        }

        self.views.read(self.connection, (self.spec, Rows::Keys), batches, |keys| {
            let (target, matched) = (&self.name, key_match(self.spec, ""));
            Ok(self
                .connection
                .execute(&format!("DELETE FROM {target} t USING {keys} s WHERE {matched}"), [])?
                as u64)
        })
    }

    /// Deletes exactly as many equal rows as each staged row states (trap 54). Returns the numbers
    /// of staged and deleted rows.
    fn delete_rows(&self, batches: &[RecordBatch]) -> Result<(u64, u64), TargetError> {
        if total(batches) == 0 {
            return Ok((0, 0));
        }

        let Self { connection, spec, .. } = *self;
        let mut columns = stage_columns(spec, &self.all, "");
        columns.push((names::quoted(COUNT_COLUMN), "BIGINT".to_owned()));
        stage(connection, &columns, batches)?;

        let count = names::quoted(COUNT_COLUMN);
        let staged: i64 = connection.query_row(
            &format!("SELECT sum({count})::BIGINT FROM {STAGE}"),
            [],
            |row| row.get(0),
        )?;

        let staged_value = |at: usize| {
            spec.columns.get(at).map_or_else(String::new, |column| {
                column.mapping.stage_expr(&format!("s.{}", names::quoted(&column.target_name)))
            })
        };

        let deleted = delete_counted(connection, spec, &self.name, STAGE, &count, staged_value)?;
        connection.execute_batch(&format!("DROP TABLE {STAGE}"))?;
        Ok((u64::try_from(staged).unwrap_or_default(), deleted))
    }

    fn insert(&self, batches: &[RecordBatch]) -> Result<u64, TargetError> {
        if total(batches) == 0 {
            return Ok(0);
        }

        self.views.read(self.connection, (self.spec, Rows::Inserts), batches, |rows| {
            let (target, names) = (&self.name, column_list(self.spec, &self.all));
            let values = stage_values(self.spec, &self.all);
            let insert = format!("INSERT INTO {target} ({names}) SELECT {values} FROM {rows} s");

            // DuckDB keeps the plan of this INSERT: for a few rows planning takes longer than
            // running. DuckDB plans a DELETE each time, since the smaller side of its join may
            // change; and staged rows are in another table each time.
            let inserted = if rows == STAGE || self.connection.is_lake() {
                self.connection.execute(&insert, [])?
            } else {
                self.connection.prepare_cached(&insert)?.execute([])?
            };

            Ok(inserted as u64)
        })
    }

    /// Inserts the rows of the temporary table that [`Self::read_patched`] made.
    fn insert_patched(&self) -> Result<u64, TargetError> {
        let (target, names) = (&self.name, column_list(self.spec, &self.all));
        let inserted = self
            .connection
            .execute(&format!("INSERT INTO {target} ({names}) SELECT {names} FROM {PATCHED}"), [])?
            as u64;

        self.connection.execute_batch(&format!("DROP TABLE {PATCHED}"))?;
        Ok(inserted)
    }
}

/// Deletes, for each row `s` of `staged`, as many equal rows `t` as the column `count` states;
/// `value` gives the expression of a column of `s`. Equal rows that are staged separately are
/// numbered together.
///
/// Two rows are equal if they print alike, as at the source. 0 and -0 are equal to DuckDB, but two
/// different rows to the source: rows that are the same to the last bit are deleted first. The
/// other rows are not refused, since DuckDB keeps only one of 0 and -0 where a stretch of a column
/// holds nothing else.
pub(super) fn delete_counted(
    connection: &TargetConnection,
    spec: &TableSpec,
    target: &str,
    staged: &str,
    count: &str,
    value: impl Fn(usize) -> String,
) -> Result<u64, TargetError> {
    let (mut equal, mut bits, mut staged_bits) = (Vec::new(), Vec::new(), Vec::new());

    for (at, column) in spec.columns.iter().enumerate() {
        let (stored, staged) = (format!("t.{}", names::quoted(&column.target_name)), value(at));
        if ["REAL", "FLOAT", "DOUBLE"]
            .iter()
            .any(|float| column.mapping.target_type.contains(float))
        {
            bits.push(format!("{stored}::VARCHAR"));
            staged_bits.push(format!("{staged}::VARCHAR"));
        }

        equal.push(format!("{stored} IS NOT DISTINCT FROM {staged}"));
        if names::has_coarse_equality(&column.mapping.target_type) {
            equal.push(format!("{stored}::VARCHAR IS NOT DISTINCT FROM ({staged})::VARCHAR"));
        }
    }

    let (bits, staged_bits) =
        (format!("[{}]", bits.join(", ")), format!("[{}]", staged_bits.join(", ")));

    let deleted = connection.execute(
        &format!(
            "DELETE FROM {target} WHERE rowid IN (SELECT row \
             FROM (SELECT row, wanted, row_number() OVER (PARTITION BY equals \
             ORDER BY is_other, row) AS number FROM (SELECT t.rowid AS row, \
             sum(s.{count}) AS wanted, min(s.rowid) AS equals, \
             row_number() OVER (PARTITION BY min(s.rowid), {bits} ORDER BY t.rowid) \
             > coalesce(sum(s.{count}) FILTER ({bits} = {staged_bits}), 0) AS is_other \
             FROM {target} t JOIN {staged} s ON {} GROUP BY t.rowid, {bits})) WHERE number <= \
             wanted)",
            equal.join(" AND ")
        ),
        [],
    )?;

    Ok(deleted as u64)
}

/// Returns the number of rows of each of these tables.
pub(super) fn counts(
    connection: &TargetConnection,
    tables: impl Iterator<Item = String>,
) -> Result<Vec<u64>, TargetError> {
    let each: Vec<String> = tables
        .enumerate()
        .map(|(at, table)| format!("SELECT {at} AS place, count(*) AS n FROM {table}"))
        .collect();
    if each.is_empty() {
        return Ok(Vec::new());
    }

    let mut statement = connection
        .prepare(&format!("SELECT n FROM ({}) ORDER BY place", each.join(" UNION ALL ")))?;
    let counts = statement.query_map([], |row| row.get(0))?;
    Ok(counts.collect::<Result<_, _>>()?)
}
