//! Tables of what a start finds, and of what becomes of the copies.

use super::*;
use crate::{
    change::Pause,
    engine::schema::samples::{ORDERS, followed, orders, types},
    pipeline::options::TableSettings,
};

/// Gives the table settings of its own.
fn set(options: &mut Options, settings: TableSettings) {
    options.table_settings.insert("public.orders".to_owned(), settings);
}

fn paused(remedy: Remedy) -> TableState {
    TableState::Error(Pause { reason: "a value is too large".to_owned(), remedy })
}

/// A table of a source with several tables.
fn table(oid: u32) -> SourceTable {
    SourceTable { oid, name: QualifiedName::new("public", format!("t{oid}")), ..orders() }
}

fn stored(oid: u32, state: TableState, has_shadow: bool) -> StoredTable {
    StoredTable { has_shadow, ..StoredTable::of(&followed(&table(oid)), state) }
}

fn oids(oids: &[u32]) -> BTreeSet<u32> {
    oids.iter().copied().collect()
}

/// A name, the stored table, whether its copy is asked for, whether a task makes the copy, and what
/// becomes of the copy.
type CopyCase = (&'static str, fn(&mut StoredTable), bool, bool, NextCopy);

#[track_caller]
fn check(state: TableState, has_shadow: bool, cases: &[CopyCase]) {
    let (options, table, types) = (Options::sample(), orders(), types());
    let targets = BTreeMap::from([(ORDERS, table.name.clone())]);
    let before = StoredTable { has_shadow, ..StoredTable::of(&followed(&table), state) };

    for (name, change, is_asked, is_active, expected) in cases {
        let mut stored = before.clone();
        change(&mut stored);

        let asked = if *is_asked { vec![table.name.clone()] } else { Vec::new() };
        let again = Recopy::Tables(asked);
        let wanted = Wanted {
            options: &options,
            again: &again,
            tables: std::slice::from_ref(&table),
            types: &types,
            targets: &targets,
        };

        let next = wanted.next_copy(&table, Some(&stored), *is_active);
        assert_eq!(next, *expected, "{name}");
    }
}

#[test]
fn a_copy_without_a_shadow_is_kept_when_it_is_good_and_no_other_is_asked_for() {
    let other_name = |stored: &mut StoredTable| stored.source = QualifiedName::new("public", "u");

    check(
        TableState::Live,
        false,
        &[
            ("live", |_| {}, false, false, NextCopy::Keep),
            ("live, and asked for", |_| {}, true, false, NextCopy::Copy),
            ("live, under another name", other_name, false, false, NextCopy::Keep),
            ("live, without columns", |it| it.columns.clear(), false, false, NextCopy::Copy),
            ("paused", |it| it.state = paused(Remedy::Operator), false, false, NextCopy::Keep),
            (
                "paused, and asked for",
                |it| it.state = paused(Remedy::Operator),
                true,
                false,
                NextCopy::Copy,
            ),
            ("pending", |it| it.state = TableState::Pending, false, false, NextCopy::Copy),
            ("copying", |it| it.state = TableState::Copying, false, false, NextCopy::Copy),
            ("catching up", |it| it.state = TableState::CatchingUp, false, false, NextCopy::Copy),
            ("resync", |it| it.state = TableState::Resync, false, false, NextCopy::Copy),
            ("published again", |it| it.state = TableState::Dropped, false, false, NextCopy::Copy),
        ],
    );
}

#[test]
fn a_shadow_goes_on_unless_another_one_is_wanted() {
    let other_name = |it: &mut StoredTable| it.source = QualifiedName::new("public", "u");
    let other_target = |it: &mut StoredTable| it.target = QualifiedName::new("public", "u");
    let is_whole = |it: &mut StoredTable| it.state = TableState::CatchingUp;

    check(
        TableState::Copying,
        true,
        &[
            ("a task copies the table", |_| {}, false, true, NextCopy::Keep),
            ("no task copies the table", |_| {}, false, false, NextCopy::Copy),
            ("it is asked for", |_| {}, true, false, NextCopy::StartOver),
            ("it is asked for while a task copies it", |_| {}, true, true, NextCopy::StartOver),
            ("it has another name", other_name, false, true, NextCopy::StartOver),
            ("it is to have another name", other_target, false, true, NextCopy::StartOver),
            ("no column is known", |it| it.columns.clear(), false, true, NextCopy::StartOver),
            ("it is whole", is_whole, false, false, NextCopy::Keep),
            ("it is whole, and asked for", is_whole, true, false, NextCopy::StartOver),
            ("resync", |it| it.state = TableState::Resync, false, true, NextCopy::Keep),
            (
                "resync, interrupted",
                |it| it.state = TableState::Resync,
                false,
                false,
                NextCopy::Copy,
            ),
        ],
    );
}

/// A name, the settings, the stored table, and whether another copy is wanted.
type SettingsCase = (&'static str, fn(&mut Options), fn(&mut StoredTable), bool);

fn as_text(options: &mut Options) {
    let column_types = BTreeMap::from([("price".to_owned(), "VARCHAR".to_owned())]);
    set(options, TableSettings { column_types, ..TableSettings::default() });
}

fn without_note(options: &mut Options) {
    let exclude_columns = vec!["note".to_owned()];
    set(options, TableSettings { exclude_columns, ..TableSettings::default() });
}

fn without_what_is_gone(options: &mut Options) {
    let exclude_columns = vec!["gone".to_owned()];
    set(options, TableSettings { exclude_columns, ..TableSettings::default() });
}

#[test]
fn the_settings_ask_for_another_copy() {
    let cases: &[SettingsCase] = &[
        ("the same settings", |_| {}, |_| {}, false),
        ("another type", as_text, |_| {}, true),
        ("a column less", without_note, |_| {}, true),
        (
            "a column less, as before",
            without_note,
            |it| it.excluded = vec!["note".to_owned()],
            false,
        ),
        (
            "another priority",
            |options| set(options, TableSettings { copy_priority: 7, ..TableSettings::default() }),
            |_| {},
            false,
        ),
        ("another type at the source", |_| {}, |it| it.columns[2].typmod = 24, false),
        ("nothing is stored", |_| {}, |it| it.columns.clear(), true),
        ("a column that is gone", without_what_is_gone, |_| {}, true),
        (
            "a column that is gone, and a pause",
            without_what_is_gone,
            |it| it.state = paused(Remedy::Operator),
            false,
        ),
        (
            "NULL for what made it pause",
            |options| options.null_unrepresentable = true,
            |it| it.state = paused(Remedy::AllowNulls),
            true,
        ),
        ("no NULL", |_| {}, |it| it.state = paused(Remedy::AllowNulls), false),
        (
            "NULL, which does not help",
            |options| options.null_unrepresentable = true,
            |it| it.state = paused(Remedy::Operator),
            false,
        ),
    ];

    for (name, change_options, change, expected) in cases {
        let (mut options, table) = (Options::sample(), orders());
        change_options(&mut options);
        let mut stored = StoredTable::of(&followed(&table), TableState::Live);
        change(&mut stored);

        let is_wanted = wants_another_copy(&options, &table, &stored, &types());
        assert_eq!(is_wanted, *expected, "{name}");
    }
}

/// Compares tables: the stored ones, the published ones, those that are asked for, those that a
/// task copies.
fn reconciled(
    known: Vec<StoredTable>,
    published: &[u32],
    asked: &[u32],
    active: &[u32],
) -> Reconciled {
    let (options, types) = (Options::sample(), types());
    let tables: Vec<SourceTable> = published.iter().map(|&oid| table(oid)).collect();
    let known: BTreeMap<u32, StoredTable> =
        known.into_iter().map(|stored| (stored.oid, stored)).collect();
    let targets = target_names(&options, &selection::names_of(&tables), &known);
    let again = Recopy::Tables(asked.iter().map(|&oid| table(oid).name).collect());

    let wanted = Wanted {
        options: &options,
        again: &again,
        tables: &tables,
        types: &types,
        targets: &targets,
    };
    Reconciled::of(&wanted, &known, |oid| active.contains(&oid))
}

/// A name, what is found, and the expected tables: those that are gone, whose shadows are given up,
/// that need a copy, that are new.
type FoundCase<'a> = (&'a str, Reconciled, [&'a [u32]; 4]);

#[test]
fn tables_of_the_source_and_of_the_copy_are_compared() {
    let live = |oid: u32| stored(oid, TableState::Live, false);
    let copying = |oid: u32| stored(oid, TableState::Copying, true);
    let whole = |oid: u32| stored(oid, TableState::CatchingUp, true);
    let dropped = |oid: u32| stored(oid, TableState::Dropped, false);

    let cases: &[FoundCase<'_>] = &[
        ("nothing is known", reconciled(vec![], &[1, 2], &[], &[]), [&[], &[], &[1, 2], &[1, 2]]),
        ("all is well", reconciled(vec![live(1), live(2)], &[1, 2], &[], &[]), [&[]; 4]),
        (
            "a table is gone",
            reconciled(vec![live(1), live(2)], &[2], &[], &[]),
            [&[1], &[], &[], &[]],
        ),
        (
            "a table is gone while it is copied",
            reconciled(vec![copying(1)], &[], &[], &[1]),
            [&[1], &[1], &[], &[]],
        ),
        ("a table was gone before", reconciled(vec![dropped(1)], &[], &[], &[]), [&[]; 4]),
        ("a table came back", reconciled(vec![dropped(1)], &[1], &[], &[]), [&[], &[], &[1], &[]]),
        (
            "a copy was interrupted",
            reconciled(vec![copying(1)], &[1], &[], &[]),
            [&[], &[], &[1], &[]],
        ),
        ("a copy goes on", reconciled(vec![copying(1)], &[1], &[], &[1]), [&[]; 4]),
        ("a copy is whole", reconciled(vec![whole(1)], &[1], &[], &[]), [&[]; 4]),
        (
            "a table is asked for",
            reconciled(vec![live(1), live(2)], &[1, 2], &[2], &[]),
            [&[], &[], &[2], &[]],
        ),
        (
            "a table is asked for while it is copied",
            reconciled(vec![whole(1), live(2)], &[1, 2], &[1], &[1]),
            [&[], &[1], &[1], &[]],
        ),
    ];

    for (name, found, [gone, abandoned, to_copy, new]) in cases {
        let expected = Reconciled {
            gone: oids(gone),
            abandoned: oids(abandoned),
            to_copy: oids(to_copy),
            new: oids(new),
        };
        assert_eq!(*found, expected, "{name}");
    }
}

#[test]
fn tables_are_marked_and_only_those_are_saved_that_the_target_has_otherwise() {
    let pause = || paused(Remedy::Operator);
    let gone = Reconciled { gone: oids(&[1]), ..Reconciled::default() };
    let gone_in_copy =
        Reconciled { gone: oids(&[1]), abandoned: oids(&[1]), ..Reconciled::default() };
    let over = Reconciled { abandoned: oids(&[1]), to_copy: oids(&[1]), ..Reconciled::default() };
    let copy = Reconciled { to_copy: oids(&[1]), ..Reconciled::default() };
    let keep = Reconciled::default();

    for (name, found, before, expected, is_saved) in [
        ("gone", &gone, (TableState::Live, false), (TableState::Dropped, false), true),
        (
            "gone while it is copied",
            &gone_in_copy,
            (TableState::Copying, true),
            (TableState::Dropped, false),
            true,
        ),
        ("starts over", &over, (TableState::Copying, true), (TableState::Resync, false), false),
        (
            "starts over after it was gone",
            &over,
            (TableState::Dropped, true),
            (TableState::Dropped, true),
            false,
        ),
        ("live, to copy", &copy, (TableState::Live, false), (TableState::Resync, false), true),
        ("paused, to copy", &copy, (pause(), false), (TableState::Resync, false), true),
        ("pending", &copy, (TableState::Pending, false), (TableState::Pending, false), false),
        ("goes on", &copy, (TableState::Copying, true), (TableState::Copying, true), false),
        ("live", &keep, (TableState::Live, false), (TableState::Live, false), false),
        ("paused", &keep, (pause(), false), (pause(), false), false),
    ] {
        let (state, has_shadow) = before;
        let mut tables = BTreeMap::from([(1, stored(1, state, has_shadow))]);
        let saved = found.mark(&mut tables);

        let after = &tables[&1];
        assert_eq!((after.state.clone(), after.has_shadow), expected, "{name}");
        assert_eq!(saved.iter().any(|row| row.state == after.state), is_saved, "{name}");
    }
}

#[test]
fn only_a_published_table_can_be_asked_for() {
    let (mut options, tables) = (Options::sample(), [table(1), table(2)]);
    options.publications = vec!["one".to_owned(), "two".to_owned()];
    let asked = |oids: &[u32]| {
        let again = Recopy::Tables(oids.iter().map(|&oid| table(oid).name).collect());
        judge_asked(&options, &again, &tables).map_err(|error| error.to_string())
    };

    assert_eq!(asked(&[]), Ok(()));
    assert_eq!(asked(&[2, 1]), Ok(()));
    let refused = asked(&[1, 3]).unwrap_err();
    assert!(refused.starts_with("no such table: public.t3\n"), "{refused}");
    assert!(refused.contains("that publication one, two brings here"), "{refused}");
}
