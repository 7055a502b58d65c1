//! Replaces rows that differ from the source. DuckDB's UPDATE would keep a value that DuckDB takes
//! for equal to the new one (1 month and 30 days), so rows are deleted and inserted.

use std::{cell::RefCell, panic::AssertUnwindSafe};

use arrow::{
    array::{Array, Int64Array},
    record_batch::RecordBatch,
};
use duckdb::params;

use super::{
    DuckDb, Repair, Repaired, TargetError,
    connection::TargetConnection,
    engine::IsWrong,
    names,
    stage::{STAGE, column_list, stage, stage_columns, stage_values, total},
    state::PIPELINE_ID,
};
use crate::{Lsn, change::TableSpec, error::panic_message, failpoint::reached};

/// The temporary table of the rowids of the rows that are deleted.
const WRONG: &str = "_rhei_wrong";

impl DuckDb {
    /// The body of [`super::ApplyTarget::repair`].
    pub(super) fn repair_rows(
        &mut self,
        repair: Repair<'_>,
    ) -> Result<Option<Repaired>, TargetError> {
        self.ensure_attached()?;
        let Repair { checkpoints, table, select, is_wrong, rows } = repair;

        let checkpoint = self.pipeline.as_ref().map(|pipeline| pipeline.checkpoint.lsn);
        let Some(checkpoint) = checkpoint.filter(|lsn| checkpoints.contains(lsn)) else {
            return Ok(None);
        };
        // Parts of a transaction that is open are as of a later position.
        if self.has_open_parts() {
            return Ok(None);
        }

        // A file checkpoint may give rows other rowids, but not under a transaction that has read
        // the table.
        let is_wrong = RefCell::new(is_wrong);
        let repaired = self.transaction(|target| {
            let wrong =
                wrong_rows(&target.connection, table, select, &mut **is_wrong.borrow_mut())?;
            let repaired = replace(&target.connection, table, (&wrong, rows), checkpoint)?;
            reached("repair.committing");
            Ok(repaired)
        })?;

        Ok(Some(repaired))
    }
}

/// Returns the rowids of the rows that are deleted.
fn wrong_rows(
    connection: &TargetConnection,
    table: &TableSpec,
    select: &str,
    is_wrong: IsWrong<'_>,
) -> Result<Vec<i64>, TargetError> {
    let broken = |source| TargetError::Rows { source };
    let query = format!("SELECT rowid, {select} FROM {}", names::table(&table.target));
    let mut statement = connection.prepare(&query)?;
    let mut batches = statement.stream_arrow([])?;

    // The iterator has no way to return an error: it panics when DuckDB fails in the middle.
    let mut next = || {
        std::panic::catch_unwind(AssertUnwindSafe(|| batches.next()))
            .map_err(|panic| broken(panic_message(&*panic).into()))
    };

    let mut wrong = Vec::new();
    while let Some(batch) = next()? {
        let columns: Vec<usize> = (1..batch.num_columns()).collect();
        let selected = batch.project(&columns).map_err(|error| broken(Box::new(error)))?;
        let rowids = batch.column(0).as_any().downcast_ref::<Int64Array>();
        let Some(rowids) = rowids else {
            return Err(broken("DuckDB's rowid is no BIGINT".into()));
        };

        let is_wrong = is_wrong(&selected)?;
        let rowids = rowids.values().iter().zip(is_wrong);
        wrong.extend(rowids.filter(|(_, is_wrong)| *is_wrong).map(|(rowid, _)| *rowid));
    }
    Ok(wrong)
}

/// Deletes the wrong rows, inserts those of the source, and records both.
fn replace(
    connection: &TargetConnection,
    table: &TableSpec,
    (wrong, rows): (&[i64], &[RecordBatch]),
    checkpoint: Lsn,
) -> Result<Repaired, TargetError> {
    let target = names::table(&table.target);

    connection.execute_batch(&format!("CREATE TEMP TABLE {WRONG} (id BIGINT)"))?;
    let mut appender = connection.appender_to_catalog_and_db(WRONG, "temp", "main")?;
    wrong.iter().try_for_each(|rowid| appender.append_row([rowid]))?;
    appender.flush()?;
    drop(appender);

    let is_wrong = format!("rowid IN (SELECT id FROM {WRONG})");
    let deleted = format!("SELECT CAST(t AS VARCHAR) FROM {target} t WHERE t.{is_wrong}");
    record(connection, table, checkpoint, "deleted", &deleted)?;
    let deleted_rows = connection.execute(&format!("DELETE FROM {target} WHERE {is_wrong}"), [])?;
    expect("rows to delete", wrong.len() as u64, deleted_rows as u64)?;

    let all: Vec<usize> = (0..table.columns.len()).collect();
    stage(connection, &stage_columns(table, &all, ""), rows)?;
    let (columns, values) = (column_list(table, &all), stage_values(table, &all));
    let insert = format!("INSERT INTO {target} ({columns}) SELECT {values} FROM {STAGE} s");
    let inserted_rows = connection.execute(&insert, [])?;
    expect("rows to insert", total(rows), inserted_rows as u64)?;

    let named = all.iter().filter_map(|&at| {
        let column = table.columns.get(at)?;
        let name = names::quoted(&column.target_name);
        Some(format!("{} AS {name}", column.mapping.stage_expr(&format!("s.{name}"))))
    });
    let named = named.collect::<Vec<_>>().join(", ");
    let inserted = format!("SELECT CAST(r AS VARCHAR) FROM (SELECT {named} FROM {STAGE} s) r");
    record(connection, table, checkpoint, "inserted", &inserted)?;

    connection.execute_batch(&format!("DROP TABLE {STAGE}; DROP TABLE {WRONG}"))?;
    Ok(Repaired { deleted_rows: deleted_rows as u64, inserted_rows: inserted_rows as u64 })
}

/// Writes into `_rhei.repairs` the rows, as text, that a query returns.
fn record(
    connection: &TargetConnection,
    table: &TableSpec,
    checkpoint: Lsn,
    action: &str,
    rows: &str,
) -> Result<(), TargetError> {
    connection.execute(
        &format!(
            "{} SELECT now(), ?, ?, ?, ?, r, ? FROM ({rows}) rows(r)",
            connection.sql("INSERT INTO _rhei.repairs")
        ),
        params![
            checkpoint.to_string(),
            table.source.schema,
            table.source.name,
            action,
            PIPELINE_ID
        ],
    )?;
    Ok(())
}

fn expect(what: &'static str, expected: u64, found: u64) -> Result<(), TargetError> {
    if found == expected {
        return Ok(());
    }
    Err(TargetError::Diverged { what, expected, found })
}
