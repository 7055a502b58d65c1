//! A round: one snapshot, and the tables that are copied under it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    chunk_queue::{ChunkJob, RateLimiter, RoundProgress, SharedRound, batch_bytes},
    event::{CopyEvent, CopyOutcome, TableCopyPlan},
    plan::{self, Measured, is_same},
    snapshot::{SlotWithSnapshot, Snapshot},
    worker::Worker,
};
use crate::{
    olap::{OlapEngine, StoredTable},
    pipeline::{Context, EngineError, Event, Writer},
    source::{
        LsnBarrier,
        catalog::{self, Fingerprint, Membership, SourceTable},
        connection::{SqlClient, connect_sql},
    },
};

/// How many tables one question to the catalogs checks when their copies are done.
const MAX_REPORTED: usize = 500;

/// The most tables in a bundle. A bundle is small tables, or small partitions, that one message
/// reads and one transaction loads.
const MAX_BUNDLED: usize = 64;

/// The most pages of 8 KiB that the tables of a bundle have together.
const BUNDLED_PAGES: u64 = 256;

/// The parameters of a round.
pub struct CopyRound {
    /// Oids of the tables to copy; none: all of them.
    pub wanted: Option<BTreeSet<u32>>,
    /// The slot of the pipeline itself, when it was just made; else the round makes a slot for the
    /// time of its snapshot.
    pub first: Option<SlotWithSnapshot>,
    /// How far the stream stays behind the source while the slot is made. Without this, a table
    /// that changes all the time has always changed between the slot's snapshot and the begin of
    /// its copy.
    pub trail: Option<Duration>,
    /// No stream follows the copy: an ordinary snapshot will do.
    pub is_plain: bool,
    pub hold: LsnBarrier,
    pub event_tx: mpsc::Sender<CopyEvent>,
    /// Chunks that have begun are finished, and no more are begun.
    pub stop: CancellationToken,
}

/// Takes a snapshot and copies tables under it.
///
/// # Errors
/// The source or the target broke. Chunks that are done stay, and the next round goes on from there
/// where it can.
pub async fn run<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    mut round: CopyRound,
) -> Result<(), EngineError> {
    let stop = round.stop.clone();

    // The stream may be held already, for the slot of the pipeline itself: a round that is stopped
    // at once releases it as well.
    let claim = tokio::select! {
        biased;
        claim = round.hold.claim() => claim,
        () = stop.cancelled() => return Ok(()),
    };

    // The last claim may have released the stream just now.
    if let Some(first) = &round.first {
        round.hold.set(first.created.consistent_point);
    }

    let prepared = tokio::select! {
        // Making a slot may wait for hours.
        () = stop.cancelled() => return Ok(()),
        prepared = round.prepare(context, writer) => prepared?,
    };
    let Some(Prepared { control, snapshot, tables, refused }) = prepared else { return Ok(()) };

    let Some(tables) = adopt(&round.event_tx, &snapshot, tables, refused).await else {
        return Ok(());
    };
    drop(claim);
    if tables.is_empty() {
        return Ok(());
    }

    tracing::info!(
        event = "copies_started",
        tables = tables.len(),
        snapshot = %snapshot.lsn,
        "copying tables under one snapshot"
    );

    let (is_plain, event_tx) = (round.is_plain, round.event_tx);
    let copy = Copy { context, writer, control, snapshot, tables, is_plain, event_tx, stop };
    copy.begin_progress();
    let ended = copy.run().await;
    copy.end_progress();

    ended
}

/// What a round copies from.
struct Prepared {
    /// The connection for questions to the catalogs.
    control: SqlClient,
    snapshot: Snapshot,
    tables: Vec<TableCopyPlan>,
    /// Tables that cannot be copied as they are set up.
    refused: Vec<StoredTable>,
}

impl CopyRound {
    /// Takes the snapshot and plans the tables. None: other sessions have locked all tables that
    /// are wanted.
    async fn prepare<T: OlapEngine + 'static>(
        &mut self,
        context: &Context,
        writer: &Writer<T>,
    ) -> Result<Option<Prepared>, EngineError> {
        // The stream is held from the snapshot on, so every step that may wait for a lock comes
        // before it.
        let control = connect_sql(&context.options.source, "copy control").await?;
        let wanted = self.wanted.as_ref();
        let measured = plan::measure(context, &control, wanted, self.is_plain).await?;

        if !measured.locked.is_empty() {
            let _ = self.event_tx.send(CopyEvent::Locked(measured.locked.clone())).await;
            if measured.locks_all(wanted) {
                return Ok(None);
            }
        }

        let snapshot = self.take_snapshot(context, writer, &control, &measured).await?;
        let wanted = self.wanted.as_ref();
        let (mut tables, refused) =
            plan::plan(context, writer, &snapshot, wanted, self.is_plain, &measured).await?;

        if snapshot.xids.is_some() {
            postpone(&self.event_tx, take_published_otherwise(&mut tables, &measured)).await;
        }

        Ok(Some(Prepared { control, snapshot, tables, refused }))
    }

    /// Takes the kind of snapshot that the round needs. `wanted` loses the tables that have to wait
    /// for a slot.
    async fn take_snapshot<T: OlapEngine + 'static>(
        &mut self,
        context: &Context,
        writer: &Writer<T>,
        control: &SqlClient,
        measured: &Measured,
    ) -> Result<Snapshot, EngineError> {
        match (self.is_plain, self.first.take()) {
            (true, _) => Snapshot::plain(context).await,
            (false, Some(first)) => Snapshot::of_slot(context, first, false, &self.hold).await,
            (false, None) => {
                match tables_without_slot(writer, control, self.wanted.as_ref(), measured).await? {
                    Some((fresh, others)) => {
                        postpone(&self.event_tx, others).await;
                        self.wanted = Some(fresh);
                        Snapshot::without_slot(context, control, &self.hold).await
                    }
                    None => {
                        Snapshot::of_temporary_slot(context, control, &self.hold, self.trail).await
                    }
                }
            }
        }
    }
}

/// Reports tables that have to wait for another round, if there are any.
async fn postpone(event_tx: &mpsc::Sender<CopyEvent>, tables: BTreeSet<u32>) {
    if !tables.is_empty() {
        let _ = event_tx.send(CopyEvent::Postponed(tables)).await;
    }
}

/// Has the session that asked for the round adopt its tables. Returns the tables that are to be
/// copied, with the ids of their jobs. None: the session has ended, and the next session begins
/// another round.
async fn adopt(
    event_tx: &mpsc::Sender<CopyEvent>,
    snapshot: &Snapshot,
    tables: Vec<TableCopyPlan>,
    refused: Vec<StoredTable>,
) -> Option<Vec<(TableCopyPlan, Vec<u64>)>> {
    let (adopted, is_adopted) = oneshot::channel();
    let (lsn, since, holder) = (snapshot.lsn, snapshot.since, snapshot.holder());

    let planned =
        CopyEvent::Planned { lsn, since, tables: tables.clone(), refused, holder, adopted };
    event_tx.send(planned).await.ok()?;

    let ids = is_adopted.await.ok()?;
    Some(tables.into_iter().zip(ids).filter_map(|(table, ids)| Some((table, ids?))).collect())
}

/// Decides whether a round takes a snapshot without a slot, because PostgreSQL would make a slot
/// only when long transactions are over. Returns the tables that can be copied under such a
/// snapshot, and those that cannot. None: the round makes a slot.
///
/// Two kinds of tables need a slot. A copy that was interrupted goes on only where the stream can
/// stand exactly at the next snapshot. And of a table that was added to its publication, or is
/// published in another way, the stream lacks what a transaction wrote before that, also when the
/// transaction ends later (trap 13). Such a transaction has its lock on the table until it ends;
/// making a slot waits for it, and so its rows are in the snapshot of the slot.
///
/// The stored fingerprint of a table says how the table was published when a copy of it began after
/// all such transactions.
async fn tables_without_slot<T: OlapEngine + 'static>(
    writer: &Writer<T>,
    control: &SqlClient,
    wanted: Option<&BTreeSet<u32>>,
    measured: &Measured,
) -> Result<Option<(BTreeSet<u32>, BTreeSet<u32>)>, EngineError> {
    let Some(wanted) = wanted else { return Ok(None) };

    if !has_lasting_transactions(control).await?
        || catalog::has_synchronous_standbys(control).await?
    {
        return Ok(None);
    }

    let stored =
        writer.call(|target| target.state()).await?.map(|state| state.tables).unwrap_or_default();
    let under_way: BTreeSet<u32> =
        stored.iter().filter(|table| table.has_shadow).map(|table| table.oid).collect();
    let known: HashMap<u32, Membership> = stored
        .iter()
        .filter_map(|table| {
            let fingerprint: Fingerprint = serde_json::from_str(&table.fingerprint).ok()?;
            Some((table.oid, fingerprint.membership()))
        })
        .collect();

    // A table that is gone by now is planned by no round.
    let published_otherwise: BTreeMap<u32, &Vec<u32>> = wanted
        .iter()
        .filter_map(|oid| {
            let (membership, leaves) = measured.published.get(oid)?;
            let is_as_known = match known.get(oid) {
                Some(known) => known == membership,
                // A new table that the same rule brings as an older one was published as soon as it
                // was made.
                None => {
                    membership.is_by_rule()
                        && known.iter().any(|(older, known)| older < oid && known == membership)
                }
            };
            (!is_as_known).then_some((*oid, leaves))
        })
        .collect();
    let leaves: Vec<u32> = published_otherwise.values().copied().flatten().copied().collect();
    let written = catalog::written_among(control, &leaves).await?;

    let needs_slot = |oid: &u32| {
        under_way.contains(oid)
            || published_otherwise
                .get(oid)
                .is_some_and(|leaves| leaves.iter().any(|leaf| written.contains(leaf)))
    };
    let (others, fresh): (BTreeSet<u32>, BTreeSet<u32>) =
        wanted.iter().partition(|oid| needs_slot(oid));

    Ok((!fresh.is_empty()).then_some((fresh, others)))
}

/// Takes out tables that were published in another way when they were measured than they are at the
/// snapshot. Returns their oids.
fn take_published_otherwise(tables: &mut Vec<TableCopyPlan>, measured: &Measured) -> BTreeSet<u32> {
    let is_other = |table: &mut TableCopyPlan| {
        let now = table.source.fingerprint.membership();
        measured.published.get(&table.spec.oid).map(|(membership, _)| membership) != Some(&now)
    };
    tables.extract_if(.., is_other).map(|table| table.spec.oid).collect()
}

/// Returns whether transactions of any database have written something and are still in progress a
/// second later, so that making a slot would wait for them.
async fn has_lasting_transactions(control: &SqlClient) -> Result<bool, EngineError> {
    const TIMEOUT: Duration = Duration::from_secs(1);
    const STEP: Duration = Duration::from_millis(50);

    let (_, xids) = catalog::wal_insert_lsn_and_xids(control).await?;
    let since = tokio::time::Instant::now();

    loop {
        let snapshot = catalog::current_snapshot(control).await?;
        if xids.iter().all(|xid| snapshot.sees(*xid)) {
            return Ok(false);
        }

        if since.elapsed() >= TIMEOUT {
            return Ok(true);
        }

        tokio::time::sleep(STEP).await;
    }
}

struct Copy<'a, T> {
    context: &'a Context,
    writer: &'a Writer<T>,
    /// The connection for questions to the catalogs.
    control: SqlClient,
    snapshot: Snapshot,
    /// The tables with the ids of their jobs.
    tables: Vec<(TableCopyPlan, Vec<u64>)>,
    is_plain: bool,
    event_tx: mpsc::Sender<CopyEvent>,
    stop: CancellationToken,
}

impl<T: OlapEngine + 'static> Copy<'_, T> {
    fn begin_progress(&self) {
        for (table, _) in &self.tables {
            self.context.copy_progress.begin(
                &table.spec,
                table.source.estimated_rows,
                table.ranges.len(),
                table.done_rows,
            );
        }
    }

    fn end_progress(&self) {
        for (table, _) in &self.tables {
            self.context.copy_progress.end(table.spec.oid);
        }
    }

    /// Runs all workers, which take chunks from one queue, those of small tables first.
    async fn run(&self) -> Result<(), EngineError> {
        let work = Arc::new(self.shared_round());
        let (done, mut tables_done) = mpsc::unbounded_channel::<(usize, CopyOutcome)>();

        // These tables have nothing left to copy.
        for (at, _) in
            self.tables.iter().enumerate().filter(|(_, (table, _))| table.ranges.is_empty())
        {
            let _ = done.send((at, CopyOutcome::Done));
        }

        let mut workers = self.start_workers(&work, done).await?;
        let ended = self.follow(&mut workers, &mut tables_done).await;

        // After an error the other workers finish what they have begun, and begin nothing more.
        work.queue.lock().await.clear();

        let mut others = Ok(());
        while let Some(ended) = workers.join_next().await {
            others = others.and(worker_result(ended));
        }

        ended.and(others)
    }

    /// Returns the state that the workers share.
    fn shared_round(&self) -> SharedRound {
        let options = &self.context.options;
        let chunks_left = self.tables.iter().map(|(table, _)| table.ranges.len()).collect();

        SharedRound {
            context: self.context.clone(),
            snapshots: self.snapshot.ids.clone(),
            specs: self.tables.iter().map(|(table, _)| Arc::clone(&table.spec)).collect(),
            estimates: self.tables.iter().map(|(table, _)| table.source.estimated_rows).collect(),
            queue: tokio::sync::Mutex::new(self.queue()),
            state: Mutex::new(RoundProgress::new(chunks_left)),
            rate_limiter: options.rate_limit_bytes.map(RateLimiter::new),
            batch_bytes: batch_bytes(options.memory_limit_bytes, options.workers.max(1)),
            turn: tokio::sync::Mutex::new(()),
            stop: self.stop.clone(),
        }
    }

    /// Returns the bundles of chunks in the order in which workers take them.
    fn queue(&self) -> VecDeque<Vec<ChunkJob>> {
        let mut chunks: Vec<(i32, u64, ChunkJob)> = Vec::new();

        for (at, (table, ids)) in self.tables.iter().enumerate() {
            let leaves = table.source.leaves.iter();
            let leaf_pages: HashMap<u32, u64> =
                leaves.map(|leaf| (leaf.oid, leaf.pages.unwrap_or(0))).collect();

            for (range, &job) in table.ranges.iter().zip(ids) {
                let pages = leaf_pages
                    .get(&range.leaf)
                    .filter(|_| range.is_whole_leaf())
                    .map_or(u64::MAX, |&it| it.max(1));

                chunks.push((
                    table.priority,
                    pages,
                    ChunkJob { table: at, query: range.query.clone(), job },
                ));
            }
        }

        chunks.sort_by_key(|(priority, ..)| *priority);
        bundled(chunks.into_iter().map(|(_, pages, chunk)| (pages, chunk)))
    }

    async fn start_workers(
        &self,
        work: &Arc<SharedRound>,
        done: mpsc::UnboundedSender<(usize, CopyOutcome)>,
    ) -> Result<JoinSet<Result<(), EngineError>>, EngineError> {
        let mut workers = JoinSet::new();
        for number in 1..=self.context.options.workers.max(1) {
            let loader = self.writer.call(|target| target.loader()).await?;
            workers.spawn(Worker::new(number, Arc::clone(work), done.clone(), loader).run());
        }
        Ok(workers)
    }

    /// Reports tables as they are done, until no worker is left or one of them fails.
    async fn follow(
        &self,
        workers: &mut JoinSet<Result<(), EngineError>>,
        tables_done: &mut mpsc::UnboundedReceiver<(usize, CopyOutcome)>,
    ) -> Result<(), EngineError> {
        let began = tokio::time::Instant::now();
        let warning = self.context.options.snapshot_warning;
        let mut warnings = tokio::time::interval_at(began + warning, warning);
        let mut ended_tables = Vec::new();

        loop {
            tokio::select! {
                count = tables_done.recv_many(&mut ended_tables, MAX_REPORTED) => {
                    if count == 0 {
                        return Ok(());
                    }
                    self.report_ended(std::mem::take(&mut ended_tables)).await?;
                }
                Some(ended) = workers.join_next() => worker_result(ended)?,
                _ = warnings.tick() => tracing::warn!(
                    event = "snapshot_held",
                    minutes = began.elapsed().as_secs() / 60,
                    "the copy still holds its snapshot: VACUUM at the source cannot remove rows \
                     that it sees"
                ),
            }
        }
    }

    /// Compares tables whose last chunks are done with the catalogs, and reports the outcomes of
    /// their copies.
    async fn report_ended(&self, ended: Vec<(usize, CopyOutcome)>) -> Result<(), EngineError> {
        let ended: Vec<(&TableCopyPlan, CopyOutcome)> = ended
            .into_iter()
            .filter_map(|(at, copied)| Some((&self.tables.get(at)?.0, copied)))
            .collect();

        let oids: Vec<u32> = ended.iter().map(|(table, _)| table.spec.oid).collect();
        let now = self.current(&oids).await?;

        let mut outcomes = Vec::with_capacity(ended.len());
        for (table, copied) in ended {
            let (oid, name) = (table.spec.oid, table.spec.source.to_string());
            let is_unchanged = now.get(&oid).is_some_and(|now| is_same(&table.source, now));
            // COPY reads a table in its newest shape. If that is not the planned shape, the result
            // of the copy says nothing of the table.
            let copied = match copied {
                CopyOutcome::Done | CopyOutcome::Failed(_) if !is_unchanged => {
                    tracing::info!(
                        event = "copy_outdated",
                        table = name,
                        "the table changed while it was copied; it is copied again"
                    );
                    CopyOutcome::Changed
                }
                CopyOutcome::Failed(pause) => {
                    let reason = pause.reason.clone();
                    let _ = self.context.events.send(Event::CopyFailed { table: name, reason });
                    CopyOutcome::Failed(pause)
                }
                copied => copied,
            };

            self.context.copy_progress.end(oid);
            outcomes.push((oid, copied));
        }

        // The receiver is gone when the session is about to end.
        let _ = self.event_tx.send(CopyEvent::Ended(outcomes)).await;
        Ok(())
    }

    async fn current(&self, oids: &[u32]) -> Result<HashMap<u32, SourceTable>, EngineError> {
        let control = &self.control;
        catalog::begin_snapshot(control).await?;

        let now = if self.is_plain {
            catalog::all_tables(control).await?
        } else {
            catalog::published_among(control, &self.context.options.publications, oids).await?
        };

        catalog::end_snapshot(control).await?;
        Ok(now.into_iter().map(|table| (table.oid, table)).collect())
    }
}

fn worker_result(
    ended: Result<Result<(), EngineError>, tokio::task::JoinError>,
) -> Result<(), EngineError> {
    ended.map_err(|lost| EngineError::lost("a copy worker", lost))?
}

/// Puts neighbouring chunks of small tables and small partitions into bundles. Each chunk comes
/// with its pages.
fn bundled(chunks: impl Iterator<Item = (u64, ChunkJob)>) -> VecDeque<Vec<ChunkJob>> {
    let mut queue: VecDeque<Vec<ChunkJob>> = VecDeque::new();
    let mut room = 0;

    for (pages, chunk) in chunks {
        match queue.back_mut() {
            Some(bundle) if pages <= room && bundle.len() < MAX_BUNDLED => {
                bundle.push(chunk);
                room -= pages;
            }
            _ => {
                queue.push_back(vec![chunk]);
                room = BUNDLED_PAGES.saturating_sub(pages);
            }
        }
    }
    queue
}
