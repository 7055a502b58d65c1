//! Migrations that change many tables at once: one round of copies, and nothing else waits for it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::following::Following;

const SOON: Duration = Duration::from_secs(120);
const TABLES: usize = 500;

fn each(table: impl Fn(usize) -> String) -> String {
    (1..=TABLES).map(table).collect::<Vec<_>>().join(";\n")
}

fn with_tables(name: &str) -> Following {
    let following = Following::new(name);
    following.db.execute(&each(|i| {
        format!(
            "CREATE TABLE t{i} (id int PRIMARY KEY, n int); INSERT INTO t{i} SELECT i, i FROM \
             generate_series(1, 10) i"
        )
    }));
    following.db.execute("CREATE TABLE other (id int PRIMARY KEY, v text)");
    following.sync();
    following
}

fn names() -> Vec<String> {
    let mut names: Vec<String> = (1..=TABLES).map(|i| format!("public.t{i}")).collect();
    names.push("public.other".to_owned());
    names
}

/// `sync` once failed for more than 30 tables, and `run` began a session for each.
#[test]
fn tables_that_are_all_retyped_are_copied_in_one_round_while_the_others_go_on() {
    let retype = each(|i| {
        format!(
            "ALTER TABLE t{i} ALTER n TYPE bigint; INSERT INTO t{i} VALUES (11, 1 + (2::bigint ^ \
             40)::bigint)"
        )
    });
    for in_one in [true, false] {
        let following = with_tables("retyped");
        let mut running = following.run();
        running.wait_for_log("following the source", SOON);
        following.wait_until_in_step();
        // Commits of an unrelated table, before, during and after it.
        let (session, is_over) = (following.db.session(), Arc::new(AtomicBool::new(false)));
        let beside = std::thread::spawn({
            let is_over = Arc::clone(&is_over);
            move || {
                let mut number = 1000;
                while !is_over.load(Ordering::Relaxed) {
                    session.execute(&format!("INSERT INTO other VALUES ({number}, 'beside')"));
                    number += 1;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        if in_one {
            following.db.execute(&format!("BEGIN; {retype}; COMMIT"));
        } else {
            let session = following.db.session();
            retype.split(";\n").for_each(|statement| session.execute(statement));
        }
        following.wait_settled(&mut running);
        is_over.store(true, Ordering::Relaxed);
        beside.join().unwrap();
        following.wait_settled(&mut running);
        let status: serde_json::Value =
            serde_json::from_str(&following.rhei.run_ok(["status", "--json"]).stdout).unwrap();
        println!(
            "in one {in_one}: from commit to visible {}",
            status["commit_to_visible"]["since_start"]["max_ms"]
        );
        assert_eq!(running.copies().len(), TABLES, "{}", running.logs());
        let logs = running.logs();
        assert!(!logs.contains("attaching to the source again"), "{logs}");
        let rounds = logs.matches("under one snapshot").count();
        // A machine that stands still for a second between two statements costs another round.
        assert!(rounds >= 1 && rounds <= if in_one { 1 } else { 3 }, "{rounds} rounds: {logs}");
        running.stop(SOON).assert_code(0);
        let names = names();
        following.assert_same(&names.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

#[test]
fn a_sync_copies_all_tables_that_were_retyped_at_once() {
    let following = with_tables("retyped_sync");
    following.db.execute(&each(|i| {
        format!("ALTER TABLE t{i} ALTER n TYPE bigint; INSERT INTO t{i} VALUES (11, 0)")
    }));
    let synced = following.sync();
    assert_eq!(synced.stderr.matches(" copied table=").count(), TABLES, "{}", synced.stderr);
    assert_eq!(synced.stderr.matches("under one snapshot").count(), 1, "{}", synced.stderr);
    let names = names();
    following.assert_same(&names.iter().map(String::as_str).collect::<Vec<_>>());
}
