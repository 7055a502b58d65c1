//! A session: one connection of the stream, from attaching to its end.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use super::{
    CycleOptions, SyncEngine,
    attach::{Attached, Recopy, attach},
    command::Command,
    copies::{CopyScheduler, RoundUpdate},
    cycle::{Cycle, NextStep},
    retry::SessionRun,
    schema::{CatalogWatch, LockNotAvailable, SchemaStep},
};
use crate::{
    Checkpoint,
    failpoint::reached,
    olap::OlapEngine,
    pgoutput::QualifiedName,
    pipeline::{Context, EngineError, Event, Writer, meter::EngineState},
    source::{
        CdcConsumer, SourceError,
        pg_consumer::{PgConsumer, StreamOptions},
        wire::WireError,
    },
};

#[derive(Debug, PartialEq, Eq)]
pub(super) enum SessionEnd {
    Done,
    Stopped,
    Reattach(String),
    /// The operator asked for another copy of these tables.
    Resync(Vec<QualifiedName>),
}

pub(super) async fn stream<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    attached: Attached,
    copies: &mut CopyScheduler<T>,
    no_streaming_in_progress: bool,
) -> Result<SyncEngine<PgConsumer, T>, EngineError> {
    let others = attached.in_error.iter().map(|(oid, ..)| *oid);
    let others = others
        .chain(
            attached
                .pending_copies
                .iter()
                .copied()
                .filter(|oid| !attached.copying.contains_key(oid)),
        )
        .collect();

    copies.want(attached.pending_copies);
    copies.use_first(attached.snapshot_slot);

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
        figures: context.meter.stream().clone(),
        queue_bytes: context.options.memory_limit_bytes / 4,
        spool_folder: spool_folder(&context.options.target.path),
        no_streaming_in_progress,
    };

    let fingerprint = attached.pipeline.publication_fingerprint;
    let catalogs =
        CatalogWatch::new(context, &stream.tables, others, fingerprint, attached.truncated).await?;

    let consumer = PgConsumer::start(&context.options.source, stream).await?;
    reached("stream.started");
    let _ = context.events.send(Event::Streaming { checkpoint: checkpoint.lsn });
    context.meter.set_engine(EngineState::Streaming);

    let engine = SyncEngine::new(consumer, writer.clone(), checkpoint, context);
    Ok(engine.with_copies(attached.copying, attached.catching_up).with_catalogs(catalogs))
}

/// Returns whether the source is asked for whole transactions only from now on. PostgreSQL may
/// stumble over its catalogs (XX000) when it decodes, before its end, a transaction that changed
/// tables and was rolled back: the catalog rows that the decoding needs may be gone. PostgreSQL
/// does not decode such transactions at all when it sends whole transactions only.
pub(super) fn wants_whole_from_now_on(error: &EngineError) -> bool {
    let is_server_bug = match error {
        EngineError::Source(SourceError::Wire(WireError::Server(message))) => {
            message.code == "XX000"
        }
        _ => false,
    };

    if is_server_bug {
        tracing::warn!(
            event = "whole_transactions_only",
            "asking the source for whole transactions only, from now on"
        );
    }

    is_server_bug
}

/// Returns the folder of the target, where there is room for what the target will hold.
pub(super) fn spool_folder(target: &Path) -> PathBuf {
    target
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// How a session begins.
pub(super) struct SessionOptions<'a> {
    /// The tables to copy although their copies are good.
    pub(super) recopy: &'a Recopy,
    /// The source is asked for whole transactions only.
    pub(super) no_streaming_in_progress: bool,
}

/// Runs one session: attaches, and streams until `stop`, an error, or a reason to attach again.
/// `run` says how far the session came, also when it ends with an error.
pub(super) async fn session<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    options: SessionOptions<'_>,
    commands: &mut mpsc::UnboundedReceiver<Command>,
    copies: &mut CopyScheduler<T>,
    run: &mut SessionRun,
    stop: &CancellationToken,
) -> Result<SessionEnd, EngineError> {
    let attached = {
        // The source may let a session wait for hours: for transactions that are open, for locks.
        let _rest = context.pulse.rest();
        tokio::select! {
            () = stop.cancelled() => return Ok(SessionEnd::Stopped),
            attached = attach(context, writer, options.recopy, |oid| copies.is_active(oid)) => {
                attached?
            }
        }
    };

    let mut engine =
        stream(context, writer, attached, copies, options.no_streaming_in_progress).await?;
    run.has_streamed = true;

    let end = Box::pin(follow(&mut engine, context, commands, copies, stop)).await;
    run.position = engine.consumer.position().decoded.max(engine.checkpoint().lsn);

    let end = end?;
    if end == SessionEnd::Stopped {
        tracing::info!(
            event = "stopping",
            checkpoint = %engine.checkpoint().lsn,
            "stopping: checkpoint saved, acknowledging"
        );
    }

    engine.into_consumer().shutdown().await?;
    Ok(end)
}

/// What a session waits for.
enum SessionInput {
    Stop,
    Command(Command),
    /// A round of copies has something to tell.
    Copies(RoundUpdate),
    /// The interval has passed, or a batch has arrived.
    Turn,
}

/// What follows from an input before the next cycle.
enum Reaction {
    End(SessionEnd),
    PauseCopies(bool),
    HandleCopies(RoundUpdate),
    Nothing,
}

impl SessionInput {
    fn reaction(self) -> Reaction {
        match self {
            Self::Stop => Reaction::End(SessionEnd::Stopped),
            Self::Command(Command::Resync(table)) => Reaction::End(SessionEnd::Resync(vec![table])),
            Self::Command(Command::Pause(is_paused)) => Reaction::PauseCopies(is_paused),
            Self::Copies(update) => Reaction::HandleCopies(update),
            Self::Turn => Reaction::Nothing,
        }
    }
}

/// What a session does after a cycle. `must_yield` says that a command or a copy waits for the end
/// of the cycles.
fn after_cycle(next: NextStep, must_yield: bool) -> ControlFlow<Option<SessionEnd>> {
    match next {
        NextStep::Stop => ControlFlow::Break(Some(SessionEnd::Stopped)),
        NextStep::Reattach(reason) => ControlFlow::Break(Some(SessionEnd::Reattach(reason))),
        NextStep::Continue if !must_yield => ControlFlow::Continue(()),
        NextStep::Continue | NextStep::Wait | NextStep::EndOfStream => ControlFlow::Break(None),
    }
}

/// Follows the stream until `stop`, an error, or a reason for which the session has to attach
/// again.
pub(super) async fn follow<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    context: &Context,
    commands: &mut mpsc::UnboundedReceiver<Command>,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<SessionEnd, EngineError> {
    let mut ticks = tokio::time::interval(context.options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);

    // A cycle begins as soon as a change has arrived, but not sooner than this.
    let mut not_before = Instant::now();
    let mut look_at = Instant::now();

    loop {
        let input =
            next_input(engine, context, commands, copies, (&mut ticks, not_before), stop).await?;

        if let Some(end) = react(input, engine, context, copies, stop).await? {
            return Ok(end);
        }

        while engine.merge_step(copies).await? {
            context.pulse.beat();
            // Merging in steps does not keep the other tables waiting.
            if ticks.tick().now_or_never().is_some() {
                break;
            }
        }

        if look_at.elapsed() > Duration::ZERO {
            // The source may let this wait, for locks.
            let _rest = context.pulse.rest();
            tokio::select! {
                () = stop.cancelled() => return Ok(SessionEnd::Stopped),
                looked = look(engine) => looked?,
            }
            look_at = Instant::now() + context.options.catalog_interval;
        }

        loop {
            not_before = Instant::now() + context.options.interval;
            ticks.reset();

            let next = run_cycle(engine, context, stop).await?;
            match after_cycle(next, !commands.is_empty() || copies.is_holding()) {
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(None) => break,
                ControlFlow::Break(Some(end)) => return Ok(end),
            }
        }

        if let SchemaStep::Reattach(reason) = engine.apply_pending().await? {
            return Ok(SessionEnd::Reattach(reason));
        }

        if engine.has_to_copy() {
            copies.want_soon(engine.take_to_copy());
            // Other tables may have changed as well.
            look_at = Instant::now();
        }

        engine.publish_settled(copies, &context.settled).await?;
    }
}

/// Waits for what a session has to do next, which may be nothing for as long as the interval.
async fn next_input<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    context: &Context,
    commands: &mut mpsc::UnboundedReceiver<Command>,
    copies: &mut CopyScheduler<T>,
    (ticks, not_before): (&mut Interval, Instant),
    stop: &CancellationToken,
) -> Result<SessionInput, EngineError> {
    let _rest = context.pulse.rest();
    tokio::select! {
        () = stop.cancelled() => Ok(SessionInput::Stop),
        Some(command) = commands.recv() => Ok(SessionInput::Command(command)),
        update = copies.next() => Ok(SessionInput::Copies(update?)),
        _ = ticks.tick() => Ok(SessionInput::Turn),
        arrived = engine.wait_for_batch(not_before), if !copies.is_holding() => {
            arrived.map(|()| SessionInput::Turn)
        }
    }
}

/// Does what an input asks for. Returns how the session ends, if it does.
async fn react<T: OlapEngine + 'static>(
    input: SessionInput,
    engine: &mut SyncEngine<PgConsumer, T>,
    context: &Context,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<Option<SessionEnd>, EngineError> {
    match input.reaction() {
        Reaction::End(end) => return Ok(Some(end)),
        Reaction::PauseCopies(is_paused) => copies.pause(is_paused),
        Reaction::HandleCopies(update) => {
            let reattach = handle_copies(engine, context, update, copies, stop).await?;
            return Ok(reattach.map(SessionEnd::Reattach));
        }
        Reaction::Nothing => {}
    }
    Ok(None)
}

/// Lets the engine act upon an event of a round of copies, and reports the cycles that the event
/// required. Returns a reason to attach again.
async fn handle_copies<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    context: &Context,
    update: RoundUpdate,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<Option<String>, EngineError> {
    let mut cycles = Vec::new();
    let reattach = engine.handle_copy_event(update, copies, stop, &mut cycles).await?;

    for cycle in cycles {
        let Checkpoint { lsn, commit_time_us } = engine.checkpoint();
        context.meter.cycle(&cycle, lsn, commit_time_us);
        let _ = context.events.send(Event::Cycle(cycle));
    }
    Ok(reattach)
}

async fn look<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
) -> Result<(), EngineError> {
    if engine.look().await? == Err(LockNotAvailable) {
        tracing::debug!("a published table is locked; its shape is looked at later");
    }
    Ok(())
}

/// Runs one cycle and reports it.
async fn run_cycle<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    context: &Context,
    stop: &CancellationToken,
) -> Result<NextStep, EngineError> {
    // A look at the catalogs waits for the stream to pass it, and a copied table waits for the
    // checkpoint: the server is asked how far its WAL has come, and the position that it answers is
    // saved.
    let is_reaching =
        engine.is_reaching() || context.checkpoint.is_wanted_after(engine.checkpoint().lsn);
    let request_keepalives = is_reaching || engine.is_looking() || engine.is_settling();
    let options =
        CycleOptions { request_keepalives, save_idle: is_reaching, ..CycleOptions::default() };

    let Cycle { report, next } = engine.sync_once(options, stop).await?;
    context.checkpoint.set_reached(engine.checkpoint().lsn);
    if next == NextStep::Stop {
        return Ok(next);
    }

    let Checkpoint { lsn, commit_time_us } = engine.checkpoint();
    let applied = match next {
        // What was taken from the stream may have been rolled back.
        NextStep::Reattach(_) => lsn,
        _ => engine.consumer.position().decoded.max(lsn),
    };
    context.meter.cycle(&report, applied, commit_time_us);

    let has_rows = report.target_inserted_rows + report.target_deleted_rows > 0;
    if has_rows || report.source_transactions > 0 {
        context.activity.touch();
    }

    let _ = context.events.send(Event::Cycle(report));
    Ok(next)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_input_of_a_session_leads_to_one_reaction() {
        let orders = QualifiedName::new("public", "orders");
        let update = RoundUpdate::Ended { unfinished: BTreeSet::new() };

        type IsExpected = fn(Reaction) -> bool;
        let table: Vec<(SessionInput, IsExpected)> = vec![
            (SessionInput::Stop, |reaction| matches!(reaction, Reaction::End(SessionEnd::Stopped))),
            (SessionInput::Command(Command::Resync(orders)), |reaction| {
                let Reaction::End(SessionEnd::Resync(tables)) = reaction else { return false };
                tables.iter().all(|table| table.name == "orders")
            }),
            (SessionInput::Command(Command::Pause(true)), |reaction| {
                matches!(reaction, Reaction::PauseCopies(true))
            }),
            (SessionInput::Command(Command::Pause(false)), |reaction| {
                matches!(reaction, Reaction::PauseCopies(false))
            }),
            (SessionInput::Copies(update), |reaction| {
                matches!(reaction, Reaction::HandleCopies(_))
            }),
            (SessionInput::Turn, |reaction| matches!(reaction, Reaction::Nothing)),
        ];

        for (row, (input, is_expected)) in table.into_iter().enumerate() {
            assert!(is_expected(input.reaction()), "row {row}");
        }
    }

    #[test]
    fn after_a_cycle_a_session_ends_waits_or_goes_on() {
        let reattach = || SessionEnd::Reattach("a table is new".to_owned());

        for (next, must_yield, expected) in [
            (NextStep::Wait, false, ControlFlow::Break(None)),
            (NextStep::Wait, true, ControlFlow::Break(None)),
            (NextStep::Continue, false, ControlFlow::Continue(())),
            (NextStep::Continue, true, ControlFlow::Break(None)),
            (NextStep::EndOfStream, false, ControlFlow::Break(None)),
            (NextStep::Stop, false, ControlFlow::Break(Some(SessionEnd::Stopped))),
            (
                NextStep::Reattach("a table is new".to_owned()),
                true,
                ControlFlow::Break(Some(reattach())),
            ),
        ] {
            let shown = format!("{next:?}, must yield: {must_yield}");
            assert_eq!(after_cycle(next, must_yield), expected, "{shown}");
        }
    }

    #[test]
    fn spooled_transactions_lie_beside_the_target() {
        for (target, folder) in
            [("shop.duckdb", "."), ("copies/shop.duckdb", "copies"), ("/a", "/")]
        {
            assert_eq!(spool_folder(Path::new(target)), Path::new(folder), "{target}");
        }
    }
}
