//! What is published, and how: filters, column lists, schemas, partitions, several publications,
//! and edits of them.

use std::time::Duration;

use crate::{
    bed::{
        Cluster,
        oracle::{Pair, assert_same_pairs, query_copy},
        wait_until,
    },
    following::Following,
};
use rhei::internals::source::{
    catalog::{self, SourceTable},
    connection::{Environment, SourceOptions, connect_sql},
};

const SOON: Duration = Duration::from_secs(60);

fn knows_filters() -> bool {
    Cluster::shared().major() >= 15
}

/// The rows of a query on both sides; each column text.
#[track_caller]
fn assert_rows(following: &Following, source: &str, copy: &str) {
    let source: Vec<Vec<Option<String>>> = following.db.query(source).into_iter().collect();
    assert_eq!(query_copy(following.copy(), copy), source);
}

/// Trap 48a: an UPDATE that crosses the filter comes as INSERT or DELETE.
#[test]
fn row_filters_hold_for_the_copy_and_for_the_stream() {
    if !knows_filters() {
        return;
    }
    let following = Following::new("row_filter");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t REPLICA IDENTITY FULL;
         INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 40) i;
         CREATE PUBLICATION rhei FOR TABLE t WHERE (id > 10 AND v <> 'hidden')",
    );
    let same = || {
        assert_rows(
            &following,
            "SELECT id::text, v FROM t WHERE id > 10 AND v <> 'hidden' ORDER BY 1",
            "SELECT id::VARCHAR, v FROM public.t ORDER BY 1",
        );
    };
    following.sync();
    same();
    following.db.execute(
        "UPDATE t SET id = id + 100 WHERE id < 5; UPDATE t SET id = 0 WHERE id = 20; UPDATE t SET \
         v = 'hidden' WHERE id = 30;
         UPDATE t SET v = 'back' WHERE v = 'hidden'; UPDATE t SET v = 'hidden' WHERE id = 31; \
         DELETE FROM t WHERE id IN (6, 32)",
    );
    following.sync();
    same();
    // Another filter: what it brings in or shuts out is nowhere in the stream.
    following.db.execute(
        "ALTER PUBLICATION rhei SET TABLE t WHERE (id > 10 AND v <> 'hidden' AND id % 2 = 0)",
    );
    following.db.execute("INSERT INTO t VALUES (200, 'even'), (201, 'odd')");
    let output = following.sync();
    assert!(output.stderr.contains("copying the table again table=public.t"), "{}", output.stderr);
    assert_rows(
        &following,
        "SELECT id::text, v FROM t WHERE id > 10 AND v <> 'hidden' AND id % 2 = 0 ORDER BY 1",
        "SELECT id::VARCHAR, v FROM public.t ORDER BY 1",
    );
}

/// Trap 48a: the INSERT that an UPDATE became lacks the large value that did not change; it is at
/// the source only.
#[test]
fn an_update_into_a_row_filter_brings_the_large_value_that_it_did_not_touch() {
    if !knows_filters() {
        return;
    }
    let following = Following::new("filter_toast");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, doc text); ALTER TABLE t ALTER doc SET STORAGE \
         EXTERNAL;
         INSERT INTO t VALUES (1, repeat('a', 5000)), (20, repeat('b', 5000));
         CREATE PUBLICATION rhei FOR TABLE t WHERE (id > 10)",
    );
    let checked = following.rhei.run_ok(["check"]);
    assert!(
        checked.stdout.contains("row filter") && checked.stdout.contains("REPLICA IDENTITY FULL"),
        "{}",
        checked.stdout
    );
    following.sync();
    following.db.execute("UPDATE t SET id = 11 WHERE id = 1");
    following.sync();
    let query = "SELECT id::text, md5(doc) FROM t WHERE id > 10 ORDER BY 1";
    assert_rows(&following, query, "SELECT id::VARCHAR, md5(doc) FROM public.t ORDER BY 1");
}

/// Trap 48b.
#[test]
fn column_lists_leave_columns_out_and_may_change() {
    if !knows_filters() {
        return;
    }
    let following = Following::new("column_list");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, a text, secret text, b int); INSERT INTO t VALUES (1, \
         'a', 'hush', 1);
         CREATE PUBLICATION rhei FOR TABLE t (id, a)",
    );
    following.sync();
    let columns = || {
        query_copy(
            following.copy(),
            "SELECT string_agg(column_name, ' ' ORDER BY column_index) FROM duckdb_columns() WHERE \
             table_name = 't' AND schema_name = 'public'",
        )
    };
    assert_eq!(columns(), [[Some("id a".to_owned())]]);
    following
        .db
        .execute("UPDATE t SET secret = 'other'; INSERT INTO t VALUES (2, 'two', 'hush', 2)");
    following.sync();
    assert_rows(
        &following,
        "SELECT id::text, a FROM t ORDER BY 1",
        "SELECT id::VARCHAR, a FROM public.t ORDER BY 1",
    );
    following
        .db
        .execute("ALTER PUBLICATION rhei SET TABLE t (id, a, b); UPDATE t SET b = 7 WHERE id = 2");
    following.sync();
    assert_eq!(columns(), [[Some("id a b".to_owned())]]);
    let query = "SELECT id::text, a, b::text FROM t ORDER BY 1";
    assert_rows(&following, query, "SELECT id::VARCHAR, a, b::VARCHAR FROM public.t ORDER BY 1");
    // A column that is not in the list comes and goes without a word.
    following.db.execute(
        "ALTER TABLE t DROP secret; ALTER TABLE t ADD unlisted int; INSERT INTO t VALUES \
                  (3, 'three', 3, 3)",
    );
    let output = following.sync();
    assert!(!output.stderr.contains("copied again"), "{}", output.stderr);
    assert_rows(&following, query, "SELECT id::VARCHAR, a, b::VARCHAR FROM public.t ORDER BY 1");
}

/// Traps 43, 48.
#[test]
fn several_publications_of_all_kinds_are_followed_as_one() {
    let following = Following::new("several");
    following.db.execute(
        "CREATE SCHEMA whole; CREATE TABLE whole.a (id int PRIMARY KEY); CREATE TABLE b (id int \
         PRIMARY KEY);
         CREATE TABLE unpublished (id int PRIMARY KEY); INSERT INTO whole.a VALUES (1); INSERT \
         INTO b VALUES (1);
         CREATE PUBLICATION \"The One\" FOR TABLE b",
    );
    let schema_sql =
        if knows_filters() { "FOR TABLES IN SCHEMA whole" } else { "FOR TABLE whole.a" };
    following.db.execute(&format!("CREATE PUBLICATION \"the other\" {schema_sql}"));
    let settings = format!(
        "[source]\nslot = \"{}\"\npublication = [\"The One\", \"the other\"]\n",
        following.slot()
    );
    let rhei = following.rhei.clone().config(&settings);
    rhei.run_ok(["check"]);
    rhei.run_ok(["sync"]);
    following.assert_same(&["whole.a", "public.b"]);
    following.db.execute(
        "INSERT INTO whole.a VALUES (2); UPDATE b SET id = 9; CREATE TABLE whole.later \
                  (id int PRIMARY KEY)",
    );
    if !knows_filters() {
        following.db.execute("ALTER PUBLICATION \"the other\" ADD TABLE whole.later");
    }
    following.db.execute("INSERT INTO whole.later VALUES (5)");
    rhei.run_ok(["sync"]);
    following.assert_same(&["whole.a", "public.b", "whole.later"]);
    let tables = query_copy(following.copy(), "SELECT count(*)::VARCHAR FROM _rhei.tables");
    assert_eq!(tables, [[Some("3".to_owned())]]);
}

/// Trap 19: decoding such a table fails, so it is said before.
#[test]
fn check_finds_column_lists_that_conflict() {
    if !knows_filters() {
        return;
    }
    let following = Following::new("conflict");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, a int, b int);
         CREATE PUBLICATION one FOR TABLE t (id, a); CREATE PUBLICATION two FOR TABLE t (id, b)",
    );
    let settings =
        format!("[source]\nslot = \"{}\"\npublication = [\"one\", \"two\"]\n", following.slot());
    let output = following.rhei.clone().config(&settings).run(["check"]);
    output.assert_code(1);
    assert!(output.stdout.contains("different column lists"), "{}", output.stdout);
}

/// Trap 61: each leaf in its own column order; the root's is another one.
#[test]
fn partitions_published_one_by_one_are_tables_of_their_own() {
    let following = Following::new("leaves");
    following.db.execute(
        "CREATE TABLE tree (id int, v text, n int, PRIMARY KEY (id)) PARTITION BY RANGE (id);
         CREATE TABLE one PARTITION OF tree FOR VALUES FROM (0) TO (10);
         CREATE TABLE two (n int, gone int, v text, id int NOT NULL, PRIMARY KEY (id)); ALTER \
         TABLE two DROP gone;
         ALTER TABLE tree ATTACH PARTITION two FOR VALUES FROM (10) TO (20);
         INSERT INTO tree VALUES (1, 'one', 1), (11, 'eleven', 11);
         CREATE PUBLICATION rhei FOR TABLE tree WITH (publish_via_partition_root = false)",
    );
    following.sync();
    following.assert_same(&["public.one", "public.two"]);
    following.db.execute(
        "INSERT INTO tree VALUES (2, 'two', 2), (12, 'twelve', 12); UPDATE tree SET id = 13 WHERE \
         id = 1;
         CREATE TABLE three PARTITION OF tree FOR VALUES FROM (20) TO (30); INSERT INTO tree \
         VALUES (21, 'new', 1);
         TRUNCATE two; INSERT INTO tree VALUES (14, 'again', 14)",
    );
    following.sync();
    following.assert_same(&["public.one", "public.two", "public.three"]);
    following
        .db
        .execute("ALTER TABLE tree DETACH PARTITION one; INSERT INTO tree VALUES (15, 'last', 15)");
    following.sync();
    following.assert_same(&["public.two", "public.three"]);
    let state =
        query_copy(following.copy(), "SELECT state FROM _rhei.tables WHERE source_name = 'one'");
    assert_eq!(state, [[Some("dropped".to_owned())]]);
}

/// Trap 61, the other way: one table, whatever the order of its leaves' columns.
#[test]
fn a_tree_published_by_its_root_is_one_table() {
    Following::follows(
        "CREATE TABLE tree (id int, v text, n int, PRIMARY KEY (id)) PARTITION BY RANGE (id);
         CREATE TABLE one PARTITION OF tree FOR VALUES FROM (0) TO (10);
         CREATE TABLE two (n int, gone int, v text, id int NOT NULL, PRIMARY KEY (id)); ALTER \
         TABLE two DROP gone;
         ALTER TABLE tree ATTACH PARTITION two FOR VALUES FROM (10) TO (20);
         INSERT INTO tree VALUES (1, 'one', 1), (11, 'eleven', 11);
         CREATE PUBLICATION rhei FOR TABLE tree WITH (publish_via_partition_root = true)",
        &["public.tree"],
        &[
            "INSERT INTO tree VALUES (2, 'two', 2), (12, 'twelve', 12); UPDATE tree SET id = 13 \
             WHERE id = 1",
            "INSERT INTO two VALUES (14, 'by leaf', 14); ALTER TABLE tree ADD late int DEFAULT 4; \
             UPDATE tree SET n = 0",
            "TRUNCATE tree; INSERT INTO tree VALUES (15, 'x', 1, 1)",
        ],
    );
}

/// Trap 41: on 18 the server only warns and skips; before, it fails. Neither may pass for a copy
/// that is right.
#[test]
fn a_dropped_publication_ends_the_run_with_its_name() {
    let following = Following::new("publication_gone");
    following
        .db
        .execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION rhei FOR TABLE t");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.db.execute("DROP PUBLICATION rhei; INSERT INTO t VALUES (1)");
    let output = running.wait(SOON);
    output.assert_code(1);
    assert!(output.stderr.contains("publication"), "{}", output.stderr);
    following.db.execute("CREATE PUBLICATION rhei FOR TABLE t");
    let output = following.rhei.run(["sync"]);
    output.assert_code(1);
    assert!(output.stderr.contains("backfill --force"), "{}", output.stderr);
    following.rhei.run_ok(["backfill", "--force"]);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 41, while it runs: a new table, a table that left and came back, one that only left,
/// another filter.
#[test]
fn edits_of_a_publication_are_noticed_by_a_run() {
    let following = Following::new("publication_edits");
    following.db.execute(
        "CREATE TABLE stays (id int PRIMARY KEY); CREATE TABLE back (id int PRIMARY KEY); CREATE \
         TABLE leaves (id int PRIMARY KEY);
         CREATE TABLE joins (id int PRIMARY KEY); INSERT INTO joins VALUES (1); CREATE PUBLICATION \
         rhei FOR TABLE stays, back, leaves",
    );
    let mut running =
        following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms").spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    let mut edits = vec![
        ("ALTER PUBLICATION rhei ADD TABLE joins", "public.joins"),
        (
            "ALTER PUBLICATION rhei DROP TABLE back; INSERT INTO back VALUES (1); ALTER \
             PUBLICATION rhei ADD TABLE back",
            "copying the table again table=public.back",
        ),
        ("ALTER PUBLICATION rhei DROP TABLE leaves", "leaves is no longer published"),
    ];
    if knows_filters() {
        edits.push((
            "BEGIN; ALTER PUBLICATION rhei DROP TABLE joins; ALTER PUBLICATION rhei ADD TABLE \
             joins WHERE (id > 0); COMMIT",
            "copying the table again table=public.joins",
        ));
    }
    for (sql, said) in edits {
        let mark = running.log_mark();
        following.db.execute(sql);
        running.wait_for_log_after(mark, said, SOON);
        following.db.execute("INSERT INTO stays SELECT coalesce(max(id), 0) + 1 FROM stays");
        following.wait_settled(&mut running);
    }
    running.stop(SOON).assert_code(0);
    following.db.execute("INSERT INTO joins VALUES (2); INSERT INTO back VALUES (2)");
    following.sync();
    following.assert_same(&["public.stays", "public.back", "public.joins"]);
}

/// Traps 20, 46: what is in the stream is copied, and nothing else.
#[test]
fn generated_identity_inherited_unlogged_and_temporary_are_told_apart() {
    let following = Following::new("kinds");
    following.db.execute(
        "CREATE TABLE g (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int, twice int \
         GENERATED ALWAYS AS (n * 2) STORED);
         INSERT INTO g (n) VALUES (1), (2);
         CREATE TABLE parent (id int PRIMARY KEY, v text); CREATE TABLE child (extra int, PRIMARY \
         KEY (id)) INHERITS (parent);
         INSERT INTO parent VALUES (1, 'parent'); INSERT INTO child VALUES (2, 'child', 7);
         CREATE UNLOGGED TABLE u (id int PRIMARY KEY); CREATE TEMP TABLE x (id int PRIMARY KEY);
         CREATE MATERIALIZED VIEW m AS SELECT 1 AS one; CREATE VIEW w AS SELECT 1 AS one; CREATE \
         SEQUENCE s",
    );
    let checked = following.rhei.run_ok(["check"]);
    assert!(
        checked.stdout.contains("public.u") && checked.stdout.contains("UNLOGGED"),
        "{}",
        checked.stdout
    );
    following.sync();
    // Inheritance children are tables of their own; the parent's copy holds the parent's rows only.
    let same = || {
        following.assert_same(&["public.g", "public.child"]);
        let query = "SELECT id::text, v FROM ONLY parent ORDER BY 1";
        assert_rows(&following, query, "SELECT id::VARCHAR, v FROM public.parent ORDER BY 1");
    };
    same();
    following.db.execute(
        "INSERT INTO g (n) VALUES (3); UPDATE g SET n = 5 WHERE id = 1; UPDATE parent SET v = v || \
         '!'; INSERT INTO child VALUES (3, 'c', 8);
         INSERT INTO u VALUES (1)",
    );
    following.sync();
    same();
    let tables = query_copy(
        following.copy(),
        "SELECT string_agg(source_name, ' ' ORDER BY source_name) FROM _rhei.tables",
    );
    assert_eq!(tables, [[Some("child g parent".to_owned())]]);
}

/// Trap 20: since 18 a publication may bring stored generated columns.
#[test]
fn stored_generated_columns_come_when_the_publication_brings_them() {
    if Cluster::shared().major() < 18 {
        return;
    }
    let following = Following::new("generated18");
    following.db.execute(
        "CREATE TABLE g (id int PRIMARY KEY, n int, twice int GENERATED ALWAYS AS (n * 2) STORED, \
         thrice int GENERATED ALWAYS AS (n * 3) VIRTUAL);
         INSERT INTO g (id, n) VALUES (1, 1), (2, 2);
         CREATE PUBLICATION rhei FOR TABLE g WITH (publish_generated_columns = stored)",
    );
    following.sync();
    following.db.execute("INSERT INTO g (id, n) VALUES (3, 3); UPDATE g SET n = 5 WHERE id = 1");
    following.sync();
    let query = "SELECT id::text, n::text, twice::text FROM g ORDER BY 1";
    assert_rows(
        &following,
        query,
        "SELECT id::VARCHAR, n::VARCHAR, twice::VARCHAR FROM public.g ORDER BY 1",
    );
}

/// Trap 59, and all that a name may hold.
#[test]
fn any_legal_name_is_followed_and_collisions_are_solved_by_a_stable_rule() {
    let following = Following::new("names");
    let long = "ü".repeat(31) + "x";
    following.db.execute(&format!(
        "CREATE SCHEMA \"Sch.ema \"\"q\"\"\"; CREATE SCHEMA temp; CREATE SCHEMA copy; CREATE \
         SCHEMA _rhei;
         CREATE TABLE \"Sch.ema \"\"q\"\"\".\"select\" (\"from\" int PRIMARY KEY, \"a b\" text, \
         \"it's\" int, \"{long}\" int);
         CREATE TABLE \"{long}\" (id int PRIMARY KEY, rowid text, \"Id\" int, \"ID\" int, ctid2 \
         int);
         CREATE TABLE temp.t (id int PRIMARY KEY); CREATE TABLE copy.t (id int PRIMARY KEY);
         CREATE TABLE _rhei.tables (id int PRIMARY KEY, v text);
         CREATE TABLE \"T\" (id int PRIMARY KEY, v text); CREATE TABLE t (v text, rowid int); \
         ALTER TABLE t REPLICA IDENTITY FULL;
         CREATE TABLE \"50%\" (\"\"\"\" int PRIMARY KEY, \"🦆\" text)"
    ));
    let rows = |value: &str, id: i32| {
        format!(
            "INSERT INTO \"Sch.ema \"\"q\"\"\".\"select\" VALUES ({id}, '{value}', 1, 2); INSERT \
             INTO \"{long}\" VALUES ({id}, '{value}', 1, 2, 3);
             INSERT INTO temp.t VALUES ({id}); INSERT INTO copy.t VALUES ({id}); INSERT INTO \
             _rhei.tables VALUES ({id}, '{value}');
             INSERT INTO \"T\" VALUES ({id}, '{value}'); INSERT INTO t VALUES ('{value}', {id}), \
             ('{value}', {id}); INSERT INTO \"50%\" VALUES ({id}, '{value}')"
        )
    };
    following.db.execute(&rows("one", 1));
    let checked = following.rhei.run_ok(["check"]);
    for words in
        ["the table is public.T_2", "column \"Id\" is \"Id_3\"", "the table is _rhei_source.tables"]
    {
        assert!(checked.stdout.contains(words), "expected {words:?} in:\n{}", checked.stdout);
    }
    let same = || {
        let pairs = [
            Pair::new("temp.t"),
            Pair::new("copy.t"),
            Pair::new("_rhei.tables").target("_rhei_source.tables"),
            Pair::new("public.T").target("public.T_2"),
            Pair::new("public.50%"),
        ];
        assert_same_pairs(&following.db, following.copy(), &pairs);
        let odd = Pair {
            source: ("Sch.ema \"q\"".into(), "select".into()),
            target: ("Sch.ema \"q\"".into(), "select".into()),
            excluded: Vec::new(),
        };
        assert_same_pairs(&following.db, following.copy(), &[odd]);
        let columns = "SELECT id::text, rowid, \"Id\"::text, \"ID\"::text";
        assert_rows(
            &following,
            &format!("{columns} FROM \"{long}\" ORDER BY 1"),
            &format!(
                "SELECT id::VARCHAR, rowid_2, \"Id_3\"::VARCHAR, \"ID_4\"::VARCHAR FROM \
                 public.\"{long}\" ORDER BY 1"
            ),
        );
        assert_rows(
            &following,
            "SELECT v, rowid::text FROM t ORDER BY 1, 2",
            "SELECT v, rowid_2::VARCHAR FROM public.t ORDER BY 1, 2",
        );
    };
    following.sync();
    same();
    following.db.execute(&rows("two", 2));
    following.db.execute(
        "DELETE FROM t WHERE ctid = (SELECT min(ctid) FROM t); ALTER TABLE t ADD \
                          \"V\" int DEFAULT 4; UPDATE t SET rowid = 7 WHERE rowid = 2",
    );
    following.sync();
    same();
    let late = query_copy(following.copy(), "SELECT count(\"V_3\")::VARCHAR FROM public.t");
    assert_eq!(late, [[Some("3".to_owned())]]);
}

/// Richer types on request, by copy and by stream.
#[test]
fn composites_ranges_hstores_and_json_may_be_nested_types_on_request() {
    let following = Following::new("nested");
    following.db.execute(
        "CREATE EXTENSION hstore; CREATE TYPE inner_type AS (at timestamptz, span interval);
         CREATE TYPE pair AS (a int, \"b c\" text, i inner_type, l int[]);
         CREATE TABLE t (id int PRIMARY KEY, p pair, r int4range, s tstzrange, h hstore, j jsonb, \
         z timetz, n numeric, m numeric)",
    );
    let settings = format!(
        "[source]\nslot = \"{}\"\n[tables.\"public.t\".columns]\np.type = \"STRUCT\"\nr.type = \
         \"STRUCT\"\ns.type = \"STRUCT\"\n\
         h.type = \"MAP\"\nj.type = \"VARIANT\"\nz.type = \"TIMETZ\"\nn.type = \"DOUBLE\"\nm.type \
         = \"DECIMAL(20,4)\"\n",
        following.slot()
    );
    let rhei = following.rhei.clone().config(&settings);
    let rows = |id: i32| {
        format!(
            "SET TimeZone = 'UTC'; INSERT INTO t VALUES ({id}, ROW(1, 'x,\"y\"', ROW('2024-01-01 \
             12:00+00', '1 mon 2 days')::inner_type, '{{1,NULL}}'), '[1,5)',
               '[2024-01-01 00:00+00,)', 'a=>1, b=>NULL', '{{\"k\": [1, null]}}', '12:30:00+02', \
               1.5, 2.25),
             ({id} + 1, ROW(NULL, '', NULL, '{{}}'), 'empty', NULL, '', 'null', NULL, NULL, NULL),
             ({id} + 2, NULL, NULL, NULL, NULL, NULL, NULL, 'NaN', -3)"
        )
    };
    following.db.execute(&rows(1));
    rhei.run_ok(["sync"]);
    following.db.execute(&rows(11));
    rhei.run_ok(["sync"]);
    let read = |from: i32| {
        query_copy(
            following.copy(),
            &format!(
                "SELECT p.a::VARCHAR, p.\"b c\", p.i::VARCHAR, p.l::VARCHAR, r::VARCHAR, \
                 s.\"lower\"::VARCHAR, \
                 h::VARCHAR, j::JSON::VARCHAR, z::VARCHAR, n::VARCHAR, m::VARCHAR, (p IS \
                 NULL)::VARCHAR \
                 FROM public.t WHERE id BETWEEN {from} AND {from} + 2 ORDER BY 1"
            ),
        )
    };
    let (copied, streamed) = (read(1), read(11));
    assert_eq!(copied, streamed);
    let shown: Vec<Vec<&str>> = copied
        .iter()
        .map(|row| row.iter().map(|cell| cell.as_deref().unwrap_or("NULL")).collect())
        .collect();
    let range = |lower: &str, upper: &str, is_lower: bool, is_empty: bool| {
        format!(
            "{{'lower': {lower}, 'upper': {upper}, 'lower_inclusive': {is_lower}, \
             'upper_inclusive': false, 'is_empty': {is_empty}}}"
        )
    };
    let (some, empty) = (range("1", "5", true, false), range("NULL", "NULL", false, true));
    let inner = "(\"2024-01-01 12:00:00+00\",\"1 mon 2 days\")";
    // VARIANT has one null: JSON's and SQL's are the same to it.
    let expected = [
        format!(
            "1|x,\"y\"|{inner}|[1, NULL]|{some}|2024-01-01 \
             00:00:00+00|{{a=1, b=NULL}}|{{\"k\":[1,null]}}|12:30:00+02|1.5|2.2500|false"
        ),
        format!("NULL||NULL|[]|{empty}|NULL|{{}}|null|NULL|NULL|NULL|false"),
        "NULL|NULL|NULL|NULL|NULL|NULL|NULL|null|NULL|nan|-3.0000|true".to_owned(),
    ];
    assert_eq!(shown.iter().map(|row| row.join("|")).collect::<Vec<_>>(), expected);
    let wrong = settings.replace("r.type = \"STRUCT\"", "r.type = \"MAP\"");
    let output = following.rhei.clone().config(&wrong).run(["sync"]);
    output.assert_code(1);
    assert!(
        output.stderr.contains("\"r\"") && output.stderr.contains("possible are VARCHAR, STRUCT"),
        "{}",
        output.stderr
    );
    // With settings that can be, it is copied without being asked for.
    following.rhei.clone().config(&settings).run_ok(["sync"]);
    assert_eq!(read(1), copied);
}

/// Nobody is at its copy after that, and the next look finds it like a new one.
#[test]
fn a_table_that_left_while_it_waited_for_its_copy_is_copied_when_it_comes_back() {
    let following = Following::new("left_waiting");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int); CREATE TABLE other (id int PRIMARY KEY);
         INSERT INTO t VALUES (1, 1); CREATE PUBLICATION rhei FOR TABLE t, other",
    );
    let mut running =
        following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms").spawn(["run"]);
    following.wait_settled(&mut running);
    following.rhei.run_ok(["pause"]);
    let mark = running.log_mark();
    following.db.execute("ALTER TABLE t ALTER n TYPE int USING n * 100");
    running.wait_for_log_after(mark, "copying the table again table=public.t", SOON);
    following.db.execute("ALTER PUBLICATION rhei DROP TABLE t");
    following.rhei.run_ok(["resume"]);
    following.wait_settled(&mut running);
    following.db.execute("INSERT INTO t VALUES (2, 2); ALTER PUBLICATION rhei ADD TABLE t");
    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t", "public.other"]);
}

/// Trap 13: what a transaction writes before its table is published is not in the stream, also when
/// the transaction ends long after that.
#[test]
fn rows_of_a_transaction_that_is_older_than_the_publication_of_its_table_are_copied() {
    let following = Following::new("older_than_publication");
    following.db.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY, v text);
         CREATE PUBLICATION rhei FOR TABLE a",
    );
    let mut running = following.run();
    following.wait_settled(&mut running);

    let older = following.db.session();
    older.execute("BEGIN; INSERT INTO b VALUES (1, 'before'), (2, 'before')");
    following.db.execute("ALTER PUBLICATION rhei ADD TABLE b; INSERT INTO b VALUES (3, 'after')");
    wait_until(SOON, "rhei waits for the transaction, or has copied the table", || {
        assert!(running.is_running(), "{}", running.logs());
        let is_live = following.rhei.status().is_some_and(|status| {
            let tables = status["tables"].as_array().cloned().unwrap_or_default();
            tables.iter().any(|table| table["source"] == "public.b" && table["state"] == "live")
        });
        is_live || running.logs().contains("waiting for transactions")
    });
    older.execute("INSERT INTO b VALUES (4, 'older, and after'); COMMIT");

    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.a", "public.b"]);
}

/// The catalogs are read instead of the view `pg_publication_tables`, which locks every table: each
/// publication has to come out as the view has it, for tables, columns and filters.
#[test]
fn each_publication_is_what_the_server_says_of_it() {
    let following = Following::new("oracle_of_members");
    let db = &following.db;
    db.execute(
        "CREATE SCHEMA one; CREATE SCHEMA two; CREATE EXTENSION IF NOT EXISTS pg_trgm;
         CREATE TABLE plain (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id * 2) STORED, v \
         text, gone int);
         ALTER TABLE plain DROP gone; CREATE TABLE one.plain (id int PRIMARY KEY, v text); CREATE \
         UNLOGGED TABLE unlogged (id int);
         CREATE TABLE one.inherits () INHERITS (plain); CREATE VIEW one.view AS SELECT 1; CREATE \
         MATERIALIZED VIEW mat AS SELECT 1 AS a;
         CREATE FOREIGN DATA WRAPPER of_test; CREATE SERVER elsewhere FOREIGN DATA WRAPPER of_test;
         CREATE FOREIGN TABLE far (id int) SERVER elsewhere;
         CREATE TABLE tree (id int, v text, g int GENERATED ALWAYS AS (id * 2) STORED) PARTITION \
         BY RANGE (id);
         CREATE TABLE two.leaf PARTITION OF tree FOR VALUES FROM (0) TO (10);
         CREATE TABLE one.branch PARTITION OF tree FOR VALUES FROM (10) TO (20) PARTITION BY RANGE \
         (id);
         CREATE TABLE two.twig PARTITION OF one.branch FOR VALUES FROM (10) TO (15);
         CREATE UNLOGGED TABLE one.lost PARTITION OF one.branch FOR VALUES FROM (15) TO (17);
         CREATE FOREIGN TABLE one.far_leaf PARTITION OF one.branch FOR VALUES FROM (17) TO (20) \
         SERVER elsewhere;
         CREATE TABLE two.empty (id int) PARTITION BY RANGE (id)",
    );
    let mut forms = vec![
        "FOR ALL TABLES",
        "FOR TABLE plain, one.plain",
        "FOR TABLE tree",
        "FOR TABLE two.leaf, one.branch",
    ];
    forms.extend(["FOR TABLE tree, two.leaf", "FOR TABLE two.empty, ONLY plain", ""]);
    if knows_filters() {
        forms.extend([
            "FOR TABLES IN SCHEMA one",
            "FOR TABLES IN SCHEMA two, public",
            "FOR TABLE plain (id, v) WHERE (id > 5 AND v <> 'x'), one.plain WHERE (id < 7)",
            "FOR TABLE one.plain, TABLES IN SCHEMA one",
        ]);
    }
    let mut publications = Vec::new();
    for (number, form) in forms.iter().enumerate() {
        for via_root in [false, true] {
            let generated = if major() >= 18 {
                vec!["", ", publish_generated_columns = stored"]
            } else {
                vec![""]
            };
            for generated in generated {
                let name = format!("p{number}_{via_root}_{}", generated.len());
                db.execute(&format!(
                    "CREATE PUBLICATION {name} {form} WITH (publish_via_partition_root = \
                     {via_root}{generated})"
                ));
                publications.push(name);
            }
        }
    }
    if knows_filters() {
        for via_root in [false, true] {
            let name = format!("listed_{via_root}");
            let list = if via_root {
                "FOR TABLE tree (id) WHERE (id > 3), two.leaf (id, v)"
            } else {
                "FOR TABLE two.leaf (id) WHERE (id > 3)"
            };
            db.execute(&format!(
                "CREATE PUBLICATION {name} {list} WITH (publish_via_partition_root = {via_root})"
            ));
            publications.push(name);
        }
    }

    let details = if knows_filters() { "attnames::text[]::text, rowfilter" } else { "NULL, NULL" };
    for publication in &publications {
        // Trap 61: with its root in the publication and published through it, a partition is none
        // of its tables. 14 lists both.
        let listed = db.query(&format!(
            "SELECT DISTINCT p.schemaname, p.tablename, {details} FROM pg_publication_tables p \
             JOIN pg_publication o USING (pubname) \
             WHERE pubname = '{publication}' AND NOT (o.pubviaroot AND EXISTS (SELECT FROM \
             pg_partition_ancestors( \
             format('%I.%I', p.schemaname, p.tablename)::regclass) a JOIN pg_publication_tables r \
             ON r.pubname = p.pubname \
             AND format('%I.%I', r.schemaname, r.tablename)::regclass = a.relid \
             WHERE a.relid <> format('%I.%I', p.schemaname, p.tablename)::regclass)) ORDER BY 1, 2"
        ));
        let mut expected: Vec<Vec<Option<String>>> = listed.into_iter().collect();
        let mut found = found_in(&following, publication);
        if !knows_filters() {
            found.iter_mut().for_each(|row| row[2] = None);
        } else if major() < 18 {
            // Generated columns are listed, and never sent.
            expected.iter_mut().for_each(|row| {
                row[2] = row[2].as_ref().map(|names| names.replace(",g}", "}").replace(",g,", ","))
            });
        }
        assert_eq!(found, expected, "{publication}");
    }
}

fn major() -> u32 {
    Cluster::shared().major()
}

/// Schema, name, columns and row filter of each table that a publication brings, by rhei's own
/// question.
fn found_in(following: &Following, publication: &str) -> Vec<Vec<Option<String>>> {
    let source = SourceOptions::parse(&following.db.url(), &Environment::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tables = runtime.block_on(async {
        let client = connect_sql(&source, "test").await.unwrap();
        catalog::published_tables(&client, &[publication.to_owned()]).await.unwrap()
    });
    let describe = |table: &SourceTable| {
        let columns: Vec<String> = table.columns.iter().map(|column| column.name.clone()).collect();
        let names = format!("{{{}}}", columns.join(","));
        vec![
            Some(table.name.schema.clone()),
            Some(table.name.name.clone()),
            Some(names),
            table.row_filter.clone(),
        ]
    };
    tables.iter().map(describe).collect()
}
