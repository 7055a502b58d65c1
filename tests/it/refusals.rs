//! Each wrong setting ends with one clear message and exit 1 or 2; what does not belong together is
//! refused.

use std::{fs, time::Duration};

use crate::{
    bed::{Cluster, ClusterOptions, Db, Rhei, temp_dir},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

/// Runs `sync` with this source and expects a failure whose message holds all of `words` and fits a
/// screen.
#[track_caller]
fn refused(rhei: &Rhei, arguments: &[&str], code: i32, words: &[&str]) {
    let output = rhei.run(arguments);
    output.assert_code(code);
    for word in words {
        assert!(output.stderr.contains(word), "expected {word:?} in:\n{}", output.stderr);
    }
    assert!(output.stderr.lines().count() <= 12, "longer than a screen:\n{}", output.stderr);
    assert!(!output.stderr.contains("panicked"), "{}", output.stderr);
}

fn with_table(name: &str) -> Following {
    let following = Following::new(name);
    following
        .db
        .execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')");
    following
}

#[test]
fn an_unreachable_host_is_named() {
    let folder = temp_dir();
    let rhei = Rhei::new(folder.path())
        .source("postgresql://nobody@127.0.0.1:1/none")
        .target("copy.duckdb");
    refused(&rhei, &["sync"], 1, &["error: ", "127.0.0.1", "hint: "]);
}

#[test]
fn a_wrong_password_is_said_and_never_shown() {
    let cluster = Cluster::start(ClusterOptions {
        hba: Some("local all postgres trust\nhost all all all scram-sha-256\n".to_owned()),
        ..ClusterOptions::default()
    });
    let db = cluster.database("password");
    db.execute("CREATE ROLE limited LOGIN REPLICATION PASSWORD 'right'");
    let url =
        format!("postgresql://limited:wrong-secret@127.0.0.1:{}/{}", cluster.port(), db.name());
    let folder = temp_dir();
    let rhei = Rhei::new(folder.path()).source(url).target("copy.duckdb");
    refused(&rhei, &["sync"], 1, &["password", "limited", "hint: "]);
    let output = rhei.run(["-v", "sync"]);
    assert!(
        !output.stderr.contains("wrong-secret") && !output.stdout.contains("wrong-secret"),
        "{}",
        output.stderr
    );
}

#[test]
fn a_missing_database_is_named() {
    let port = Cluster::shared().port();
    let folder = temp_dir();
    let url = format!("postgresql://postgres@127.0.0.1:{port}/no_such_db");
    refused(
        &Rhei::new(folder.path()).source(url).target("copy.duckdb"),
        &["sync"],
        1,
        &["no_such_db"],
    );
}

#[test]
fn wal_level_replica_is_refused_with_the_sql_that_mends_it() {
    let cluster =
        Cluster::start(ClusterOptions { wal_level: "replica", ..ClusterOptions::default() });
    let following = Following::of(cluster.database("wal_level"));
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY)");
    refused(&following.rhei, &["sync"], 1, &["wal_level", "ALTER SYSTEM SET wal_level"]);
    following.rhei.run_ok(["backfill", "--no-slot"]);
    following.assert_same(&["public.t"]);
}

#[test]
fn missing_privileges_are_said() {
    let following = with_table("privileges");
    let role = format!("plain_{}", following.db.name());
    following.db.execute(&format!("CREATE ROLE {role} LOGIN"));
    let rhei = following.rhei.clone().source(following.db.url_as(&role));
    let output = rhei.run(["sync"]);
    following.db.execute(&format!("DROP ROLE {role}"));
    output.assert_code(1);
    assert!(
        output.stderr.contains("error: ") && output.stderr.contains("hint: "),
        "{}",
        output.stderr
    );
}

/// Trap 30 and 40: a second reader loses.
#[test]
fn a_slot_in_use_is_refused() {
    let following = with_table("slot_in_use");
    following.sync();
    fs::copy(following.copy(), following.folder.path().join("second.duckdb")).unwrap();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let second = following.rhei.clone().target("second.duckdb");
    refused(&second, &["sync"], 1, &[following.slot(), "in use"]);
    running.stop(SOON).assert_code(0);
}

/// Trap 32.
#[test]
fn a_slot_that_rhei_did_not_make_is_never_touched() {
    let following = with_table("foreign_slot");
    let slot = following.slot();
    following.db.query(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
    refused(&following.rhei, &["sync"], 1, &[slot, "hint: "]);
    let count = following
        .db
        .value(&format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'"));
    assert_eq!(count, "1");
}

/// Trap 32: slot names are of the whole cluster.
#[test]
fn a_slot_of_another_database_is_refused() {
    let following = with_table("other_db_slot");
    let other = Cluster::shared().database("other_db_slot_owner");
    other.query(&format!(
        "SELECT pg_create_logical_replication_slot('{}', 'pgoutput')",
        following.slot()
    ));
    refused(&following.rhei, &["sync"], 1, &[following.slot()]);
    other.query(&format!("SELECT pg_drop_replication_slot('{}')", following.slot()));
}

#[test]
fn a_target_that_is_a_folder_or_no_database_is_refused() {
    let following = with_table("bad_targets");
    fs::create_dir(following.folder.path().join("folder.duckdb")).unwrap();
    refused(
        &following.rhei.clone().target("folder.duckdb"),
        &["sync"],
        1,
        &["folder.duckdb", "folder"],
    );
    let text = "this is a letter, not a database\n".repeat(400);
    fs::write(following.folder.path().join("letter.duckdb"), &text).unwrap();
    refused(&following.rhei.clone().target("letter.duckdb"), &["sync"], 1, &["letter.duckdb"]);
    assert_eq!(fs::read_to_string(following.folder.path().join("letter.duckdb")).unwrap(), text);
    refused(
        &following.rhei.clone().target("no/such/folder/a.duckdb"),
        &["sync"],
        1,
        &["no/such/folder"],
    );
}

/// DuckDB drops the torn end of a log, as after a crash; whatever else is wrong with a file or its
/// log is damage.
#[test]
fn a_damaged_target_is_refused_and_left_as_it_is() {
    let following = with_table("damaged");
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    following.db.execute("INSERT INTO t SELECT i FROM generate_series(100, 5000) i");
    running.wait_for_log("applied", SOON);
    // Its log stays.
    running.kill9();
    let log = following.folder.path().join("copy.duckdb.wal");
    let whole = [fs::read(following.copy()).unwrap(), fs::read(&log).unwrap()];
    assert!(whole[1].len() > 2000, "a log of {} bytes", whole[1].len());
    let middle = whole[1].len() / 2;
    for (file, at) in [(0, 4100), (1, middle)] {
        let mut damaged = whole.clone();
        damaged[file][at..at + 16].fill(0xff);
        fs::write(following.copy(), &damaged[0]).unwrap();
        fs::write(&log, &damaged[1]).unwrap();
        refused(
            &following.rhei,
            &["sync"],
            1,
            &["copy.duckdb", "is damaged", "hint: restore both"],
        );
        assert!(
            [fs::read(following.copy()).unwrap(), fs::read(&log).unwrap()] == damaged,
            "it was touched"
        );
    }
    fs::write(following.copy(), &whole[0]).unwrap();
    // The torn end is a loss, unless the slot still has it.
    fs::write(&log, &whole[1][..middle]).unwrap();
    let torn = following.rhei.run(["sync"]);
    assert!(
        torn.code() == Some(0) || torn.stderr.contains("moved past this copy"),
        "{}",
        torn.stderr
    );
    if torn.code() == Some(0) {
        following.assert_same(&["public.t"]);
    }
}

#[test]
fn a_target_that_somebody_reads_is_refused_and_taken_when_he_is_gone() {
    let following = with_table("read_target");
    following.sync();
    let reader = duckdb::Connection::open(following.copy()).unwrap();
    refused(
        &following.rhei,
        &["sync"],
        1,
        &["copy.duckdb", "in use by process", &std::process::id().to_string()],
    );
    drop(reader);
    following.sync();
    following.assert_same(&["public.t"]);
}

#[test]
fn a_target_locked_by_another_process_is_refused() {
    let following = with_table("locked_target");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    refused(&following.rhei, &["sync"], 1, &["copy.duckdb", &running.pid().to_string()]);
    running.stop(SOON).assert_code(0);
}

#[test]
fn wrong_settings_exit_2_and_name_key_and_line() {
    let folder = temp_dir();
    let rhei = |config: &str| {
        Rhei::new(folder.path())
            .source("postgresql://x@localhost/x")
            .target("c.duckdb")
            .config(config)
    };
    refused(
        &rhei("[sync]\nintervall = \"1s\"\n"),
        &["sync"],
        2,
        &["intervall", "interval", "line 2"],
    );
    refused(&rhei("[sync]\ninterval = \"soon\"\n"), &["sync"], 2, &["interval", "line 2"]);
    refused(&rhei("[source]\ntables = [\"a.b.c\"]\n"), &["sync"], 2, &["tables"]);
    refused(&rhei("[source\n"), &["sync"], 2, &["line 1"]);
    refused(&rhei(""), &["sink"], 2, &["sink"]);
}

#[test]
fn no_such_table_is_said() {
    let following = with_table("no_such_table");
    fs::write(
        following.folder.path().join("rhei.toml"),
        format!("[source]\nslot = \"{}\"\ntables = [\"public.nothing\"]\n", following.slot()),
    )
    .unwrap();
    refused(&following.rhei, &["sync"], 1, &["public.nothing"]);
    let following = with_table("no_such_table_again");
    following.sync();
    refused(
        &following.rhei,
        &["backfill", "--table", "public.nothing", "--force"],
        1,
        &["public.nothing"],
    );
}

#[test]
fn a_dropped_slot_is_refused_and_a_forced_backfill_mends_it() {
    let following = with_table("dropped_slot");
    following.sync();
    following.db.query(&format!("SELECT pg_drop_replication_slot('{}')", following.slot()));
    following.db.execute("INSERT INTO t VALUES (2, 'lost to the stream')");
    refused(&following.rhei, &["sync"], 1, &[following.slot(), "backfill --force"]);
    following.rhei.run_ok(["backfill", "--force"]);
    following.assert_same(&["public.t"]);
    following.db.execute("INSERT INTO t VALUES (3, 'followed')");
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 34: a slot of the same name that was made anew has lost what came between.
#[test]
fn a_slot_that_was_dropped_and_made_again_is_refused() {
    let following = with_table("remade_slot");
    following.sync();
    let slot = following.slot();
    following.db.query(&format!("SELECT pg_drop_replication_slot('{slot}')"));
    following.db.execute("INSERT INTO t VALUES (2, 'lost')");
    following.db.query(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
    refused(&following.rhei, &["sync"], 1, &["moved past this copy"]);
}

/// Trap 2: the server would go on from the slot's position without a word.
#[test]
fn a_restored_older_copy_is_refused() {
    let following = with_table("restored_copy");
    following.sync();
    let backup = following.folder.path().join("backup.duckdb");
    fs::copy(following.copy(), &backup).unwrap();
    following.db.execute("INSERT INTO t VALUES (2, 'b')");
    following.sync();
    fs::copy(&backup, following.copy()).unwrap();
    refused(&following.rhei, &["sync"], 1, &["moved past this copy", "backfill --force"]);
}

/// Trap 35.
#[test]
fn another_cluster_is_refused() {
    let following = with_table("first_cluster");
    following.sync();
    let cluster = Cluster::start(ClusterOptions::default());
    let other: Db = cluster.database("first_cluster");
    other.execute("CREATE TABLE t (id int PRIMARY KEY, v text)");
    let rhei = following.rhei.clone().source(other.url());
    refused(&rhei, &["sync"], 1, &["cluster"]);
}

/// Trap 41.
#[test]
fn a_publication_that_was_dropped_and_made_again_is_refused() {
    let following = with_table("remade_publication");
    following.sync();
    following.db.execute(
        "DROP PUBLICATION rhei; INSERT INTO t VALUES (2, 'lost'); CREATE PUBLICATION rhei \
                  FOR TABLE t",
    );
    refused(&following.rhei, &["sync"], 1, &["publication", "backfill --force"]);
}

/// Trap 42.
#[test]
fn a_publication_without_deletes_is_refused() {
    let following = with_table("half_publication");
    following.db.execute("CREATE PUBLICATION rhei FOR TABLE t WITH (publish = 'insert, update')");
    refused(&following.rhei, &["sync"], 1, &["publication", "delete"]);
}
