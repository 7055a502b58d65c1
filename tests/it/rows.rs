//! Every message kind and every replica identity, from a real server into a real file.

use std::time::Duration;

use crate::{
    bed::{lake::Kind, oracle::query_copy, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

/// Trap 50: without an old tuple the key is the new row's; with one, it is the old row's.
#[test]
fn replica_identity_default_follows_inserts_updates_key_changes_and_deletes() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY, name text, n numeric(10,2));
         INSERT INTO t SELECT i, 'name ' || i, i / 3.0 FROM generate_series(1, 100) i",
        &["public.t"],
        &[
            "INSERT INTO t VALUES (101, NULL, 1.5), (102, '', NULL)",
            "UPDATE t SET name = 'new' WHERE id < 10",
            "UPDATE t SET id = id + 1000 WHERE id BETWEEN 20 AND 30",
            "DELETE FROM t WHERE id BETWEEN 40 AND 50",
            "BEGIN; DELETE FROM t WHERE id = 60; INSERT INTO t VALUES (60, 'again', 0); COMMIT",
            "BEGIN; INSERT INTO t VALUES (500, 'short', 0); DELETE FROM t WHERE id = 500; COMMIT",
        ],
    );
}

/// Trap 49: the key is the index's columns; primary key changes come without an old tuple.
#[test]
fn replica_identity_index_uses_the_columns_of_the_index() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY, code text NOT NULL, n int);
         CREATE UNIQUE INDEX t_code ON t (code);
         ALTER TABLE t REPLICA IDENTITY USING INDEX t_code;
         INSERT INTO t SELECT i, 'code ' || i, i FROM generate_series(1, 50) i",
        &["public.t"],
        &[
            "UPDATE t SET id = id + 1000 WHERE id < 10",
            "UPDATE t SET code = code || ' x' WHERE n > 40",
            "DELETE FROM t WHERE n = 20",
        ],
    );
}

/// Traps 49 and 51: every column is flagged; the key is the primary key of the catalog.
#[test]
fn replica_identity_full_with_a_primary_key_follows_by_key() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY, doc text, n int);
         ALTER TABLE t ALTER doc SET STORAGE EXTERNAL, REPLICA IDENTITY FULL;
         INSERT INTO t SELECT i, repeat(i::text, 3000), i FROM generate_series(1, 20) i",
        &["public.t"],
        &[
            "UPDATE t SET n = n + 1 WHERE id < 10",
            "UPDATE t SET id = id + 100, n = 0 WHERE id = 15",
            "DELETE FROM t WHERE id = 3",
        ],
    );
}

/// Trap 54: rows without a key are a multiset; exactly as many equal rows go as the source deleted.
#[test]
fn a_table_without_a_key_is_followed_as_a_multiset() {
    Following::follows(
        "CREATE TABLE t (a int, b text, c float8);
         ALTER TABLE t REPLICA IDENTITY FULL;
         INSERT INTO t SELECT i % 5, NULL, 'NaN' FROM generate_series(1, 50) i;
         INSERT INTO t VALUES (NULL, NULL, NULL), (NULL, NULL, NULL)",
        &["public.t"],
        &[
            "DELETE FROM t WHERE ctid IN (SELECT ctid FROM t WHERE a = 1 LIMIT 3)",
            "DELETE FROM t WHERE ctid = (SELECT min(ctid) FROM t WHERE a IS NULL)",
            "UPDATE t SET b = 'x' WHERE ctid IN (SELECT ctid FROM t WHERE a = 2 LIMIT 4)",
            "INSERT INTO t SELECT * FROM t WHERE a = 3",
        ],
    );
}

/// Trap 53: a deferrable key passes through duplicates.
#[test]
fn a_deferrable_key_that_passes_through_duplicates_ends_equal() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v text);
         ALTER TABLE t REPLICA IDENTITY FULL;
         INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')",
        &["public.t"],
        &["UPDATE t SET id = id + 1"],
    );
}

/// Trap 53, with an ordinary key: values move along without ever being in two places.
#[test]
fn shifted_and_swapped_keys_end_equal() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY, v text);
         INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 100) i",
        &["public.t"],
        &[
            "DO $$ BEGIN FOR i IN REVERSE 100..1 LOOP UPDATE t SET id = id + 1 WHERE id = i; END \
             LOOP; END $$",
            "BEGIN; UPDATE t SET id = -1 WHERE id = 2; UPDATE t SET id = 2 WHERE id = 3; UPDATE t \
             SET id = 3 WHERE id = -1; COMMIT",
        ],
    );
}

/// Trap 54: nothing identifies a row, so only inserts and truncates come.
#[test]
fn a_table_with_replica_identity_nothing_is_appended_to_and_truncated() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t REPLICA IDENTITY NOTHING;
         CREATE TABLE u (v text);
         INSERT INTO t VALUES (1, 'a'); INSERT INTO u VALUES ('x'), ('x')",
        &["public.t", "public.u"],
        &[
            "INSERT INTO t VALUES (2, 'b')",
            "INSERT INTO u VALUES ('x')",
            "TRUNCATE u",
            "INSERT INTO u VALUES ('y')",
        ],
    );
}

/// Trap 51, the whole matrix: replica identity x what changes x where the row stood before.
#[test]
fn unchanged_toast_keeps_its_value_wherever_the_row_stood() {
    let identities = ["DEFAULT", "USING INDEX code_of", "FULL", "keyless"];
    let changes = [
        "n = n + 1",
        "id = id + 1000, code = code || 'k'",
        "doc = repeat('z', 4000)",
        "doc = repeat('y', 4000), id = id + 1000, code = code || 'k'",
    ];
    let (mut schema, mut target, mut batch, mut last) =
        (String::new(), String::new(), String::new(), String::new());
    let mut tables = Vec::new();
    for (number, identity) in identities.iter().enumerate() {
        let key = if *identity == "keyless" { "" } else { " PRIMARY KEY" };
        let identity =
            identity.replace("keyless", "FULL").replace("code_of", &format!("code_of_{number}"));
        schema.push_str(&format!(
            "CREATE TABLE t{number} (id int{key}, code text NOT NULL, doc text, n int);
             CREATE UNIQUE INDEX code_of_{number} ON t{number} (code);
             ALTER TABLE t{number} ALTER doc SET STORAGE EXTERNAL, REPLICA IDENTITY {identity};"
        ));
        tables.push(format!("public.t{number}"));
        for (at, change) in changes.iter().enumerate() {
            let row = |id: usize| {
                format!(
                    "INSERT INTO t{number} VALUES ({id}, 'c{id}', repeat(md5('{id}'), 200), 0);"
                )
            };
            let update = |id: usize| format!("UPDATE t{number} SET {change} WHERE code = 'c{id}';");
            let (stood, earlier, same, inserted) = (at, 10 + at, 20 + at, 30 + at);
            // In the target; in the same batch; in the same transaction; inserted in the same
            // transaction.
            target.push_str(&format!("{}{}{}", row(stood), row(earlier), row(same)));
            batch.push_str(&format!("UPDATE t{number} SET n = 5 WHERE code = 'c{earlier}';"));
            last.push_str(&format!("{}{}", update(stood), update(earlier)));
            last.push_str(&format!(
                "BEGIN; UPDATE t{number} SET n = 7 WHERE code = 'c{same}'; {} COMMIT; BEGIN; {}{} \
                 COMMIT;",
                update(same),
                row(inserted),
                update(inserted)
            ));
        }
    }
    let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
    Following::follows(&format!("{schema} {target}"), &tables, &[&batch, &last]);
}

/// Trap 50: a TOASTed key sends an old key on every update, and the new row leaves the key out.
#[test]
fn a_toasted_key_survives_updates_of_other_columns() {
    Following::follows(
        "CREATE TABLE t (k text PRIMARY KEY, n int);
         ALTER TABLE t ALTER k SET STORAGE EXTERNAL;
         INSERT INTO t VALUES (repeat('k', 2600), 1), ('short', 1)",
        &["public.t"],
        &["UPDATE t SET n = 2", "UPDATE t SET k = repeat('j', 2600) WHERE n = 2 AND k LIKE 'kk%'"],
    );
}

/// Trap 60: what came before a TRUNCATE in a transaction is gone, what comes after stays.
#[test]
fn truncate_is_a_barrier_inside_a_transaction() {
    Following::follows(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES \
         a);
         INSERT INTO a SELECT generate_series(1, 10); INSERT INTO b SELECT i, i FROM \
         generate_series(1, 10) i",
        &["public.a", "public.b"],
        &[
            "BEGIN; INSERT INTO a VALUES (50); TRUNCATE a CASCADE; INSERT INTO a VALUES (50), \
             (51); UPDATE a SET id = 52 WHERE id = 51; COMMIT",
            "INSERT INTO b VALUES (1, 50)",
            "TRUNCATE a, b RESTART IDENTITY",
        ],
    );
}

/// Traps 57, 58, 78: no-op updates, rolled-back savepoints, logical messages.
#[test]
fn savepoints_no_op_updates_and_logical_messages_change_nothing_that_they_should_not() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 1), (2, 2)",
        &["public.t"],
        &[
            "BEGIN; UPDATE t SET n = n; SAVEPOINT s; DELETE FROM t; ROLLBACK TO s; INSERT INTO t \
             VALUES (3, 3); COMMIT",
            "SELECT pg_logical_emit_message(true, 'rhei', 'hello'), pg_logical_emit_message(false, \
             'rhei', 'hello')",
            "INSERT INTO t VALUES (1, 5) ON CONFLICT (id) DO UPDATE SET n = 10",
            "INSERT INTO t VALUES (1, 5) ON CONFLICT DO NOTHING",
        ],
    );
}

/// Trap 80: a prepared transaction comes when it is committed.
#[test]
fn prepared_transactions_arrive_when_they_are_committed() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY)",
        &["public.t"],
        &[
            "BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'one'",
            "INSERT INTO t VALUES (2)",
            "COMMIT PREPARED 'one'",
        ],
    );
}

/// Trap 81: transactions with an origin are ordinary.
#[test]
fn transactions_with_an_origin_are_followed() {
    let origin = "rhei_test_origin";
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY)",
        &["public.t"],
        &[&format!(
            "SELECT pg_replication_origin_create('{origin}'); SELECT \
             pg_replication_origin_session_setup('{origin}');
             BEGIN; INSERT INTO t VALUES (1); COMMIT; SELECT \
             pg_replication_origin_session_reset(); \
             SELECT pg_replication_origin_drop('{origin}')"
        )],
    );
}

/// Trap 72: Type messages announce enums, domains and composites.
#[test]
fn enums_domains_and_composites_are_followed_as_text() {
    Following::follows(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN age AS int CHECK (VALUE >= 0);
         CREATE TYPE pair AS (a int, b text);
         CREATE TABLE t (id int PRIMARY KEY, m mood, a age, p pair);
         INSERT INTO t VALUES (1, 'ok', 5, (1, 'x,y'))",
        &["public.t"],
        &["INSERT INTO t VALUES (2, 'sad', 6, (NULL, ''))", "UPDATE t SET m = 'sad'"],
    );
}

#[test]
fn several_tables_change_in_one_transaction_and_names_may_be_hostile() {
    Following::follows(
        r#"CREATE SCHEMA "Odd ""Schema"; CREATE TABLE "Odd ""Schema"."select" ("Id" int PRIMARY KEY, "a b" text, "ä;--" int);
           CREATE TABLE plain (a int, b int, v text, PRIMARY KEY (b, a))"#,
        &["Odd \"Schema.select", "public.plain"],
        &[
            r#"BEGIN; INSERT INTO "Odd ""Schema"."select" VALUES (1, 'x', 2), (2, NULL, NULL);
               INSERT INTO plain SELECT i, i % 3, 'v' FROM generate_series(1, 30) i; COMMIT"#,
            r#"BEGIN; UPDATE "Odd ""Schema"."select" SET "a b" = 'y'; UPDATE plain SET a = a + 100 WHERE b = 1; COMMIT"#,
        ],
    );
}

/// Trap 57 and 61: rows of a partition tree arrive as rows of its root.
#[test]
fn a_partitioned_table_is_one_table_in_the_copy() {
    Following::follows(
        "CREATE TABLE p (id int, part int, v text, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
         CREATE TABLE p2 (v text, part int NOT NULL, id int NOT NULL); ALTER TABLE p ATTACH \
         PARTITION p2 FOR VALUES IN (2);
         INSERT INTO p SELECT i, 1 + i % 2, 'v' || i FROM generate_series(1, 40) i",
        &["public.p"],
        &["UPDATE p SET v = 'new' WHERE id < 10", "UPDATE p SET part = 3 - part WHERE id = \
             20", "DELETE FROM p WHERE id = 5"],
    );
}

/// Rows of four kinds of tables, in one transaction that memory does not hold by far.
const LARGE: &str = "
    INSERT INTO keyed SELECT i, repeat(md5(i::text), 4), 0 FROM generate_series(1, 6000) i;
    UPDATE keyed SET n = n + 1 WHERE id % 3 = 0;
    UPDATE keyed SET id = -id WHERE id % 7 = 0;
    INSERT INTO toast SELECT i, (SELECT string_agg(md5((i * j)::text), '') FROM generate_series(1, \
    100) j), 0 FROM generate_series(1, 200) i;
    UPDATE toast SET n = n + 1;
    DELETE FROM keyed WHERE id % 5 = 0;
    INSERT INTO keyed SELECT i, 'again', 7 FROM generate_series(5, 6000, 35) i;
    INSERT INTO bag SELECT i % 10, 'same' FROM generate_series(1, 3000) i;
    DELETE FROM bag WHERE v = 3;
    INSERT INTO gone SELECT i FROM generate_series(3, 3000) i; TRUNCATE gone; INSERT INTO gone \
    SELECT i FROM generate_series(2000, 4000) i;
    UPDATE keyed SET n = n + 1, id = id + 100000 WHERE id > 0;
    UPDATE toast SET n = n + 1, id = -id WHERE id % 2 = 0";

fn with_large_transactions(name: &str) -> Following {
    let mut following = Following::new(name);
    following.db.execute(
        "CREATE TABLE keyed (id int PRIMARY KEY, v text, n int); CREATE TABLE toast (id int \
         PRIMARY KEY, v text, n int);
         ALTER TABLE toast ALTER v SET STORAGE EXTERNAL;
         CREATE TABLE bag (v int, w text); ALTER TABLE bag REPLICA IDENTITY FULL; CREATE TABLE \
         gone (id int PRIMARY KEY);
         INSERT INTO gone VALUES (1), (2); INSERT INTO keyed VALUES (0, 'zero', 0); INSERT INTO \
         bag VALUES (3, 'same')",
    );
    // Each part of a transaction takes a lake some tens of milliseconds.
    let memory = if Kind::of_all_tests().is_some() { "512kB" } else { "64kB" };
    following.rhei = following.rhei.clone().env("RHEI_SYNC_MEMORY_LIMIT", memory);
    following
}

const LARGE_TABLES: [&str; 4] = ["public.keyed", "public.toast", "public.bag", "public.gone"];

#[test]
fn a_transaction_larger_than_memory_is_applied_whole() {
    let following = with_large_transactions("larger_than_memory");
    following.sync();
    // And some that fill memory only together.
    following.db.execute(
        "DO $$ BEGIN FOR k IN 1..60 LOOP
           INSERT INTO keyed SELECT -1000000 - k * 100 - i, repeat('before', k), 1 FROM \
           generate_series(1, 40) i; COMMIT;
           UPDATE keyed SET n = n + 1 WHERE id < -1000000 AND n < k; COMMIT;
         END LOOP; END $$",
    );
    following.db.execute(&format!(
        "BEGIN; {LARGE}; COMMIT; INSERT INTO keyed VALUES (1000000, 'after', 0)"
    ));
    following.sync();
    following.assert_same(&LARGE_TABLES);
    // One cycle is one target transaction, and this one holds as many changes as the source made.
    let of_cycles = match Kind::of_all_tests() {
        None => "SELECT max(inserted + updated + deleted)::VARCHAR FROM _rhei.cycles",
        Some(_) => {
            "SELECT max((i->>'inserted')::INT + (i->>'updated')::INT + \
             (i->>'deleted')::INT)::VARCHAR FROM (SELECT commit_extra_info::JSON AS i FROM \
             copied.snapshots() WHERE author = 'rhei')"
        }
    };
    let cycles = query_copy(following.copy(), of_cycles);
    let changes: u64 = cycles[0][0].as_deref().unwrap().parse().unwrap();
    assert!(changes > 20_000, "{changes}");
}

/// A table fails at the end of a transaction whose beginning is in the target already.
#[test]
fn a_table_that_fails_within_a_large_transaction_keeps_its_rows_and_the_others_go_on() {
    let following = with_large_transactions("fails_large");
    following.db.execute(
        "CREATE TABLE bad (id int PRIMARY KEY, n numeric(5,2)); INSERT INTO bad VALUES \
                  (1, 1), (2, 2)",
    );
    following.sync();
    following.db.execute(&format!(
        "BEGIN; INSERT INTO bad SELECT i, 3 FROM generate_series(3, 3000) i; DELETE FROM bad WHERE \
         id = 1; {LARGE};
         INSERT INTO bad VALUES (9999, 'NaN'); COMMIT; INSERT INTO keyed VALUES (1000000, 'after', \
         0)"
    ));
    let output = following.rhei.run(["sync"]);
    output.assert_code(1);
    assert!(
        output.stderr.contains("public.bad") && output.stderr.contains("NaN"),
        "{}",
        output.stderr
    );
    following.assert_same(&LARGE_TABLES);
    let bad = query_copy(following.copy(), "SELECT id::VARCHAR FROM public.bad ORDER BY id");
    assert_eq!(bad, [[Some("1".to_owned())], [Some("2".to_owned())]]);
}

/// What was begun of it leaves no trace, and it comes again.
#[test]
fn a_large_transaction_that_is_cut_off_is_taken_back_and_comes_again() {
    let following = with_large_transactions("cut_off_large");
    following.sync();
    following.db.execute(&format!("BEGIN; {LARGE}; COMMIT"));
    for round in 0..6 {
        let mut running = following.rhei.clone().env("RHEI_LOG", "rhei=debug").spawn(["sync"]);
        // In the middle of it, later each time: it has more than a hundred parts.
        running.wait_for_log_after(4 * round, "a part of a large transaction is applied", SOON);
        if round % 2 == 0 {
            running.kill9();
        } else {
            running.stop(Duration::from_secs(60));
        }
        let left = query_copy(
            following.copy(),
            "SELECT count(*)::VARCHAR, count(*) FILTER (v = 3)::VARCHAR FROM public.bag",
        );
        let is_before = left == [[Some("1".to_owned()), Some("1".to_owned())]];
        let is_after = left == [[Some("2700".to_owned()), Some("0".to_owned())]];
        assert!(is_before || is_after, "torn: {left:?}");
    }
    following.sync();
    following.assert_same(&LARGE_TABLES);
}

/// The server sends transactions before they have ended once it holds 64 kB of them.
fn with_streaming(name: &str) -> Following {
    let mut following = with_large_transactions(name);
    let url = format!("{}&options=-c%20logical_decoding_work_mem%3D64kB", following.db.url());
    following.rhei = following.rhei.clone().source(url);
    following
}

fn streamed_transactions(following: &Following) -> u64 {
    let sql = format!(
        "SELECT stream_count FROM pg_stat_replication_slots WHERE slot_name = '{}'",
        following.slot()
    );
    following.db.value(&sql).parse().unwrap()
}

/// Trap 79.
#[test]
fn a_transaction_that_is_streamed_before_it_ends_is_applied_when_it_commits() {
    let following = with_streaming("streamed");
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let (open, other) = (following.db.session(), following.db.session());
    open.execute("BEGIN");
    other.execute(
        "BEGIN; INSERT INTO keyed SELECT -i, repeat('never', 50), 0 FROM \
                   generate_series(200001, 206000) i",
    );
    open.execute("INSERT INTO gone SELECT i FROM generate_series(9000, 14000) i; SAVEPOINT a");
    open.execute(
        "UPDATE gone SET id = id + 10000 WHERE id > 8999; INSERT INTO toast SELECT -i, \
                  repeat('x', 5000), 0 FROM generate_series(1, 50) i",
    );
    open.execute(
        "ROLLBACK TO a; INSERT INTO gone SELECT i FROM generate_series(40000, 43000) i; \
                  SAVEPOINT b",
    );
    open.execute(
        "SAVEPOINT c; INSERT INTO bag SELECT i, 'kept' FROM generate_series(1, 3000) i; \
                  RELEASE c; DELETE FROM gone WHERE id = 2",
    );
    // Others commit meanwhile, and are seen; what has not ended is not.
    let without_truncate = LARGE
        .replace("INSERT INTO gone SELECT i FROM generate_series(3, 3000) i; TRUNCATE gone;", "");
    following.db.execute(&format!("BEGIN; {without_truncate}; COMMIT"));
    following.db.execute("INSERT INTO keyed VALUES (777777, 'between', 0)");
    let lsn = following.db.value("SELECT pg_current_wal_flush_lsn()");
    let slot = following.slot();
    wait_until(
        SOON,
        "what has committed is applied beside transactions that have not ended",
        || {
            following.db.value(&format!(
                "SELECT confirmed_flush_lsn >= '{lsn}' FROM pg_replication_slots WHERE slot_name = \
             '{slot}'"
            )) == "t"
        },
    );
    other.execute("ROLLBACK");
    open.execute("COMMIT");
    following.db.execute("INSERT INTO keyed VALUES (777778, 'after', 0)");
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&LARGE_TABLES);
    assert!(streamed_transactions(&following) > 2, "nothing was streamed");
}

/// Each row lacks other values, and one statement reads all of them from the copy.
#[test]
fn rows_that_lack_values_in_hundreds_of_ways_arrive_in_one_batch() {
    let columns = |of: &str| {
        (0..9).map(|at| of.replace("{}", &at.to_string())).collect::<Vec<_>>().join(", ")
    };
    let following = Following::new("many_patterns");
    following.db.execute(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric(9,2), a int[], {});
         ALTER TABLE t {};
         INSERT INTO t SELECT i, i, ARRAY[i], {} FROM generate_series(1, 511) i",
        columns("c{} text"),
        columns("ALTER c{} SET STORAGE EXTERNAL"),
        columns("repeat(md5(i::text || {}), 80)")
    ));
    let mut run = following.run();
    run.wait_for_log("all tables are live", SOON);
    let mark = run.log_mark();
    // Which columns a row keeps is its number. A batch sees all of them.
    let set = |at: usize| {
        format!(
            "c{at} = CASE WHEN id & {} = 0 THEN c{at} ELSE repeat(md5('new' || id), 80) END",
            1 << at
        )
    };
    let all: Vec<String> = (0..9).map(set).collect();
    following.db.execute(&format!(
        "BEGIN; UPDATE t SET n = n + 0.01, {}; UPDATE t SET id = id + 1000 WHERE id % 7 = 0; \
         DELETE FROM t WHERE id % 11 = 0; COMMIT",
        all.join(", ")
    ));
    following.wait_until_in_step();
    run.assert_no_copies_since(mark);
    run.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}
