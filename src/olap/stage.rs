//! Brings rows to DuckDB: views that DuckDB reads in place, and staging tables.

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::UInt64Array,
    compute::take_record_batch,
    datatypes::{DataType, Fields, SchemaRef},
    record_batch::RecordBatch,
};
use duckdb::Connection;

use super::{
    TargetError,
    arrow_scan::{BatchView, Database},
    names,
};
use crate::change::{
    ColumnSpec, Deletes, ORIGIN_PREFIX, PATTERN_COLUMN, Patch, TableChanges, TableSpec,
};

/// The name of the staging table; it is made and dropped inside the transaction, so that an error
/// leaves no staging table behind.
pub(super) const STAGE: &str = "_rhei_stage";

/// The views through which DuckDB reads batches in place, by the shape of the rows: tables of the
/// same shape take turns with one view, as in a schema for each tenant. A view is made before a
/// transaction begins, since the transaction sees the in-memory database as it was when it first
/// read from there. The views are kept, since making one takes as long as applying a few rows.
#[derive(Default)]
pub(super) struct StagingViews(HashMap<(Fields, Rows), BatchView>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Rows {
    Inserts,
    Keys,
}

impl StagingViews {
    /// Makes the views that a batch uses. Where there is no room for the view of a shape, the rows
    /// of that shape are staged.
    pub(super) fn prepare<'a>(
        &mut self,
        database: &Arc<Database>,
        changes: impl Iterator<Item = &'a TableChanges>,
    ) -> Result<(), TargetError> {
        let mut shapes: HashMap<(Fields, Rows), SchemaRef> = HashMap::new();
        for changes in changes {
            let keys = match &changes.deletes {
                Deletes::ByKey(keys) => keys.as_slice(),
                Deletes::Rows(_) => &[],
            };

            for (rows, batches) in [(Rows::Inserts, changes.inserts.as_slice()), (Rows::Keys, keys)]
            {
                if let Some(first) = batches.first() {
                    shapes.entry(key(rows, first)).or_insert_with(|| first.schema());
                }
            }
        }

        let missing = shapes.keys().filter(|shape| !self.0.contains_key(*shape)).count();
        if must_begin_again(self.0.len(), missing, shapes.len()) {
            self.0.clear();
        }

        for (shape, schema) in shapes {
            if self.0.len() < MAX_VIEWS && !self.0.contains_key(&shape) {
                self.0.insert(shape, BatchView::new(database, schema)?);
            }
        }
        Ok(())
    }

    /// Calls `run` with the name under which DuckDB reads the rows. A table that first appears in a
    /// later part of a transaction has no view, so its rows are staged.
    pub(super) fn read<R>(
        &self,
        connection: &Connection,
        (spec, rows): (&TableSpec, Rows),
        batches: &[RecordBatch],
        run: impl FnOnce(&str) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
        if let Some(view) = batches.first().and_then(|first| self.0.get(&key(rows, first))) {
            view.put(batches.iter().cloned());
            return run(&view.name());
        }

        let all: Vec<usize> = (0..spec.columns.len()).collect();
        let columns = match rows {
            Rows::Inserts => all.as_slice(),
            Rows::Keys => spec.key_columns(),
        };

        stage(connection, &stage_columns(spec, columns, ""), batches)?;
        let done = run(STAGE)?;
        connection.execute_batch(&format!("DROP TABLE {STAGE}"))?;
        Ok(done)
    }
}

/// Views are small, but shapes that come and go would leave many views behind.
const MAX_VIEWS: usize = 4096;

/// Returns whether all views are dropped, since they leave too little room for the shapes of a
/// batch. A batch that takes most of the room by itself drops none: the next batch of the same
/// tables would drop them again.
fn must_begin_again(views: usize, missing: usize, shapes: usize) -> bool {
    missing > MAX_VIEWS.saturating_sub(views) && shapes <= MAX_VIEWS / 2
}

/// Returns what rows of one shape have in common. The metadata of a schema is not in it: batches of
/// changes have none.
fn key(rows: Rows, batch: &RecordBatch) -> (Fields, Rows) {
    (batch.schema_ref().fields().clone(), rows)
}

pub(super) fn total(batches: &[RecordBatch]) -> u64 {
    batches.iter().map(|batch| batch.num_rows() as u64).sum()
}

pub(super) fn bytes(batches: &[RecordBatch]) -> usize {
    batches.iter().map(RecordBatch::get_array_memory_size).sum()
}

/// Returns `t.key = s.key AND ..`. Key columns are NOT NULL (trap 55).
pub(super) fn key_match(spec: &TableSpec, prefix: &str) -> String {
    let columns = spec.key_columns().iter().filter_map(|&at| spec.columns.get(at));

    let parts: Vec<String> = columns
        .map(|column| {
            let staged = format!("s.{}", names::quoted(&format!("{prefix}{}", column.target_name)));
            format!(
                "t.{} = {}",
                names::quoted(&column.target_name),
                column.mapping.stage_expr(&staged)
            )
        })
        .collect();
    parts.join(" AND ")
}

pub(super) fn column_list(spec: &TableSpec, columns: &[usize]) -> String {
    let names = columns
        .iter()
        .filter_map(|&at| spec.columns.get(at))
        .map(|column| names::quoted(&column.target_name));
    names.collect::<Vec<_>>().join(", ")
}

pub(super) fn stage_values(spec: &TableSpec, columns: &[usize]) -> String {
    let columns = columns.iter().filter_map(|&at| spec.columns.get(at));
    let values = columns.map(|column| {
        column.mapping.stage_expr(&format!("s.{}", names::quoted(&column.target_name)))
    });
    values.collect::<Vec<_>>().join(", ")
}

/// Stages the rows of a patch, with their former keys and the number of the pattern of values that
/// each row lacks.
pub(super) fn stage_patch(
    connection: &Connection,
    spec: &TableSpec,
    patch: &Patch,
) -> Result<(), TargetError> {
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    let mut columns = stage_columns(spec, &all, "");
    columns.extend(stage_columns(spec, spec.key_columns(), ORIGIN_PREFIX));
    columns.push((names::quoted(PATTERN_COLUMN), "BIGINT".to_owned()));
    stage(connection, &columns, std::slice::from_ref(&patch.rows))
}

/// Returns the value of a column in a patched row: the value that came, or `unchanged` in rows that
/// lack it.
pub(super) fn patched_value(
    patch: &Patch,
    column: &ColumnSpec,
    at: usize,
    unchanged: &str,
) -> String {
    let came = column.mapping.stage_expr(&format!("s.{}", names::quoted(&column.target_name)));
    let lacking = patch.lacking(at);

    if lacking.is_empty() {
        came
    } else if lacking.len() == patch.patterns.len() {
        unchanged.to_owned()
    } else {
        let lacking: Vec<String> = lacking.iter().map(ToString::to_string).collect();
        format!(
            "CASE WHEN s.{} IN ({}) THEN {unchanged} ELSE CAST({came} AS {}) END",
            names::quoted(PATTERN_COLUMN),
            lacking.join(", "),
            column.mapping.target_type
        )
    }
}

/// Returns the quoted names and the types of staging columns.
pub(super) fn stage_columns(
    spec: &TableSpec,
    columns: &[usize],
    prefix: &str,
) -> Vec<(String, String)> {
    let columns = columns.iter().filter_map(|&at| spec.columns.get(at));
    columns
        .map(|column| {
            (names::quoted(&format!("{prefix}{}", column.target_name)), column.mapping.stage_type())
        })
        .collect()
}

pub(super) fn stage(
    connection: &Connection,
    columns: &[(String, String)],
    batches: &[RecordBatch],
) -> Result<(), TargetError> {
    let columns: Vec<String> =
        columns.iter().map(|(name, kind)| format!("{name} {kind}")).collect();
    connection.execute_batch(&format!("CREATE TEMP TABLE {STAGE} ({})", columns.join(", ")))?;

    let mut appender = connection.appender_to_catalog_and_db(STAGE, "temp", "main")?;
    for batch in batches {
        append(&mut appender, batch)?;
    }
    appender.flush()?;
    Ok(())
}

/// Appends a batch. DuckDB takes one vector of rows at a time, and with each vector all items of
/// the array of a LIST column, so lists are cut to size first; otherwise the cost would grow with
/// the square of the batch.
pub(super) fn append(
    appender: &mut duckdb::Appender<'_>,
    batch: &RecordBatch,
) -> Result<(), TargetError> {
    const VECTOR_ROWS: usize = 2048;
    let is_nested = |kind: &DataType| matches!(kind, DataType::List(_) | DataType::Struct(_));
    let has_lists = batch.columns().iter().any(|column| is_nested(column.data_type()));

    if !has_lists || batch.num_rows() <= VECTOR_ROWS {
        return Ok(appender.append_record_batch(batch.clone())?);
    }

    for start in (0..batch.num_rows()).step_by(VECTOR_ROWS) {
        let end = (start + VECTOR_ROWS).min(batch.num_rows());
        let rows = UInt64Array::from_iter_values(start as u64..end as u64);
        let cut = take_record_batch(batch, &rows)
            .map_err(|error| TargetError::Rows { source: error.into() })?;
        appender.append_record_batch(cut)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_dropped_for_others_and_never_for_those_of_the_same_batch() {
        for (name, views, missing, shapes, expected) in [
            ("there is room", 100, 50, 80, false),
            ("nothing is missing", MAX_VIEWS, 0, MAX_VIEWS, false),
            ("other tables have taken the room", MAX_VIEWS, 10, 20, true),
            ("exactly as much room as is missing", MAX_VIEWS - 10, 10, 20, false),
            ("a batch that is larger than the room", MAX_VIEWS, 2000, MAX_VIEWS + 2000, false),
        ] {
            assert_eq!(must_begin_again(views, missing, shapes), expected, "{name}");
        }
    }
}
