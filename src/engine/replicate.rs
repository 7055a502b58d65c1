//! The two ways to run cycles: `sync` catches up and stops, `run` goes on.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use rand::RngExt;
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    CycleOptions, Locked, Settling, SyncEngine,
    attach::{Attached, CopyAgain, attach},
    command::Asked,
    copying::Copies,
    schema::Catalogs,
    slot_lost,
    supervisor::{self, Restarts, Supervisor},
};
use crate::{
    Lsn,
    checkpoint::reachable_target,
    failpoint::reached,
    olap::{Compaction, DuckDb, OlapEngine, engine::FileMaintenance},
    pgoutput::QualifiedName,
    pipeline::{
        Context, CycleReport, EngineError, Event, Writer,
        error_policy::{Policy, Standstill, policy},
    },
    source::{
        CdcConsumer, SourceError, catalog,
        connection::connect_sql,
        pg_consumer::{PgConsumer, StreamOptions},
        wire::WireError,
    },
};

/// What `sync` did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct SyncReport {
    pub source_transactions: u64,
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    pub truncated: u64,
    pub cycles: u64,
    pub checkpoint: Lsn,
    /// The source's WAL position that was to be reached.
    pub reached: Lsn,
    /// Tables that are paused, with their reasons.
    pub in_error: Vec<(String, String)>,
    pub is_stopped: bool,
}

impl SyncReport {
    fn add(&mut self, cycle: &CycleReport) {
        self.source_transactions += cycle.source_transactions;
        self.inserted += cycle.inserted;
        self.updated += cycle.updated;
        self.deleted += cycle.deleted;
        self.truncated += cycle.truncated;
        self.cycles += 1;
        self.checkpoint = cycle.checkpoint;
        for failure in cycle.paused.iter().filter(|failure| !failure.remedy.is_copy()) {
            self.in_error.push((failure.table.to_string(), failure.reason.clone()));
        }
    }
}

/// How often `sync` attaches anew before it gives up: each time a table was found that had to be
/// copied again.
const ATTACH_LIMIT: u32 = 30;

/// How often `sync` goes on after its stream broke.
const BREAKS: u32 = 3;

/// Catches up with what the source had committed when it was called, then stops. Tables that need
/// it are copied, and those of `again`.
///
/// # Errors
/// See [`EngineError`]. What was applied stays; a second call goes on from there.
pub async fn sync(
    context: &Context,
    again: CopyAgain,
    stop: &CancellationToken,
) -> Result<SyncReport, EngineError> {
    let goal = wal_position(context).await?;
    let writer = Writer::new(DuckDb::open(&context.options.target)?);
    let mut copies = Copies::new(context, &writer, BREAKS);
    let ended = Box::pin(sync_sessions(context, again, stop, goal, &writer, &mut copies)).await;
    copies.shutdown().await;
    let report = ended?;
    if !report.is_stopped {
        tracing::info!(position = %report.reached, "caught up");
    }
    // What a copy has just written needs none: its last row groups are small, and no more.
    let changed_rows = report.updated + report.deleted;
    let compaction =
        if changed_rows > 0 { Compaction::For { changed_rows } } else { Compaction::None };
    writer.call(move |target| target.tidy(compaction)).await?;
    Ok(report)
}

async fn sync_sessions<T: OlapEngine + 'static>(
    context: &Context,
    mut again: CopyAgain,
    stop: &CancellationToken,
    goal: Lsn,
    writer: &Writer<T>,
    copies: &mut Copies<T>,
) -> Result<SyncReport, EngineError> {
    let mut report = SyncReport { reached: goal, ..SyncReport::default() };
    let mut breaks = 0;
    let mut wants_whole = false;
    for _ in 0..ATTACH_LIMIT {
        let attached = tokio::select! {
            () = stop.cancelled() => return Ok(SyncReport { is_stopped: true, ..report }),
            attached = attach(context, writer, &again, |oid| copies.is_active(oid)) => attached,
        };
        let attached = match attached {
            Ok(attached) => attached,
            Err(error) if policy(&error) == Policy::Passing && breaks < BREAKS => {
                breaks += 1;
                tracing::warn!(
                    error = super::with_causes(&error),
                    "asking the source's catalogs again"
                );
                tokio::time::sleep(Duration::from_millis(500) * breaks).await;
                continue;
            }
            Err(error) => {
                again = again
                    .or_everything(Box::pin(slot_lost::examine(context, error, copies)).await?);
                continue;
            }
        };
        // Written down by now.
        again = CopyAgain::Nothing;
        report.checkpoint = attached.pipeline.checkpoint.lsn;
        report.in_error = attached
            .in_error
            .iter()
            .map(|(_, table, reason)| (table.to_string(), reason.clone()))
            .collect();
        let mut engine = match stream(context, writer, attached, copies, wants_whole).await {
            Ok(engine) => engine,
            Err(error) => {
                again = again
                    .or_everything(Box::pin(slot_lost::examine(context, error, copies)).await?);
                continue;
            }
        };
        let ended = match catch_up(&mut engine, &mut report, context, copies, stop).await {
            // What broke after it had begun may heal: the checkpoint says where to go on.
            Err(error) if may_heal(&error) && breaks < BREAKS => {
                breaks += 1;
                wants_whole |= wants_whole_from_now_on(&error);
                tracing::warn!(
                    error = super::with_causes(&error),
                    "the stream broke; going on from the checkpoint"
                );
                tokio::select! {
                    () = stop.cancelled() => return Ok(SyncReport { is_stopped: true, ..report }),
                    () = tokio::time::sleep(Duration::from_millis(500) * breaks) => {}
                }
                continue;
            }
            Err(error) => {
                again = again
                    .or_everything(Box::pin(slot_lost::examine(context, error, copies)).await?);
                continue;
            }
            Ok(ended) => ended,
        };
        engine.into_consumer().shutdown().await?;
        match ended {
            Ended::AttachAnew(reason) => tracing::info!(reason, "attaching anew"),
            ended => {
                report.is_stopped = ended == Ended::Stopped;
                return Ok(report);
            }
        }
    }
    Err(changed_again_and_again())
}

/// Whether a stream that ended with this is begun again from the checkpoint.
fn may_heal(error: &EngineError) -> bool {
    policy(error).is_waited_for() || matches!(error, EngineError::Bug { .. })
}

/// Has one round copy every table that the stream and the look before it found to need another
/// copy.
///
/// # Errors
/// The source was altered during each of the rounds before, too.
fn copy_what_was_found<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    copies: &mut Copies<T>,
    rounds: u32,
) -> Result<(), EngineError> {
    if rounds > ATTACH_LIMIT {
        return Err(changed_again_and_again());
    }
    copies.want(engine.take_to_copy());
    Ok(())
}

fn changed_again_and_again() -> EngineError {
    EngineError::Setup(
        "tables changed their shape again and again while they were copied\nhint: run it again \
         when fewer schema changes \
         are made"
            .to_owned(),
    )
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Done,
    Stopped,
    AttachAnew(String),
    /// These tables are to be copied again, as somebody asked.
    Resync(Vec<QualifiedName>),
}

/// To the report's goal, and then to the shapes that the catalogs have by then.
async fn catch_up<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    report: &mut SyncReport,
    context: &Context,
    copies: &mut Copies<T>,
    stop: &CancellationToken,
) -> Result<Ended, EngineError> {
    let mut is_settled = false;
    let mut rounds = 0;
    // When the position to be reached was read, at the latest.
    let mut read_at = tokio::time::Instant::now();
    loop {
        if let Some(ended) = finish_copies(engine, report, context, copies, stop).await? {
            return Ok(ended);
        }
        while engine.checkpoint().lsn < report.reached || engine.has_shapes() {
            let decoded = engine.consumer.position().decoded;
            let cycle = CycleOptions {
                linger: Duration::from_millis(500),
                until: Some(report.reached),
                hurry: true,
                // Only the last position needs to be saved.
                save_idle: decoded >= report.reached,
            };
            let cycle = engine.sync_once(cycle, stop).await?;
            let _ = context.events.send(Event::Cycle(cycle.clone()));
            if cycle.is_stopped {
                return Ok(Ended::Stopped);
            }
            report.add(&cycle);
            if let Some(reason) = cycle.attach_anew {
                return Ok(Ended::AttachAnew(reason));
            }
            if cycle.source_transactions == 0 && engine.checkpoint().lsn < report.reached {
                report.reached = engine.reachable(report.reached, read_at.elapsed()).await?;
            }
        }
        if is_settled && !engine.has_to_copy() {
            return Ok(Ended::Done);
        }
        if !engine.is_looking() {
            let looked = tokio::select! {
                () = stop.cancelled() => return Ok(Ended::Stopped),
                looked = engine.look() => looked?,
            };
            match looked {
                Ok(None) if engine.has_to_copy() => {
                    rounds += 1;
                    copy_what_was_found(engine, copies, rounds)?;
                    is_settled = false;
                }
                Ok(None) => return Ok(Ended::Done),
                Ok(Some(at)) => {
                    report.reached = report.reached.max(at);
                    read_at = tokio::time::Instant::now();
                }
                Err(Locked) => {
                    tracing::warn!(
                        "waiting for a lock that somebody holds on a published table, to read its \
                         shape"
                    )
                }
            }
            continue;
        }
        match engine.settle().await? {
            Settling::AttachAnew(reason) => return Ok(Ended::AttachAnew(reason)),
            Settling::Done if !engine.has_to_copy() => return Ok(Ended::Done),
            Settling::Done => {
                rounds += 1;
                copy_what_was_found(engine, copies, rounds)?;
            }
            Settling::NewShapes => is_settled = true,
            // A transaction is half read, or a copy waits: one more cycle.
            Settling::Waiting => {
                report.reached = Lsn(report.reached.0.max(engine.checkpoint().lsn.0 + 1))
            }
        }
    }
}

/// Until every copy is merged. The stream goes on meanwhile.
async fn finish_copies<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    report: &mut SyncReport,
    context: &Context,
    copies: &mut Copies<T>,
    stop: &CancellationToken,
) -> Result<Option<Ended>, EngineError> {
    let mut ticks = tokio::time::interval(context.options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while engine.is_copying() || !copies.is_idle() {
        let is_merging = engine.merge_step(copies).await?;
        report.in_error.extend(engine.take_not_copied());
        if is_merging {
            continue;
        }
        let is_waiting = !copies.is_idle() || engine.checkpoint().lsn >= engine.copies_reach();
        if is_waiting {
            tokio::select! {
                () = stop.cancelled() => return Ok(Some(Ended::Stopped)),
                news = copies.next() => {
                    let mut cycles = Vec::new();
                    let attach_anew = engine.tend(news?, copies, stop, &mut cycles).await?;
                    for cycle in cycles {
                        report.add(&cycle);
                        let _ = context.events.send(Event::Cycle(cycle));
                    }
                    report.in_error.extend(engine.take_not_copied());
                    if let Some(reason) = attach_anew {
                        return Ok(Some(Ended::AttachAnew(reason)));
                    }
                    continue;
                }
                _ = ticks.tick() => {}
            }
        }
        let options_of_cycle = CycleOptions {
            linger: if is_waiting { Duration::ZERO } else { Duration::from_millis(100) },
            until: Some(engine.copies_reach()),
            hurry: !is_waiting,
            save_idle: !is_waiting,
        };
        loop {
            let cycle = engine.sync_once(options_of_cycle, stop).await?;
            let _ = context.events.send(Event::Cycle(cycle.clone()));
            if cycle.is_stopped {
                return Ok(Some(Ended::Stopped));
            }
            report.add(&cycle);
            if let Some(reason) = cycle.attach_anew {
                return Ok(Some(Ended::AttachAnew(reason)));
            }
            if !cycle.is_behind || copies.is_holding() {
                break;
            }
        }
    }
    Ok(None)
}

/// The end of the source's WAL, as far as a slot can follow it.
async fn wal_position(context: &Context) -> Result<Lsn, EngineError> {
    let sql = connect_sql(&context.options.source, "control").await?;
    let server = catalog::server(&sql).await?;
    crate::source::slot::judge_server(&server)?;
    Ok(reachable_target(catalog::wal_insert_lsn(&sql).await?))
}

async fn stream<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    attached: Attached,
    copies: &mut Copies<T>,
    wants_whole: bool,
) -> Result<SyncEngine<PgConsumer, T>, EngineError> {
    let others = attached.in_error.iter().map(|(oid, ..)| *oid);
    let others = others
        .chain(attached.to_copy.iter().copied().filter(|oid| !attached.copying.contains_key(oid)))
        .collect();
    copies.want(attached.to_copy);
    copies.use_first(attached.first);
    let checkpoint = attached.pipeline.checkpoint;
    let stream = StreamOptions {
        slot: context.options.slot.clone(),
        publications: context.options.publications.clone(),
        system_id: attached.pipeline.system_id,
        timeline: attached.pipeline.timeline,
        checkpoint: checkpoint.lsn,
        tables: attached.tables,
        ddl_secret: attached.ddl_secret,
        hold: copies.hold(),
        queue_bytes: context.options.memory_limit_bytes / 4,
        spool_folder: spool_folder(&context.options.target.path),
        wants_whole,
    };
    let fingerprint = attached.pipeline.publication_fingerprint;
    let catalogs =
        Catalogs::new(context, &stream.tables, others, fingerprint, attached.truncated).await?;
    let consumer = PgConsumer::start(&context.options.source, stream).await?;
    reached("stream.started");
    let _ = context.events.send(Event::Streaming { checkpoint: checkpoint.lsn });
    let engine = SyncEngine::new(consumer, writer.clone(), checkpoint, context);
    Ok(engine.with_copies(attached.copying, attached.catching_up).with_catalogs(catalogs))
}

/// PostgreSQL may stumble over its catalogs (XX000) when it decodes a transaction before its end
/// that changed tables and was rolled back: what it looks for may be gone. It does not decode those
/// at all when it sends whole transactions only.
fn wants_whole_from_now_on(error: &EngineError) -> bool {
    let is_slip = match error {
        EngineError::Source(SourceError::Wire(WireError::Server(message))) => {
            message.code == "XX000"
        }
        _ => false,
    };
    if is_slip {
        tracing::warn!("asking the source for whole transactions only, from now on");
    }
    is_slip
}

/// Beside the target, where there is room for what the target will hold.
fn spool_folder(target: &Path) -> PathBuf {
    target
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Follows the source until `stop`. A session that breaks for a reason that may heal is begun again
/// from the checkpoint, with growing, jittered pauses; others end the run.
///
/// # Errors
/// The first session could not begin, or a later one met something that no retry mends.
pub async fn run<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    mut commands: mpsc::UnboundedReceiver<Asked>,
    stop: &CancellationToken,
) -> Result<(), EngineError> {
    let mut copies = Copies::new(context, writer, u32::MAX);
    let mut supervisor = Supervisor::new(context.options.supervision.grace);
    begin_rounds(&mut supervisor, context, writer);
    let ended = run_sessions(context, writer, &mut commands, &mut copies, stop).await;
    copies.shutdown().await;
    for task in supervisor.shutdown().await {
        tracing::warn!(task, "did not finish in time, and was given up");
    }
    ended?;
    match writer.call(|target| target.tidy(Compaction::None)).await {
        // It stays in the log, and is written into the file next time.
        Err(error) if policy(&error) == Policy::Disk => {
            tracing::warn!(error = super::with_causes(&error), "file checkpoint put off");
            Ok(())
        }
        tidied => tidied,
    }
}

/// What comes round by the clock beside the sessions, also while the source is away.
fn begin_rounds<T: OlapEngine + 'static>(
    supervisor: &mut Supervisor,
    context: &Context,
    writer: &Writer<T>,
) {
    const CALM: Duration = Duration::from_secs(5);
    const RETENTION: Duration = Duration::from_secs(3600);
    let (tidied, its_writer) = (context.clone(), writer.clone());
    supervisor.every("file checkpoint", Duration::from_secs(1), move || {
        let (context, writer) = (tidied.clone(), its_writer.clone());
        async move {
            if context.activity.is_calm_after(CALM) {
                tidy(&context, &writer).await
            } else {
                Ok(())
            }
        }
    });
    let pruner = writer.clone();
    supervisor.every("retention of jobs", RETENTION, move || {
        let writer = pruner.clone();
        async move { writer.call(|target| target.prune()).await.map(|_| ()) }
    });
    let (watched, level) = (context.clone(), Arc::new(AtomicU32::new(0)));
    supervisor.every("lag watch", context.options.supervision.lag_interval, move || {
        let (context, level) = (watched.clone(), Arc::clone(&level));
        async move { watch_lag(&context, &level).await }
    });
}

/// Writes DuckDB's log into the file while nothing else happens.
async fn tidy<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
) -> Result<(), EngineError> {
    let _shape = context.ddl_lock.write().await;
    let tidied = writer.call(|target| target.tidy(Compaction::Some)).await;
    if tidied.is_err() {
        // Once more later.
        context.activity.note();
    }
    tidied
}

/// Warns of WAL that the slot holds: once, and again each time that it has doubled.
async fn watch_lag(context: &Context, level: &AtomicU32) -> Result<(), EngineError> {
    let sql = connect_sql(&context.options.source, "lag watch").await?;
    let Some(slot) = catalog::slot(&sql, &context.options.slot).await? else { return Ok(()) };
    let held_bytes = slot.held_bytes.unwrap_or_default();
    let times = held_bytes / context.options.supervision.lag_warning_bytes.max(1);
    let now = u64::BITS - times.leading_zeros();
    if now > level.swap(now, Ordering::Relaxed) {
        tracing::warn!(
            slot = context.options.slot,
            held_bytes,
            "the slot holds much WAL at the source, which waits for this copy"
        );
    }
    if slot.wal_status.as_deref() == Some("unreserved") {
        tracing::error!(
            slot = context.options.slot,
            held_bytes,
            "the source is about to throw away WAL that this copy needs (max_slot_wal_keep_size)"
        );
    }
    Ok(())
}

async fn run_sessions<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    asked: &mut mpsc::UnboundedReceiver<Asked>,
    copies: &mut Copies<T>,
    stop: &CancellationToken,
) -> Result<(), EngineError> {
    const FIRST_PAUSE: Duration = Duration::from_millis(500);
    const LONGEST_PAUSE: Duration = Duration::from_secs(30);
    const CALM: Duration = Duration::from_secs(10);
    const STEADY: Duration = Duration::from_secs(2);
    const IN_A_ROW: u32 = 20;
    const EMPTY_PAUSE: Duration = Duration::from_secs(2);
    const EMPTY_WARNING: Duration = Duration::from_secs(60);
    let mut pause = FIRST_PAUSE;
    let mut failures = 0_u32;
    let mut has_streamed = false;
    let mut in_a_row = 0_u32;
    let mut again = CopyAgain::Nothing;
    let mut wants_whole = false;
    let mut restarts = Restarts::new(context.options.supervision.restart);
    let mut must_reopen = false;
    let mut standstill = Standstill::default();
    let mut said_empty: Option<tokio::time::Instant> = None;
    loop {
        let (mut is_streaming, mut position) = (false, Lsn::ZERO);
        let began = tokio::time::Instant::now();
        let how = How { wants_whole, is_streaming: &mut is_streaming, position: &mut position };
        let ended = supervisor::caught("the session", async {
            if must_reopen {
                // Nobody else may have it open.
                copies.shutdown().await;
                writer.call(|target| target.reopen()).await?;
                must_reopen = false;
            }
            Box::pin(session(context, writer, &again, asked, copies, stop, how)).await
        });
        let ended = ended.await;
        // Once it has streamed, what was asked for is written down.
        if is_streaming {
            again = CopyAgain::Nothing;
        }
        has_streamed |= is_streaming;
        let ended = match ended {
            Err(error) => match Box::pin(slot_lost::examine(context, error, copies)).await {
                Ok(copy_again) => {
                    again = again.or_everything(copy_again);
                    continue;
                }
                Err(error) => Err(error),
            },
            ended => ended,
        };
        let error = match ended {
            Ok(Ended::Resync(tables)) => {
                tracing::info!(?tables, "copying again, as asked");
                again = CopyAgain::Tables(tables);
                continue;
            }
            Ok(Ended::AttachAnew(reason)) => {
                tracing::info!(reason, "attaching anew");
                // Many changes in a row, or one that a new session does not settle: not as fast as
                // possible.
                in_a_row = if began.elapsed() < CALM { in_a_row + 1 } else { 0 };
                if in_a_row > IN_A_ROW {
                    tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        () = tokio::time::sleep(FIRST_PAUSE * (in_a_row - IN_A_ROW).min(20)) => {}
                    }
                }
                continue;
            }
            Ok(_) => return Ok(()),
            // A table that was to be copied again is gone by now; everything else goes on.
            Err(EngineError::Setup(reason))
                if has_streamed && matches!(again, CopyAgain::Tables(_)) =>
            {
                tracing::error!(reason, "not copied again");
                again = CopyAgain::Nothing;
                continue;
            }
            Err(EngineError::NoTable { .. }) => {
                has_streamed = true;
                if said_empty.is_none_or(|said| said.elapsed() >= EMPTY_WARNING) {
                    said_empty = Some(tokio::time::Instant::now());
                    tracing::warn!(
                        publications = context.options.publications.join(", "),
                        "waiting for the first table: the publication holds none that [source] \
                         tables and exclude choose"
                    );
                }
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = tokio::time::sleep(context.options.catalog_interval.min(EMPTY_PAUSE)) => {}
                }
                continue;
            }
            Err(error) => error,
        };
        // What cannot be begun is the operator's to mend; what broke after it had begun may heal.
        let policy = policy(&error);
        match policy {
            Policy::Passing => {}
            Policy::Outage | Policy::Disk if has_streamed => {}
            Policy::Restart if restarts.take() => {}
            Policy::Restart => {
                tracing::error!("too many bugs in too short a time; rhei stops");
                return Err(error);
            }
            Policy::Outage | Policy::Disk | Policy::Table | Policy::Operator => return Err(error),
        }
        // What DuckDB has failed at may have left the file closed.
        must_reopen = policy == Policy::Disk || matches!(error, EngineError::Target(_));
        wants_whole |= wants_whole_from_now_on(&error);
        // One that breaks as soon as it streams may do so again and again.
        if is_streaming && began.elapsed() > STEADY {
            (failures, pause) = (0, FIRST_PAUSE);
        }
        failures += 1;
        let is_end_of_stream = is_streaming && policy.is_waited_for();
        let left_alone =
            if is_end_of_stream { standstill.ended(position, began.elapsed()) } else { None };
        let jittered = left_alone.unwrap_or(pause).mul_f64(rand::rng().random_range(0.5..1.0));
        tracing::warn!(
            error = super::with_causes(&error),
            failures,
            retry_in_ms = jittered.as_millis() as u64,
            "{}; going on from the checkpoint",
            match policy {
                Policy::Disk => "the disk failed",
                Policy::Restart => "rhei met a bug",
                _ => "the stream broke",
            }
        );
        if left_alone.is_some() {
            tracing::error!(
                %position,
                "the source ends the stream at the same position again and again, and is left \
                 alone for longer and longer: its log \
                 says whether it crashes over what comes next there"
            );
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(jittered) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// How a session streams.
struct How<'a> {
    wants_whole: bool,
    /// Whether it has begun to.
    is_streaming: &'a mut bool,
    /// How far the stream had come when it ended.
    position: &'a mut Lsn,
}

/// One session: attach, stream until `stop`, an error, or a reason to attach anew.
async fn session<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    again: &CopyAgain,
    asked: &mut mpsc::UnboundedReceiver<Asked>,
    copies: &mut Copies<T>,
    stop: &CancellationToken,
    how: How<'_>,
) -> Result<Ended, EngineError> {
    let attached = tokio::select! {
        () = stop.cancelled() => return Ok(Ended::Stopped),
        attached = attach(context, writer, again, |oid| copies.is_active(oid)) => attached?,
    };
    let mut engine = stream(context, writer, attached, copies, how.wants_whole).await?;
    *how.is_streaming = true;
    let followed = Box::pin(follow(&mut engine, context, asked, copies, stop)).await;
    *how.position = engine.consumer.position().decoded.max(engine.checkpoint().lsn);
    let ended = followed?;
    if ended == Ended::Stopped {
        tracing::info!(checkpoint = %engine.checkpoint().lsn, "stopping: checkpoint saved, \
             acknowledging");
    }
    engine.into_consumer().shutdown().await?;
    Ok(ended)
}

/// Follows the stream until `stop`, an error, or something that the session has to attach again
/// for.
async fn follow<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    context: &Context,
    asked: &mut mpsc::UnboundedReceiver<Asked>,
    copies: &mut Copies<T>,
    stop: &CancellationToken,
) -> Result<Ended, EngineError> {
    let mut ticks = tokio::time::interval(context.options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    // A cycle begins as soon as something has come, but not sooner than this.
    let mut not_before = tokio::time::Instant::now();
    let mut look_at = tokio::time::Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(Ended::Stopped),
            Some(asked) = asked.recv() => match asked {
                Asked::Resync(table) => return Ok(Ended::Resync(vec![table])),
                Asked::Pause(is_paused) => copies.pause(is_paused),
            },
            news = copies.next() => {
                let mut cycles = Vec::new();
                let attach_anew = engine.tend(news?, copies, stop, &mut cycles).await?;
                for cycle in cycles {
                    let _ = context.events.send(Event::Cycle(cycle));
                }
                if let Some(reason) = attach_anew {
                    return Ok(Ended::AttachAnew(reason));
                }
            }
            _ = ticks.tick() => {}
            arrived = engine.arrival(not_before), if !copies.is_holding() => arrived?,
        }
        while engine.merge_step(copies).await? {
            // What is merged in steps does not keep the others waiting.
            if ticks.tick().now_or_never().is_some() {
                break;
            }
        }
        if look_at.elapsed() > Duration::ZERO {
            let looked = tokio::select! {
                () = stop.cancelled() => return Ok(Ended::Stopped),
                looked = engine.look() => looked?,
            };
            if looked == Err(Locked) {
                tracing::debug!("a published table is locked; its shape is looked at later");
            }
            look_at = tokio::time::Instant::now() + context.options.catalog_interval;
        }
        loop {
            not_before = tokio::time::Instant::now() + context.options.interval;
            ticks.reset();
            // What was looked at waits for the stream to pass it, and a table that is copied for
            // the checkpoint: the server is asked how far it is, and what it says is saved.
            let is_reaching = engine.is_reaching();
            let hurry = is_reaching || engine.is_looking() || engine.is_settling();
            let cycle = CycleOptions { hurry, save_idle: is_reaching, ..CycleOptions::default() };
            let report = engine.sync_once(cycle, stop).await?;
            if report.is_stopped {
                return Ok(Ended::Stopped);
            }
            let has_rows = report.target_inserted_rows + report.target_deleted_rows > 0;
            if has_rows || report.source_transactions > 0 {
                context.activity.note();
            }
            let (is_behind, attach_anew) = (report.is_behind, report.attach_anew.clone());
            let _ = context.events.send(Event::Cycle(report));
            if let Some(reason) = attach_anew {
                return Ok(Ended::AttachAnew(reason));
            }
            if !is_behind || !asked.is_empty() || copies.is_holding() {
                break;
            }
        }
        if let Settling::AttachAnew(reason) = engine.settle().await? {
            return Ok(Ended::AttachAnew(reason));
        }
        if engine.has_to_copy() {
            copies.want_soon(engine.take_to_copy());
            // Others may have changed as well.
            look_at = tokio::time::Instant::now();
        }
        engine.publish_settled(copies, &context.settled).await?;
    }
}
