//! The state that the target stores: what the engine reads and replaces of it.

use std::sync::Arc;

use super::{
    DuckDb, Pipeline, StoredState, StoredTable, StoredVerification, TargetError, TargetState,
    lake::inlining, names, state, verifications,
};
use crate::{change::TableSpec, pgoutput::QualifiedName};

impl TargetState for DuckDb {
    fn state(&mut self) -> Result<Option<StoredState>, TargetError> {
        self.read_stored().map_err(|error| self.of_lake(error))
    }

    fn put_state(
        &mut self,
        pipeline: &Pipeline,
        tables: &[StoredTable],
    ) -> Result<(), TargetError> {
        self.put_stored(pipeline, tables)
    }

    fn put_tables(&mut self, tables: &[StoredTable]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let is_ended =
                |table: &&StoredTable| target.copying.contains_key(&table.oid) && !table.has_shadow;
            let ended: Vec<u32> = tables.iter().filter(is_ended).map(|table| table.oid).collect();

            target.drop_shadows(&ended)?;
            let stored = target.tables()?;
            tables.iter().for_each(|table| stored.put(table.clone()));
            Ok(())
        })?;
        self.refresh()
    }

    fn put_shapes(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let stored = target.tables()?;
            tables.iter().for_each(|table| stored.put_shape(table));
            Ok(())
        })?;
        self.refresh()
    }

    fn rename(&mut self, moves: &[(QualifiedName, StoredTable)]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let (mut moving, mut ours) = (Vec::new(), Vec::new());
            for (from, table) in moves {
                let stored = target.tables()?;
                // The kept copy of a table that was dropped at the source stays under the name that
                // both tables had.
                let is_ours = stored.is_ours(from) && !stored.is_kept_by_another(from, table.oid);
                if is_ours && target.lake.is_some() && from.schema != table.target.schema {
                    // A lake moves no table, and makes no other one that is like it: the table is
                    // copied again.
                    target.connection.execute_batch(&names::drop_table(from))?;
                    ours.push(false);
                    continue;
                }
                ours.push(is_ours);
                if is_ours
                    && *from != table.target
                    && state::table_exists(&target.connection, from)?
                {
                    moving.push((from, table));
                }
            }

            // All tables get a temporary name first, so that two tables can swap their names.
            for (from, table) in &moving {
                target.connection.execute_batch(&names::rename_to_temp(from, table.oid))?;
            }
            for (from, table) in &moving {
                // A copy that is only kept gives way to the table that takes its name.
                if target.tables()?.forget_dropped_namesakes([(&table.target, table.oid)]) {
                    target.connection.execute_batch(&names::drop_table(&table.target))?;
                }

                target.refuse_foreign(&table.target)?;
                target.connection.execute_batch(&names::rename_from_temp(
                    from,
                    table.oid,
                    &table.target,
                ))?;
            }

            let stored = target.tables()?;
            for ((_, table), is_ours) in moves.iter().zip(ours) {
                stored.put(table.clone());
                if is_ours {
                    stored.set_managed(table.oid);
                }
            }
            Ok(())
        })?;
        self.refresh()
    }

    fn put_verifications(&mut self, results: &[StoredVerification]) -> Result<(), TargetError> {
        if self.lake.is_some() && !self.has_open_parts() {
            return self.transaction(|target| verifications::put(&target.connection, results));
        }
        self.ensure_attached()?;
        // The writer may have a transaction open for parts of a source transaction.
        let connection = self.new_connection()?;
        connection.execute_batch("BEGIN TRANSACTION")?;
        verifications::put(&connection, results)?;
        connection.commit()
    }

    fn verifications(&mut self) -> Result<Vec<StoredVerification>, TargetError> {
        self.ensure_attached()?;
        self.reading(verifications::last)
    }

    fn last_parts(&mut self, parts: u32) -> Result<Vec<(QualifiedName, u32)>, TargetError> {
        self.ensure_attached()?;
        self.reading(|connection| verifications::last_parts(connection, parts))
    }
}

impl DuckDb {
    /// The body of [`TargetState::state`].
    fn read_stored(&mut self) -> Result<Option<StoredState>, TargetError> {
        self.ensure_attached()?;
        if self.has_open_parts() {
            return self.reading(state::read);
        }
        if self.tables.is_none() || self.pipeline.is_none() {
            self.pipeline = state::read_pipeline(&self.connection)?;
        }

        self.refresh()?;
        let Some(pipeline) = self.pipeline.clone() else { return Ok(None) };
        Ok(Some(StoredState { pipeline, tables: self.tables()?.list() }))
    }

    /// The body of [`TargetState::put_state`].
    fn put_stored(
        &mut self,
        pipeline: &Pipeline,
        tables: &[StoredTable],
    ) -> Result<(), TargetError> {
        if self.lake.is_some() && !state::exists(&self.connection)? {
            inlining::before_state(&self.connection)?;
        }
        self.transaction(|target| {
            state::create(&target.connection)?;
            let fence = target.lake.as_mut().map(|lake| &mut lake.fence);
            state::put_pipeline(&target.connection, pipeline, fence)?;

            let stored = target.tables()?;
            tables.iter().for_each(|table| stored.put(table.clone()));
            target.pipeline = Some(pipeline.clone());
            Ok(())
        })?;
        if self.lake.is_some() {
            inlining::of_state(&self.connection)?;
        }
        self.refresh()
    }
}
