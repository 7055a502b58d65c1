//! Rewrites the file: measures how much of the file is used, and writes it again without the space
//! of deleted rows.
//!
//! DuckDB reuses free space within a file, but does not return it to the disk. To shrink a file,
//! rhei writes its content into a new file beside it, compares the two table by table, and puts the
//! new file in the place of the old one by one rename.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Instant,
};

use duckdb::Connection;
use serde::Serialize;

use super::{DuckDb, TargetError, lake::LakeSpace, names};
use crate::failpoint::reached;

/// The size of the file, and of its content. Sizes are in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Space {
    pub file_bytes: u64,
    /// The part of `file_bytes` that is free for new rows.
    pub free_bytes: u64,
    /// DuckDB's write-ahead log, which the next file checkpoint writes into the file.
    pub log_bytes: u64,
    /// The rows in row groups, including deleted rows until their row group is rewritten.
    pub stored_rows: u64,
    /// What else there is of a lake, whose `file_bytes` are those of all its files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lake: Option<LakeSpace>,
}

/// What DuckDB uses, by its own account; in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    pub used_bytes: u64,
    /// What DuckDB keeps in temporary files, since its memory is too small for it.
    pub spilled_bytes: u64,
}

pub(super) fn memory(connection: &Connection) -> Result<Memory, TargetError> {
    let sql = "SELECT coalesce(sum(memory_usage_bytes), 0)::UBIGINT, \
               coalesce(sum(temporary_storage_bytes), 0)::UBIGINT FROM duckdb_memory()";
    let of =
        |row: &duckdb::Row<'_>| Ok(Memory { used_bytes: row.get(0)?, spilled_bytes: row.get(1)? });
    Ok(connection.query_row(sql, [], of)?)
}

/// The result of [`super::FileMaintenance::compact`].
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Compacted {
    pub before: Space,
    pub after: Space,
    /// The rows that readers see, before and after.
    pub rows: u64,
    pub tables: u64,
    pub seconds: f64,
}

/// The name under which the new file is attached while it is written.
const NEXT: &str = "rhei_next";

/// The ending of the name of the new file, until it takes the name of the old one.
const NEW_FILE: &str = ".compacting";

/// Returns how many bytes of a new file for `path` are written, by any process; 0 when no process
/// writes one.
pub fn written_beside(path: &Path) -> u64 {
    fs::canonicalize(path).map_or(0, |path| {
        let next = sibling(&path, NEW_FILE);
        size(&next) + size(&sibling(&next, ".wal"))
    })
}

/// Returns the size of a file, or 0 when there is no such file.
pub(super) fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

/// Returns the path of the new file that is written for `path`.
pub(super) fn next_of(path: &Path) -> PathBuf {
    sibling(path, NEW_FILE)
}

pub(super) fn sibling(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}

/// Reads sizes. `stored_rows` is DuckDB's own count; reading it scans no table.
pub(super) fn space(connection: &Connection, path: &Path) -> Result<Space, TargetError> {
    let (block_size, free): (u64, u64) = connection.query_row(
        "SELECT block_size, free_blocks FROM pragma_database_size() WHERE database_name = \
         current_database()",
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;

    let stored_rows = connection.query_row(
        "SELECT coalesce(sum(estimated_size), 0)::UBIGINT FROM duckdb_tables() WHERE database_name \
         = current_database()",
        [],
        |row| row.get(0),
    )?;

    let (file_bytes, log_bytes) = (size(path), size(&sibling(path, ".wal")));
    Ok(Space { file_bytes, free_bytes: block_size * free, log_bytes, stored_rows, lake: None })
}

/// Returns all tables of a database: the name, the number of rows, and a sum over the hashes of all
/// rows, which does not depend on their order.
fn contents(
    connection: &Connection,
    database: &str,
) -> Result<Vec<(String, u64, String)>, TargetError> {
    let mut names = connection.prepare(
        "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = ? ORDER BY \
         schema_name, table_name",
    )?;
    let names = names.query_map([database], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let names = names.collect::<Result<Vec<(String, String)>, _>>()?;

    let mut contents = Vec::with_capacity(names.len());
    for (schema, table) in names {
        let name = format!("{}.{}", names::quoted(&schema), names::quoted(&table));

        // No column has this name: DuckDB would take it for the column instead of the row.
        let row = names::quoted("_rhei\u{1}row");
        // Values that are equal to DuckDB have one hash, even if they print differently.
        let mut hashed = vec![row.clone()];
        hashed.extend(coarse_columns(connection, database, &schema, &table)?);

        let sql = format!(
            "SELECT count(*), coalesce(sum(hash({})), 0)::VARCHAR FROM {database}.{name} {row}",
            hashed.join(", ")
        );
        let (rows, hash) = connection.query_row(&sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;

        contents.push((name, rows, hash));
    }

    Ok(contents)
}

/// Returns the text of the columns whose equality is coarser than their printed values.
fn coarse_columns(
    connection: &Connection,
    database: &str,
    schema: &str,
    table: &str,
) -> Result<Vec<String>, TargetError> {
    let mut columns = connection.prepare(
        "SELECT column_name, data_type FROM duckdb_columns() WHERE database_name = ? \
         AND schema_name = ? \
         AND table_name = ? ORDER BY column_index",
    )?;

    let columns =
        columns.query_map([database, schema, table], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let columns = columns.collect::<Result<Vec<(String, String)>, _>>()?;
    let coarse = columns.into_iter().filter(|(_, data_type)| names::has_coarse_equality(data_type));
    Ok(coarse.map(|(column, _)| format!("{}::VARCHAR", names::quoted(&column))).collect())
}

/// Returns everything else in the database, one text for each kind.
fn other_objects(connection: &Connection, database: &str) -> Result<Vec<String>, TargetError> {
    const KINDS: [(&str, &str); 8] = [
        (
            "columns",
            "schema_name, table_name, column_name, data_type, column_default, is_nullable, comment",
        ),
        ("tables", "schema_name, table_name, comment"),
        ("views", "schema_name, view_name, sql, comment"),
        ("indexes", "schema_name, table_name, index_name, is_unique, expressions"),
        ("sequences", "schema_name, sequence_name, start_value, increment_by, cycle"),
        ("functions", "schema_name, function_name, macro_definition"),
        ("types", "schema_name, type_name, logical_type"),
        ("constraints", "schema_name, table_name, constraint_text"),
    ];

    let list = |(kind, columns): (&str, &str)| {
        let sql = format!(
            "SELECT coalesce(string_agg(described, chr(10) ORDER BY described), '') \
             FROM (SELECT ROW({columns})::VARCHAR AS \
             described FROM duckdb_{kind}() WHERE database_name = ?)"
        );
        connection.query_row(&sql, [database], |row| row.get(0)).map_err(TargetError::from)
    };
    KINDS.into_iter().map(list).collect()
}

impl DuckDb {
    /// The body of [`super::FileMaintenance::compact`].
    pub(super) fn rewrite_file(&mut self) -> Result<Compacted, TargetError> {
        let started = Instant::now();
        let refused = |reason: String| TargetError::NotCompacted { reason };

        if self.has_open_parts() {
            return Err(refused(
                "a large transaction is being applied\nhint: try again in a while".to_owned(),
            ));
        }
        if !self.copying.is_empty() || self.is_used() {
            return Err(refused(
                "tables are being copied, or the copy is being read\nhint: try again in a while"
                    .to_owned(),
            ));
        }

        // A symbolic link stays a symbolic link.
        let path = fs::canonicalize(self.path())?;
        let next = sibling(&path, NEW_FILE);
        let before = space(&self.connection, &path)?;

        self.tuning.use_all_threads(&self.connection)?;
        let written = self.write_next(&next);
        // A failed step may have left the new file attached.
        let _ = self.connection.execute_batch(&format!("DETACH DATABASE IF EXISTS {NEXT}"));

        let replaced = written.and_then(|contents| {
            let permissions = fs::metadata(&path)?.permissions();
            fs::set_permissions(&next, permissions)?;
            File::open(&next)?.sync_all()?;
            reached("compact.written");

            self.put_in_place(&next, &path)?;
            Ok(contents)
        });

        let contents = match replaced {
            Ok(contents) => contents,
            Err(error) => {
                let _ = fs::remove_file(&next);
                let _ = fs::remove_file(sibling(&next, ".wal"));
                return Err(match error {
                    // The file is closed, which the error already states.
                    error @ TargetError::Closed { .. } => error,
                    error => TargetError::CompactionFailed { source: Box::new(error) },
                });
            }
        };

        Ok(Compacted {
            before,
            after: space(&self.connection, &path)?,
            rows: contents.iter().map(|(_, rows, _)| rows).sum(),
            tables: contents.len() as u64,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// Closes the file, renames the new file, and opens it. The log belongs to the old file: it is
    /// written into that file before, and does not exist any more at the rename.
    fn put_in_place(&mut self, next: &Path, path: &Path) -> Result<(), TargetError> {
        self.keep_readers_out()?;
        if let Err(error) = self.connection.checkpoint() {
            self.gate.open();
            return Err(error);
        }
        if let Err(error) = self.detach() {
            self.reattach()?;
            return Err(error);
        }

        reached("compact.closed");
        let moved = match fs::exists(sibling(path, ".wal")) {
            Ok(false) => fs::rename(next, path).map_err(TargetError::from),
            Ok(true) => {
                Err(TargetError::NotCompacted { reason: "DuckDB left a log behind".to_owned() })
            }
            Err(error) => Err(error.into()),
        };

        reached("compact.renamed");
        self.reattach()?;
        moved?;

        if let Some(folder) = path.parent() {
            // A crash before this sync leaves the old file, which is equally valid.
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(())
    }

    /// Writes everything into a new file and compares the two.
    fn write_next(&mut self, next: &Path) -> Result<Vec<(String, u64, String)>, TargetError> {
        let connection = &self.connection;
        let gone = |path: &Path| match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };

        // A crash may have left these files.
        gone(next)?;
        gone(&sibling(next, ".wal"))?;

        let file = names::literal(&next.display().to_string());
        connection.execute_batch(&format!(
            "ATTACH {file} AS {NEXT} (STORAGE_VERSION 'latest'); COPY FROM DATABASE {} TO {NEXT}; \
             CHECKPOINT {NEXT};",
            names::CATALOG
        ))?;

        let (old, new) = (contents(connection, names::CATALOG)?, contents(connection, NEXT)?);
        if old != new
            || other_objects(connection, names::CATALOG)? != other_objects(connection, NEXT)?
        {
            let differs =
                old.iter().zip(&new).find(|(old, new)| old != new).map(|(old, _)| old.0.clone());
            let what = differs.unwrap_or_else(|| "what else is in the file".to_owned());
            return Err(TargetError::NotCompacted {
                reason: format!("{what} came out different in the new file"),
            });
        }
        Ok(old)
    }
}
