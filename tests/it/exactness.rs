//! What the stream brings, followed by `rhei run` and compared without a `sync` before: that would
//! heal by copying.

use std::time::Duration;

use crate::{
    bed::{Cluster, ClusterOptions, Running, oracle::query_copy, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

/// A run that looks at the catalogs often, once everything is live.
fn running(following: &Following) -> Running {
    let rhei = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms");
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    running
}

/// How many copies of tables a run has finished.
fn copies(running: &Running) -> usize {
    running.logs().lines().filter(|line| line.contains("INFO") && line.contains(" copied ")).count()
}

fn major() -> u32 {
    Cluster::shared().major()
}

#[test]
fn rows_of_a_table_with_a_generated_column_arrive_in_a_run_however_it_is_published() {
    let all = "CREATE PUBLICATION rhei FOR ALL TABLES";
    let named = "CREATE PUBLICATION rhei FOR TABLE gen, other";
    let schema = "CREATE PUBLICATION rhei FOR TABLES IN SCHEMA public";
    let ways = if major() >= 15 { vec!["", all, named, schema] } else { vec!["", all, named] };
    for publication in ways {
        let following = Following::new("generated");
        following.db.execute(
            "CREATE TABLE gen (id int PRIMARY KEY, b int GENERATED ALWAYS AS (id * 2) STORED, v \
             text);
             CREATE TABLE other (id int PRIMARY KEY); INSERT INTO gen (id) VALUES (0)",
        );
        if !publication.is_empty() {
            following.db.execute(publication);
        }
        following.sync();
        let mut run = running_after_sync(&following);
        let before = copies(&run);
        for id in 1..=10 {
            following.db.execute(&format!(
                "INSERT INTO gen (id) VALUES ({id}); INSERT INTO other VALUES ({id})"
            ));
        }
        following.db.execute("UPDATE gen SET v = 'x' WHERE id = 3; DELETE FROM gen WHERE id = 4");
        following.db.execute(
            "ALTER TABLE gen ADD late int DEFAULT 5; UPDATE gen SET late = 6 WHERE id = 5",
        );
        following.wait_until_in_step();
        assert!(run.is_running(), "{}", run.logs());
        assert_eq!(copies(&run), before, "{publication}: copied again\n{}", run.logs());
        run.stop(SOON).assert_code(0);
        following.assert_same(&["public.gen", "public.other"]);
    }
}

/// A run over a copy that is whole already.
fn running_after_sync(following: &Following) -> Running {
    let rhei = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms");
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    running
}

#[test]
fn a_table_with_a_generated_column_is_copied_once() {
    let following = Following::new("generated_once");
    following.db.execute(
        "CREATE TABLE gen (id int PRIMARY KEY, b int GENERATED ALWAYS AS (id * 2) STORED, v text);
         INSERT INTO gen (id) VALUES (0)",
    );
    following.sync();
    for id in 1..=3 {
        following
            .db
            .execute(&format!("INSERT INTO gen (id) VALUES ({id}); UPDATE gen SET v = 'u'"));
        let output = following.sync();
        assert!(!output.stderr.contains(" copied "), "{}", output.stderr);
        following.assert_same(&["public.gen"]);
    }
}

#[test]
fn a_generated_column_that_becomes_an_ordinary_one_is_copied_with_its_values() {
    let following = Following::new("expression_dropped");
    following.db.execute(
        "CREATE TABLE gen (id int PRIMARY KEY, b int GENERATED ALWAYS AS (id * 2) STORED);
         INSERT INTO gen (id) SELECT generate_series(1, 20)",
    );
    let mut run = running(&following);
    let mark = run.log_mark();
    following.db.execute("ALTER TABLE gen ALTER b DROP EXPRESSION; INSERT INTO gen VALUES (21, 7)");
    run.wait_for_log_after(mark, "all tables are live", SOON);
    following.db.execute("UPDATE gen SET b = 8 WHERE id = 21");
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);
    let rows =
        query_copy(following.copy(), "SELECT count(*)::VARCHAR, sum(b)::VARCHAR FROM public.gen");
    assert_eq!(rows, [[Some("21".to_owned()), Some("428".to_owned())]]);
}

/// A leaf's changes come as changes of the topmost root that any publication brings as a whole.
#[test]
fn a_leaf_is_no_table_of_its_own_where_another_publication_brings_its_root() {
    let leaf_too = ["CREATE PUBLICATION a2 FOR TABLE pt1", "CREATE PUBLICATION a2 FOR ALL TABLES"];
    for second in leaf_too {
        let following = Following::new("root_and_leaf");
        following.db.execute(&format!(
            "CREATE TABLE pt (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE pt1 PARTITION OF pt FOR VALUES FROM (0) TO (100);
             CREATE PUBLICATION a1 FOR TABLE pt WITH (publish_via_partition_root = true); {second};
             INSERT INTO pt VALUES (1, 'first')"
        ));
        let slot = following.slot().to_owned();
        let settings = "[source]\npublication = [\"a1\", \"a2\"]\n[sync]\ninterval = \"50ms\"\n";
        let settings =
            settings.replacen("[source]\n", &format!("[source]\nslot = \"{slot}\"\n"), 1);
        std::fs::write(following.folder.path().join("rhei.toml"), settings).unwrap();
        let run = running(&following);
        following
            .db
            .execute("INSERT INTO pt VALUES (2, 'new'); UPDATE pt SET v = 'u' WHERE id = 1");
        following.wait_until_in_step();
        run.stop(SOON).assert_code(0);
        following.assert_same(&["public.pt"]);
        let tables = query_copy(
            following.copy(),
            "SELECT source_name FROM _rhei.tables WHERE state = 'live' AND source_name LIKE 'pt%' \
             ORDER BY 1",
        );
        assert_eq!(tables, [[Some("pt".to_owned())]], "{second}");
    }
}

#[test]
fn different_column_lists_of_one_table_are_refused_before_anything_is_copied() {
    if major() < 15 {
        return;
    }
    let following = Following::new("column_lists");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, a int, b int); CREATE TABLE other (id int PRIMARY KEY);
         CREATE PUBLICATION a1 FOR TABLE t (id, a); CREATE PUBLICATION a2 FOR TABLE t (id, b), \
         other",
    );
    let slot = following.slot().to_owned();
    let settings = format!("[source]\nslot = \"{slot}\"\npublication = [\"a1\", \"a2\"]\n");
    std::fs::write(following.folder.path().join("rhei.toml"), settings).unwrap();
    let checked = following.rhei.run(["check"]);
    checked.assert_code(1);
    let refused = following.rhei.run(["sync"]);
    refused.assert_code(1);
    let lists = "is in two publications with different column lists";
    for (text, mend) in [
        (&checked.stdout, "ALTER PUBLICATION \"a2\" DROP TABLE \"public\".\"t\""),
        (&refused.stderr, "ALTER PUBLICATION .. SET TABLE with one list"),
    ] {
        assert!(text.contains("public.t") && text.contains(lists), "{text}");
        assert!(text.contains(mend), "{text}");
    }
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'");
    assert_eq!(following.db.value(&slots), "0");
    following
        .db
        .execute("ALTER PUBLICATION a2 SET TABLE t (id, a), other; INSERT INTO t VALUES (1, 2, 3)");
    following.sync();
    // Also when it comes later.
    following.db.execute("ALTER PUBLICATION a2 SET TABLE t (id, b), other");
    let refused = following.rhei.run(["sync"]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("different column lists"), "{}", refused.stderr);
}

#[test]
fn a_tree_with_a_foreign_partition_is_paused_with_its_reason_and_others_go_on() {
    let following = Following::new("foreign_leaf");
    following.db.execute(
        "CREATE FOREIGN DATA WRAPPER of_test; CREATE SERVER elsewhere FOREIGN DATA WRAPPER of_test;
         CREATE TABLE tree (id int, v text) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF tree FOR VALUES FROM (0) TO (10);
         CREATE FOREIGN TABLE far PARTITION OF tree FOR VALUES FROM (10) TO (20) SERVER elsewhere;
         ALTER TABLE tree REPLICA IDENTITY FULL; ALTER TABLE leaf REPLICA IDENTITY FULL;
         INSERT INTO tree VALUES (1, 'one'); CREATE TABLE other (id int PRIMARY KEY); INSERT INTO \
         other VALUES (1)",
    );
    let checked = following.rhei.run(["check"]);
    checked.assert_code(1);
    assert!(
        checked.stdout.contains("foreign or unlogged table (public.far)"),
        "{}",
        checked.stdout
    );
    let output = following.rhei.run(["sync"]);
    output.assert_code(1);
    assert!(
        output.stderr.contains("public.tree") && output.stderr.contains("public.far"),
        "{}",
        output.stderr
    );
    following.assert_same(&["public.other"]);
    // Without it the tree is copied.
    following.db.execute("ALTER TABLE tree DETACH PARTITION far");
    following.rhei.run_ok(["backfill", "--table", "public.tree", "--force"]);
    following.assert_same(&["public.tree", "public.other"]);
}

/// DuckDB takes a month for 30 days, and a day for 24 hours; to the source they are different
/// values.
#[test]
fn of_rows_that_duckdb_calls_equal_the_one_goes_that_the_source_deleted() {
    let following = Following::new("equal_rows");
    following.db.execute(
        "CREATE TABLE t (i interval, l interval[]); ALTER TABLE t REPLICA IDENTITY FULL;
         INSERT INTO t VALUES ('30 days', '{1 day}'), ('1 mon', '{24:00:00}'), ('720:00:00', \
         '{1 day}'),
                              ('30 days', '{24:00:00}'), ('1 mon', '{1 day}'), (NULL, NULL), ('1 \
                              mon', NULL)",
    );
    let run = running(&following);
    following.db.execute("DELETE FROM t WHERE i::text = '1 mon' AND l::text = '{24:00:00}'");
    following.wait_until_in_step();
    following.db.execute(
        "UPDATE t SET l = '{2 days}' WHERE i::text = '30 days' AND l::text = '{24:00:00}'",
    );
    following.db.execute(
        "DELETE FROM t WHERE i::text = '1 mon' AND l IS NULL; DELETE FROM t WHERE i::text \
                  = '720:00:00'",
    );
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
    following.rhei.run_ok(["compact"]);
    following.assert_same(&["public.t"]);
}

/// DuckDB's log holds the change of a type as a statement, and runs it again after a crash.
#[test]
fn a_zone_of_the_host_changes_no_value_when_a_log_is_replayed() {
    let following = Following::new("zone_replay");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, at timestamp, w timestamptz, n numeric(2,2));
         INSERT INTO t VALUES (1, '2024-01-01 12:00', '2024-07-01 12:00Z', 0.5), (2, 'infinity', \
         '-infinity', -0.25),
                              (3, '1883-11-18 12:03:57.5', '4713-01-01 00:00Z BC', 0), (4, NULL, \
                              NULL, NULL)",
    );
    let rhei = following
        .rhei
        .clone()
        .env("RHEI_SYNC_CATALOG_INTERVAL", "100ms")
        .env("TZ", "America/New_York");
    let mut run = rhei.spawn(["run"]);
    run.wait_for_log("all tables are live", SOON);
    let before = copies(&run);
    following.db.execute(
        "SET timezone = 'UTC';
         ALTER TABLE t ALTER at TYPE timestamptz, ALTER w TYPE timestamp, ALTER n TYPE numeric;
         ALTER TABLE t ADD late timestamptz DEFAULT '2024-03-31 01:30+02'; INSERT INTO t (id) \
         VALUES (5)",
    );
    following.wait_until_in_step();
    assert_eq!(copies(&run), before, "copied again\n{}", run.logs());
    // The log is not written into the file yet.
    run.kill9();
    let mut run = rhei.spawn(["run"]);
    run.wait_for_log("following the source", SOON);
    following.db.execute("UPDATE t SET at = '2025-01-01 12:00Z' WHERE id = 4");
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}

/// The old rows are the new type's without a rewrite, and print otherwise.
#[test]
fn a_type_that_prints_old_rows_otherwise_is_copied_and_one_that_does_not_is_altered_in_place() {
    let cases = [
        ("cidr", "inet", "('10.1.2.3/32'), ('10.1.0.0/16'), ('::1/128')", true),
        ("xml", "text", "('<?xml version=\"1.0\" encoding=\"UTF-8\"?><a/>'), ('<b/>')", true),
        ("regproc", "regprocedure", "('now'), ('pg_sleep')", true),
        ("oid", "regtype", "(23), (25), (4294967295)", true),
        ("int", "oid", "(-1), (7)", true),
        ("numeric(2,2)", "numeric", "(0.5), (-0.25), (0), (0.99)", false),
        ("numeric(2,2)", "numeric(40,2)", "(0.5), (-0.25), (0), (0.99)", false),
        ("numeric(10,2)", "numeric", "(0.5), (-0.25), (0), (-12345678.99)", false),
        ("varchar(3)[]", "varchar[]", "('{a,NULL}'), ('{}')", false),
        ("varchar(3)", "bpchar", "('a  '), (''), ('abc')", false),
        ("bit(3)", "varbit", "('101'), ('000')", false),
        ("timestamp(3)", "timestamp", "('2024-01-01 00:00:00.123'), ('infinity')", false),
        ("int[]", "int[][]", "('{}'), (NULL)", true),
    ];
    let following = Following::new("prints_otherwise");
    let mut tables = Vec::new();
    for (number, (from, _, values, _)) in cases.iter().enumerate() {
        following.db.execute(&format!(
            "CREATE TABLE t{number} (id serial PRIMARY KEY, v {from}); INSERT INTO t{number} (v) \
             VALUES {values}"
        ));
        tables.push(format!("public.t{number}"));
    }
    let mut run = running(&following);
    for (number, (_, to, _, is_copied)) in cases.iter().enumerate() {
        let mark = run.log_mark();
        following.db.execute(&format!(
            "ALTER TABLE t{number} ALTER v TYPE {to}; UPDATE t{number} SET id = id + 100 WHERE id \
             = 1"
        ));
        match is_copied {
            true => drop(run.wait_for_log_after(
                mark,
                &format!("copying the table again table=public.t{number} "),
                SOON,
            )),
            false => {
                run.wait_for_log_after(mark, "another shape", SOON);
            }
        }
    }
    following.wait_until_in_step();
    wait_until(SOON, "every copy is live", || {
        let status: serde_json::Value =
            serde_json::from_str(&following.rhei.run_ok(["status", "--json"]).stdout).unwrap();
        status["tables"].as_array().unwrap().iter().all(|table| table["state"] == "live")
    });
    let copied = run.logs();
    for (number, (from, to, _, is_copied)) in cases.iter().enumerate() {
        let is_said = copied.contains(&format!("copying the table again table=public.t{number} "));
        assert_eq!(is_said, *is_copied, "{from} to {to}\n{copied}");
    }
    run.stop(SOON).assert_code(0);
    following.assert_same(&tables.iter().map(String::as_str).collect::<Vec<_>>());
}

/// What became NULL for lack of room has room now.
#[test]
fn a_nan_that_was_stored_as_null_is_copied_when_the_column_can_hold_it() {
    let following = Following::new("nan_has_room");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric(5,2)); INSERT INTO t VALUES (1, \
                  'NaN'), (2, 1)",
    );
    let rhei = following.rhei.clone().env("RHEI_SYNC_ON_UNREPRESENTABLE", "null");
    let rhei = rhei.env("RHEI_SYNC_CATALOG_INTERVAL", "100ms");
    let mut run = rhei.spawn(["run"]);
    run.wait_for_log("all tables are live", SOON);
    let mark = run.log_mark();
    following.db.execute("ALTER TABLE t ALTER n TYPE numeric; INSERT INTO t VALUES (3, 2)");
    run.wait_for_log_after(mark, "all tables are live", SOON);
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}

/// A label may come and be renamed between two looks: neither name was known before.
#[test]
fn a_label_that_was_added_and_renamed_before_anybody_looked_is_noticed() {
    // Added, used, renamed; and a name that another label took over.
    let renamed = "ALTER TYPE mood RENAME VALUE 'new' TO 'newer'";
    let taken = "ALTER TYPE mood RENAME VALUE 'new' TO 'newer'; ALTER TYPE mood ADD VALUE 'new'";
    for (name, after) in [("renamed", renamed), ("taken", taken)] {
        let following = Following::new(name);
        following.db.execute(
            "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN feeling AS mood;
             CREATE TABLE t (id int PRIMARY KEY, m mood, d feeling, l mood[], n mood[][]); INSERT \
             INTO t VALUES (1, 'sad')",
        );
        following.sync();
        // One run that never looks, as one that is stopped before it does.
        let blind = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "1h");
        let mut run = blind.spawn(["run"]);
        run.wait_for_log("following the source", SOON);
        following.db.execute("INSERT INTO t VALUES (2, 'ok')");
        following.wait_until_in_step();
        following.db.execute("ALTER TYPE mood ADD VALUE 'new'");
        for (id, column) in ["m", "d", "l", "n"].iter().enumerate() {
            let value = match *column {
                "l" => "{sad,new,NULL}",
                "n" => "{{sad,new},{NULL,ok}}",
                _ => "new",
            };
            following
                .db
                .execute(&format!("INSERT INTO t (id, {column}) VALUES ({}, '{value}')", 10 + id));
        }
        following.wait_until_in_step();
        for statement in after.split("; ") {
            following.db.execute(statement);
        }
        run.stop(SOON).assert_code(0);
        let mut run = running_after_sync(&following);
        run.wait_for_log("all tables are live", SOON);
        assert!(run.logs().contains("renamed"), "{}", run.logs());
        following.db.execute("INSERT INTO t VALUES (3, 'newer')");
        following.wait_until_in_step();
        run.stop(SOON).assert_code(0);
        following.assert_same(&["public.t"]);
    }
}

#[test]
fn a_label_that_was_only_added_costs_no_copy() {
    let following = Following::new("added_label");
    following.db.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE t (id int PRIMARY KEY, m mood); \
         INSERT INTO t VALUES (1, 'sad')",
    );
    let mut run = running(&following);
    let before = copies(&run);
    following.db.execute("ALTER TYPE mood ADD VALUE 'glad'");
    following.db.execute("INSERT INTO t VALUES (2, 'glad')");
    following.wait_until_in_step();
    // Types that come whole are no doubt either.
    following.db.execute(
        "CREATE TYPE tone AS ENUM ('low', 'high'); ALTER TABLE t ADD tone tone; INSERT INTO t \
         VALUES (3, 'ok', 'low')",
    );
    following.wait_until_in_step();
    following.wait_settled(&mut run);
    assert_eq!(copies(&run), before, "copied again\n{}", run.logs());
    run.stop(SOON).assert_code(0);
    let output = following.sync();
    assert!(!output.stderr.contains(" copied "), "{}", output.stderr);
    following.assert_same(&["public.t"]);
}

#[test]
fn types_that_came_and_were_altered_before_anybody_looked_are_noticed() {
    let altered = [
        ("CREATE TYPE kind AS (a int, b int)", "(1,2)", "ALTER TYPE kind ADD ATTRIBUTE c int"),
        (
            "CREATE TYPE kind AS ENUM ('sad', 'ok')",
            "ok",
            "ALTER TYPE kind RENAME VALUE 'ok' TO 'fine'",
        ),
    ];
    for (create, value, alter) in altered {
        let following = Following::new("late_type");
        following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
        following.sync();
        for statement in [
            create,
            "ALTER TABLE t ADD k kind",
            &format!("INSERT INTO t VALUES (2, '{value}')"),
            alter,
        ] {
            following.db.execute(statement);
        }
        let mut run = running_after_sync(&following);
        run.wait_for_log("all tables are live", SOON);
        run.stop(SOON).assert_code(0);
        following.assert_same(&["public.t"]);
    }
}

/// The walsender decodes with the publication of then.
#[test]
fn options_of_a_publication_that_were_changed_and_changed_back_are_noticed() {
    let altered = [
        (
            "publish",
            "ALTER PUBLICATION rhei SET (publish = 'insert')",
            "ALTER PUBLICATION rhei SET (publish = 'insert, update, delete, truncate')",
        ),
        (
            "root",
            "ALTER PUBLICATION rhei SET (publish_via_partition_root = false)",
            "ALTER PUBLICATION rhei SET (publish_via_partition_root = true)",
        ),
    ];
    for (name, change, back) in altered {
        let following = Following::new(name);
        following.db.execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b');
             CREATE TABLE tree (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE leaf PARTITION OF tree FOR VALUES FROM (0) TO (10); INSERT INTO tree \
             VALUES (1, 'a'), (2, 'b');
             CREATE PUBLICATION rhei FOR TABLE t, tree WITH (publish_via_partition_root = true)",
        );
        following.sync();
        for stopped in [true, false] {
            let run = if stopped {
                None
            } else {
                // A look at the catalogs in between would refuse the publication.
                let run =
                    following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "1h").spawn(["run"]);
                following.db.execute("INSERT INTO t VALUES (20, 'x')");
                following.wait_until_in_step();
                Some(run)
            };
            following.db.execute(change);
            let id = if stopped { 1 } else { 2 };
            following.db.execute(&format!(
                "DELETE FROM t WHERE id = {id}; DELETE FROM tree WHERE id = {id}; INSERT INTO tree \
                 VALUES (3 + {id}, 'c')"
            ));
            following.db.execute(back);
            let mut run = run.unwrap_or_else(|| running_after_sync(&following));
            run.wait_for_log("all tables are live", SOON);
            following.wait_until_in_step();
            run.stop(SOON).assert_code(0);
            following.assert_same(&["public.t", "public.tree"]);
        }
    }
}

/// A walsender sends a transaction once its commit record is flushed, and the catalogs show it
/// after the standby's answer.
#[test]
fn a_shape_that_the_source_does_not_show_yet_is_waited_for() {
    let cluster = Cluster::start(ClusterOptions::durable().conf("wal_keep_size = 256MB"));
    let standby = cluster.standby();
    cluster.maintenance().execute("ALTER SYSTEM SET synchronous_standby_names = 'walreceiver'");
    cluster.maintenance().execute("SELECT pg_reload_conf()");
    let following = Following::of(cluster.database("sync_standby"));
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1)");
    let mut run = running(&following);
    let mark = run.log_mark();
    // The standby answers late.
    let receiver = cluster
        .maintenance()
        .value("SELECT count(*) FROM pg_stat_replication WHERE application_name = 'walreceiver'");
    assert_eq!(receiver, "1");
    standby.signal_walreceiver("STOP");
    let session = following.db.session();
    let writer = std::thread::spawn(move || {
        session.execute(
            "BEGIN; ALTER TABLE t DROP v, ADD v int; INSERT INTO t VALUES (2, 20); COMMIT",
        );
    });
    // The stream is there by now, and asks; the source does not show it yet.
    wait_until(SOON, "somebody waits for the standby", || {
        following.db.value("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            != "0"
    });
    let shown = "SELECT count(*) FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum = 3";
    assert_eq!(following.db.value(shown), "0");
    run.wait_for_log_after(mark, "is not visible there yet", SOON);
    standby.signal_walreceiver("CONT");
    writer.join().unwrap();
    run.wait_for_log_after(mark, "all tables are live", SOON);
    following.db.execute("UPDATE t SET id = 3 WHERE id = 1");
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}

/// A name given back is the same name, and a piece that was copied in between has the other
/// column's values.
#[test]
fn columns_that_swap_their_names_while_a_table_is_copied_have_it_copied_again() {
    let swap = "BEGIN; ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME b TO a; ALTER TABLE t \
                RENAME x TO b; COMMIT";
    // Of one type and back again; of two types, where COPY then reads what nobody planned for.
    for (kind, times) in [("text", 2), ("numeric", 1)] {
        let following = Following::new("swapped_columns");
        following.db.execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, a {kind}, b text);
             INSERT INTO t SELECT i, i, repeat('x', 200) FROM generate_series(1, 20000) i"
        ));
        let rhei = following
            .rhei
            .clone()
            .env("RHEI_BACKFILL_RATE_LIMIT", "1MB")
            .env("RHEI_BACKFILL_CHUNK_SIZE", "1MB");
        let rhei = rhei.env("RHEI_BACKFILL_WORKERS", "1").env("RHEI_SYNC_CATALOG_INTERVAL", "1h");
        let mut run = rhei.spawn(["run"]);
        let of_done = || {
            let status: Option<serde_json::Value> =
                serde_json::from_str(&following.rhei.run(["status", "--json"]).stdout).ok();
            status.and_then(|status| status["copy"]["rows"].as_u64()).unwrap_or_default()
        };
        wait_until(SOON, "a piece is copied", || of_done() > 0);
        following.db.execute(swap);
        let then = of_done();
        wait_until(SOON, "another one is", || {
            of_done() > then + 4000 || run.logs().contains("it is copied again")
        });
        for _ in 1..times {
            following.db.execute(swap);
        }
        run.wait_for_log("it is copied again", SOON);
        run.stop(SOON).assert_code(0);
        let mut run = running_after_sync(&following);
        run.wait_for_log("all tables are live", SOON);
        run.stop(SOON).assert_code(0);
        following.assert_same(&["public.t"]);
    }
}

/// Rows that changed while it was not published are nowhere in the stream.
#[test]
fn a_table_that_left_its_publication_and_came_back_is_copied_and_not_paused() {
    let following = Following::new("came_back");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'); CREATE TABLE \
         other (id int PRIMARY KEY);
         CREATE PUBLICATION rhei FOR TABLE t, other",
    );
    following.sync();
    let mut run = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "1h").spawn(["run"]);
    run.wait_for_log("following the source", SOON);
    following.db.execute("INSERT INTO other VALUES (1)");
    following.wait_until_in_step();
    following.db.execute("ALTER PUBLICATION rhei DROP TABLE t; INSERT INTO t VALUES (2, 'unseen')");
    following.db.execute("ALTER PUBLICATION rhei ADD TABLE t");
    following.db.execute("DELETE FROM t WHERE id = 2; INSERT INTO t VALUES (3, 'c')");
    run.wait_for_log("all tables are live", SOON);
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t", "public.other"]);
}

/// Each copy reads the whole table at the source.
#[test]
fn a_row_filter_that_lets_rows_in_without_their_values_makes_no_copies_without_end() {
    if major() < 15 {
        return;
    }
    let following = Following::new("endless_copies");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, doc text); ALTER TABLE t ALTER doc SET STORAGE \
         EXTERNAL;
         INSERT INTO t SELECT i, repeat('a', 5000) FROM generate_series(1, 20) i; CREATE TABLE \
         other (id int PRIMARY KEY);
         CREATE PUBLICATION rhei FOR TABLE t WHERE (id > 100), other",
    );
    let mut run = running(&following);
    for id in 1..=6 {
        let mark = run.log_mark();
        following.db.execute(&format!("UPDATE t SET id = id + 100 WHERE id = {id}"));
        let said = if id < 6 { "all tables are live" } else { "cannot be followed" };
        run.wait_for_log_after(mark, said, SOON);
    }
    following.db.execute("INSERT INTO other VALUES (1)");
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.other"]);
    let paused = query_copy(
        following.copy(),
        "SELECT state, error FROM _rhei.tables WHERE source_name = 't'",
    )
    .remove(0);
    assert_eq!(paused[0].as_deref(), Some("error"));
    assert!(
        paused[1].as_ref().is_some_and(|reason| reason.contains("5 times within an hour")),
        "{paused:?}"
    );
}

/// Names are changed when a session attaches; a copy may have been planned since.
#[test]
fn tables_that_swap_their_names_while_one_waits_for_its_copy_keep_their_rows() {
    let following = Following::new("swapped_while_waiting");
    following.db.execute(
        "CREATE TABLE a (id int PRIMARY KEY, v int); CREATE TABLE b (id int PRIMARY KEY, v text);
         INSERT INTO a SELECT i, i FROM generate_series(1, 50) i; INSERT INTO b SELECT i, 'b' FROM \
         generate_series(1, 50) i;
         CREATE PUBLICATION rhei FOR ALL TABLES",
    );
    following.sync();
    let mut run = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "1h").spawn(["run"]);
    run.wait_for_log("following the source", SOON);
    // The copy of `a` waits for a lock, and its name goes meanwhile.
    let open = following.db.session();
    open.execute("BEGIN; LOCK TABLE a IN ACCESS EXCLUSIVE MODE");
    let mark = run.log_mark();
    following.rhei.run_ok(["resync", "public.a"]);
    run.wait_for_log_after(mark, "wait for their copy", SOON);
    open.execute(
        "ALTER TABLE a RENAME TO x; ALTER TABLE b RENAME TO a; ALTER TABLE x RENAME TO b; COMMIT",
    );
    run.wait_for_log_after(mark, "all tables are live", SOON);
    following.db.execute("INSERT INTO a VALUES (100, 'in a'); INSERT INTO b VALUES (100, 100)");
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.a", "public.b"]);
}

/// The name is still that of the older table's copy until a session puts the names right.
#[test]
fn a_new_table_that_takes_the_name_of_another_one_before_its_copy_leaves_that_its_rows() {
    let following = Following::new("name_taken_over");
    following.db.execute(
        "CREATE TABLE a (id int PRIMARY KEY, v int); INSERT INTO a SELECT i, i FROM \
         generate_series(1, 50) i;
         CREATE PUBLICATION rhei FOR ALL TABLES",
    );
    following.sync();
    let mut run = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "1h").spawn(["run"]);
    run.wait_for_log("following the source", SOON);
    // The copy of `b` waits for a lock, and takes the name of `a` meanwhile.
    let open = following.db.session();
    open.execute(
        "BEGIN; CREATE TABLE b (id int PRIMARY KEY, v text); INSERT INTO b VALUES (1, 'b'); COMMIT",
    );
    open.execute("BEGIN; LOCK TABLE b IN ACCESS EXCLUSIVE MODE; INSERT INTO b VALUES (2, 'b')");
    following.db.execute("INSERT INTO a VALUES (99, 99)");
    run.wait_for_log("wait for their copy", SOON);
    open.execute("ALTER TABLE a RENAME TO older; ALTER TABLE b RENAME TO a; COMMIT");
    run.wait_for_log("all tables are live", SOON);
    following.db.execute("INSERT INTO a VALUES (100, 'in a'); INSERT INTO older VALUES (100, 100)");
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);

    let mut run = following.run();
    following.wait_settled(&mut run);
    run.assert_no_copies_since(0);
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.a", "public.older"]);
}

/// Rows are matched whole, and the stream names an older row's label as it is called now.
#[test]
fn a_keyless_table_whose_label_was_renamed_is_copied_and_not_paused() {
    let following = Following::new("keyless_label");
    following.db.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE t (m mood[], n int); ALTER TABLE t \
         REPLICA IDENTITY FULL;
         INSERT INTO t VALUES ('{sad}', 1), ('{ok}', 2)",
    );
    following.sync();
    let mut run = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "1h").spawn(["run"]);
    run.wait_for_log("following the source", SOON);
    following.db.execute("INSERT INTO t VALUES (NULL, 3)");
    following.wait_until_in_step();
    following.db.execute("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'");
    following.db.execute("UPDATE t SET n = 10 WHERE n = 1");
    run.wait_for_log("all tables are live", SOON);
    following.wait_until_in_step();
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}

/// A partition that came empty changes nothing. Of one that holds rows when it is noticed they may
/// never have come as rows of the tree.
#[test]
fn a_partition_that_came_with_rows_has_its_tree_copied_and_an_empty_one_has_not() {
    let following = Following::new("on_demand");
    following.db.execute(
        "CREATE TABLE tree (id int, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
         CREATE TABLE p0 PARTITION OF tree FOR VALUES FROM (0) TO (10); INSERT INTO tree VALUES \
         (1, 'one')",
    );
    let mut run = running(&following);
    let mark = run.log_mark();
    following.db.execute(
        "CREATE TABLE p1 PARTITION OF tree FOR VALUES FROM (10) TO (20);
         CREATE TABLE p2 PARTITION OF tree FOR VALUES FROM (20) TO (40) PARTITION BY RANGE (id);
         CREATE TABLE p21 PARTITION OF p2 FOR VALUES FROM (20) TO (30);
         CREATE TABLE empty (id int PRIMARY KEY, v text); ALTER TABLE tree ATTACH PARTITION empty \
         FOR VALUES FROM (40) TO (50)",
    );
    following.wait_settled(&mut run);
    following.db.execute("INSERT INTO tree SELECT i, 'later' FROM generate_series(10, 29) i");
    following.wait_settled(&mut run);
    run.assert_no_copies_since(mark);

    for (number, statements) in [
        "CREATE TABLE q (id int PRIMARY KEY, v text); INSERT INTO q VALUES (61, 'q'); ALTER TABLE \
         tree ATTACH PARTITION q FOR VALUES FROM (60) TO (70)",
        "BEGIN; CREATE TABLE r (id int PRIMARY KEY, v text); INSERT INTO r VALUES (71, 'r'); \
         ALTER TABLE tree ATTACH PARTITION r FOR VALUES FROM (70) TO (80); COMMIT",
        "BEGIN; CREATE TABLE s PARTITION OF tree FOR VALUES FROM (80) TO (90); ALTER TABLE tree \
         DETACH PARTITION s; \
         INSERT INTO s VALUES (81, 's'); ALTER TABLE tree ATTACH PARTITION s FOR VALUES FROM (80) \
         TO (90); COMMIT",
        "CREATE TABLE u (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); CREATE TABLE u1 \
         PARTITION OF u FOR VALUES FROM (90) TO (95); \
         INSERT INTO u VALUES (91, 'u'); ALTER TABLE tree ATTACH PARTITION u FOR VALUES FROM (90) \
         TO (95)",
    ]
    .into_iter()
    .enumerate()
    {
        let mark = run.log_mark();
        following.db.execute(statements);
        following.wait_settled(&mut run);
        assert_eq!(run.copies_since(mark).len(), 1, "{number}: {}", run.logs());
    }
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.tree"]);
}

/// Rows of an unlogged partition are not in the WAL, whatever its root is.
#[test]
fn a_tree_with_an_unlogged_partition_is_paused_until_that_is_logged() {
    let following = Following::new("unlogged_leaf");
    following.db.execute(
        "CREATE TABLE tree (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE p0 PARTITION OF tree FOR VALUES FROM (0) TO (10); INSERT INTO tree VALUES (1);
         CREATE TABLE other (id int PRIMARY KEY)",
    );
    let mut run = running(&following);
    following.db.execute(
        "ALTER TABLE p0 SET UNLOGGED; INSERT INTO tree VALUES (2); INSERT INTO other VALUES (1)",
    );
    let is_paused = || {
        let status = following.rhei.status().unwrap_or_default();
        let tables = status["tables"].as_array().cloned().unwrap_or_default();
        tables.iter().any(|table| {
            let reason = table["error"].as_str().unwrap_or_default();
            table["source"] == "public.tree" && reason.contains("unlogged table (public.p0)")
        })
    };
    wait_until(SOON, "the tree is paused with its reason", is_paused);
    following.wait_until_in_step();
    following.db.execute("ALTER TABLE p0 SET LOGGED; INSERT INTO tree VALUES (3)");
    let mark = run.log_mark();
    following.rhei.run_ok(["resync", "public.tree"]);
    run.wait_for_log_after(mark, "live table=\"public.tree\"", SOON);
    wait_until(SOON, "the tree is live", || !is_paused());
    following.wait_settled(&mut run);
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.tree", "public.other"]);
}

/// The stream brings the TRUNCATE, which gives a table another file, and says nothing of what comes
/// while it is unlogged.
#[test]
fn rows_that_came_into_a_truncated_table_while_it_was_unlogged_arrive() {
    let following = Following::new("truncated_unlogged");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    following.db.execute("CREATE PUBLICATION rhei FOR ALL TABLES");
    following.sync();
    // Its next look at the catalogs is ten seconds away.
    let mut run = following.run();
    following.wait_settled(&mut run);

    following.db.execute("TRUNCATE t; INSERT INTO t VALUES (2)");
    following.wait_until_in_step();
    following
        .db
        .execute("ALTER TABLE t SET UNLOGGED; INSERT INTO t VALUES (3); ALTER TABLE t SET LOGGED");
    following.wait_settled(&mut run);

    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}

#[test]
fn a_truncate_that_was_applied_asks_for_no_copy_also_after_a_kill() {
    let following = Following::new("truncated_known");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (0)");
    following.db.execute("CREATE PUBLICATION rhei FOR ALL TABLES");
    following.sync();

    let mut run = following.run();
    following.wait_settled(&mut run);
    following.db.execute("TRUNCATE t; INSERT INTO t VALUES (1)");
    following.wait_until_in_step();
    run.kill9();
    let mut run = running_after_sync(&following);
    following.wait_settled(&mut run);
    assert_eq!(run.copies(), Vec::<String>::new(), "after a kill: {}", run.logs());

    for id in 2..60 {
        following.db.execute(&format!("TRUNCATE t; INSERT INTO t VALUES ({id})"));
    }
    following.wait_settled(&mut run);
    assert_eq!(run.copies(), Vec::<String>::new(), "while it looks: {}", run.logs());
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}
