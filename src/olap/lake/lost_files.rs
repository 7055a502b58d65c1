//! Finds tables whose files are gone although a commit names them.
//!
//! When a commit fails, DuckLake 1.0 deletes the files that it has written for it, also when only
//! the answer to the commit was lost and the commit is in the lake. Such a table cannot be read any
//! more, and is copied again.

use std::{
    collections::{BTreeSet, HashSet},
    path::Path,
};

use super::{LakeOptions, attach::data_path};
use crate::olap::{
    TargetError,
    connection::TargetConnection,
    names::{CATALOG, literal},
};

/// Returns the query of the schema, the table and the path of each file that the lake names in
/// `files`, in schemas whose names begin with `prefix`.
fn named_files(files: &str, prefix: &str) -> String {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    format!(
        "SELECT s.schema_name, t.table_name, \
         CASE WHEN f.path_is_relative THEN CASE WHEN t.path_is_relative THEN \
         CASE WHEN s.path_is_relative THEN d.data_path ELSE '' END || s.path ELSE '' END \
         || t.path ELSE '' END || f.path AS file \
         FROM {metadata}.{files} f JOIN {metadata}.ducklake_table t USING (table_id) \
         JOIN {metadata}.ducklake_schema s USING (schema_id) \
         CROSS JOIN (SELECT data_path FROM {CATALOG}.settings()) d \
         WHERE f.end_snapshot IS NULL AND t.end_snapshot IS NULL AND s.end_snapshot IS NULL \
         AND starts_with(s.schema_name, {})",
        literal(prefix)
    )
}

/// Returns the tables of this copy, as schema and name, that lack a file which the lake names.
pub fn tables_with_lost_files(
    connection: &TargetConnection,
    options: &LakeOptions,
) -> Result<BTreeSet<(String, String)>, TargetError> {
    let named = |files| named_files(files, &options.schema_prefix);
    let sql =
        format!("{} UNION ALL {}", named("ducklake_data_file"), named("ducklake_delete_file"));
    let mut statement = connection.prepare(&sql)?;
    let files = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let files = files.collect::<Result<Vec<(String, String, String)>, _>>()?;

    let stored = stored_files(connection)?;
    let mut lost = BTreeSet::new();
    for (schema, table, file) in files {
        let is_stored = match &stored {
            Some(stored) => stored.contains(&file),
            None => is_there(Path::new(&file))?,
        };
        if !is_stored {
            lost.insert((schema, table));
        }
    }

    if stored.is_none() && !lost.is_empty() {
        know_folder(connection)?;
    }
    Ok(lost)
}

/// The file that marks the folder of a lake's data: without it the volume is not mounted.
const MARK: &str = ".rhei-lake";
const WHY: &str = "By this file rhei knows that the data of the lake is mounted here.\n";
/// How many files are looked for in a folder without a mark.
const LOOKED_FOR: u32 = 100;

/// Looks for the mark of the folder, and marks it if it has none. Returns whether it was marked by
/// rhei: if not, files may be missing. An empty mark is that of an operator who has given lost data
/// up. A store needs no mark.
///
/// # Errors
/// The folder is not mounted: it has no mark, and no file that the lake names.
pub fn know_folder(connection: &TargetConnection) -> Result<bool, TargetError> {
    let folder = data_path(connection)?;
    let mark = folder.join(MARK);
    if is_in_store(&folder) {
        return Ok(true);
    }
    if is_there(&mark)? {
        let is_by_rhei = std::fs::metadata(&mark)?.len() > 0;
        if !is_by_rhei {
            std::fs::write(&mark, WHY)?;
        }
        return Ok(is_by_rhei);
    }

    // DuckLake makes folders wherever it is to write, so a folder is no sign.
    let sql = format!("{} LIMIT {LOOKED_FOR}", named_files("ducklake_data_file", ""));
    let mut statement = connection.prepare(&sql)?;
    let files = statement.query_map([], |row| row.get::<_, String>(2))?;
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let mut is_mounted = files.is_empty();
    for file in files {
        is_mounted = is_mounted || is_there(Path::new(&file))?;
    }
    if !is_mounted {
        return Err(TargetError::NoData { folder, mark });
    }

    std::fs::create_dir_all(&folder)?;
    std::fs::write(mark, WHY)?;
    Ok(false)
}

/// Returns whether a file is there. A folder that cannot be read at the moment has lost nothing.
fn is_there(file: &Path) -> Result<bool, TargetError> {
    file.try_exists().map_err(|error| TargetError::LakeAway { source: Box::new(error.into()) })
}

fn is_in_store(data: &Path) -> bool {
    data.display().to_string().contains("://")
}

/// Returns the files of a store, which lists thousands of them in one answer; none for a folder.
fn stored_files(connection: &TargetConnection) -> Result<Option<HashSet<String>>, TargetError> {
    let data = data_path(connection)?;
    if !is_in_store(&data) {
        return Ok(None);
    }

    let sql = format!("SELECT file FROM glob({})", literal(&format!("{}**", data.display())));
    let mut statement = connection.prepare(&sql)?;
    let files = statement.query_map([], |row| row.get(0))?;
    Ok(Some(files.collect::<Result<_, _>>()?))
}
