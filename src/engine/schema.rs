//! What became of a table's shape: the same, another one that its copy can be brought into, or one
//! that only a new copy reaches.
//!
//! The wire describes a relation by names and types (trap 64); which column is which, what older
//! rows hold and whether the table was rewritten, only the catalogs know, and they speak of now,
//! not of then. So [`judge`] answers `Reshape` only where both agree, and `Copy` wherever something
//! could have happened in between: a copy is always exact. Every relation of the stream is judged
//! before its rows are read on ([`Catalogs::relation`]); what the wire never mentions is found by
//! looking at the catalogs now and then ([`Catalogs::look`]), and judged once the stream has passed
//! that look ([`Catalogs::settle`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{
    enum_labels::{LabelCheck, label_checks},
    settled,
};
use crate::{
    Lsn,
    change::{
        ColumnOrigin, Reshape, TableSpec, assemble::Question, followed::fits, xids::XidSnapshot,
    },
    pgoutput::{
        QualifiedName, ReplicaIdentity,
        relation::Relation,
        table_description::{DescribedColumn, Description},
    },
    pipeline::{
        Context, EngineError,
        left_out::Reason,
        options::TableSettings,
        tables::{
            self, PlanOptions,
            selection::{is_wanted, table_settings},
        },
    },
    source::{
        catalog::{
            self, CompositeFields, Fingerprint, LeafTable, SourceColumn, SourceKey, SourceTable,
        },
        connection::{SqlClient, connect_sql},
        slot,
    },
    types::{InPlace, TypeCatalog, Typed, in_place},
};

/// What became of a table's shape.
#[derive(Debug, Clone)]
pub enum Verdict {
    Same,
    /// The same shape; what is noted about it (NOT NULL, the fingerprint) is newer.
    Noted(Box<TableSpec>),
    Reshape(Box<Reshape>),
    /// Only a new copy is exact, for this reason.
    Copy(String),
}

/// How [`judge`] decides.
#[derive(Debug, Clone, Copy)]
pub struct Policy<'a> {
    pub settings: &'a TableSettings,
    pub null_unrepresentable: bool,
    /// A rewrite that turned `int` into `bigint` is taken for the plain cast that it most often is
    /// (trap 67).
    pub trust_widening: bool,
    /// The last TRUNCATE that was applied, which explains a new file.
    pub truncated: Option<Truncated>,
}

/// A TRUNCATE that was applied.
#[derive(Debug, Clone, Copy)]
pub struct Truncated {
    /// The transaction of the TRUNCATE.
    pub by: u32,
    /// The catalogs were read before the TRUNCATE was visible.
    pub is_unseen: bool,
}

/// Judges a table that is followed as `spec` by what the catalogs say `now`, and by what the stream
/// says, if it does.
pub fn judge(
    spec: &Arc<TableSpec>,
    now: &SourceTable,
    question: Option<&Question>,
    types: &TypeCatalog,
    policy: Policy<'_>,
) -> Verdict {
    decide(spec, now, question, types, policy).unwrap_or_else(Verdict::Copy)
}

fn decide(
    spec: &Arc<TableSpec>,
    now: &SourceTable,
    question: Option<&Question>,
    types: &TypeCatalog,
    policy: Policy<'_>,
) -> Result<Verdict, String> {
    let known: Fingerprint = serde_json::from_str(&spec.fingerprint)
        .map_err(|_| "nothing is known of its last copy".to_owned())?;
    let rewritten = compare(&known, now, question.is_none(), policy.truncated)?;
    if rewritten && !policy.trust_widening {
        return Err(
            "it was rewritten, as by ALTER COLUMN .. TYPE or a default that differs by row"
                .to_owned(),
        );
    }
    let table = match question {
        None => now.clone(),
        Some(question) => match described(spec, &known, now, question)? {
            Some(table) => table,
            None => return Ok(Verdict::Same),
        },
    };
    let options = PlanOptions {
        settings: policy.settings,
        null_unrepresentable: policy.null_unrepresentable,
        before: Some(spec.as_ref()),
    };
    let mut after = tables::plan(&table, types, options).map_err(|error| error.to_string())?;
    // Names of tables are the catalog's, and changed elsewhere; the copy's LSN stays.
    (after.source, after.target) = (spec.source.clone(), spec.target.clone());
    (after.copy_lsn, after.copy_xids) = (spec.copy_lsn, spec.copy_xids.clone());
    after.epoch = spec.epoch + 1;
    let last =
        after.columns.iter().map(|column| column.attnum).max().unwrap_or(0).max(known.last_attnum);
    after.fingerprint = tables::fingerprint_text(&Fingerprint {
        // Columns that came after those the stream speaks of are still new to it.
        last_attnum: if question.is_some() { last } else { now.fingerprint.last_attnum },
        // A new file is for the next look to judge, and so are new partitions.
        files: if question.is_some() { known.files.clone() } else { now.fingerprint.files.clone() },
        inherits: if question.is_some() {
            known.inherits.clone()
        } else {
            now.fingerprint.inherits.clone()
        },
        // And labels and fields that came since: rows may have been read before they got the names
        // that they have now.
        labels: if question.is_some() {
            known.labels.clone()
        } else {
            now.fingerprint.labels.clone()
        },
        composites: if question.is_some() {
            known.composites.clone()
        } else {
            now.fingerprint.composites.clone()
        },
        ..now.fingerprint.clone()
    });

    let mut columns = Vec::with_capacity(after.columns.len());
    for column in &after.columns {
        let declared = table.columns.iter().find(|declared| declared.attnum == column.attnum);
        match spec.columns.iter().position(|before| before.attnum == column.attnum) {
            Some(at) => {
                if let Some(before) = spec.columns.get(at) {
                    let was = Typed { type_oid: before.type_oid, mapping: &before.mapping };
                    let is = Typed { type_oid: column.type_oid, mapping: &column.mapping };
                    let found = in_place(was, is, types, policy.null_unrepresentable);
                    let is_reprinted = found == Some(InPlace::Reprinted);
                    if is_reprinted && question.is_some_and(|question| question.has_open_rows) {
                        return Err(format!(
                            "column \"{}\" got another type inside a transaction that had changed \
                             rows before",
                            column.name
                        ));
                    }
                    let is_widened =
                        policy.trust_widening && before.mapping.widens_to(&column.mapping);
                    if found.is_none() && !is_widened {
                        return Err(format!("column \"{}\" has another type", column.name));
                    }
                }
                columns.push(ColumnOrigin::Kept(at));
            }
            None if column.attnum > known.last_attnum => {
                // Partitions that came later hold no older rows.
                let missing = declared.map(|declared| &declared.missing).into_iter().flatten();
                let mut values = missing
                    .filter(|(oid, _)| known.files.contains_key(oid))
                    .map(|(_, value)| value);
                let first = values.next().cloned().flatten();
                if values.any(|value| *value != first) {
                    return Err(format!(
                        "older rows of its partitions differ in column \"{}\"",
                        column.name
                    ));
                }
                columns.push(ColumnOrigin::Added(first));
            }
            None => {
                return Err(format!(
                    "column \"{}\" was there before, but was not copied",
                    column.name
                ));
            }
        }
    }
    // Trusted is a widening that is there to be seen, and nothing else that rewrites.
    let is_widened = after.columns.iter().zip(&columns).any(|(column, origin)| match origin {
        ColumnOrigin::Kept(at) => {
            spec.columns.get(*at).is_some_and(|before| before.mapping != column.mapping)
        }
        ColumnOrigin::Added(_) => false,
    });
    let is_added = columns.iter().any(|column| matches!(column, ColumnOrigin::Added(_)));
    if rewritten && (is_added || !is_widened || now.kind == b'p') {
        return Err("it was rewritten".to_owned());
    }
    let is_same_shape = after.columns.len() == spec.columns.len()
        && after.replica_identity == spec.replica_identity
        && after.key == spec.key
        && after.columns.iter().zip(&spec.columns).all(|(after, before)| {
            (after.attnum, &after.name, after.type_oid, after.typmod, &after.mapping)
                == (before.attnum, &before.name, before.type_oid, before.typmod, &before.mapping)
        });
    if is_same_shape {
        after.epoch = spec.epoch;
        let is_noted = after.fingerprint != spec.fingerprint
            || after
                .columns
                .iter()
                .zip(&spec.columns)
                .any(|(after, before)| after.not_null != before.not_null);
        return Ok(if is_noted { Verdict::Noted(Box::new(after)) } else { Verdict::Same });
    }
    if question.is_some_and(|question| question.has_parts) {
        return Err(
            "it changed its shape inside a transaction too large for memory that had changed rows \
             before"
                .to_owned(),
        );
    }
    let reshape = Reshape { before: Arc::clone(spec), after: Arc::new(after), columns };
    if reshape.changes_key() && question.is_some_and(|question| question.has_open_rows) {
        return Err("its key changed inside a transaction that had changed rows before".to_owned());
    }
    Ok(Verdict::Reshape(Box::new(reshape)))
}

/// How a table is published otherwise than before: what happened to it in between may not have
/// come.
fn is_published_otherwise(known: &Fingerprint, found: &Fingerprint) -> Option<&'static str> {
    if (&known.listed, &known.schema) != (&found.listed, &found.schema) {
        return Some("it left its publication and came back, or is published in another way");
    }
    if known.publications != found.publications {
        return Some("its publication was altered, so changes between may not have come");
    }
    (known.row_filter != found.row_filter).then_some("its row filter is another one")
}

/// What happened without a word on the wire. `Ok(true)`: the table was rewritten, perhaps with
/// other values.
fn compare(
    known: &Fingerprint,
    now: &SourceTable,
    is_look: bool,
    truncated: Option<Truncated>,
) -> Result<bool, String> {
    let found = &now.fingerprint;
    if let Some(reason) = is_published_otherwise(known, found) {
        return Err(reason.to_owned());
    }
    if known.files.keys().any(|oid| !found.files.contains_key(oid)) {
        return Err("a partition was detached or dropped".to_owned());
    }
    if known
        .inherits
        .iter()
        .any(|(oid, rows)| found.inherits.get(oid).is_some_and(|now| now != rows))
    {
        return Err("a partition was detached and attached again".to_owned());
    }
    if new_leaves(known, now).any(|leaf| leaf.file != leaf.oid || leaf.pages != Some(0)) {
        return Err("a partition that holds rows was attached".to_owned());
    }
    if known.labels.iter().any(|(oid, label)| found.labels.get(oid).is_some_and(|now| now != label))
    {
        return Err("a label of an enum was renamed".to_owned());
    }
    let is_altered = |oid: &u32, now: &CompositeFields| match known.composites.get(oid) {
        Some(before) => before != now,
        // Rows may have been read before a field came.
        None => is_look && !now.is_original,
    };
    if found.composites.iter().any(|(oid, now)| is_altered(oid, now)) {
        return Err("a composite type has other fields".to_owned());
    }
    let is_other_file =
        known.files.iter().any(|(oid, file)| found.files.get(oid).is_some_and(|now| now != file));
    let is_altered =
        (&known.attributes, &known.leaf_attributes) != (&found.attributes, &found.leaf_attributes);
    if is_other_file && !is_altered && is_look {
        // VACUUM FULL and CLUSTER change no row, and a table that a publication names can do
        // nothing else to its file. A partition can be truncated without a word (trap 61), and a
        // table that is published with all others can have been UNLOGGED for a while (trap 46).
        if now.kind == b'p' {
            return Err("the file of a partition was replaced, as by TRUNCATE".to_owned());
        }
        // The table still has the file that the TRUNCATE made if the row in pg_class is as the
        // TRUNCATE's transaction left it. And if the look did not see the TRUNCATE, the TRUNCATE
        // has since removed every row of the file that the look saw.
        let own = now.leaves.iter().find(|leaf| leaf.oid == now.oid);
        let is_its_file =
            |truncated: Truncated| own.is_some_and(|leaf| leaf.changed_by == truncated.by);
        let is_explained =
            truncated.is_some_and(|truncated| truncated.is_unseen || is_its_file(truncated));
        if found.listed.is_empty() && !is_explained {
            return Err("its file was replaced, as by SET UNLOGGED and SET LOGGED".to_owned());
        }
    }
    Ok(is_other_file && is_altered)
}

/// Partitions that came since. Born empty, as they mostly are, nothing came into them but by the
/// stream (trap 71); else their sizes say whether they hold rows. A file has its table's oid until
/// the first TRUNCATE or rewrite.
fn new_leaves<'a>(
    known: &'a Fingerprint,
    now: &'a SourceTable,
) -> impl Iterator<Item = &'a LeafTable> {
    now.leaves.iter().filter(|leaf| !known.files.contains_key(&leaf.oid))
}

/// The table as the stream describes it, with what the catalogs know of its columns. `None`: as it
/// is followed.
fn described(
    spec: &TableSpec,
    known: &Fingerprint,
    now: &SourceTable,
    question: &Question,
) -> Result<Option<SourceTable>, String> {
    let relation = &question.relation;
    // Where the source says itself what the table was at this place of the stream, nothing is in
    // doubt.
    let description = question.description.as_ref().filter(|it| is_credible(it, now, question));
    let (mut candidates, last_attnum) = match description {
        Some(description) => (of_description(description), description.last_attnum),
        None => (now.columns.clone(), now.fingerprint.last_attnum),
    };
    // With REPLICA IDENTITY FULL every column is flagged, and only the catalogs know the key (trap
    // 49), as it is now. One that has come since cannot be relied on before the stream has passed
    // it: until then rows are matched whole.
    let key: Vec<i16> = spec
        .key_columns()
        .iter()
        .filter_map(|&at| spec.columns.get(at))
        .map(|column| column.attnum)
        .collect();
    let key_holds = !key.is_empty()
        && known.key_index != 0
        && known.key_index == now.fingerprint.key_index
        && key.iter().all(|attnum| now.primary_key.contains(attnum))
        && key.len() == now.primary_key.len();
    if fits(spec, relation) {
        // A column that is gone now may have been replaced by one of the same name before this
        // relation was described.
        let is_gone = |attnum: i16| !candidates.iter().any(|column| column.attnum == attnum);
        let is_another = last_attnum > known.last_attnum
            && spec.columns.iter().any(|column| is_gone(column.attnum));
        if is_another && description.is_none() {
            return Err("a column was dropped and another one added".to_owned());
        }
        let is_same = !is_another;
        if is_same
            && (key_holds
                || relation.replica_identity != ReplicaIdentity::Full
                || spec.key_columns().is_empty())
        {
            return Ok(None);
        }
    }
    let changed_again = || "it changed again before it could be followed".to_owned();
    if description.is_none() {
        // Columns that are there now and were there at the last copy were there in between.
        // Whatever else the relation has must be the first of those that came since; if any column
        // went since as well, it could be that one.
        let (old, new): (Vec<_>, Vec<_>) =
            candidates.iter().partition(|column| column.attnum <= known.last_attnum);
        let went = spec
            .columns
            .iter()
            .any(|column| !old.iter().any(|other| other.attnum == column.attnum))
            || new.len() < usize::try_from(last_attnum - known.last_attnum).unwrap_or(usize::MAX);
        let (wanted, kept) = (relation.columns.len(), old.len());
        if wanted < kept || (wanted > kept && went) || wanted > candidates.len() {
            return Err(changed_again());
        }
        candidates.truncate(wanted);
    }
    let mut columns: Vec<SourceColumn> = Vec::with_capacity(relation.columns.len());
    let mut flagged = Vec::new();
    let mut candidates = candidates.iter();
    for wire in relation.columns.iter() {
        let is_it = |column: &&SourceColumn| {
            (&column.name, column.type_oid, column.typmod)
                == (&wire.name, wire.type_oid, wire.typmod)
        };
        // The trigger describes what is not published too.
        let column = match description {
            Some(_) => candidates.find(is_it),
            None => candidates.next().filter(is_it),
        };
        let column = column.ok_or_else(changed_again)?;
        if wire.is_key {
            flagged.push(column.attnum);
        }
        columns.push(column.clone());
    }
    let mut table = SourceTable { columns, ..now.clone() };
    table.replica_identity = relation.replica_identity;
    if relation.replica_identity == ReplicaIdentity::Full {
        if !key_holds {
            table.primary_key.clear();
        }
    } else {
        match relation.replica_identity {
            ReplicaIdentity::Index => table.identity_index = flagged,
            _ => {
                table.is_primary_key_immediate = true;
                table.primary_key = flagged;
            }
        }
        debug_assert!(!matches!(catalog::key_of(&table), SourceKey::WholeRow));
    }
    Ok(Some(table))
}

/// Whether a description is the table's at the place of a question. The event trigger may have been
/// switched off for a change after it, which then came without a description: not inside the
/// transaction that was described.
fn is_credible(description: &Description, now: &SourceTable, question: &Question) -> bool {
    // What is there now, and was there when it was described, was there in between.
    let is_there = |described: &DescribedColumn| {
        now.columns.iter().any(|column| {
            (column.attnum, &column.name, column.type_oid, column.typmod)
                == (described.attnum, &described.name, described.type_oid, described.typmod)
        })
    };
    let described = |name: &String| description.columns.iter().find(|column| column.name == *name);
    description.xid == question.xid
        || question.relation.columns.iter().all(|wire| described(&wire.name).is_some_and(is_there))
}

fn of_description(description: &Description) -> Vec<SourceColumn> {
    let column = |column: &DescribedColumn| SourceColumn {
        attnum: column.attnum,
        name: column.name.clone(),
        type_oid: column.type_oid,
        typmod: column.typmod,
        ndims: column.ndims,
        not_null: column.not_null,
        toastable: true,
        is_generated: column.is_generated,
        xmin: 0,
        missing: column
            .missing
            .iter()
            .map(|(&oid, value)| (oid, value.as_deref().and_then(catalog::only_element)))
            .collect(),
    };
    description.columns.iter().map(column).collect()
}

/// The catalogs as they were at a moment.
#[derive(Debug)]
pub struct Look {
    /// Whatever they show had been committed before this.
    pub at: Lsn,
    /// Whatever had been committed before this, they show.
    began: settled::Began,
    tables: Vec<SourceTable>,
    types: TypeCatalog,
    /// Tables of which another session has locked a new partition, so that its size is not known.
    locked: BTreeSet<u32>,
}

/// How long a question waits for a lock that somebody holds on a published table.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// What an untracked relation of the stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A table of ours that is paused, or about to be copied: what came of it will be in its copy.
    AwaitsCopy,
    /// A published table that was never copied.
    New,
    /// A partition of this table, which is followed as a whole: a publication was altered in
    /// between.
    PartOf(u32),
    LeftOut(Reason),
}

/// What came of a question.
#[derive(Debug)]
pub enum Asked {
    Judged(Verdict),
    /// A published table is locked: ask again.
    Locked,
    /// The stream is ahead of what is visible at the source: ask again.
    NotVisible,
}

/// What came of looking.
#[derive(Debug)]
pub enum Looked {
    /// As when it was settled last.
    Unchanged {
        began: settled::Began,
    },
    Changed(Look),
    /// A published table is locked: look again later.
    Locked,
}

/// What settling a look comes to.
#[derive(Debug, Default)]
pub struct Settled {
    pub reshapes: Vec<Reshape>,
    pub noted: Vec<TableSpec>,
    /// Tables to copy again, with the reason.
    pub copies: Vec<(u32, String)>,
    /// What the copy has to be asked before any of this is true.
    pub label_checks: Vec<LabelCheck>,
    /// Tables came, went, or changed their names: attach anew.
    pub set_changed: Option<String>,
    /// When the look began, if every followed table was judged.
    pub began: Option<settled::Began>,
}

impl Settled {
    /// Only a new copy of the table is exact, whatever else was found of it.
    pub fn copy(&mut self, oid: u32, reason: &str) {
        self.reshapes.retain(|reshape| reshape.after.oid != oid);
        self.noted.retain(|spec| spec.oid != oid);
        if !self.copies.iter().any(|(other, _)| *other == oid) {
            self.copies.push((oid, reason.to_owned()));
        }
    }
}

/// The one who looks into the source's catalogs while the stream runs.
pub struct Catalogs {
    context: Context,
    sql: SqlClient,
    specs: BTreeMap<u32, Arc<TableSpec>>,
    /// Published tables that are not followed, because they are paused.
    others: BTreeSet<u32>,
    publication: String,
    /// What the last settled look showed, to tell in a moment that nothing has changed.
    settled: Option<Settlement>,
    /// By table: the last transaction whose TRUNCATE was applied, until a look that saw it has been
    /// settled. Numbers of transactions come again, so none is kept for longer.
    truncated: BTreeMap<u32, u32>,
    /// Relations that are not followed, as they were found since the last look.
    left_out: BTreeMap<u32, Place>,
    /// What all tables were like at one moment, for when many questions come at once.
    seen: Option<Seen>,
    /// Questions that it did not answer.
    unanswered: u32,
}

/// A look that was acted upon.
struct Settlement {
    /// What it showed.
    shown: String,
    /// What it saw. The catalogs hold nothing else as long as no transaction has ended since.
    snapshot: XidSnapshot,
}

/// All published tables at one moment, with all that `xids` sees.
struct Seen {
    /// Whatever is visible at that moment had committed before, or soon after, this position of the
    /// WAL.
    before: Lsn,
    xids: XidSnapshot,
    tables: BTreeMap<u32, SourceTable>,
    types: TypeCatalog,
    /// By table: the Relation message that was judged [`Verdict::Same`], and the shape that it was
    /// compared with. The server sends the root's Relation again for each partition, and judging
    /// one takes longer the more partitions there are.
    fitting: BTreeMap<u32, (Arc<TableSpec>, Relation)>,
}

/// After so many questions in a row, each of which costs the source a look at all publications, one
/// look at all tables answers the rest. So a session that begins asks hardly more often with 2,000
/// tables than with 20.
const ONE_BY_ONE: u32 = 3;

impl Catalogs {
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

    /// A TRUNCATE of the table was applied.
    pub fn truncated(&mut self, oid: u32, xid: u32) {
        self.truncated.insert(oid, xid);
    }

    /// The table is paused: whatever becomes of its shape is the next copy's business.
    pub fn forget(&mut self, oid: u32) {
        self.specs.remove(&oid);
        self.others.insert(oid);
    }

    /// A table that waited for its copy was not published when that was to begin. If it is by now,
    /// the next look finds it new.
    pub fn gone(&mut self, oid: u32) {
        if self.others.remove(&oid) {
            self.settled = None;
        }
    }

    /// The table goes on in this shape.
    pub fn adopted(&mut self, spec: &Arc<TableSpec>) {
        self.others.remove(&spec.oid);
        self.specs.insert(spec.oid, Arc::clone(spec));
    }

    pub fn spec(&self, oid: u32) -> Option<&Arc<TableSpec>> {
        self.specs.get(&oid)
    }

    /// Whether something that the stream never mentions explains that a copy does not hold what the
    /// stream says of it: the table left its publication for a while, a label was renamed, rows
    /// were rewritten. While somebody has the table locked, nobody can say that it does not.
    pub async fn explains_divergence(&mut self, oid: u32) -> Result<bool, EngineError> {
        let Some(spec) = self.specs.get(&oid).cloned() else { return Ok(false) };
        catalog::begin_moment(&self.sql).await?;
        let mut tables =
            match catalog::published_among(&self.sql, &self.context.options.publications, &[oid])
                .await
            {
                Err(error) if error.is_locked() => {
                    catalog::break_moment(&self.sql).await?;
                    return Ok(true);
                }
                tables => tables?,
            };
        let types = self.types_of(&tables).await?;
        catalog::end_moment(&self.sql).await?;
        if !self.measure_attached(&mut tables).await?.is_empty() {
            return Ok(true);
        }

        let Some(now) = tables.first() else { return Ok(true) };
        let settings = table_settings(&self.context.options, &now.name);
        let verdict = judge(&spec, now, None, &types, self.policy(&settings, oid, None));
        let has_no_doubt = checked_labels(&spec, now, &types).is_ok_and(|checks| checks.is_empty());
        Ok(matches!(verdict, Verdict::Copy(_)) || !has_no_doubt)
    }

    /// Whether commits at the source wait for this pipeline's own stream, as a synchronous
    /// standby's.
    pub async fn is_synchronous_standby(&self) -> Result<bool, EngineError> {
        Ok(catalog::is_synchronous_standby(&self.sql, &self.context.options.slot).await?)
    }

    /// Finds out what untracked relations are, in their order. `None`: a published table is locked;
    /// ask again.
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

        // One question for all of them, and none for those that were left out before: there may be
        // thousands.
        if !asked.is_empty() {
            let published =
                match catalog::published_names(&self.sql, &self.context.options.publications).await
                {
                    Err(error) if error.is_locked() => return Ok(None),
                    published => published?,
                };
            let published: BTreeMap<u32, QualifiedName> = published.into_iter().collect();
            let ancestors = catalog::ancestors(&self.sql, &asked).await?;
            for oid in asked {
                let root = ancestors.get(&oid).and_then(|all| all.iter().find(|oid| is_known(oid)));
                let place = match (published.get(&oid), root) {
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
    pub async fn relation(&mut self, question: &Question) -> Result<Asked, EngineError> {
        let oid = question.relation.oid;
        // A paused table's rows are dropped in any shape.
        let Some(spec) = self.specs.get(&oid).cloned() else {
            return Ok(Asked::Judged(Verdict::Same));
        };
        if self.unanswered >= ONE_BY_ONE {
            self.unanswered = 0;
            self.seen = self.see().await?;
        }
        // New shapes are not taken from there: another question may have changed the table's since.
        let is_seen =
            |seen: &&Seen| question.commit_lsn < seen.before && seen.xids.sees(question.xid);
        if let Some(seen) = self.seen.as_ref().filter(is_seen)
            && let Some(now) = seen.tables.get(&oid)
        {
            let is_same_question = |(of, relation): &(Arc<TableSpec>, Relation)| {
                question.description.is_none()
                    && Arc::ptr_eq(of, &spec)
                    && *relation == question.relation
            };
            if seen.fitting.get(&oid).is_some_and(is_same_question) {
                return Ok(Asked::Judged(Verdict::Same));
            }
            let settings = table_settings(&self.context.options, &now.name);
            let verdict =
                judge(&spec, now, Some(question), &seen.types, self.policy(&settings, oid, None));
            if let (Verdict::Same, None, Some(seen)) =
                (&verdict, &question.description, &mut self.seen)
            {
                seen.fitting.insert(oid, (Arc::clone(&spec), question.relation.clone()));
            }
            if matches!(verdict, Verdict::Same | Verdict::Copy(_)) {
                return Ok(Asked::Judged(verdict));
            }
        }
        let xids = catalog::begin_moment(&self.sql).await?;
        if !xids.sees(question.xid) {
            catalog::break_moment(&self.sql).await?;
            return Ok(Asked::NotVisible);
        }
        self.unanswered += 1;
        let mut tables =
            match catalog::published_among(&self.sql, &self.context.options.publications, &[oid])
                .await
            {
                Err(error) if error.is_locked() => {
                    catalog::break_moment(&self.sql).await?;
                    return Ok(Asked::Locked);
                }
                tables => tables?,
            };
        let described = question.relation.columns.iter().map(|column| column.type_oid);
        let types = self.types_with(&tables, described).await?;
        catalog::end_moment(&self.sql).await?;
        if !self.measure_attached(&mut tables).await?.is_empty() {
            return Ok(Asked::Locked);
        }
        let Some(now) = tables.pop() else {
            // Gone by now. What the stream still brings of it fits, or is nobody's business any
            // more.
            return Ok(Asked::Judged(if fits(&spec, &question.relation) {
                Verdict::Same
            } else {
                Verdict::Copy("it changed, and is no longer published".to_owned())
            }));
        };
        let settings = table_settings(&self.context.options, &now.name);
        let verdict = judge(&spec, &now, Some(question), &types, self.policy(&settings, oid, None));
        Ok(Asked::Judged(verdict))
    }

    /// The types of all columns of these tables, and of those that are followed.
    async fn types_of(&self, tables: &[SourceTable]) -> Result<TypeCatalog, EngineError> {
        self.types_with(tables, []).await
    }

    /// Those types, and some more.
    async fn types_with(
        &self,
        tables: &[SourceTable],
        others: impl IntoIterator<Item = u32>,
    ) -> Result<TypeCatalog, EngineError> {
        let declared =
            tables.iter().flat_map(|table| table.columns.iter().map(|column| column.type_oid));
        // What a column was before tells what became of its values.
        let specs = tables.iter().filter_map(|table| self.specs.get(&table.oid));
        let before = specs.flat_map(|spec| spec.columns.iter().map(|column| column.type_oid));
        let oids: BTreeSet<u32> = declared.chain(before).chain(others).collect();
        Ok(catalog::types(&self.sql, &oids.into_iter().collect::<Vec<_>>()).await?)
    }

    /// None: a published table is locked.
    async fn see(&self) -> Result<Option<Seen>, EngineError> {
        let before = catalog::wal_insert_lsn(&self.sql).await?;
        let xids = catalog::begin_moment(&self.sql).await?;
        let mut tables =
            match catalog::published_tables(&self.sql, &self.context.options.publications).await {
                Err(error) if error.is_locked() => {
                    catalog::break_moment(&self.sql).await?;
                    return Ok(None);
                }
                tables => tables?,
            };
        let types = self.types_of(&tables).await?;
        catalog::end_moment(&self.sql).await?;
        let locked = self.measure_attached(&mut tables).await?;
        tables.retain(|table| !locked.contains(&table.oid));
        let tables = tables.into_iter().map(|table| (table.oid, table)).collect();
        Ok(Some(Seen { before, xids, tables, types, fitting: BTreeMap::new() }))
    }

    /// See [`catalog::flushed`].
    pub async fn flushed(&self, position: Lsn, age: Duration) -> Result<Lsn, EngineError> {
        Ok(catalog::flushed(&self.sql, position, age).await?)
    }

    /// Whether all WAL before a position is flushed.
    pub(super) async fn has_flushed(&self, position: Lsn) -> Result<bool, EngineError> {
        Ok(catalog::wal_flush_lsn(&self.sql).await? >= position)
    }

    /// Those of the transactions that may wait for synchronous standbys.
    pub(super) async fn awaiting_standbys(
        &self,
        xids: &BTreeSet<u32>,
    ) -> Result<BTreeSet<u32>, EngineError> {
        Ok(catalog::awaiting_standbys(&self.sql, xids).await?)
    }

    /// Measures partitions that came since their tables were judged last: only an empty one changes
    /// nothing. Returns the tables of which one is locked, so that it cannot be measured now. Not
    /// inside a moment.
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

    /// `seen`: the snapshot in which the catalogs were read.
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

    /// Looks.
    pub async fn look(&mut self) -> Result<Looked, EngineError> {
        let read_at = tokio::time::Instant::now();
        let (position, xids) = catalog::wal_insert_lsn_and_xids(&self.sql).await?;
        let snapshot = catalog::begin_moment(&self.sql).await?;
        let began = settled::Began::new(position, read_at, xids, snapshot.clone());
        if self.settled.as_ref().is_some_and(|settled| settled.snapshot == snapshot) {
            catalog::end_moment(&self.sql).await?;
            return Ok(Looked::Unchanged { began });
        }
        let mut tables =
            match catalog::published_tables(&self.sql, &self.context.options.publications).await {
                Err(error) if error.is_locked() => {
                    catalog::break_moment(&self.sql).await?;
                    return Ok(Looked::Locked);
                }
                tables => tables?,
            };
        tables.retain(|table| is_wanted(&self.context.options, &table.name));
        let types = self.types_of(&tables).await?;
        let publication =
            catalog::publication(&self.sql, &self.context.options.publications).await?;
        catalog::end_moment(&self.sql).await?;
        let locked = self.measure_attached(&mut tables).await?;
        let Some(publication) = publication else {
            return Err(slot::SlotError::PublicationMissing {
                names: self.context.options.publications.clone(),
            }
            .into());
        };
        slot::judge_publication(&publication)?;
        slot::judge_fingerprint(&self.publication, &publication.fingerprint)?;
        if let Some(settled) = &mut self.settled
            && settled.shown == shown(&tables)
        {
            settled.snapshot = snapshot;
            return Ok(Looked::Unchanged { began });
        }
        let at = crate::checkpoint::reachable_target(catalog::wal_insert_lsn(&self.sql).await?);
        Ok(Looked::Changed(Look { at, began, tables, types, locked }))
    }

    /// What a look comes to, once everything before it has been applied.
    /// Shapes of tables for which `is_skipped` says so are left for another look.
    pub fn settle(&mut self, look: Look, is_skipped: impl Fn(u32) -> bool) -> Settled {
        let mut settled = Settled::default();
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
            match judge(
                spec,
                table,
                None,
                &look.types,
                self.policy(&settings, table.oid, Some(look.began.snapshot())),
            ) {
                Verdict::Same => {}
                Verdict::Noted(after) => settled.noted.push(*after),
                Verdict::Reshape(reshape) => settled.reshapes.push(*reshape),
                Verdict::Copy(reason) => settled.copies.push((table.oid, reason)),
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
            shown: shown(&look.tables),
            snapshot: look.began.snapshot().clone(),
        });
        settled.began = is_whole.then_some(look.began);
        settled
    }
}

/// What the copy has to be asked about enums of a table.
fn checked_labels(
    spec: &Arc<TableSpec>,
    now: &SourceTable,
    types: &TypeCatalog,
) -> Result<Vec<LabelCheck>, String> {
    // A table of which nothing is known is copied in any case.
    match serde_json::from_str::<Fingerprint>(&spec.fingerprint) {
        Ok(known) => label_checks(spec, &known, &now.fingerprint, types),
        Err(_) => Ok(Vec::new()),
    }
}

/// What a look is compared by: everything but sizes and row counts.
fn shown(tables: &[SourceTable]) -> String {
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
