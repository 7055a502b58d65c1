//! Finds tables whose files are gone although a commit names them.
//!
//! When a commit fails, DuckLake 1.0 deletes the files that it has written for it, also when only
//! the answer to the commit was lost and the commit is in the lake. Such a table cannot be read any
//! more, and is copied again.

use std::{collections::BTreeSet, path::Path, time::Duration};

use super::LakeOptions;
use crate::olap::{
    TargetError,
    connection::TargetConnection,
    names::{CATALOG, literal},
};

/// Returns the tables, as schema and name, that lack a file which a commit within this time has
/// added.
pub fn tables_with_lost_files(
    connection: &TargetConnection,
    options: &LakeOptions,
    within: Duration,
) -> Result<BTreeSet<(String, String)>, TargetError> {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    let added = |files: &str| {
        format!(
            "SELECT s.schema_name, t.table_name, \
             CASE WHEN f.path_is_relative THEN CASE WHEN t.path_is_relative THEN \
             CASE WHEN s.path_is_relative THEN d.data_path ELSE '' END || s.path ELSE '' END \
             || t.path ELSE '' END || f.path \
             FROM {metadata}.{files} f JOIN {metadata}.ducklake_table t USING (table_id) \
             JOIN {metadata}.ducklake_schema s USING (schema_id) \
             JOIN {metadata}.ducklake_snapshot n ON n.snapshot_id = f.begin_snapshot \
             CROSS JOIN (SELECT data_path FROM {CATALOG}.settings()) d \
             WHERE f.end_snapshot IS NULL AND t.end_snapshot IS NULL AND s.end_snapshot IS NULL \
             AND starts_with(s.schema_name, {}) \
             AND n.snapshot_time >= now() - INTERVAL {} SECOND",
            literal(&options.schema_prefix),
            within.as_secs()
        )
    };

    let sql =
        format!("{} UNION ALL {}", added("ducklake_data_file"), added("ducklake_delete_file"));
    let mut statement = connection.prepare(&sql)?;
    let files = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let files = files.collect::<Result<Vec<(String, String, String)>, _>>()?;

    let mut lost = BTreeSet::new();
    for (schema, table, file) in files {
        let table = (schema, table);
        if !lost.contains(&table) && !exists(connection, &file)? {
            lost.insert(table);
        }
    }
    Ok(lost)
}

fn exists(connection: &TargetConnection, file: &str) -> Result<bool, TargetError> {
    if !file.contains("://") {
        return Ok(Path::new(file).exists());
    }

    let mut pattern = String::with_capacity(file.len());
    for character in file.chars() {
        match character {
            '*' | '?' | '[' => pattern.extend(['[', character, ']']),
            character => pattern.push(character),
        }
    }
    let sql = format!("SELECT count(*) > 0 FROM glob({})", literal(&pattern));
    Ok(connection.query_row(&sql, [], |row| row.get(0))?)
}
