//! Watches the source catalogs while the stream runs, and judges how the shape of a table changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{
    enum_labels::{LabelCheck, label_checks},
    judge::{Policy, ShapeChange, Truncated, classify, new_leaves},
};
use crate::{
    Lsn,
    change::{
        SchemaChange, TableSpec,
        followed::{SchemaQuery, fits},
        xids::XidSnapshot,
    },
    engine::{new_tables::add_new_tables, settled},
    pgoutput::{QualifiedName, relation::Relation},
    pipeline::{
        Context, EngineError,
        left_out::Reason,
        options::TableSettings,
        tables::selection::{is_wanted, retain_wanted, table_settings},
    },
    source::{
        catalog::{self, Fingerprint, SourceTable},
        connection::{SqlClient, connect_sql},
        slot,
    },
    types::TypeCatalog,
};

/// The catalogs as they were at a moment.
#[derive(Debug)]
pub struct CatalogSnapshot {
    /// Every transaction that the catalogs show had committed before this position.
    pub at: Lsn,
    /// The catalogs show every transaction that had committed before this position.
    began: settled::Began,
    tables: Vec<SourceTable>,
    types: TypeCatalog,
    /// Tables with a new partition that another session has locked, so that its size is not known.
    locked: BTreeSet<u32>,
}

/// How long a question waits for a lock that another session holds on a published table.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// What an untracked relation of the stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A table of this pipeline that is paused, or about to be copied: its changes will be in its
    /// copy.
    AwaitsCopy,
    /// A published table that was never copied.
    New,
    /// A partition of this table, which is followed as a whole: a publication was altered in the
    /// meantime.
    PartOf(u32),
    LeftOut(Reason),
}

/// The answer to a question.
#[derive(Debug)]
pub enum RelationAnswer {
    Judged(ShapeChange),
    /// A published table is locked: ask again.
    Locked,
    /// The stream is ahead of what is visible at the source: ask again.
    NotVisible,
}

/// The result of a look at the catalogs.
#[derive(Debug)]
pub enum CatalogCheck {
    /// The catalogs are as they were at the last look that was settled.
    Unchanged {
        began: settled::Began,
    },
    Changed(CatalogSnapshot),
    /// A published table is locked: look again later.
    Locked,
}

/// The changes that a look at the catalogs leads to.
#[derive(Debug, Default)]
pub struct PendingChanges {
    pub schema_changes: Vec<SchemaChange>,
    pub noted: Vec<TableSpec>,
    /// Tables to copy again, with the reason.
    pub copies: Vec<(u32, String)>,
    /// Checks of the values in the copy, on which all of these changes depend.
    pub label_checks: Vec<LabelCheck>,
    /// Tables came, went, or changed their names: the session has to attach again.
    pub set_changed: Option<String>,
    /// When the look began, if every followed table was judged.
    pub began: Option<settled::Began>,
}

impl PendingChanges {
    /// Replaces whatever else was found of the table: only a new copy of the table is exact.
    pub fn copy(&mut self, oid: u32, reason: &str) {
        self.schema_changes.retain(|reshape| reshape.after.oid != oid);
        self.noted.retain(|spec| spec.oid != oid);
        if !self.copies.iter().any(|(other, _)| *other == oid) {
            self.copies.push((oid, reason.to_owned()));
        }
    }
}

/// Reads the source's catalogs while the stream runs.
pub struct CatalogWatch {
    context: Context,
    sql: SqlClient,
    specs: BTreeMap<u32, Arc<TableSpec>>,
    /// Published tables that are not followed, because they are paused.
    others: BTreeSet<u32>,
    publication: String,
    /// What the last settled look showed, which tells at once that nothing has changed.
    settled: Option<Settlement>,
    /// By table: the last transaction whose TRUNCATE was applied, until a look that saw it has been
    /// settled. PostgreSQL uses numbers of transactions again, so none is kept for longer.
    truncated: BTreeMap<u32, u32>,
    /// Relations that are not followed, as they were found since the last look.
    left_out: BTreeMap<u32, Place>,
    /// The shapes of all tables at one moment, for when many questions come at once.
    seen: Option<CatalogCache>,
    /// Questions that the cache did not answer.
    unanswered: u32,
}

/// A look that was acted upon.
struct Settlement {
    /// The signature of the tables that the look showed.
    signature: String,
    /// The transactions that the look saw. The catalogs hold nothing else as long as no transaction
    /// has ended since.
    snapshot: XidSnapshot,
}

/// All published tables at one moment, with every change that `xids` sees.
struct CatalogCache {
    /// Every transaction that is visible at that moment had committed before, or soon after, this
    /// position of the WAL.
    before: Lsn,
    xids: XidSnapshot,
    tables: BTreeMap<u32, SourceTable>,
    types: TypeCatalog,
    /// By table: the Relation message that was judged [`ShapeChange::None`], and the shape that it
    /// was compared with. The server sends the root's Relation again for each partition, and
    /// judging one takes longer the more partitions there are.
    fitting: BTreeMap<u32, (Arc<TableSpec>, Relation)>,
}

/// After this number of questions in a row, each of which costs the source a look at all
/// publications, one look at all tables answers the rest. So a session that begins asks hardly more
/// often with 2,000 tables than with 20.
const ONE_BY_ONE: u32 = 3;

impl CatalogWatch {
    pub async fn new(
        context: &Context,
        tables: &[Arc<TableSpec>],
        others: BTreeSet<u32>,
        publication: String,
        truncated: BTreeMap<u32, u32>,
    ) -> Result<Self, EngineError> {
        let sql = connect_sql(&context.options.source, "catalogs").await?;
        sql.batch_execute(&format!("SET lock_timeout = '{}ms'", LOCK_PATIENCE.as_millis())).await?;

        let specs = tables.iter().map(|table| (table.oid, Arc::clone(table))).collect();
        Ok(Self {
            context: context.clone(),
            sql,
            specs,
            others,
            publication,
            settled: None,
            truncated,
            left_out: BTreeMap::new(),
            seen: None,
            unanswered: 0,
        })
    }

    /// Records that a TRUNCATE of the table was applied.
    pub fn truncated(&mut self, oid: u32, xid: u32) {
        self.truncated.insert(oid, xid);
    }

    /// Stops following a table that is paused: the next copy takes the table in whatever shape it
    /// has then.
    pub fn forget(&mut self, oid: u32) {
        self.specs.remove(&oid);
        self.others.insert(oid);
    }

    /// Forgets a table that was not published when the copy that it waited for was to begin. If the
    /// table is published by now, the next look finds it new. Returns `false` for a table that is
    /// followed, which the next look finds gone.
    pub fn not_published(&mut self, oid: u32) -> bool {
        if self.others.remove(&oid) {
            self.settled = None;
        }
        !self.specs.contains_key(&oid)
    }

    /// Follows the table in this shape from now on.
    pub fn adopted(&mut self, spec: &Arc<TableSpec>) {
        self.others.remove(&spec.oid);
        self.specs.insert(spec.oid, Arc::clone(spec));
    }

    pub fn spec(&self, oid: u32) -> Option<&Arc<TableSpec>> {
        self.specs.get(&oid)
    }

    /// Returns whether a change that the stream never mentions explains that a copy does not hold
    /// what the stream says of it: the table left its publication for a while, a label was renamed,
    /// rows were rewritten. Also returns true while another session has locked the table, since the
    /// catalogs cannot rule out such a change then.
    pub async fn explains_divergence(&mut self, oid: u32) -> Result<bool, EngineError> {
        let Some(spec) = self.specs.get(&oid).cloned() else { return Ok(false) };

        catalog::begin_snapshot(&self.sql).await?;
        let mut tables =
            match catalog::published_among(&self.sql, &self.context.options.publications, &[oid])
                .await
            {
                Err(error) if error.is_locked() => {
                    catalog::abort_snapshot(&self.sql).await?;
                    return Ok(true);
                }
                tables => tables?,
            };

        let types = self.types_of(&tables).await?;
        catalog::end_snapshot(&self.sql).await?;
        if !self.measure_attached(&mut tables).await?.is_empty() {
            return Ok(true);
        }

        let Some(now) = tables.first() else { return Ok(true) };
        let settings = table_settings(&self.context.options, &now.name);

        let verdict = classify(&spec, now, None, &types, self.policy(&settings, oid, None));
        let has_no_doubt = checked_labels(&spec, now, &types).is_ok_and(|checks| checks.is_empty());

        Ok(matches!(verdict, ShapeChange::Recopy(_)) || !has_no_doubt)
    }

    /// Returns whether commits at the source wait for this pipeline's own stream, as for the stream
    /// of a synchronous standby.
    pub async fn is_synchronous_standby(&self) -> Result<bool, EngineError> {
        Ok(catalog::is_synchronous_standby(&self.sql, &self.context.options.slot).await?)
    }

    /// Finds out what untracked relations are, in their order. Returns `None` when a published
    /// table is locked: the caller asks again.
    pub async fn places(
        &mut self,
        relations: &[&Relation],
    ) -> Result<Option<Vec<Place>>, EngineError> {
        let is_known = |oid: &u32| self.specs.contains_key(oid) || self.others.contains(oid);
        let unknown = |relation: &&&Relation| {
            !is_known(&relation.oid) && !self.left_out.contains_key(&relation.oid)
        };
        let asked: Vec<u32> =
            relations.iter().filter(unknown).map(|relation| relation.oid).collect();

        // One question covers all of these relations, and relations that were left out before need
        // none: there may be thousands.
        if !asked.is_empty() {
            let published =
                match catalog::published_names(&self.sql, &self.context.options.publications).await
                {
                    Err(error) if error.is_locked() => return Ok(None),
                    published => published?,
                };

            let columnless = relations.iter().filter(|relation| relation.columns.is_empty());
            let columnless: BTreeSet<u32> = columnless.map(|relation| relation.oid).collect();
            let published: BTreeMap<u32, QualifiedName> = published.into_iter().collect();
            let ancestors = catalog::ancestors(&self.sql, &asked).await?;

            for oid in asked {
                let root = ancestors.get(&oid).and_then(|all| all.iter().find(|oid| is_known(oid)));

                let place = match (published.get(&oid), root) {
                    _ if columnless.contains(&oid) => Place::LeftOut(Reason::NoColumns),
                    (Some(name), _) if is_wanted(&self.context.options, name) => Place::New,
                    (Some(_), _) => Place::LeftOut(Reason::Excluded),
                    (None, Some(root)) if self.others.contains(root) => Place::AwaitsCopy,
                    (None, Some(&root)) => Place::PartOf(root),
                    (None, None) => Place::LeftOut(Reason::NotPublished),
                };
                self.left_out.insert(oid, place);
            }
        }
        let place = |relation: &&Relation| match self.left_out.get(&relation.oid) {
            Some(place) if !is_known(&relation.oid) => *place,
            _ => Place::AwaitsCopy,
        };

        Ok(Some(relations.iter().map(place).collect()))
    }

    /// Judges a relation that the stream describes.
    pub async fn relation(
        &mut self,
        question: &SchemaQuery,
    ) -> Result<RelationAnswer, EngineError> {
        let oid = question.relation.oid;
        // The rows of a paused table are dropped in any shape.
        let Some(spec) = self.specs.get(&oid).cloned() else {
            return Ok(RelationAnswer::Judged(ShapeChange::None));
        };

        if self.unanswered >= ONE_BY_ONE {
            self.unanswered = 0;
            self.seen = self.refresh_cache().await?;
        }

        if let Some(verdict) = self.judge_by_cache(&spec, question) {
            return Ok(RelationAnswer::Judged(verdict));
        }

        self.judge_by_catalogs(&spec, question).await
    }

    /// Judges a relation by the tables that were read last. Returns `None` when those do not answer
    /// the question.
    fn judge_by_cache(
        &mut self,
        spec: &Arc<TableSpec>,
        question: &SchemaQuery,
    ) -> Option<ShapeChange> {
        let oid = question.relation.oid;
        let is_seen = |seen: &&CatalogCache| {
            question.commit_lsn < seen.before && seen.xids.sees(question.xid)
        };

        let seen = self.seen.as_ref().filter(is_seen)?;
        let now = seen.tables.get(&oid)?;

        let is_same_question = |(of, relation): &(Arc<TableSpec>, Relation)| {
            question.description.is_none()
                && Arc::ptr_eq(of, spec)
                && *relation == question.relation
        };

        if seen.fitting.get(&oid).is_some_and(is_same_question) {
            return Some(ShapeChange::None);
        }

        let settings = table_settings(&self.context.options, &now.name);
        let verdict =
            classify(spec, now, Some(question), &seen.types, self.policy(&settings, oid, None));

        if let (ShapeChange::None, None, Some(seen)) =
            (&verdict, &question.description, &mut self.seen)
        {
            seen.fitting.insert(oid, (Arc::clone(spec), question.relation.clone()));
        }

        // New shapes are not taken from the cache: another question may have changed the shape of
        // the table since.
        matches!(verdict, ShapeChange::None | ShapeChange::Recopy(_)).then_some(verdict)
    }

    /// Judges a relation by the catalogs as they are now.
    async fn judge_by_catalogs(
        &mut self,
        spec: &Arc<TableSpec>,
        question: &SchemaQuery,
    ) -> Result<RelationAnswer, EngineError> {
        let oid = question.relation.oid;
        let xids = catalog::begin_snapshot(&self.sql).await?;
        if !xids.sees(question.xid) {
            catalog::abort_snapshot(&self.sql).await?;
            return Ok(RelationAnswer::NotVisible);
        }

        self.unanswered += 1;
        let mut tables =
            match catalog::published_among(&self.sql, &self.context.options.publications, &[oid])
                .await
            {
                Err(error) if error.is_locked() => {
                    catalog::abort_snapshot(&self.sql).await?;
                    return Ok(RelationAnswer::Locked);
                }
                tables => tables?,
            };

        let described = question.relation.columns.iter().map(|column| column.type_oid);
        let types = self.types_with(&tables, described).await?;
        catalog::end_snapshot(&self.sql).await?;

        if !self.measure_attached(&mut tables).await?.is_empty() {
            return Ok(RelationAnswer::Locked);
        }

        let Some(now) = tables.pop() else {
            // The table is gone by now. Rows that the stream still brings of the table either fit,
            // or need not be kept.
            return Ok(RelationAnswer::Judged(if fits(spec, &question.relation) {
                ShapeChange::None
            } else {
                ShapeChange::Recopy("it changed, and is no longer published".to_owned())
            }));
        };

        let settings = table_settings(&self.context.options, &now.name);
        let verdict =
            classify(spec, &now, Some(question), &types, self.policy(&settings, oid, None));
        Ok(RelationAnswer::Judged(verdict))
    }

    /// Reads the types of all columns of these tables, and of those that are followed.
    async fn types_of(&self, tables: &[SourceTable]) -> Result<TypeCatalog, EngineError> {
        self.types_with(tables, []).await
    }

    /// Reads the types of all columns of these tables, of those that are followed, and some more.
    async fn types_with(
        &self,
        tables: &[SourceTable],
        others: impl IntoIterator<Item = u32>,
    ) -> Result<TypeCatalog, EngineError> {
        let declared =
            tables.iter().flat_map(|table| table.columns.iter().map(|column| column.type_oid));
        // The type that a column had before tells what became of its values.
        let specs = tables.iter().filter_map(|table| self.specs.get(&table.oid));
        let before = specs.flat_map(|spec| spec.columns.iter().map(|column| column.type_oid));

        let oids: BTreeSet<u32> = declared.chain(before).chain(others).collect();
        Ok(catalog::types(&self.sql, &oids.into_iter().collect::<Vec<_>>()).await?)
    }

    /// Reads all published tables. Returns `None` when a published table is locked.
    async fn refresh_cache(&self) -> Result<Option<CatalogCache>, EngineError> {
        let before = catalog::wal_insert_lsn(&self.sql).await?;
        let xids = catalog::begin_snapshot(&self.sql).await?;

        let mut tables =
            match catalog::published_tables(&self.sql, &self.context.options.publications).await {
                Err(error) if error.is_locked() => {
                    catalog::abort_snapshot(&self.sql).await?;
                    return Ok(None);
                }
                tables => tables?,
            };

        let types = self.types_of(&tables).await?;
        catalog::end_snapshot(&self.sql).await?;

        let locked = self.measure_attached(&mut tables).await?;
        tables.retain(|table| !locked.contains(&table.oid));
        let tables = tables.into_iter().map(|table| (table.oid, table)).collect();
        Ok(Some(CatalogCache { before, xids, tables, types, fitting: BTreeMap::new() }))
    }

    /// Returns the part of a position that is sure to be flushed: see [`catalog::flushed`].
    pub async fn flushed(&self, position: Lsn, age: Duration) -> Result<Lsn, EngineError> {
        Ok(catalog::flushed(&self.sql, position, age).await?)
    }

    /// Returns whether all WAL before a position is flushed.
    pub(in crate::engine) async fn has_flushed(&self, position: Lsn) -> Result<bool, EngineError> {
        Ok(catalog::wal_flush_lsn(&self.sql).await? >= position)
    }

    /// Returns those of the transactions that may wait for synchronous standbys.
    pub(in crate::engine) async fn awaiting_standbys(
        &self,
        xids: &BTreeSet<u32>,
    ) -> Result<BTreeSet<u32>, EngineError> {
        Ok(catalog::awaiting_standbys(&self.sql, xids).await?)
    }

    /// Measures partitions that came since their tables were judged last: only an empty partition
    /// changes nothing. Returns the tables with a locked partition, which cannot be measured now.
    /// Must not be called inside a snapshot.
    async fn measure_attached(
        &self,
        tables: &mut [SourceTable],
    ) -> Result<BTreeSet<u32>, EngineError> {
        let mut unmeasured = BTreeSet::new();

        for table in tables.iter_mut().filter(|table| table.kind == b'p') {
            let Some(spec) = self.specs.get(&table.oid) else { continue };
            let Ok(known) = serde_json::from_str::<Fingerprint>(&spec.fingerprint) else {
                continue;
            };

            let attached: Vec<u32> = new_leaves(&known, table)
                .filter(|leaf| leaf.pages.is_none())
                .map(|leaf| leaf.oid)
                .collect();

            if attached.is_empty() {
                continue;
            }

            match catalog::measure(&self.sql, &attached).await {
                Ok(pages) => table.measured(&pages),
                Err(error) if error.is_locked() => {
                    unmeasured.insert(table.oid);
                }
                Err(error) => return Err(error.into()),
            }
        }

        Ok(unmeasured)
    }

    /// Returns how [`classify`] decides about a table. `seen` is the snapshot in which the catalogs
    /// were read.
    fn policy<'a>(
        &self,
        settings: &'a TableSettings,
        oid: u32,
        seen: Option<&XidSnapshot>,
    ) -> Policy<'a> {
        let truncated = self
            .truncated
            .get(&oid)
            .map(|&by| Truncated { by, is_unseen: seen.is_some_and(|it| !it.sees(by)) });

        Policy {
            settings,
            null_unrepresentable: self.context.options.null_unrepresentable,
            trust_widening: self.context.options.trust_widening,
            truncated,
        }
    }

    /// Looks at the catalogs for changes since the last settled look. New tables are added to the
    /// publication before.
    pub async fn look(&mut self) -> Result<CatalogCheck, EngineError> {
        if self.has_changed().await? {
            add_new_tables(&self.context, &self.sql).await?;
        }
        self.look_at_published().await
    }

    /// Returns whether any transaction has ended since the last settled look.
    async fn has_changed(&self) -> Result<bool, EngineError> {
        let Some(settled) = &self.settled else { return Ok(true) };
        Ok(settled.snapshot != catalog::current_snapshot(&self.sql).await?)
    }

    async fn look_at_published(&mut self) -> Result<CatalogCheck, EngineError> {
        let read_at = tokio::time::Instant::now();
        let (position, xids) = catalog::wal_insert_lsn_and_xids(&self.sql).await?;

        let snapshot = catalog::begin_snapshot(&self.sql).await?;
        let began = settled::Began::new(position, read_at, xids, snapshot.clone());

        if self.settled.as_ref().is_some_and(|settled| settled.snapshot == snapshot) {
            catalog::end_snapshot(&self.sql).await?;
            return Ok(CatalogCheck::Unchanged { began });
        }

        let mut tables =
            match catalog::published_tables(&self.sql, &self.context.options.publications).await {
                Err(error) if error.is_locked() => {
                    catalog::abort_snapshot(&self.sql).await?;
                    return Ok(CatalogCheck::Locked);
                }
                tables => tables?,
            };

        retain_wanted(&self.context.options, &mut tables);
        let types = self.types_of(&tables).await?;

        let publication =
            catalog::publication(&self.sql, &self.context.options.publications).await?;
        catalog::end_snapshot(&self.sql).await?;

        let locked = self.measure_attached(&mut tables).await?;
        let Some(publication) = publication else {
            return Err(slot::SlotError::PublicationMissing {
                names: self.context.options.publications.clone(),
            }
            .into());
        };

        slot::check_publication(&publication)?;
        slot::check_fingerprint(&self.publication, &publication.fingerprint)?;

        if let Some(settled) = &mut self.settled
            && settled.signature == signature(&tables)
        {
            settled.snapshot = snapshot;
            return Ok(CatalogCheck::Unchanged { began });
        }

        let at = crate::checkpoint::reachable_target(catalog::wal_insert_lsn(&self.sql).await?);
        Ok(CatalogCheck::Changed(CatalogSnapshot { at, began, tables, types, locked }))
    }

    /// Returns the changes that a look leads to, once everything before the look has been applied.
    /// The shapes of tables for which `is_skipped` returns true are left for another look.
    pub fn changes_of(
        &mut self,
        look: CatalogSnapshot,
        is_skipped: impl Fn(u32) -> bool,
    ) -> PendingChanges {
        let mut settled = PendingChanges::default();
        let mut is_whole = true;

        for table in &look.tables {
            let Some(spec) = self.specs.get(&table.oid) else {
                if !self.others.contains(&table.oid) {
                    settled.set_changed = Some(format!("table {} is published", table.name));
                }
                continue;
            };

            if spec.source != table.name {
                settled.set_changed =
                    Some(format!("table {} is now called {}", spec.source, table.name));
                continue;
            }

            if is_skipped(table.oid) || look.locked.contains(&table.oid) {
                is_whole = false;
                continue;
            }

            let settings = table_settings(&self.context.options, &table.name);
            match checked_labels(spec, table, &look.types) {
                Ok(checks) => settled.label_checks.extend(checks),
                Err(reason) => {
                    settled.copies.push((table.oid, reason));
                    continue;
                }
            }

            match classify(
                spec,
                table,
                None,
                &look.types,
                self.policy(&settings, table.oid, Some(look.began.snapshot())),
            ) {
                ShapeChange::None => {}
                ShapeChange::MetadataOnly(after) => settled.noted.push(*after),
                ShapeChange::Alter(reshape) => settled.schema_changes.push(*reshape),
                ShapeChange::Recopy(reason) => settled.copies.push((table.oid, reason)),
            }

            if self.truncated.get(&table.oid).is_some_and(|&by| look.began.snapshot().sees(by)) {
                self.truncated.remove(&table.oid);
            }
        }

        for (oid, spec) in &self.specs {
            if !look.tables.iter().any(|table| table.oid == *oid) {
                settled.set_changed = Some(format!("table {} is no longer published", spec.source));
            }
        }

        self.left_out.clear();
        self.settled = is_whole.then(|| Settlement {
            signature: signature(&look.tables),
            snapshot: look.began.snapshot().clone(),
        });

        settled.began = is_whole.then_some(look.began);
        settled
    }
}

/// Returns the checks that the copy has to answer about enums of a table.
fn checked_labels(
    spec: &Arc<TableSpec>,
    now: &SourceTable,
    types: &TypeCatalog,
) -> Result<Vec<LabelCheck>, String> {
    // A table without a known fingerprint is copied in any case.
    match serde_json::from_str::<Fingerprint>(&spec.fingerprint) {
        Ok(known) => label_checks(spec, &known, &now.fingerprint, types),
        Err(_) => Ok(Vec::new()),
    }
}

/// Returns the text by which two looks are compared: everything but sizes and row counts.
fn signature(tables: &[SourceTable]) -> String {
    let mut text = String::new();
    for table in tables {
        let SourceTable { oid, name, replica_identity, columns, fingerprint, .. } = table;
        let key = catalog::key_of(table);
        text.push_str(&format!(
            "{oid} {name:?} {replica_identity:?} {key:?} {columns:?} {fingerprint:?}\n"
        ));
    }
    text
}
