//! Which tables keep small additions in the catalog ("inlined"), instead of a file for each.
//!
//! DuckLake sets this for tables that are committed, so it follows the transaction that makes a
//! table. A table is not inlined unless rhei has set it: DuckLake 1.0 does not read every nested
//! value back from its catalog, and ends the process for a date within a struct.

use super::layout::{is_nested, is_reserved};
use crate::{
    change::{ColumnSpec, SchemaChange, TableSpec},
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

/// The state is inlined whatever its size: a file of it could be lost (see `lost_files`).
const ALL_ROWS: u32 = 1_000_000_000;

/// The tables of the state, whose rows are replaced again and again. The guard of the writer (see
/// `fence`) needs them inlined.
const STATE: [&str; 6] = ["pipeline", "tables", "columns", "jobs", "verifications", "repairs"];

/// Returns whether a table with this column can be inlined: DuckLake has columns of its own there.
fn can_be_inlined(column: &ColumnSpec) -> bool {
    !is_nested(column) && !is_reserved(&column.target_name)
}

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
    STATE.iter().try_for_each(|name| set(connection, (schema, name), ALL_ROWS))
}

/// Has the shadows of new copies inlined, where that is safe.
pub fn of_shadows<'a>(
    connection: &TargetConnection,
    tables: impl Iterator<Item = &'a TableSpec>,
) -> Result<(), TargetError> {
    for spec in tables.filter(|spec| spec.columns.iter().all(can_be_inlined)) {
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
        let was_inlined = change.before.columns.iter().all(can_be_inlined);
        if was_inlined && !change.after.columns.iter().all(can_be_inlined) {
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
