//! Attaches at a later start: compares the tables of the source with those of the copy.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Attached, Recopy, Source, check_column_lists, load_attached, pending, rename, save,
    warn_when_stalled,
};
use crate::{
    change::Remedy,
    engine::left_out::warn_unpublished,
    olap::{OlapEngine, Pipeline, StoredColumn, StoredTable, TableState},
    pgoutput::QualifiedName,
    pipeline::{
        Context, EngineError, Options, Writer,
        tables::{
            self, PlanOptions,
            selection::{self, table_settings, target_names, types_of, wanted_tables},
        },
    },
    source::{
        catalog::{self, SourceTable},
        connection::SqlClient,
        slot,
    },
    types::TypeCatalog,
};

/// Starts a running pipeline: compares the tables of the source with those of the copy.
pub(super) async fn resume<T: OlapEngine + 'static>(
    context: &Context,
    source: Source,
    writer: &Writer<T>,
    mut pipeline: Pipeline,
    stored: Vec<StoredTable>,
    again: &Recopy,
    is_active: impl Fn(u32) -> bool,
) -> Result<Attached, EngineError> {
    let known = &pipeline.publication_fingerprint;
    let Published { fingerprint, tables, types } =
        read_published(context, &source.sql, known).await?;
    judge_asked(&context.options, again, &tables)?;

    let stored: BTreeMap<u32, StoredTable> =
        stored.into_iter().map(|table| (table.oid, table)).collect();
    let targets = target_names(&context.options, &selection::names_of(&tables), &stored);

    let options: &Options = &context.options;
    let wanted = Wanted { options, again, tables: &tables, types: &types, targets: &targets };
    let reconciled = Reconciled::of(&wanted, &stored, is_active);

    pipeline.timeline = source.identity.timeline;
    pipeline.publication_fingerprint = fingerprint;

    reconciled.write(writer, &pipeline, &wanted, stored).await?;
    load_attached(context, &source.sql, writer, reconciled.to_copy).await
}

/// The tables of the publications that the settings choose, read from one state of the catalogs.
struct Published {
    /// The fingerprint of the publications.
    fingerprint: String,
    tables: Vec<SourceTable>,
    types: TypeCatalog,
}

/// Reads the published tables, and refuses publications with which this copy cannot go on. `known`
/// is the fingerprint of the publications at the last start.
async fn read_published(
    context: &Context,
    sql: &SqlClient,
    known: &str,
) -> Result<Published, EngineError> {
    catalog::begin_snapshot(sql).await?;

    let info = catalog::publication(sql, &context.options.publications).await?;
    let Some(info) = info else {
        return Err(slot::SlotError::PublicationMissing {
            names: context.options.publications.clone(),
        }
        .into());
    };

    slot::check_publication(&info)?;
    slot::check_fingerprint(known, &info.fingerprint)?;
    check_column_lists(context, sql).await?;

    // A row filter takes a lock on its table, to be printed; no other step here does.
    let what = "reading a row filter waits for a published table that another session has locked";
    let tables = warn_when_stalled(what, wanted_tables(&context.options, sql)).await?;

    let types = types_of(sql, &tables).await?;
    catalog::end_snapshot(sql).await?;

    Ok(Published { fingerprint: info.fingerprint, tables, types })
}

/// Refuses to copy a table again that is not among the published tables.
fn judge_asked(
    options: &Options,
    again: &Recopy,
    published: &[SourceTable],
) -> Result<(), EngineError> {
    if let Recopy::Tables(names) = again
        && let Some(missing) =
            names.iter().find(|name| !published.iter().any(|table| table.name == **name))
    {
        return Err(EngineError::Setup(format!(
            "no such table: {missing}\ndetail: It is not among the tables that publication {} \
             brings here.\nhint: see `rhei status` for the tables of this copy",
            options.publications.join(", ")
        )));
    }

    Ok(())
}

/// The tables that are published and wanted, with what this start wants of them.
struct Wanted<'a> {
    options: &'a Options,
    again: &'a Recopy,
    tables: &'a [SourceTable],
    types: &'a TypeCatalog,
    /// The name that each table is to have in the target.
    targets: &'a BTreeMap<u32, QualifiedName>,
}

/// What a start does about the copy of a published table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NextCopy {
    /// The copy is good, or it is being made.
    Keep,
    /// The table needs a copy; chunks that are in its shadow stay.
    Copy,
    /// The table needs a copy, and its shadow is given up.
    StartOver,
}

impl Wanted<'_> {
    /// Decides about the copy of one table. `is_active` says whether a task is making its copy.
    fn next_copy(
        &self,
        table: &SourceTable,
        stored: Option<&StoredTable>,
        is_active: bool,
    ) -> NextCopy {
        let Some(stored) = stored else { return NextCopy::Copy };

        let is_asked = matches!(self.again, Recopy::Tables(names) if names.contains(&table.name));
        // A lake moves no table to another schema.
        let target = self.targets.get(&table.oid);
        let is_moved = self.options.target.lake.is_some()
            && target.is_some_and(|name| name.schema != stored.target.schema);
        let is_other =
            is_asked || is_moved || wants_another_copy(self.options, table, stored, self.types);

        if stored.has_shadow {
            // A shadow has the name and the columns that it was begun with.
            let is_renamed =
                stored.source != table.name || target.is_some_and(|name| *name != stored.target);

            let is_left_alone = stored.state != TableState::CatchingUp && !is_active;
            return match (is_other || is_renamed, is_left_alone) {
                (true, _) => NextCopy::StartOver,
                (false, true) => NextCopy::Copy,
                (false, false) => NextCopy::Keep,
            };
        }

        match &stored.state {
            TableState::Error(_) | TableState::Live if !is_other => NextCopy::Keep,
            TableState::Error(_)
            | TableState::Live
            | TableState::Pending
            | TableState::Copying
            | TableState::CatchingUp
            | TableState::Resync
            | TableState::Dropped => NextCopy::Copy,
        }
    }
}

/// The differences between the tables of the source and those of the copy, by oid.
#[derive(Debug, Default, PartialEq, Eq)]
struct Reconciled {
    /// Tables of the copy that are no longer published.
    gone: BTreeSet<u32>,
    /// Tables whose shadows are given up.
    abandoned: BTreeSet<u32>,
    /// Tables that need a copy which no task is making.
    to_copy: BTreeSet<u32>,
    /// Tables that the copy does not know.
    new: BTreeSet<u32>,
}

impl Reconciled {
    /// Compares the two. `is_active` returns whether a task is making the copy of a table.
    fn of(
        wanted: &Wanted<'_>,
        stored: &BTreeMap<u32, StoredTable>,
        is_active: impl Fn(u32) -> bool,
    ) -> Self {
        let mut found = Self::default();

        let present: BTreeSet<u32> = wanted.tables.iter().map(|table| table.oid).collect();
        for stored in stored.values().filter(|stored| !present.contains(&stored.oid)) {
            if stored.state == TableState::Dropped {
                continue;
            }

            found.gone.insert(stored.oid);
            if stored.has_shadow {
                found.abandoned.insert(stored.oid);
            }
        }

        for table in wanted.tables {
            let (oid, stored) = (table.oid, stored.get(&table.oid));
            if stored.is_none() {
                found.new.insert(oid);
            }

            match wanted.next_copy(table, stored, is_active(oid)) {
                NextCopy::Keep => {}
                NextCopy::Copy => {
                    found.to_copy.insert(oid);
                }
                NextCopy::StartOver => {
                    found.abandoned.insert(oid);
                    found.to_copy.insert(oid);
                }
            }
        }

        found
    }

    /// Records what was found in the target, and gives the tables their names.
    async fn write<T: OlapEngine + 'static>(
        &self,
        writer: &Writer<T>,
        pipeline: &Pipeline,
        wanted: &Wanted<'_>,
        mut stored: BTreeMap<u32, StoredTable>,
    ) -> Result<(), EngineError> {
        for table in self.gone.iter().filter_map(|oid| stored.get(oid)) {
            warn_unpublished(&table.source);
        }

        for &oid in &self.abandoned {
            writer.call(move |target| target.abandon_copies(&[(oid, None)])).await?;
        }

        let mut rows = self.mark(&mut stored);
        let new = wanted.tables.iter().filter(|table| self.new.contains(&table.oid));
        rows.extend(new.map(|table| pending(table, wanted.targets)));

        save(writer, pipeline, rows).await?;
        rename(writer, wanted.targets, wanted.tables, &mut stored).await
    }

    /// Gives the tables their states, and returns the rows that are not in the target yet.
    fn mark(&self, stored: &mut BTreeMap<u32, StoredTable>) -> Vec<StoredTable> {
        let mut changed = Vec::new();

        for (oid, table) in stored {
            if self.gone.contains(oid) {
                (table.state, table.has_shadow) = (TableState::Dropped, false);
                changed.push(table.clone());
            } else if self.abandoned.contains(oid) {
                // The target has marked the table when it dropped the shadow.
                if table.state != TableState::Dropped {
                    (table.state, table.has_shadow) = (TableState::Resync, false);
                }
            } else if self.to_copy.contains(oid)
                && matches!(table.state, TableState::Live | TableState::Error(_))
            {
                // Tables that are to be copied again are marked before their copies begin, so that
                // a crash does not forget them.
                table.state = TableState::Resync;
                changed.push(table.clone());
            }
        }

        changed
    }
}

/// Returns whether the settings ask for another copy than there is: other columns, or other types.
/// A change of shape at the source is no reason: the stream will come to it.
fn wants_another_copy(
    options: &Options,
    table: &SourceTable,
    stored: &StoredTable,
    types: &TypeCatalog,
) -> bool {
    let settings = table_settings(options, &table.name);
    let plan_options =
        PlanOptions { settings: &settings, null_unrepresentable: false, before: None };

    let is_paused = matches!(stored.state, TableState::Error(_));
    if let TableState::Error(pause) = &stored.state {
        // A value that may become NULL by now is no reason to stay paused, nor is a right that may
        // have been granted.
        let is_over = match pause.remedy {
            Remedy::AllowNulls => options.null_unrepresentable,
            Remedy::NextStart => true,
            Remedy::Operator | Remedy::CopyAgain | Remedy::CopyAltered => false,
        };
        if is_over {
            return true;
        }
    }

    match tables::plan(table, types, plan_options) {
        // The copy reports what keeps the table from being planned.
        Err(_) => !is_paused,
        Ok(spec) => {
            let is_other = |stored: &StoredColumn| {
                spec.columns.iter().any(|column| {
                    (column.attnum, column.type_oid, column.typmod)
                        == (stored.attnum, stored.type_oid, stored.typmod)
                        && column.mapping != stored.mapping
                })
            };

            stored.columns.is_empty()
                || spec.excluded != stored.excluded
                || stored.columns.iter().any(is_other)
        }
    }
}

#[cfg(test)]
mod tests;
