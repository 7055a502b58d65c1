//! One table in the copy, read by a reader that stands where the snapshot of the source does.

use std::collections::{BTreeMap, BTreeSet};

use arrow::{
    array::Array,
    record_batch::RecordBatch,
    util::display::{ArrayFormatter, FormatOptions},
};
use tokio_util::sync::CancellationToken;

use super::{
    HashSum, TableRule,
    shape::Shape,
    source_side::BUSY,
    table::{Cells, RowHashes},
};
use crate::{
    olap::{TargetError, TargetReader, names},
    pipeline::{EngineError, activity::IdleTimer},
};

/// The niceness of a thread that reads the copy while the stream changes rows: the stream goes
/// first.
const NICENESS: i32 = 10;

/// Runs `work` over a reader in a thread of its own, and returns the reader too. Dropping the
/// future ends the work at its next batch.
pub(super) async fn in_background<R: TargetReader, X: Send + 'static>(
    reader: R,
    activity: &IdleTimer,
    work: impl FnOnce(&mut CopySide<R>) -> Result<X, TargetError> + Send + 'static,
) -> Result<(R, X), EngineError> {
    let stop = CancellationToken::new();
    let _dropped = stop.clone().drop_guard();
    let mut side = CopySide { reader, stop, activity: activity.clone(), gives_way: false };

    let working = tokio::task::spawn_blocking(move || {
        // A thread of its own, since the priority of a thread cannot be raised again.
        let thread = std::thread::spawn(move || {
            let done = work(&mut side);
            done.map(|done| (side.reader, done))
        });
        thread.join()
    });

    let what = "reading the copy";
    match working.await.map_err(|lost| EngineError::lost(what, lost))? {
        Ok(done) => Ok(done?),
        Err(panic) => Err(EngineError::Bug { what, why: crate::error::panic_message(&*panic) }),
    }
}

/// The copy, as a reader sees it.
pub(super) struct CopySide<R> {
    reader: R,
    stop: CancellationToken,
    /// When the stream last changed rows.
    activity: IdleTimer,
    /// The thread has a low priority by now.
    gives_way: bool,
}

impl<R: TargetReader> CopySide<R> {
    /// Returns the sum of all rows that are compared.
    pub(super) fn total(&mut self, shape: &Shape) -> Result<HashSum, TargetError> {
        let mut total = HashSum::default();
        if shape.part.is_some() {
            self.each_row(shape, |_, row| total += HashSum::of(&[row]))?;
            return Ok(total);
        }

        let sql = format!("SELECT {} FROM {}", shape.row.copy_select(), target(shape));
        let mut hashes = Vec::new();
        self.select(&sql, &mut |batch| {
            let all: Vec<usize> = (0..batch.num_columns()).collect();
            hash(&shape.row, &batch, &all, &mut hashes)?;
            total += HashSum::of(&hashes);
            Ok(())
        })?;
        Ok(total)
    }

    /// Returns the sums of the rows of each bucket.
    pub(super) fn sums(
        &mut self,
        shape: &Shape,
        buckets: u64,
    ) -> Result<BTreeMap<u64, HashSum>, TargetError> {
        let mut sums = vec![HashSum::default(); buckets as usize];
        self.each_row(shape, |key, row| {
            if let Some(sum) = sums.get_mut((key & (buckets - 1)) as usize) {
                *sum += HashSum { count: 1, sum: i128::from(row.cast_signed()) };
            }
        })?;

        let filled = (0..).zip(sums).filter(|(_, sum)| sum.count > 0);
        Ok(filled.collect())
    }

    /// Returns the hashes of the rows of some buckets.
    pub(super) fn rows(
        &mut self,
        shape: &Shape,
        buckets: u64,
        read: &BTreeSet<u64>,
    ) -> Result<Vec<RowHashes>, TargetError> {
        let mut found = Vec::new();
        self.each_row(shape, |key, row| {
            if read.contains(&(key & (buckets - 1))) {
                found.push((key, row));
            }
        })?;
        Ok(found)
    }

    /// Hashes each row that is compared.
    fn each_row(
        &mut self,
        shape: &Shape,
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), TargetError> {
        let sql = format!(
            "SELECT {}, {} FROM {}",
            shape.row.copy_select(),
            shape.key.copy_select(),
            target(shape)
        );

        let (mut rows, mut keys) = (Vec::new(), Vec::new());
        self.select(&sql, &mut |batch| {
            let all: Vec<usize> = (0..batch.num_columns()).collect();
            let (of_row, of_key) = all.split_at(shape.row.width().min(all.len()));
            hash(&shape.row, &batch, of_row, &mut rows)?;
            hash(&shape.key, &batch, of_key, &mut keys)?;

            let compared = keys.iter().zip(&rows).filter(|(key, _)| shape.has(**key));
            compared.for_each(|(key, row)| each(*key, *row));
            Ok(())
        })
    }

    /// Returns the cells of some columns of the rows with these hashes of their keys.
    pub(super) fn cells(
        &mut self,
        shape: &Shape,
        wanted: &BTreeSet<u64>,
        columns: &[usize],
    ) -> Result<Cells, TargetError> {
        let of_columns: Vec<(usize, &TableRule)> =
            columns.iter().filter_map(|&at| Some((at, shape.columns.get(at)?))).collect();
        let selected: Vec<String> = of_columns
            .iter()
            .filter_map(|(at, rule)| {
                let name = names::quoted(&shape.column(*at)?.target_name);
                Some(format!("{}, {name}::VARCHAR", rule.copy_select()))
            })
            .collect();

        let key = &shape.key;
        let sql =
            format!("SELECT {}, {} FROM {}", key.copy_select(), selected.join(", "), target(shape));

        let mut cells = Cells::default();
        let (mut keys, mut hashes) = (Vec::new(), Vec::new());
        self.select(&sql, &mut |batch| {
            let mut at = key.width();
            hash(key, &batch, &(0..at).collect::<Vec<_>>(), &mut keys)?;

            let keys = keys.iter().copied().enumerate();
            let places: Vec<(usize, u64)> = keys.filter(|(_, key)| wanted.contains(key)).collect();
            if places.is_empty() {
                return Ok(());
            }

            for (column, rule) in &of_columns {
                let of_column: Vec<usize> = (at..at + rule.width()).collect();
                hash(rule, &batch, &of_column, &mut hashes)?;
                at += rule.width();
                let texts = batch.columns().get(at);
                at += 1;

                for (place, key) in &places {
                    let hash = hashes.get(*place).copied().unwrap_or_default();
                    let text = texts.and_then(|texts| text_at(texts.as_ref(), *place));
                    cells.add(*key, *column, hash, text);
                }
            }
            Ok(())
        })?;
        Ok(cells)
    }

    fn select(
        &mut self,
        sql: &str,
        each: &mut dyn FnMut(RecordBatch) -> Result<(), TargetError>,
    ) -> Result<(), TargetError> {
        let Self { reader, stop, activity, gives_way } = self;
        reader.select(sql, &mut |batch| {
            if stop.is_cancelled() {
                return Err(TargetError::Cancelled);
            }
            if !*gives_way && activity.is_busy(BUSY) {
                *gives_way = true;
                // Without the right to do so the work goes on as it is.
                let _ = rustix::process::setpriority_process(None, NICENESS);
            }
            each(batch)
        })
    }
}

fn target(shape: &Shape) -> String {
    names::table(&shape.spec.target)
}

/// Hashes the columns of a batch that a rule has selected.
pub(super) fn hash(
    rule: &TableRule,
    batch: &RecordBatch,
    columns: &[usize],
    hashes: &mut Vec<u64>,
) -> Result<(), TargetError> {
    let broken = |error| TargetError::Rows { source: error };
    let columns = batch.project(columns).map_err(|error| broken(Box::new(error)))?;
    rule.hash(&columns, hashes).map_err(|error| broken(Box::new(error)))?;
    Ok(())
}

fn text_at(texts: &dyn Array, at: usize) -> Option<String> {
    let options = FormatOptions::default();
    let formatter = ArrayFormatter::try_new(texts, &options).ok()?;
    (!texts.is_null(at)).then(|| formatter.value(at).to_string())
}
