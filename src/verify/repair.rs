//! Mends the rows of a table that a verification found to differ.
//!
//! The stream is held at a new snapshot of the source while the rows are read there and replaced in
//! the copy, in one transaction of the target. So a repaired row is as of the checkpoint, as all
//! other rows are, and the changes that follow find it as the source had it.

use std::{collections::BTreeSet, ops::RangeInclusive, sync::Arc};

use arrow::record_batch::RecordBatch;

use super::{copy_side::hash, shape::Shape, source_side::SourceSide, table::ComparisonError};
use crate::{
    Lsn,
    olap::{OlapEngine, Repair, Repaired, TargetError},
    pipeline::{Context, Writer},
};

/// The most rows of a table that are repaired. Copying the table again is the better way for more.
pub(super) const MAX_REPAIRED: usize = 100_000;

/// Replaces the rows with these hashes of their keys by those of the source. `None`: the stream was
/// not held in that range any more.
pub(super) async fn repair<T: OlapEngine + 'static>(
    (context, writer): (&Context, &Writer<T>),
    checkpoints: RangeInclusive<Lsn>,
    source: &SourceSide<'_>,
    shape: &Arc<Shape>,
    keys: BTreeSet<u64>,
) -> Result<Option<Repaired>, ComparisonError> {
    let rows = source.whole_rows(&keys, context.options.memory_limit_bytes).await?;

    let shape = Arc::clone(shape);
    let work = move |target: &mut T| {
        let mut hashes = Vec::new();
        let mut is_wrong = |batch: &RecordBatch| {
            let all: Vec<usize> = (0..batch.num_columns()).collect();
            hash(&shape.key, batch, &all, &mut hashes)?;
            Ok::<_, TargetError>(hashes.iter().map(|key| keys.contains(key)).collect())
        };

        target.repair(Repair {
            checkpoints,
            table: &shape.spec,
            select: &shape.key.copy_select(),
            is_wrong: &mut is_wrong,
            rows: &rows,
        })
    };

    let _shapes = context.ddl_lock.write().await;
    Ok(writer.call(work).await?)
}
