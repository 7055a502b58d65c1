//! A session: one connection of the stream, from attaching to its end.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    CycleOptions, SyncEngine,
    attach::{Attached, Recopy, attach},
    command::Command,
    copies::CopyScheduler,
    cycle::{LockNotAvailable, SchemaStep},
    schema::CatalogWatch,
};
use crate::{
    Lsn,
    failpoint::reached,
    olap::OlapEngine,
    pgoutput::QualifiedName,
    pipeline::{Context, EngineError, Event, Writer},
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
        no_streaming_in_progress,
    };

    let fingerprint = attached.pipeline.publication_fingerprint;
    let catalogs =
        CatalogWatch::new(context, &stream.tables, others, fingerprint, attached.truncated).await?;

    let consumer = PgConsumer::start(&context.options.source, stream).await?;
    reached("stream.started");
    let _ = context.events.send(Event::Streaming { checkpoint: checkpoint.lsn });

    let engine = SyncEngine::new(consumer, writer.clone(), checkpoint, context);
    Ok(engine.with_copies(attached.copying, attached.catching_up).with_catalogs(catalogs))
}

/// Returns whether the source is asked for whole transactions only from now on. PostgreSQL may
/// stumble over its catalogs (XX000) when it decodes, before its end, a transaction that changed
/// tables and was rolled back: the catalog rows that the decoding needs may be gone. PostgreSQL
/// does not decode such transactions at all when it sends whole transactions only.
pub(super) fn wants_whole_from_now_on(error: &EngineError) -> bool {
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

/// Returns the folder of the target, where there is room for what the target will hold.
pub(super) fn spool_folder(target: &Path) -> PathBuf {
    target
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// How a session streams.
pub(super) struct SessionOptions<'a> {
    pub(super) no_streaming_in_progress: bool,
    /// Whether the session has begun to stream.
    pub(super) is_streaming: &'a mut bool,
    /// How far the stream had come when the session ended.
    pub(super) position: &'a mut Lsn,
}

/// Runs one session: attaches, and streams until `stop`, an error, or a reason to attach again.
pub(super) async fn session<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    again: &Recopy,
    asked: &mut mpsc::UnboundedReceiver<Command>,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
    how: SessionOptions<'_>,
) -> Result<SessionEnd, EngineError> {
    let attached = tokio::select! {
        () = stop.cancelled() => return Ok(SessionEnd::Stopped),
        attached = attach(context, writer, again, |oid| copies.is_active(oid)) => attached?,
    };

    let mut engine =
        stream(context, writer, attached, copies, how.no_streaming_in_progress).await?;
    *how.is_streaming = true;

    let followed = Box::pin(follow(&mut engine, context, asked, copies, stop)).await;
    *how.position = engine.consumer.position().decoded.max(engine.checkpoint().lsn);

    let ended = followed?;
    if ended == SessionEnd::Stopped {
        tracing::info!(
            checkpoint = %engine.checkpoint().lsn,
            "stopping: checkpoint saved, acknowledging"
        );
    }

    engine.into_consumer().shutdown().await?;
    Ok(ended)
}

/// Follows the stream until `stop`, an error, or a reason for which the session has to attach
/// again.
pub(super) async fn follow<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    context: &Context,
    asked: &mut mpsc::UnboundedReceiver<Command>,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<SessionEnd, EngineError> {
    let mut ticks = tokio::time::interval(context.options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);

    // A cycle begins as soon as a change has arrived, but not sooner than this.
    let mut not_before = tokio::time::Instant::now();
    let mut look_at = tokio::time::Instant::now();

    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(SessionEnd::Stopped),
            Some(asked) = asked.recv() => match asked {
                Command::Resync(table) => return Ok(SessionEnd::Resync(vec![table])),
                Command::Pause(is_paused) => copies.pause(is_paused),
            },
            news = copies.next() => {
                let mut cycles = Vec::new();
                let reattach = engine.handle_copy_event(news?, copies, stop, &mut cycles).await?;
                for cycle in cycles {
                    let _ = context.events.send(Event::Cycle(cycle));
                }
                if let Some(reason) = reattach {
                    return Ok(SessionEnd::Reattach(reason));
                }
            }
            _ = ticks.tick() => {}
            arrived = engine.wait_for_batch(not_before), if !copies.is_holding() => arrived?,
        }

        while engine.merge_step(copies).await? {
            // Merging in steps does not keep the other tables waiting.
            if ticks.tick().now_or_never().is_some() {
                break;
            }
        }

        if look_at.elapsed() > Duration::ZERO {
            let looked = tokio::select! {
                () = stop.cancelled() => return Ok(SessionEnd::Stopped),
                looked = engine.look() => looked?,
            };

            if looked == Err(LockNotAvailable) {
                tracing::debug!("a published table is locked; its shape is looked at later");
            }

            look_at = tokio::time::Instant::now() + context.options.catalog_interval;
        }

        loop {
            not_before = tokio::time::Instant::now() + context.options.interval;
            ticks.reset();

            // A look at the catalogs waits for the stream to pass it, and a copied table waits for
            // the checkpoint: the server is asked how far its WAL has come, and the position that
            // it answers is saved.
            let is_reaching = engine.is_reaching();
            let hurry = is_reaching || engine.is_looking() || engine.is_settling();
            let cycle = CycleOptions { hurry, save_idle: is_reaching, ..CycleOptions::default() };

            let report = engine.sync_once(cycle, stop).await?;
            if report.is_stopped {
                return Ok(SessionEnd::Stopped);
            }

            let has_rows = report.target_inserted_rows + report.target_deleted_rows > 0;
            if has_rows || report.source_transactions > 0 {
                context.activity.touch();
            }

            let (is_behind, reattach) = (report.is_behind, report.reattach.clone());
            let _ = context.events.send(Event::Cycle(report));
            if let Some(reason) = reattach {
                return Ok(SessionEnd::Reattach(reason));
            }

            if !is_behind || !asked.is_empty() || copies.is_holding() {
                break;
            }
        }

        if let SchemaStep::Reattach(reason) = engine.settle().await? {
            return Ok(SessionEnd::Reattach(reason));
        }

        if engine.has_to_copy() {
            copies.want_soon(engine.take_to_copy());
            // Other tables may have changed as well.
            look_at = tokio::time::Instant::now();
        }

        engine.publish_settled(copies, &context.settled).await?;
    }
}
