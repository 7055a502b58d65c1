//! A table as the stream describes it: which of the columns that the catalogs know a Relation
//! message means (trap 64).

use crate::{
    change::{
        TableSpec,
        followed::{SchemaQuery, fits},
    },
    pgoutput::{
        ReplicaIdentity,
        relation::Relation,
        table_description::{DescribedColumn, Description},
    },
    source::catalog::{self, Fingerprint, SourceColumn, SourceKey, SourceTable},
};

/// Returns the table as the stream describes it, with what the catalogs know of its columns, or
/// `None` when the table is as it is followed.
pub(super) fn described(
    spec: &TableSpec,
    known: &Fingerprint,
    now: &SourceTable,
    question: &SchemaQuery,
) -> Result<Option<SourceTable>, String> {
    let relation = &question.relation;
    let mut candidates = Candidates::of(now, question);
    let key_holds = key_holds(spec, known, now);

    if fits(spec, relation) {
        let is_another = candidates.may_have_replaced(spec, known);
        if is_another && !candidates.are_described {
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

    if !candidates.are_described {
        candidates.keep_first(relation.columns.len(), spec, known)?;
    }
    let Matched { columns, flagged } = candidates.matched(relation)?;

    let mut table = SourceTable { columns, ..now.clone() };
    identify(&mut table, relation.replica_identity, flagged, key_holds);
    Ok(Some(table))
}

/// The columns that the columns of a relation can be.
struct Candidates {
    columns: Vec<SourceColumn>,
    /// The highest `attnum` ever assigned.
    last_attnum: i16,
    /// The source itself has said what the table was at this place of the stream, so that nothing
    /// is in doubt. Else the columns are those that the catalogs have by now.
    are_described: bool,
}

/// The columns that a relation means, and the `attnum` of those that it flags as its key.
struct Matched {
    columns: Vec<SourceColumn>,
    flagged: Vec<i16>,
}

impl Candidates {
    fn of(now: &SourceTable, question: &SchemaQuery) -> Self {
        let description = question.description.as_ref().filter(|it| is_credible(it, now, question));

        let (columns, last_attnum) = match description {
            Some(description) => (of_description(description), description.last_attnum),
            None => (now.columns.clone(), now.fingerprint.last_attnum),
        };
        Self { columns, last_attnum, are_described: description.is_some() }
    }

    /// Returns whether a column that is gone now may have been replaced by a column of the same
    /// name before the relation was described.
    fn may_have_replaced(&self, spec: &TableSpec, known: &Fingerprint) -> bool {
        let is_gone = |attnum: i16| !self.columns.iter().any(|column| column.attnum == attnum);
        self.last_attnum > known.last_attnum
            && spec.columns.iter().any(|column| is_gone(column.attnum))
    }

    /// Keeps the columns of which a relation of `wanted` columns must consist, where only the
    /// catalogs know the columns.
    ///
    /// Columns that are there now and were there at the last copy were there in the meantime. Every
    /// other column of the relation must be one of the first that came since; if any column went
    /// since as well, it could be that column.
    fn keep_first(
        &mut self,
        wanted: usize,
        spec: &TableSpec,
        known: &Fingerprint,
    ) -> Result<(), String> {
        let (old, new): (Vec<_>, Vec<_>) =
            self.columns.iter().partition(|column| column.attnum <= known.last_attnum);

        let assigned = usize::try_from(self.last_attnum - known.last_attnum).unwrap_or(usize::MAX);
        let went = spec
            .columns
            .iter()
            .any(|column| !old.iter().any(|other| other.attnum == column.attnum))
            || new.len() < assigned;

        let kept = old.len();
        if wanted < kept || (wanted > kept && went) || wanted > self.columns.len() {
            return Err(changed_again());
        }

        self.columns.truncate(wanted);
        Ok(())
    }

    /// Finds the columns of a relation among the candidates, both in the order of the table.
    fn matched(&self, relation: &Relation) -> Result<Matched, String> {
        let mut columns: Vec<SourceColumn> = Vec::with_capacity(relation.columns.len());
        let mut flagged = Vec::new();
        let mut candidates = self.columns.iter();

        for wire in &relation.columns {
            let is_it = |column: &&SourceColumn| {
                (&column.name, column.type_oid, column.typmod)
                    == (&wire.name, wire.type_oid, wire.typmod)
            };

            // The trigger also describes columns that are not published.
            let column = if self.are_described {
                candidates.find(is_it)
            } else {
                candidates.next().filter(is_it)
            };
            let column = column.ok_or_else(changed_again)?;

            if wire.is_key {
                flagged.push(column.attnum);
            }
            columns.push(column.clone());
        }

        Ok(Matched { columns, flagged })
    }
}

fn changed_again() -> String {
    "it changed again before it could be followed".to_owned()
}

/// Returns whether the table had the key that it has now all the time since its last copy.
///
/// With REPLICA IDENTITY FULL every column is flagged, and only the catalogs know the key (trap
/// 49), as it is now. A key that has come since cannot be relied on before the stream has passed
/// it: until then rows are matched whole.
fn key_holds(spec: &TableSpec, known: &Fingerprint, now: &SourceTable) -> bool {
    let key: Vec<i16> = spec
        .key_columns()
        .iter()
        .filter_map(|&at| spec.columns.get(at))
        .map(|column| column.attnum)
        .collect();

    !key.is_empty()
        && known.key_index != 0
        && known.key_index == now.fingerprint.key_index
        && key.iter().all(|attnum| now.primary_key.contains(attnum))
        && key.len() == now.primary_key.len()
}

/// Sets the replica identity of a table, and the key that the relation flags.
fn identify(
    table: &mut SourceTable,
    replica_identity: ReplicaIdentity,
    flagged: Vec<i16>,
    key_holds: bool,
) {
    table.replica_identity = replica_identity;

    if replica_identity == ReplicaIdentity::Full {
        if !key_holds {
            table.primary_key.clear();
        }
        return;
    }

    match replica_identity {
        ReplicaIdentity::Index => table.identity_index = flagged,
        _ => {
            table.is_primary_key_immediate = true;
            table.primary_key = flagged;
        }
    }
    debug_assert!(!matches!(catalog::key_of(table), SourceKey::WholeRow));
}

/// Returns whether a description is the table's at the place of a question. The event trigger may
/// have been switched off for a change after the description, which then came without one; that
/// cannot happen inside the transaction that was described.
fn is_credible(description: &Description, now: &SourceTable, question: &SchemaQuery) -> bool {
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
            .map(|(&oid, value)| (oid, value.as_deref().and_then(catalog::parse_singleton_array)))
            .collect(),
    };
    description.columns.iter().map(column).collect()
}
