//! Which tables keep small additions in the catalog ("inlined"), instead of a file for each.
//!
//! DuckLake 1.0 keeps inlined rows in a table of the catalog for each shape of a table, and names
//! it after the version of the schema. It must be made with the shape: made later, with the first
//! row, it has the version that some other table has brought about, and DuckLake then takes an
//! older shape for the rows and remembers it for all tables of that version. Columns come back as
//! NULL, and files cannot be merged. So rhei makes every table while inlining is on, and turns
//! inlining off afterwards for tables with nested columns: DuckLake does not read every nested
//! value back from its catalog, and ends the process for a date within a struct.

use super::{
    layout::is_nested,
    options::{self, Scope},
};
use crate::{
    change::{SchemaChange, TableSpec},
    olap::{
        TargetError,
        connection::TargetConnection,
        names::{quoted, shadow_of},
    },
    pgoutput::QualifiedName,
};

const SETTING: &str = "data_inlining_row_limit";

/// Rows of up to this number that a commit adds to a table are kept in the catalog, and up to this
/// number of deleted rows: more than that is faster as a file, fewer would make too many files
/// (docs/decisions.md). It holds for all tables that this process makes.
pub const INLINED_ROWS: u32 = 100;

/// The state is inlined whatever its size: a file of it could be lost (see `lost_files`).
const ALL_ROWS: u32 = 1_000_000_000;

/// The tables of the state, whose rows are replaced again and again. The guard of the writer (see
/// `fence`) needs them inlined.
const STATE: [&str; 6] = ["pipeline", "tables", "columns", "jobs", "verifications", "repairs"];

/// Makes the schema of the state, if it is missing, such that its tables are inlined.
pub fn before_state(connection: &TargetConnection) -> Result<(), TargetError> {
    let schema = connection.state_schema();
    connection.autocommit(&format!("CREATE SCHEMA IF NOT EXISTS {}", quoted(schema)))?;
    options::set(connection, SETTING, [((schema, None), ALL_ROWS)])
}

/// Has the tables of the state inlined, if they are not, and no other table of its schema: changes
/// that are kept for a copy may be of any type.
pub fn of_state(connection: &TargetConnection) -> Result<(), TargetError> {
    let schema = connection.state_schema();
    let tables = STATE.map(|name| ((schema, Some(name)), ALL_ROWS));
    options::set(connection, SETTING, tables.into_iter().chain([((schema, None), 0)]))
}

/// Ends the inlining of shadows where it is not safe. No row has come into them yet.
pub fn of_shadows<'a>(
    connection: &TargetConnection,
    tables: impl Iterator<Item = &'a TableSpec>,
) -> Result<(), TargetError> {
    let unsafe_tables: Vec<QualifiedName> = tables
        .filter(|spec| spec.columns.iter().any(is_nested))
        .map(|spec| shadow_of(&spec.target))
        .collect();
    options::set(connection, SETTING, unsafe_tables.iter().map(|table| (scope(table), 0)))
}

/// Ends the inlining of tables that are about to get their first nested column.
pub fn before_change<'a>(
    connection: &TargetConnection,
    changes: impl Iterator<Item = &'a SchemaChange>,
) -> Result<(), TargetError> {
    let is_safe = |spec: &TableSpec| !spec.columns.iter().any(is_nested);
    let changes = changes.filter(|change| is_safe(&change.before) && !is_safe(&change.after));
    options::set(connection, SETTING, changes.map(|change| (scope(&change.after.target), 0)))
}

fn scope(table: &QualifiedName) -> Scope<'_> {
    (&table.schema, Some(&table.name))
}
