//! Publishing the copy beside the stream.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use duckdb::InterruptHandle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    olap::{OlapEngine, PublishOptions, Published, Publisher, TargetError},
    pipeline::{EngineError, Writer},
};

/// The niceness of a thread that publishes: the replicator goes first.
const NICE: i32 = 10;

/// What a run has published last.
#[derive(Debug, Clone, Default)]
pub(super) struct LastPublished(Arc<Mutex<Option<Published>>>);

impl LastPublished {
    fn get(&self) -> Option<Published> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, published: Published) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(published);
    }
}

/// Publishes the copy again, if it has changed since the last time.
pub(super) async fn publish_again<T: OlapEngine + 'static>(
    writer: &Writer<T>,
    options: &PublishOptions,
    last: &LastPublished,
    stop: &CancellationToken,
) -> Result<(), EngineError> {
    let is_there = writer.call(|target| target.state()).await?.is_some();
    if !is_there {
        return Ok(());
    }
    let publisher = writer.call(|target| target.publisher()).await?;

    if let Some(published) = publish(publisher, options.clone(), last.get(), stop).await? {
        tracing::info!(
            event = "published",
            path = %published.path.display(),
            lsn = %published.lsn,
            rows = published.rows,
            bytes = published.bytes,
            ms = Duration::from_secs_f64(published.seconds).as_millis() as u64,
            "a copy was published"
        );
        if !published.not_live.is_empty()
            && last.get().map(|last| last.not_live).as_ref() != Some(&published.not_live)
        {
            tracing::warn!(
                event = "published_in_part",
                tables = ?published.not_live,
                "the published copy lacks tables that are not live"
            );
        }
        last.set(published);
    }
    Ok(())
}

/// Publishes the copy on a thread of its own. Returns `None` when it is as it was at `last`. A
/// stop, or a caller that goes away, ends the publication; the version before stays.
///
/// # Errors
/// As for [`Publisher::publish`].
pub async fn publish(
    publisher: Publisher,
    options: PublishOptions,
    last: Option<Published>,
    stop: &CancellationToken,
) -> Result<Option<Published>, EngineError> {
    struct EndOnDrop(Arc<InterruptHandle>);
    impl Drop for EndOnDrop {
        fn drop(&mut self) {
            self.0.interrupt();
        }
    }

    const STEP: Duration = Duration::from_millis(50);
    let end = EndOnDrop(publisher.interrupt_handle());
    let (reply, mut done) = oneshot::channel();
    std::thread::Builder::new()
        .name("rhei-publish".to_owned())
        .spawn(move || {
            // Without the right to do so the thread works as it is.
            let _ = rustix::process::setpriority_process(None, NICE);
            // Sending fails when the caller has gone away.
            let _ = reply.send(publisher.publish(&options, last.as_ref()));
        })
        .map_err(TargetError::from)?;

    let published = loop {
        tokio::select! {
            published = &mut done => break published,
            () = stop.cancelled() => {
                // What is half written is removed; an interrupt between two statements is not seen.
                end.0.interrupt();
                tokio::time::sleep(STEP).await;
            }
        }
    };
    let published = published
        .map_err(|_| EngineError::Bug { what: "publishing", why: "its thread ended".to_owned() })?;
    Ok(published?)
}
