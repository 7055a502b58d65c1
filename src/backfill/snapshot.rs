//! A snapshot of the source, and the sessions that keep it.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use super::plan::LOCK_PATIENCE;
use crate::{
    Lsn,
    change::xids::XidSnapshot,
    checkpoint::reachable_target,
    failpoint::reached,
    pipeline::{Context, EngineError, Event},
    source::{
        LsnBarrier, SourceError, catalog,
        connection::{SqlClient, connect_sql},
        quote::quote_literal,
        wire::{CreatedSlot, ReplicationClient, SlotKind, WireError, copy_client::CopyClient},
    },
};

/// A slot that was just made, on the connection that keeps its snapshot: no further command may be
/// sent on this connection.
pub struct SlotWithSnapshot {
    pub replication: ReplicationClient,
    pub created: CreatedSlot,
}

/// A snapshot that two sessions hold, so that a worker that lost its connection can come back.
pub struct Snapshot {
    /// The snapshot sees no transaction with `commit_lsn` from this on.
    pub lsn: Lsn,
    /// The transactions with `commit_lsn` before `lsn` that the snapshot sees. None: all of them.
    pub xids: Option<Arc<XidSnapshot>>,
    /// The snapshot sees every transaction with `commit_lsn` before this.
    pub since: Lsn,
    /// The ids under which the snapshot is exported; any of these will do.
    pub ids: Vec<String>,
    holders: Vec<Arc<SqlClient>>,
}

impl Snapshot {
    /// Returns the snapshot that came with a slot. The slot's connection is of no more use then,
    /// and is closed, and with it a temporary slot goes: the slot would keep WAL for as long as the
    /// copy takes.
    pub async fn of_slot(
        context: &Context,
        first: SlotWithSnapshot,
        is_temporary: bool,
        hold: &LsnBarrier,
    ) -> Result<Self, EngineError> {
        // A test lets this step take long, while the stream goes on.
        tokio::task::block_in_place(|| reached("copy.snapshot"));

        let SlotWithSnapshot { mut replication, created } = first;
        let lsn = created.consistent_point;
        hold.set(lsn);

        let Some(exported) = &created.snapshot else {
            return Err(EngineError::Setup(format!(
                "slot \"{}\" exported no snapshot",
                created.name
            )));
        };

        let (ids, holders) = hold_in_sessions(context, exported).await?;
        if is_temporary {
            replication.drop_slot(&created.name).await?;
        }

        Ok(Self { lsn, xids: None, since: lsn, ids, holders })
    }

    /// Makes a slot for as long as it takes to take its snapshot over. The stream is held at the
    /// position of the snapshot. With `trail` the stream stays that far behind the source in the
    /// meantime, so that the stream has not passed the snapshot when the snapshot is there.
    pub async fn of_temporary_slot(
        context: &Context,
        control: &SqlClient,
        hold: &LsnBarrier,
        trail: Option<Duration>,
    ) -> Result<Self, EngineError> {
        // The slot has a new name each time: a walsender that still waits to make the last slot
        // keeps the name of that slot for a while.
        static NUMBER: AtomicU32 = AtomicU32::new(0);

        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = temporary_slot_name(&context.options.slot, std::process::id(), number);

        let mut replication = ReplicationClient::connect(&context.options.source, "copy").await?;
        let creation = create_slot(context, control, &mut replication, &name, SlotKind::Temporary);

        let created = match trail {
            None => creation.await?,
            Some(trail) => tokio::select! {
                created = creation => created?,
                failed = stay_behind(control, hold, trail) => return Err(failed),
            },
        };

        Self::of_slot(context, SlotWithSnapshot { replication, created }, true, hold).await
    }

    /// Returns an ordinary snapshot, which no position of the WAL belongs to. A standby can give
    /// such a snapshot too.
    pub async fn plain(context: &Context) -> Result<Self, EngineError> {
        let first = connect_sql(&context.options.source, "snapshot").await?;
        first.batch_execute("BEGIN READ ONLY ISOLATION LEVEL REPEATABLE READ").await?;
        let exported = export(&first).await?;
        let (ids, holders) = hold_in_sessions(context, &exported).await?;
        Ok(Self { lsn: Lsn::ZERO, xids: None, since: Lsn::ZERO, ids, holders })
    }

    /// Returns a snapshot that waits for no transaction, for when making a slot would wait. The
    /// stream is held for one to two seconds before the snapshot.
    pub async fn without_slot(
        context: &Context,
        control: &SqlClient,
        hold: &LsnBarrier,
    ) -> Result<Self, EngineError> {
        const STEP: Duration = Duration::from_millis(20);

        let since = reachable_target(catalog::wal_flush_lsn(control).await?);
        hold.set(since);
        tokio::time::sleep(catalog::VISIBLE_AFTER_FLUSH).await;

        let first = connect_sql(&context.options.source, "snapshot").await?;
        let xids = catalog::begin_snapshot(&first).await?;
        let exported = export(&first).await?;
        let (ids, holders) = hold_in_sessions(context, &exported).await?;

        // Every transaction that the snapshot sees has its commit record before the end of the WAL.
        // The stream comes only as far as the WAL is flushed.
        let (end, read_at) = (catalog::wal_insert_lsn(control).await?, Instant::now());
        let mut lsn = end;
        while catalog::wal_flush_lsn(control).await? < reachable_target(lsn) {
            tokio::time::sleep(STEP).await;
            lsn = catalog::flushed(control, end, read_at.elapsed()).await?;
        }

        Ok(Self { lsn, xids: Some(Arc::new(xids)), since, ids, holders })
    }

    /// Connects another session that sees the snapshot.
    ///
    /// # Errors
    /// The source cannot be reached.
    pub async fn session(
        &self,
        context: &Context,
        purpose: &str,
    ) -> Result<SqlClient, EngineError> {
        import(context, &self.ids[0], purpose).await
    }

    /// Returns a session that sees the snapshot, for questions to the catalogs: plan and rows are
    /// of one moment.
    pub fn holder(&self) -> Arc<SqlClient> {
        Arc::clone(&self.holders[0])
    }
}

/// Returns the name of a slot beside the slot of the pipeline.
fn temporary_slot_name(slot: &str, process: u32, number: u32) -> String {
    // Slot names have 63 bytes at most.
    let prefix = slot.get(..40).unwrap_or(slot);
    format!("{prefix}_copy_{process}_{number}")
}

/// Lets two sessions hold an exported snapshot. Returns the ids under which they export it in turn.
async fn hold_in_sessions(
    context: &Context,
    exported: &str,
) -> Result<(Vec<String>, Vec<Arc<SqlClient>>), EngineError> {
    let (mut ids, mut holders) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let holder = match import(context, exported, "snapshot").await {
            // The session that exported the snapshot is gone.
            Err(EngineError::Source(SourceError::Query(error)))
                if error.as_db_error().is_some() =>
            {
                return Err(EngineError::SnapshotLost);
            }
            holder => holder?,
        };

        ids.push(export(&holder).await?);
        holders.push(Arc::new(holder));
    }

    Ok((ids, holders))
}

async fn export(holder: &SqlClient) -> Result<String, EngineError> {
    Ok(holder.query_one("SELECT pg_catalog.pg_export_snapshot()", &[]).await?.try_get(0)?)
}

/// Connects a session that sees the snapshot. A holder of the snapshot must live until this session
/// has imported it (trap 11).
async fn import(
    context: &Context,
    snapshot: &str,
    purpose: &str,
) -> Result<SqlClient, EngineError> {
    let client = connect_sql(&context.options.source, purpose).await?;
    client.batch_execute("BEGIN READ ONLY ISOLATION LEVEL REPEATABLE READ").await?;
    client.batch_execute(&format!("SET TRANSACTION SNAPSHOT {}", quote_literal(snapshot))).await?;
    Ok(client)
}

/// Keeps the stream at the position where the source's WAL ended `trail` ago. Returns only an
/// error.
async fn stay_behind(control: &SqlClient, hold: &LsnBarrier, trail: Duration) -> EngineError {
    const STEP: Duration = Duration::from_millis(50);
    let mut ends: VecDeque<(Instant, Lsn)> = VecDeque::new();

    loop {
        match catalog::wal_insert_lsn(control).await {
            Ok(end) => ends.push_back((Instant::now(), end)),
            Err(error) => return error.into(),
        }

        hold.set(end_before(&mut ends, Instant::now(), trail));
        tokio::time::sleep(STEP).await;
    }
}

/// Returns where the source's WAL ended `trail` ago, as far as that is known, and forgets where it
/// ended before that.
fn end_before(ends: &mut VecDeque<(Instant, Lsn)>, now: Instant, trail: Duration) -> Lsn {
    while ends.get(1).is_some_and(|(read_at, _)| now.duration_since(*read_at) >= trail) {
        ends.pop_front();
    }

    ends.front().map_or(Lsn(1), |(_, end)| *end)
}

/// Connects a session that copies under the snapshot.
pub async fn import_for_copy(
    context: &Context,
    snapshot: &str,
    purpose: &str,
) -> Result<CopyClient, WireError> {
    let mut client = CopyClient::connect(&context.options.source, purpose).await?;

    let snapshot = quote_literal(snapshot);
    client
        .execute(&format!(
            "SET lock_timeout = '{}ms'; BEGIN READ ONLY ISOLATION LEVEL REPEATABLE READ; SET \
             TRANSACTION SNAPSHOT {snapshot}",
            LOCK_PATIENCE.as_millis()
        ))
        .await?;

    Ok(client)
}

/// Creates a slot that exports its snapshot. Creating the slot waits for every open transaction,
/// and reports these transactions (trap 12).
pub async fn create_slot(
    context: &Context,
    sql: &SqlClient,
    replication: &mut ReplicationClient,
    name: &str,
    keep: SlotKind,
) -> Result<CreatedSlot, EngineError> {
    let mut creation = Box::pin(replication.create_slot(name, keep));

    let mut patience = tokio::time::interval(Duration::from_secs(2));
    patience.tick().await;

    loop {
        tokio::select! {
            created = &mut creation => return Ok(created?),
            _ = patience.tick() => {
                let what = catalog::open_transactions(sql).await?.join("; ");
                let _ = context.events.send(Event::WaitingForTransactions { what });
            }
        }
    }
}

/// Lets [`release_locks`] give back the locks that `holder` takes from here on. The transaction of
/// `holder` lasts as long as the round: a lock kept for hours would hold up every ALTER of its
/// table, and all queries behind that ALTER.
pub async fn watch_locks(holder: &SqlClient) -> Result<(), EngineError> {
    Ok(holder.batch_execute("SAVEPOINT rhei_locks").await?)
}

/// Gives back the locks taken since [`watch_locks`]; the snapshot stays.
pub async fn release_locks(holder: &SqlClient) -> Result<(), EngineError> {
    Ok(holder
        .batch_execute("ROLLBACK TO SAVEPOINT rhei_locks; RELEASE SAVEPOINT rhei_locks")
        .await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_stands_where_the_wal_ended_a_while_ago() {
        let (begin, millis) = (Instant::now(), Duration::from_millis);
        let read = |after: u64, end: u64| (begin + millis(after), Lsn(end));
        let mut ends = VecDeque::from([read(0, 10), read(50, 20), read(100, 30)]);

        for (now, end, left) in [
            // No position is old enough, and the oldest one that is known has to do.
            (100, 10, 3),
            (249, 10, 3),
            (250, 20, 2),
            (299, 20, 2),
            (300, 30, 1),
            (9000, 30, 1),
        ] {
            assert_eq!(
                end_before(&mut ends, begin + millis(now), millis(200)),
                Lsn(end),
                "{now} ms"
            );
            assert_eq!(ends.len(), left, "{now} ms");
        }
    }

    #[test]
    fn the_name_of_a_temporary_slot_fits_and_is_another_one_each_time() {
        assert_eq!(temporary_slot_name("shop", 4711, 0), "shop_copy_4711_0");
        assert_eq!(temporary_slot_name("shop", 4711, 1), "shop_copy_4711_1");

        let longest = temporary_slot_name(&"s".repeat(63), 4_194_304, 99_999);
        assert!(longest.len() <= 63 && longest.ends_with("_copy_4194304_99999"), "{longest}");
    }
}
