//! The source and the copy at one LSN: a snapshot of the source, and readers of the copy that see
//! exactly the transactions that the snapshot sees. The stream stands there for a moment only.

use std::time::Duration;

use tokio::time::Instant;

use super::snapshot::Snapshot;
use crate::{
    Lsn,
    checkpoint::reachable_target,
    olap::{OlapEngine, ReadTarget, StoredTable, TargetError},
    pipeline::{Context, EngineError, Writer},
    source::{BarrierClaim, catalog, connection::connect_sql},
};

/// How far the stream stays behind the source while the slot of the first snapshot is made; twice
/// as far for each further one.
const FIRST_TRAIL: Duration = Duration::from_millis(250);

/// The stream passed this number of snapshots in a row before they were there.
const MAX_TRIES: u32 = 6;

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// How long making a snapshot may wait for transactions that are open at the source.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the stream may take to reach the snapshot.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Both sides at one LSN, for as long as this value lives.
pub struct Standing<R> {
    /// Both sides hold every transaction with `commit_lsn` before this, and no other.
    pub lsn: Lsn,
    pub snapshot: Snapshot,
    pub readers: Vec<R>,
    /// The tables as the copy has them there.
    pub tables: Vec<StoredTable>,
}

/// Both sides at one LSN, where the stream is held for as long as this value lives.
pub struct HeldStanding<R> {
    /// Both sides.
    pub standing: Standing<R>,
    /// The checkpoint of the copy, which stays the same.
    pub checkpoint: Lsn,
    /// Holds the stream until it is dropped.
    pub claim: BarrierClaim,
}

/// Brings the copy to the LSN of a new snapshot of the source, and makes `readers` readers of it
/// there. A session has to follow the stream meanwhile. Making the snapshot waits for all
/// transactions that are open at the source (trap 12); the caller may drop the future at any time.
///
/// # Errors
/// The source or the target broke, or the stream did not come to the snapshot in time.
pub async fn stand<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    readers: usize,
) -> Result<Standing<<T as ReadTarget>::Reader>, EngineError> {
    Ok(stand_held(context, writer, readers).await?.standing)
}

/// Works as [`stand`], and holds the stream there.
///
/// # Errors
/// Those of [`stand`].
pub async fn stand_held<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    readers: usize,
) -> Result<HeldStanding<<T as ReadTarget>::Reader>, EngineError> {
    let control = connect_sql(&context.options.source, "standing").await?;

    for attempt in 0..MAX_TRIES {
        let claim = context.barrier.claim().await;
        let trail = FIRST_TRAIL * 2_u32.pow(attempt);
        let making = Snapshot::of_temporary_slot(context, &control, &context.barrier, Some(trail));
        // Copies cannot begin meanwhile.
        let Ok(snapshot) = tokio::time::timeout(SNAPSHOT_TIMEOUT, making).await else {
            return Err(still_open(&catalog::open_transactions(&control).await?));
        };
        let snapshot = snapshot?;

        let reached = reach(context, writer, snapshot, readers).await;
        context.checkpoint.want(Lsn::ZERO);

        if let Some((standing, checkpoint)) = reached? {
            return Ok(HeldStanding { standing, checkpoint, claim });
        }
        drop(claim);
    }

    Err(EngineError::Setup(format!(
        "the stream passed {MAX_TRIES} snapshots of the source in a row before the copy could \
         stand at one of them\nhint: try again when fewer changes are made"
    )))
}

fn still_open(transactions: &[String]) -> EngineError {
    EngineError::Setup(format!(
        "no snapshot of the source could be made within {} s\ndetail: Transactions are open there: \
         {}.\nhint: try again when they have ended",
        SNAPSHOT_TIMEOUT.as_secs(),
        transactions.join("; ")
    ))
}

/// Waits until the checkpoint is at the snapshot. `None`: the stream had passed it already.
async fn reach<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    snapshot: Snapshot,
    count: usize,
) -> Result<Option<(Standing<<T as ReadTarget>::Reader>, Lsn)>, EngineError> {
    let lsn = snapshot.lsn;
    let goal = reachable_target(lsn);
    context.checkpoint.want(goal);

    let since = Instant::now();
    while context.checkpoint.reached() < goal {
        if since.elapsed() >= TIMEOUT {
            return Err(EngineError::Setup(format!(
                "the stream did not come to the snapshot of the source at {lsn} within {} s\nhint: \
                 `rhei status` says how far the copy is",
                TIMEOUT.as_secs()
            )));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
        context.checkpoint.want_at_least(goal);
    }

    let seen =
        move |target: &mut T| Ok::<_, TargetError>((target.readers(count)?, target.state()?));
    let (readers, state) = writer.call(seen).await?;
    let (Some(seen), Some(state)) = (readers, state) else {
        return Err(EngineError::Setup("the copy has no state yet".to_owned()));
    };

    // The readers say for themselves where they stand: a session that began meanwhile may have
    // moved the barrier.
    let checkpoint = seen.checkpoint.lsn;
    let is_there = goal <= checkpoint && checkpoint <= lsn;
    let standing = Standing { lsn, snapshot, readers: seen.readers, tables: state.tables };
    Ok(is_there.then_some((standing, checkpoint)))
}
