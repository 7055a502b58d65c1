//! A copy that no stream follows: it needs no slot and no logical WAL.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{CopyEvent, CopyOutcome, CopyRound, TableCopyPlan};
use crate::{
    change::{Pause, TableSpec},
    checkpoint::Checkpoint,
    error::error_chain,
    lsn::Lsn,
    olap::{OlapEngine, Phase, Pipeline, StoredTable, TableState},
    pgoutput::QualifiedName,
    pipeline::{Context, EngineError, Writer},
    source::{LsnBarrier, catalog, connection::connect_sql},
};

/// Makes a plain copy under an ordinary snapshot: it needs no slot and no logical WAL, and no
/// stream follows it. Returns the tables that cannot be copied, with their reasons.
pub async fn plain_copy<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    stop: &CancellationToken,
) -> Result<Vec<(String, String)>, EngineError> {
    refuse_live_copy(context, writer).await?;
    let pipeline = describe_pipeline(context).await?;

    let (event_tx, mut events) = mpsc::channel(16);
    let round = CopyRound {
        wanted: None,
        first: None,
        trail: None,
        is_plain: true,
        hold: LsnBarrier::default(),
        event_tx,
        stop: stop.clone(),
    };

    let not_copied = NotCopied::default();
    let mut copy = PlainCopy { writer, pipeline, specs: BTreeMap::new(), not_copied };
    let (copied, followed) =
        tokio::join!(super::run(context, writer, round), copy.follow(&mut events));
    followed?;
    copied?;

    copy.not_copied.judge()?;
    tables_in_error(writer).await
}

async fn refuse_live_copy<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
) -> Result<(), EngineError> {
    let stored = writer.call(|target| target.state()).await?;
    if stored.is_some_and(|state| state.pipeline.phase == Phase::Running) {
        return Err(EngineError::Setup(format!(
            "{} is a live copy that a slot follows; a plain copy would end that\nhint: name \
             another file with --target",
            context.options.target
        )));
    }
    Ok(())
}

/// Returns the pipeline of a plain copy, which has no slot and no position.
async fn describe_pipeline(context: &Context) -> Result<Pipeline, EngineError> {
    let sql = connect_sql(&context.options.source, "control").await?;
    let server = catalog::server(&sql).await?;

    Ok(Pipeline {
        slot: String::new(),
        publications: Vec::new(),
        publication_fingerprint: String::new(),
        system_id: catalog::system_id(&sql).await.unwrap_or_default(),
        database: server.database,
        database_oid: server.database_oid,
        timeline: 0,
        phase: Phase::PlainCopy,
        checkpoint: Checkpoint { lsn: Lsn::ZERO, commit_time_us: None },
    })
}

/// Does what the events of the round ask for.
struct PlainCopy<'a, T> {
    writer: &'a Writer<T>,
    pipeline: Pipeline,
    /// The tables of the round, by oid.
    specs: BTreeMap<u32, Arc<TableSpec>>,
    not_copied: NotCopied,
}

impl<T: OlapEngine + 'static> PlainCopy<'_, T> {
    async fn follow(&mut self, events: &mut mpsc::Receiver<CopyEvent>) -> Result<(), EngineError> {
        let events = DrainOnDrop(events);

        while let Some(event) = events.0.recv().await {
            match event {
                CopyEvent::Planned { tables, refused, adopted, .. } => {
                    let ids = self.begin(tables, refused).await?;
                    let _ = adopted.send(ids);
                }
                CopyEvent::Ended(copied) => {
                    for (oid, copied) in copied {
                        self.end(oid, copied).await?;
                    }
                }
                CopyEvent::Locked(tables) => self.not_copied.locked.extend(tables.into_values()),
                // Only rounds beside a stream send this event.
                CopyEvent::Postponed(_) => {}
            }
        }

        Ok(())
    }

    /// Stores the pipeline and begins the copies. Returns per table the ids of its jobs.
    async fn begin(
        &mut self,
        tables: Vec<TableCopyPlan>,
        refused: Vec<StoredTable>,
    ) -> Result<Vec<Option<Vec<u64>>>, EngineError> {
        let pipeline = self.pipeline.clone();
        self.writer.call(move |target| target.put_state(&pipeline, &refused)).await?;

        let new: Vec<_> = tables.iter().map(TableCopyPlan::new_copy).collect();
        self.specs.extend(tables.into_iter().map(|table| (table.spec.oid, table.spec)));

        let ids = self.writer.call(move |target| target.begin_copies(&new)).await?;
        Ok(ids.into_iter().map(Result::ok).collect())
    }

    async fn end(&mut self, oid: u32, copied: CopyOutcome) -> Result<(), EngineError> {
        let pause = match copied {
            CopyOutcome::Done => self.merge(oid).await?,
            CopyOutcome::Failed(pause) => Some(pause),
            CopyOutcome::Changed => {
                self.not_copied.changed += 1;
                None
            }
        };
        let Some(pause) = pause else { return Ok(()) };

        self.writer.call(move |target| target.abandon_copies(&[(oid, Some(pause))])).await
    }

    /// Puts the loaded shadow in the place of the table. Returns a pause when the target refuses
    /// this table.
    async fn merge(&self, oid: u32) -> Result<Option<Pause>, EngineError> {
        let Some(spec) = self.specs.get(&oid).cloned() else { return Ok(None) };
        let merge = move |target: &mut T| {
            target.finish_loads(std::slice::from_ref(&spec))?;
            target.merge(&[spec], i64::MAX.unsigned_abs()).map(|_| ())
        };

        match self.writer.call(merge).await {
            Ok(()) => Ok(None),
            Err(EngineError::Target(error)) if error.is_of_table() => {
                Ok(Some(Pause { reason: error_chain(&error), remedy: error.remedy() }))
            }
            Err(error) => Err(error),
        }
    }
}

/// Lets the sender of an event go on when the receiver has stopped.
struct DrainOnDrop<'a>(&'a mut mpsc::Receiver<CopyEvent>);

impl Drop for DrainOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
        while self.0.try_recv().is_ok() {}
    }
}

/// The tables that another copy would bring.
#[derive(Default)]
struct NotCopied {
    /// The number of tables that changed their shape.
    changed: usize,
    locked: Vec<QualifiedName>,
}

impl NotCopied {
    /// Returns an error if a table was left out.
    fn judge(&self) -> Result<(), EngineError> {
        let Self { changed, locked } = self;

        if !locked.is_empty() {
            let locked: Vec<String> = locked.iter().map(ToString::to_string).collect();
            return Err(EngineError::Setup(format!(
                "{} could not be read: another session has locked it; the other tables are \
                 copied\nhint: run it again",
                locked.join(", ")
            )));
        }

        if *changed > 0 {
            return Err(EngineError::Setup(format!(
                "{changed} tables changed their shape while they were being copied; the others are \
                 copied\nhint: run it again"
            )));
        }

        Ok(())
    }
}

/// Returns the tables that cannot be copied, with their reasons.
async fn tables_in_error<T: OlapEngine + 'static>(
    writer: &Writer<T>,
) -> Result<Vec<(String, String)>, EngineError> {
    let state = writer.call(|target| target.state()).await?;
    let tables = state.into_iter().flat_map(|state| state.tables);
    Ok(tables
        .filter_map(|table| match table.state {
            TableState::Error(pause) => Some((table.source.to_string(), pause.reason)),
            _ => None,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_were_left_out_are_an_error() {
        let judged = |changed, locked: &[&str]| {
            let locked = locked.iter().map(|name| QualifiedName::new("public", *name)).collect();
            NotCopied { changed, locked }.judge().map_err(|error| error.to_string())
        };

        assert_eq!(judged(0, &[]), Ok(()));
        for (changed, locked, error) in [
            (
                2,
                vec!["a", "b"],
                "public.a, public.b could not be read: another session has locked it; the other \
                 tables are copied\nhint: run it again",
            ),
            (
                2,
                vec![],
                "2 tables changed their shape while they were being copied; the others are \
                 copied\nhint: run it again",
            ),
        ] {
            assert_eq!(judged(changed, &locked), Err(error.to_owned()));
        }
    }
}
