//! Names and shapes in DuckDB. The only place that quotes the target's identifiers.

use crate::change::{QualifiedName, TableSpec};

/// An identifier, quoted.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string literal.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A table's full name, quoted.
pub fn table(name: &QualifiedName) -> String {
    format!("{}.{}", quoted(&name.schema), quoted(&name.name))
}

/// How the names of shadows end.
pub const SHADOW_ENDING: &str = "__rhei_shadow";

/// Where a table is copied to until it is swapped in.
pub fn shadow_of(name: &QualifiedName) -> QualifiedName {
    QualifiedName::new(name.schema.clone(), format!("{}{SHADOW_ENDING}", name.name))
}

/// Statements that leave an empty shadow. No key, no index, no NOT NULL: deletes go before inserts, and keys live in
/// `_rhei` (duckdb.md 8).
pub fn create_shadow(spec: &TableSpec) -> String {
    let columns: Vec<String> = spec
        .columns
        .iter()
        .map(|column| format!("{} {}", quoted(&column.target_name), column.mapping.target_type))
        .collect();
    let shadow = table(&shadow_of(&spec.target));
    format!(
        "CREATE SCHEMA IF NOT EXISTS {}; DROP TABLE IF EXISTS {shadow}; CREATE TABLE {shadow} ({});",
        quoted(&spec.target.schema),
        columns.join(", ")
    )
}

/// Statements that put the shadow in the table's place. Readers with an older snapshot keep the old table.
pub fn swap(target: &QualifiedName) -> String {
    format!(
        "DROP TABLE IF EXISTS {}; ALTER TABLE {} RENAME TO {};",
        table(target),
        table(&shadow_of(target)),
        quoted(&target.name)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_quoted() {
        let name = QualifiedName::new("a\"b", "select; DROP TABLE x --");
        assert_eq!(table(&name), "\"a\"\"b\".\"select; DROP TABLE x --\"");
        assert_eq!(literal("it's"), "'it''s'");
    }
}
