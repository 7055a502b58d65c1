//! What a session does about the shapes of tables: it answers the questions of the stream, and acts
//! upon looks at the catalogs.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{CatalogCheck, CatalogSnapshot, CatalogWatch, RelationAnswer, ShapeChange};
use crate::{
    Lsn,
    change::{
        TableSpec,
        followed::{SchemaQuery, SchemaResolution},
    },
    engine::{SyncEngine, cycle::with_deadline},
    olap::OlapEngine,
    pgoutput::relation::Relation,
    pipeline::EngineError,
    source::CdcConsumer,
};

/// A published table is locked at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockNotAvailable;

/// The result of [`SyncEngine::apply_pending`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SchemaStep {
    /// The stream has not passed the look yet.
    Waiting,
    Done,
    /// The next cycle brings tables into new shapes.
    NewShapes,
    /// The session has to attach again, for this reason.
    Reattach(String),
}

/// How long a question waits until the source shows the transaction that it is about: synchronous
/// standbys delay the moment at which a transaction becomes visible.
const MAX_INVISIBLE: Duration = Duration::from_secs(10);

const INVISIBLE_PAUSE: Duration = Duration::from_millis(5);

const INVISIBLE_WARNING: Duration = Duration::from_secs(1);

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Answers a question of the stream about the shape of a table. After `stop` the question stays
    /// open, and the stream is not read on.
    pub(in crate::engine) async fn answer(
        &mut self,
        question: &SchemaQuery,
        stop: &CancellationToken,
    ) -> Result<(), EngineError> {
        let Some(catalogs) = &mut self.catalogs else {
            self.consumer.answer(SchemaResolution::Same);
            return Ok(());
        };

        // Dropping a question that is half asked is safe: after a stop the connection is not used
        // again.
        let mut change = {
            // The source may let a question wait for hours, for a lock.
            let _rest = self.pulse.rest();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                change = ask_until_known(catalogs, question) => change?,
            }
        };

        let oid = question.relation.oid;
        let is_being_copied =
            self.copying.contains_key(&oid) || self.catching_up.contains_key(&oid);
        if matches!(change, ShapeChange::Alter(_)) && is_being_copied {
            change = ShapeChange::Recopy("it changed its shape while it was copied".to_owned());
        }

        let resolution = match change {
            ShapeChange::None | ShapeChange::MetadataOnly(_) => SchemaResolution::Same,
            ShapeChange::Alter(change) => {
                tracing::info!(
                    event = "table_altered",
                    table = %change.after.source,
                    "the table has another shape from here on"
                );

                catalogs.adopted(&change.after);
                // An earlier look at the catalogs may be older than this shape.
                (self.look, self.looked) = (None, None);
                SchemaResolution::SchemaChange(change)
            }
            // The batch that holds the change tells the target to copy the table.
            ShapeChange::Recopy(reason) => SchemaResolution::Copy(reason),
        };

        self.consumer.answer(resolution);
        Ok(())
    }

    /// Looks at the catalogs for what the stream never mentions. Returns the position that the
    /// stream has to reach before [`Self::apply_pending`] can act upon the look, or `None` when
    /// nothing has changed since the last look. Returns `Err(LockNotAvailable)` when a published
    /// table is locked, so that the look has to come later.
    pub async fn look(&mut self) -> Result<Result<Option<Lsn>, LockNotAvailable>, EngineError> {
        if let (None, Some(catalogs)) = (&self.look, &mut self.catalogs) {
            match with_deadline(catalogs.look()).await? {
                // A look that still waits for the stream is older, and so comes first.
                CatalogCheck::Unchanged { began } => match &mut self.looked {
                    Some(older) => older.confirm(&began, catalogs).await?,
                    None => self.looked = Some(began),
                },
                CatalogCheck::Changed(look) => self.look = Some(look),
                CatalogCheck::Locked => return Ok(Err(LockNotAvailable)),
            }
        }

        Ok(Ok(self.look.as_ref().map(|look| look.at)))
    }

    /// Returns the part of a position of the source's WAL, read `age` ago, that is sure to come:
    /// see [`CatalogWatch::flushed`]. The pending look at the catalogs then waits for no later
    /// position either.
    pub async fn reachable(&mut self, position: Lsn, age: Duration) -> Result<Lsn, EngineError> {
        let Some(catalogs) = &self.catalogs else { return Ok(position) };
        let reachable = catalogs.flushed(position, age).await?;

        if let Some(look) = &mut self.look {
            look.at = look.at.min(reachable);
        }
        Ok(reachable)
    }

    /// Returns whether the next batch brings tables into new shapes.
    pub fn has_shapes(&self) -> bool {
        self.has_shapes
    }

    /// Takes the tables that could not be copied since the last call, with their reasons.
    pub fn take_not_copied(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.not_copied)
    }

    /// Returns whether a look at the catalogs waits for the stream.
    pub fn is_looking(&self) -> bool {
        self.look.is_some()
    }

    /// Acts upon the last look once the stream has passed it. The shapes that the look found are in
    /// the batch of the next cycle.
    pub async fn apply_pending(&mut self) -> Result<SchemaStep, EngineError> {
        let position = self.consumer.position();
        let passed = position.decoded.max(self.checkpoint.lsn);
        let is_passed = |look: &mut CatalogSnapshot| look.at <= passed;

        let (true, Some(catalogs)) = (position.has_no_open_work, &mut self.catalogs) else {
            return Ok(SchemaStep::Waiting);
        };
        let Some(look) = self.look.take_if(is_passed) else { return Ok(SchemaStep::Waiting) };

        // Tables that are being copied are compared with the catalogs when their copies are done.
        let mut settled = catalogs.changes_of(look, |oid| {
            self.copying.contains_key(&oid) || self.catching_up.contains_key(&oid)
        });

        for check in std::mem::take(&mut settled.label_checks) {
            let oid = check.table.oid;
            let held = self.target.call(move |target| {
                target.holds_other_values(&check.table, &check.columns, &check.allowed)
            });

            if held.await? {
                settled.copy(oid, "a label of an enum was added, and renamed since");
            }
        }

        let has_shapes = !settled.schema_changes.is_empty();
        self.looked = settled.began;
        self.has_shapes = has_shapes;

        for reshape in settled.schema_changes {
            tracing::info!(
                event = "table_altered",
                table = %reshape.after.source,
                "the table has another shape"
            );
            catalogs.adopted(&reshape.after);
            self.consumer.change_shape(reshape);
        }

        let noted: Vec<Arc<TableSpec>> = settled.noted.into_iter().map(Arc::new).collect();
        noted.iter().for_each(|spec| catalogs.adopted(spec));
        if !noted.is_empty() {
            self.target.call(move |target| target.put_shapes(&noted)).await?;
        }

        self.copy_again(settled.copies).await?;

        Ok(match settled.set_changed {
            Some(reason) => SchemaStep::Reattach(reason),
            None if has_shapes => SchemaStep::NewShapes,
            None => SchemaStep::Done,
        })
    }
}

/// Asks the catalogs what a Relation message means, until they show the transaction that sent it.
async fn ask_until_known(
    catalogs: &mut CatalogWatch,
    question: &SchemaQuery,
) -> Result<ShapeChange, EngineError> {
    let since = Instant::now();
    let mut has_warned = false;

    loop {
        match with_deadline(catalogs.relation(question)).await? {
            RelationAnswer::Judged(change) => return Ok(change),
            RelationAnswer::Locked => warn_of_lock(&question.relation, &mut has_warned),
            // The commit waits for the acknowledgement of rhei, and the acknowledgement waits for
            // this answer. A copy needs no answer from the catalogs.
            RelationAnswer::NotVisible
                if since.elapsed() >= MAX_INVISIBLE
                    && with_deadline(catalogs.is_synchronous_standby()).await? =>
            {
                return Ok(ShapeChange::Recopy(
                    "synchronous_standby_names at the source includes rhei, so the table's shape \
                     cannot be read before its change is acknowledged"
                        .to_owned(),
                ));
            }
            RelationAnswer::NotVisible => {
                if since.elapsed() >= INVISIBLE_WARNING {
                    warn_of_invisible(&question.relation, &mut has_warned);
                }
                tokio::time::sleep(INVISIBLE_PAUSE).await;
            }
        }
    }
}

fn warn_of_lock(relation: &Relation, has_warned: &mut bool) {
    if !std::mem::replace(has_warned, true) {
        tracing::warn!(
            event = "waiting_for_lock",
            table = %relation.name,
            "waiting for a lock that another session holds on a published table, to read its shape"
        );
    }
}

fn warn_of_invisible(relation: &Relation, has_warned: &mut bool) {
    if !std::mem::replace(has_warned, true) {
        tracing::warn!(
            event = "waiting_for_visibility",
            table = %relation.name,
            "waiting for a transaction of the source that is not visible there yet, as while a \
             standby in synchronous_standby_names has not answered"
        );
    }
}
