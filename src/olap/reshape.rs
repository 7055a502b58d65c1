//! Brings tables into another shape.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    TargetError,
    connection::TargetConnection,
    names::{self, quoted, table},
    stage::{STAGE, stage},
};
use crate::{
    change::{ColumnOrigin, SchemaChange},
    types::ColumnBuilder,
};
use arrow::{datatypes::Schema, record_batch::RecordBatch};

/// Alters a table.
pub(super) fn alter_table(
    connection: &TargetConnection,
    reshape: &SchemaChange,
) -> Result<(), TargetError> {
    let variable = |at: usize| format!("_rhei_missing_{at}");
    let mut filled = BTreeMap::new();
    for (at, (column, origin)) in reshape.after.columns.iter().zip(&reshape.columns).enumerate() {
        let ColumnOrigin::Added(Some(text)) = origin else { continue };

        let mut cell = ColumnBuilder::new(&column.mapping, 1);
        match cell.push_text(Some(text.as_bytes())) {
            // NULL takes the place of the value, as the settings allow.
            Err(error) if error.is_unrepresentable() && reshape.after.null_unrepresentable => {
                continue;
            }
            pushed => pushed.map_err(|error| TargetError::Rows { source: error.into() })?,
        }

        let schema = Arc::new(Schema::new(vec![column.mapping.field("value")]));
        let row = RecordBatch::try_new(schema, vec![cell.finish()])
            .map_err(|error| TargetError::Rows { source: error.into() })?;

        stage(connection, &[("value".to_owned(), column.mapping.stage_type())], &[row])?;
        connection.execute_batch(&format!(
            "SET VARIABLE {} = (SELECT {} FROM {STAGE} s); DROP TABLE {STAGE};",
            variable(at),
            column.mapping.stage_expr("s.value")
        ))?;

        // DuckDB's log holds the statement, not the rows: everything that the statement names must
        // exist when the log is replayed after a crash, which is not so for a variable. So the
        // statement holds the value itself, if its text represents the value completely.
        let (value, kind) =
            (format!("getvariable('{}')", variable(at)), &column.mapping.target_type);

        let (text, is_whole): (String, bool) = connection.query_row(
            &format!(
                "SELECT t, CAST(t AS {kind}) IS NOT DISTINCT FROM {value} FROM (SELECT \
                 CAST({value} AS VARCHAR) AS t)"
            ),
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;

        filled.insert(at, is_whole.then(|| names::literal(&text)));
    }

    let is_lake = connection.is_lake();
    for statement in alter_statements(reshape, is_lake, |at| filled.get(&at).cloned().flatten()) {
        connection.execute_batch(&statement)?;
    }

    for (at, literal) in filled {
        if let (None, Some(column)) = (literal, reshape.after.columns.get(at)) {
            let (target, name) =
                (names::table(&reshape.after.target), names::quoted(&column.target_name));
            connection.execute_batch(&format!(
                "UPDATE {target} SET {name} = getvariable('{}')",
                variable(at)
            ))?;
        }
        connection.execute_batch(&format!("RESET VARIABLE {}", variable(at)))?;
    }

    Ok(())
}

/// Returns the statements that bring a table into another shape. `value` returns the value that
/// older rows have in the new column with this index, if that value is not NULL, as a literal.
///
/// Columns that are dropped or renamed get temporary names first, so that names can be swapped and
/// used again; the last column of a table cannot be dropped, so new columns are added before.
pub fn alter_statements(
    reshape: &SchemaChange,
    is_lake: bool,
    value: impl Fn(usize) -> Option<String>,
) -> Vec<String> {
    let target = table(&reshape.after.target);
    let alter = |what: String| format!("ALTER TABLE {target} {what}");
    let parked = |at: usize| quoted(&format!("{at}__rhei_moving"));
    let kept_as = |at: usize| {
        let place = reshape.columns.iter().position(|column| *column == ColumnOrigin::Kept(at))?;
        reshape.after.columns.get(place)
    };

    let (mut park, mut change, mut add, mut name, mut drop) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());

    for (at, before) in reshape.before.columns.iter().enumerate() {
        let old_name = quoted(&before.target_name);
        match kept_as(at) {
            Some(after) => {
                if after.mapping.target_type != before.mapping.target_type {
                    let value = before.mapping.conversion(&after.mapping, &old_name);
                    let kind = &after.mapping.target_type;
                    // A lake only widens numbers, by itself.
                    let using = if is_lake { String::new() } else { format!(" USING ({value})") };
                    change.push(alter(format!("ALTER COLUMN {old_name} TYPE {kind}{using}")));
                }

                if after.target_name != before.target_name {
                    park.push(alter(format!("RENAME COLUMN {old_name} TO {}", parked(at))));
                    name.push(alter(format!(
                        "RENAME COLUMN {} TO {}",
                        parked(at),
                        quoted(&after.target_name)
                    )));
                }
            }
            None => {
                park.push(alter(format!("RENAME COLUMN {old_name} TO {}", parked(at))));
                drop.push(alter(format!("DROP COLUMN {}", parked(at))));
            }
        }
    }

    for (at, (column, origin)) in reshape.after.columns.iter().zip(&reshape.columns).enumerate() {
        if matches!(origin, ColumnOrigin::Added(_)) {
            let (new, kind) = (quoted(&column.target_name), &column.mapping.target_type);
            let value = value(at);
            if let (true, Some(value)) = (is_lake, &value) {
                // Older rows keep the value that the column began with.
                add.push(alter(format!("ADD COLUMN {new} {kind} DEFAULT {value}")));
                add.push(alter(format!("ALTER COLUMN {new} DROP DEFAULT")));
                continue;
            }

            add.push(alter(format!("ADD COLUMN {new} {kind}")));
            // In a file no DEFAULT can set the value: with another ALTER after it, and rows after
            // that, COMMIT fails.
            if let Some(value) = value {
                add.push(alter(format!(
                    "ALTER COLUMN {new} TYPE {kind} USING (CAST({value} AS {kind}))"
                )));
            }
        }
    }

    [change, park, name, add, drop].concat()
}
