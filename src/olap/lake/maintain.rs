//! What the writer does for the upkeep of its lake.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use super::{
    layout::is_nested,
    tables_with_lost_files,
    upkeep::{ChangedRows, Step, StepOutcome},
};
use crate::{
    change::{ChangeBatch, Deletes},
    olap::{
        Compacted, DuckDb, TableState, TargetError, apply,
        engine::FileMaintenance,
        jobs,
        names::{self, shadow_of},
        stage, state,
    },
    pgoutput::QualifiedName,
};

impl DuckDb {
    /// Shows that the writer lives, if it was silent for long, or else does one step of the upkeep.
    /// Returns whether there is more to do.
    pub(in crate::olap) fn look_after_lake(&mut self) -> Result<bool, TargetError> {
        if self.send_heartbeat_if_due()? {
            return Ok(false);
        }
        let is_used = self.is_used();
        let Some(lake) = &mut self.lake else { return Ok(false) };

        lake.upkeep.find_backlog(&self.connection, &lake.options)?;
        let state = self.connection.state_schema().to_owned();
        let Some(step) = lake.upkeep.next(&state, &lake.options, Instant::now()) else {
            return Ok(false);
        };
        // A table that was dropped or renamed, or is copied for the first time, is not there.
        let is_gone = match step.table() {
            Some(table) => !self.live_tables()?.contains(table),
            None => false,
        };
        let Some(lake) = &mut self.lake else { return Ok(false) };
        if is_used && step.needs_quiet() || is_gone {
            return Ok(true);
        }
        let _turn = lake.shared.turn();

        let since = Instant::now();
        let outcome =
            step.run(&self.connection, &lake.options).inspect_err(|_| lake.shared.doubt_files())?;
        lake.upkeep.done(&step, outcome);
        tracing::debug!(
            event = "lake_upkeep",
            step = ?step,
            seconds = since.elapsed().as_secs_f64(),
            "looked after the lake"
        );
        Ok(true)
    }

    /// Replaces the writer's row in the lake if that is older than a heartbeat; returns whether it
    /// was.
    fn send_heartbeat_if_due(&mut self) -> Result<bool, TargetError> {
        let is_silent = self.lake.as_ref().is_some_and(|lake| lake.fence.is_silent());
        if is_silent {
            // The commit replaces the row that names this process.
            self.transaction(|_| Ok(()))?;
        }
        Ok(is_silent)
    }

    /// Has tables copied again whose files a failed commit has lost, if that is in doubt.
    ///
    /// # Errors
    /// There are such tables, and the session has to begin again to copy them.
    pub(in crate::olap) fn settle_files(&mut self) -> Result<(), TargetError> {
        let Some(lake) = &self.lake else { return Ok(()) };
        let shared = Arc::clone(&lake.shared);
        if !shared.takes_doubt() {
            return Ok(());
        }

        self.end_commits_of_loaders()
            .and_then(|()| self.copy_again_what_lacks_files())
            .inspect_err(|_| shared.doubt_files())
            .and_then(|is_lost| {
                let Some(lake) = self.lake.as_mut().filter(|_| is_lost) else { return Ok(()) };
                lake.has_moved = true;
                Err(TargetError::Moved)
            })
    }

    /// Has commits of loads fail whose answers were lost and that are still on their way to the
    /// lake: what is read of the jobs after this stays as it is.
    fn end_commits_of_loaders(&mut self) -> Result<(), TargetError> {
        if !state::exists(&self.connection)? {
            return Ok(());
        }
        self.transaction(|target| match &target.lake {
            Some(lake) => jobs::put_writer(&target.connection, &lake.shared.writer),
            None => Ok(()),
        })
    }

    /// Marks the tables that lack files as to be copied again. Returns whether there are any.
    fn copy_again_what_lacks_files(&mut self) -> Result<bool, TargetError> {
        let Some(lake) = &self.lake else { return Ok(false) };
        let lost = tables_with_lost_files(&self.connection, &lake.options)?;
        if lost.is_empty() {
            return Ok(false);
        }

        let is_lost =
            |name: &QualifiedName| lost.contains(&(name.schema.clone(), name.name.clone()));
        let mut marked = Vec::new();
        for table in self.tables()?.list() {
            // A copy that is under way is lost with the changes that it keeps.
            let pending = QualifiedName::new(
                self.connection.state_schema(),
                format!("pending_{}", table.oid),
            );
            let is_copy_lost =
                table.has_shadow && (is_lost(&shadow_of(&table.target)) || is_lost(&pending));
            // A table that waits for its copy lacks files until it has one.
            let is_waiting = matches!(table.state, TableState::Resync | TableState::Pending);
            if is_copy_lost || is_lost(&table.target) && !is_waiting {
                marked.push((table.oid, is_copy_lost));
                tracing::warn!(
                    event = "lake_files_lost",
                    table = %table.source,
                    "copying the table again: the answer to a commit was lost, and DuckLake has \
                     deleted the files that the commit names"
                );
            }
        }

        if marked.is_empty() {
            return Ok(false);
        }
        self.transaction(|target| {
            for &(oid, is_copy_lost) in &marked {
                if is_copy_lost {
                    target.drop_shadows(&[oid])?;
                }
                let Some(name) = target.tables()?.get(oid).map(|table| table.target.clone()) else {
                    continue;
                };
                let is_ours = target.tables()?.is_ours(&name);
                let state = if is_ours { TableState::Resync } else { TableState::Pending };
                target.tables()?.set_state(oid, state, None);
            }
            Ok(())
        })?;
        Ok(true)
    }

    /// Returns the names of the tables that are live.
    fn live_tables(&mut self) -> Result<Vec<QualifiedName>, TargetError> {
        let tables = self.tables()?.list().into_iter();
        let live = tables.filter(|table| table.state == TableState::Live);
        Ok(live.map(|table| table.target).collect())
    }

    /// Notes what a batch has changed.
    pub(in crate::olap) fn note_for_upkeep(&mut self, batch: &ChangeBatch) {
        let Some(lake) = &mut self.lake else { return };
        lake.upkeep.note(batch.tables.iter().map(|changes| {
            let (Deletes::ByKey(batches) | Deletes::Rows(batches)) = &changes.deletes;
            let patched = changes.patch.as_ref().map_or(0, |patch| patch.rows.num_rows() as u64);
            let inserted = stage::total(&changes.inserts) + patched;
            let is_never_inlined = changes.table.columns.iter().any(is_nested);
            let rows = ChangedRows { inserted, deleted: stage::total(batches), is_never_inlined };
            (&changes.table.target, rows)
        }));
    }

    /// Does every step of the upkeep at once.
    pub(in crate::olap) fn compact_lake(&mut self) -> Result<Compacted, TargetError> {
        let refused = |reason: &str| TargetError::NotCompacted {
            reason: format!("{reason}\nhint: try again in a while"),
        };
        if self.has_open_parts() {
            return Err(refused("a large transaction is being applied"));
        }
        if !self.copying.is_empty() || self.is_used() {
            return Err(refused("tables are being copied, or the copy is being read"));
        }

        let since = Instant::now();
        let before = self.space()?;
        let live = self.live_tables()?;
        let counted = live.clone();

        let state = self.connection.state_schema().to_owned();
        let mut steps = match &mut self.lake {
            Some(lake) => VecDeque::from(lake.upkeep.all_steps(&state, live)),
            None => VecDeque::new(),
        };
        while let (Some(step), Some(lake)) = (steps.pop_front(), &self.lake) {
            let turn = lake.shared.turn();
            let outcome = step
                .run(&self.connection, &lake.options)
                .inspect_err(|_| lake.shared.doubt_files())?;
            drop(turn);

            if let StepOutcome::Left(rest) = outcome {
                steps.push_front(rest);
            }
            self.send_heartbeat_if_due()?;
        }
        if let Some(lake) = &mut self.lake {
            lake.forget_space();
        }

        let rows = apply::counts(&self.connection, counted.iter().map(names::table))?;
        Ok(Compacted {
            before,
            after: self.space()?,
            rows: rows.iter().sum(),
            tables: counted.len() as u64,
            seconds: since.elapsed().as_secs_f64(),
        })
    }
}

impl Step {
    /// Returns the table of the copy that the step is for.
    fn table(&self) -> Option<&QualifiedName> {
        match self {
            Self::Flush(table) | Self::Rewrite(table, _) | Self::Merge(table) => Some(table),
            Self::Prune(_) | Self::Expire | Self::DeleteOldFiles | Self::DeleteOrphans => None,
        }
    }

    /// Returns whether a reader of this process, or a load, must not be open meanwhile.
    fn needs_quiet(&self) -> bool {
        matches!(self, Self::Expire | Self::DeleteOldFiles | Self::DeleteOrphans)
    }
}
