//! What the copies beside the stream ask of the task that follows the stream, between two batches:
//! it handles tables whose copies begin, are complete, or cannot be made, and merges the kept
//! changes of the tables step by step.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::ControlFlow,
    sync::Arc,
    time::Duration,
};

use arrow::record_batch::RecordBatch;
use tokio_util::sync::CancellationToken;

use super::{CopyScheduler, RoundUpdate};
use crate::{
    Lsn,
    backfill::{self, CopyEvent, CopyOutcome, TableCopyPlan},
    change::{Pause, TableSpec},
    checkpoint::reachable_target,
    engine::{CycleOptions, NextStep, SyncEngine, left_out::warn_unpublished},
    error::error_chain,
    failpoint::reached,
    olap::{OlapEngine, StoredTable, TableState, TargetError},
    pgoutput::QualifiedName,
    pipeline::{CycleReport, EngineError, Event, error_policy::policy},
    source::{CdcConsumer, connection::SqlClient},
};

/// The planned tables that a round copies from now on, and those for which the round came too late,
/// so that they wait for another one.
#[derive(Debug, Default)]
struct Admitted {
    adopted: BTreeSet<u32>,
    too_late: BTreeSet<u32>,
}

/// Whether a round copies a planned table.
enum Admission {
    Adopted,
    TooLate,
    /// Every chunk is in the shadow of the table already.
    NotNeeded,
}

/// The result of fetching the values that kept changes leave open.
enum Filled {
    All,
    /// Another session holds a lock on the table.
    Locked,
    /// The values cannot be fetched: the copy has to be restarted.
    No,
}

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Returns how far the checkpoint has to come for all copies to be merged.
    pub fn copies_reach(&self) -> Lsn {
        let tables = self.copying.values().chain(self.catching_up.values());
        tables.map(|spec| reachable_target(spec.copy_lsn)).max().unwrap_or(Lsn::ZERO)
    }

    /// Returns whether a table is being copied, or waits to be merged.
    pub fn is_copying(&self) -> bool {
        !self.copying.is_empty() || !self.catching_up.is_empty()
    }

    /// Returns whether a table is copied, and only waits for the checkpoint to reach its snapshot.
    pub fn is_reaching(&self) -> bool {
        self.catching_up.values().any(|spec| reachable_target(spec.copy_lsn) > self.checkpoint.lsn)
    }

    /// Acts upon an event of a round of copies; between two batches only. Returns a reason to
    /// attach again. The cycles that the event required are added to `cycles`.
    ///
    /// # Errors
    /// Any error of the source or the target. The next session begins the round again.
    pub async fn handle_copy_event(
        &mut self,
        news: RoundUpdate,
        copies: &mut CopyScheduler<T>,
        stop: &CancellationToken,
        cycles: &mut Vec<CycleReport>,
    ) -> Result<Option<String>, EngineError> {
        match news {
            RoundUpdate::Event(CopyEvent::Planned {
                lsn,
                since,
                tables,
                refused,
                holder,
                adopted,
            }) => {
                let reach = self.reach_snapshot(lsn, &tables, stop, cycles).await?;
                if let ControlFlow::Break(reattach) = reach {
                    return Ok(reattach);
                }

                if let Some(reason) = self.renamed_since_attach(&tables).await? {
                    return Ok(Some(reason));
                }

                reached("copy.planned");
                let ids = self.start_capturing(since, &tables, refused, &holder, copies).await?;
                reached("copy.adopted");
                // The receiver is gone only when the round broke off, which the round reports
                // itself.
                let _ = adopted.send(ids);
            }
            // `CopyScheduler::next` keeps these tables for a later round.
            RoundUpdate::Event(CopyEvent::Locked(_) | CopyEvent::Postponed(_)) => {}
            RoundUpdate::Event(CopyEvent::Ended(copied)) => {
                self.copies_ended(copied, copies).await?
            }
            RoundUpdate::Ended { unfinished } => {
                copies.want(unfinished.into_iter().filter(|oid| self.copying.contains_key(oid)))
            }
        }

        Ok(None)
    }

    /// Follows the stream up to the snapshot of a round that resumes copies: before a copy goes on,
    /// the rows of its table have to be known as the snapshot sees them. Breaks off when the
    /// operator stops the session, or with a reason to attach again.
    async fn reach_snapshot(
        &mut self,
        lsn: Lsn,
        tables: &[TableCopyPlan],
        stop: &CancellationToken,
        cycles: &mut Vec<CycleReport>,
    ) -> Result<ControlFlow<Option<String>>, EngineError> {
        while tables.iter().any(|table| table.is_resumed)
            && self.checkpoint.lsn < reachable_target(lsn)
        {
            let linger = Duration::from_millis(20);
            let until = Some(reachable_target(lsn));
            let options = CycleOptions { linger, until, request_keepalives: true, save_idle: true };
            let cycle = self.sync_once(options, stop).await?;

            cycles.push(cycle.report);
            match cycle.next {
                NextStep::Stop => return Ok(ControlFlow::Break(None)),
                NextStep::Reattach(reason) => return Ok(ControlFlow::Break(Some(reason))),
                NextStep::Wait | NextStep::Continue | NextStep::EndOfStream => {}
            }
        }

        Ok(ControlFlow::Continue(()))
    }

    /// Acts upon the outcomes of the copies of tables.
    async fn copies_ended(
        &mut self,
        copied: Vec<(u32, CopyOutcome)>,
        copies: &mut CopyScheduler<T>,
    ) -> Result<(), EngineError> {
        let mut loaded = Vec::new();

        for (oid, copied) in copied {
            copies.done(oid, &copied);

            let Some(spec) = self.copying.remove(&oid) else { continue };
            match copied {
                CopyOutcome::Done => loaded.push(spec),
                CopyOutcome::Failed(pause) => self.give_up_copy(&spec, Some(pause)).await?,
                CopyOutcome::Changed => {
                    self.restart_copy(&spec, copies, "it changed while it was copied").await?
                }
            }
        }

        self.loaded(loaded, copies).await
    }

    /// Moves tables whose chunks are all in their shadows to `catching_up`.
    async fn loaded(
        &mut self,
        tables: Vec<Arc<TableSpec>>,
        copies: &mut CopyScheduler<T>,
    ) -> Result<(), EngineError> {
        if tables.is_empty() {
            return Ok(());
        }

        reached("copy.loaded");
        let all = tables.clone();

        match self.target.call(move |target| target.finish_loads(&all)).await {
            Ok(()) => {
                reached("copy.finished");
                self.catching_up.extend(tables.into_iter().map(|spec| (spec.oid, spec)));
            }
            // The tables go one by one, to find the table that the error concerns.
            Err(EngineError::Target(error)) if tables.len() > 1 && !error.wants_reopening() => {
                for table in tables {
                    Box::pin(self.loaded(vec![table], copies)).await?;
                }
            }
            Err(error) => self.failed(tables.first(), error, copies).await?,
        }

        Ok(())
    }

    /// Handles the copy of one table that failed at its end: the copy is restarted, or the table is
    /// paused.
    ///
    /// # Errors
    /// The error is not about the table.
    async fn failed(
        &mut self,
        spec: Option<&Arc<TableSpec>>,
        error: EngineError,
        copies: &mut CopyScheduler<T>,
    ) -> Result<(), EngineError> {
        match (error, spec) {
            (EngineError::Target(error @ TargetError::Diverged { .. }), Some(spec)) => {
                self.restart_copy(spec, copies, &error.to_string()).await
            }
            (EngineError::Target(error @ TargetError::ForeignTable { .. }), Some(spec)) => {
                self.give_up_copy(spec, Some(Pause::new(error.to_string()))).await
            }
            (EngineError::Target(error), Some(spec)) if error.is_of_table() => {
                self.refused(spec, &error).await
            }
            (error, _) => Err(error),
        }
    }

    /// Returns a reason to attach again when a planned table has another name than at the begin of
    /// the session. Names of tables are changed when a session attaches, all at once, since two
    /// tables may swap their names. A copy that began under the new name would leave the table of
    /// the old name behind without an owner.
    async fn renamed_since_attach(
        &mut self,
        tables: &[TableCopyPlan],
    ) -> Result<Option<String>, EngineError> {
        let Some(state) = self.target.call(|target| target.state()).await? else { return Ok(None) };

        let stored = state
            .tables
            .iter()
            .filter(|stored| !matches!(stored.state, TableState::Pending | TableState::Dropped));
        let names: BTreeMap<u32, &QualifiedName> =
            stored.map(|stored| (stored.oid, &stored.target)).collect();

        // A copy must not take a name either that another table still has in the target and no
        // longer at the source.
        let lower = |name: &QualifiedName| (name.schema.to_lowercase(), name.name.to_lowercase());
        let owners: HashMap<(String, String), u32> =
            names.iter().map(|(oid, name)| (lower(name), *oid)).collect();

        let is_of_another = |oid: u32, target: &QualifiedName| {
            owners.get(&lower(target)).is_some_and(|owner| *owner != oid)
        };

        let is_renamed = |table: &&TableCopyPlan| {
            let (oid, target) = (table.spec.oid, &table.spec.target);
            names.get(&oid).is_some_and(|name| *name != target) || is_of_another(oid, target)
        };

        Ok(tables.iter().find(is_renamed).map(|table| {
            format!("table {} has another name than when the session began", table.spec.source)
        }))
    }

    /// Begins to keep changes of tables whose snapshot holds all that committed before `since`.
    /// Returns the ids of the jobs of each table.
    async fn start_capturing(
        &mut self,
        since: Lsn,
        tables: &[TableCopyPlan],
        refused: Vec<StoredTable>,
        holder: &SqlClient,
        copies: &mut CopyScheduler<T>,
    ) -> Result<Vec<Option<Vec<u64>>>, EngineError> {
        let Admitted { mut adopted, too_late } = self.admit_tables(since, tables, holder).await?;
        self.forget_unplanned(copies.asked(), tables, &refused).await?;

        let begun: Vec<_> =
            tables.iter().filter(|table| adopted.contains(&table.spec.oid)).collect();
        let new: Vec<_> = begun.iter().map(|table| table.new_copy()).collect();

        self.note_refused(&refused);
        let ids = self
            .target
            .call(move |target| {
                target.put_tables(&refused)?;
                target.begin_copies(&new)
            })
            .await?;

        for (table, begun) in begun.iter().zip(&ids).filter(|(table, _)| !table.is_resumed) {
            match begun {
                Ok(_) => self.capture_changes(&table.spec),
                Err(reason) => {
                    adopted.remove(&table.spec.oid);
                    self.copy_not_begun(&table.spec, reason);
                }
            }
        }

        copies.planned(&adopted, &too_late);

        let mut ids: BTreeMap<u32, Vec<u64>> = begun
            .iter()
            .zip(ids)
            .filter_map(|(table, ids)| Some((table.spec.oid, ids.ok()?)))
            .collect();

        Ok(tables.iter().map(|table| ids.remove(&table.spec.oid)).collect())
    }

    /// Decides which of the planned tables the round copies.
    async fn admit_tables(
        &mut self,
        since: Lsn,
        tables: &[TableCopyPlan],
        holder: &SqlClient,
    ) -> Result<Admitted, EngineError> {
        let mut admitted = Admitted::default();

        for table in tables {
            let oid = table.spec.oid;
            match self.admission(since, table, holder).await? {
                Admission::Adopted => {
                    admitted.adopted.insert(oid);
                }
                Admission::TooLate => {
                    admitted.too_late.insert(oid);
                }
                Admission::NotNeeded => {}
            }
        }

        Ok(admitted)
    }

    async fn admission(
        &mut self,
        since: Lsn,
        table: &TableCopyPlan,
        holder: &SqlClient,
    ) -> Result<Admission, EngineError> {
        let oid = table.spec.oid;
        if self.consumer.may_have_missed(oid, since) {
            return Ok(Admission::TooLate);
        }

        if !table.is_resumed {
            return Ok(Admission::Adopted);
        }

        // A table that was truncated in the meantime would be catching up.
        if self.copying.contains_key(&oid) {
            return Ok(match self.fill_open(table, holder).await? {
                Filled::All => Admission::Adopted,
                // The next round resumes the copy.
                Filled::Locked => Admission::TooLate,
                Filled::No => {
                    self.give_up_copy(&table.spec, None).await?;
                    Admission::TooLate
                }
            });
        }

        if self.catching_up.contains_key(&oid) {
            return Ok(Admission::NotNeeded);
        }

        // The shadow of the table went while the round waited.
        Ok(Admission::TooLate)
    }

    /// Forgets the tables that were asked for and that the round did not plan: such a table is gone
    /// from the source or its publication, and no task is copying it. A table that the stream still
    /// follows is left to the next look at the catalogs, which finds it gone.
    async fn forget_unplanned(
        &mut self,
        asked: BTreeSet<u32>,
        tables: &[TableCopyPlan],
        refused: &[StoredTable],
    ) -> Result<(), EngineError> {
        let is_planned = |oid: u32| {
            tables.iter().any(|table| table.spec.oid == oid)
                || refused.iter().any(|row| row.oid == oid)
        };
        let not_planned: BTreeSet<u32> =
            asked.into_iter().filter(|oid| !is_planned(*oid)).collect();
        if not_planned.is_empty() {
            return Ok(());
        }

        let mut gone = BTreeSet::new();
        for oid in not_planned {
            if let Some(catalogs) = &mut self.catalogs
                && catalogs.not_published(oid)
            {
                gone.insert(oid);
            }

            if self.copying.remove(&oid).is_some() {
                self.consumer.untrack(oid);
                self.target.call(move |target| target.abandon_copies(&[(oid, None)])).await?;
            }
        }

        self.mark_dropped(&gone).await
    }

    /// Marks these tables as dropped: no round will copy them. A table that is published again is
    /// new to the next look at the catalogs.
    async fn mark_dropped(&mut self, gone: &BTreeSet<u32>) -> Result<(), EngineError> {
        let Some(state) = self.target.call(|target| target.state()).await? else { return Ok(()) };

        let is_gone = |stored: &StoredTable| {
            gone.contains(&stored.oid) && stored.state != TableState::Dropped
        };
        let mut rows: Vec<StoredTable> = state.tables.into_iter().filter(is_gone).collect();
        for row in &mut rows {
            (row.state, row.has_shadow) = (TableState::Dropped, false);
            warn_unpublished(&row.source);
        }

        if !rows.is_empty() {
            self.target.call(move |target| target.put_tables(&rows)).await?;
        }
        Ok(())
    }

    /// Stops following the tables that cannot be copied as they are set up.
    fn note_refused(&mut self, refused: &[StoredTable]) {
        for row in refused {
            self.unfollow(row.oid);
            if let TableState::Error(pause) = &row.state {
                self.not_copied.push((row.source.to_string(), pause.reason.clone()));
            }
        }
    }

    /// Follows a table whose copy has begun in the target, and keeps its changes from now on.
    fn capture_changes(&mut self, spec: &Arc<TableSpec>) {
        self.paused.remove(&spec.oid);
        self.consumer.track(Arc::clone(spec));
        if let Some(catalogs) = &mut self.catalogs {
            catalogs.adopted(spec);
        }

        self.catching_up.remove(&spec.oid);
        self.copying.insert(spec.oid, Arc::clone(spec));
    }

    /// Stops following a table whose copy the target did not begin.
    fn copy_not_begun(&mut self, spec: &TableSpec, reason: &str) {
        self.unfollow(spec.oid);
        let event = Event::CopyFailed { table: spec.source.to_string(), reason: reason.to_owned() };
        let _ = self.events.send(event);
        self.not_copied.push((spec.source.to_string(), reason.to_owned()));
    }

    /// Fetches the values that kept changes leave open, some rows at a time. The stream waits in
    /// the meantime.
    async fn fill_open(
        &self,
        table: &TableCopyPlan,
        holder: &SqlClient,
    ) -> Result<Filled, EngineError> {
        // Copying the table again is quicker when it has more open keys than this.
        const MAX_KEYS: usize = 100_000;
        const MIN_AT_ONCE: usize = 16;
        const MAX_AT_ONCE: usize = 1000;

        let (mut filled, mut at_once) = (0, MIN_AT_ONCE);
        loop {
            let spec = Arc::clone(&table.spec);
            let keys = self
                .target
                .call(move |target| target.keys_with_unchanged_toast(&spec, at_once))
                .await?;
            if keys.is_empty() {
                return Ok(Filled::All);
            }

            filled += keys.len();
            if !backfill::is_fetchable(&table.spec) || filled > MAX_KEYS {
                return Ok(Filled::No);
            }

            let rows =
                match backfill::fetch_rows(holder, &table.spec, table.source.kind == b'p', &keys)
                    .await
                {
                    Err(EngineError::Source(error)) if error.is_locked() => {
                        return Ok(Filled::Locked);
                    }
                    // The table has changed since, as the copy would find out.
                    Err(error @ EngineError::Source(_)) if !policy(&error).is_waited_for() => {
                        return Ok(Filled::No);
                    }
                    rows => rows?,
                };

            // The next fetch takes as many rows as there is memory for, judged by the size of these
            // rows.
            let bytes: usize = rows.iter().map(RecordBatch::get_array_memory_size).sum();
            at_once =
                (keys.len() * self.limits.max_bytes / bytes.max(1)).clamp(MIN_AT_ONCE, MAX_AT_ONCE);

            let spec = Arc::clone(&table.spec);
            match self.target.call(move |target| target.fill_open(&spec, &rows, keys.len())).await {
                Ok(()) => {}
                Err(EngineError::Target(TargetError::Diverged { .. })) => return Ok(Filled::No),
                Err(error) => return Err(error),
            }
        }
    }

    async fn restart_copy(
        &mut self,
        spec: &TableSpec,
        copies: &mut CopyScheduler<T>,
        why: &str,
    ) -> Result<(), EngineError> {
        tracing::info!(
            event = "copy_restarted",
            table = %spec.source,
            reason = why,
            "restarting the copy of the table"
        );
        if copies.restart_copy(spec.oid) {
            return self.give_up_copy(spec, None).await;
        }

        let reason = format!(
            "its copy had to be restarted too often, the last time because {why}; {}",
            spec.recopy_hint()
        );

        let _ = self
            .events
            .send(Event::CopyFailed { table: spec.source.to_string(), reason: reason.clone() });

        self.give_up_copy(spec, Some(Pause::new(reason))).await
    }

    /// Pauses a table whose rows DuckDB does not take; the other tables go on.
    async fn refused(&mut self, spec: &TableSpec, error: &TargetError) -> Result<(), EngineError> {
        let reason = format!("{}; {}", error_chain(error), spec.recopy_hint());

        let _ = self
            .events
            .send(Event::CopyFailed { table: spec.source.to_string(), reason: reason.clone() });

        self.give_up_copy(spec, Some(Pause { reason, remedy: error.remedy() })).await
    }

    async fn give_up_copy(
        &mut self,
        spec: &TableSpec,
        pause: Option<Pause>,
    ) -> Result<(), EngineError> {
        let oid = spec.oid;
        self.not_copied
            .extend(pause.as_ref().map(|pause| (spec.source.to_string(), pause.reason.clone())));

        self.unfollow(oid);
        self.target.call(move |target| target.abandon_copies(&[(oid, pause)])).await
    }

    fn unfollow(&mut self, oid: u32) {
        self.copying.remove(&oid);
        self.catching_up.remove(&oid);
        self.consumer.untrack(oid);
        if let Some(catalogs) = &mut self.catalogs {
            catalogs.forget(oid);
        }
    }

    /// Merges some of the changes that were kept while tables were copied. Returns `false` when
    /// there is nothing to merge for now.
    pub async fn merge_step(&mut self, copies: &mut CopyScheduler<T>) -> Result<bool, EngineError> {
        const MAX_TABLES: usize = 200;
        let checkpoint = self.checkpoint.lsn;
        let is_due = |spec: &&Arc<TableSpec>| reachable_target(spec.copy_lsn) <= checkpoint;

        let due: Vec<Arc<TableSpec>> =
            self.catching_up.values().filter(is_due).take(MAX_TABLES).cloned().collect();

        if due.is_empty() {
            return Ok(false);
        }

        self.merge(due, copies).await?;
        Ok(true)
    }

    async fn merge(
        &mut self,
        tables: Vec<Arc<TableSpec>>,
        copies: &mut CopyScheduler<T>,
    ) -> Result<(), EngineError> {
        const MAX_ROWS: u64 = 200_000;

        let merged = {
            let _shape = self.ddl_lock.write().await;
            let tables = tables.clone();
            self.target.call(move |target| target.merge(&tables, MAX_ROWS)).await
        };

        match merged {
            Ok(live) => {
                if !live.is_empty() {
                    reached("merge.live");
                }

                for spec in tables.iter().filter(|spec| live.contains(&spec.oid)) {
                    self.catching_up.remove(&spec.oid);
                    copies.live(spec.oid);
                    let _ = self.events.send(Event::WentLive { table: spec.source.to_string() });
                }

                if !live.is_empty() && !self.is_copying() && copies.has_all() {
                    let _ = self.events.send(Event::AllLive);
                }
            }
            // The tables go one by one, to find the table that the error concerns.
            Err(EngineError::Target(error)) if tables.len() > 1 && !error.wants_reopening() => {
                for table in tables {
                    Box::pin(self.merge(vec![table], copies)).await?;
                }
            }
            Err(error) => self.failed(tables.first(), error, copies).await?,
        }

        Ok(())
    }
}
