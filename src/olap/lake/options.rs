//! Settings that DuckLake keeps in the lake, for a schema or a table.

use std::collections::BTreeSet;

use crate::olap::{
    TargetError,
    connection::TargetConnection,
    names::{CATALOG, literal},
};

/// What a setting holds for: a schema, or a table of it.
pub type Scope<'a> = (&'a str, Option<&'a str>);

/// Returns for what a setting has been set, and to what. DuckLake keeps a version as `V2`.
pub fn all(
    connection: &TargetConnection,
    setting: &str,
) -> Result<BTreeSet<(String, u32)>, TargetError> {
    let mut statement = connection.prepare(&format!(
        "SELECT scope_entry, ltrim(value, 'V')::UINTEGER FROM {CATALOG}.options() \
         WHERE option_name = ? AND scope_entry IS NOT NULL"
    ))?;
    let options = statement.query_map([setting], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(options.collect::<Result<_, _>>()?)
}

/// Sets a setting where it has another value, in transactions of their own: DuckLake takes settings
/// of what is committed.
pub fn set<'a>(
    connection: &TargetConnection,
    setting: &str,
    wanted: impl IntoIterator<Item = (Scope<'a>, u32)>,
) -> Result<(), TargetError> {
    let mut wanted = wanted.into_iter().peekable();
    if wanted.peek().is_none() {
        return Ok(());
    }

    let known = all(connection, setting)?;
    for ((schema, table), value) in wanted {
        let entry = table.map_or_else(|| schema.to_owned(), |table| format!("{schema}.{table}"));
        if known.contains(&(entry, value)) {
            continue;
        }
        let table = table.map(|table| format!(", table_name => {}", literal(table)));
        connection.autocommit(&format!(
            "CALL {CATALOG}.set_option({}, {value}, schema => {}{})",
            literal(setting),
            literal(schema),
            table.unwrap_or_default()
        ))?;
    }
    Ok(())
}
