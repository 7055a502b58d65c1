//! What the stream brings, followed by `rhei run` and compared without a `sync` before: that would heal by copying.

use std::time::Duration;

use crate::{
    bed::{Cluster, Running, oracle::query_copy, wait_until},
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

/// Waits until the copy holds everything that was committed before this call.
#[track_caller]
fn arrived(following: &Following) {
    let lsn = following.db.wal_lsn();
    wait_until(SOON, "the checkpoint passes what was written", || {
        // Something to commit: an idle position is saved only now and then.
        let slot = following.slot();
        following.db.execute("SELECT pg_logical_emit_message(true, 'rhei.test', 'go on')");
        following.db.value(&format!(
            "SELECT confirmed_flush_lsn >= '{lsn}'::pg_lsn FROM pg_replication_slots WHERE slot_name = '{slot}'"
        )) == "t"
    });
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
            "CREATE TABLE gen (id int PRIMARY KEY, b int GENERATED ALWAYS AS (id * 2) STORED, v text);
             CREATE TABLE other (id int PRIMARY KEY); INSERT INTO gen (id) VALUES (0)",
        );
        if !publication.is_empty() {
            following.db.execute(publication);
        }
        following.sync();
        let mut run = running_after_sync(&following);
        let before = copies(&run);
        for id in 1..=10 {
            following.db.execute(&format!("INSERT INTO gen (id) VALUES ({id}); INSERT INTO other VALUES ({id})"));
        }
        following.db.execute("UPDATE gen SET v = 'x' WHERE id = 3; DELETE FROM gen WHERE id = 4");
        following.db.execute("ALTER TABLE gen ADD late int DEFAULT 5; UPDATE gen SET late = 6 WHERE id = 5");
        arrived(&following);
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
        following.db.execute(&format!("INSERT INTO gen (id) VALUES ({id}); UPDATE gen SET v = 'u'"));
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
    arrived(&following);
    run.stop(SOON).assert_code(0);
    let rows = query_copy(following.copy(), "SELECT count(*)::VARCHAR, sum(b)::VARCHAR FROM public.gen");
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
        let settings = settings.replacen("[source]\n", &format!("[source]\nslot = \"{slot}\"\n"), 1);
        std::fs::write(following.folder.path().join("rhei.toml"), settings).unwrap();
        let run = running(&following);
        following.db.execute("INSERT INTO pt VALUES (2, 'new'); UPDATE pt SET v = 'u' WHERE id = 1");
        arrived(&following);
        run.stop(SOON).assert_code(0);
        following.assert_same(&["public.pt"]);
        let tables = query_copy(
            following.copy(),
            "SELECT source_name FROM _rhei.tables WHERE state = 'live' AND source_name LIKE 'pt%' ORDER BY 1",
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
         CREATE PUBLICATION a1 FOR TABLE t (id, a); CREATE PUBLICATION a2 FOR TABLE t (id, b), other",
    );
    let slot = following.slot().to_owned();
    let settings = format!("[source]\nslot = \"{slot}\"\npublication = [\"a1\", \"a2\"]\n");
    std::fs::write(following.folder.path().join("rhei.toml"), settings).unwrap();
    let checked = following.rhei.run(["check"]);
    checked.assert_code(1);
    let refused = following.rhei.run(["sync"]);
    refused.assert_code(1);
    for text in [&checked.stdout, &refused.stderr] {
        assert!(text.contains("public.t is in two publications with different column lists"), "{text}");
        assert!(text.contains("ALTER PUBLICATION .. SET TABLE with one list"), "{text}");
    }
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'");
    assert_eq!(following.db.value(&slots), "0");
    following.db.execute("ALTER PUBLICATION a2 SET TABLE t (id, a), other; INSERT INTO t VALUES (1, 2, 3)");
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
         INSERT INTO tree VALUES (1, 'one'); CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (1)",
    );
    let checked = following.rhei.run(["check"]);
    checked.assert_code(1);
    assert!(checked.stdout.contains("foreign table (public.far)"), "{}", checked.stdout);
    let output = following.rhei.run(["sync"]);
    output.assert_code(1);
    assert!(output.stderr.contains("public.tree") && output.stderr.contains("public.far"), "{}", output.stderr);
    following.assert_same(&["public.other"]);
    // Without it the tree is copied.
    following.db.execute("ALTER TABLE tree DETACH PARTITION far");
    following.rhei.run_ok(["backfill", "--table", "public.tree", "--force"]);
    following.assert_same(&["public.tree", "public.other"]);
}
