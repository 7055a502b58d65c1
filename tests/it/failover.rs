//! Slots that are gone, and primaries that are replaced: detected, refused, and with `on_slot_lost
//! = "resync"` mended by copying everything again. Failover slots go on without a loss.

use std::time::Duration;

use crate::{
    bed::{
        Cluster, ClusterOptions, Db, Output, Rhei, Running,
        cluster::{bin_dir, installed},
        oracle::query_copy,
        wait_until,
    },
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);
const LATER: Duration = Duration::from_secs(180);

/// In the log when everything is copied again.
const ANEW: &str = "every table is copied again with a new one";

fn with_table(db: Db) -> Following {
    let following = Following::of(db);
    following
        .db
        .execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')");
    following
}

fn resyncing(following: &Following) -> Rhei {
    following.rhei.clone().env("RHEI_SOURCE_ON_SLOT_LOST", "resync")
}

/// Ends its reader and drops the slot.
fn drop_slot(following: &Following) {
    let slot = following.slot();
    wait_until(SOON, "the slot is dropped", || {
        following.db.query(&format!(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = \
             '{slot}' AND active"
        ));
        following.db.try_query(&format!("SELECT pg_drop_replication_slot('{slot}')")).is_ok()
    });
}

fn wal_status(following: &Following) -> String {
    let slot = following.slot();
    following
        .db
        .value(&format!("SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{slot}'"))
}

/// Writes WAL until the server gives the slot up.
fn lose_slot(following: &Following) {
    wait_until(SOON, "the slot is lost", || {
        following.db.execute("INSERT INTO other VALUES (1); SELECT pg_switch_wal()");
        following.db.execute("CHECKPOINT");
        wal_status(following) == "lost"
    });
}

fn rows(following: &Following) -> Vec<Vec<Option<String>>> {
    query_copy(following.copy(), "SELECT id::VARCHAR, v FROM public.t ORDER BY id")
}

#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    output.assert_code(1);
    for word in words {
        assert!(output.stderr.contains(word), "expected {word:?} in:\n{}", output.stderr);
    }
}

/// Until a copy that is begun anew is live, and what came after it too.
#[track_caller]
fn goes_on_anew(running: &mut Running, mark: usize) {
    running.wait_for_log_after(mark, ANEW, SOON);
    running.wait_for_log_after(mark, "all tables are live", SOON);
}

#[test]
fn a_slot_that_was_dropped_meanwhile_is_refused_or_replaced() {
    let following = with_table(Cluster::shared().database("dropped_meanwhile"));
    following.sync();
    drop_slot(&following);
    following
        .db
        .execute("INSERT INTO t VALUES (2, 'not in the stream'); DELETE FROM t WHERE id = 1");
    let before = rows(&following);
    refused(
        &following.rhei.run(["sync"]),
        &["does not exist any more", "on_slot_lost = \"resync\""],
    );
    refused(
        &following.rhei.run(["run"]),
        &["does not exist any more", "on_slot_lost = \"resync\""],
    );
    assert_eq!(rows(&following), before);
    let output = resyncing(&following).run_ok(["sync"]);
    assert!(
        output.stderr.contains(ANEW) && output.stderr.contains("does not exist any more"),
        "{}",
        output.stderr
    );
    following.assert_same(&["public.t"]);
    following.db.execute("INSERT INTO t VALUES (3, 'followed')");
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 34.
#[test]
fn a_slot_that_was_made_again_is_replaced_when_the_settings_say_so() {
    let following = with_table(Cluster::shared().database("made_again"));
    following.sync();
    drop_slot(&following);
    following.db.execute("INSERT INTO t VALUES (2, 'lost')");
    following.db.query(&format!(
        "SELECT pg_create_logical_replication_slot('{}', 'pgoutput')",
        following.slot()
    ));
    refused(&following.rhei.run(["sync"]), &["moved past this copy", "on_slot_lost"]);
    let mut running = resyncing(&following).spawn(["run"]);
    goes_on_anew(&mut running, 0);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t"]);
}

#[test]
fn a_slot_that_is_dropped_under_a_running_replicator_stops_it() {
    let following = with_table(Cluster::shared().database("dropped_running"));
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    drop_slot(&following);
    refused(&running.wait(SOON), &["does not exist any more", "on_slot_lost = \"resync\""]);
    assert_eq!(rows(&following).len(), 1);
}

#[test]
fn a_slot_that_is_dropped_under_a_running_replicator_is_replaced_three_times() {
    let following = with_table(Cluster::shared().database("dropped_thrice"));
    let mut running = resyncing(&following).spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    for number in 2..5 {
        let mark = running.log_mark();
        drop_slot(&following);
        following.db.execute(&format!(
            "INSERT INTO t VALUES ({number}, 'x'); UPDATE t SET v = '{number}' WHERE id = 1"
        ));
        goes_on_anew(&mut running, mark);
    }
    drop_slot(&following);
    refused(&running.wait(SOON), &["does not exist any more", "3 times within an hour"]);
    // Another process begins to count anew.
    resyncing(&following).run_ok(["sync"]);
    following.assert_same(&["public.t"]);
}

/// What the copy had done so far is of the old slot's time.
#[test]
fn a_slot_that_is_dropped_while_tables_are_copied_is_replaced() {
    let following = with_table(Cluster::shared().database("dropped_copying"));
    following.db.execute(
        "CREATE TABLE large (id int PRIMARY KEY, v text); ALTER TABLE large ALTER v SET STORAGE \
         EXTERNAL;
         INSERT INTO large SELECT i, repeat('x', 1000) FROM generate_series(1, 4000) i",
    );
    let slowly = resyncing(&following)
        .env("RHEI_BACKFILL_RATE_LIMIT", "1MB")
        .env("RHEI_BACKFILL_CHUNK_SIZE", "1MB");
    let mut running = slowly.spawn(["run"]);
    running.wait_for_log("live table=\"public.t\"", SOON);
    let mark = running.log_mark();
    drop_slot(&following);
    following
        .db
        .execute("UPDATE large SET v = 'y' WHERE id % 7 = 0; DELETE FROM large WHERE id % 5 = 0");
    following.db.execute("INSERT INTO t VALUES (2, 'b')");
    goes_on_anew(&mut running, mark);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t", "public.large"]);
}

/// Trap 35.
#[test]
fn another_cluster_is_never_copied_over_this_copy() {
    let following = with_table(Cluster::shared().database("one_cluster"));
    following.sync();
    let before = rows(&following);
    let cluster = Cluster::start(ClusterOptions::default());
    let other = cluster.database("one_cluster");
    other.execute("CREATE TABLE t (id int PRIMARY KEY, v text)");
    for command in ["sync", "run"] {
        refused(&resyncing(&following).source(other.url()).run([command]), &["another cluster"]);
    }
    assert_eq!(rows(&following), before);
}

fn with_little_wal() -> Cluster {
    Cluster::start(
        ClusterOptions::default()
            .conf("max_slot_wal_keep_size = 16MB")
            .conf("max_wal_size = 48MB")
            .conf("min_wal_size = 32MB")
            .conf("wal_keep_size = 0"),
    )
}

/// Trap 33.
#[test]
fn a_slot_that_fell_too_far_behind_is_refused_or_replaced() {
    let cluster = with_little_wal();
    let following = with_table(cluster.database("behind"));
    following.db.execute("CREATE TABLE other (v int); CREATE PUBLICATION rhei FOR TABLE t");
    following.sync();
    lose_slot(&following);
    following.db.execute("INSERT INTO t VALUES (2, 'not in the stream')");
    let before = rows(&following);
    refused(
        &following.rhei.run(["sync"]),
        &["is lost", "max_slot_wal_keep_size", "on_slot_lost = \"resync\""],
    );
    assert_eq!(rows(&following), before);
    assert!(resyncing(&following).run_ok(["sync"]).stderr.contains(ANEW));
    following.assert_same(&["public.t"]);
    following.db.execute("INSERT INTO t VALUES (3, 'followed')");
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 33: the server ends the stream as if somebody had asked for it.
#[test]
fn a_slot_that_falls_too_far_behind_under_a_running_replicator_is_noticed() {
    let cluster = with_little_wal();
    let following = with_table(cluster.database("behind_running"));
    following.db.execute("CREATE TABLE other (v int); CREATE PUBLICATION rhei FOR TABLE t");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    running.signal("STOP");
    lose_slot(&following);
    running.signal("CONT");
    refused(&running.wait(SOON), &["is lost", "on_slot_lost = \"resync\""]);
    let mut running = resyncing(&following).spawn(["run"]);
    goes_on_anew(&mut running, 0);
    let mark = running.log_mark();
    running.signal("STOP");
    lose_slot(&following);
    following.db.execute("INSERT INTO t VALUES (2, 'not in the stream')");
    running.signal("CONT");
    goes_on_anew(&mut running, mark);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 36: the stream would go on without a word, with a row that the new primary never had.
#[test]
fn a_standby_that_was_promoted_before_it_had_everything_is_refused() {
    let primary = Cluster::start(ClusterOptions::durable());
    let following = with_table(primary.database("lagging"));
    following.sync();
    let standby = primary.standby();
    let replica = standby.replica_of(&following.db);
    wait_until(SOON, "the standby has the table", || {
        replica.try_query("SELECT 1 FROM t").is_ok_and(|rows| rows.len() == 1)
    });
    standby.stop_fast();
    following.db.execute("INSERT INTO t VALUES (2, 'only here')");
    following.sync();
    let before = rows(&following);
    assert_eq!(before.len(), 2);
    primary.stop_immediate();
    standby.start_again();
    replica.execute("SELECT pg_promote()");
    replica.execute("INSERT INTO t VALUES (3, 'only there')");
    // Also when somebody makes the slot there.
    for make_slot in [false, true] {
        if make_slot {
            replica.query(&format!(
                "SELECT pg_create_logical_replication_slot('{}', 'pgoutput')",
                following.slot()
            ));
        }
        for command in ["sync", "run"] {
            let output = following.rhei.clone().source(replica.url()).run([command]);
            refused(
                &output,
                &["has left this copy's history", "timeline 2", "on_slot_lost = \"resync\""],
            );
        }
        assert_eq!(rows(&following), before);
    }
    let output = resyncing(&following).source(replica.url()).run_ok(["sync"]);
    assert!(output.stderr.contains(ANEW) && output.stderr.contains("history"), "{}", output.stderr);
    crate::bed::assert_same(&replica, following.copy(), &["public.t"]);
}

#[test]
fn of_several_servers_the_primary_is_followed() {
    let primary = Cluster::start(ClusterOptions::durable());
    let following = with_table(primary.database("several"));
    let standby = primary.standby();
    let replica = standby.replica_of(&following.db);
    let (ports, name) = ([standby.port(), primary.port()], following.db.name());
    let [first, second] = ports;
    let both = format!(
        "postgresql://postgres@127.0.0.1:{first},127.0.0.1:{second}/{name}?sslmode=disable"
    );
    let rhei = following.rhei.clone().source(both);
    rhei.run_ok(["sync"]);
    following.db.execute("INSERT INTO t VALUES (2, 'b')");
    rhei.run_ok(["sync"]);
    following.assert_same(&["public.t"]);
    wait_until(SOON, "the standby has it all", || {
        replica.try_query("SELECT 1 FROM t").is_ok_and(|rows| rows.len() == 2)
    });
    primary.stop_immediate();
    refused(&rhei.run(["sync"]), &["a standby in recovery"]);
}

/// As after a restore that forgot the WAL: the catalogs take for kept what is not there.
#[test]
fn wal_that_is_gone_without_a_word_is_refused_or_replaced() {
    let cluster = Cluster::start(ClusterOptions::durable());
    let following = with_table(cluster.database("no_wal"));
    following.sync();
    for number in 2..6 {
        following
            .db
            .execute(&format!("INSERT INTO t VALUES ({number}, 'x'); SELECT pg_switch_wal()"));
    }
    following.db.execute("CHECKPOINT");
    let current = following.db.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    cluster.stop_fast();
    for entry in std::fs::read_dir(cluster.data().join("pg_wal")).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if name.len() == current.len() && name < current {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    cluster.start_again();
    let before = rows(&following);
    // Often enough for the server's refusal to come together with its answer now and then.
    for command in ["sync", "run", "sync", "run", "sync", "run", "sync", "run"] {
        refused(
            &following.rhei.clone().deadline(SOON).run([command]),
            &["is lost", "on_slot_lost"],
        );
    }
    assert_eq!(rows(&following), before);
    assert!(resyncing(&following).run_ok(["sync"]).stderr.contains(ANEW));
    following.db.execute("INSERT INTO t VALUES (6, 'followed')");
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 37. The copy goes on at the new primary, and has neither lost nor repeated anything.
#[test]
fn a_failover_slot_is_followed_to_the_new_primary() {
    let installed = installed();
    let found = match installed.iter().find(|(_, bin)| bin == bin_dir()) {
        Some(chosen) if chosen.0 >= 17 => Some(chosen),
        _ => installed.iter().find(|(major, _)| *major >= 17),
    };
    let Some((_, bin)) = found else {
        eprintln!("skipped: no PostgreSQL 17 or newer is installed (scripts/setup.sh matrix)");
        return;
    };
    let primary = Cluster::start_with_bin(bin, &ClusterOptions::durable());
    let following = with_table(primary.database("failover"));
    // What has no key shows a change that comes twice.
    following.db.execute("CREATE TABLE keyless (v int); ALTER TABLE keyless REPLICA IDENTITY FULL");
    primary.maintenance().query("SELECT pg_create_physical_replication_slot('standby', true)");
    let standby = primary.standby();
    standby.append_data_file(
        "bed.conf",
        &format!(
            "primary_conninfo = 'host=127.0.0.1 port={} user=postgres \
             dbname=postgres'\nprimary_slot_name = 'standby'\n\
             sync_replication_slots = on\nhot_standby_feedback = on\n",
            primary.port()
        ),
    );
    standby.restart();
    // No change is sent that the standby does not have.
    primary.maintenance().execute("ALTER SYSTEM SET synchronized_standby_slots = 'standby'");
    primary.maintenance().execute("SELECT pg_reload_conf()");
    let replica = standby.replica_of(&following.db);
    let both = format!(
        "postgresql://postgres@127.0.0.1:{},127.0.0.1:{}/{}?sslmode=disable",
        primary.port(),
        standby.port(),
        following.db.name()
    );
    let rhei = following.rhei.clone().source(both).env("RHEI_SOURCE_FAILOVER_SLOT", "true");
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    let slot = following.slot();
    let mut number = 0;
    wait_until(LATER, "the standby has the slot", || {
        number += 1;
        following.db.execute(&format!(
            "INSERT INTO t VALUES ({number} + 1, 'x'); INSERT INTO keyless VALUES ({number}); \
             SELECT pg_log_standby_snapshot()"
        ));
        std::thread::sleep(Duration::from_millis(200));
        let ready = format!(
            "SELECT 1 FROM pg_replication_slots WHERE slot_name = '{slot}' AND synced AND NOT \
             temporary \
             AND invalidation_reason IS NULL"
        );
        replica.try_query(&ready).is_ok_and(|rows| rows.len() == 1)
    });
    let mark = running.log_mark();
    primary.stop_fast();
    // A standby that is not yet promoted is no reason to give up.
    running.wait_for_log_after(mark, "in recovery", SOON);
    replica.execute("SELECT pg_promote()");
    replica.execute(
        "INSERT INTO t VALUES (-1, 'at the new primary'); INSERT INTO keyless VALUES (-1)",
    );
    running.wait_for_log_after(mark, "following", SOON);
    running.stop(SOON).assert_code(0);
    rhei.run_ok(["sync"]);
    crate::bed::assert_same(&replica, following.copy(), &["public.t", "public.keyless"]);
    assert!(rows(&following).len() > 2);
}

/// The setting may come later than the slot; older servers cannot do it.
#[test]
fn a_slot_that_is_there_becomes_a_failover_slot_where_the_server_can() {
    let following = with_table(Cluster::shared().database("becomes_failover"));
    following.sync();
    let output = following.rhei.clone().env("RHEI_SOURCE_FAILOVER_SLOT", "true").run(["sync"]);
    if Cluster::shared().major() < 17 {
        refused(&output, &["failover_slot", "PostgreSQL 17"]);
        return;
    }
    output.assert_code(0);
    let slot = following.slot();
    let query = format!("SELECT failover FROM pg_replication_slots WHERE slot_name = '{slot}'");
    assert_eq!(following.db.value(&query), "t");
}

/// It has no slot of ours, and says that it never heard of our history: neither makes the slot of
/// the new primary a lost one.
#[test]
fn an_old_primary_that_is_back_is_refused_and_nothing_is_copied_from_it() {
    let old = Cluster::start(ClusterOptions::default());
    let db = old.database("old_primary");
    db.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')");
    let new = old.standby();
    wait_until(SOON, "the standby has the table", || {
        new.replica_of(&db).try_query("SELECT FROM t").is_ok_and(|rows| rows.len() == 1)
    });
    new.promote();
    let promoted = new.replica_of(&db);
    wait_until(SOON, "the standby is the primary", || {
        promoted.value("SELECT pg_is_in_recovery()") == "f"
    });
    let following = Following::of(promoted);
    following.sync();
    following.db.execute("INSERT INTO t VALUES (2, 'new')");
    following.sync();
    let before = rows(&following);

    db.execute("INSERT INTO t VALUES (3, 'old')");
    for settings in ["stop", "resync"] {
        let to_old =
            following.rhei.clone().source(db.url()).env("RHEI_SOURCE_ON_SLOT_LOST", settings);
        refused(&to_old.run(["sync"]), &["an old primary that is back", "timeline 1"]);
        assert_eq!(rows(&following), before);
    }
    following.db.execute("INSERT INTO t VALUES (4, 'goes on')");
    following.sync();
    following.assert_same(&["public.t"]);
}
