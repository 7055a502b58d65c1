//! The first copy, and copies again: pieces of work that are seen, tried again, and never trusted
//! in part.

use std::time::Duration;

use crate::{
    bed::{Cluster, ClusterOptions, oracle::query_copy, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

fn jobs(following: &Following) -> Vec<serde_json::Value> {
    let output = following.rhei.run_ok(["jobs", "--json"]);
    serde_json::from_str::<serde_json::Value>(&output.stdout).unwrap().as_array().unwrap().clone()
}

/// Large enough to be copied in several pieces, for a second or so.
fn with_large_table(name: &str) -> Following {
    let following = Following::new(name);
    following.db.execute(
        "CREATE TABLE large (id int PRIMARY KEY, v text, n numeric(12,2)) WITH (autovacuum_enabled \
         = off);
         INSERT INTO large SELECT i, repeat(md5(i::text), 12), i / 7.0 FROM generate_series(1, \
         300000) i;
         CREATE TABLE small (id int PRIMARY KEY); INSERT INTO small VALUES (1)",
    );
    following
}

/// Trap 11: whoever lost its connection comes back to the same snapshot.
#[test]
fn a_worker_that_loses_its_connection_tries_its_piece_again() {
    let following = with_large_table("lost_worker");
    let mut running = following.rhei.spawn(["backfill"]);
    wait_until(SOON, "a worker that copies", || {
        following.db.value(
            "SELECT coalesce(bool_or(pg_terminate_backend(pid)), false) FROM (SELECT pid FROM \
             pg_stat_activity \
             WHERE datname = current_database() AND query LIKE 'COPY%large%' AND state = 'active' \
             LIMIT 1) s",
        ) == "t"
    });
    let log = running.wait_for_log("a chunk is tried again", SOON);
    assert!(log.contains("public.large"), "{log}");
    running.wait(SOON).assert_code(0);
    following.assert_same(&["public.large", "public.small"]);
    let jobs = jobs(&following);
    assert!(jobs.len() > 3, "{} jobs", jobs.len());
    assert!(jobs.iter().all(|job| job["status"] == "done"), "{jobs:?}");
    assert!(jobs.iter().any(|job| job["attempts"].as_u64() > Some(1)), "{jobs:?}");
    let rows: u64 = jobs.iter().map(|job| job["rows"].as_u64().unwrap()).sum();
    assert_eq!(rows, 300_001);
    // The same by SQL.
    let by_sql = query_copy(
        following.copy(),
        "SELECT sum(rows)::VARCHAR, count(DISTINCT status)::VARCHAR FROM _rhei.jobs",
    );
    assert_eq!(by_sql, [[Some("300001".to_owned()), Some("1".to_owned())]]);
    following.db.execute("DELETE FROM large WHERE id % 1000 = 0; INSERT INTO small VALUES (2)");
    following.sync();
    following.assert_same(&["public.large", "public.small"]);
}

/// The reason stands in the job too.
#[test]
fn a_piece_that_holds_a_value_which_cannot_be_kept_fails_with_the_reason() {
    let following = Following::new("failed_job");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric(5,2)); INSERT INTO t VALUES (1, \
                  1), (7, 'NaN')",
    );
    following.rhei.run(["sync"]).assert_code(1);
    let jobs = jobs(&following);
    let error = jobs[0]["error"].as_str().unwrap();
    assert_eq!(jobs[0]["status"], "failed");
    assert!(error.contains("NaN") && error.contains("id=7"), "{error}");
    let shown = following.rhei.run_ok(["jobs"]);
    assert!(shown.stdout.contains("1 failed") && shown.stdout.contains("NaN"), "{}", shown.stdout);
}

/// The old copy stays until the new one is swapped in; the replicator does it without a restart.
#[test]
fn resync_has_the_running_replicator_copy_a_table_again() {
    let following = Following::new("resync");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    let mark = running.log_mark();
    let output = following.rhei.run_ok(["resync", "public.t"]);
    assert!(output.stdout.contains("copies public.t again"), "{}", output.stdout);
    running.wait_for_log_after(mark, "all tables are live", SOON);
    following.rhei.run(["resync", "public.nowhere"]).assert_code(1);
    let listed = following.rhei.run_ok(["jobs", "--all"]);
    assert!(listed.stdout.contains("public.t pages 0.."), "{}", listed.stdout);
    following.db.execute("INSERT INTO t VALUES (2)");
    running.stop(SOON).assert_code(0);
    // Without a replicator the command does it itself.
    following.rhei.run_ok(["resync", "public.t"]);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// The limit is of all workers together. Only its lower bound is a matter of time: as much as it
/// says cannot have been taken sooner.
#[test]
fn a_rate_limit_holds_for_all_workers_together() {
    let following = Following::new("rate_limit");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text);
         INSERT INTO t SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 8000) i",
    );
    let started = std::time::Instant::now();
    following.rhei.clone().env("RHEI_BACKFILL_RATE_LIMIT", "2MB").run_ok(["backfill"]);
    assert!(
        started.elapsed() >= Duration::from_secs(2),
        "5 MB at 2 MB/s took {:?}",
        started.elapsed()
    );
    following.assert_same(&["public.t"]);
}

/// What the operator was told to do is enough: nothing else has to be run.
#[test]
fn a_paused_table_is_copied_again_once_the_settings_allow_it() {
    let following = Following::new("unpaused");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric(5,2)); INSERT INTO t VALUES (1, \
                  1), (7, 'NaN')",
    );
    following.rhei.run(["sync"]).assert_code(1);
    following.rhei.clone().env("RHEI_SYNC_ON_UNREPRESENTABLE", "null").run_ok(["sync"]);
    let rows = query_copy(following.copy(), "SELECT n::VARCHAR FROM public.t ORDER BY id");
    assert_eq!(rows, [[Some("1.00".to_owned())], [None]]);
}

/// Trap 39: a slot on a standby needs the primary's help, a copy does not.
#[test]
fn a_standby_gives_a_plain_copy_and_is_refused_as_a_source_to_follow() {
    let primary = Cluster::start(ClusterOptions::default());
    let origin = primary.database("standby");
    let standby = primary.standby();
    origin.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, repeat(i::text, 40) \
         FROM generate_series(1, 50000) i;
         CREATE TABLE p (id int, v date) PARTITION BY RANGE (id); CREATE TABLE p1 PARTITION OF p \
         FOR VALUES FROM (0) TO (10);
         INSERT INTO p VALUES (7, '2026-11-20'); CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE \
         TABLE m (m mood); INSERT INTO m VALUES ('ok')",
    );
    let replica = standby.replica_of(&origin);
    wait_until(SOON, "the standby has replayed", || {
        replica.try_query("SELECT 1 FROM m").is_ok_and(|rows| rows.len() == 1)
    });
    let following = Following::of(replica);
    following.rhei.run_ok(["backfill", "--no-slot"]);
    following.assert_same(&["public.t", "public.p", "public.m"]);
    let output = following.rhei.clone().target("second.duckdb").run(["sync"]);
    output.assert_code(1);
    assert!(
        output.stderr.contains("standby") && output.stderr.contains("hint: "),
        "{}",
        output.stderr
    );
}

/// DuckDB takes another compression for long values, which are many times slower to write
/// otherwise.
#[test]
fn columns_with_long_values_are_compressed_by_zstd_and_others_are_not() {
    let following = Following::new("long_values");
    let columns =
        "id int, title text, \"bo dy\" text, file bytea, doc json, tags text[], PRIMARY KEY (id)";
    let long = "(SELECT string_agg(md5((i * 1000 + j)::text), '') FROM generate_series(1, 150) j)";
    let rows = format!(
        "SELECT i, 'title ' || i % 7, {long}, convert_to({long}, 'UTF8'), \
         json_build_object('long', {long}), ARRAY[{long}]"
    );
    following.db.execute(&format!(
        "CREATE TABLE t ({columns}); INSERT INTO t {rows} FROM generate_series(1, 500) i;
         CREATE TABLE parts ({columns}) PARTITION BY RANGE (id); CREATE TABLE parts_1 PARTITION OF \
         parts FOR VALUES FROM (0) TO (10000);
         CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10000) TO (20000);
         INSERT INTO parts {rows} FROM generate_series(10001, 10500) i;
         CREATE TABLE short ({columns});
         INSERT INTO short SELECT i, 'title ' || i % 7, repeat('x', 1500), '\\x00', '[]' FROM \
         generate_series(1, 500) i;
         CREATE TABLE none ({columns})"
    ));
    following.sync();
    let tables = ["public.t", "public.parts", "public.short", "public.none"];
    let by_zstd = |table: &str| {
        let sql = format!(
            "SELECT DISTINCT column_name FROM pragma_storage_info('public.{table}') WHERE \
             compression = 'ZSTD' ORDER BY ALL"
        );
        query_copy(following.copy(), &sql).into_iter().flatten().flatten().collect::<Vec<_>>()
    };
    let as_expected = || {
        assert_eq!(by_zstd("t"), ["bo dy", "doc", "file"]);
        assert_eq!(by_zstd("parts"), ["bo dy", "doc", "file"]);
        assert_eq!(by_zstd("short"), [""; 0]);
        following.assert_same(&tables);
    };
    as_expected();
    following.db.execute(
        "UPDATE t SET title = 'new' WHERE id % 3 = 0; UPDATE t SET \"bo dy\" = 'short now' WHERE \
         id % 100 = 7; DELETE FROM parts WHERE id % 5 = 0;
         INSERT INTO none SELECT * FROM t WHERE id < 100",
    );
    following.sync();
    following.rhei.run_ok(["compact"]);
    as_expected();
}
