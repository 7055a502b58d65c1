//! Tables of what is asked for, and of what a start follows.

use super::*;
use crate::{
    Checkpoint, Lsn,
    change::Remedy,
    engine::schema::samples::{followed, orders},
};

/// Returns a pipeline that follows slot "rhei" of cluster 71.
pub(super) fn pipeline() -> Pipeline {
    Pipeline {
        slot: "rhei".to_owned(),
        publications: vec!["rhei".to_owned()],
        publication_fingerprint: String::new(),
        system_id: "71".to_owned(),
        database: "shop".to_owned(),
        database_oid: 5,
        timeline: 1,
        phase: Phase::Running,
        checkpoint: Checkpoint { lsn: Lsn(1), commit_time_us: None },
    }
}

fn name(name: &str) -> QualifiedName {
    QualifiedName::new("public", name)
}

fn stored(oid: u32, state: TableState) -> StoredTable {
    let table = SourceTable { oid, name: name(&format!("t{oid}")), ..orders() };
    StoredTable::of(&followed(&table), state)
}

#[test]
fn a_request_for_copies_is_widened_and_never_narrowed() {
    let one = || Recopy::Tables(vec![name("t1")]);
    for (asked, found, expected) in [
        (Recopy::None, Recopy::None, Recopy::None),
        (one(), Recopy::None, one()),
        (Recopy::All, Recopy::None, Recopy::All),
        (Recopy::None, Recopy::AllOfSameCluster, Recopy::AllOfSameCluster),
        (one(), Recopy::AllOfSameCluster, Recopy::AllOfSameCluster),
        (Recopy::All, Recopy::AllOfSameCluster, Recopy::All),
        (Recopy::AllOfSameCluster, Recopy::All, Recopy::All),
        (Recopy::All, one(), Recopy::All),
        (Recopy::AllOfSameCluster, one(), Recopy::AllOfSameCluster),
    ] {
        let case = format!("{asked:?} and {found:?}");
        assert_eq!(asked.widen(found), expected, "{case}");
    }
}

#[test]
fn only_an_operator_may_take_a_file_to_another_cluster() {
    for (before, again, expected) in [
        (Phase::Running, Recopy::AllOfSameCluster, true),
        (Phase::Running, Recopy::All, false),
        (Phase::Creating, Recopy::None, true),
        (Phase::Creating, Recopy::Tables(Vec::new()), true),
        (Phase::Creating, Recopy::All, false),
        (Phase::PlainCopy, Recopy::None, false),
    ] {
        let found = has_to_stay_with_cluster(before, &again);
        assert_eq!(found, expected, "{before:?} and {again:?}");
    }
}

#[test]
fn tables_take_the_names_of_the_source_and_of_the_settings() {
    let live = || TableState::Live;

    for (case, state, source, target, expected) in [
        ("nothing has changed", live(), "t1", "t1", None),
        ("renamed at the source", live(), "t2", "t2", Some("t1")),
        ("renamed at the source, but not in the target", live(), "t2", "t1", Some("t1")),
        ("renamed in the settings", live(), "t1", "t2", Some("t1")),
        ("paused", TableState::Error(Pause::new("x".to_owned())), "t2", "t2", Some("t1")),
        ("dropped", TableState::Dropped, "t2", "t2", None),
    ] {
        let published = [SourceTable { oid: 1, name: name(source), ..orders() }];
        let targets = BTreeMap::from([(1, name(target))]);
        let mut by_oid = BTreeMap::from([(1, stored(1, state)), (9, stored(9, live()))]);

        let moves = renamed(&targets, &published, &mut by_oid);
        let from: Vec<_> = moves.iter().map(|(from, _)| from.clone()).collect();
        assert_eq!(from, Vec::from_iter(expected.map(name)), "{case}");

        if expected.is_some() {
            let now = &by_oid[&1];
            assert_eq!((&now.source, &now.target), (&name(source), &name(target)), "{case}");
        }
        assert_eq!(by_oid[&9].target, name("t9"), "{case}");
    }
}

/// Returns what a start with this table makes of it: whether it is followed, and in which list it
/// is besides.
fn taken_up(table: &StoredTable) -> (bool, &'static str) {
    let mut attached = Attached {
        pipeline: pipeline(),
        tables: Vec::new(),
        copying: BTreeMap::new(),
        catching_up: BTreeMap::new(),
        pending_copies: BTreeSet::new(),
        snapshot_slot: None,
        in_error: Vec::new(),
        truncated: BTreeMap::new(),
        ddl_secret: None,
    };
    attached.take_up(table, false);

    let lists = [
        ("copying", attached.copying.len()),
        ("catching up", attached.catching_up.len()),
        ("in error", attached.in_error.len()),
    ];
    let list = lists.iter().find(|(_, len)| *len > 0).map_or("", |(list, _)| list);
    (!attached.tables.is_empty(), list)
}

#[test]
fn a_start_follows_live_tables_and_those_with_a_shadow() {
    let paused = || TableState::Error(Pause { reason: String::new(), remedy: Remedy::Operator });

    for (state, has_shadow, expected) in [
        (TableState::Live, false, (true, "")),
        (TableState::Resync, true, (true, "copying")),
        (TableState::Copying, true, (true, "copying")),
        (TableState::CatchingUp, true, (true, "catching up")),
        (paused(), false, (false, "in error")),
        (TableState::Pending, false, (false, "")),
        (TableState::Copying, false, (false, "")),
        (TableState::CatchingUp, false, (false, "")),
        (TableState::Resync, false, (false, "")),
        (TableState::Dropped, false, (false, "")),
    ] {
        let table = StoredTable { has_shadow, ..stored(1, state) };
        assert_eq!(taken_up(&table), expected, "{:?}, shadow: {has_shadow}", table.state);
    }
}
