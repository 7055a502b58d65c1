//! From the first copy on: backfill, tables that come and go, idle sources, servers that restart.

use std::time::Duration;

use crate::{
    bed::{Cluster, ClusterOptions, oracle::query_copy, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn backfill_then_sync_goes_on_without_a_gap() {
    let following = Following::new("backfill_sync");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM \
         generate_series(1, 1000) i",
    );
    following.rhei.run_ok(["backfill"]);
    following.assert_same(&["public.t"]);
    following.db.execute("INSERT INTO t VALUES (0, 'later'); DELETE FROM t WHERE id = 5");
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Traps 13 and 15: its changes before the snapshot are in the copy already, those after come by
/// the stream.
#[test]
fn a_table_added_to_the_publication_is_copied_and_followed() {
    let following = Following::new("added_table");
    following.db.execute("CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1)");
    following.sync();
    following.db.execute(
        "CREATE TABLE b (id int PRIMARY KEY, v text); INSERT INTO b VALUES (1, 'before'); ALTER \
         PUBLICATION rhei ADD TABLE b;
         INSERT INTO b VALUES (2, 'published'); UPDATE b SET v = 'x' WHERE id = 1; INSERT INTO a \
         VALUES (2)",
    );
    following.sync();
    following.assert_same(&["public.a", "public.b"]);
    following.db.execute("DELETE FROM b WHERE id = 1; INSERT INTO b VALUES (3, 'after')");
    following.sync();
    following.assert_same(&["public.a", "public.b"]);
}

/// Trap 41: rows that came while the table was out are not in the stream.
#[test]
fn a_table_that_left_the_publication_and_came_back_is_copied_again() {
    let following = Following::new("came_back");
    following
        .db
        .execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)");
    following.sync();
    following.db.execute(
        "ALTER PUBLICATION rhei DROP TABLE b; INSERT INTO b VALUES (1); ALTER PUBLICATION \
                  rhei ADD TABLE b",
    );
    following.sync();
    following.assert_same(&["public.a", "public.b"]);
}

/// Trap 44: nothing on the wire says that a table is gone.
#[test]
fn a_dropped_table_keeps_its_copy_and_is_said_to_be_dropped() {
    let following = Following::new("dropped_table");
    following.db.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); INSERT \
                  INTO b VALUES (1)",
    );
    following.sync();
    following.db.execute("DROP TABLE b; INSERT INTO a VALUES (1)");
    following.sync();
    following.assert_same(&["public.a"]);
    let kept = query_copy(
        following.copy(),
        "SELECT (SELECT count(*) FROM public.b)::VARCHAR, state FROM _rhei.tables WHERE \
         source_name = 'b'",
    );
    assert_eq!(kept, [[Some("1".to_owned()), Some("dropped".to_owned())]]);
}

/// Trap 26: WAL that is none of our business does not stay for our sake.
#[test]
fn an_idle_publication_does_not_pin_wal() {
    let following = Following::new("idle");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE unpublished (v text)");
    following.db.execute("CREATE PUBLICATION rhei FOR TABLE t");
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    following
        .db
        .execute("INSERT INTO unpublished SELECT repeat('x', 1000) FROM generate_series(1, 40000)");
    let end = following.db.wal_lsn();
    let slot = following.slot();
    wait_until(SOON, "the slot passes WAL of an unpublished table", || {
        following.db.value(&format!(
            "SELECT confirmed_flush_lsn >= '{end}'::pg_lsn - 16777216 FROM pg_replication_slots \
             WHERE slot_name = '{slot}'"
        )) == "t"
    });
    running.stop(SOON).assert_code(0);
}

/// What an open transaction writes stays in the server's memory until somebody flushes it, and
/// nobody does for a while.
#[test]
fn sync_does_not_wait_for_wal_that_holds_no_commit_and_that_nobody_flushes() {
    let cluster = Cluster::start(ClusterOptions::durable());
    let following = Following::of(cluster.database("unflushed"));
    following
        .db
        .execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE open (id int PRIMARY KEY)");
    following.sync();
    let open = following.db.session();
    open.execute("BEGIN");
    // A flush may come in between by chance, but not each time.
    let has_not_waited = (1..=5).any(|number| {
        following.db.execute(&format!("INSERT INTO t VALUES ({number})"));
        open.execute(&format!("INSERT INTO open VALUES ({number})"));
        let end = following.db.value("SELECT pg_current_wal_insert_lsn()");
        following.sync();
        following.assert_same(&["public.t"]);
        following.db.value(&format!("SELECT pg_current_wal_flush_lsn() < '{end}'")) == "t"
    });
    assert!(has_not_waited, "each sync ended after a flush");
}

/// Trap 25: the server waits at shutdown until all its WAL is acknowledged.
#[test]
fn a_clean_shutdown_of_the_source_is_not_held_up_and_the_run_goes_on_after_it() {
    let cluster = Cluster::start(ClusterOptions::durable());
    let following = Following::of(cluster.database("restart"));
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE unpublished (v int); CREATE PUBLICATION \
         rhei FOR TABLE t",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.db.execute("INSERT INTO t VALUES (1); INSERT INTO unpublished VALUES (1)");
    let mark = running.log_mark();
    // Panics when the server does not stop in time.
    cluster.stop_fast();
    cluster.start_again();
    running.wait_for_log_after(mark, "following", SOON);
    following.db.execute("INSERT INTO t VALUES (2)");
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 5: what a killed server forgot of our acknowledgements comes again and is skipped.
#[test]
fn a_killed_source_repeats_nothing() {
    let cluster = Cluster::start(ClusterOptions::durable());
    let following = Following::of(cluster.database("killed_source"));
    following.db.execute("CREATE TABLE t (v int); ALTER TABLE t REPLICA IDENTITY FULL");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    for round in 0..3 {
        following.db.execute(&format!("INSERT INTO t SELECT {round} FROM generate_series(1, 100)"));
        let mark = running.log_mark();
        cluster.kill9();
        cluster.start_again();
        running.wait_for_log_after(mark, "following", SOON);
    }
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 12: it says what it waits for.
#[test]
fn slot_creation_waits_for_open_transactions_and_names_them() {
    let cluster = Cluster::start(ClusterOptions::default());
    let following = Following::of(cluster.database("waits"));
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY)");
    let open = following.db.session();
    open.execute("BEGIN; INSERT INTO t VALUES (1)");
    let mut running = following.rhei.spawn(["sync"]);
    running.wait_for_log("waiting for transactions", SOON);
    open.execute("COMMIT");
    running.wait(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}

#[test]
fn excluded_columns_and_other_names_and_types_are_kept_apart() {
    let following = Following::new("table_settings");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, secret text, n numeric); INSERT INTO t \
                  VALUES (1, 'hush', 1.5)",
    );
    let settings = format!(
        "[source]\nslot = \"{}\"\n[tables.\"public.t\"]\ntarget = \
         \"sales.orders\"\nexclude_columns = [\"secret\"]\n\
         columns.n.type = \"DECIMAL(10,2)\"\n",
        following.slot()
    );
    let rhei = following.rhei.clone().config(&settings);
    rhei.run_ok(["sync"]);
    following.db.execute("INSERT INTO t VALUES (2, 'hush', 2.25); UPDATE t SET n = 3 WHERE id = 1");
    rhei.run_ok(["sync"]);
    let rows =
        query_copy(following.copy(), "SELECT id::VARCHAR, n::VARCHAR FROM sales.orders ORDER BY 1");
    let row = |id: &str, n: &str| vec![Some(id.to_owned()), Some(n.to_owned())];
    assert_eq!(rows, [row("1", "3.00"), row("2", "2.25")]);
}

#[test]
fn check_status_and_init_say_what_is_there() {
    let following = Following::new("check_status");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE keyless (v text)");
    let checked = following.rhei.run_ok(["check"]);
    assert!(
        checked.stdout.contains("public.keyless")
            && checked.stdout.contains("REPLICA IDENTITY FULL"),
        "{}",
        checked.stdout
    );
    following.sync();
    let status = following.rhei.run_ok(["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["phase"], "running");
    assert_eq!(status["tables"][1]["source"], "public.t");
    assert_eq!(status["tables"][1]["state"], "live");
    assert!(status["source"]["wal_held_bytes"].is_u64(), "{status}");
    following.rhei.run_ok(["status"]);
    following.rhei.run_ok(["init", "--output", "made.toml"]);
    let made = following.rhei.run_ok(["--config", "made.toml", "check"]);
    assert!(made.stdout.contains("0 errors"), "{}", made.stdout);
    following.rhei.run(["init", "--output", "made.toml"]).assert_code(1);
}

/// A table in the target that rhei did not make is somebody's work.
#[test]
fn a_table_that_rhei_did_not_make_is_never_replaced() {
    let following = Following::new("foreign_table");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY)");
    let copy = duckdb::Connection::open(following.copy()).unwrap();
    copy.execute_batch("CREATE SCHEMA public; CREATE TABLE public.T AS SELECT 42 AS mine").unwrap();
    drop(copy);
    let output = following.rhei.run(["sync"]);
    output.assert_code(1);
    assert!(
        output.stderr.contains("public.t") && output.stderr.contains("did not put it there"),
        "{}",
        output.stderr
    );
    assert_eq!(
        query_copy(following.copy(), "SELECT mine::VARCHAR FROM public.t"),
        [[Some("42".to_owned())]]
    );
}

/// The file is locked by the replicator, so the replicator itself answers.
#[test]
fn status_asks_the_running_replicator() {
    let following = Following::new("status_running");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    let status: serde_json::Value =
        serde_json::from_str(&following.rhei.run_ok(["status", "--json"]).stdout).unwrap();
    assert_eq!(
        (&status["replicator"], &status["tables"][0]["state"]),
        (&"running".into(), &"live".into())
    );
    running.stop(SOON).assert_code(0);
    let status: serde_json::Value =
        serde_json::from_str(&following.rhei.run_ok(["status", "--json"]).stdout).unwrap();
    assert_eq!(status["replicator"], "stopped");
}

/// A first migration is followed from its first table on.
#[test]
fn an_empty_publication_is_waited_for_in_a_run() {
    let following = Following::new("empty_publication");
    following.db.execute("CREATE PUBLICATION rhei FOR ALL TABLES");
    let refused = following.rhei.run(["sync"]);
    refused.assert_code(1);
    assert!(
        refused.stderr.contains("no table of the source matches any table"),
        "{}",
        refused.stderr
    );

    let mut run = following.run();
    run.wait_for_log("waiting for the first table", SOON);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    run.wait_for_log("all tables are live", SOON);
    following.db.execute("INSERT INTO t VALUES (2)");
    following.wait_settled(&mut run);
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}

/// As by migrations that go back to the start.
#[test]
fn a_run_goes_on_when_its_last_table_is_dropped() {
    let following = Following::new("last_table");
    following
        .db
        .execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION rhei FOR ALL TABLES");
    let mut run = following.run();
    run.wait_for_log("all tables are live", SOON);
    following.db.execute("DROP TABLE t");
    run.wait_for_log("no longer published", SOON);
    following.wait_settled(&mut run);
    following.db.execute("CREATE TABLE next (id int PRIMARY KEY); INSERT INTO next VALUES (1)");
    following.wait_settled(&mut run);
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.next"]);
    following.rhei.run_ok(["sync"]);
}
