//! Plans what is copied under a snapshot, in which chunks, and what an earlier try has left to do.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use super::{
    Planned,
    event::ChunkPayload,
    long_columns,
    ranges::{Pages, ranges},
    snapshot::{Snapshot, release_locks, watch_locks},
};
use crate::{
    change::{ColumnSpec, Key, Pause, TableSpec},
    olap::{OlapEngine, StoredTable, TableState},
    pgoutput::QualifiedName,
    pipeline::{
        Context, EngineError, Event, Writer,
        tables::{
            self, PlanOptions,
            selection::{
                is_wanted, no_matching_tables, pending_row, table_settings, target_names, types_of,
            },
        },
    },
    source::{
        catalog::{self, Membership, SourceTable},
        connection::SqlClient,
    },
};

/// How long a copy waits for a lock before it turns to other tables.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Measurements of tables, taken before their snapshot while the stream is not held.
#[derive(Default)]
pub(super) struct Measured {
    /// Pages of each table that holds rows.
    pages: HashMap<u32, u64>,
    /// By table: the numbers of columns with long values.
    long_columns: HashMap<u32, Vec<i16>>,
    /// Tables that another session has locked, or with a partition that another session has locked.
    pub locked: BTreeMap<u32, QualifiedName>,
    /// How publications bring each table, and the tables that hold its rows.
    pub published: HashMap<u32, (Membership, Vec<u32>)>,
}

/// Measures the tables that are to be copied. Waits for no lock longer than [`LOCK_PATIENCE`].
pub(super) async fn measure(
    context: &Context,
    control: &SqlClient,
    wanted: Option<&BTreeSet<u32>>,
    is_plain: bool,
) -> Result<Measured, EngineError> {
    control.batch_execute(&format!("SET lock_timeout = '{}ms'", LOCK_PATIENCE.as_millis())).await?;

    let mut tables = tables_to_copy(context, control, wanted, is_plain).await?;
    let published = tables.iter().map(|table| {
        let leaves = table.leaves.iter().map(|leaf| leaf.oid).collect();
        (table.oid, (table.fingerprint.membership(), leaves))
    });
    let mut measured = Measured { published: published.collect(), ..Measured::default() };

    loop {
        let leaves: Vec<u32> =
            tables.iter().flat_map(|table| table.leaves.iter().map(|leaf| leaf.oid)).collect();

        match catalog::measure(control, &leaves).await {
            Ok(pages) => measured.pages = pages,
            Err(error) if error.is_locked() => {
                let locked = catalog::locked_among(control, &leaves).await?;
                let is_locked = |table: &SourceTable| {
                    table.leaves.iter().any(|leaf| locked.contains(&leaf.oid))
                };

                for table in tables.extract_if(.., |table| is_locked(table)) {
                    measured.locked.insert(table.oid, table.name);
                }
                continue;
            }
            Err(error) => return Err(error.into()),
        }

        break;
    }

    measured.long_columns = long_columns::find_long_columns(control, &tables).await?;
    Ok(measured)
}

/// Reads the tables that are to be copied, as the catalogs have them now, or at the snapshot of the
/// session.
async fn tables_to_copy(
    context: &Context,
    client: &SqlClient,
    wanted: Option<&BTreeSet<u32>>,
    is_plain: bool,
) -> Result<Vec<SourceTable>, EngineError> {
    let mut tables = match wanted {
        _ if is_plain => catalog::all_tables(client).await?,
        None => catalog::published_tables(client, &context.options.publications).await?,
        Some(wanted) => {
            let wanted: Vec<u32> = wanted.iter().copied().collect();
            catalog::published_among(client, &context.options.publications, &wanted).await?
        }
    };

    tables.retain(|table| is_wanted(&context.options, &table.name));
    if tables.is_empty() && wanted.is_none() {
        return Err(no_matching_tables(&context.options));
    }

    Ok(tables)
}

/// Plans what is to be copied, as it is in the snapshot. Also returns the rows of tables that
/// cannot be copied.
pub(super) async fn plan<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    snapshot: &Snapshot,
    wanted: Option<&BTreeSet<u32>>,
    is_plain: bool,
    measured: &Measured,
) -> Result<(Vec<Planned>, Vec<StoredTable>), EngineError> {
    let holder = snapshot.holder();
    watch_locks(&holder).await?;

    let mut chosen = tables_to_copy(context, &holder, wanted, is_plain).await?;
    chosen.retain(|table| !measured.locked.contains_key(&table.oid));
    chosen.iter_mut().for_each(|table| table.measured(&measured.pages));

    // The name of a table depends on the names of all other tables.
    let named = if is_plain {
        chosen.iter().map(|table| (table.oid, table.name.clone())).collect()
    } else {
        let mut named = catalog::published_names(&holder, &context.options.publications).await?;
        named.retain(|(_, name)| is_wanted(&context.options, name));
        named
    };

    let types = types_of(&holder, &chosen).await?;
    release_locks(&holder).await?;

    let stored =
        writer.call(|target| target.state()).await?.map(|state| state.tables).unwrap_or_default();
    let stored: BTreeMap<u32, StoredTable> =
        stored.into_iter().map(|table| (table.oid, table)).collect();
    let targets = target_names(&context.options, &named, &stored);

    let (mut planned, mut refused) = (Vec::new(), Vec::new());
    // A TRUNCATE may have ended a copy since it was asked for.
    let is_whole =
        |stored: &StoredTable| stored.has_shadow && stored.state == TableState::CatchingUp;
    chosen.retain(|table| is_plain || !stored.get(&table.oid).is_some_and(is_whole));

    chosen.sort_by_key(|table| {
        let priority = table_settings(&context.options, &table.name).copy_priority;
        (std::cmp::Reverse(priority), table.pages())
    });

    for (at, table) in chosen.into_iter().enumerate() {
        let settings = table_settings(&context.options, &table.name);
        let null_unrepresentable = context.options.null_unrepresentable;

        let stored = stored.get(&table.oid);
        let before = stored.map(|stored| tables::from_stored(stored, null_unrepresentable));
        let plan_options =
            PlanOptions { settings: &settings, null_unrepresentable, before: before.as_ref() };

        let target = targets.get(&table.oid).cloned().unwrap_or_else(|| table.name.clone());
        let spec = match tables::plan(&table, &types, plan_options) {
            Ok(spec) => TableSpec {
                copy_lsn: snapshot.lsn,
                copy_xids: snapshot.xids.clone(),
                target,
                ..spec
            },
            Err(error) => {
                let reason = error.to_string();
                let event =
                    Event::CopyFailed { table: table.name.to_string(), reason: reason.clone() };
                let _ = context.events.send(event);
                let state = TableState::Error(Pause::new(reason));
                refused.push(StoredTable { state, ..pending_row(&table, target) });
                continue;
            }
        };

        let priority = i32::try_from(at).unwrap_or(i32::MAX);
        let earlier = match (stored, before) {
            (Some(stored), Some(before)) if !is_plain && is_resumable(stored, &before, &spec) => {
                Some(before)
            }
            _ => None,
        };

        let (mut spec, mut done, mut done_rows) = (spec, BTreeMap::new(), 0);
        let is_resumed = earlier.is_some();

        if let Some(earlier) = earlier {
            let (oid, copy_lsn) = (earlier.oid, earlier.copy_lsn);
            let jobs = writer.call(move |target| target.done_chunks(oid, copy_lsn)).await?;

            for (payload, rows) in jobs {
                let corrupt = |error: serde_json::Error| {
                    EngineError::Setup(format!("a job makes no sense: {error}"))
                };

                let chunk: ChunkPayload = serde_json::from_value(payload).map_err(corrupt)?;
                let pages = Pages { first: chunk.pages.0, next: chunk.pages.1 };
                done.entry(chunk.leaf).or_insert_with(Vec::new).push(pages);
                done_rows += rows;
            }

            tracing::info!(
                table = %earlier.source,
                rows = done_rows,
                "the table's copy goes on where it was"
            );
            spec = earlier;
        }

        let ranges = ranges(&table, &spec, &done, context);
        let spec = Arc::new(spec);
        let snapshot = snapshot.lsn;

        let is_long = |column: &&ColumnSpec| {
            let numbers = measured.long_columns.get(&table.oid);
            long_columns::may_be_long(column)
                && numbers.is_some_and(|numbers| numbers.contains(&column.attnum))
        };
        let long_columns =
            spec.columns.iter().filter(is_long).map(|column| column.target_name.clone()).collect();

        planned.push(Planned {
            spec,
            source: table,
            is_resumed,
            ranges,
            priority,
            long_columns,
            done_rows,
            snapshot,
        });
    }

    Ok((planned, refused))
}

/// Returns whether chunks of an earlier snapshot are still good: rows are told apart by a key, and
/// the table, its files and its shape are the same.
fn is_resumable(stored: &StoredTable, before: &TableSpec, now: &TableSpec) -> bool {
    let is_under_way =
        stored.has_shadow && matches!(stored.state, TableState::Copying | TableState::Resync);

    let columns = before.columns.len() == now.columns.len()
        && before.columns.iter().zip(&now.columns).all(|(before, now)| {
            (
                before.attnum,
                &before.name,
                before.type_oid,
                before.typmod,
                &before.mapping,
                &before.target_name,
            ) == (now.attnum, &now.name, now.type_oid, now.typmod, &now.mapping, &now.target_name)
        });

    is_under_way
        && columns
        && matches!(before.key, Key::Columns(_))
        && before.key == now.key
        && before.replica_identity == now.replica_identity
        && before.target == now.target
        && before.source == now.source
        && before.excluded == now.excluded
        && before.fingerprint == now.fingerprint
}

/// Returns whether a table is what it was when the snapshot was taken. A snapshot does not protect
/// from DDL: COPY reads the table's newest shape, finds the table empty after TRUNCATE or a
/// rewrite, and finds another table under a name that was reused.
pub(super) fn is_same(then: &SourceTable, now: &SourceTable) -> bool {
    let columns = |table: &SourceTable| -> Vec<_> {
        let of = |column: &catalog::SourceColumn| {
            (
                column.attnum,
                column.name.clone(),
                column.type_oid,
                column.typmod,
                column.is_generated,
            )
        };
        table.columns.iter().map(of).collect()
    };

    let (was, is) = (&then.fingerprint, &now.fingerprint);
    // Names and labels that were changed and changed back are the same, but rows that were read in
    // the meantime are not: so versions of catalog rows are compared.
    then.name == now.name
        && columns(then) == columns(now)
        && was.attributes == is.attributes
        && was.leaf_attributes == is.leaf_attributes
        && was.publications == is.publications
        && was.listed == is.listed
        && was.schema == is.schema
        && was.files == is.files
        && was.inherits == is.inherits
        && was.composites == is.composites
        && was.labels.iter().all(|(oid, label)| is.labels.get(oid).is_none_or(|now| now == label))
}
