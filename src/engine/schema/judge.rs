//! Judges how the shape of a table changed, from two descriptions of the table, without any input
//! or output.

use std::sync::Arc;

use super::described::described;
use crate::{
    change::{ColumnOrigin, ColumnSpec, SchemaChange, TableSpec, followed::SchemaQuery},
    olap::lake,
    pipeline::{
        options::TableSettings,
        tables::{self, PlanOptions},
    },
    source::catalog::{CompositeFields, Fingerprint, LeafTable, SourceTable},
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

/// How [`classify`] decides.
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
pub(super) fn classify(
    spec: &Arc<TableSpec>,
    now: &SourceTable,
    question: Option<&SchemaQuery>,
    types: &TypeCatalog,
    policy: Policy<'_>,
) -> ShapeChange {
    decide(spec, now, question, types, policy).unwrap_or_else(ShapeChange::Recopy)
}

fn decide(
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

    let comparison = Comparison { spec, known: &known, now, question, types, policy };
    let mut after = comparison.next_shape(&table)?;
    let columns = comparison.column_origins(&after, &table)?;

    if rewritten && !comparison.is_only_widened(&after, &columns) {
        return Err("it was rewritten".to_owned());
    }

    if is_same_shape(spec, &after) {
        after.epoch = spec.epoch;
        return Ok(if has_newer_notes(spec, &after) {
            ShapeChange::MetadataOnly(Box::new(after))
        } else {
            ShapeChange::None
        });
    }

    comparison.alter(after, columns)
}

/// A table as it is followed, and what there is to compare the table with.
struct Comparison<'a> {
    spec: &'a Arc<TableSpec>,
    /// What the catalogs said when the table got the shape of `spec`.
    known: &'a Fingerprint,
    /// What the catalogs say now.
    now: &'a SourceTable,
    question: Option<&'a SchemaQuery>,
    types: &'a TypeCatalog,
    policy: Policy<'a>,
}

impl Comparison<'_> {
    /// Plans the table in its next shape.
    fn next_shape(&self, table: &SourceTable) -> Result<TableSpec, String> {
        let spec = self.spec;
        let options = PlanOptions {
            settings: self.policy.settings,
            null_unrepresentable: self.policy.null_unrepresentable,
            before: Some(spec.as_ref()),
        };

        let mut after =
            tables::plan(table, self.types, options).map_err(|error| error.to_string())?;

        // Names of tables come from the catalogs and are changed elsewhere; the LSN of the copy
        // stays.
        (after.source, after.target) = (spec.source.clone(), spec.target.clone());
        (after.copy_lsn, after.copy_xids) = (spec.copy_lsn, spec.copy_xids.clone());
        after.epoch = spec.epoch + 1;
        after.fingerprint = tables::fingerprint_text(&self.next_fingerprint(&after.columns));
        Ok(after)
    }

    /// Returns what the next look compares the table with. `columns` are those of the next shape.
    fn next_fingerprint(&self, columns: &[ColumnSpec]) -> Fingerprint {
        let (known, found) = (self.known, &self.now.fingerprint);
        if self.question.is_none() {
            return found.clone();
        }

        let last = columns.iter().map(|column| column.attnum).max().unwrap_or(0);
        Fingerprint {
            // Columns that came after those that the stream describes are still new to the stream.
            last_attnum: last.max(known.last_attnum),
            // The next look judges a new file and new partitions.
            files: known.files.clone(),
            inherits: known.inherits.clone(),
            // The next look also judges labels and fields that came since: rows may have been read
            // before these got the names that they have now.
            labels: known.labels.clone(),
            composites: known.composites.clone(),
            ..found.clone()
        }
    }

    /// Returns, for each column of the next shape, the origin of the values of older rows.
    fn column_origins(
        &self,
        after: &TableSpec,
        table: &SourceTable,
    ) -> Result<Vec<ColumnOrigin>, String> {
        let origin = |column: &ColumnSpec| -> Result<ColumnOrigin, String> {
            let mut columns = self.spec.columns.iter().enumerate();

            match columns.find(|(_, before)| before.attnum == column.attnum) {
                Some((at, before)) => {
                    self.judge_type(before, column)?;
                    Ok(ColumnOrigin::Kept(at))
                }
                None if column.attnum > self.known.last_attnum => {
                    Ok(ColumnOrigin::Added(self.value_of_older_rows(column, table)?))
                }
                None => {
                    Err(format!("column \"{}\" was there before, but was not copied", column.name))
                }
            }
        };

        after.columns.iter().map(origin).collect()
    }

    /// Refuses a change of a column's type that stored values do not go through in place.
    fn judge_type(&self, before: &ColumnSpec, after: &ColumnSpec) -> Result<(), String> {
        let was = Typed { type_oid: before.type_oid, mapping: &before.mapping };
        let is = Typed { type_oid: after.type_oid, mapping: &after.mapping };

        let found = in_place(was, is, self.types, self.policy.null_unrepresentable);
        if found == Some(InPlace::Reprinted) && self.has_open_rows() {
            return Err(format!(
                "column \"{}\" got another type inside a transaction that had changed rows before",
                after.name
            ));
        }

        let is_widened = self.policy.trust_widening && before.mapping.widens_to(&after.mapping);
        if found.is_none() && !is_widened {
            return Err(format!("column \"{}\" has another type", after.name));
        }

        Ok(())
    }

    /// Returns what rows hold in a new column that are older than the column.
    fn value_of_older_rows(
        &self,
        column: &ColumnSpec,
        table: &SourceTable,
    ) -> Result<Option<String>, String> {
        let declared = table.columns.iter().find(|declared| declared.attnum == column.attnum);
        let missing = declared.map(|declared| &declared.missing).into_iter().flatten();

        // Partitions that came later hold no older rows.
        let mut values =
            missing.filter(|(oid, _)| self.known.files.contains_key(oid)).map(|(_, value)| value);

        let first = values.next().cloned().flatten();
        if values.any(|value| *value != first) {
            return Err(format!(
                "older rows of its partitions differ in column \"{}\"",
                column.name
            ));
        }

        Ok(first)
    }

    /// Returns whether a widening explains that the table was rewritten. Only a widening that the
    /// two shapes show is trusted, and no other cause of a rewrite.
    fn is_only_widened(&self, after: &TableSpec, columns: &[ColumnOrigin]) -> bool {
        let is_widened = after.columns.iter().zip(columns).any(|(column, origin)| match origin {
            ColumnOrigin::Kept(at) => {
                self.spec.columns.get(*at).is_some_and(|before| before.mapping != column.mapping)
            }
            ColumnOrigin::Added(_) => false,
        });

        let is_added = columns.iter().any(|column| matches!(column, ColumnOrigin::Added(_)));
        is_widened && !is_added && self.now.kind != b'p'
    }

    /// Brings the table into another shape in place, unless rows that were read before keep the
    /// table from it.
    fn alter(&self, after: TableSpec, columns: Vec<ColumnOrigin>) -> Result<ShapeChange, String> {
        if self.question.is_some_and(|question| question.has_parts) {
            return Err(
                "it changed its shape inside a transaction too large for memory that had changed \
                 rows before"
                    .to_owned(),
            );
        }

        let reshape =
            SchemaChange { before: Arc::clone(self.spec), after: Arc::new(after), columns };
        if reshape.changes_key() && self.has_open_rows() {
            return Err(
                "its key changed inside a transaction that had changed rows before".to_owned()
            );
        }

        let layout = self.policy.settings.in_lake.as_ref();
        if layout.is_some_and(|layout| !lake::can_alter(&reshape, layout)) {
            return Err("it changed its shape in a way that a lake does not follow".to_owned());
        }

        Ok(ShapeChange::Alter(Box::new(reshape)))
    }

    fn has_open_rows(&self) -> bool {
        self.question.is_some_and(|question| question.has_open_rows)
    }
}

fn is_same_shape(before: &TableSpec, after: &TableSpec) -> bool {
    after.columns.len() == before.columns.len()
        && after.replica_identity == before.replica_identity
        && after.key == before.key
        && after.columns.iter().zip(&before.columns).all(|(after, before)| {
            (after.attnum, &after.name, after.type_oid, after.typmod, &after.mapping)
                == (before.attnum, &before.name, before.type_oid, before.typmod, &before.mapping)
        })
}

/// Returns whether something is newer about a table of the same shape.
fn has_newer_notes(before: &TableSpec, after: &TableSpec) -> bool {
    after.fingerprint != before.fingerprint
        || after
            .columns
            .iter()
            .zip(&before.columns)
            .any(|(after, before)| after.not_null != before.not_null)
}

/// Finds changes of which the stream says nothing. Returns `Ok(true)` when the table was rewritten,
/// perhaps with other values.
fn compare(
    known: &Fingerprint,
    now: &SourceTable,
    is_look: bool,
    truncated: Option<Truncated>,
) -> Result<bool, String> {
    let found = &now.fingerprint;
    let reason = is_published_otherwise(known, found)
        .or_else(|| partition_change(known, now))
        .or_else(|| type_change(known, found, is_look));

    if let Some(reason) = reason {
        return Err(reason.to_owned());
    }

    let is_other_file =
        known.files.iter().any(|(oid, file)| found.files.get(oid).is_some_and(|now| now != file));
    let is_altered =
        (&known.attributes, &known.leaf_attributes) != (&found.attributes, &found.leaf_attributes);

    if is_other_file
        && !is_altered
        && is_look
        && let Some(reason) = file_change(now, truncated)
    {
        return Err(reason.to_owned());
    }

    Ok(is_other_file && is_altered)
}

/// Returns how a table is published otherwise than before: changes of the table in the meantime may
/// not have come.
fn is_published_otherwise(known: &Fingerprint, found: &Fingerprint) -> Option<&'static str> {
    if (&known.publication_rows, &known.schema) != (&found.publication_rows, &found.schema) {
        return Some("it left its publication and came back, or is published in another way");
    }

    if known.publications != found.publications {
        return Some("its publication was altered, so changes between may not have come");
    }

    (known.row_filter != found.row_filter).then_some("its row filter is another one")
}

/// Returns how the partitions of a table changed so that rows came or went of which the stream says
/// nothing.
fn partition_change(known: &Fingerprint, now: &SourceTable) -> Option<&'static str> {
    let found = &now.fingerprint;
    if known.files.keys().any(|oid| !found.files.contains_key(oid)) {
        return Some("a partition was detached or dropped");
    }

    if known
        .inherits
        .iter()
        .any(|(oid, rows)| found.inherits.get(oid).is_some_and(|now| now != rows))
    {
        return Some("a partition was detached and attached again");
    }

    new_leaves(known, now)
        .any(|leaf| leaf.file != leaf.oid || leaf.pages != Some(0))
        .then_some("a partition that holds rows was attached")
}

/// Returns how a type that the columns use changed so that older rows print otherwise.
fn type_change(known: &Fingerprint, found: &Fingerprint, is_look: bool) -> Option<&'static str> {
    if known.labels.iter().any(|(oid, label)| found.labels.get(oid).is_some_and(|now| now != label))
    {
        return Some("a label of an enum was renamed");
    }

    let is_altered = |oid: &u32, now: &CompositeFields| match known.composites.get(oid) {
        Some(before) => before != now,
        // Rows may have been read before a field came.
        None => is_look && !now.is_original,
    };

    found
        .composites
        .iter()
        .any(|(oid, now)| is_altered(oid, now))
        .then_some("a composite type has other fields")
}

/// Returns why the new file of a table whose columns were not altered may hold other rows.
///
/// VACUUM FULL and CLUSTER change no row, and a table that a publication names allows no other
/// change of its file. A partition can be truncated without a message in the stream (trap 61), and
/// a table that is published with all others can have been UNLOGGED for a while (trap 46).
fn file_change(now: &SourceTable, truncated: Option<Truncated>) -> Option<&'static str> {
    if now.kind == b'p' {
        return Some("the file of a partition was replaced, as by TRUNCATE");
    }

    // The table still has the file that the TRUNCATE made if the row in pg_class is as the
    // TRUNCATE's transaction left it. And if the look did not see the TRUNCATE, the TRUNCATE has
    // since removed every row of the file that the look saw.
    let own = now.leaves.iter().find(|leaf| leaf.oid == now.oid);
    let is_its_file =
        |truncated: Truncated| own.is_some_and(|leaf| leaf.changed_by == truncated.by);
    let is_explained =
        truncated.is_some_and(|truncated| truncated.is_unseen || is_its_file(truncated));

    (now.fingerprint.publication_rows.is_empty() && !is_explained)
        .then_some("its file was replaced, as by SET UNLOGGED and SET LOGGED")
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

#[cfg(test)]
mod tests;
