//! `rhei compact`: the file gets small again, and nothing else changes.

use std::{fs, time::Duration};

use crate::{
    bed::{Load, Pgbench, oracle::query_copy},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

fn size(following: &Following) -> u64 {
    fs::metadata(following.copy()).unwrap().len()
}

fn compacted(following: &Following) -> serde_json::Value {
    serde_json::from_str(&following.rhei.run_ok(["compact", "--json"]).stdout).unwrap()
}

/// A table that grew by updates, beside things that somebody else put into the file.
fn grown(name: &str) -> Following {
    let following = Following::new(name);
    Pgbench::init(&following.db, 1);
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int, v text); CREATE TABLE \"we ird\" (id int \
         PRIMARY KEY, doc jsonb, t int);
         INSERT INTO t SELECT i, 0, md5(i::text) || md5((i + 1)::text) FROM generate_series(1, \
         300000) i;
         INSERT INTO \"we ird\" VALUES (1, '{\"a\": 1}'), (2, NULL)",
    );
    following.sync();
    query_made(
        &following,
        "CREATE TABLE mine AS SELECT 42 AS answer; CREATE VIEW seen AS SELECT count(*) AS n FROM \
         public.t",
    );
    for _ in 0..3 {
        following.db.execute("UPDATE t SET n = n + 1, v = md5(v) || v");
        following.sync();
    }
    following
}

/// What a user does with the file while no replicator has it.
fn query_made(following: &Following, sql: &str) {
    let connection = duckdb::Connection::open(following.copy()).unwrap();
    connection.execute_batch(sql).unwrap();
}

#[test]
fn compact_makes_the_file_small_and_keeps_every_row_and_what_else_is_in_it() {
    let following = grown("compacted");
    // Left by a crash half way.
    fs::write(following.folder.path().join("copy.duckdb.compacting"), "half a file").unwrap();
    fs::write(following.folder.path().join("copy.duckdb.compacting.wal"), "and a log").unwrap();
    let (before, report) = (size(&following), compacted(&following));
    let after = size(&following);
    assert!(after * 3 < before * 2, "{before} bytes became {after}: {report}");
    assert_eq!(report["after"]["file_bytes"], after, "{report}");
    assert_eq!(
        query_copy(following.copy(), "SELECT answer::VARCHAR FROM mine"),
        [[Some("42".to_owned())]]
    );
    assert_eq!(
        query_copy(following.copy(), "SELECT n::VARCHAR FROM seen"),
        [[Some("300000".to_owned())]]
    );
    following.assert_same(&["public.t", "public.we ird"]);
    following.db.execute("UPDATE t SET n = 0 WHERE id < 100; DELETE FROM t WHERE id > 299990");
    following.sync();
    following.assert_same(&["public.t", "public.we ird"]);
    let left: Vec<_> = fs::read_dir(following.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("compacting")), "{left:?}");
}

#[test]
fn a_running_replicator_compacts_between_two_cycles_and_goes_on() {
    let following = grown("compacted_running");
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let load = Pgbench::start(&following.db, &Load::seconds(600));
    for _ in 0..3 {
        let report = compacted(&following);
        assert!(report["rows"].as_u64().unwrap() >= 300_000, "{report}");
    }
    let status = || {
        serde_json::from_str::<serde_json::Value>(
            &following.rhei.run_ok(["status", "--json"]).stdout,
        )
        .unwrap()
    };
    crate::bed::wait_until(SOON, "commits go on", || {
        status()["commit_pause"]["since_start"]["max_ms"].is_number()
    });
    assert!(status()["file"]["file_bytes"].as_u64().unwrap() > 0, "{}", status());
    load.stop();
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t", "public.pgbench_accounts", "public.pgbench_history"]);
}

#[test]
fn compact_waits_for_copies_to_end_and_says_so() {
    let following = Following::new("compact_copying");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, \
                          md5(i::text) FROM generate_series(1, 200000) i",
    );
    let settings = fs::read_to_string(following.folder.path().join("rhei.toml")).unwrap();
    let rhei =
        following.rhei.clone().config(&format!("{settings}[backfill]\nrate_limit = \"1MB\"\n"));
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    crate::bed::wait_until(SOON, "a copy is on its way", || {
        rhei.run(["jobs"]).stdout.contains("running")
    });
    let refused = rhei.run(["compact"]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("tables are being copied"), "{}", refused.stderr);
}
