//! One cycle: a batch of the stream, applied with its checkpoint, and acknowledged.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    schema::{Asked, CatalogCheck, CatalogSnapshot, CatalogWatch, ShapeChange},
    settled,
};
use crate::{
    Checkpoint, Lsn,
    change::{
        ChangeBatch, Nulled, Remedy, RowCounts, TableFailure, TableSpec,
        followed::{SchemaQuery, SchemaResolution},
    },
    error::error_chain,
    failpoint::reached,
    olap::{Applied, OlapEngine},
    pipeline::{
        Context, CycleReport, DdlLock, EngineError, Event, Writer,
        copy_progress::CopyProgress,
        latency::Latency,
        left_out::LeftOut,
        recopies::{MAX_RECOPIES, Recopies},
    },
    source::{BatchLimits, CdcConsumer, Delivery, SourceError},
};

/// How far an idle checkpoint may lie behind a position up to which the source has proven to hold
/// nothing for this pipeline (trap 26).
const IDLE_BYTES: u64 = 16 << 20;

const IDLE_TIME: Duration = Duration::from_secs(10);

/// How long a question waits until the source shows the transaction that it is about: synchronous
/// standbys delay the moment at which a transaction becomes visible.
const MAX_INVISIBLE: Duration = Duration::from_secs(10);

const INVISIBLE_PAUSE: Duration = Duration::from_millis(5);

const INVISIBLE_WARNING: Duration = Duration::from_secs(1);

/// A cycle whose questions have taken longer than this ends at the next source commit with a row to
/// apply.
const MAX_ASKING: Duration = Duration::from_millis(300);

/// A cycle that takes longer than this lets copies give way to the stream.
const LATE_CYCLE: Duration = Duration::from_millis(300);

/// Applies the batches that a consumer yields. One cycle is one target transaction.
pub struct SyncEngine<C, T> {
    pub consumer: C,
    pub(super) target: Writer<T>,
    pub(super) ddl_lock: DdlLock,
    pub(super) checkpoint: Checkpoint,
    /// Tables whose shadows are being filled.
    pub(super) copying: BTreeMap<u32, Arc<TableSpec>>,
    /// Tables whose shadows hold every chunk. The changes that were kept during the copy are merged
    /// once the checkpoint is at the `copy_lsn` of the table.
    pub(super) catching_up: BTreeMap<u32, Arc<TableSpec>>,
    pub(super) not_copied: Vec<(String, String)>,
    /// Tables whose changes DuckDB refused. Further changes of these tables are dropped until the
    /// tables are copied again.
    pub(super) paused: BTreeSet<u32>,
    pub(super) limits: BatchLimits,
    /// The error that broke the stream while a batch was applied.
    pub(super) broken: Option<SourceError>,
    /// Parts of a source transaction are applied, and the end of the transaction is not.
    pub(super) in_parts: bool,
    pub(super) last_saved: Instant,
    /// Reads the catalogs to judge what the stream describes. A recorded stream has no source to
    /// read from and asks no questions.
    pub(super) catalogs: Option<CatalogWatch>,
    /// The last look at the catalogs, until the stream has passed it.
    pub(super) look: Option<CatalogSnapshot>,
    /// A look at the catalogs that left nothing to do, until the stream has passed it.
    pub(super) looked: Option<settled::Began>,
    pub(super) has_shapes: bool,
    pub(super) copy_progress: CopyProgress,
    pub(super) latency: Latency,
    pub(super) left_out: LeftOut,
    pub(super) recopies: Recopies,
    /// Tables that wait for another copy since the last call of [`Self::take_to_copy`].
    pub(super) to_copy: BTreeSet<u32>,
    pub(super) events: tokio::sync::mpsc::UnboundedSender<Event>,
}

/// A published table is locked at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockNotAvailable;

/// The result of [`SyncEngine::settle`].
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

/// The result of applying a batch.
pub(super) enum Outcome {
    Applied(Applied, ChangeBatch),
    /// Neither the batch nor an earlier part of its source transaction is applied.
    RolledBack(TableFailure),
}

/// What a cycle did to tables, apart from changing rows.
#[derive(Default)]
pub(super) struct Effects {
    counts: RowCounts,
    /// Oids of truncated tables, each with the transaction of its last TRUNCATE.
    truncated: Vec<(u32, u32)>,
    nulled: Vec<(String, Nulled)>,
    failed: Vec<TableFailure>,
}

impl Effects {
    fn add(&mut self, batch: ChangeBatch) {
        for changes in batch.tables {
            self.counts += changes.counts;
            self.truncated.extend(changes.truncate.map(|xid| (changes.table.oid, xid)));

            let table = changes.table.source.to_string();
            self.nulled.extend(changes.nulled.into_iter().map(|nulled| (table.clone(), nulled)));
        }
        self.failed.extend(batch.failed);
    }
}

/// How a cycle is to be run.
#[derive(Debug, Clone, Copy, Default)]
pub struct CycleOptions {
    /// How long to wait for something to arrive.
    pub linger: Duration,
    /// The cycle does not wait for what lies behind this position.
    pub until: Option<Lsn>,
    /// Ask the source again and again how far its WAL has come.
    pub hurry: bool,
    /// Save the reached position even when nothing changed and no time has passed.
    pub save_idle: bool,
}

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    pub fn new(consumer: C, target: Writer<T>, checkpoint: Checkpoint, context: &Context) -> Self {
        let limits = BatchLimits {
            max_rows: context.options.max_batch_rows,
            // Memory holds the batch that is applied, the batch that is decoded next, and the WAL
            // from which it is decoded; the queue has a quarter of the limit. DuckDB takes the same
            // amount once more outside of its own limit, for the log (docs/decisions.md).
            max_bytes: context.options.memory_limit_bytes / 8,
            linger: Duration::ZERO,
            until: None,
            any: false,
            hurry: false,
        };

        Self {
            consumer,
            target,
            ddl_lock: DdlLock::clone(&context.ddl_lock),
            checkpoint,
            copying: BTreeMap::new(),
            catching_up: BTreeMap::new(),
            not_copied: Vec::new(),
            paused: BTreeSet::new(),
            limits,
            broken: None,
            in_parts: false,
            last_saved: Instant::now(),
            catalogs: None,
            look: None,
            looked: None,
            has_shapes: false,
            copy_progress: context.copy_progress.clone(),
            latency: context.latency.clone(),
            left_out: context.left_out.clone(),
            recopies: context.recopies.clone(),
            to_copy: BTreeSet::new(),
            events: context.events.clone(),
        }
    }

    /// Adds the tables whose copies are under way.
    pub fn with_copies(
        mut self,
        copying: BTreeMap<u32, Arc<TableSpec>>,
        catching_up: BTreeMap<u32, Arc<TableSpec>>,
    ) -> Self {
        (self.copying, self.catching_up) = (copying, catching_up);
        self
    }

    /// Adds the reader of the catalogs, which answers what the stream cannot say.
    pub fn with_catalogs(mut self, catalogs: CatalogWatch) -> Self {
        self.catalogs = Some(catalogs);
        self
    }

    pub fn checkpoint(&self) -> Checkpoint {
        self.checkpoint
    }

    /// Reads on until a whole source transaction has arrived and `not_before` has passed, or until
    /// a batch is full. The caller may drop the future at any time. While a look at the catalogs
    /// waits for a moment at which no transaction is half read, this call waits for ever.
    ///
    /// # Errors
    /// The same errors as of [`Self::sync_once`].
    pub async fn wait_for_batch(
        &mut self,
        not_before: tokio::time::Instant,
    ) -> Result<(), EngineError> {
        if self.look.is_some() {
            return std::future::pending().await;
        }

        let limits = BatchLimits { linger: Duration::MAX, ..self.limits.clone() };
        tokio::select! {
            full = self.consumer.gather(&limits) => return Ok(full?),
            () = tokio::time::sleep_until(not_before) => {}
        }

        Ok(self.consumer.gather(&BatchLimits { any: true, ..limits }).await?)
    }

    /// Runs one cycle: takes a batch, applies it with its checkpoint, and acknowledges it. A source
    /// transaction that is too large for memory comes in parts, which are all applied in one cycle
    /// and in one target transaction.
    ///
    /// # Errors
    /// The stream broke or the target refused the batch. No batch was applied in part; the caller
    /// starts again from the checkpoint.
    pub async fn sync_once(
        &mut self,
        cycle: CycleOptions,
        stop: &CancellationToken,
    ) -> Result<CycleReport, EngineError> {
        let report = self.cycle(cycle, stop).await;
        if std::mem::take(&mut self.in_parts) {
            // The source transaction did not come to its end.
            let rolled_back = self.target.call(|target| target.roll_back()).await;
            // The error that came first says more.
            return report.and_then(|report| rolled_back.map(|()| report));
        }

        report
    }

    async fn cycle(
        &mut self,
        cycle: CycleOptions,
        stop: &CancellationToken,
    ) -> Result<CycleReport, EngineError> {
        let started = Instant::now();
        let mut limits = BatchLimits {
            linger: cycle.linger,
            until: cycle.until,
            hurry: cycle.hurry,
            ..self.limits.clone()
        };

        let mut asking = Duration::ZERO;
        let nothing = |checkpoint: &Checkpoint| CycleReport {
            checkpoint: checkpoint.lsn,
            ..CycleReport::default()
        };

        let (mut effects, mut commit_times_us) = (Effects::default(), Vec::new());
        let mut read = Duration::ZERO;

        let (mut report, before, applied) = loop {
            let waiting = Instant::now();
            // What arrived after the break is not to be trusted, also in the middle of a
            // transaction.
            if let Some(error) = self.broken.take() {
                return Err(error.into());
            }

            let delivery = tokio::select! {
                biased;
                // Changes that were read and not applied come again: the checkpoint has not moved.
                () = stop.cancelled() => {
                    return Ok(CycleReport { is_stopped: true, ..nothing(&self.checkpoint) });
                }
                delivery = self.consumer.next_batch(&limits) => delivery?,
            };

            let mut batch = match delivery {
                Delivery::Batch(batch) => batch,
                Delivery::Ended => {
                    return Ok(CycleReport { is_ended: true, ..nothing(&self.checkpoint) });
                }
                Delivery::SchemaQuery(question) => {
                    let asked = Instant::now();
                    self.judge(&question, stop).await?;
                    asking += asked.elapsed();
                    // A migration leads to a question about one table after the other. The changes
                    // of other tables are applied in between.
                    if asking >= MAX_ASKING {
                        limits.max_rows = 1;
                    }
                    continue;
                }
            };

            read += waiting.elapsed();

            // The new shapes were taken with this batch, or dropped with their tables.
            self.has_shapes = false;
            batch.tables.retain(|changes| !self.paused.contains(&changes.table.oid));
            batch.schema_changes.retain(|reshape| !self.paused.contains(&reshape.after.oid));
            batch.failed.iter_mut().for_each(|failure| self.limit_recopies(failure));

            let position = self.consumer.position();
            let report = CycleReport {
                source_transactions: batch.source_transactions,
                lag_bytes: position.head.bytes_since(batch.end_lsn),
                ..nothing(&self.checkpoint)
            };

            if (batch.is_part || self.in_parts) && !batch.failed.is_empty() {
                return self.retry_without_tables(std::mem::take(&mut batch.failed)).await;
            }

            if !batch.is_part
                && !self.in_parts
                && !self.should_commit(&batch, cycle, position.reply_requested)
            {
                self.copy_progress.set_stream_late(false);
                return Ok(CycleReport { reattach: self.place_untracked().await?, ..report });
            }

            let before = self.checkpoint.lsn;
            let is_part = batch.is_part;
            commit_times_us.append(&mut batch.commit_times_us);

            match self.apply(batch, commit_times_us.last().copied()).await? {
                Outcome::Applied(applied, batch) => {
                    effects.add(batch);
                    if !is_part {
                        self.in_parts = false;
                        break (report, before, applied);
                    }
                    self.in_parts = true;
                    tracing::debug!("a part of a large transaction is applied");
                }
                Outcome::RolledBack(failure) => {
                    return self.retry_without_tables(vec![failure]).await;
                }
            }
        };

        reached("apply.committed");
        self.latency.record(&commit_times_us);
        self.consumer.acknowledge(applied.durable);

        let Effects { counts, truncated, nulled, failed } = effects;
        log_failures(&failed);
        self.count_recopies(&failed);
        for failure in &failed {
            self.copying.remove(&failure.oid);
            self.catching_up.remove(&failure.oid);
        }

        report.inserted = counts.inserted;
        report.updated = counts.updated;
        report.deleted = counts.deleted;
        report.truncated = counts.truncates;
        report.target_deleted_rows = applied.deleted_rows;
        report.target_inserted_rows = applied.inserted_rows;
        report.pruned = applied.pruned;
        report.checkpoint = self.checkpoint.lsn;
        report.wal_released_bytes = self.checkpoint.lsn.bytes_since(before);

        for (oid, xid) in truncated {
            // The TRUNCATE has ended the copy of the table.
            let spec = self.copying.remove(&oid);
            self.catching_up.extend(spec.map(|spec| (spec.oid, spec)));
            if let Some(catalogs) = &mut self.catalogs {
                catalogs.truncated(oid, xid);
            }
        }

        for (table, nulled) in nulled {
            let _ = self.events.send(Event::Nulled { table, nulled });
        }

        if let Some(catalogs) = &mut self.catalogs {
            failed.iter().for_each(|failure| catalogs.forget(failure.oid));
        }

        for failure in failed.iter().filter(|failure| failure.remedy.is_copy()) {
            self.wait_for_copy(failure.oid);
        }

        report.reattach = self.place_untracked().await?;
        report.paused = failed;
        report.is_behind = counts.inserted + counts.updated + counts.deleted >= limits.max_rows;
        report.duration_ms = started.elapsed().as_millis() as u64;

        tracing::debug!(
            source_transactions = report.source_transactions,
            inserted = report.inserted,
            updated = report.updated,
            deleted = report.deleted,
            truncated = report.truncated,
            checkpoint = %report.checkpoint,
            lag_bytes = report.lag_bytes,
            read_ms = read.as_millis() as u64,
            apply_ms = started.elapsed().saturating_sub(read).as_millis() as u64,
            "cycle"
        );

        self.copy_progress.set_stream_late(started.elapsed() > LATE_CYCLE);
        Ok(report)
    }

    /// Counts the copies that a batch leads to, once it is committed.
    fn count_recopies(&self, failed: &[TableFailure]) {
        let again = failed.iter().filter(|failure| failure.remedy == Remedy::CopyAgain);
        again.for_each(|failure| self.recopies.count(failure.oid));
    }

    /// Pauses a table that would be copied again without end.
    fn limit_recopies(&self, failure: &mut TableFailure) {
        if failure.remedy == Remedy::CopyAgain && self.recopies.is_spent(failure.oid) {
            failure.remedy = Remedy::Operator;
            failure.reason = format!(
                "the table was copied {} times within an hour, and cannot be followed: {}",
                MAX_RECOPIES, failure.reason
            );
        }
    }

    /// Takes back the applied parts of a source transaction within which tables cannot go on, and
    /// pauses these tables. The transaction is read again without them.
    async fn retry_without_tables(
        &mut self,
        failed: Vec<TableFailure>,
    ) -> Result<CycleReport, EngineError> {
        self.in_parts = false;
        log_failures(&failed);

        let checkpoint = self.checkpoint;
        let batch = ChangeBatch {
            is_part: false,
            continues: false,
            end_lsn: checkpoint.lsn,
            commit_times_us: Vec::new(),
            source_transactions: 0,
            schema_changes: Vec::new(),
            tables: Vec::new(),
            failed: failed.clone(),
        };

        let work = move |target: &mut T| {
            target.roll_back()?;
            target.apply(&batch, &checkpoint).map(|_| ())
        };

        self.target.call(work).await?;
        self.count_recopies(&failed);

        let tables: Vec<String> = failed.iter().map(|failure| failure.table.to_string()).collect();
        let reason = format!("a large transaction is read again without {}", tables.join(", "));
        let reattach = Some(reason);
        Ok(CycleReport {
            checkpoint: checkpoint.lsn,
            paused: failed,
            reattach,
            ..CycleReport::default()
        })
    }

    /// Answers a question of the stream about the shape of a table.
    async fn judge(
        &mut self,
        question: &SchemaQuery,
        stop: &CancellationToken,
    ) -> Result<(), EngineError> {
        let Some(catalogs) = &mut self.catalogs else {
            self.consumer.assembler().answer(SchemaResolution::Same);
            return Ok(());
        };

        let (since, mut is_said) = (Instant::now(), false);
        let mut verdict = loop {
            // Dropping a question that is half asked is safe: after a stop the connection is not
            // used again.
            let asked = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                asked = with_deadline(catalogs.relation(question)) => asked?,
            };

            match asked {
                Asked::Judged(verdict) => break verdict,
                Asked::Locked if is_said => {}
                Asked::Locked => {
                    is_said = true;
                    let table = &question.relation.name;
                    tracing::warn!(
                        %table,
                        "waiting for a lock that another session holds on a published table, to \
                         read its shape"
                    );
                }
                // The commit waits for the acknowledgement of rhei, and the acknowledgement waits
                // for this answer. A copy needs no answer from the catalogs.
                Asked::NotVisible
                    if since.elapsed() >= MAX_INVISIBLE
                        && with_deadline(catalogs.is_synchronous_standby()).await? =>
                {
                    break ShapeChange::Recopy(
                        "synchronous_standby_names at the source includes rhei, so the table's \
                         shape cannot be read before its change is acknowledged"
                            .to_owned(),
                    );
                }
                Asked::NotVisible => {
                    if !is_said && since.elapsed() >= INVISIBLE_WARNING {
                        is_said = true;
                        let table = &question.relation.name;
                        tracing::warn!(
                            %table,
                            "waiting for a transaction of the source that is not visible there \
                             yet, as while a standby in synchronous_standby_names has not answered"
                        );
                    }
                    tokio::time::sleep(INVISIBLE_PAUSE).await;
                }
            }
        };

        let oid = question.relation.oid;
        let is_being_copied =
            self.copying.contains_key(&oid) || self.catching_up.contains_key(&oid);
        if let (ShapeChange::Alter(_), true) = (&verdict, is_being_copied) {
            verdict = ShapeChange::Recopy("it changed its shape while it was copied".to_owned());
        }

        match verdict {
            ShapeChange::None | ShapeChange::MetadataOnly(_) => {
                self.consumer.assembler().answer(SchemaResolution::Same)
            }
            ShapeChange::Alter(reshape) => {
                tracing::info!(
                    table = %reshape.after.source,
                    "the table has another shape from here on"
                );

                catalogs.adopted(&reshape.after);
                // An earlier look at the catalogs may be older than this shape.
                (self.look, self.looked) = (None, None);
                self.consumer.assembler().answer(SchemaResolution::SchemaChange(reshape));
            }
            // The batch that holds the change tells the target to copy the table.
            ShapeChange::Recopy(reason) => {
                self.consumer.assembler().answer(SchemaResolution::Copy(reason))
            }
        }

        Ok(())
    }

    /// Looks at the catalogs for what the stream never mentions. Returns the position that the
    /// stream has to reach before [`Self::settle`] can act upon the look, or `None` when nothing
    /// has changed since the last look. Returns `Err(LockNotAvailable)` when a published table is
    /// locked, so that the look has to come later.
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
    pub async fn settle(&mut self) -> Result<SchemaStep, EngineError> {
        let position = self.consumer.position();
        let passed = position.decoded.max(self.checkpoint.lsn);
        let is_passed = |look: &mut CatalogSnapshot| look.at <= passed;

        let (true, Some(catalogs)) = (position.has_no_open_work, &mut self.catalogs) else {
            return Ok(SchemaStep::Waiting);
        };
        let Some(look) = self.look.take_if(is_passed) else { return Ok(SchemaStep::Waiting) };

        // Tables that are being copied are compared with the catalogs when their copies are done.
        let mut settled = catalogs.settle(look, |oid| {
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
            tracing::info!(table = %reshape.after.source, "the table has another shape");
            catalogs.adopted(&reshape.after);
            self.consumer.assembler().reshape(reshape);
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

    /// Returns whether a cycle commits this batch. An idle position is saved now and then, not at
    /// every look (traps 10, 25, 26).
    fn should_commit(
        &self,
        batch: &ChangeBatch,
        cycle: CycleOptions,
        reply_requested: bool,
    ) -> bool {
        let ahead = batch.end_lsn.bytes_since(self.checkpoint.lsn);

        !batch.is_idle()
            || ahead > 0
                && (cycle.save_idle
                    || reply_requested
                    || ahead >= IDLE_BYTES
                    || self.last_saved.elapsed() >= IDLE_TIME)
    }

    /// Applies a batch. A table with which DuckDB cannot go on is paused in the same transaction,
    /// and the other tables go on.
    async fn apply(
        &mut self,
        batch: ChangeBatch,
        commit_time_us: Option<i64>,
    ) -> Result<Outcome, EngineError> {
        let checkpoint = Checkpoint {
            lsn: batch.end_lsn.max(self.checkpoint.lsn),
            commit_time_us: commit_time_us.or(self.checkpoint.commit_time_us),
        };

        let mut batch = Arc::new(batch);
        let swaps = !batch.schema_changes.is_empty();
        let meanwhile = BatchLimits { linger: Duration::MAX, ..self.limits.clone() };

        loop {
            let applied = {
                let (_cycle, _shape);
                if swaps {
                    _shape = self.ddl_lock.write().await;
                } else {
                    _cycle = self.ddl_lock.read().await;
                }

                let work = Arc::clone(&batch);
                let began = Instant::now();
                let mut applying = std::pin::pin!(
                    self.target.call(move |target| target.apply(&work, &checkpoint))
                );

                // The next batch is decoded during the call, unless a look at the catalogs waits
                // for a moment at which no transaction is half read.
                let may_read = self.look.is_none() && self.broken.is_none();
                let applied = tokio::select! {
                    biased;
                    applied = &mut applying => applied,
                    read = self.consumer.gather(&meanwhile), if may_read => {
                        self.broken = read.err();
                        applying.await
                    }
                };

                self.latency.paused(began.elapsed());
                applied
            };

            match applied {
                Ok(applied) => {
                    if !batch.is_part {
                        self.checkpoint = checkpoint;
                        self.last_saved = Instant::now();
                    }

                    let batch = Arc::try_unwrap(batch).unwrap_or_else(|shared| (*shared).clone());
                    return Ok(Outcome::Applied(applied, batch));
                }
                // No part of the transaction is left in the target; a new session begins with the
                // first part.
                Err(EngineError::Target(error))
                    if error.is_conflict() && (batch.is_part || self.in_parts) =>
                {
                    return Err(EngineError::Busy);
                }
                Err(EngineError::Target(error)) => {
                    let failed =
                        error.table().filter(|oid| !self.paused.contains(oid)).and_then(|oid| {
                            let changed = batch.tables.iter().map(|changes| &changes.table);
                            changed
                                .chain(batch.schema_changes.iter().map(|reshape| &reshape.after))
                                .find(|table| table.oid == oid)
                        });

                    let Some(table) = failed else { return Err(error.into()) };
                    let reason = format!("{}; {}", error_chain(&error), table.recopy_hint());
                    let (oid, table) = (table.oid, table.source.clone());

                    // A copy that is under way is restarted. The operator has to look at a table
                    // whose copy was complete.
                    let is_copied =
                        self.copying.contains_key(&oid) || self.catching_up.contains_key(&oid);
                    let is_excused =
                        is_copied || (error.is_diverged() && self.is_explained(oid).await?);
                    let remedy = if is_excused { Remedy::CopyAgain } else { error.remedy() };

                    let mut failure = TableFailure { oid, table, reason, remedy };
                    self.limit_recopies(&mut failure);
                    self.paused.insert(failure.oid);

                    if batch.is_part || self.in_parts {
                        return Ok(Outcome::RolledBack(failure));
                    }

                    let mut rest = (*batch).clone();
                    rest.tables.retain(|changes| changes.table.oid != failure.oid);
                    rest.schema_changes.retain(|reshape| reshape.after.oid != failure.oid);
                    rest.failed.push(failure);
                    batch = Arc::new(rest);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns whether the catalogs explain that the copy of a table does not hold what the stream
    /// says of the table.
    async fn is_explained(&mut self, oid: u32) -> Result<bool, EngineError> {
        match &mut self.catalogs {
            Some(catalogs) => with_deadline(catalogs.explains_divergence(oid)).await,
            None => Ok(false),
        }
    }

    /// Returns the consumer, for its shutdown.
    pub fn into_consumer(self) -> C {
        self.consumer
    }
}

/// Waits for an answer from the catalogs of the source, at most for `ANSWER`; questions to the
/// catalogs wait for no lock. A source that is silent although its machine answers is left.
pub(super) async fn with_deadline<R>(
    answer: impl Future<Output = Result<R, EngineError>>,
) -> Result<R, EngineError> {
    const ANSWER: Duration = Duration::from_secs(120);

    let silent = |_| SourceError::from(crate::source::wire::WireError::Silent(ANSWER));
    tokio::time::timeout(ANSWER, answer).await.map_err(silent)?
}

/// Logs which tables are paused, and which tables are copied again.
pub(super) fn log_failures(failed: &[TableFailure]) {
    for TableFailure { table, reason, remedy, .. } in failed {
        match remedy {
            Remedy::CopyAgain => {
                tracing::warn!(
                    %table,
                    reason,
                    "a change cannot be applied; copying the table again"
                )
            }
            Remedy::CopyAltered => tracing::info!("table {table} is copied again: {reason}"),
            Remedy::Operator | Remedy::AllowNulls => {
                tracing::error!(%table, reason, "table paused")
            }
        }
    }
}
