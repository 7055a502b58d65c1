//! One cycle: a batch of the stream, applied with its checkpoint, and acknowledged.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    schema::{CatalogSnapshot, CatalogWatch},
    settled,
};
use crate::{
    Checkpoint, Lsn,
    change::{ChangeBatch, Nulled, Remedy, RowCounts, TableFailure, TableSpec},
    error::error_chain,
    failpoint::reached,
    olap::{Applied, OlapEngine, TargetError},
    pipeline::{
        Context, CycleReport, DdlLock, EngineError, Event, Writer,
        activity::IdleTimer,
        copy_progress::CopyProgress,
        latency::Latency,
        left_out::LeftOut,
        meter::{Meter, TableMeter},
        pulse::Pulse,
        recopies::{MAX_RECOPIES, Recopies},
    },
    source::{BatchLimits, CdcConsumer, Delivery, SourceError},
};

/// How far an idle checkpoint may lie behind a position up to which the source has proven to hold
/// nothing for this pipeline (trap 26).
const IDLE_BYTES: u64 = 16 << 20;

const IDLE_TIME: Duration = Duration::from_secs(10);

/// A cycle whose questions have taken longer than this ends at the next source commit with a row to
/// apply.
const MAX_ASKING: Duration = Duration::from_millis(300);

/// A cycle that takes longer than this lets copies give way to the stream.
const LATE_CYCLE: Duration = Duration::from_millis(300);

/// Applies the batches that a consumer yields. One cycle is one target transaction.
pub struct SyncEngine<C, T> {
    /// Reads the stream of the source; between two cycles it may be asked for its position.
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
    /// When the stream last had rows to apply; a verification reads slower then.
    activity: IdleTimer,
    pub(super) latency: Latency,
    pub(super) left_out: LeftOut,
    pub(super) pulse: Pulse,
    meter: Meter,
    pub(super) recopies: Recopies,
    /// Tables that wait for another copy since the last call of [`Self::take_to_copy`].
    pub(super) to_copy: BTreeSet<u32>,
    pub(super) events: tokio::sync::mpsc::UnboundedSender<Event>,
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
    meters: Vec<(Arc<TableSpec>, TableMeter)>,
}

impl Effects {
    fn add(&mut self, batch: ChangeBatch) {
        for changes in batch.tables {
            self.counts += changes.counts;
            self.meters.push((Arc::clone(&changes.table), TableMeter::of(&changes)));
            self.truncated.extend(changes.truncate.map(|xid| (changes.table.oid, xid)));

            let table = changes.table.source.to_string();
            self.nulled.extend(changes.nulled.into_iter().map(|nulled| (table.clone(), nulled)));
        }
        self.failed.extend(batch.failed);
    }
}

/// One cycle: what it did, and what follows from it.
#[derive(Debug, Clone)]
pub struct Cycle {
    /// The counts of the cycle, the checkpoint after it, and the lag.
    pub report: CycleReport,
    /// What the session does next.
    pub next: NextStep,
}

/// What a session does after a cycle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NextStep {
    /// The stream held nothing more: the next cycle comes at its turn.
    Wait,
    /// More changes were waiting: the next cycle follows at once.
    Continue,
    /// The stop signal came before anything was applied.
    Stop,
    /// The consumer has nothing more and never will (a recorded stream).
    EndOfStream,
    /// The session has to attach again before it goes on, for this reason: tables came, went, or
    /// have to be copied again.
    Reattach(String),
}

/// What the stream brought to a cycle.
enum CycleInput {
    Batch(ChangeBatch),
    Stopped,
    EndOfStream,
}

/// What one cycle has gathered before its commit.
struct OpenCycle {
    started: Instant,
    limits: BatchLimits,
    /// How long the cycle has waited for its batches.
    reading: Duration,
    /// How long questions to the catalogs have taken.
    asking: Duration,
    commit_times_us: Vec<i64>,
    effects: Effects,
}

impl OpenCycle {
    fn new(limits: &BatchLimits, options: CycleOptions) -> Self {
        Self {
            started: Instant::now(),
            limits: BatchLimits {
                linger: options.linger,
                until: options.until,
                request_keepalives: options.request_keepalives,
                ..limits.clone()
            },
            reading: Duration::ZERO,
            asking: Duration::ZERO,
            commit_times_us: Vec::new(),
            effects: Effects::default(),
        }
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
    pub request_keepalives: bool,
    /// Save the reached position even when nothing changed and no time has passed.
    pub save_idle: bool,
}

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Makes an engine that goes on from `checkpoint`, from which `consumer` reads. It has neither
    /// copies nor a reader of the catalogs until they are added.
    pub fn new(consumer: C, target: Writer<T>, checkpoint: Checkpoint, context: &Context) -> Self {
        let limits = BatchLimits {
            max_rows: context.options.max_batch_rows,
            // Memory holds the batch that is applied, the batch that is decoded next, and the WAL
            // from which it is decoded; the queue has a quarter of the limit. DuckDB takes the same
            // amount once more outside of its own limit, for the log (docs/decisions.md).
            max_bytes: context.options.memory_limit_bytes / 8,
            linger: Duration::ZERO,
            until: None,
            stop_after_one: false,
            request_keepalives: false,
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
            activity: context.activity.clone(),
            latency: context.latency.clone(),
            left_out: context.left_out.clone(),
            pulse: context.pulse.clone(),
            meter: context.meter.clone(),
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

    /// Returns the checkpoint of the last target commit.
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
            full = self.consumer.fill(&limits) => return Ok(full?),
            () = tokio::time::sleep_until(not_before) => {}
        }

        Ok(self.consumer.fill(&BatchLimits { stop_after_one: true, ..limits }).await?)
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
        options: CycleOptions,
        stop: &CancellationToken,
    ) -> Result<Cycle, EngineError> {
        let cycle = self.cycle(options, stop).await;

        if std::mem::take(&mut self.in_parts) {
            // The source transaction did not come to its end.
            let rolled_back = self.target.call(|target| target.roll_back()).await;
            // The error that came first says more.
            return cycle.and_then(|cycle| rolled_back.map(|()| cycle));
        }

        cycle
    }

    async fn cycle(
        &mut self,
        options: CycleOptions,
        stop: &CancellationToken,
    ) -> Result<Cycle, EngineError> {
        let before = self.checkpoint.lsn;
        let mut open = OpenCycle::new(&self.limits, options);

        let (report, applied) = loop {
            let mut batch = match self.next_input(&mut open, stop).await? {
                CycleInput::Batch(batch) => batch,
                CycleInput::Stopped => return Ok(self.cycle_without_changes(NextStep::Stop)),
                CycleInput::EndOfStream => {
                    return Ok(self.cycle_without_changes(NextStep::EndOfStream));
                }
            };

            self.leave_out_paused(&mut batch);

            let position = self.consumer.position();
            let report = CycleReport {
                source_transactions: batch.source_transactions,
                lag_bytes: position.head.bytes_since(batch.end_lsn),
                checkpoint: self.checkpoint.lsn,
                ..CycleReport::default()
            };

            let is_large = batch.is_part || self.in_parts;
            if is_large && !batch.failed.is_empty() {
                return self.retry_without_tables(std::mem::take(&mut batch.failed)).await;
            }

            if !is_large && !self.should_commit(&batch, options, position.reply_requested) {
                self.copy_progress.set_stream_late(false);
                let next = self.place_untracked().await?.map_or(NextStep::Wait, NextStep::Reattach);
                return Ok(Cycle { report, next });
            }

            let is_part = batch.is_part;
            open.commit_times_us.append(&mut batch.commit_times_us);

            match self.apply(batch, open.commit_times_us.last().copied()).await? {
                Outcome::Applied(applied, batch) => {
                    open.effects.add(batch);
                    self.in_parts = is_part;
                    if !is_part {
                        break (report, applied);
                    }
                    tracing::debug!("a part of a large transaction is applied");
                }
                Outcome::RolledBack(failure) => {
                    return self.retry_without_tables(vec![failure]).await;
                }
            }
        };

        let report = CycleReport {
            target_deleted_rows: applied.deleted_rows,
            target_inserted_rows: applied.inserted_rows,
            pruned: applied.pruned,
            checkpoint: self.checkpoint.lsn,
            wal_released_bytes: self.checkpoint.lsn.bytes_since(before),
            ..report
        };

        reached("apply.committed");
        self.latency.record(&open.commit_times_us);
        self.consumer.acknowledge(applied.durable);
        self.after_commit(report, open).await
    }

    fn cycle_without_changes(&self, next: NextStep) -> Cycle {
        let checkpoint = self.checkpoint.lsn;
        Cycle { report: CycleReport { checkpoint, ..CycleReport::default() }, next }
    }

    /// Waits for the next batch, and answers the questions that come before it.
    async fn next_input(
        &mut self,
        open: &mut OpenCycle,
        stop: &CancellationToken,
    ) -> Result<CycleInput, EngineError> {
        loop {
            // What arrived after the break is not to be trusted, also in the middle of a
            // transaction.
            if let Some(error) = self.broken.take() {
                return Err(error.into());
            }

            self.pulse.beat();
            let waiting = Instant::now();
            let delivery = tokio::select! {
                biased;
                // Changes that were read and not applied come again: the checkpoint has not moved.
                () = stop.cancelled() => return Ok(CycleInput::Stopped),
                delivery = self.consumer.next_batch(&open.limits) => delivery?,
            };

            match delivery {
                Delivery::Batch(batch) => {
                    open.reading += waiting.elapsed();
                    return Ok(CycleInput::Batch(batch));
                }
                Delivery::Ended => return Ok(CycleInput::EndOfStream),
                Delivery::SchemaQuery(question) => {
                    let asked = Instant::now();
                    self.answer(&question, stop).await?;
                    open.asking += asked.elapsed();

                    // A migration leads to a question about one table after the other. The changes
                    // of other tables are applied in between.
                    if open.asking >= MAX_ASKING {
                        open.limits.max_rows = 1;
                    }
                }
            }
        }
    }

    /// Drops what a batch says of paused tables.
    fn leave_out_paused(&mut self, batch: &mut ChangeBatch) {
        // The new shapes were taken with this batch, or dropped with their tables.
        self.has_shapes = false;

        batch.tables.retain(|changes| !self.paused.contains(&changes.table.oid));
        batch.schema_changes.retain(|change| !self.paused.contains(&change.after.oid));
        batch.failed.iter_mut().for_each(|failure| self.limit_recopies(failure));
    }

    /// Brings the session's own state in line with what was committed.
    async fn after_commit(
        &mut self,
        mut report: CycleReport,
        open: OpenCycle,
    ) -> Result<Cycle, EngineError> {
        let Effects { counts, truncated, nulled, failed, meters } = open.effects;
        meters.iter().for_each(|(table, meter)| self.meter.changed(&table.source, meter));

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

        log_failures(&failed);
        self.count_recopies(&failed);
        for failure in &failed {
            self.copying.remove(&failure.oid);
            self.catching_up.remove(&failure.oid);
            if let Some(catalogs) = &mut self.catalogs {
                catalogs.forget(failure.oid);
            }
            if failure.remedy.is_copy() {
                self.wait_for_copy(failure.oid);
            }
        }

        let is_full = counts.inserted + counts.updated + counts.deleted >= open.limits.max_rows;
        let next = match self.place_untracked().await? {
            Some(reason) => NextStep::Reattach(reason),
            None if is_full => NextStep::Continue,
            None => NextStep::Wait,
        };

        report.inserted = counts.inserted;
        report.updated = counts.updated;
        report.deleted = counts.deleted;
        report.truncated = counts.truncates;
        report.paused = failed;
        report.duration_ms = open.started.elapsed().as_millis() as u64;

        log_cycle(&report, open.reading, open.started.elapsed());
        self.copy_progress.set_stream_late(open.started.elapsed() > LATE_CYCLE);
        Ok(Cycle { report, next })
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
    ) -> Result<Cycle, EngineError> {
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

        let mut cycle = self.cycle_without_changes(NextStep::Reattach(reason));
        cycle.report.paused = failed;
        Ok(cycle)
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
        if !batch.tables.is_empty() {
            self.activity.touch();
        }

        let checkpoint = Checkpoint {
            lsn: batch.end_lsn.max(self.checkpoint.lsn),
            commit_time_us: commit_time_us.or(self.checkpoint.commit_time_us),
        };

        let is_large = batch.is_part || self.in_parts;
        let mut batch = Arc::new(batch);

        loop {
            let error = match self.apply_once(&batch, checkpoint).await {
                Ok(applied) => {
                    if !batch.is_part {
                        self.checkpoint = checkpoint;
                        self.last_saved = Instant::now();
                    }

                    let batch = Arc::try_unwrap(batch).unwrap_or_else(|shared| (*shared).clone());
                    return Ok(Outcome::Applied(applied, batch));
                }
                Err(EngineError::Target(error)) => error,
                Err(error) => return Err(error),
            };

            // No part of the transaction is left in the target; a new session begins with the
            // first part.
            if error.is_conflict() && is_large {
                return Err(EngineError::Busy);
            }

            let failure = self.failure_of_table(&batch, error).await?;
            self.paused.insert(failure.oid);
            if is_large {
                return Ok(Outcome::RolledBack(failure));
            }

            let mut rest = (*batch).clone();
            rest.tables.retain(|changes| changes.table.oid != failure.oid);
            rest.schema_changes.retain(|change| change.after.oid != failure.oid);
            rest.failed.push(failure);
            batch = Arc::new(rest);
        }
    }

    /// Applies a batch under the DDL lock, and decodes the next batch in the meantime.
    async fn apply_once(
        &mut self,
        batch: &Arc<ChangeBatch>,
        checkpoint: Checkpoint,
    ) -> Result<Applied, EngineError> {
        let (_rows, _shapes);
        if batch.schema_changes.is_empty() {
            _rows = self.ddl_lock.read().await;
        } else {
            _shapes = self.ddl_lock.write().await;
        }

        let work = Arc::clone(batch);
        let began = Instant::now();
        let mut applying =
            std::pin::pin!(self.target.call(move |target| target.apply(&work, &checkpoint)));

        // The next batch is decoded during the call, unless a look at the catalogs waits for a
        // moment at which no transaction is half read.
        let may_read = self.look.is_none() && self.broken.is_none();
        let meanwhile = BatchLimits { linger: Duration::MAX, ..self.limits.clone() };

        let applied = tokio::select! {
            biased;
            applied = &mut applying => applied,
            read = self.consumer.fill(&meanwhile), if may_read => {
                self.broken = read.err();
                applying.await
            }
        };

        self.latency.paused(began.elapsed());
        applied
    }

    /// Returns what is done about the table with which DuckDB cannot go on.
    ///
    /// # Errors
    /// The same error, when it concerns no table of the batch or a table that is paused already.
    async fn failure_of_table(
        &mut self,
        batch: &ChangeBatch,
        error: TargetError,
    ) -> Result<TableFailure, EngineError> {
        let failed = error.table().filter(|oid| !self.paused.contains(oid)).and_then(|oid| {
            let changed = batch.tables.iter().map(|changes| &changes.table);
            changed
                .chain(batch.schema_changes.iter().map(|change| &change.after))
                .find(|table| table.oid == oid)
        });

        let Some(table) = failed else { return Err(error.into()) };
        let reason = format!("{}; {}", error_chain(&error), table.recopy_hint());
        let (oid, table) = (table.oid, table.source.clone());

        // A copy that is under way is restarted. The operator has to look at a table whose copy was
        // complete.
        let is_being_copied = self.is_being_copied(oid);
        let is_excused = is_being_copied || (error.is_diverged() && self.is_explained(oid).await?);
        let remedy = if is_excused { Remedy::CopyAgain } else { error.remedy() };

        let mut failure = TableFailure { oid, table, reason, remedy };
        self.limit_recopies(&mut failure);
        Ok(failure)
    }

    /// Returns whether a table is copied, or its copy waits for the changes that came meanwhile.
    pub(super) fn is_being_copied(&self, oid: u32) -> bool {
        self.copying.contains_key(&oid) || self.catching_up.contains_key(&oid)
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

fn log_cycle(report: &CycleReport, reading: Duration, total: Duration) {
    tracing::debug!(
        source_transactions = report.source_transactions,
        inserted = report.inserted,
        updated = report.updated,
        deleted = report.deleted,
        truncated = report.truncated,
        checkpoint = %report.checkpoint,
        lag_bytes = report.lag_bytes,
        read_ms = reading.as_millis() as u64,
        apply_ms = total.saturating_sub(reading).as_millis() as u64,
        "cycle"
    );
}

/// Logs which tables are paused, and which tables are copied again.
pub(super) fn log_failures(failed: &[TableFailure]) {
    for TableFailure { table, reason, remedy, .. } in failed {
        match remedy {
            Remedy::CopyAgain => {
                tracing::warn!(
                    event = "table_diverged",
                    %table,
                    reason,
                    "a change cannot be applied; copying the table again"
                )
            }
            Remedy::CopyAltered => {
                tracing::info!(event = "table_recopied", %table, reason, "copying the table again")
            }
            Remedy::Operator | Remedy::AllowNulls | Remedy::NextStart => {
                tracing::error!(
                    event = "table_paused",
                    %table,
                    reason,
                    "the table is paused"
                )
            }
        }
    }
}

#[cfg(test)]
mod memory_target;
#[cfg(test)]
mod tests;
