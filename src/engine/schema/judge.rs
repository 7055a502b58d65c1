//! Judges how the shape of a table changed, from two descriptions of the table, without any input
//! or output.

use std::sync::Arc;

use crate::{
    change::{
        ColumnOrigin, SchemaChange, TableSpec,
        followed::{SchemaQuery, fits},
    },
    pgoutput::{
        ReplicaIdentity,
        table_description::{DescribedColumn, Description},
    },
    pipeline::{
        options::TableSettings,
        tables::{self, PlanOptions},
    },
    source::catalog::{
        self, CompositeFields, Fingerprint, LeafTable, SourceColumn, SourceKey, SourceTable,
    },
    types::{InPlace, TypeCatalog, Typed, in_place},
};

/// How the shape of a table changed.
#[derive(Debug, Clone)]
pub enum ShapeChange {
    None,
    /// The table has the same shape; what is noted about it (NOT NULL, the fingerprint) is newer.
    MetadataOnly(Box<TableSpec>),
    Alter(Box<SchemaChange>),
    /// Only a new copy is exact, for this reason.
    Recopy(String),
}

/// How [`judge`] decides.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy<'a> {
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
pub(super) struct Truncated {
    /// The transaction of the TRUNCATE.
    pub by: u32,
    /// Whether the catalogs were read before the TRUNCATE was visible.
    pub is_unseen: bool,
}

/// Judges a table that is followed as `spec` by what the catalogs say `now`, and by what the stream
/// says, if there is a question from the stream.
pub(super) fn judge(
    spec: &Arc<TableSpec>,
    now: &SourceTable,
    question: Option<&SchemaQuery>,
    types: &TypeCatalog,
    policy: Policy<'_>,
) -> ShapeChange {
    decide(spec, now, question, types, policy).unwrap_or_else(ShapeChange::Recopy)
}

pub(super) fn decide(
    spec: &Arc<TableSpec>,
    now: &SourceTable,
    question: Option<&SchemaQuery>,
    types: &TypeCatalog,
    policy: Policy<'_>,
) -> Result<ShapeChange, String> {
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
            None => return Ok(ShapeChange::None),
        },
    };

    let options = PlanOptions {
        settings: policy.settings,
        null_unrepresentable: policy.null_unrepresentable,
        before: Some(spec.as_ref()),
    };
    let mut after = tables::plan(&table, types, options).map_err(|error| error.to_string())?;
    // Names of tables come from the catalogs and are changed elsewhere; the LSN of the copy stays.
    (after.source, after.target) = (spec.source.clone(), spec.target.clone());
    (after.copy_lsn, after.copy_xids) = (spec.copy_lsn, spec.copy_xids.clone());
    after.epoch = spec.epoch + 1;

    let last =
        after.columns.iter().map(|column| column.attnum).max().unwrap_or(0).max(known.last_attnum);
    after.fingerprint = tables::fingerprint_text(&Fingerprint {
        // Columns that came after those that the stream describes are still new to the stream.
        last_attnum: if question.is_some() { last } else { now.fingerprint.last_attnum },
        // The next look judges a new file and new partitions.
        files: if question.is_some() { known.files.clone() } else { now.fingerprint.files.clone() },
        inherits: if question.is_some() {
            known.inherits.clone()
        } else {
            now.fingerprint.inherits.clone()
        },
        // The next look also judges labels and fields that came since: rows may have been read
        // before these got the names that they have now.
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

    // Only a widening that the two shapes show is trusted, and no other cause of a rewrite.
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

        return Ok(if is_noted {
            ShapeChange::MetadataOnly(Box::new(after))
        } else {
            ShapeChange::None
        });
    }

    if question.is_some_and(|question| question.has_parts) {
        return Err(
            "it changed its shape inside a transaction too large for memory that had changed rows \
             before"
                .to_owned(),
        );
    }

    let reshape = SchemaChange { before: Arc::clone(spec), after: Arc::new(after), columns };
    if reshape.changes_key() && question.is_some_and(|question| question.has_open_rows) {
        return Err("its key changed inside a transaction that had changed rows before".to_owned());
    }

    Ok(ShapeChange::Alter(Box::new(reshape)))
}

/// Returns how a table is published otherwise than before: changes of the table in the meantime may
/// not have come.
pub(super) fn is_published_otherwise(
    known: &Fingerprint,
    found: &Fingerprint,
) -> Option<&'static str> {
    if (&known.listed, &known.schema) != (&found.listed, &found.schema) {
        return Some("it left its publication and came back, or is published in another way");
    }

    if known.publications != found.publications {
        return Some("its publication was altered, so changes between may not have come");
    }

    (known.row_filter != found.row_filter).then_some("its row filter is another one")
}

/// Finds changes of which the stream says nothing. Returns `Ok(true)` when the table was rewritten,
/// perhaps with other values.
pub(super) fn compare(
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
        // VACUUM FULL and CLUSTER change no row, and a table that a publication names allows no
        // other change of its file. A partition can be truncated without a message in the stream
        // (trap 61), and a table that is published with all others can have been UNLOGGED for a
        // while (trap 46).
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

/// Returns the partitions that came since. If a partition was born empty, as most are, rows came
/// into it only by the stream (trap 71); else its size says whether it holds rows. A file has its
/// table's oid until the first TRUNCATE or rewrite.
pub(super) fn new_leaves<'a>(
    known: &'a Fingerprint,
    now: &'a SourceTable,
) -> impl Iterator<Item = &'a LeafTable> {
    now.leaves.iter().filter(|leaf| !known.files.contains_key(&leaf.oid))
}

/// Returns the table as the stream describes it, with what the catalogs know of its columns, or
/// `None` when the table is as it is followed.
pub(super) fn described(
    spec: &TableSpec,
    known: &Fingerprint,
    now: &SourceTable,
    question: &SchemaQuery,
) -> Result<Option<SourceTable>, String> {
    let relation = &question.relation;

    // If the source itself says what the table was at this place of the stream, nothing is in
    // doubt.
    let description = question.description.as_ref().filter(|it| is_credible(it, now, question));

    let (mut candidates, last_attnum) = match description {
        Some(description) => (of_description(description), description.last_attnum),
        None => (now.columns.clone(), now.fingerprint.last_attnum),
    };

    // With REPLICA IDENTITY FULL every column is flagged, and only the catalogs know the key (trap
    // 49), as it is now. A key that has come since cannot be relied on before the stream has passed
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
        // A column that is gone now may have been replaced by a column of the same name before this
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
        // Columns that are there now and were there at the last copy were there in the meantime.
        // Every other column of the relation must be one of the first that came since; if any
        // column went since as well, it could be that column.
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

        // The trigger also describes columns that are not published.
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

/// Returns whether a description is the table's at the place of a question. The event trigger may
/// have been switched off for a change after the description, which then came without one; that
/// cannot happen inside the transaction that was described.
pub(super) fn is_credible(
    description: &Description,
    now: &SourceTable,
    question: &SchemaQuery,
) -> bool {
    // A column that is there now, and was there when it was described, was there in the meantime.
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

pub(super) fn of_description(description: &Description) -> Vec<SourceColumn> {
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
            .map(|(&oid, value)| (oid, value.as_deref().and_then(catalog::parse_singleton_array)))
            .collect(),
    };
    description.columns.iter().map(column).collect()
}
