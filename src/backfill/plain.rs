//! A copy that no stream follows: it needs no slot and no logical WAL.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{CopyEvent, CopyOutcome, CopyRound, Planned};
use crate::{
    change::{Pause, TableSpec},
    checkpoint::Checkpoint,
    error::error_chain,
    lsn::Lsn,
    olap::{OlapEngine, Phase, Pipeline, TableState},
    pipeline::{Context, EngineError, Writer},
    source::{LsnBarrier, catalog, connection::connect_sql},
};

/// Lets the sender of an event go on when the receiver has stopped.
struct DrainOnDrop<'a>(&'a mut mpsc::Receiver<CopyEvent>);

impl Drop for DrainOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
        while self.0.try_recv().is_ok() {}
    }
}

/// Makes a plain copy under an ordinary snapshot: it needs no slot and no logical WAL, and no
/// stream follows it. Returns the tables that cannot be copied, with their reasons.
pub async fn plain_copy<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    stop: &CancellationToken,
) -> Result<Vec<(String, String)>, EngineError> {
    let stored = writer.call(|target| target.state()).await?;
    if stored.is_some_and(|state| state.pipeline.phase == Phase::Running) {
        return Err(EngineError::Setup(format!(
            "{} is a live copy that a slot follows; a plain copy would end that\nhint: name \
             another file with --target",
            context.options.target.path.display()
        )));
    }

    let sql = connect_sql(&context.options.source, "control").await?;
    let server = catalog::server(&sql).await?;

    let pipeline = Pipeline {
        slot: String::new(),
        publications: Vec::new(),
        publication_fingerprint: String::new(),
        system_id: catalog::system_id(&sql).await.unwrap_or_default(),
        database: server.database,
        database_oid: server.database_oid,
        timeline: 0,
        phase: Phase::PlainCopy,
        checkpoint: Checkpoint { lsn: Lsn::ZERO, commit_time_us: None },
    };
    drop(sql);

    let (tell, mut told) = mpsc::channel(16);
    let round = CopyRound {
        wanted: None,
        first: None,
        trail: None,
        is_plain: true,
        hold: LsnBarrier::default(),
        told: tell,
        stop: stop.clone(),
    };

    let mut specs: BTreeMap<u32, Arc<TableSpec>> = BTreeMap::new();
    let (mut changed, mut locked) = (0, Vec::new());

    let follow = async {
        let told = DrainOnDrop(&mut told);

        while let Some(told) = told.0.recv().await {
            match told {
                CopyEvent::Planned { tables, refused, adopted, .. } => {
                    let pipeline = pipeline.clone();
                    writer.call(move |target| target.put_state(&pipeline, &refused)).await?;

                    let new: Vec<_> = tables.iter().map(Planned::new_copy).collect();
                    specs.extend(tables.into_iter().map(|table| (table.spec.oid, table.spec)));

                    let ids = writer.call(move |target| target.begin_copies(&new)).await?;
                    let _ = adopted.send(ids.into_iter().map(Result::ok).collect());
                }
                CopyEvent::Ended(copied) => {
                    for (oid, copied) in copied {
                        let pause = match copied {
                            CopyOutcome::Done => {
                                let Some(spec) = specs.get(&oid).cloned() else { continue };
                                let merge = move |target: &mut T| {
                                    target.finish_loads(std::slice::from_ref(&spec))?;
                                    target.merge(&[spec], i64::MAX.unsigned_abs()).map(|_| ())
                                };

                                match writer.call(merge).await {
                                    Err(EngineError::Target(error)) if error.is_of_table() => {
                                        Pause {
                                            reason: error_chain(&error),
                                            remedy: error.remedy(),
                                        }
                                    }
                                    merged => {
                                        merged?;
                                        continue;
                                    }
                                }
                            }
                            CopyOutcome::Failed(pause) => pause,
                            CopyOutcome::Changed => {
                                changed += 1;
                                continue;
                            }
                        };

                        writer
                            .call(move |target| target.abandon_copies(&[(oid, Some(pause))]))
                            .await?;
                    }
                }
                CopyEvent::Locked(tables) => locked.extend(tables.into_values()),
                // Only rounds beside a stream send this event.
                CopyEvent::Postponed(_) => {}
            }
        }

        Ok::<_, EngineError>(())
    };

    let (copied, followed) = tokio::join!(super::run(context, writer, round), follow);
    followed?;
    copied?;

    if !locked.is_empty() {
        let locked: Vec<String> = locked.iter().map(ToString::to_string).collect();
        return Err(EngineError::Setup(format!(
            "{} could not be read: another session has locked it; the other tables are \
             copied\nhint: run it again",
            locked.join(", ")
        )));
    }

    if changed > 0 {
        return Err(EngineError::Setup(format!(
            "{changed} tables changed their shape while they were being copied; the others are \
             copied\nhint: run it again"
        )));
    }

    let state = writer.call(|target| target.state()).await?;
    let tables = state.into_iter().flat_map(|state| state.tables);
    Ok(tables
        .filter_map(|table| match table.state {
            TableState::Error(pause) => Some((table.source.to_string(), pause.reason)),
            _ => None,
        })
        .collect())
}
