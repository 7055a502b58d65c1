//! A round: one snapshot, and the tables that are copied under it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    chunk_queue::{ChunkJob, RateLimiter, RoundProgress, SharedRound, batch_bytes},
    event::{CopyEvent, CopyOutcome, Planned},
    plan::{self, Measured, is_same},
    snapshot::{SlotWithSnapshot, Snapshot},
    worker::Worker,
};
use crate::{
    olap::OlapEngine,
    pipeline::{Context, EngineError, Event, Writer},
    source::{
        LsnBarrier,
        catalog::{self, Fingerprint, Membership, SourceTable},
        connection::{SqlClient, connect_sql},
    },
};

/// How many tables one question to the catalogs checks when their copies are done.
const MAX_TOLD: usize = 500;

/// The most tables in a bundle. A bundle is small tables, or small partitions, that one message
/// reads and one transaction loads.
const MAX_BUNDLED: usize = 64;

/// The most pages of 8 KiB that the tables of a bundle have together.
const BUNDLED_PAGES: u64 = 256;

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
    pub told: mpsc::Sender<CopyEvent>,
    /// Chunks that have begun are finished, and no more are begun.
    pub stop: CancellationToken,
}

/// Releases the stream however the round ends.
struct ReleaseOnDrop(LsnBarrier);

impl Drop for ReleaseOnDrop {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// Takes a snapshot and copies tables under it.
///
/// # Errors
/// The source or the target broke. Chunks that are done stay, and the next round goes on from there
/// where it can.
pub async fn run<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    round: CopyRound,
) -> Result<(), EngineError> {
    let release = ReleaseOnDrop(round.hold.clone());
    let (is_plain, mut wanted) = (round.is_plain, round.wanted.clone());

    let prepare = async {
        // The stream is held from the snapshot on, so every step that may wait for a lock comes
        // before it.
        let control = connect_sql(&context.options.source, "copy control").await?;
        let measured = plan::measure(context, &control, wanted.as_ref(), is_plain).await?;

        if !measured.locked.is_empty() {
            let _ = round.told.send(CopyEvent::Locked(measured.locked.clone())).await;
            if wanted
                .as_ref()
                .is_some_and(|wanted| wanted.iter().all(|oid| measured.locked.contains_key(oid)))
            {
                return Ok(None);
            }
        }

        let snapshot = match (is_plain, round.first) {
            (true, _) => Snapshot::plain(context).await?,
            (false, Some(first)) => Snapshot::of_slot(context, first, false, &round.hold).await?,
            (false, None) => {
                match tables_without_slot(writer, &control, wanted.as_ref(), &measured).await? {
                    Some((fresh, others)) => {
                        if !others.is_empty() {
                            let _ = round.told.send(CopyEvent::Postponed(others)).await;
                        }
                        wanted = Some(fresh);
                        Snapshot::without_slot(context, &control, &round.hold).await?
                    }
                    None => {
                        Snapshot::of_temporary_slot(context, &control, &round.hold, round.trail)
                            .await?
                    }
                }
            }
        };
        let mut planned =
            plan::plan(context, writer, &snapshot, wanted.as_ref(), is_plain, &measured).await?;

        if snapshot.xids.is_some() {
            let postponed = take_published_otherwise(&mut planned.0, &measured);
            if !postponed.is_empty() {
                let _ = round.told.send(CopyEvent::Postponed(postponed)).await;
            }
        }

        Ok::<_, EngineError>(Some((control, snapshot, planned)))
    };

    let prepared = tokio::select! {
        // Making a slot may wait for hours.
        () = round.stop.cancelled() => return Ok(()),
        prepared = prepare => prepared?,
    };
    let Some((control, snapshot, (tables, refused))) = prepared else { return Ok(()) };

    let (adopted, is_adopted) = oneshot::channel();
    let (lsn, since, holder) = (snapshot.lsn, snapshot.since, snapshot.holder());

    let planned =
        CopyEvent::Planned { lsn, since, tables: tables.clone(), refused, holder, adopted };

    if round.told.send(planned).await.is_err() {
        return Ok(());
    }

    // The session that asked for the round has ended: the next session begins another round.
    let Ok(ids) = is_adopted.await else { return Ok(()) };
    drop(release);

    let tables: Vec<(Planned, Vec<u64>)> =
        tables.into_iter().zip(ids).filter_map(|(table, ids)| Some((table, ids?))).collect();
    if tables.is_empty() {
        return Ok(());
    }

    tracing::info!(
        tables = tables.len(),
        snapshot = %snapshot.lsn,
        "copying tables under one snapshot"
    );

    let (told, stop) = (round.told, round.stop);
    let copy = Copy { context, writer, control, snapshot, tables, is_plain, told, stop };
    let ended = copy.run().await;

    for (table, _) in &copy.tables {
        context.copy_progress.end(table.spec.oid);
    }

    ended
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
fn take_published_otherwise(tables: &mut Vec<Planned>, measured: &Measured) -> BTreeSet<u32> {
    let is_other = |table: &mut Planned| {
        let now = table.source.fingerprint.membership();
        measured.published.get(&table.spec.oid).map(|(membership, _)| membership) != Some(&now)
    };
    tables.extract_if(.., is_other).map(|table| table.spec.oid).collect()
}

/// Returns whether transactions of any database have written something and are still in progress a
/// second later, so that making a slot would wait for them.
async fn has_lasting_transactions(control: &SqlClient) -> Result<bool, EngineError> {
    const PATIENCE: Duration = Duration::from_secs(1);
    const STEP: Duration = Duration::from_millis(50);

    let (_, xids) = catalog::wal_insert_lsn_and_xids(control).await?;
    let since = tokio::time::Instant::now();

    loop {
        let snapshot = catalog::current_snapshot(control).await?;
        if xids.iter().all(|xid| snapshot.sees(*xid)) {
            return Ok(false);
        }

        if since.elapsed() >= PATIENCE {
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
    tables: Vec<(Planned, Vec<u64>)>,
    is_plain: bool,
    told: mpsc::Sender<CopyEvent>,
    stop: CancellationToken,
}

impl<T: OlapEngine + 'static> Copy<'_, T> {
    /// Runs all workers, which take chunks from one queue, those of small tables first.
    async fn run(&self) -> Result<(), EngineError> {
        let mut queue: Vec<(i32, u64, ChunkJob)> = Vec::new();

        for (at, (table, ids)) in self.tables.iter().enumerate() {
            self.context.copy_progress.begin(
                &table.spec,
                table.source.estimated_rows,
                table.ranges.len(),
                table.done_rows,
            );

            let leaves = table.source.leaves.iter();
            let leaf_pages: HashMap<u32, u64> =
                leaves.map(|leaf| (leaf.oid, leaf.pages.unwrap_or(0))).collect();

            for (range, &job) in table.ranges.iter().zip(ids) {
                let pages = leaf_pages
                    .get(&range.leaf)
                    .filter(|_| range.is_whole_leaf())
                    .map_or(u64::MAX, |&it| it.max(1));

                queue.push((
                    table.priority,
                    pages,
                    ChunkJob { table: at, query: range.query.clone(), job },
                ));
            }
        }

        queue.sort_by_key(|(priority, ..)| *priority);
        let queue = bundled(queue.into_iter().map(|(_, pages, chunk)| (pages, chunk)));

        let left = self.tables.iter().map(|(table, _)| table.ranges.len()).collect();
        let work = Arc::new(SharedRound {
            context: self.context.clone(),
            snapshots: self.snapshot.ids.clone(),
            specs: self.tables.iter().map(|(table, _)| Arc::clone(&table.spec)).collect(),
            estimates: self.tables.iter().map(|(table, _)| table.source.estimated_rows).collect(),
            queue: tokio::sync::Mutex::new(queue),
            state: Mutex::new(RoundProgress::new(left)),
            rate_limiter: self.context.options.rate_limit_bytes.map(RateLimiter::new),
            batch_bytes: batch_bytes(
                self.context.options.memory_limit_bytes,
                self.context.options.workers.max(1),
            ),
            turn: tokio::sync::Mutex::new(()),
            stop: self.stop.clone(),
        });

        let (done, mut tables_done) = mpsc::unbounded_channel::<(usize, CopyOutcome)>();
        // These tables have nothing left to copy.
        for (at, _) in
            self.tables.iter().enumerate().filter(|(_, (table, _))| table.ranges.is_empty())
        {
            let _ = done.send((at, CopyOutcome::Done));
        }

        let mut workers = tokio::task::JoinSet::new();
        for number in 1..=self.context.options.workers.max(1) {
            let loader = self.writer.call(|target| target.loader()).await?;
            workers.spawn(Worker::new(number, Arc::clone(&work), done.clone(), loader).run());
        }

        drop(done);

        let began = tokio::time::Instant::now();
        let warning = self.context.options.snapshot_warning;
        let mut warnings = tokio::time::interval_at(began + warning, warning);

        let mut ended_tables = Vec::new();
        let ended = loop {
            tokio::select! {
                count = tables_done.recv_many(&mut ended_tables, MAX_TOLD) => {
                    if count == 0 {
                        break Ok(());
                    }
                    if let Err(error) = self.tell(std::mem::take(&mut ended_tables)).await {
                        break Err(error);
                    }
                }
                Some(ended) = workers.join_next() => {
                    let lost = |lost| EngineError::lost("a copy worker", lost);
                    if let Err(error) = ended.map_err(lost).and_then(|ended| ended) {
                        break Err(error);
                    }
                }
                _ = warnings.tick() => tracing::warn!(
                    minutes = began.elapsed().as_secs() / 60,
                    "the copy still holds its snapshot: VACUUM at the source cannot remove rows \
                     that it sees"
                ),
            }
        };

        // After an error the other workers finish what they have begun, and begin nothing more.
        work.queue.lock().await.clear();

        let mut others = Ok(());
        while let Some(ended) = workers.join_next().await {
            let lost = |lost| EngineError::lost("a copy worker", lost);
            others = others.and(ended.map_err(lost).and_then(|ended| ended));
        }

        ended.and(others)
    }

    /// Compares tables whose last chunks are done with the catalogs, and reports the outcomes of
    /// their copies.
    async fn tell(&self, ended: Vec<(usize, CopyOutcome)>) -> Result<(), EngineError> {
        let ended: Vec<(&Planned, CopyOutcome)> = ended
            .into_iter()
            .filter_map(|(at, copied)| Some((&self.tables.get(at)?.0, copied)))
            .collect();

        let oids: Vec<u32> = ended.iter().map(|(table, _)| table.spec.oid).collect();
        let now = self.current(&oids).await?;

        let mut told = Vec::with_capacity(ended.len());
        for (table, copied) in ended {
            let (oid, name) = (table.spec.oid, table.spec.source.to_string());
            let is_unchanged = now.get(&oid).is_some_and(|now| is_same(&table.source, now));
            // COPY reads a table in its newest shape. If that is not the planned shape, the result
            // of the copy says nothing of the table.
            let copied = match copied {
                CopyOutcome::Done | CopyOutcome::Failed(_) if !is_unchanged => {
                    tracing::info!(
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
            told.push((oid, copied));
        }

        // The receiver is gone when the session is about to end.
        let _ = self.told.send(CopyEvent::Ended(told)).await;
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
