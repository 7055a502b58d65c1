//! One table at the source, read under a snapshot: in pieces of pages, each with its locks given
//! back at its end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use arrow::record_batch::RecordBatch;
use futures_util::{StreamExt, TryStreamExt};
use tokio_postgres::Row;

use super::{
    HashSum,
    sessions::Sessions,
    shape::Shape,
    table::{Cells, ComparisonError, RowHashes},
};
use crate::{
    backfill::{RateLimiter, copy_rows, release_locks, watch_locks},
    pipeline::{EngineError, activity::IdleTimer},
    source::{
        SourceError,
        catalog::{self, CatalogError, TableFile},
        connection::SqlClient,
        quote::{quote_identifier, quote_literal},
    },
};

/// The pages of 8 KiB that one query reads: at most 32 MiB, so that the lock on a table is held
/// for about a fifth of a second, and not less than 1 MiB.
const MAX_PIECE_PAGES: u64 = 4 << 10;
const MIN_PIECE_PAGES: u64 = 128;
const PAGE_BYTES: u64 = 8192;

/// A session rests after each piece while the stream has changed rows within the time `BUSY`, as
/// long as reading `PIECES_OF_REST` such pieces would take.
pub(super) const BUSY: Duration = Duration::from_secs(1);
const PIECES_OF_REST: u32 = 6;

/// The bucket of all rows.
const NO_BUCKET: &str = "0";

/// One table at the source.
pub(super) struct SourceSide<'a> {
    pub(super) sessions: &'a Sessions,
    pub(super) shape: &'a Shape,
    /// The files that hold the rows, as the snapshot sees them.
    pub(super) files: &'a [TableFile],
    /// The condition of the publication's row filter, or none.
    pub(super) row_filter: Option<&'a str>,
    pub(super) limiter: Option<&'a RateLimiter>,
    /// When the stream last changed rows.
    pub(super) activity: &'a IdleTimer,
}

impl SourceSide<'_> {
    /// Returns the sum of all rows that are compared.
    pub(super) async fn total(&self) -> Result<HashSum, ComparisonError> {
        let mut total = HashSum::default();
        self.sums_of(NO_BUCKET, |_, sum| total += sum).await?;
        Ok(total)
    }

    /// Returns the sums of the rows of each bucket.
    pub(super) async fn sums(
        &self,
        buckets: u64,
    ) -> Result<BTreeMap<u64, HashSum>, ComparisonError> {
        let mut sums: BTreeMap<u64, HashSum> = BTreeMap::new();
        let bucket = format!("({} & {})::bigint", self.shape.key.source_hash(), buckets - 1);
        self.sums_of(&bucket, |bucket, sum| *sums.entry(bucket).or_default() += sum).await?;
        Ok(sums)
    }

    /// Computes the sums of rows piece by piece, grouped by an expression.
    async fn sums_of(
        &self,
        bucket: &str,
        mut add: impl FnMut(u64, HashSum),
    ) -> Result<(), ComparisonError> {
        let mut add_all = |sums: Vec<(u64, HashSum)>| {
            sums.into_iter().for_each(|(bucket, sum)| add(bucket, sum));
        };

        for file in self.files {
            // The first piece tells how many pages there are.
            let (of_first, pages) = self.piece_sums(bucket, file, 0, MIN_PIECE_PAGES).await?;
            add_all(of_first);

            // The snapshot sees no row on a page that the file got later.
            let size = self.piece_pages();
            let pieces = (MIN_PIECE_PAGES..pages).step_by(size as usize);
            let has_failed = AtomicBool::new(false);
            let pieces = pieces.take_while(|_| !has_failed.load(Ordering::Relaxed));
            let mut pieces = futures_util::stream::iter(pieces)
                .map(|first| self.piece_sums(bucket, file, first, size))
                .buffer_unordered(self.sessions.count());

            // Pieces that have begun are read to their ends also after an error: a piece that is
            // dropped would leave its locks, or a failed transaction, in its session.
            let mut result = Ok(());
            while let Some(piece) = pieces.next().await {
                match piece {
                    Ok((sums, _)) => add_all(sums),
                    Err(error) => {
                        has_failed.store(true, Ordering::Relaxed);
                        result = result.and(Err(error));
                    }
                }
            }
            result?;
        }
        Ok(())
    }

    /// Returns the sums of the rows on some pages, and how many pages the file has now.
    async fn piece_sums(
        &self,
        bucket: &str,
        file: &TableFile,
        first: u64,
        count: u64,
    ) -> Result<(Vec<(u64, HashSum)>, u64), ComparisonError> {
        // Without a bucket there is no group, and one row also for no rows. The hash of a row is
        // computed for the rows of the part only.
        let is_grouped = bucket != NO_BUCKET;
        let query = format!(
            "SELECT {bucket}::bigint, count(*)::bigint, coalesce(sum({}), 0)::text FROM {}{}",
            self.shape.row.source_hash(),
            self.rows_of(file, Some((first, first + count)), None),
            if is_grouped { " GROUP BY 1" } else { "" }
        );

        // The session stays in use while the limit or the stream has it wait, so that other pieces
        // wait too.
        let sql = self.sessions.take().await;
        let began = Instant::now();
        let (rows, pages) = query_file(&sql, file, &query).await?;
        let took = began.elapsed();

        if let Some(limiter) = self.limiter {
            let read = count.min(pages.saturating_sub(first));
            limiter.take((read * PAGE_BYTES) as usize).await;
        }

        // The stream goes first: it needs the cores of both sides.
        if self.activity.is_busy(BUSY) {
            tokio::time::sleep(took * PIECES_OF_REST).await;
        }

        let sums: Result<_, _> = rows.iter().map(bucket_sum).collect();
        Ok((sums?, pages))
    }

    /// Returns the hashes of the rows of some buckets.
    pub(super) async fn rows(
        &self,
        buckets: u64,
        read: &BTreeSet<u64>,
    ) -> Result<Vec<RowHashes>, ComparisonError> {
        let (key, row) = (self.shape.key.source_hash(), self.shape.row.source_hash());
        let chosen = array(read.iter().copied());
        let is_read = format!("({key} & {}) = ANY ({chosen})", buckets - 1);

        let mut hashes = Vec::new();
        for file in self.files {
            let query =
                format!("SELECT {key}, {row} FROM {}", self.rows_of(file, None, Some(&is_read)));

            let sql = self.sessions.take().await;
            watch_locks(&sql).await?;
            let read = read_hashes(&sql, &query, &mut hashes).await;
            release(&sql, file, read).await?;
        }
        Ok(hashes)
    }

    /// Adds the cells of some columns of the rows with these hashes of their keys.
    pub(super) async fn cells(
        &self,
        wanted: &BTreeSet<u64>,
        columns: &[usize],
        cells: &mut Cells,
    ) -> Result<(), ComparisonError> {
        let selected: Vec<String> = columns
            .iter()
            .filter_map(|&at| {
                let rule = self.shape.columns.get(at)?;
                let name = quote_identifier(&self.shape.column(at)?.name);
                Some(format!("{}, {name}::text", rule.source_hash()))
            })
            .collect();

        let key = self.shape.key.source_hash();
        for file in self.files {
            let query = format!(
                "SELECT {key}, {} FROM {}",
                selected.join(", "),
                self.rows_of(file, None, Some(&self.is_wanted(wanted)))
            );

            let sql = self.sessions.take().await;
            for row in query_file(&sql, file, &query).await?.0 {
                let key: i64 = row.try_get(0)?;
                for (number, at) in columns.iter().enumerate() {
                    let hash: i64 = row.try_get(1 + 2 * number)?;
                    let text = row.try_get(2 + 2 * number)?;
                    cells.add(key.cast_unsigned(), *at, hash.cast_unsigned(), text);
                }
            }
        }
        Ok(())
    }

    /// Returns the rows with these hashes of their keys, as a copy of the table would read them.
    ///
    /// # Errors
    /// [`EngineError::Setup`]: the rows have more than `max_bytes`.
    pub(super) async fn whole_rows(
        &self,
        wanted: &BTreeSet<u64>,
        mut max_bytes: usize,
    ) -> Result<Vec<RecordBatch>, ComparisonError> {
        let columns: Vec<String> = self
            .shape
            .spec
            .columns
            .iter()
            .map(|column| column.mapping.copy_select(&quote_identifier(&column.name)))
            .collect();

        let mut batches = Vec::new();
        for file in self.files {
            let query = format!(
                "COPY (SELECT {} FROM {}) TO STDOUT (FORMAT binary)",
                columns.join(", "),
                self.rows_of(file, None, Some(&self.is_wanted(wanted)))
            );

            let sql = self.sessions.take().await;
            watch_locks(&sql).await?;
            let rows = copy_rows(&sql, &self.shape.spec, &query, max_bytes).await;
            let rows = release(&sql, file, rows).await?.0;
            let bytes = |batch: &RecordBatch| batch.get_array_memory_size();
            max_bytes = max_bytes.saturating_sub(rows.iter().map(bytes).sum());
            batches.extend(rows);
        }
        Ok(batches)
    }

    fn is_wanted(&self, wanted: &BTreeSet<u64>) -> String {
        format!("{} = ANY ({})", self.shape.key.source_hash(), array(wanted.iter().copied()))
    }

    /// Returns the FROM clause for the rows of a file that are compared, that are on these pages,
    /// and that meet a condition.
    fn rows_of(
        &self,
        file: &TableFile,
        pages: Option<(u64, u64)>,
        condition: Option<&str>,
    ) -> String {
        let part = self.shape.part.map(|part| part.condition(&self.shape.key.source_hash()));
        let filter = self.row_filter.map(|filter| format!("({filter})"));

        let pages =
            pages.map(|(first, next)| format!("ctid >= '({first},0)' AND ctid < '({next},0)'"));

        let conditions: Vec<String> =
            [pages, filter, part, condition.map(str::to_owned)].into_iter().flatten().collect();
        if conditions.is_empty() {
            file.from.clone()
        } else {
            format!("{} WHERE {}", file.from, conditions.join(" AND "))
        }
    }

    /// Returns the pages that one query reads: at most what may be read in a second.
    fn piece_pages(&self) -> u64 {
        let allowed = self.limiter.map(|limiter| limiter.bytes_per_second() / PAGE_BYTES);
        allowed.map_or(MAX_PIECE_PAGES, |pages| pages.clamp(MIN_PIECE_PAGES, MAX_PIECE_PAGES))
    }
}

/// Reads from a file, and gives the locks of the query back. Returns also the pages that the file
/// has now.
async fn query_file(
    sql: &SqlClient,
    file: &TableFile,
    query: &str,
) -> Result<(Vec<Row>, u64), ComparisonError> {
    watch_locks(sql).await?;
    let rows = sql.query(query, &[]).await;
    release(sql, file, rows).await
}

/// Adds the hashes of the rows that a query returns.
async fn read_hashes(
    sql: &SqlClient,
    query: &str,
    hashes: &mut Vec<RowHashes>,
) -> Result<(), tokio_postgres::Error> {
    let no_parameters: [i64; 0] = [];
    let mut rows = std::pin::pin!(sql.query_raw(query, no_parameters).await?);
    while let Some(row) = rows.try_next().await? {
        let (key, hash): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        hashes.push((key.cast_unsigned(), hash.cast_unsigned()));
    }
    Ok(())
}

/// Gives the locks of a reading back. The reading counts only if the file is still the one that
/// the snapshot knows, which the lock ensures until here. Returns also the pages of the file.
async fn release<X, E>(
    sql: &SqlClient,
    file: &TableFile,
    read: Result<X, E>,
) -> Result<(X, u64), ComparisonError>
where
    ComparisonError: From<E>,
{
    let pages = match read {
        Ok(_) => catalog::pages_of(sql, file).await,
        // The transaction takes no further question before the rollback.
        Err(_) => Ok(None),
    };

    release_locks(sql).await?;
    let read = read?;
    Ok((read, pages?.ok_or(ComparisonError::Rewritten)?))
}

fn bucket_sum(row: &Row) -> Result<(u64, HashSum), ComparisonError> {
    let (bucket, count): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let sum: String = row.try_get(2)?;
    let sum = sum.parse().map_err(|_| {
        let unexpected = CatalogError::UnexpectedAnswer { what: "a sum", found: sum };
        EngineError::Source(SourceError::Catalog(unexpected))
    })?;
    Ok((bucket.cast_unsigned(), HashSum { count: count.cast_unsigned(), sum }))
}

fn array(values: impl Iterator<Item = u64>) -> String {
    let values: Vec<String> = values.map(|value| value.cast_signed().to_string()).collect();
    format!("{}::bigint[]", quote_literal(&format!("{{{}}}", values.join(","))))
}
