//! Attaches at a later start: compares the tables of the source with those of the copy.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Attached, Recopy, Source, judge_column_lists, patiently, pending, ready, rename, save,
};
use crate::{
    change::Remedy,
    olap::{OlapEngine, Pipeline, StoredTable, TableState},
    pipeline::{
        Context, EngineError, Writer,
        tables::{
            self, PlanOptions,
            selection::{self, table_settings, target_names, types_of, wanted_tables},
        },
    },
    source::{
        catalog::{self, SourceTable},
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
    catalog::begin_snapshot(&source.sql).await?;

    let info = catalog::publication(&source.sql, &context.options.publications).await?;
    let Some(info) = info else {
        return Err(slot::SlotError::PublicationMissing {
            names: context.options.publications.clone(),
        }
        .into());
    };

    slot::judge_publication(&info)?;
    slot::judge_fingerprint(&pipeline.publication_fingerprint, &info.fingerprint)?;
    judge_column_lists(context, &source.sql).await?;

    // A row filter takes a lock on its table, to be printed; no other step here does.
    let what = "reading a row filter waits for a published table that another session has locked";
    let published = patiently(what, wanted_tables(&context.options, &source.sql)).await?;

    let types = types_of(&source.sql, &published).await?;
    catalog::end_snapshot(&source.sql).await?;

    if let Recopy::Tables(names) = again
        && let Some(missing) =
            names.iter().find(|name| !published.iter().any(|table| table.name == **name))
    {
        return Err(EngineError::Setup(format!(
            "no such table: {missing}\ndetail: It is not among the tables that publication {} \
             brings here.\nhint: see `rhei status` for the tables of this copy",
            context.options.publications.join(", ")
        )));
    }

    let mut by_oid: BTreeMap<u32, StoredTable> =
        stored.into_iter().map(|table| (table.oid, table)).collect();
    let (mut changed, mut to_copy, mut abandoned) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());

    let present: BTreeSet<u32> = published.iter().map(|table| table.oid).collect();
    for stored in by_oid.values_mut() {
        let is_gone = !present.contains(&stored.oid);

        if is_gone && stored.state != TableState::Dropped {
            tracing::warn!(
                table = %stored.source,
                "no longer published; its copy is kept as it is"
            );
            if stored.has_shadow {
                abandoned.insert(stored.oid);
            }

            (stored.state, stored.has_shadow) = (TableState::Dropped, false);
            changed.insert(stored.oid);
        }
    }

    let targets = target_names(&context.options, &selection::names_of(&published), &by_oid);
    for table in &published {
        let is_asked = matches!(again, Recopy::Tables(names) if names.contains(&table.name));

        let needs_copy = match by_oid.get(&table.oid) {
            None => true,
            Some(stored) if stored.has_shadow => {
                // A shadow has the name and the columns that it was begun with.
                let is_renamed = stored.source != table.name
                    || targets.get(&table.oid).is_some_and(|name| *name != stored.target);

                let is_other =
                    is_asked || is_renamed || wants_another_copy(context, table, stored, &types);
                if is_other {
                    abandoned.insert(table.oid);
                }

                is_other || (stored.state != TableState::CatchingUp && !is_active(table.oid))
            }
            Some(stored) => match &stored.state {
                TableState::Error(_) | TableState::Live => {
                    is_asked || wants_another_copy(context, table, stored, &types)
                }
                TableState::Pending
                | TableState::Copying
                | TableState::CatchingUp
                | TableState::Resync
                | TableState::Dropped => true,
            },
        };

        if needs_copy {
            to_copy.insert(table.oid);
        }
    }

    for &oid in &abandoned {
        writer.call(move |target| target.abandon_copies(&[(oid, None)])).await?;
        if let Some(stored) =
            by_oid.get_mut(&oid).filter(|stored| stored.state != TableState::Dropped)
        {
            (stored.state, stored.has_shadow) = (TableState::Resync, false);
        }
    }

    pipeline.timeline = source.identity.timeline;
    pipeline.publication_fingerprint = info.fingerprint;

    // Tables that are to be copied again are marked before their copies begin, so that a crash does
    // not forget them.
    for oid in &to_copy {
        if let Some(stored) = by_oid
            .get_mut(oid)
            .filter(|stored| matches!(stored.state, TableState::Live | TableState::Error(_)))
        {
            stored.state = TableState::Resync;
            changed.insert(*oid);
        }
    }

    let mut rows: Vec<StoredTable> =
        changed.iter().filter_map(|oid| by_oid.get(oid).cloned()).collect();
    let is_new = |table: &&SourceTable| !by_oid.contains_key(&table.oid);
    rows.extend(published.iter().filter(is_new).map(|table| pending(table, &targets)));

    save(writer, &pipeline, rows).await?;
    rename(writer, &targets, &published, &mut by_oid).await?;
    ready(context, &source.sql, writer, to_copy).await
}

/// Returns whether the settings ask for another copy than there is: other columns, or other types.
/// A change of shape at the source is no reason: the stream will come to it.
pub(super) fn wants_another_copy(
    context: &Context,
    table: &SourceTable,
    stored: &StoredTable,
    types: &TypeCatalog,
) -> bool {
    let settings = table_settings(&context.options, &table.name);
    let plan_options =
        PlanOptions { settings: &settings, null_unrepresentable: false, before: None };

    let is_paused = matches!(stored.state, TableState::Error(_));
    // A value that may become NULL by now is no reason to stay paused.
    if let TableState::Error(pause) = &stored.state
        && context.options.null_unrepresentable
        && pause.remedy == Remedy::AllowNulls
    {
        return true;
    }

    match tables::plan(table, types, plan_options) {
        // The copy reports what keeps the table from being planned.
        Err(_) => !is_paused,
        Ok(spec) => {
            let is_other = |stored: &crate::olap::StoredColumn| {
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
