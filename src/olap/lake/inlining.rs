//! Which tables keep small additions in the catalog ("inlined"), instead of a file for each.
//!
//! DuckLake sets this for tables that are committed, so it follows the transaction that makes a
//! table. A table is not inlined unless rhei has set it: DuckLake 1.0 does not read every nested
//! value back from its catalog, and ends the process for a date within a struct.

use super::layout::is_nested;
use crate::{
    change::{SchemaChange, TableSpec},
    olap::{
        TargetError,
        connection::TargetConnection,
        names::{CATALOG, literal, shadow_of},
    },
    pgoutput::QualifiedName,
};

/// Rows of up to this number that a commit adds to a table are kept in the catalog, and up to this
/// number of deleted rows: more than that is faster as a file, fewer would make too many files
/// (docs/decisions.md).
const INLINED_ROWS: u32 = 100;

/// The tables of the state, whose rows are replaced again and again. The guard of the writer (see
/// `fence`) needs them inlined.
const STATE: [&str; 5] = ["pipeline", "tables", "columns", "jobs", "verifications"];

/// Has the tables of the state inlined, if they are not.
pub fn of_state(connection: &TargetConnection) -> Result<(), TargetError> {
    let schema = connection.state_schema();
    let entries = STATE.map(|name| literal(&format!("{schema}.{name}"))).join(", ");
    let inlined: usize = connection.query_row(
        &format!(
            "SELECT count(*) FROM {CATALOG}.options() \
             WHERE option_name = 'data_inlining_row_limit' AND scope_entry IN ({entries})"
        ),
        [],
        |row| row.get(0),
    )?;
    if inlined == STATE.len() {
        return Ok(());
    }
    STATE.iter().try_for_each(|name| set(connection, (schema, name), INLINED_ROWS))
}

/// Has the shadows of new copies inlined, where that is safe.
pub fn of_shadows<'a>(
    connection: &TargetConnection,
    tables: impl Iterator<Item = &'a TableSpec>,
) -> Result<(), TargetError> {
    for spec in tables.filter(|spec| !spec.columns.iter().any(is_nested)) {
        let QualifiedName { schema, name } = shadow_of(&spec.target);
        set(connection, (&schema, &name), INLINED_ROWS)?;
    }
    Ok(())
}

/// Ends the inlining of tables that are about to get their first nested column.
pub fn before_change<'a>(
    connection: &TargetConnection,
    changes: impl Iterator<Item = &'a SchemaChange>,
) -> Result<(), TargetError> {
    for change in changes {
        let was_nested = change.before.columns.iter().any(is_nested);
        if !was_nested && change.after.columns.iter().any(is_nested) {
            let QualifiedName { schema, name } = &change.after.target;
            set(connection, (schema, name), 0)?;
        }
    }
    Ok(())
}

fn set(
    connection: &TargetConnection,
    (schema, name): (&str, &str),
    rows: u32,
) -> Result<(), TargetError> {
    Ok(connection.execute_batch(&format!(
        "CALL {CATALOG}.set_option('data_inlining_row_limit', {rows}, schema => {}, \
         table_name => {})",
        literal(schema),
        literal(name)
    ))?)
}
