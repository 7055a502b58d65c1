//! Names and shapes in DuckDB. Only this module quotes the target's identifiers.

use std::collections::{BTreeSet, HashSet};

use duckdb::Connection;

use crate::{
    change::{ColumnSpec, TableSpec},
    pgoutput::QualifiedName,
};

/// Returns an identifier in quotes.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Returns a text as a string literal.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Returns whether values of a type, or parts of them, may be equal to DuckDB although they print
/// differently: 30 days and 1 month, one moment in two zones, 1 and 1.0 inside a VARIANT. To the
/// source these values are different.
pub fn has_coarse_equality(target_type: &str) -> bool {
    ["INTERVAL", "TIME WITH TIME ZONE", "VARIANT"].iter().any(|coarse| target_type.contains(coarse))
}

/// The name of the target's database while rhei has it open.
pub const CATALOG: &str = "rhei_target";

/// Returns the full name of a table, quoted. The name includes the database, since a schema may
/// have the name `temp` or the name of the file.
pub fn table(name: &QualifiedName) -> String {
    format!("{CATALOG}.{}.{}", quoted(&name.schema), quoted(&name.name))
}

fn schema(name: &QualifiedName) -> String {
    format!("{CATALOG}.{}", quoted(&name.schema))
}

/// Returns a name in the form in which DuckDB compares names.
pub fn lower(name: &QualifiedName) -> (String, String) {
    (name.schema.to_lowercase(), name.name.to_lowercase())
}

/// The ending of the names of shadows.
pub const SHADOW_ENDING: &str = "__rhei_shadow";

/// Returns the name of the shadow: a table is copied into its shadow until the shadow takes its
/// place.
pub fn shadow_of(name: &QualifiedName) -> QualifiedName {
    QualifiedName::new(name.schema.clone(), format!("{}{SHADOW_ENDING}", name.name))
}

/// Returns the shadows of a file, by [`lower`] names.
pub fn shadows(connection: &Connection) -> Result<HashSet<(String, String)>, duckdb::Error> {
    let sql = format!(
        "SELECT lower(schema_name), lower(table_name) FROM duckdb_tables() \
         WHERE database_name = '{CATALOG}' AND ends_with(lower(table_name), '{SHADOW_ENDING}')"
    );
    connection.prepare(&sql)?.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// Returns the statement that makes a schema if it does not exist.
pub fn create_schema(name: &QualifiedName) -> String {
    format!("CREATE SCHEMA IF NOT EXISTS {};", schema(name))
}

/// The statement that makes an empty shadow. No key, no index, no NOT NULL: deletes go before
/// inserts, and keys live in `_rhei`; with a key or an index DuckDB compacts nothing. Columns with
/// long values are compressed by ZSTD (`backfill::long_columns` says why).
pub fn create_shadow(spec: &TableSpec, long_columns: &BTreeSet<String>) -> String {
    let column = |column: &ColumnSpec| {
        let compression =
            if long_columns.contains(&column.target_name) { " USING COMPRESSION zstd" } else { "" };
        format!("{} {}{compression}", quoted(&column.target_name), column.mapping.target_type)
    };
    let columns: Vec<String> = spec.columns.iter().map(column).collect();
    format!("CREATE TABLE {} ({});", table(&shadow_of(&spec.target)), columns.join(", "))
}

/// Returns the statements that put the shadow in the place of the table. Readers with an older
/// snapshot keep the old table.
pub fn swap(target: &QualifiedName) -> String {
    format!(
        "DROP TABLE IF EXISTS {}; ALTER TABLE {} RENAME TO {};",
        table(target),
        table(&shadow_of(target)),
        quoted(&target.name)
    )
}

pub fn drop_table(target: &QualifiedName) -> String {
    format!("DROP TABLE IF EXISTS {};", table(target))
}

/// Returns a name that no table of a source has, for the duration of one transaction.
fn temp_name(name: &QualifiedName, oid: u32) -> QualifiedName {
    QualifiedName::new(name.schema.clone(), format!("{oid}__rhei_moving"))
}

/// Returns the statement that gives a table a temporary name.
pub fn rename_to_temp(from: &QualifiedName, oid: u32) -> String {
    format!("ALTER TABLE {} RENAME TO {};", table(from), quoted(&temp_name(from, oid).name))
}

/// Returns the statement that gives a table with a temporary name its new name. DuckDB cannot move
/// a table to another schema, so such a move is a copy.
pub fn rename_from_temp(from: &QualifiedName, oid: u32, to: &QualifiedName) -> String {
    let moving = table(&temp_name(from, oid));
    if from.schema == to.schema {
        return format!("ALTER TABLE {moving} RENAME TO {};", quoted(&to.name));
    }
    format!(
        "{} CREATE TABLE {} AS FROM {moving}; DROP TABLE {moving};",
        create_schema(to),
        table(to)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_quoted() {
        let name = QualifiedName::new("a\"b", "select; DROP TABLE x --");
        assert_eq!(table(&name), "rhei_target.\"a\"\"b\".\"select; DROP TABLE x --\"");
        assert_eq!(literal("it's"), "'it''s'");
    }
}
