//! Names and shapes in DuckDB. The only place that quotes the target's identifiers.

use std::collections::{BTreeSet, HashSet};

use duckdb::Connection;

use crate::{
    change::{ColumnSpec, TableSpec},
    pgoutput::QualifiedName,
};

/// An identifier, quoted.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string literal.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Whether values of a type, or parts of them, may be equal to DuckDB and print otherwise: 30 days
/// and 1 month, one moment in two zones, 1 and 1.0 inside a VARIANT. To the source these are
/// different values.
pub fn has_coarse_equality(target_type: &str) -> bool {
    ["INTERVAL", "TIME WITH TIME ZONE", "VARIANT"].iter().any(|coarse| target_type.contains(coarse))
}

/// What the target's database is called while rhei has it open.
pub const CATALOG: &str = "rhei_target";

/// A table's full name, quoted. With the database, since a schema may be called `temp` or like the
/// file.
pub fn table(name: &QualifiedName) -> String {
    format!("{CATALOG}.{}.{}", quoted(&name.schema), quoted(&name.name))
}

fn schema(name: &QualifiedName) -> String {
    format!("{CATALOG}.{}", quoted(&name.schema))
}

/// A name as DuckDB tells names apart.
pub fn lower(name: &QualifiedName) -> (String, String) {
    (name.schema.to_lowercase(), name.name.to_lowercase())
}

/// How the names of shadows end.
pub const SHADOW_ENDING: &str = "__rhei_shadow";

/// Where a table is copied to until it is swapped in.
pub fn shadow_of(name: &QualifiedName) -> QualifiedName {
    QualifiedName::new(name.schema.clone(), format!("{}{SHADOW_ENDING}", name.name))
}

/// The shadows of a file, by [`lower`] names.
pub fn shadows(connection: &Connection) -> Result<HashSet<(String, String)>, duckdb::Error> {
    let sql = format!(
        "SELECT lower(schema_name), lower(table_name) FROM duckdb_tables() \
         WHERE database_name = '{CATALOG}' AND ends_with(lower(table_name), '{SHADOW_ENDING}')"
    );
    connection.prepare(&sql)?.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// The statement that makes a schema where there is none.
pub fn create_schema(name: &QualifiedName) -> String {
    format!("CREATE SCHEMA IF NOT EXISTS {};", schema(name))
}

/// The statement that makes an empty shadow. No key, no index, no NOT NULL: deletes go before
/// inserts, and keys live in `_rhei` (duckdb.md 8). Columns with long values are compressed by ZSTD
/// (`backfill::long_columns` says why).
pub fn create_shadow(spec: &TableSpec, long_columns: &BTreeSet<String>) -> String {
    let column = |column: &ColumnSpec| {
        let compression =
            if long_columns.contains(&column.target_name) { " USING COMPRESSION zstd" } else { "" };
        format!("{} {}{compression}", quoted(&column.target_name), column.mapping.target_type)
    };
    let columns: Vec<String> = spec.columns.iter().map(column).collect();
    format!("CREATE TABLE {} ({});", table(&shadow_of(&spec.target)), columns.join(", "))
}

/// Statements that put the shadow in the table's place. Readers with an older snapshot keep the old
/// table.
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

/// A name that no table of a source has, for the time of one transaction.
fn temp_name(name: &QualifiedName, oid: u32) -> QualifiedName {
    QualifiedName::new(name.schema.clone(), format!("{oid}__rhei_moving"))
}

/// Takes a table off its name.
pub fn rename_to_temp(from: &QualifiedName, oid: u32) -> String {
    format!("ALTER TABLE {} RENAME TO {};", table(from), quoted(&temp_name(from, oid).name))
}

/// Gives a table that was set aside its new name. DuckDB cannot move a table to another schema, so
/// that is a copy.
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
