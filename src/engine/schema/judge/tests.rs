//! Tables of what happened to a table at the source, and of the verdicts.

mod look;
mod policies;
mod stream;

use std::collections::BTreeMap;

use super::*;
use crate::{
    Lsn,
    change::Key,
    engine::schema::samples::{
        AMOUNT, INT4, INT8, MOOD, NUMERIC, OID, PAIR, PAIR_CLASS, SAD, TEXT, TIMESTAMPTZ, column,
        followed, leaf, numeric, orders, relation, types,
    },
    pgoutput::{
        QualifiedName, ReplicaIdentity,
        table_description::{DescribedColumn, Description},
    },
    source::catalog::{EnumLabel, SourceColumn},
};

/// What happened to a table at the source.
type Change = fn(&mut SourceTable);

const REWRITTEN: &str =
    "copy: it was rewritten, as by ALTER COLUMN .. TYPE or a default that differs by row";
const REPUBLISHED: &str =
    "copy: it left its publication and came back, or is published in another way";
const CHANGED_AGAIN: &str = "copy: it changed again before it could be followed";
const WITH_ROWS: &str = "copy: a partition that holds rows was attached";
const OTHER_FILE: &str = "copy: its file was replaced, as by SET UNLOGGED and SET LOGGED";

/// A table that is published with all others.
fn with_all() -> SourceTable {
    let mut table = orders();
    table.fingerprint.publication_rows.clear();
    table
}

/// A partition tree with two leaves.
fn tree() -> SourceTable {
    let mut table = SourceTable { kind: b'p', leaves: vec![leaf(16410), leaf(16411)], ..orders() };
    table.fingerprint.files = BTreeMap::from([(16410, 16410), (16411, 16411)]);
    table.fingerprint.inherits =
        BTreeMap::from([(16410, "700".to_owned()), (16411, "700".to_owned())]);
    table.fingerprint.leaf_attributes = "700".to_owned();
    table
}

fn nothing(_: &mut SourceTable) {}

/// ALTER COLUMN, or RENAME COLUMN.
fn alter(table: &mut SourceTable, name: &str, change: impl FnOnce(&mut SourceColumn)) {
    let column = table.columns.iter_mut().find(|column| column.name == name).unwrap();
    change(column);
    table.fingerprint.attributes.insert(column.attnum, 900);
}

fn rename(table: &mut SourceTable, name: &str, to: &str) {
    alter(table, name, |column| column.name = to.to_owned());
}

fn retype(table: &mut SourceTable, name: &str, type_oid: u32, typmod: i32) {
    alter(table, name, |column| (column.type_oid, column.typmod) = (type_oid, typmod));
}

/// ADD COLUMN; `missing` is what older rows hold.
fn add(table: &mut SourceTable, name: &str, type_oid: u32, missing: Option<&str>) {
    let attnum = table.fingerprint.last_attnum + 1;
    let missing = table.leaves.iter().map(|leaf| (leaf.oid, missing.map(str::to_owned))).collect();
    table.columns.push(SourceColumn { missing, ..column(attnum, name, type_oid) });
    table.fingerprint.attributes.insert(attnum, 900);
    table.fingerprint.last_attnum = attnum;
}

/// DROP COLUMN.
fn remove(table: &mut SourceTable, name: &str) {
    let at = table.columns.iter().position(|column| column.name == name).unwrap();
    let column = table.columns.remove(at);
    table.fingerprint.attributes.remove(&column.attnum);
}

/// Gives a table, and all partitions of a tree, another file, as transaction 900.
fn refile(table: &mut SourceTable) {
    for leaf in &mut table.leaves {
        (leaf.file, leaf.changed_by) = (leaf.file + 1000, 900);
        table.fingerprint.files.insert(leaf.oid, leaf.file);
    }
}

/// `n` becomes a bigint.
fn widen(table: &mut SourceTable) {
    retype(table, "n", INT8, -1);
    refile(table);
}

fn set_key(table: &mut SourceTable, key: &[i16]) {
    table.primary_key = key.to_vec();
    table.fingerprint.key_index = 16999;
}

fn drop_key(table: &mut SourceTable) {
    table.primary_key.clear();
    table.is_primary_key_immediate = false;
    table.fingerprint.key_index = 0;
}

fn use_index(table: &mut SourceTable, key: &[i16]) {
    table.replica_identity = ReplicaIdentity::Index;
    table.identity_index = key.to_vec();
}

fn attach(table: &mut SourceTable, leaf: LeafTable) {
    table.fingerprint.files.insert(leaf.oid, leaf.file);
    table.fingerprint.inherits.insert(leaf.oid, "900".to_owned());
    table.leaves.push(leaf);
}

fn label(name: &str, is_original: bool) -> EnumLabel {
    EnumLabel { type_oid: MOOD, name: name.to_owned(), xmin: 900, is_original }
}

fn fields(is_original: bool) -> CompositeFields {
    CompositeFields { fields: "1 a 23 900".to_owned(), is_original }
}

/// A verdict as text. Of a change in place it names what differs: dropped columns, renamed ones,
/// those of another type with the type in DuckDB, new ones with the value of older rows, then the
/// replica identity and the key.
fn told(verdict: &ShapeChange) -> String {
    match verdict {
        ShapeChange::None => "same".to_owned(),
        ShapeChange::MetadataOnly(_) => "noted".to_owned(),
        ShapeChange::Alter(change) => format!("in place: {}", differences(change).join(", ")),
        ShapeChange::Recopy(reason) => format!("copy: {reason}"),
    }
}

fn differences(change: &SchemaChange) -> Vec<String> {
    let (before, after) = (&change.before, &change.after);
    let is_kept = |at: usize| change.columns.contains(&ColumnOrigin::Kept(at));

    let columns = before.columns.iter().enumerate();
    let mut found: Vec<String> = columns
        .filter(|(at, _)| !is_kept(*at))
        .map(|(_, column)| format!("-{}", column.name))
        .collect();

    for (column, origin) in after.columns.iter().zip(&change.columns) {
        match origin {
            ColumnOrigin::Kept(at) => found.extend(kept(&before.columns[*at], column)),
            ColumnOrigin::Added(None) => found.push(format!("+{}", column.name)),
            ColumnOrigin::Added(Some(value)) => found.push(format!("+{}='{value}'", column.name)),
        }
    }

    if before.replica_identity != after.replica_identity {
        found.push(format!("identity {:?}", after.replica_identity));
    }
    if change.changes_key() {
        found.push(key_of(after));
    }
    found
}

fn kept(before: &ColumnSpec, after: &ColumnSpec) -> Vec<String> {
    let is_renamed = before.name != after.name;
    let is_retyped = (before.type_oid, before.typmod) != (after.type_oid, after.typmod);

    let renamed = is_renamed.then(|| format!("{}>{}", before.name, after.name));
    let retyped = is_retyped.then(|| format!("{}:{}", after.name, after.mapping.target_type));
    renamed.into_iter().chain(retyped).collect()
}

fn key_of(table: &TableSpec) -> String {
    let names: Vec<&str> =
        table.key_columns().iter().map(|&at| table.columns[at].name.as_str()).collect();
    match &table.key {
        Key::Columns(_) => format!("key({})", names.join(", ")),
        Key::WholeRow => "rows whole".to_owned(),
        Key::AppendOnly => "append only".to_owned(),
    }
}

fn policy(settings: &TableSettings) -> Policy<'_> {
    Policy { settings, null_unrepresentable: false, trust_widening: false, truncated: None }
}

/// Judges a table by a look at the catalogs: a name, what happened, the verdict.
#[track_caller]
fn check(before: fn() -> SourceTable, cases: &[(&str, Change, &str)]) {
    let settings = TableSettings::default();

    for (name, change, expected) in cases {
        let (before, mut now) = (before(), before());
        change(&mut now);
        let verdict = classify(&followed(&before), &now, None, &types(), policy(&settings));
        assert_eq!(told(&verdict), *expected, "{name}");
    }
}

#[test]
fn two_fingerprints_tell_a_rewrite_from_what_is_harmless_and_from_what_is_not() {
    let (as_before, other_fields) = ("as before", "a composite type has other fields");
    let detached = "a partition was detached or dropped";
    let altered = "its publication was altered, so changes between may not have come";

    /// A name, the table before, what happened, and what a look and the stream find.
    type Compared<'a> = (&'a str, fn() -> SourceTable, Change, [&'a str; 2]);
    let cases: &[Compared<'_>] = &[
        ("nothing", orders, nothing, [as_before; 2]),
        ("a column", orders, |table| alter(table, "n", |_| {}), [as_before; 2]),
        ("a rewrite", orders, widen, ["rewritten"; 2]),
        ("a file", orders, refile, [as_before; 2]),
        (
            "a file, published with all",
            with_all,
            refile,
            [&OTHER_FILE["copy: ".len()..], as_before],
        ),
        (
            "a file of a partition",
            tree,
            refile,
            ["the file of a partition was replaced, as by TRUNCATE", as_before],
        ),
        (
            "a rewritten partition",
            tree,
            |table| {
                refile(table);
                table.fingerprint.leaf_attributes = "900".to_owned();
            },
            ["rewritten"; 2],
        ),
        (
            "a new composite that was altered",
            orders,
            |table| _ = table.fingerprint.composites.insert(16397, fields(false)),
            [other_fields, as_before],
        ),
        (
            "a composite",
            orders,
            |table| _ = table.fingerprint.composites.insert(PAIR_CLASS, fields(true)),
            [other_fields; 2],
        ),
        ("a type is gone", orders, |table| table.fingerprint.composites.clear(), [as_before; 2]),
        ("a detached partition", tree, |table| table.fingerprint.files.clear(), [detached; 2]),
        (
            "a detached partition, and another publication",
            tree,
            |table| {
                table.fingerprint.files.clear();
                table.fingerprint.publications.clear();
            },
            [altered; 2],
        ),
    ];

    for (name, before, change, expected) in cases {
        let (known, mut now) = (before().fingerprint, before());
        change(&mut now);
        let found = [true, false].map(|is_look| match compare(&known, &now, is_look, None) {
            Ok(true) => "rewritten".to_owned(),
            Ok(false) => "as before".to_owned(),
            Err(reason) => reason,
        });
        assert_eq!(found, *expected, "{name}");
    }
}
