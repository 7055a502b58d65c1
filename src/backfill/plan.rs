//! Plans what is copied under a snapshot, in which chunks, and what an earlier try has left to do.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use super::{
    TableCopyPlan,
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
        Context, EngineError, Event, Options, Writer,
        tables::{
            self, PlanOptions,
            plan::TablePlanError,
            selection::{
                is_wanted, names_of, no_matching_tables, pending_row, retain_wanted,
                table_settings, target_names, types_of,
            },
        },
    },
    source::{
        catalog::{self, Membership, SourceTable},
        connection::SqlClient,
    },
    types::TypeCatalog,
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

impl Measured {
    /// Returns whether other sessions have locked every table that is wanted.
    pub(super) fn locks_all(&self, wanted: Option<&BTreeSet<u32>>) -> bool {
        wanted.is_some_and(|wanted| wanted.iter().all(|oid| self.locked.contains_key(oid)))
    }

    /// Returns the names in DuckDB of the columns of a table with long values.
    fn long_columns_of(&self, spec: &TableSpec) -> BTreeSet<String> {
        let numbers = self.long_columns.get(&spec.oid);
        let is_long = |column: &&ColumnSpec| {
            long_columns::may_be_long(column)
                && numbers.is_some_and(|numbers| numbers.contains(&column.attnum))
        };
        spec.columns.iter().filter(is_long).map(|column| column.target_name.clone()).collect()
    }
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

    retain_wanted(&context.options, &mut tables);
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
) -> Result<(Vec<TableCopyPlan>, Vec<StoredTable>), EngineError> {
    let holder = snapshot.holder();
    watch_locks(&holder).await?;

    let mut chosen = tables_to_copy(context, &holder, wanted, is_plain).await?;
    chosen.retain(|table| !measured.locked.contains_key(&table.oid));
    chosen.iter_mut().for_each(|table| table.measured(&measured.pages));

    // The name of a table depends on the names of all other tables.
    let named =
        if is_plain { names_of(&chosen) } else { all_wanted_names(context, &holder).await? };
    let types = types_of(&holder, &chosen).await?;
    release_locks(&holder).await?;

    let stored =
        writer.call(|target| target.state()).await?.map(|state| state.tables).unwrap_or_default();
    let stored: BTreeMap<u32, StoredTable> =
        stored.into_iter().map(|table| (table.oid, table)).collect();
    let targets = target_names(&context.options, &named, &stored);

    let planner = Planner { context, writer, snapshot, measured, is_plain, types, stored, targets };
    chosen.retain(|table| !planner.is_loaded(table));
    put_in_order(&context.options, &mut chosen);

    let (mut planned, mut refused) = (Vec::new(), Vec::new());
    for (at, table) in chosen.into_iter().enumerate() {
        let before = planner.before(&table);
        match planner.spec(&table, before.as_ref()) {
            Ok(spec) => {
                warn_of_other_names(&spec);
                let earlier = planner.earlier_try(before, &spec).await?;
                let priority = i32::try_from(at).unwrap_or(i32::MAX);
                planned.push(planner.planned(table, spec, earlier, priority));
            }
            Err(error) => refused.push(planner.refused(&table, &error)),
        }
    }

    Ok((planned, refused))
}

/// Returns the names of all tables that publications and settings choose.
async fn all_wanted_names(
    context: &Context,
    holder: &SqlClient,
) -> Result<Vec<(u32, QualifiedName)>, EngineError> {
    let mut named = catalog::published_names(holder, &context.options.publications).await?;
    named.retain(|(_, name)| is_wanted(&context.options, name));
    Ok(named)
}

/// Plans one table after the other.
struct Planner<'a, T> {
    context: &'a Context,
    writer: &'a Writer<T>,
    snapshot: &'a Snapshot,
    measured: &'a Measured,
    is_plain: bool,
    types: TypeCatalog,
    /// The tables as the target has them.
    stored: BTreeMap<u32, StoredTable>,
    /// The name of each table in the target.
    targets: BTreeMap<u32, QualifiedName>,
}

/// An earlier try at the copy of a table, whose chunks are still good.
struct EarlierTry {
    /// The shape of that try.
    spec: TableSpec,
    done: DoneChunks,
}

impl<T: OlapEngine + 'static> Planner<'_, T> {
    /// Returns whether a copy of the table waits only for the stream. A TRUNCATE may have ended the
    /// copy since it was asked for.
    fn is_loaded(&self, table: &SourceTable) -> bool {
        let is_whole =
            |stored: &StoredTable| stored.has_shadow && stored.state == TableState::CatchingUp;
        !self.is_plain && self.stored.get(&table.oid).is_some_and(is_whole)
    }

    /// Returns the table as it was planned when it was copied last.
    fn before(&self, table: &SourceTable) -> Option<TableSpec> {
        let stored = self.stored.get(&table.oid)?;
        Some(tables::from_stored(stored, self.context.options.null_unrepresentable))
    }

    fn target(&self, table: &SourceTable) -> QualifiedName {
        self.targets.get(&table.oid).cloned().unwrap_or_else(|| table.name.clone())
    }

    fn spec(
        &self,
        table: &SourceTable,
        before: Option<&TableSpec>,
    ) -> Result<TableSpec, TablePlanError> {
        let options = &self.context.options;
        let settings = table_settings(options, &table.name);
        let null_unrepresentable = options.null_unrepresentable;
        let plan_options = PlanOptions { settings: &settings, null_unrepresentable, before };

        let spec = tables::plan(table, &self.types, plan_options)?;
        if before.is_none_or(|before| before.columns.is_empty()) {
            tables::refuse_unknown_layout(&spec, &settings)?;
        }
        Ok(TableSpec {
            copy_lsn: self.snapshot.lsn,
            copy_xids: self.snapshot.xids.clone(),
            target: self.target(table),
            ..spec
        })
    }

    /// Reports that a table cannot be copied, and returns its row.
    fn refused(&self, table: &SourceTable, error: &TablePlanError) -> StoredTable {
        let reason = error.to_string();
        let event = Event::CopyFailed { table: table.name.to_string(), reason: reason.clone() };
        let _ = self.context.events.send(event);

        let state = TableState::Error(Pause::new(reason));
        StoredTable { state, ..pending_row(table, self.target(table)) }
    }

    /// Returns the copy that was begun `before`, if it can go on.
    async fn earlier_try(
        &self,
        before: Option<TableSpec>,
        now: &TableSpec,
    ) -> Result<Option<EarlierTry>, EngineError> {
        let (Some(stored), Some(spec)) = (self.stored.get(&now.oid), before) else {
            return Ok(None);
        };
        if self.is_plain || !is_resumable(stored, &spec, now) {
            return Ok(None);
        }

        let (oid, copy_lsn) = (spec.oid, spec.copy_lsn);
        let jobs = self.writer.call(move |target| target.done_chunks(oid, copy_lsn)).await?;
        let done = DoneChunks::of_jobs(jobs)?;

        tracing::info!(
            event = "copy_resumed",
            table = %spec.source,
            rows = done.rows,
            "the table's copy goes on where it was"
        );
        Ok(Some(EarlierTry { spec, done }))
    }

    /// Plans the chunks that are left of a table.
    fn planned(
        &self,
        source: SourceTable,
        spec: TableSpec,
        earlier: Option<EarlierTry>,
        priority: i32,
    ) -> TableCopyPlan {
        let is_resumed = earlier.is_some();
        let EarlierTry { spec, done } =
            earlier.unwrap_or_else(|| EarlierTry { spec, done: DoneChunks::default() });

        TableCopyPlan {
            ranges: ranges(&source, &spec, &done.pages, self.context),
            long_columns: self.measured.long_columns_of(&spec),
            spec: Arc::new(spec),
            source,
            is_resumed,
            priority,
            done_rows: done.rows,
            snapshot: self.snapshot.lsn,
        }
    }
}

/// Says which names of a table differ from those at the source.
fn warn_of_other_names(spec: &TableSpec) {
    let columns = spec.columns.iter().filter(|column| column.target_name != column.name);
    let mut changed: Vec<String> = columns
        .map(|column| format!("column \"{}\" is \"{}\"", column.name, column.target_name))
        .collect();
    if spec.target != spec.source {
        changed.insert(0, format!("the table is {}", spec.target));
    }

    if !changed.is_empty() {
        tracing::warn!(
            event = "names_differ",
            table = %spec.source,
            names = changed.join(", "),
            "names of the table are others in DuckDB"
        );
    }
}

/// Puts tables with a higher priority first, and small tables before large ones.
fn put_in_order(options: &Options, tables: &mut [SourceTable]) {
    tables.sort_by_key(|table| {
        let priority = table_settings(options, &table.name).copy_priority;
        (std::cmp::Reverse(priority), table.pages())
    });
}

/// The chunks that are in the shadow of a table.
#[derive(Default)]
struct DoneChunks {
    /// By table or leaf partition.
    pages: BTreeMap<u32, Vec<Pages>>,
    rows: u64,
}

impl DoneChunks {
    /// Reads the payloads of jobs, which come with their numbers of rows.
    fn of_jobs(jobs: Vec<(serde_json::Value, u64)>) -> Result<Self, EngineError> {
        let mut done = Self::default();

        for (payload, rows) in jobs {
            let corrupt = |error: serde_json::Error| {
                EngineError::Setup(format!("a job makes no sense: {error}"))
            };

            let chunk: ChunkPayload = serde_json::from_value(payload).map_err(corrupt)?;
            let pages = Pages { first: chunk.pages.0, next: chunk.pages.1 };
            done.pages.entry(chunk.leaf).or_default().push(pages);
            done.rows += rows;
        }

        Ok(done)
    }
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
        && was.publication_rows == is.publication_rows
        && was.schema == is.schema
        && was.files == is.files
        && was.inherits == is.inherits
        && was.composites == is.composites
        && was.labels.iter().all(|(oid, label)| is.labels.get(oid).is_none_or(|now| now == label))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        backfill::samples::{self, leaf, planned, table},
        change::Remedy,
        pgoutput::ReplicaIdentity,
        pipeline::options::TableSettings,
        source::catalog::{CompositeFields, EnumLabel},
    };

    #[test]
    fn done_chunks_are_read_by_leaf_and_counted_in_rows() {
        let job = |leaf: u32, first: u64, next: Option<u64>| {
            json!({
                "table": "public.t", "from": "public.t", "leaf": leaf, "pages": [first, next],
                "copy_lsn": "0/1", "snapshot_lsn": "0/1"
            })
        };
        let jobs = vec![(job(7, 0, Some(5)), 10), (job(8, 0, None), 20), (job(7, 5, None), 30)];

        let done = DoneChunks::of_jobs(jobs).unwrap();
        let pages = |first, next| Pages { first, next };
        assert_eq!(done.rows, 60);
        assert_eq!(
            done.pages,
            BTreeMap::from([
                (7, vec![pages(0, Some(5)), pages(5, None)]),
                (8, vec![pages(0, None)])
            ])
        );

        let unreadable = DoneChunks::of_jobs(vec![(json!({"leaf": 7}), 1)]).map(|_| ());
        let error = unreadable.unwrap_err().to_string();
        assert_eq!(error, "a job makes no sense: missing field `table`");
    }

    fn oids(oids: &[u32]) -> BTreeSet<u32> {
        oids.iter().copied().collect()
    }

    #[test]
    fn tables_go_by_their_priority_and_then_the_small_ones_first() {
        let with_pages = |oid, pages| SourceTable { leaves: vec![leaf(oid, pages)], ..table(oid) };
        let mut options = Options::sample();
        for (name, copy_priority) in [("public.t3", 5), ("public.t4", -1)] {
            let settings = TableSettings { copy_priority, ..TableSettings::default() };
            options.table_settings.insert(name.to_owned(), settings);
        }

        let mut tables =
            vec![with_pages(4, 1), with_pages(1, 500), with_pages(2, 20), with_pages(3, 9000)];
        put_in_order(&options, &mut tables);
        assert_eq!(tables.iter().map(|table| table.oid).collect::<Vec<_>>(), [3, 2, 1, 4]);
    }

    #[test]
    fn a_round_ends_at_once_only_when_all_tables_that_it_names_are_locked() {
        let locked = [1, 2].map(|oid| (oid, QualifiedName::new("public", format!("t{oid}"))));
        let measured = Measured { locked: BTreeMap::from(locked), ..Measured::default() };

        for (wanted, expected) in [
            (Some(oids(&[1])), true),
            (Some(oids(&[1, 2])), true),
            (Some(oids(&[1, 3])), false),
            (None, false),
        ] {
            assert_eq!(measured.locks_all(wanted.as_ref()), expected, "{wanted:?}");
        }
    }

    #[test]
    fn only_columns_that_zstd_is_for_are_long() {
        let spec = planned(&table(1));
        let of = |numbers: &[i16]| {
            let long_columns = HashMap::from([(1, numbers.to_vec())]);
            Measured { long_columns, ..Measured::default() }.long_columns_of(&spec)
        };
        // The first column is an integer.
        assert_eq!(of(&[1, 2]), BTreeSet::from(["note".to_owned()]));
        assert_eq!(of(&[1]), BTreeSet::new());
    }

    /// A name, and what has changed of the table since the earlier try.
    type Resumed = (&'static str, fn(&mut TableSpec));

    #[test]
    fn an_earlier_try_goes_on_only_while_the_table_is_the_same() {
        let spec = planned(&table(1));
        let stored =
            StoredTable { has_shadow: true, ..StoredTable::of(&spec, TableState::Copying) };
        assert!(is_resumable(&stored, &spec, &spec));

        let cases: &[Resumed] = &[
            ("it has a column less", |now| drop(now.columns.pop())),
            ("a column has another number", |now| now.columns[1].attnum = 3),
            ("a column has another name", |now| now.columns[1].name = "text".to_owned()),
            ("a column has another type", |now| now.columns[1].type_oid = 1043),
            ("a column has another length", |now| now.columns[1].typmod = 14),
            ("a column is kept otherwise", |now| {
                now.columns[1].mapping = now.columns[0].mapping.clone()
            }),
            ("a column has another name in the target", |now| {
                now.columns[1].target_name = "text".to_owned()
            }),
            ("it has another key", |now| now.key = Key::Columns(vec![1])),
            ("it has no key", |now| now.key = Key::WholeRow),
            ("it has another replica identity", |now| now.replica_identity = ReplicaIdentity::Full),
            ("it has another target", |now| now.target = QualifiedName::new("main", "t1")),
            ("it has another name", |now| now.source = QualifiedName::new("public", "t2")),
            ("a column is left out", |now| now.excluded.push("secret".to_owned())),
            ("it has other files", |now| now.fingerprint = "{}".to_owned()),
        ];
        for (name, change) in cases {
            let mut now = spec.clone();
            change(&mut now);
            assert!(!is_resumable(&stored, &spec, &now), "{name}");
        }
    }

    #[test]
    fn an_earlier_try_goes_on_only_while_its_shadow_is_being_filled() {
        let spec = planned(&table(1));
        let pause = Pause { reason: String::new(), remedy: Remedy::Operator };

        for (state, has_shadow, expected) in [
            (TableState::Copying, true, true),
            (TableState::Resync, true, true),
            (TableState::Copying, false, false),
            (TableState::CatchingUp, true, false),
            (TableState::Live, true, false),
            (TableState::Pending, true, false),
            (TableState::Dropped, true, false),
            (TableState::Error(pause), true, false),
        ] {
            let stored = StoredTable { has_shadow, ..StoredTable::of(&spec, state) };
            let found = is_resumable(&stored, &spec, &spec);
            assert_eq!(found, expected, "{:?}, shadow: {has_shadow}", stored.state);
        }
    }

    #[test]
    fn rows_without_a_key_are_never_resumed() {
        for key in [Key::WholeRow, Key::AppendOnly] {
            let spec = TableSpec { key, ..planned(&table(1)) };
            let stored = StoredTable::of(&spec, TableState::Copying);
            let stored = StoredTable { has_shadow: true, ..stored };
            assert!(!is_resumable(&stored, &spec, &spec), "{:?}", spec.key);
        }
    }

    /// A name, and what has changed of the table since the snapshot.
    type Altered = (&'static str, fn(&mut SourceTable));

    #[test]
    fn rows_that_were_read_mean_nothing_once_the_table_was_altered() {
        let then = table(1);
        assert!(is_same(&then, &table(1)));

        let cases: &[Altered] = &[
            ("renamed", |now| now.name = QualifiedName::new("public", "t2")),
            ("a column was added", |now| now.columns.push(samples::column(3, "n", 23))),
            ("a column was renamed", |now| now.columns[1].name = "text".to_owned()),
            ("a column has another type", |now| now.columns[1].type_oid = 1043),
            ("a column has another length", |now| now.columns[1].typmod = 14),
            ("a column is generated", |now| now.columns[1].is_generated = true),
            ("a column was altered and altered back", |now| {
                now.fingerprint.attributes.insert(2, 701);
            }),
            ("a column of a partition was altered", |now| {
                now.fingerprint.leaf_attributes = "1".to_owned()
            }),
            ("rewritten", |now| now.fingerprint.files = BTreeMap::from([(1, 2)])),
            ("attached again", |now| drop(now.fingerprint.inherits.insert(1, "2".to_owned()))),
            ("dropped from its publication and added again", |now| {
                now.fingerprint.publication_rows = "1 1".to_owned()
            }),
            ("published with its schema", |now| now.fingerprint.schema = "1 1".to_owned()),
            ("the publication was altered", |now| {
                now.fingerprint.publications = "16499 601".to_owned()
            }),
            ("a composite was altered", |now| {
                let fields = CompositeFields { fields: "1 a".to_owned(), is_original: true };
                now.fingerprint.composites.insert(9, fields);
            }),
        ];
        for (name, change) in cases {
            let mut now = table(1);
            change(&mut now);
            assert!(!is_same(&then, &now), "{name}");
        }
    }

    #[test]
    fn a_new_label_changes_no_row_and_a_renamed_one_does() {
        let with = |labels: &[(u32, &str)]| {
            let mut table = table(1);
            table.fingerprint.labels = labels
                .iter()
                .map(|&(oid, name)| {
                    let name = name.to_owned();
                    (oid, EnumLabel { type_oid: 9, name, xmin: 700, is_original: true })
                })
                .collect();
            table
        };

        let then = with(&[(1, "sad")]);
        assert!(is_same(&then, &with(&[(1, "sad"), (2, "ok")])));
        assert!(is_same(&then, &with(&[])));
        assert!(!is_same(&then, &with(&[(1, "blue")])));
    }
}
