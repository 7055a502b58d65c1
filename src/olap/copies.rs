//! Copies of tables: begins them, loads them beside the stream, and merges them with the changes
//! that came meanwhile, or drops them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use arrow::record_batch::RecordBatch;

use super::{
    CopyTarget, DuckDb, NewCopy, NewJob, StoredJob, StoredTable, TableState, TargetError, apply,
    engine::ApplyTarget,
    jobs,
    lake::{self, inlining},
    loader::Loader,
    names, pending,
};
use crate::{
    Lsn,
    change::{Pause, TableSpec},
    failpoint::reached,
};

impl CopyTarget for DuckDb {
    type Loader = Loader;

    fn begin_copies(
        &mut self,
        copies: &[NewCopy],
    ) -> Result<Vec<Result<Vec<u64>, String>>, TargetError> {
        let ids = self.transaction(|target| {
            let oids: Vec<u32> = copies.iter().map(|copy| copy.spec.oid).collect();
            jobs::cancel(&target.connection, &oids, "its snapshot was lost")?;

            let (mut refused, mut begun) = (BTreeMap::new(), Vec::new());
            for copy in copies.iter().filter(|copy| !copy.is_resumed) {
                let spec = &copy.spec;
                if let Err(error @ TargetError::ForeignTable { .. }) =
                    target.refuse_foreign(&spec.target)
                {
                    let state = TableState::Error(Pause::new(error.to_string()));
                    target.tables()?.put(StoredTable::of(spec, state));
                    refused.insert(spec.oid, error.to_string());
                    continue;
                }

                begun.push(copy);
                target.drop_pending(spec.oid)?;
                let stored = target.tables()?;
                let has_old = stored.is_ours(&spec.target);
                let state = if has_old { TableState::Resync } else { TableState::Copying };
                stored.put(StoredTable { has_shadow: true, ..StoredTable::of(spec, state) });
            }

            target.create_shadows(&begun)?;
            let begun: Vec<(u32, &[NewJob])> = copies
                .iter()
                .filter(|copy| !refused.contains_key(&copy.spec.oid))
                .map(|copy| (copy.spec.oid, copy.jobs.as_slice()))
                .collect();

            let mut ids = jobs::add(&target.connection, &begun)?.into_iter();
            let outcome = |copy: &NewCopy| match refused.remove(&copy.spec.oid) {
                Some(reason) => Err(reason),
                None => Ok(ids.by_ref().take(copy.jobs.len()).collect()),
            };

            Ok(copies.iter().map(outcome).collect())
        })?;
        if let Some(lake) = &self.lake {
            let _turn = lake.shared.turn();
            let made = copies.iter().zip(&ids).filter_map(
                |(copy, ids): (&NewCopy, &Result<Vec<u64>, String>)| {
                    ids.is_ok().then_some(copy.spec.as_ref())
                },
            );
            let schemas = made.clone().map(|spec| spec.target.schema.as_str());
            lake::of_schemas(&self.connection, schemas)?;
            inlining::of_shadows(&self.connection, made)?;
        }
        self.refresh()?;
        Ok(ids)
    }

    fn done_chunks(
        &mut self,
        oid: u32,
        copy_lsn: Lsn,
    ) -> Result<Vec<(serde_json::Value, u64)>, TargetError> {
        self.reading(|connection| jobs::done(connection, oid, copy_lsn))
    }

    fn keys_with_unchanged_toast(
        &mut self,
        table: &TableSpec,
        most: usize,
    ) -> Result<Vec<Vec<String>>, TargetError> {
        if !self.tables()?.has_pending(table.oid) {
            return Ok(Vec::new());
        }
        pending::keys_with_unchanged_toast(&self.connection, table, most)
    }

    fn fill_open(
        &mut self,
        table: &TableSpec,
        rows: &[RecordBatch],
        asked: usize,
    ) -> Result<(), TargetError> {
        self.transaction(|target| pending::fill(&target.connection, table, rows, asked as u64))
    }

    fn finish_loads(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError> {
        self.transaction(|target| {
            for table in tables {
                let has_pending = target.tables()?.has_pending(table.oid);
                let closed = if has_pending {
                    pending::resolve_from_shadow(&target.connection, table)
                } else {
                    Ok(())
                };

                closed
                    .and_then(|()| jobs::refuse(&target.connection, "finish.refused", table))
                    .map_err(|error| error.of_copy(table))?;
            }

            let shadows = tables.iter().map(|table| names::table(&names::shadow_of(&table.target)));
            let copied = apply::counts(&target.connection, shadows)?;

            let stored = target.tables()?;
            for (table, copied) in tables.iter().zip(copied) {
                stored.set_state(table.oid, TableState::CatchingUp, Some(copied));
            }
            Ok(())
        })?;
        self.refresh()
    }

    fn merge(
        &mut self,
        tables: &[Arc<TableSpec>],
        most_rows: u64,
    ) -> Result<BTreeSet<u32>, TargetError> {
        self.ensure_attached()?;
        self.roll_back()?;

        if let Some(lake) = &self.lake {
            // A death may have come between the shadow and this.
            let _turn = lake.shared.turn();
            inlining::of_shadows(&self.connection, tables.iter().map(|table| table.as_ref()))?;
        }
        let plan = self.plan_merge(tables)?;
        let whole = self.merge_changes(&plan, most_rows)?;

        let mut merged = plan.unchanged;
        merged.extend(whole);
        if merged.is_empty() {
            return Ok(BTreeSet::new());
        }
        reached("merge.merged");

        self.swap_shadows(&merged)?;
        self.refresh()?;
        Ok(merged.iter().map(|table| table.oid).collect())
    }

    fn abandon_copies(&mut self, copies: &[(u32, Option<Pause>)]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let oids: Vec<u32> = copies.iter().map(|(oid, _)| *oid).collect();
            target.drop_shadows(&oids)?;

            let stored = target.tables()?;
            for (oid, pause) in copies {
                let Some(name) = stored.get(*oid).map(|table| table.target.clone()) else {
                    continue;
                };

                let state = match pause {
                    Some(pause) => TableState::Error(pause.clone()),
                    None if stored.is_ours(&name) => TableState::Resync,
                    None => TableState::Pending,
                };
                stored.set_state(*oid, state, None);
            }
            Ok(())
        })?;
        self.refresh()
    }

    fn jobs(&mut self) -> Result<Vec<StoredJob>, TargetError> {
        self.ensure_attached()?;
        self.reading(jobs::all)
    }

    fn loader(&mut self) -> Result<Loader, TargetError> {
        self.ensure_attached()?;
        let connection = self.new_connection()?;
        let _ = connection.execute_batch("SET TimeZone = 'UTC'");
        let database = Arc::clone(&self.database);
        Ok(Loader::new(connection, database, self.lake.as_ref(), self.alive()))
    }

    fn prune(&mut self) -> Result<u64, TargetError> {
        if self.pipeline.is_none() || self.has_open_parts() {
            return Ok(0);
        }
        self.transaction(|target| jobs::prune(&target.connection))
    }
}

/// The tables whose shadows are loaded, and what is left to merge into them.
struct MergePlan<'a> {
    /// The tables without pending changes.
    unchanged: Vec<&'a Arc<TableSpec>>,
    /// The other tables, and how many pending changes each has.
    due: Vec<(&'a Arc<TableSpec>, u64)>,
}

impl DuckDb {
    fn plan_merge<'a>(
        &mut self,
        tables: &'a [Arc<TableSpec>],
    ) -> Result<MergePlan<'a>, TargetError> {
        let stored = self.tables()?;
        let (changed, mut unchanged): (Vec<_>, Vec<_>) =
            tables.iter().partition(|table| stored.has_pending(table.oid));

        let kept = pending::pending_rows(&self.connection, changed.iter().map(|table| table.oid))?;
        let (due, emptied): (Vec<_>, Vec<_>) =
            changed.into_iter().zip(kept).partition(|(_, kept)| *kept > 0);
        unchanged.extend(emptied.into_iter().map(|(table, _)| table));

        Ok(MergePlan { unchanged, due })
    }

    /// Merges at most `most_rows` pending changes. Returns the tables that have none left.
    fn merge_changes<'a>(
        &mut self,
        plan: &MergePlan<'a>,
        most_rows: u64,
    ) -> Result<Vec<&'a Arc<TableSpec>>, TargetError> {
        self.transaction(|target| {
            for table in &plan.unchanged {
                jobs::refuse(&target.connection, "merge.refused", table)
                    .map_err(|error| error.of_copy(table))?;
            }

            let (mut left, mut done) = (most_rows, Vec::new());
            for &(table, kept) in &plan.due {
                if left == 0 {
                    break;
                }
                let is_merged = pending::merge(&target.connection, table, left)
                    .and_then(|merged| {
                        jobs::refuse(&target.connection, "merge.refused", table).map(|()| merged)
                    })
                    .map_err(|error| error.of_copy(table))?;

                left = left.saturating_sub(kept);
                done.extend(is_merged.then_some(table));
            }

            reached("merge.step");
            Ok(done)
        })
    }

    /// Puts the merged shadows in the places of their tables.
    ///
    /// The swap has a transaction of its own. DuckDB writes rows into its log under the name that
    /// their table has at the end of the transaction, and before the renaming: a log with both
    /// cannot be replayed after a crash. No other change can come between the two transactions:
    /// this process is the only writer, and after a crash the shadow has nothing more to merge.
    fn swap_shadows(&mut self, tables: &[&Arc<TableSpec>]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let mut statements = String::new();
            for table in tables {
                target.refuse_foreign(&table.target)?;
                statements.push_str(&names::swap(&table.target));
            }
            target.connection.execute_batch(&statements)?;

            for table in tables {
                target.drop_pending(table.oid)?;
            }

            let stored = target.tables()?;
            stored.forget_dropped_namesakes(tables.iter().map(|table| (&table.target, table.oid)));
            tables.iter().for_each(|table| stored.set_live(table.oid));

            reached("merge.swapping");
            Ok(())
        })?;

        if let Some(lake) = &mut self.lake {
            lake.upkeep.copied(tables.iter().map(|table| &table.target));
        }
        Ok(())
    }

    /// Makes the empty shadows of copies that begin, and drops the older shadows of these tables.
    fn create_shadows(&self, copies: &[&NewCopy]) -> Result<(), TargetError> {
        let older = names::shadows(&self.connection)?;
        let schemas: BTreeMap<String, String> = copies
            .iter()
            .map(|copy| (copy.spec.target.schema.clone(), names::create_schema(&copy.spec.target)))
            .collect();

        let mut statements: String = schemas.into_values().collect();
        for NewCopy { spec, long_columns, .. } in copies {
            let shadow = names::shadow_of(&spec.target);
            if older.contains(&names::lower(&shadow)) {
                statements.push_str(&names::drop_table(&shadow));
            }
            statements.push_str(&self.shadow_statements(spec, long_columns));
        }
        Ok(self.connection.execute_batch(&statements)?)
    }
}
