//! `settled_lsn` of a running replicator: up to there everything is in the copy, also what the
//! stream never mentions.

use std::time::Duration;

use serde_json::Value;

use crate::{
    bed::{Cluster, ClusterOptions, Running, rhei::wal_bytes, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

fn run(following: &Following) -> Running {
    let mut running =
        following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms").spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    running
}

fn status(following: &Following) -> Value {
    serde_json::from_str(&following.rhei.run_ok(["status", "--json"]).stdout).unwrap()
}

/// Each of these is killed or stopped right when it is said to be settled.
#[test]
fn what_is_settled_is_in_the_copy_also_when_the_stream_never_mentioned_it() {
    let following = Following::new("settled");
    following.db.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok');
         CREATE TABLE t (id int PRIMARY KEY, m mood, n int); INSERT INTO t VALUES (1, 'sad', 1), \
         (2, 'ok', 2);
         CREATE PUBLICATION rhei FOR ALL TABLES",
    );
    let silent = [
        "ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'",
        "ALTER TABLE t ALTER n TYPE int USING n * 100",
        "ALTER TABLE t ADD late text DEFAULT 'late'",
        "INSERT INTO t VALUES (3, 'ok', 3)",
        "ALTER TABLE t DROP n",
    ];
    let mut running = run(&following);
    for (number, change) in silent.into_iter().enumerate() {
        following.db.execute(change);
        following.wait_settled(&mut running);
        if number % 2 == 0 {
            running.kill9();
        } else {
            running.stop(SOON).assert_code(0);
        }
        following.assert_same(&["public.t"]);
        running = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms").spawn(["run"]);
    }
    following.db.execute("CREATE TABLE fresh (id int PRIMARY KEY); INSERT INTO fresh VALUES (7)");
    following.wait_settled(&mut running);
    assert_eq!(running.copies().last().map(String::as_str), Some("public.fresh"));
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t", "public.fresh"]);
}

/// WAL that belongs to no commit stays in memory for a while, and a walsender sends what is
/// flushed.
#[test]
fn an_idle_source_is_settled_in_a_moment_also_behind_wal_that_is_not_flushed() {
    let following = Following::new("settled_idle");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let mut running = run(&following);
    let mark = running.log_mark();
    following.db.execute("SELECT pg_logical_emit_message(false, 'rhei.test', 'not flushed')");
    following.rhei.wait_settled(&mut running, &following.db.wal_lsn(), Duration::from_secs(8));
    running.assert_no_copies_since(mark);
    assert_eq!(running.copies(), ["public.t"]);
    assert!(status(&following)["settled_lsn"].is_string());
    running.stop(SOON).assert_code(0);
    assert!(status(&following)["settled_lsn"].is_null());
}

/// As long as a table waits for its copy, the position stands still. A lock is in nobody's way.
#[test]
fn nothing_is_settled_while_a_table_waits_for_its_copy() {
    let following = Following::new("settled_later");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE other (id int PRIMARY KEY)",
    );
    let mut running = run(&following);
    following.wait_settled(&mut running);
    let settled = || wal_bytes(status(&following)["settled_lsn"].as_str().unwrap());

    let locker = following.db.session();
    locker.execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE");
    following.db.execute("INSERT INTO other VALUES (1)");
    following.wait_settled(&mut running);
    locker.execute("COMMIT");

    following.rhei.run_ok(["pause"]);
    following.db.execute("ALTER TABLE t ALTER v TYPE int USING 7");
    let rewritten_at = following.db.wal_lsn();
    running.wait_for_log("copying the table again table=public.t", SOON);
    std::thread::sleep(Duration::from_secs(1));
    assert!(settled() < wal_bytes(&rewritten_at), "settled although a table waits for its copy");
    following.rhei.run_ok(["resume"]);
    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t", "public.other"]);
}

/// A commit is in the WAL before it is visible, for as long as synchronous standbys do not answer:
/// a look at the catalogs that begins in between does not speak for it.
#[test]
fn a_commit_that_no_look_could_see_is_not_settled() {
    let cluster =
        Cluster::start(ClusterOptions::default().conf("synchronous_standby_names = 'nobody'"));
    let local = "synchronous_commit = local";
    cluster.maintenance().execute(&format!("ALTER SYSTEM SET {local}"));
    cluster.maintenance().execute("SELECT pg_reload_conf()");
    let following = Following::of(cluster.database("settled_unseen"));
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2)");
    let mut running = run(&following);
    following.wait_settled(&mut running);

    // A transaction that stays open and does not commit keeps nothing from being settled.
    let open = following.db.session();
    open.execute("BEGIN; SELECT txid_current()");
    following.db.execute("INSERT INTO t VALUES (3)");
    following.wait_settled(&mut running);
    open.execute("COMMIT");

    let session = following.db.session();
    let writer = std::thread::spawn(move || {
        session.execute("SET synchronous_commit = on");
        session.execute("ALTER TABLE t ADD COLUMN u uuid DEFAULT gen_random_uuid()");
    });
    wait_until(SOON, "the commit waits for a standby", || {
        following.db.value("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            != "0"
    });
    let written = following.db.wal_lsn();
    let too_early = following.rhei.try_settle(&mut running, &written, Duration::from_secs(3));
    assert!(too_early.is_err(), "settled although nobody sees the new column");

    cluster.maintenance().execute("ALTER SYSTEM SET synchronous_standby_names = ''");
    cluster.maintenance().execute("SELECT pg_reload_conf()");
    writer.join().unwrap();
    following.rhei.wait_settled(&mut running, &written, SOON);
    assert_eq!(running.copies(), ["public.t", "public.t"], "{}", running.logs());
    running.kill9();
    following.assert_same(&["public.t"]);
}
