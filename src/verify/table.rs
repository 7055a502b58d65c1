//! The comparison of one table: a sum over all rows; where it differs sums over buckets of rows,
//! then the rows of the buckets that differ, then the cells of the rows that differ.
//!
//! The hash of a row's key says which bucket the row is in, so both sides cut a table in the same
//! way whatever its key is. The row hash binds the cells to each other: two values that were
//! swapped between rows are found. The rows of a table without a key are their own keys.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    HashSum,
    copy_side::in_background,
    report::{ColumnDifference, RowDifference, RowVerdict, TableReport, TableVerdict},
    shape::Shape,
    source_side::SourceSide,
};
use crate::{
    olap::TargetReader,
    pipeline::EngineError,
    source::{SourceError, catalog::CatalogError},
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

/// Why a comparison came to no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum ComparisonError {
    /// The table was rewritten or truncated since the snapshot, which sees it as empty now.
    #[error("the table was rewritten or truncated while it was compared")]
    Rewritten,
    #[error(transparent)]
    Failed(#[from] EngineError),
}

impl From<tokio_postgres::Error> for ComparisonError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl From<CatalogError> for ComparisonError {
    fn from(error: CatalogError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<ComparisonError> for EngineError {
    fn from(error: ComparisonError) -> Self {
        match error {
            ComparisonError::Failed(error) => error,
            rewritten @ ComparisonError::Rewritten => Self::Setup(rewritten.to_string()),
        }
    }
}

impl ComparisonError {
    /// Returns what the source refused. Its session goes on: the table was altered since the
    /// snapshot, or is locked.
    pub(super) fn refused(&self) -> Option<&tokio_postgres::Error> {
        match self {
            Self::Failed(EngineError::Source(SourceError::Query(error)))
                if error.as_db_error().is_some() =>
            {
                Some(error)
            }
            _ => None,
        }
    }
}

/// A row by its hashes: that of its key, and that of the row.
pub(super) type RowHashes = (u64, u64);

/// Values by the hash of their row's key and the index of their column.
#[derive(Debug, Default)]
pub(super) struct Cells(BTreeMap<u64, BTreeMap<usize, Cell>>);

/// A value by its hash, and as text.
#[derive(Debug)]
struct Cell {
    hash: u64,
    text: Option<String>,
}

impl Cells {
    pub(super) fn add(&mut self, key: u64, column: usize, hash: u64, text: Option<String>) {
        self.0.entry(key).or_default().insert(column, Cell { hash, text });
    }

    fn extend(&mut self, other: Self) {
        for (key, cells) in other.0 {
            self.0.entry(key).or_default().extend(cells);
        }
    }
}

/// What a comparison found.
pub(super) struct Compared<R> {
    pub(super) report: TableReport,
    /// The hashes of the keys of all rows that were found to differ.
    pub(super) keys: BTreeSet<u64>,
    /// Whether rows of further buckets differ.
    pub(super) has_more: bool,
    pub(super) reader: R,
}

/// Compares a table.
pub(super) async fn compare<R: TargetReader>(
    source: &SourceSide<'_>,
    shape: &Arc<Shape>,
    reader: R,
    shows_values: bool,
) -> Result<Compared<R>, ComparisonError> {
    let mut report = TableReport::new(shape.spec.source.to_string());
    let undecidable = shape.row.undecidable();
    report.not_compared =
        undecidable.map(|(column, reason)| (column.to_owned(), reason.to_owned())).collect();

    let its = Arc::clone(shape);
    let (of_source, of_copy) = tokio::join!(
        source.total(),
        in_background(reader, source.activity, move |copy| copy.total(&its))
    );
    let (of_source, (reader, of_copy)) = (of_source?, of_copy?);
    report.source_rows = of_source.count;
    report.copy_rows = of_copy.count;

    if of_source == of_copy {
        return Ok(Compared { report, keys: BTreeSet::new(), has_more: false, reader });
    }

    let rows = of_source.count.max(of_copy.count);
    let buckets = (rows / BUCKET_ROWS).clamp(MIN_BUCKETS, MAX_BUCKETS).next_power_of_two();

    let its = Arc::clone(shape);
    let (of_source, of_copy) = tokio::join!(
        source.sums(buckets),
        in_background(reader, source.activity, move |copy| copy.sums(&its, buckets))
    );
    let (of_source, (reader, of_copy)) = (of_source?, of_copy?);

    let (differing, read) = differing_buckets(&of_source, &of_copy);
    let mut compared = Compared { report, keys: BTreeSet::new(), has_more: false, reader };
    compared.report.verdict = TableVerdict::Different;
    if read.len() < differing {
        compared.has_more = true;
        compared.report.reason = Some(format!(
            "{differing} of {buckets} parts of the table differ; the rows of {} were compared",
            read.len()
        ));
    }

    let (its, of_copy) = (Arc::clone(shape), read.clone());
    let (of_source, of_copy) = tokio::join!(
        source.rows(buckets, &read),
        in_background(compared.reader, source.activity, move |copy| copy
            .rows(&its, buckets, &of_copy))
    );
    let (of_source, (reader, of_copy)) = (of_source?, of_copy?);
    let found = differing_rows(of_source, of_copy);

    for (key, kind) in &found {
        compared.keys.insert(*key);
        match kind {
            RowVerdict::Missing => compared.report.missing += 1,
            RowVerdict::Extra => compared.report.extra += 1,
            RowVerdict::Different => compared.report.different += 1,
        }
    }

    let (reader, differences) = describe(source, shape, reader, &found, shows_values).await?;
    compared.report.differences = differences;
    compared.reader = reader;
    Ok(compared)
}

/// Reads the keys of rows that differ, and which of their columns do.
async fn describe<R: TargetReader>(
    source: &SourceSide<'_>,
    shape: &Arc<Shape>,
    mut reader: R,
    found: &[(u64, RowVerdict)],
    shows_values: bool,
) -> Result<(R, Vec<RowDifference>), ComparisonError> {
    let described: BTreeMap<u64, RowVerdict> = found.iter().take(MAX_DESCRIBED).copied().collect();
    let wanted: BTreeSet<u64> = described.keys().copied().collect();

    let (mut of_source, mut of_copy) = (Cells::default(), Cells::default());
    let all: Vec<usize> = (0..shape.spec.columns.len()).collect();
    for columns in all.chunks(COLUMNS_OF_A_QUERY) {
        source.cells(&wanted, columns, &mut of_source).await?;

        let (its, keys, columns) = (Arc::clone(shape), wanted.clone(), columns.to_vec());
        let read =
            in_background(reader, source.activity, move |copy| copy.cells(&its, &keys, &columns))
                .await?;
        of_copy.extend(read.1);
        reader = read.0;
    }

    let nothing = BTreeMap::new();
    let mut differences: Vec<RowDifference> = described
        .iter()
        .map(|(key, kind)| {
            let in_source = of_source.0.get(key).unwrap_or(&nothing);
            let in_copy = of_copy.0.get(key).unwrap_or(&nothing);
            difference(shape, *kind, (in_source, in_copy), shows_values)
        })
        .collect();
    differences.sort_by(|one, other| (one.kind, &one.key).cmp(&(other.kind, &other.key)));
    Ok((reader, differences))
}

fn difference(
    shape: &Shape,
    kind: RowVerdict,
    (in_source, in_copy): (&BTreeMap<usize, Cell>, &BTreeMap<usize, Cell>),
    shows_values: bool,
) -> RowDifference {
    let name = |at| shape.column(at).map_or("", |column| column.name.as_str());
    let keys = shape.spec.key_columns().iter().map(|at| {
        let cell = in_source.get(at).or_else(|| in_copy.get(at));
        let value = cell.and_then(|cell| cell.text.as_deref()).unwrap_or("NULL");
        format!("{}={value}", name(*at))
    });
    let key = keys.collect::<Vec<_>>().join(", ");

    let mut columns = Vec::new();
    if kind == RowVerdict::Different {
        let shown = |cell: &Cell| {
            shows_values.then(|| cell.text.clone().unwrap_or_else(|| "NULL".to_owned()))
        };
        for (at, source) in in_source {
            let Some(copy) = in_copy.get(at).filter(|copy| copy.hash != source.hash) else {
                continue;
            };
            columns.push(ColumnDifference {
                column: name(*at).to_owned(),
                source: shown(source),
                copy: shown(copy),
            });
        }
    }
    RowDifference { kind, key, columns }
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
