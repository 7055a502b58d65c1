//! Attaches at a first start: makes a new slot, and everything has to be copied.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{Attached, Recopy, SLOT_BUSY, Source, load_attached, pending, publication, save};
use crate::{
    Checkpoint, Lsn,
    backfill::{SlotWithSnapshot, create_slot},
    failpoint::reached,
    olap::{OlapEngine, Phase, Pipeline, StoredState, StoredTable, TableState},
    pipeline::{
        Context, EngineError, Writer,
        tables::selection::{self, no_matching_tables, target_names, wanted_tables},
    },
    source::{
        catalog::{self, SourceTable},
        slot,
        wire::SlotKind,
    },
};

/// Makes a new slot, so that everything has to be copied.
pub(super) async fn create<T: OlapEngine + 'static>(
    context: &Context,
    mut source: Source,
    writer: &Writer<T>,
    before: Option<StoredState>,
    again: &Recopy,
) -> Result<Attached, EngineError> {
    slot::check_failover(context.options.failover_slot, &source.server)?;
    let keep = if context.options.failover_slot { SlotKind::Failover } else { SlotKind::Permanent };

    let info = publication(context, &source.sql).await?;
    let tables = wanted_tables(&context.options, &source.sql).await?;

    if tables.is_empty() {
        return Err(no_matching_tables(&context.options));
    }

    drop_earlier_slot(context, &mut source, before.as_ref().map(|state| &state.pipeline)).await?;

    if again.is_of_all() && before.is_some() {
        tracing::warn!(
            event = "starting_over",
            "starting over: every table is copied again; the old copies stay readable until then"
        );
    }

    let mut pipeline = intended_pipeline(context, &source, info.fingerprint);
    let old_tables = retire_tables(writer, before).await?;
    let known: BTreeSet<u32> = old_tables.iter().map(|table| table.oid).collect();

    save(writer, &pipeline, old_tables).await?;
    reached("slot.intended");

    let created =
        create_slot(context, &source.sql, &mut source.replication, &context.options.slot, keep)
            .await?;
    reached("slot.created");

    pipeline.phase = Phase::Running;
    pipeline.checkpoint.lsn = created.consistent_point;

    save(writer, &pipeline, new_rows(context, &tables, &known)).await?;
    reached("slot.recorded");

    // `replication` sends nothing more until the copy has imported the snapshot (trap 11).
    let first = SlotWithSnapshot { replication: source.replication, created };
    let to_copy = tables.into_iter().map(|table| table.oid).collect();

    let attached = load_attached(context, &source.sql, writer, to_copy).await?;
    Ok(Attached { snapshot_slot: Some(first), ..attached })
}

/// Drops the slot that an earlier start of this pipeline made. `before` is the pipeline of the
/// file.
async fn drop_earlier_slot(
    context: &Context,
    source: &mut Source,
    before: Option<&Pipeline>,
) -> Result<(), EngineError> {
    let is_ours = is_ours(before, &context.options.slot, &source.identity.system_id);

    let waiting_since = tokio::time::Instant::now();
    while let Some(found) = catalog::slot(&source.sql, &context.options.slot).await? {
        if !is_ours {
            return Err(slot::SlotError::NotOurs { slot: context.options.slot.clone() }.into());
        }

        if found.active {
            // The loop gives up after the same time as in `verify`.
            if waiting_since.elapsed() >= SLOT_BUSY {
                return Err(slot::SlotError::Active {
                    slot: context.options.slot.clone(),
                    pid: found.active_pid,
                }
                .into());
            }

            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        }

        tracing::info!(
            event = "stale_slot_dropped",
            slot = context.options.slot,
            "dropping the slot of an earlier start"
        );
        source.replication.drop_slot(&context.options.slot).await?;
    }

    Ok(())
}

/// Returns whether the pipeline of the file may have made this slot. A slot of that name in another
/// cluster belongs to another user.
pub(super) fn is_ours(before: Option<&Pipeline>, slot: &str, system_id: &str) -> bool {
    before.is_some_and(|pipeline| {
        pipeline.slot == slot
            && pipeline.system_id == system_id
            && pipeline.phase != Phase::PlainCopy
    })
}

/// Returns the pipeline whose slot is about to be made.
fn intended_pipeline(
    context: &Context,
    source: &Source,
    publication_fingerprint: String,
) -> Pipeline {
    Pipeline {
        slot: context.options.slot.clone(),
        publications: context.options.publications.clone(),
        publication_fingerprint,
        system_id: source.identity.system_id.clone(),
        database: source.server.database.clone(),
        database_oid: source.server.database_oid,
        timeline: source.identity.timeline,
        phase: Phase::Creating,
        checkpoint: Checkpoint { lsn: Lsn::ZERO, commit_time_us: None },
    }
}

/// Marks the tables that the file held as dropped, until they are planned and copied again, and
/// gives up their shadows.
async fn retire_tables<T: OlapEngine + 'static>(
    writer: &Writer<T>,
    before: Option<StoredState>,
) -> Result<Vec<StoredTable>, EngineError> {
    let mut tables = before.map(|state| state.tables).unwrap_or_default();

    for table in &mut tables {
        if std::mem::take(&mut table.has_shadow) {
            let oid = table.oid;
            writer.call(move |target| target.abandon_copies(&[(oid, None)])).await?;
        }

        table.state = TableState::Dropped;
    }

    Ok(tables)
}

/// Returns the rows of the tables that the file did not hold.
fn new_rows(context: &Context, tables: &[SourceTable], known: &BTreeSet<u32>) -> Vec<StoredTable> {
    let targets = target_names(&context.options, &selection::names_of(tables), &BTreeMap::new());

    tables
        .iter()
        .filter(|table| !known.contains(&table.oid))
        .map(|table| pending(table, &targets))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{super::tests::pipeline, *};
    use crate::{engine::schema::samples::orders, pgoutput::QualifiedName, pipeline::Options};

    #[test]
    fn only_the_slot_that_this_file_has_asked_for_may_be_dropped() {
        let of = |phase| Pipeline { phase, ..pipeline() };

        for (name, before, slot, system_id, expected) in [
            ("a new file", None, "rhei", "71", false),
            ("an intent that a crash left", Some(of(Phase::Creating)), "rhei", "71", true),
            ("a live copy", Some(of(Phase::Running)), "rhei", "71", true),
            ("another slot", Some(of(Phase::Running)), "other", "71", false),
            ("another cluster", Some(of(Phase::Running)), "rhei", "72", false),
            ("a plain copy", Some(of(Phase::PlainCopy)), "rhei", "71", false),
        ] {
            assert_eq!(is_ours(before.as_ref(), slot, system_id), expected, "{name}");
        }
    }

    #[test]
    fn rows_are_made_for_tables_that_the_file_does_not_hold() {
        let options = Options::sample();
        let context = Context::new(options, tokio::sync::mpsc::unbounded_channel().0);

        let table = |oid: u32| SourceTable {
            oid,
            name: QualifiedName::new("public", format!("t{oid}")),
            ..orders()
        };
        let rows = new_rows(&context, &[table(1), table(2), table(3)], &BTreeSet::from([2]));

        let found: Vec<_> = rows.iter().map(|row| (row.oid, row.state.clone())).collect();
        assert_eq!(found, [(1, TableState::Pending), (3, TableState::Pending)]);
    }
}
