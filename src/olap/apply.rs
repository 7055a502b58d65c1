//! A change batch becomes statements: stage, read unchanged TOAST, DELETE USING, INSERT. All tables
//! in one transaction.
//!
//! Staged keys are unique and each must hit exactly one row. DuckDB would let any other number pass
//! in silence, so the counts are compared; a difference means that the copy has diverged, and
//! nothing of the batch is kept.

use std::{collections::BTreeSet, time::Instant};

use arrow::record_batch::RecordBatch;
use duckdb::Connection;

use super::{
    Applied, DuckDb, TableState, TargetError, jobs, names, pending,
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
        COUNT_COLUMN, ChangeBatch, Deletes, ORIGIN_PREFIX, Pause, Remedy, RowCounts, TableChanges,
        TableSpec,
    },
    checkpoint::DurableLsn,
    failpoint::reached,
};

const PATCHED: &str = "_rhei_patched";

/// What a transaction has done so far: one batch, or several parts of a source transaction.
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

/// The rows of a batch; the first part of the transaction of [`super::ApplyTarget::apply`].
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
            remedy @ (Remedy::Operator | Remedy::AllowNulls) => {
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

/// The checkpoint and the record of the cycle; its second part.
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
    state::put_checkpoint(&target.connection, &mut pipeline, checkpoint)?;
    let mut pruned = 0;
    if !batch.is_idle() || counts != RowCounts::default() {
        let duration_ms = started.elapsed().as_millis() as u64;
        let source_transactions = batch.source_transactions;
        let cycle = Cycle { source_transactions, counts, deleted_rows, inserted_rows, duration_ms };
        pruned = state::put_cycle(&target.connection, checkpoint, &cycle)?;
    }
    target.pipeline = Some(pipeline);
    // Handed out by `ApplyTarget::apply` only after COMMIT has returned.
    Ok(Applied {
        durable: DurableLsn::committed(checkpoint.lsn),
        deleted_rows,
        inserted_rows,
        pruned,
    })
}

/// Changes of a table that is still being copied. A TRUNCATE ends its copy: whatever the snapshot
/// holds is gone, and all that there is comes by the stream.
fn capture_pending(
    target: &mut DuckDb,
    changes: &TableChanges,
    is_loaded: bool,
) -> Result<(), TargetError> {
    let spec = &changes.table;
    if changes.truncate.is_some() {
        // A chunk that is being loaded meanwhile fails at its commit, since its table is gone.
        target.connection.execute_batch(&names::drop_table(&names::shadow_of(&spec.target)))?;
        target.connection.execute_batch(&names::create_shadow(spec, &BTreeSet::new()))?;
        target.drop_pending(spec.oid)?;
        jobs::cancel(&target.connection, &[spec.oid], "the table was truncated")?;
    }

    // Most tables that are copied do not change meanwhile.
    if !changes.has_rows() {
        return Ok(());
    }
    if !target.tables()?.has_pending(spec.oid) {
        target.connection.execute_batch(&pending::create_statement(spec))?;
        target.tables()?.set_pending(spec.oid, true);
    }
    pending::capture(&target.connection, changes, is_loaded || changes.truncate.is_some())
}

/// Returns rows deleted and inserted.
fn apply_table(
    connection: &Connection,
    changes: &TableChanges,
    views: &StagingViews,
) -> Result<(u64, u64), TargetError> {
    let spec = &changes.table;
    let target = names::table(&spec.target);
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    let names = column_list(spec, &all);
    let mut deleted = 0;
    if changes.truncate.is_some() {
        deleted += connection.execute(&format!("DELETE FROM {target}"), [])? as u64;
    }
    // Read before anything is deleted, under the keys that the rows had before the batch.
    let mut patched = 0;
    if let Some(patch) = &changes.patch {
        stage_patch(connection, spec, patch)?;
        let values: Vec<String> = spec
            .columns
            .iter()
            .enumerate()
            .map(|(at, column)| {
                let name = names::quoted(&column.target_name);
                let value = patched_value(patch, column, at, &format!("t.{name}"));
                format!("{value} AS {name}")
            })
            .collect();
        let found = connection.execute(
            &format!(
                "CREATE TEMP TABLE {PATCHED} AS SELECT {} FROM {STAGE} s JOIN {target} t ON {}",
                values.join(", "),
                key_match(spec, ORIGIN_PREFIX)
            ),
            [],
        )? as u64;
        connection.execute_batch(&format!("DROP TABLE {STAGE}"))?;
        let found: u64 = match found {
            0 => connection
                .query_row(&format!("SELECT count(*) FROM {PATCHED}"), [], |row| row.get(0))?,
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
        patched = found;
    }
    let (staged, rows) = match &changes.deletes {
        Deletes::ByKey(batches) => {
            (total(batches), delete_by_key(connection, spec, &target, batches, views)?)
        }
        Deletes::Rows(batches) => delete_rows(connection, spec, &target, batches)?,
    };
    if staged != rows {
        return Err(TargetError::Diverged {
            what: "rows to delete",
            expected: staged,
            found: rows,
        });
    }
    deleted += rows;
    let mut inserted = 0;
    if total(&changes.inserts) > 0 {
        inserted += views.read(connection, (spec, Rows::Inserts), &changes.inserts, |rows| {
            let values = stage_values(spec, &all);
            let insert = format!("INSERT INTO {target} ({names}) SELECT {values} FROM {rows} s");
            // Planned once: with a few rows that takes longer than running it. A DELETE is planned
            // each time, since which side of its join is the smaller one may change; and staged
            // rows are in another table each time.
            let inserted = if rows == STAGE {
                connection.execute(&insert, [])?
            } else {
                connection.prepare_cached(&insert)?.execute([])?
            };
            Ok(inserted as u64)
        })?;
    }
    if changes.patch.is_some() {
        inserted += connection
            .execute(&format!("INSERT INTO {target} ({names}) SELECT {names} FROM {PATCHED}"), [])?
            as u64;
        connection.execute_batch(&format!("DROP TABLE {PATCHED}"))?;
    }
    let expected = total(&changes.inserts) + patched;
    if inserted != expected {
        return Err(TargetError::Diverged { what: "rows to insert", expected, found: inserted });
    }
    Ok((deleted, inserted))
}

fn delete_by_key(
    connection: &Connection,
    spec: &TableSpec,
    target: &str,
    batches: &[RecordBatch],
    views: &StagingViews,
) -> Result<u64, TargetError> {
    if total(batches) == 0 {
        return Ok(0);
    }
    views.read(connection, (spec, Rows::Keys), batches, |keys| {
        let matched = key_match(spec, "");
        Ok(connection
            .execute(&format!("DELETE FROM {target} t USING {keys} s WHERE {matched}"), [])?
            as u64)
    })
}

/// Deletes exactly so many equal rows as each staged row says (trap 54). Returns staged and
/// deleted.
fn delete_rows(
    connection: &Connection,
    spec: &TableSpec,
    target: &str,
    batches: &[RecordBatch],
) -> Result<(u64, u64), TargetError> {
    if total(batches) == 0 {
        return Ok((0, 0));
    }
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    let mut columns = stage_columns(spec, &all, "");
    columns.push((names::quoted(COUNT_COLUMN), "BIGINT".to_owned()));
    stage(connection, &columns, batches)?;
    let count = names::quoted(COUNT_COLUMN);
    let staged: i64 =
        connection.query_row(&format!("SELECT sum({count})::BIGINT FROM {STAGE}"), [], |row| {
            row.get(0)
        })?;
    let staged_value = |at: usize| {
        spec.columns.get(at).map_or_else(String::new, |column| {
            column.mapping.stage_expr(&format!("s.{}", names::quoted(&column.target_name)))
        })
    };
    let deleted = delete_counted(connection, spec, target, STAGE, &count, staged_value)?;
    connection.execute_batch(&format!("DROP TABLE {STAGE}"))?;
    Ok((u64::try_from(staged).unwrap_or_default(), deleted))
}

/// Deletes for each row `s` of `staged` so many rows `t` that equal it; `value` gives the
/// expression of a column of `s`. Equal rows that are staged apart are numbered together.
///
/// Rows are equal that print alike, as at the source. 0 and -0 are equal to DuckDB, and two rows to
/// the source: those that are the same to the last bit go first. The others are not refused, since
/// DuckDB keeps one of the two where a stretch of a column holds nothing else.
pub(super) fn delete_counted(
    connection: &Connection,
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
            "DELETE FROM {target} WHERE rowid IN (SELECT row FROM (SELECT row, wanted, \
             row_number() OVER (PARTITION BY equals \
             ORDER BY is_other, row) AS number FROM (SELECT t.rowid AS row, sum(s.{count}) AS \
             wanted, min(s.rowid) AS equals, \
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

/// How many rows each of these tables has.
pub(super) fn counts(
    connection: &Connection,
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
