//! The comparison of one table: sums over buckets of rows, then the rows of the buckets that
//! differ, then the cells of the rows that differ.
//!
//! The hash of a row's key says which bucket the row is in, so both sides cut a table in the same
//! way whatever its key is. The row hash binds the cells to each other: two values that were
//! swapped between rows are found. The rows of a table without a key are their own keys.

use std::collections::{BTreeMap, BTreeSet};

use arrow::record_batch::RecordBatch;
use futures_util::TryStreamExt;

use super::{
    HashSum, SourceTypes, TableRule,
    report::{ColumnDifference, RowDifference, RowVerdict, TableReport, TableVerdict},
};
use crate::{
    backfill::{release_locks, watch_locks},
    change::{ColumnSpec, TableSpec},
    olap::{TargetError, TargetReader, names},
    pipeline::EngineError,
    source::{
        catalog::CatalogError,
        connection::SqlClient,
        quote::{quote_identifier, quote_literal},
    },
};

/// The rows that a bucket has on average.
const BUCKET_ROWS: u64 = 4096;

/// The copy may hold fewer rows than the source, so even an empty table is cut into some buckets.
const MIN_BUCKETS: u64 = 1 << 10;
const MAX_BUCKETS: u64 = 1 << 16;

/// At most this number of rows of buckets that differ are compared, 16 bytes for each in memory;
/// the table is then too different for a list of its rows to be of use.
const MAX_READ_ROWS: u64 = 4_000_000;

/// At most this number of rows that differ are described.
const MAX_DESCRIBED: usize = 100;

/// The most columns of which one query asks for a hash and a value.
const COLUMNS_OF_A_QUERY: usize = 400;

/// One table, compared under one snapshot of the source and one of the copy.
pub(super) struct Comparison<'a> {
    sql: &'a SqlClient,
    spec: &'a TableSpec,
    types: SourceTypes<'a>,
    row: TableRule,
    key: TableRule,
    /// What the source reads from.
    source: String,
    /// The condition of the publication's row filter, or none.
    row_filter: Option<&'a str>,
    shows_values: bool,
}

/// A row by its hashes.
type RowHashes = (u64, u64);

impl<'a> Comparison<'a> {
    /// Prepares the comparison. `None`: the source has no such table any more.
    pub(super) async fn new(
        sql: &'a SqlClient,
        spec: &'a TableSpec,
        types: SourceTypes<'a>,
        row_filter: Option<&'a str>,
        shows_values: bool,
    ) -> Result<Option<Self>, EngineError> {
        let Some(source) = relation_at_source(sql, spec.oid).await? else { return Ok(None) };

        let row = TableRule::new(spec, types);
        let key = TableRule::of_columns(spec, spec.key_columns(), types);
        // A key whose columns have no common form tells no rows apart.
        let is_key = !spec.key_columns().is_empty() && key.undecidable().next().is_none();
        let key = if is_key { key } else { row.clone() };
        Ok(Some(Self { sql, spec, types, row, key, source, row_filter, shows_values }))
    }

    /// Compares the table.
    pub(super) async fn run<R: TargetReader>(
        self,
        reader: &mut R,
    ) -> Result<TableReport, EngineError> {
        let mut report = TableReport::new(self.spec.source.to_string());
        report.not_compared = self
            .row
            .undecidable()
            .map(|(column, reason)| (column.to_owned(), reason.to_owned()))
            .collect();

        let rows = self.count_copy(reader)?;
        let buckets = (rows / BUCKET_ROWS).clamp(MIN_BUCKETS, MAX_BUCKETS).next_power_of_two();

        // The source computes its sums while those of the copy are computed here.
        let (of_source, of_copy) =
            tokio::join!(self.source_sums(buckets), async { self.copy_sums(reader, buckets) });
        let (of_source, of_copy) = (of_source?, of_copy?);
        report.source_rows = of_source.values().map(|sum| sum.count).sum();
        report.copy_rows = of_copy.values().map(|sum| sum.count).sum();

        let (differing, read) = differing_buckets(&of_source, &of_copy);
        if differing == 0 {
            return Ok(report);
        }

        report.verdict = TableVerdict::Different;
        if read.len() < differing {
            report.reason = Some(format!(
                "{differing} of {buckets} parts of the table differ; the rows of {} were compared",
                read.len()
            ));
        }

        let of_source = self.source_rows(buckets, &read).await?;
        let of_copy = self.copy_rows(reader, buckets, &read)?;
        let found = differing_rows(of_source, of_copy);

        for (_, kind) in &found {
            match kind {
                RowVerdict::Missing => report.missing += 1,
                RowVerdict::Extra => report.extra += 1,
                RowVerdict::Different => report.different += 1,
            }
        }

        report.differences = self.describe(reader, &found).await?;
        Ok(report)
    }

    fn count_copy<R: TargetReader>(&self, reader: &mut R) -> Result<u64, TargetError> {
        let sql = format!("SELECT count(*)::UBIGINT AS n FROM {}", self.target());
        let mut count = 0;
        select(reader, &sql, &mut |batch| {
            let counts = batch.column(0).as_any().downcast_ref::<arrow::array::UInt64Array>();
            count += counts.map_or(0, |counts| counts.iter().flatten().sum());
            Ok(())
        })?;
        Ok(count)
    }

    fn target(&self) -> String {
        names::table(&self.spec.target)
    }

    /// Returns SQL for the rows of the source that the copy holds and that meet a condition, if one
    /// is given.
    fn source_where(&self, condition: &str) -> String {
        let filter = self.row_filter.map(|filter| format!("({filter})"));
        let conditions: Vec<&str> = filter
            .as_deref()
            .into_iter()
            .chain(Some(condition))
            .filter(|it| !it.is_empty())
            .collect();

        match conditions.as_slice() {
            [] => self.source.clone(),
            conditions => format!("{} WHERE {}", self.source, conditions.join(" AND ")),
        }
    }

    async fn source_sums(&self, buckets: u64) -> Result<BTreeMap<u64, HashSum>, EngineError> {
        let query = format!(
            "SELECT (k & {})::bigint, count(*)::bigint, sum(h)::text FROM (SELECT {} AS k, {} AS \
             h FROM {}) hashed GROUP BY 1",
            buckets - 1,
            self.key.source_hash(),
            self.row.source_hash(),
            self.source_where("")
        );

        let mut sums = BTreeMap::new();
        for row in self.query(&query).await? {
            let sum: String = row.try_get(2)?;
            let sum = sum
                .parse()
                .map_err(|_| CatalogError::UnexpectedAnswer { what: "a sum", found: sum })?;
            let (bucket, count): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
            sums.insert(bucket.cast_unsigned(), HashSum { count: count.cast_unsigned(), sum });
        }
        Ok(sums)
    }

    fn copy_sums<R: TargetReader>(
        &self,
        reader: &mut R,
        buckets: u64,
    ) -> Result<BTreeMap<u64, HashSum>, TargetError> {
        let mut sums: BTreeMap<u64, HashSum> = BTreeMap::new();
        self.each_copied_row(reader, |key, row| {
            let sum = sums.entry(key & (buckets - 1)).or_default();
            *sum += HashSum { count: 1, sum: i128::from(row.cast_signed()) };
        })?;
        Ok(sums)
    }

    /// Hashes each row of the copy.
    fn each_copied_row<R: TargetReader>(
        &self,
        reader: &mut R,
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), TargetError> {
        let sql = format!(
            "SELECT {}, {} FROM {}",
            self.row.copy_select(),
            self.key.copy_select(),
            self.target()
        );
        let (row, key) = (&self.row, &self.key);
        let (mut rows, mut keys) = (Vec::new(), Vec::new());

        select(reader, &sql, &mut |batch| {
            let width = row.width();
            let all: Vec<usize> = (0..batch.num_columns()).collect();
            let (of_row, of_key) = all.split_at(width.min(all.len()));
            row.hash(&project(&batch, of_row)?, &mut rows).map_err(broken)?;
            key.hash(&project(&batch, of_key)?, &mut keys).map_err(broken)?;

            keys.iter().zip(&rows).for_each(|(key, row)| each(*key, *row));
            Ok(())
        })
    }

    async fn source_rows(
        &self,
        buckets: u64,
        read: &BTreeSet<u64>,
    ) -> Result<Vec<RowHashes>, EngineError> {
        let query = format!(
            "SELECT k, h FROM (SELECT {} AS k, {} AS h FROM {}) hashed WHERE (k & {}) = ANY ({})",
            self.key.source_hash(),
            self.row.source_hash(),
            self.source_where(""),
            buckets - 1,
            array(read.iter().map(|bucket| bucket.cast_signed()))
        );

        watch_locks(self.sql).await?;
        let read = async {
            let no_parameters: [i64; 0] = [];
            let mut rows = std::pin::pin!(self.sql.query_raw(&query, no_parameters).await?);

            let mut hashes = Vec::new();
            while let Some(row) = rows.try_next().await? {
                let (key, hash): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
                hashes.push((key.cast_unsigned(), hash.cast_unsigned()));
            }
            Ok::<_, tokio_postgres::Error>(hashes)
        };

        let hashes = read.await;
        release_locks(self.sql).await?;
        Ok(hashes?)
    }

    fn copy_rows<R: TargetReader>(
        &self,
        reader: &mut R,
        buckets: u64,
        read: &BTreeSet<u64>,
    ) -> Result<Vec<RowHashes>, TargetError> {
        let mut found = Vec::new();
        self.each_copied_row(reader, |key, row| {
            if read.contains(&(key & (buckets - 1))) {
                found.push((key, row));
            }
        })?;
        Ok(found)
    }

    /// Reads the keys of rows that differ, and which of their columns do.
    async fn describe<R: TargetReader>(
        &self,
        reader: &mut R,
        found: &[(u64, RowVerdict)],
    ) -> Result<Vec<RowDifference>, EngineError> {
        let described: BTreeMap<u64, RowVerdict> =
            found.iter().take(MAX_DESCRIBED).copied().collect();
        let wanted: BTreeSet<u64> = described.keys().copied().collect();

        let (mut of_source, mut of_copy) = (BTreeMap::new(), BTreeMap::new());
        let all: Vec<usize> = (0..self.spec.columns.len()).collect();
        for columns in all.chunks(COLUMNS_OF_A_QUERY) {
            self.source_cells(&wanted, columns, &mut of_source).await?;
            self.copy_cells(reader, &wanted, columns, &mut of_copy)?;
        }

        let nothing = BTreeMap::new();
        let mut differences: Vec<RowDifference> = described
            .iter()
            .map(|(key, kind)| {
                let in_source = of_source.get(key).unwrap_or(&nothing);
                let in_copy = of_copy.get(key).unwrap_or(&nothing);
                self.difference(*kind, in_source, in_copy)
            })
            .collect();
        differences.sort_by(|one, other| (one.kind, &one.key).cmp(&(other.kind, &other.key)));
        Ok(differences)
    }

    fn difference(
        &self,
        kind: RowVerdict,
        in_source: &BTreeMap<usize, Cell>,
        in_copy: &BTreeMap<usize, Cell>,
    ) -> RowDifference {
        let keys = self.spec.key_columns().iter().map(|at| {
            let cell = in_source.get(at).or_else(|| in_copy.get(at));
            let value = cell.and_then(|cell| cell.text.as_deref()).unwrap_or("NULL");
            format!("{}={value}", self.column(*at).map_or("", |column| &column.name))
        });
        let key = keys.collect::<Vec<_>>().join(", ");

        let mut columns = Vec::new();
        if kind == RowVerdict::Different {
            for (at, source) in in_source {
                let Some(copy) = in_copy.get(at).filter(|copy| copy.hash != source.hash) else {
                    continue;
                };
                let shown = |cell: &Cell| {
                    self.shows_values.then(|| cell.text.clone().unwrap_or("NULL".to_owned()))
                };
                columns.push(ColumnDifference {
                    column: self.column(*at).map_or(String::new(), |column| column.name.clone()),
                    source: shown(source),
                    copy: shown(copy),
                });
            }
        }
        RowDifference { kind, key, columns }
    }

    fn column(&self, at: usize) -> Option<&ColumnSpec> {
        self.spec.columns.get(at)
    }

    async fn source_cells(
        &self,
        wanted: &BTreeSet<u64>,
        columns: &[usize],
        cells: &mut BTreeMap<u64, BTreeMap<usize, Cell>>,
    ) -> Result<(), EngineError> {
        let selected: Vec<String> = columns
            .iter()
            .filter_map(|&at| {
                let rule = TableRule::of_columns(self.spec, &[at], self.types);
                let name = quote_identifier(&self.column(at)?.name);
                Some(format!("{}, {name}::text", rule.source_hash()))
            })
            .collect();

        let key = self.key.source_hash();
        let is_wanted = array(wanted.iter().map(|key| key.cast_signed()));
        let query = format!(
            "SELECT {key}, {} FROM {}",
            selected.join(", "),
            self.source_where(&format!("{key} = ANY ({is_wanted})"))
        );

        for row in self.query(&query).await? {
            let key: i64 = row.try_get(0)?;
            let of_row = cells.entry(key.cast_unsigned()).or_default();
            for (number, at) in columns.iter().enumerate() {
                let hash: i64 = row.try_get(1 + 2 * number)?;
                let text = row.try_get(2 + 2 * number)?;
                of_row.insert(*at, Cell { hash: hash.cast_unsigned(), text });
            }
        }
        Ok(())
    }

    fn copy_cells<R: TargetReader>(
        &self,
        reader: &mut R,
        wanted: &BTreeSet<u64>,
        columns: &[usize],
        cells: &mut BTreeMap<u64, BTreeMap<usize, Cell>>,
    ) -> Result<(), TargetError> {
        let rules: Vec<(usize, TableRule)> = columns
            .iter()
            .map(|&at| (at, TableRule::of_columns(self.spec, &[at], self.types)))
            .collect();
        let selected: Vec<String> = rules
            .iter()
            .filter_map(|(at, rule)| {
                let name = names::quoted(&self.column(*at)?.target_name);
                Some(format!("{}, {name}::VARCHAR", rule.copy_select()))
            })
            .collect();

        let sql = format!(
            "SELECT {}, {} FROM {}",
            self.key.copy_select(),
            selected.join(", "),
            self.target()
        );

        let key = &self.key;
        select(reader, &sql, &mut |batch| {
            let (mut keys, mut hashes) = (Vec::new(), Vec::new());
            let mut at = key.width();
            let of_key: Vec<usize> = (0..at).collect();
            key.hash(&project(&batch, &of_key)?, &mut keys).map_err(broken)?;
            let places: Vec<(usize, u64)> = keys
                .iter()
                .enumerate()
                .filter(|(_, key)| wanted.contains(key))
                .map(|(place, key)| (place, *key))
                .collect();
            if places.is_empty() {
                return Ok(());
            }

            for (column, rule) in &rules {
                let of_column: Vec<usize> = (at..at + rule.width()).collect();
                rule.hash(&project(&batch, &of_column)?, &mut hashes).map_err(broken)?;
                at += rule.width();
                let texts = batch.columns().get(at);
                at += 1;

                for (place, key) in &places {
                    let hash = hashes.get(*place).copied().unwrap_or_default();
                    let text = texts.and_then(|texts| text_at(texts.as_ref(), *place));
                    cells.entry(*key).or_default().insert(*column, Cell { hash, text });
                }
            }
            Ok(())
        })
    }

    /// Asks the source, and gives the locks of the question back.
    async fn query(&self, query: &str) -> Result<Vec<tokio_postgres::Row>, EngineError> {
        watch_locks(self.sql).await?;
        let rows = self.sql.query(query, &[]).await;
        release_locks(self.sql).await?;
        Ok(rows?)
    }
}

/// Runs a query on the copy.
fn select<R: TargetReader>(
    reader: &mut R,
    sql: &str,
    each: &mut dyn FnMut(RecordBatch) -> Result<(), TargetError>,
) -> Result<(), TargetError> {
    tokio::task::block_in_place(|| reader.select(sql, each))
}

/// A value by its hash, and as text.
struct Cell {
    hash: u64,
    text: Option<String>,
}

/// Returns SQL for what the source reads a table from, by its name of now. Of a partitioned table
/// all partitions are read; other children of a table are tables of their own.
async fn relation_at_source(sql: &SqlClient, oid: u32) -> Result<Option<String>, EngineError> {
    let row = sql
        .query_opt(
            "SELECT n.nspname::text, c.relname::text, c.relkind = 'p' FROM pg_catalog.pg_class c \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
            &[&oid],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };

    let (schema, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    let only = if row.try_get(2)? { "" } else { "ONLY " };
    Ok(Some(format!("{only}{}.{}", quote_identifier(&schema), quote_identifier(&name))))
}

/// Returns how many buckets differ, and those whose rows are compared.
fn differing_buckets(
    source: &BTreeMap<u64, HashSum>,
    copy: &BTreeMap<u64, HashSum>,
) -> (usize, BTreeSet<u64>) {
    let all: BTreeSet<u64> = source.keys().chain(copy.keys()).copied().collect();
    let differing: Vec<u64> =
        all.into_iter().filter(|bucket| source.get(bucket) != copy.get(bucket)).collect();

    let rows = |side: &BTreeMap<u64, HashSum>, bucket| side.get(bucket).map_or(0, |sum| sum.count);
    let mut room = MAX_READ_ROWS;
    let mut read = BTreeSet::new();

    for bucket in &differing {
        let rows = rows(source, bucket) + rows(copy, bucket);
        if rows > room && !read.is_empty() {
            break;
        }
        room = room.saturating_sub(rows);
        read.insert(*bucket);
    }
    (differing.len(), read)
}

/// Returns the rows that differ, by the hash of their key. Rows of the same key, as a table without
/// a key has them, are counted.
fn differing_rows(mut source: Vec<RowHashes>, mut copy: Vec<RowHashes>) -> Vec<(u64, RowVerdict)> {
    source.sort_unstable();
    copy.sort_unstable();

    let (mut source, mut copy) = (source.as_slice(), copy.as_slice());
    let mut found = Vec::new();
    while let Some(key) = source.first().into_iter().chain(copy.first()).map(|row| row.0).min() {
        let (of_source, of_copy) = (take_key(&mut source, key), take_key(&mut copy, key));

        let missing = of_source.len().saturating_sub(of_copy.len());
        let extra = of_copy.len().saturating_sub(of_source.len());
        found.extend(std::iter::repeat_n((key, RowVerdict::Missing), missing));
        found.extend(std::iter::repeat_n((key, RowVerdict::Extra), extra));

        if missing + extra == 0 && of_source != of_copy {
            found.push((key, RowVerdict::Different));
        }
    }
    found
}

/// Takes the rows of a key from the front of sorted rows.
fn take_key<'a>(rows: &mut &'a [RowHashes], key: u64) -> &'a [RowHashes] {
    let count = rows.iter().take_while(|row| row.0 == key).count();
    let (taken, rest) = rows.split_at(count);
    *rows = rest;
    taken
}

fn array(values: impl Iterator<Item = i64>) -> String {
    let values: Vec<String> = values.map(|value| value.to_string()).collect();
    format!("{}::bigint[]", quote_literal(&format!("{{{}}}", values.join(","))))
}

fn project(batch: &RecordBatch, columns: &[usize]) -> Result<RecordBatch, TargetError> {
    batch.project(columns).map_err(|error| TargetError::Rows { source: Box::new(error) })
}

fn broken(error: super::HashError) -> TargetError {
    TargetError::Rows { source: Box::new(error) }
}

fn text_at(texts: &dyn arrow::array::Array, at: usize) -> Option<String> {
    let options = arrow::util::display::FormatOptions::default();
    let formatter = arrow::util::display::ArrayFormatter::try_new(texts, &options).ok()?;
    (!texts.is_null(at)).then(|| formatter.value(at).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_missing_extra_or_different_by_their_keys() {
        use RowVerdict::{Different, Extra, Missing};

        for (name, source, copy, expected) in [
            ("equal", vec![(1, 7), (2, 8)], vec![(2, 8), (1, 7)], vec![]),
            ("one missing", vec![(1, 7), (2, 8)], vec![(1, 7)], vec![(2, Missing)]),
            ("one extra", vec![(1, 7)], vec![(1, 7), (0, 9)], vec![(0, Extra)]),
            ("one different", vec![(1, 7)], vec![(1, 8)], vec![(1, Different)]),
            ("equal rows of one key", vec![(1, 1), (1, 1)], vec![(1, 1), (1, 1)], vec![]),
            ("one of three equal rows", vec![(1, 1); 3], vec![(1, 1); 2], vec![(1, Missing)]),
            ("nothing in the copy", vec![(1, 1), (2, 2)], vec![], vec![(1, Missing), (2, Missing)]),
        ] {
            assert_eq!(differing_rows(source, copy), expected, "{name}");
        }
    }

    #[test]
    fn only_as_many_rows_are_compared_as_there_is_room_for() {
        let sum = |count| HashSum { count, sum: 1 };
        let side = |counts: [u64; 3]| -> BTreeMap<u64, HashSum> {
            counts.into_iter().enumerate().map(|(at, count)| (at as u64, sum(count))).collect()
        };
        let third = MAX_READ_ROWS / 3;

        for (name, source, copy, expected) in [
            ("equal", [1, 2, 3], [1, 2, 3], (0, vec![])),
            ("one differs", [1, 2, 3], [1, 2, 4], (1, vec![2])),
            ("all differ, and fit", [1, 2, 3], [2, 3, 4], (3, vec![0, 1, 2])),
            ("all differ, two fit", [third; 3], [third / 2; 3], (3, vec![0, 1])),
            ("one is too large alone", [9 * third; 3], [0; 3], (3, vec![0])),
        ] {
            let (differing, read) = differing_buckets(&side(source), &side(copy));
            assert_eq!((differing, read.into_iter().collect()), expected, "{name}");
        }
    }
}
