//! Which files of a table are written again, and in what portions.
//!
//! A commit that deletes rows writes the positions of all deleted rows of a file again, so a commit
//! takes longer the more rows of its files are deleted. A file is written again once a twentieth of
//! its rows is deleted, for readers; and earlier once writing these positions has cost about as
//! much as writing the files: in a large table that is long before.

use std::ops::Range;

use super::{CatalogKind, LakeOptions, upkeep::Backlog};
use crate::{
    olap::{
        TargetError,
        connection::TargetConnection,
        names::{CATALOG, literal, quoted},
    },
    pgoutput::QualifiedName,
};

/// The most that one step writes again, in bytes, unless a single file is larger: the stream waits
/// meanwhile.
const STEP_BYTES: u64 = 128 << 20;
/// A table stays in about this number of files at least, if they are not small: a commit works on
/// several files at a time.
const FILES: u64 = 4;
const SMALL_BYTES: u64 = 4 << 20;

/// A file is written again when this part of its rows is deleted.
const DELETED_SHARE: f64 = 0.05;

/// DuckLake merges files of like size, so that no row is written again for each few that are added:
/// four files or more that are smaller than the file size divided by one of these numbers, and not
/// smaller than the file size divided by the number before it.
const SIZES: [u64; 3] = [256, 32, 4];
const MERGED_FILES: usize = 4;
/// What a look at all tables finds worth a step.
const LEFT_FILES: u32 = 8;

/// A table has a lot in the catalog when it has more than this number of rows there.
const LEFT_ROWS: u32 = 10_000;

/// A data file that is part of the table now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DataFile {
    pub bytes: u64,
    pub rows: u64,
    /// How many of the rows are deleted.
    pub deleted: u64,
}

impl DataFile {
    fn deleted_share(&self) -> f64 {
        if self.deleted == 0 { 0.0 } else { self.deleted as f64 / self.rows as f64 }
    }

    fn is_due_for_rewrite(&self, part: f64) -> bool {
        self.deleted > 0 && self.deleted_share() >= part
    }

    /// About the size of the file without its deleted rows.
    fn left_bytes(&self) -> u64 {
        (self.bytes as f64 * (1.0 - self.deleted_share())) as u64
    }
}

/// Returns the data files of a table; none if there is no such table.
pub fn of_table(
    connection: &TargetConnection,
    table: &QualifiedName,
) -> Result<Vec<DataFile>, TargetError> {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    let mut statement = connection.prepare(&format!(
        "SELECT table_id FROM {metadata}.ducklake_table t \
         JOIN {metadata}.ducklake_schema s USING (schema_id) WHERE t.end_snapshot IS NULL \
         AND s.end_snapshot IS NULL AND s.schema_name = ? AND t.table_name = ?"
    ))?;
    let ids = statement.query_map([&table.schema, &table.name], |row| row.get(0))?;
    let ids = ids.collect::<Result<Vec<u64>, _>>()?;
    let Some(id) = ids.first() else { return Ok(Vec::new()) };

    // The number stands in the text, so that the catalog looks for it.
    let mut statement = connection.prepare(&format!(
        "SELECT f.file_size_bytes, f.record_count, coalesce(d.delete_count, 0) \
         FROM {metadata}.ducklake_data_file f LEFT JOIN (SELECT data_file_id, delete_count \
         FROM {metadata}.ducklake_delete_file WHERE table_id = {id} AND end_snapshot IS NULL) d \
         USING (data_file_id) WHERE f.table_id = {id} AND f.end_snapshot IS NULL \
         ORDER BY data_file_id"
    ))?;
    let files = statement.query_map([], |row| {
        Ok(DataFile { bytes: row.get(0)?, rows: row.get(1)?, deleted: row.get(2)? })
    })?;
    Ok(files.collect::<Result<_, _>>()?)
}

/// Returns the least part of deleted rows for which a file is written again. `written`: how many
/// positions of deleted rows commits have written to the table's files.
pub fn rewrite_threshold(files: &[DataFile], written: u64) -> f64 {
    let rows: u64 = files.iter().map(|file| file.rows).sum();
    let deleted: u64 = files.iter().map(|file| file.deleted).sum();
    if written < rows / 2 || rows == 0 {
        return DELETED_SHARE;
    }
    // Where deletions are spread evenly this is every file, or else those that have most of them.
    (deleted as f64 / rows as f64 / 2.0).min(DELETED_SHARE)
}

/// Returns what is written when all files are written again of whose rows this part is deleted.
pub fn rewrite_bytes(files: &[DataFile], part: f64) -> u64 {
    files.iter().filter(|file| file.is_due_for_rewrite(part)).map(DataFile::left_bytes).sum()
}

/// What one step writes again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Portion {
    /// The files of whose rows this part is deleted, or more.
    pub deleted_share: f64,
    /// What is written, in bytes.
    pub bytes: u64,
    /// Other files are left for another step.
    pub is_last: bool,
}

/// Returns the files of which most is deleted, as many as one step writes again: of those where
/// the deleted part is at least `part`. DuckLake takes all files of which the same part is deleted;
/// where these are too many, they wait until later deletions tell them apart, unless every file is
/// asked for (`part` is 0).
pub fn next_rewrite(files: &[DataFile], part: f64) -> Option<Portion> {
    let mut due: Vec<&DataFile> =
        files.iter().filter(|file| file.is_due_for_rewrite(part)).collect();
    due.sort_by(|one, other| other.deleted_share().total_cmp(&one.deleted_share()));

    let all: u64 = files.iter().map(|file| file.bytes).sum();
    let most = (all / FILES).clamp(SMALL_BYTES, STEP_BYTES);
    let (mut taken, mut bytes, mut last) = (0, 0, None);
    for alike in due.chunk_by(|one, other| one.deleted_share() == other.deleted_share()) {
        let more: u64 = alike.iter().map(|file| file.left_bytes()).sum();
        let is_allowed = match (taken, alike.len()) {
            (0, 1) => true,
            // An operator who asks for every file need not be told to wait.
            (0, _) => more <= 2 * most || part == 0.0,
            _ => bytes + more <= most,
        };
        if !is_allowed {
            if taken > 0 {
                break;
            }
            // Files of which less is deleted cannot be taken without these.
            return None;
        }
        (taken, bytes, last) = (taken + alike.len(), bytes + more, alike.last());
    }

    // DuckLake divides again, and may round otherwise.
    let deleted_share = (last?.deleted_share() - 1e-9).max(0.0);
    Some(Portion { deleted_share, bytes, is_last: taken == due.len() })
}

/// Returns the ranges of sizes, in bytes, in which there are enough files to merge. DuckLake merges
/// no file of which rows are deleted.
pub fn mergeable(files: &[DataFile], file_bytes: u64) -> Vec<Range<u64>> {
    let mut from = 0;
    let ranges = SIZES.map(|part| {
        let below = (file_bytes / part).max(from + 1);
        std::mem::replace(&mut from, below)..below
    });

    let count = |range: &Range<u64>| {
        let fits = |file: &&DataFile| file.deleted == 0 && range.contains(&file.bytes);
        files.iter().filter(fits).count()
    };
    ranges.into_iter().filter(|range| count(range) >= MERGED_FILES).collect()
}

/// What is left to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LeftBehind {
    pub tables: Vec<QualifiedName>,
    /// The state has many rows that no snapshot sees.
    pub is_state_full: bool,
}

/// Finds the tables of this copy with many small files, with many deleted rows, or with many rows
/// in the catalog.
pub fn left_behind(
    connection: &TargetConnection,
    options: &LakeOptions,
    backlog: Backlog,
) -> Result<LeftBehind, TargetError> {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    let prefix = literal(&options.schema_prefix);
    let names = format!(
        "SELECT t.table_id, s.schema_name, t.table_name FROM {metadata}.ducklake_table t \
         JOIN {metadata}.ducklake_schema s USING (schema_id) WHERE t.end_snapshot IS NULL \
         AND s.end_snapshot IS NULL AND starts_with(s.schema_name, {prefix})"
    );

    let small = options.file_bytes / SIZES[2];
    let deletes = current_deletes();
    let with_files = format!(
        "SELECT table_id FROM (SELECT table_id FROM {metadata}.ducklake_data_file \
         WHERE end_snapshot IS NULL AND file_size_bytes < {small} UNION ALL \
         SELECT table_id FROM {deletes}) GROUP BY table_id HAVING count(*) >= {LEFT_FILES}"
    );
    let with_deleted = format!(
        "SELECT table_id FROM (SELECT table_id, sum(delete_count) AS deleted FROM {deletes} \
         GROUP BY ALL) \
         JOIN (SELECT table_id, sum(record_count) AS stored FROM {metadata}.ducklake_data_file \
         WHERE end_snapshot IS NULL GROUP BY ALL) USING (table_id) \
         WHERE deleted >= stored * {DELETED_SHARE}"
    );
    let rows = match backlog {
        Backlog::Unknown => inlined_rows(connection, options)?,
        Backlog::UnknownFiles | Backlog::Known => Vec::new(),
    };
    let with_rows: Vec<String> = rows.iter().map(u64::to_string).collect();
    let mut statement = connection.prepare(&format!(
        "SELECT schema_name, table_name FROM ({names}) WHERE table_id IN ({with_files}) \
         OR table_id IN ({with_deleted}) OR list_contains([{}]::BIGINT[], table_id)",
        with_rows.join(", ")
    ))?;
    let found = statement.query_map([], |row| {
        Ok(QualifiedName::new(row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;

    let mut left = LeftBehind::default();
    for table in found.collect::<Result<Vec<_>, _>>()? {
        if table.schema == connection.state_schema() {
            left.is_state_full = true;
        } else {
            left.tables.push(table);
        }
    }
    Ok(left)
}

/// Returns the delete files of the present data files, as a subquery.
pub fn current_deletes() -> String {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    format!(
        "(SELECT d.table_id, d.delete_count, d.file_size_bytes \
         FROM {metadata}.ducklake_delete_file d JOIN {metadata}.ducklake_data_file f \
         USING (data_file_id) WHERE d.end_snapshot IS NULL AND f.end_snapshot IS NULL)"
    )
}

/// Returns the ids of the tables that have many rows in the catalog. PostgreSQL knows about how
/// many there are; in a file they are counted.
fn inlined_rows(
    connection: &TargetConnection,
    options: &LakeOptions,
) -> Result<Vec<u64>, TargetError> {
    let metadata = format!("__ducklake_metadata_{CATALOG}");
    let query = if options.catalog_kind() == CatalogKind::Postgres {
        format!(
            "SELECT * FROM postgres_query('{metadata}', \
             'SELECT DISTINCT i.table_id FROM ducklake_inlined_data_tables i \
             JOIN pg_class c ON c.relname = i.table_name WHERE c.reltuples > {LEFT_ROWS}')"
        )
    } else {
        let mut statement = connection.prepare(&format!(
            "SELECT table_id, table_name FROM {metadata}.ducklake_inlined_data_tables"
        ))?;
        let tables = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let counts: Vec<String> = tables
            .map(|table| {
                let (id, name): (u64, String) = table?;
                Ok(format!(
                    "SELECT {id} AS id WHERE (SELECT count(*) FROM {metadata}.{}) > {LEFT_ROWS}",
                    quoted(&name)
                ))
            })
            .collect::<Result<_, duckdb::Error>>()?;
        if counts.is_empty() {
            return Ok(Vec::new());
        }
        counts.join(" UNION ALL ")
    };

    let mut statement = connection.prepare(&query)?;
    let ids = statement.query_map([], |row| row.get(0))?;
    Ok(ids.collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    fn file(bytes: u64, rows: u64, deleted: u64) -> DataFile {
        DataFile { bytes, rows, deleted }
    }

    #[test]
    fn a_step_writes_the_files_again_of_which_most_is_deleted() {
        let mut files =
            vec![file(60 * MB, 1000, 100), file(60 * MB, 1000, 300), file(60 * MB, 1000, 40)];
        files.extend([file(500 * MB, 10_000, 1); 2]);
        let portion = next_rewrite(&files, DELETED_SHARE).unwrap();
        assert!(portion.is_last && portion.deleted_share > 0.099 && portion.deleted_share < 0.1);

        // The third one is more than a step takes.
        let more = next_rewrite(&files, 0.01).unwrap();
        assert!(!more.is_last && more.deleted_share > 0.099, "{more:?}");
        assert_eq!(next_rewrite(&files, 0.5), None);

        let small = [file(3 * MB, 1000, 300), file(3 * MB, 1000, 200), file(3 * MB, 1000, 100)];
        let first = next_rewrite(&small, DELETED_SHARE).unwrap();
        assert!(!first.is_last && first.deleted_share > 0.2, "{first:?}");
        assert_eq!(rewrite_bytes(&small, 0.15), small[0].left_bytes() + small[1].left_bytes());
        assert_eq!(next_rewrite(&[file(MB, 10, 0)], 0.0), None);

        let large = next_rewrite(&[file(900 * MB, 10, 5), file(MB, 10, 4)], DELETED_SHARE).unwrap();
        assert!(!large.is_last && large.deleted_share > 0.49, "{large:?}");
    }

    #[test]
    fn files_of_which_the_same_part_is_deleted_wait_when_they_are_too_many_for_a_step() {
        let alike = [file(60 * MB, 1000, 200); 20];
        assert_eq!(next_rewrite(&alike, DELETED_SHARE), None);
        assert!(next_rewrite(&alike, 0.0).unwrap().is_last);
        let few = [file(MB, 1000, 200); 3];
        assert!(next_rewrite(&few, DELETED_SHARE).unwrap().is_last);

        // Another file has more; those that are alike are left.
        let mut told_apart = alike.to_vec();
        told_apart.push(file(60 * MB, 1000, 201));
        let portion = next_rewrite(&told_apart, DELETED_SHARE).unwrap();
        assert!(!portion.is_last && portion.deleted_share > 0.2, "{portion:?}");

        // Nothing is left of them to be written.
        assert!(next_rewrite(&[file(60 * MB, 1000, 1000); 20], DELETED_SHARE).unwrap().is_last);
    }

    #[test]
    fn files_are_written_again_earlier_when_commits_write_many_positions() {
        let files = [file(MB, 1000, 20), file(MB, 1000, 0)];
        assert_eq!(rewrite_threshold(&files, 999), DELETED_SHARE);
        assert_eq!(rewrite_threshold(&files, 1000), 0.005);
        assert_eq!(rewrite_threshold(&[file(MB, 10, 9)], 1000), DELETED_SHARE);
        assert_eq!(rewrite_threshold(&[], 0), DELETED_SHARE);
    }

    #[test]
    fn files_of_like_size_are_merged_when_there_are_many() {
        let from = |count: usize, file: DataFile| -> Vec<u64> {
            let ranges = mergeable(&vec![file; count], 128 * MB);
            ranges.iter().map(|sizes| sizes.start).collect()
        };
        let small = file(100_000, 10, 0);
        assert_eq!(from(3, small), [0; 0]);
        assert_eq!(from(4, small), [0]);
        assert_eq!(from(4, file(MB / 2, 10, 0)), [MB / 2]);
        assert_eq!(from(4, file(20 * MB, 10, 0)), [4 * MB]);
        assert_eq!(from(4, file(32 * MB, 10, 0)), [0; 0]);
        assert_eq!(from(4, file(100_000, 10, 1)), [0; 0]);
    }
}
