//! What the stream says of a table, and what of that the catalogs confirm.

use super::*;

/// A question of the stream: a name, what had happened to the table at that place of the stream,
/// what has happened since, what else the stream says, the verdict.
type StreamCase = (&'static str, Change, Change, fn(&mut SchemaQuery, &SourceTable), &'static str);

fn plainly(_: &mut SchemaQuery, _: &SourceTable) {}

fn after_rows(question: &mut SchemaQuery, _: &SourceTable) {
    question.has_open_rows = true;
}

fn after_parts(question: &mut SchemaQuery, _: &SourceTable) {
    (question.has_open_rows, question.has_parts) = (true, true);
}

/// The event trigger has described the table in the same transaction,
fn signed(question: &mut SchemaQuery, then: &SourceTable) {
    question.description = Some(description(then, question.xid));
}

/// or in an earlier one.
fn signed_before(question: &mut SchemaQuery, then: &SourceTable) {
    question.description = Some(description(then, question.xid - 1));
}

fn description(table: &SourceTable, xid: u32) -> Description {
    let printed = |value: &String| format!("{{{value}}}");
    let column = |column: &SourceColumn| DescribedColumn {
        attnum: column.attnum,
        name: column.name.clone(),
        type_oid: column.type_oid,
        typmod: column.typmod,
        ndims: column.ndims,
        not_null: column.not_null,
        is_generated: column.is_generated,
        missing: column
            .missing
            .iter()
            .map(|(&oid, value)| (oid, value.as_ref().map(printed)))
            .collect(),
    };

    let columns = table.columns.iter().map(column).collect();
    Description { xid, oid: table.oid, last_attnum: table.fingerprint.last_attnum, columns }
}

#[track_caller]
fn check_stream(cases: &[StreamCase]) {
    let settings = TableSettings::default();

    for (name, change, change_since, ask, expected) in cases {
        let mut then = orders();
        change(&mut then);
        let mut now = then.clone();
        change_since(&mut now);

        let mut question = question(&then);
        ask(&mut question, &then);
        let spec = followed(&orders());
        let verdict = classify(&spec, &now, Some(&question), &types(), policy(&settings));
        assert_eq!(told(&verdict), *expected, "{name}");
    }
}

fn question(then: &SourceTable) -> SchemaQuery {
    SchemaQuery {
        relation: relation(then),
        commit_lsn: Lsn(100),
        xid: 7,
        description: None,
        has_open_rows: false,
        has_parts: false,
    }
}

/// A column comes at the place of the stream.
fn add_extra(table: &mut SourceTable) {
    add(table, "extra", INT4, Some("7"));
}

/// The last column is replaced by another one of the same name and type.
fn replace_last(table: &mut SourceTable) {
    remove(table, "p");
    add(table, "p", PAIR, None);
}

#[test]
fn the_stream_and_the_catalogs_have_to_agree_on_the_columns() {
    let extra = "in place: +extra='7'";
    let in_place = "in place: -p, +p";
    let replaced = "copy: a column was dropped and another one added";
    let remark: Change = |table| rename(table, "note", "remark");
    let drop_note: Change = |table| remove(table, "note");

    check_stream(&[
        ("the same columns", nothing, nothing, plainly, "same"),
        ("a column came", add_extra, nothing, plainly, extra),
        ("and another since", add_extra, |table| add(table, "b", INT4, None), plainly, extra),
        ("and went since", add_extra, |table| remove(table, "extra"), plainly, CHANGED_AGAIN),
        ("and an older one went since", add_extra, drop_note, plainly, CHANGED_AGAIN),
        ("a column went", drop_note, nothing, plainly, "in place: -note"),
        (
            "a column was replaced by one of its name",
            |table| {
                remove(table, "note");
                add(table, "note", TEXT, None);
            },
            nothing,
            plainly,
            CHANGED_AGAIN,
        ),
        ("the last column was replaced", replace_last, nothing, plainly, replaced),
        ("and the trigger tells", replace_last, nothing, signed, in_place),
        ("and the trigger told before", replace_last, nothing, signed_before, in_place),
        ("another name", remark, nothing, plainly, "in place: note>remark"),
        ("and another since", remark, |table| rename(table, "remark", "x"), plainly, CHANGED_AGAIN),
        (
            "and the trigger tells",
            remark,
            |table| rename(table, "remark", "x"),
            signed,
            "in place: note>remark",
        ),
        (
            "and the trigger told before, which is in doubt",
            remark,
            |table| rename(table, "remark", "x"),
            signed_before,
            CHANGED_AGAIN,
        ),
        (
            "a column that is not among those of the stream",
            drop_note,
            |table| *table = orders(),
            plainly,
            CHANGED_AGAIN,
        ),
    ]);
}

#[test]
fn the_stream_and_the_catalogs_have_to_agree_on_types_and_rewrites() {
    let longer: Change = |table| alter(table, "code", |column| column.typmod = 44);
    let with_zone: Change = |table| retype(table, "at", TIMESTAMPTZ, -1);
    let zone = "in place: at:TIMESTAMP WITH TIME ZONE";
    let open_rows = "copy: column \"at\" got another type inside a transaction that had changed \
                     rows before";

    check_stream(&[
        ("another type", longer, nothing, plainly, "in place: code:VARCHAR"),
        (
            "and another since",
            longer,
            |table| retype(table, "code", TEXT, -1),
            plainly,
            CHANGED_AGAIN,
        ),
        ("a rewrite", widen, nothing, plainly, REWRITTEN),
        ("another file, which the next look judges", nothing, refile, plainly, "same"),
        ("a type that prints otherwise", with_zone, nothing, plainly, zone),
        ("and rows had changed before", with_zone, nothing, after_rows, open_rows),
        (
            "a label was renamed",
            nothing,
            |table| {
                table.fingerprint.labels.insert(SAD, label("blue", false));
            },
            plainly,
            "copy: a label of an enum was renamed",
        ),
        (
            "a composite of which the next look judges whether it was altered",
            nothing,
            |table| {
                table.fingerprint.composites.insert(16397, fields(false));
            },
            plainly,
            "same",
        ),
    ]);
}

#[test]
fn the_stream_says_what_the_key_is_except_with_full() {
    let full: Change = |table| table.replica_identity = ReplicaIdentity::Full;
    let without: Change = |table| table.replica_identity = ReplicaIdentity::Nothing;
    let whole = "in place: identity Full, rows whole";

    check_stream(&[
        ("FULL", full, nothing, plainly, "same"),
        ("FULL, and another key since", full, |table| set_key(table, &[1]), plainly, whole),
        ("FULL, and no key since", full, drop_key, plainly, whole),
        ("NOTHING", without, nothing, plainly, "in place: identity Nothing, append only"),
        ("an index of the key", |table| use_index(table, &[1]), nothing, plainly, "same"),
        (
            "an index of another column",
            |table| use_index(table, &[3]),
            nothing,
            plainly,
            "in place: identity Index, key(code)",
        ),
        (
            "a wider key",
            |table| {
                add(table, "k", INT4, Some("3"));
                set_key(table, &[1, 9]);
            },
            nothing,
            plainly,
            "in place: +k='3', key(id, k)",
        ),
        (
            "a key of another column",
            |table| set_key(table, &[2]),
            nothing,
            plainly,
            "in place: key(n)",
        ),
    ]);
}

#[test]
fn rows_that_came_before_limit_what_a_transaction_may_change() {
    let nothing_identifies: Change = |table| table.replica_identity = ReplicaIdentity::Nothing;
    let too_large = "copy: it changed its shape inside a transaction too large for memory that \
                     had changed rows before";

    check_stream(&[
        ("a column", add_extra, nothing, after_rows, "in place: +extra='7'"),
        (
            "the key",
            nothing_identifies,
            nothing,
            after_rows,
            "copy: its key changed inside a transaction that had changed rows before",
        ),
        ("a column, after parts", add_extra, nothing, after_parts, too_large),
        ("the key, after parts", nothing_identifies, nothing, after_parts, too_large),
        ("nothing, after parts", nothing, nothing, after_parts, "same"),
    ]);
}

/// The stream brings a table into the shape of a moment; what the catalogs show beside it is of a
/// later one.
#[test]
fn what_came_after_the_place_of_the_stream_is_left_to_the_next_look() {
    let (before, mut then) = (orders(), orders());
    add_extra(&mut then);

    let mut now = then.clone();
    add(&mut now, "later", INT4, None);
    refile(&mut now);
    now.fingerprint.attributes.clone_from(&before.fingerprint.attributes);
    now.fingerprint.labels.insert(16393, label("glad", false));
    now.fingerprint.composites.insert(16397, fields(false));
    now.fingerprint.key_index = 16999;

    let (spec, settings) = (followed(&before), TableSettings::default());
    let verdict = classify(&spec, &now, Some(&question(&then)), &types(), policy(&settings));
    let ShapeChange::Alter(change) = &verdict else { panic!("{}", told(&verdict)) };

    let noted: Fingerprint = serde_json::from_str(&change.after.fingerprint).unwrap();
    let expected = Fingerprint { last_attnum: 9, key_index: 16999, ..before.fingerprint.clone() };
    assert_eq!((noted, change.after.epoch), (expected, 1));
}
