//! Turns surviving rows into Arrow, one column at a time.
//!
//! A first pass over each row records the positions of its fields; then each column is decoded in
//! one tight loop. Rows that the batch itself made obsolete are never decoded.

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::{ArrayRef, Int64Array},
    datatypes::{DataType, Field as ArrowField, Schema},
    record_batch::RecordBatch,
};

use super::{
    COUNT_COLUMN, ColumnSpec, Deletes, Nulled, ORIGIN_PREFIX, PATTERN_COLUMN, Patch, Remedy,
    TableChanges, TableSpec,
    arena::{Arena, Slice},
    net_effect::{NetEffect, NetEffectError, key_tuple},
};
use crate::{
    pgoutput::tuple::{Field, Tuple},
    types::{ColumnBuilder, ValueError},
};

/// A table whose changes cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ColumnsError {
    #[error("column \"{column}\" of table {table}{key}: {source}")]
    Value { table: String, column: String, key: String, source: ValueError },
    #[error("the copy of table {table} does not fit the stream: {source}")]
    NetEffect { table: String, source: NetEffectError },
    #[error("table {table}: {source}")]
    Arrow { table: String, source: arrow::error::ArrowError },
}

impl ColumnsError {
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::NetEffect { source, .. } => source.remedy(),
            Self::Value { source, .. } if source.is_unrepresentable() => Remedy::AllowNulls,
            Self::Value { .. } | Self::Arrow { .. } => Remedy::Operator,
        }
    }
}

/// Decodes the remaining changes of a batch on one table.
///
/// # Errors
/// DuckDB cannot hold a value, or a change does not fit. Both errors concern this table only.
pub fn build(
    table: &Arc<TableSpec>,
    effect: NetEffect,
    arena: &Arena,
) -> Result<TableChanges, ColumnsError> {
    let (truncate, counts) = (effect.truncated, effect.counts);
    let left = effect
        .survivors()
        .map_err(|source| ColumnsError::NetEffect { table: table.source.to_string(), source })?;

    let all: Vec<usize> = (0..table.columns.len()).collect();
    let mut nulled = Vec::new();

    let deletes = if left.deleted_rows.is_empty() {
        let width = table.key_columns().len();
        let keys: Vec<Tuple<'_>> =
            left.deleted_keys.iter().map(|&key| key_tuple(arena.get(key), width)).collect();
        let batch = record_batch(table, &keys, table.key_columns(), "", Vec::new(), &mut nulled)?;
        match table.key {
            super::Key::Columns(_) => Deletes::ByKey(batch.into_iter().collect()),
            super::Key::WholeRow | super::Key::AppendOnly => Deletes::Rows(Vec::new()),
        }
    } else {
        let rows = tuples(table, arena, left.deleted_rows.iter().map(|&(row, _)| row));
        let counts =
            Int64Array::from_iter_values(left.deleted_rows.iter().map(|&(_, count)| count));
        let count_field = ArrowField::new(COUNT_COLUMN, DataType::Int64, false);
        let extra = vec![(count_field, Arc::new(counts) as ArrayRef)];
        Deletes::Rows(
            record_batch(table, &rows, &all, "", extra, &mut Vec::new())?.into_iter().collect(),
        )
    };

    let rows = tuples(table, arena, left.inserts.iter().copied());
    let inserts =
        record_batch(table, &rows, &all, "", Vec::new(), &mut nulled)?.into_iter().collect();

    let patch = patch(table, &left.patches, arena, &mut nulled)?;
    Ok(TableChanges { table: Arc::clone(table), truncate, deletes, inserts, patch, nulled, counts })
}

/// Builds the patch. `patches` holds the rows that lack values, each with the key that the row had
/// before the batch.
fn patch(
    table: &TableSpec,
    patches: &[(Slice, Slice)],
    arena: &Arena,
    nulled: &mut Vec<Nulled>,
) -> Result<Option<Patch>, ColumnsError> {
    if patches.is_empty() {
        return Ok(None);
    }
    let rows = tuples(table, arena, patches.iter().map(|&(row, _)| row));

    let mut patterns: Vec<Vec<usize>> = Vec::new();
    let mut known: HashMap<Vec<usize>, i64> = HashMap::new();
    let mut of_rows: Vec<i64> = Vec::with_capacity(rows.len());
    for tuple in &rows {
        let lacks = |(column, field)| (field == Field::Unchanged).then_some(column);
        let unchanged: Vec<usize> = tuple.fields().enumerate().filter_map(lacks).collect();
        let pattern = *known.entry(unchanged).or_insert_with_key(|unchanged| {
            patterns.push(unchanged.clone());
            patterns.len() as i64 - 1
        });
        of_rows.push(pattern);
    }

    let key_columns = table.key_columns();
    let keys: Vec<Tuple<'_>> = patches
        .iter()
        .map(|&(_, origin)| key_tuple(arena.get(origin), key_columns.len()))
        .collect();

    let mut extra = Vec::new();
    if let Some(batch) = record_batch(table, &keys, key_columns, ORIGIN_PREFIX, Vec::new(), nulled)?
    {
        let fields = batch.schema();
        for (field, array) in fields.fields().iter().zip(batch.columns()) {
            extra.push((field.as_ref().clone(), Arc::clone(array)));
        }
    }

    let pattern_field = ArrowField::new(PATTERN_COLUMN, DataType::Int64, false);
    extra.push((pattern_field, Arc::new(Int64Array::from(of_rows)) as ArrayRef));

    let all: Vec<usize> = (0..table.columns.len()).collect();
    let rows = record_batch(table, &rows, &all, "", extra, nulled)?;
    Ok(rows.map(|rows| Patch { patterns, rows }))
}

fn tuples<'a>(
    table: &TableSpec,
    arena: &'a Arena,
    slices: impl Iterator<Item = Slice>,
) -> Vec<Tuple<'a>> {
    slices.map(|slice| Tuple::trusted(arena.get(slice), table.columns.len())).collect()
}

/// The number of rows that are split into fields before their columns are decoded.
const BLOCK_ROWS: usize = 512;

/// Builds one record batch of `columns` (indexes into the table's columns); field `n` of each tuple
/// belongs to `columns[n]`. Returns `None` when there are no rows.
fn record_batch(
    table: &TableSpec,
    rows: &[Tuple<'_>],
    columns: &[usize],
    prefix: &str,
    extra: Vec<(ArrowField, ArrayRef)>,
    nulled: &mut Vec<Nulled>,
) -> Result<Option<RecordBatch>, ColumnsError> {
    if rows.is_empty() {
        return Ok(None);
    }

    let mut building: Vec<Column<'_>> = columns
        .iter()
        .filter_map(|&index| Some((index, table.columns.get(index)?)))
        .map(|(index, spec)| Column {
            index,
            spec,
            builder: ColumnBuilder::new(&spec.mapping, rows.len()),
        })
        .collect();
    let mut refused = RefusedValues { table, columns, nulled };

    // The loop takes some rows at a time, so that their bytes are still in the cache when they are
    // decoded.
    let mut fields = vec![Field::Null; rows.len().min(BLOCK_ROWS) * columns.len()];
    for rows in rows.chunks(BLOCK_ROWS) {
        store_by_column(rows, columns.len(), &mut fields);

        for (column, values) in building.iter_mut().zip(fields.chunks(rows.len())) {
            for (row, &value) in values.iter().enumerate() {
                let value = match value {
                    Field::Text(text) => Some(text),
                    Field::Null | Field::Unchanged => None,
                };
                if let Err(source) = column.builder.push_text(value) {
                    refused.add(column, rows.get(row).copied(), source)?;
                }
            }
        }
    }

    finish(table, building, prefix, extra).map(Some)
}

/// A column that is being built.
struct Column<'a> {
    /// The index into the table's columns.
    index: usize,
    spec: &'a ColumnSpec,
    builder: ColumnBuilder,
}

/// Stores the fields of some rows column by column, so that the decoding loops read them in order.
#[inline]
fn store_by_column<'a>(rows: &[Tuple<'a>], columns: usize, fields: &mut [Field<'a>]) {
    for (row, tuple) in rows.iter().enumerate() {
        for (column, field) in tuple.fields().take(columns).enumerate() {
            if let Some(place) = fields.get_mut(column * rows.len() + row) {
                *place = field;
            }
        }
    }
}

/// The values that the builders did not take. Where the settings allow it, NULL replaces them.
struct RefusedValues<'a> {
    table: &'a TableSpec,
    /// The columns that the rows consist of.
    columns: &'a [usize],
    nulled: &'a mut Vec<Nulled>,
}

impl RefusedValues<'_> {
    fn add(
        &mut self,
        column: &Column<'_>,
        row: Option<Tuple<'_>>,
        source: ValueError,
    ) -> Result<(), ColumnsError> {
        let key = row.map_or_else(String::new, |row| key_text(self.table, self.columns, row));

        // A key that is NULL would identify no row.
        if self.table.null_unrepresentable
            && source.is_unrepresentable()
            && !self.table.key_columns().contains(&column.index)
        {
            note_nulled(self.nulled, &column.spec.name, || source.at(&key));
            return Ok(());
        }

        Err(ColumnsError::Value {
            table: self.table.source.to_string(),
            column: column.spec.name.clone(),
            key,
            source,
        })
    }
}

/// Puts the columns that were built and the `extra` columns together.
fn finish(
    table: &TableSpec,
    built: Vec<Column<'_>>,
    prefix: &str,
    extra: Vec<(ArrowField, ArrayRef)>,
) -> Result<RecordBatch, ColumnsError> {
    let mut fields = Vec::with_capacity(built.len() + extra.len());
    let mut arrays: Vec<ArrayRef> = Vec::with_capacity(built.len() + extra.len());
    for Column { spec, mut builder, .. } in built {
        fields.push(spec.mapping.field(&format!("{prefix}{}", spec.target_name)));
        arrays.push(builder.finish());
    }
    for (field, array) in extra {
        fields.push(field);
        arrays.push(array);
    }

    RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)
        .map_err(|source| ColumnsError::Arrow { table: table.source.to_string(), source })
}

/// Counts a value that became NULL.
pub fn note_nulled(nulled: &mut Vec<Nulled>, column: &str, first: impl FnOnce() -> String) {
    match nulled.iter_mut().find(|other| other.column == column) {
        Some(known) => known.values += 1,
        None => nulled.push(Nulled { column: column.to_owned(), values: 1, first: first() }),
    }
}

/// Returns ` (key id=7)`, with which the operator finds the row; a long value is cut.
fn key_text(table: &TableSpec, columns: &[usize], tuple: Tuple<'_>) -> String {
    const MAX_CHARS: usize = 60;
    let mut parts = Vec::new();

    for &key in table.key_columns() {
        let field = columns.iter().position(|&column| column == key).and_then(|at| tuple.field(at));
        if let (Some(Field::Text(text)), Some(spec)) = (field, table.columns.get(key)) {
            let mut value = String::from_utf8_lossy(text).into_owned();
            if value.chars().count() > MAX_CHARS {
                value = value.chars().take(MAX_CHARS).chain("..".chars()).collect();
            }
            parts.push(format!("{}={value}", spec.name));
        }
    }

    if parts.is_empty() { String::new() } else { format!(" (row {})", parts.join(", ")) }
}
