//! `rhei verify`: finds what was changed in a copy behind rhei's back, and nothing else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use duckdb::Connection;
use serde_json::Value;

use crate::{
    bed::{Output, wait_until},
    following::{Following, from_env},
};

const SOON: Duration = Duration::from_secs(60);

const SCHEMA: &str = "CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
     CREATE TABLE t (
         id bigint PRIMARY KEY, flag boolean, small int, name text NOT NULL, fixed char(6),
         price numeric(10, 2), free numeric, f float8, moment timestamptz, day date, span interval,
         doc jsonb, tags text[], feeling mood, body bytea, who uuid);
     INSERT INTO t SELECT i, i % 2 = 0, i % 7, 'name ' || i, 'ab', i * 1.25, '1.50', i * 0.5,
         timestamptz '2024-01-01 00:00:00Z' + i * interval '1 second', date '2024-01-01' + i % 300,
         interval '1 mon', jsonb_build_object('n', i), ARRAY['a', 'b' || i], 'ok',
         decode(md5(i::text), 'hex'), md5(i::text)::uuid
     FROM generate_series(1, 20000) i;
     CREATE TABLE keyless (a int, b text); ALTER TABLE keyless REPLICA IDENTITY FULL;
     INSERT INTO keyless SELECT i % 100, 'v' FROM generate_series(1, 1000) i;
     CREATE TABLE untouched (id int PRIMARY KEY, v text);
     INSERT INTO untouched SELECT i, 'v' FROM generate_series(1, 5000) i";

fn report(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap()
}

fn table<'a>(report: &'a Value, name: &str) -> &'a Value {
    let mut tables = report["tables"].as_array().unwrap().iter();
    tables.find(|table| table["table"] == name).unwrap()
}

/// `kind key: columns` of each row that differs.
fn rows(table: &Value) -> Vec<String> {
    let of = |row: &Value| {
        let columns = row["columns"].as_array().into_iter().flatten();
        let columns: Vec<&str> = columns.map(|it| it["column"].as_str().unwrap()).collect();
        format!(
            "{} {}: {}",
            row["kind"].as_str().unwrap(),
            row["key"].as_str().unwrap(),
            columns.join(" ")
        )
    };
    let mut rows: Vec<String> = table["differences"].as_array().unwrap().iter().map(of).collect();
    rows.sort();
    rows
}

fn in_copy(following: &Following, sql: &str) {
    Connection::open(following.copy()).unwrap().execute_batch(sql).unwrap();
}

#[test]
fn an_equal_copy_is_found_equal_and_each_planted_difference_is_found_by_key_and_column() {
    let following = Following::new("verify_planted");
    // RHEI_TEST_VERIFY_ROWS has it be a large table.
    let rows_of_t = from_env("RHEI_TEST_VERIFY_ROWS", 20000);
    following.db.execute(&SCHEMA.replace("(1, 20000)", &format!("(1, {rows_of_t})")));
    following.db.execute("UPDATE t SET f = 0 WHERE id = 30");
    following.sync();

    let equal = following.rhei.run_ok(["verify", "--json"]);
    let found = report(&equal);
    assert!(
        found["tables"].as_array().unwrap().iter().all(|it| it["verdict"] == "equal"),
        "{found}"
    );
    assert_eq!(table(&found, "public.t")["source_rows"], rows_of_t);

    let planted = [
        ("DELETE FROM t WHERE id = 1", "missing id=1: "),
        ("INSERT INTO t SELECT * REPLACE (-2 AS id) FROM t WHERE id = 2", "extra id=-2: "),
        ("UPDATE t SET id = -19 WHERE id = 19", "extra id=-19: "),
        ("UPDATE t SET small = small # 1 WHERE id = 3", "different id=3: small"),
        ("UPDATE t SET name = '' WHERE id = 4", "different id=4: name"),
        ("UPDATE t SET flag = NULL WHERE id = 5", "different id=5: flag"),
        ("UPDATE t SET name = name || ' ' WHERE id = 6", "different id=6: name"),
        ("UPDATE t SET price = price + 0.01 WHERE id = 7", "different id=7: price"),
        ("UPDATE t SET free = '1.500' WHERE id = 8", "different id=8: free"),
        (
            "UPDATE t SET moment = moment + INTERVAL 1 MICROSECOND WHERE id = 9",
            "different id=9: moment",
        ),
        // An UPDATE would keep the old value, which DuckDB takes for equal.
        (
            "CREATE TEMP TABLE kept AS SELECT * REPLACE (INTERVAL '30 days' AS span) FROM t WHERE \
             id = 10; DELETE FROM t WHERE id = 10; INSERT INTO t SELECT * FROM kept",
            "different id=10: span",
        ),
        ("UPDATE t SET doc = '{\"n\": 12}' WHERE id = 11", "different id=11: doc"),
        ("UPDATE t SET tags = ['a'] WHERE id = 12", "different id=12: tags"),
        ("UPDATE t SET feeling = 'sad' WHERE id = 13", "different id=13: feeling"),
        ("UPDATE t SET body = '\\x00'::BLOB WHERE id = 14", "different id=14: body"),
        ("UPDATE t SET fixed = 'ab' WHERE id = 15", "different id=15: fixed"),
        ("UPDATE t SET day = day + 1 WHERE id = 16", "different id=16: day"),
        ("UPDATE t SET f = f + 1e-9 WHERE id = 17", "different id=17: f"),
        ("UPDATE t SET who = uuid() WHERE id = 18", "different id=18: who"),
    ];
    for (sql, _) in &planted {
        in_copy(
            &following,
            &sql.replace(" t ", " public.t ").replace("small # 1", "xor(small, 1)"),
        );
    }
    // DuckDB does not keep the sign of a zero (docs/types.md), so it is no difference.
    in_copy(&following, "UPDATE public.t SET f = '-0'::DOUBLE WHERE id = 30");
    // Two values are swapped between rows: the sum of the column stays the same.
    in_copy(
        &following,
        "UPDATE public.t SET price = CASE id WHEN 20 THEN 21 * 1.25 ELSE 20 * 1.25 END WHERE id IN \
         (20, 21); DELETE FROM public.keyless WHERE a = 7 AND rowid = (SELECT min(rowid) FROM \
         public.keyless WHERE a = 7)",
    );

    let output = following.rhei.run(["verify", "--json"]);
    output.assert_code(3);
    let found = report(&output);

    let mut expected: Vec<String> =
        planted.iter().map(|(_, expected)| (*expected).to_owned()).collect();
    expected.extend(
        ["different id=20: price", "different id=21: price", "missing id=19: "].map(str::to_owned),
    );
    expected.sort();
    assert_eq!(rows(table(&found, "public.t")), expected);
    assert_eq!(table(&found, "public.keyless")["missing"], 1);
    assert_eq!(table(&found, "public.untouched")["verdict"], "equal");
    assert!(!output.stdout.contains("name 4"), "no values unless asked: {}", output.stdout);

    let shown = following.rhei.run(["verify", "--table", "public.t", "--values"]);
    shown.assert_code(3);
    assert!(shown.stdout.contains("price: 25.00 | 26.25"), "{}", shown.stdout);

    let repaired = report(following.rhei.run(["verify", "--repair", "--json"]).assert_code(0));
    let repair = &table(&repaired, "public.t")["repair"];
    let (missing, extra) = (2, 2);
    let different = expected.len() - missing - extra;
    assert_eq!(repair["deleted_rows"], different + extra, "{repaired}");
    assert_eq!(repair["inserted_rows"], different + missing, "{repaired}");
}

/// Differences of each kind in both tables, and how many rows they are in.
const PLANTED: &str = "DELETE FROM public.t WHERE id = 1;
    INSERT INTO public.t SELECT * REPLACE (99999 AS id) FROM public.t WHERE id = 2;
    UPDATE public.t SET name = 'wrong' WHERE id IN (3, 4, 19000);
    CREATE TEMP TABLE kept AS SELECT * REPLACE (INTERVAL '30 days' AS span) FROM public.t
        WHERE id = 10; DELETE FROM public.t WHERE id = 10; INSERT INTO public.t SELECT * FROM kept;
    DELETE FROM public.keyless WHERE a = 7 AND rowid = (SELECT min(rowid) FROM public.keyless
        WHERE a = 7);
    INSERT INTO public.keyless VALUES (5, 'v'), (500, 'x');";

#[test]
fn a_repair_mends_the_rows_that_differ_while_the_stream_goes_on_and_keeps_what_was_wrong() {
    let following = Following::new("verify_repair");
    following.db.execute(SCHEMA);
    following.sync();
    in_copy(&following, PLANTED);

    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let is_over = Arc::new(AtomicBool::new(false));
    let (session, stop) = (following.db.session(), Arc::clone(&is_over));
    let loading = std::thread::spawn(move || {
        let mut number = 100;
        while !stop.load(Ordering::Relaxed) {
            number += 1;
            session.execute(&format!(
                "UPDATE t SET small = small + 1 WHERE id = {number}; INSERT INTO keyless VALUES \
                 ({number}, 'x'); DELETE FROM keyless WHERE a = {number} - 3 AND b = 'x'"
            ));
        }
    });

    let output = following.rhei.run(["verify", "--repair", "--json"]);
    output.assert_code(0);
    let found = report(&output);
    let repair = |name: &str| table(&found, name)["repair"].clone();
    let counts =
        |name: &str| (repair(name)["deleted_rows"].clone(), repair(name)["inserted_rows"].clone());
    assert_eq!(table(&found, "public.t")["verdict"], "different");
    assert_eq!(repair("public.t")["verdict"], "equal", "{found}");
    assert_eq!(counts("public.t"), (5.into(), 5.into()), "{found}");
    assert_eq!(repair("public.keyless")["verdict"], "equal", "{found}");
    assert_eq!(table(&found, "public.untouched")["repair"], Value::Null);

    // The changes that come now find the rows as the source had them.
    following.db.execute(
        "UPDATE t SET small = 0 WHERE id IN (1, 3, 10); DELETE FROM t WHERE id = 19000; \
         INSERT INTO t (id, name) VALUES (99999, 'ours'); DELETE FROM keyless WHERE a IN (5, 7)",
    );
    is_over.store(true, Ordering::Relaxed);
    loading.join().unwrap();
    following.wait_settled(&mut running);
    let stopped = running.stop(SOON);
    stopped.assert_code(0);
    assert!(!stopped.stderr.contains("restarting the copy"), "{}", stopped.stderr);

    following.assert_same(&["public.t", "public.keyless", "public.untouched"]);
    let copy = Connection::open(following.copy()).unwrap();
    let kept: String = copy
        .query_row(
            "SELECT string_agg(action || ' ' || n, ', ' ORDER BY action) FROM (SELECT action, \
             count(*) AS n FROM _rhei.repairs WHERE source_name = 't' GROUP BY ALL)",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(kept, "deleted 5, inserted 5");
    let verdicts: String = copy
        .query_row(
            "SELECT string_agg(concat_ws(' ', source_name, verdict, repaired), ', ' ORDER BY \
             source_name) FROM _rhei.verifications WHERE source_name <> 'keyless'",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(verdicts, "t different 5, untouched equal 0");
}

#[test]
fn a_crash_in_the_middle_of_a_repair_leaves_the_copy_as_it_was() {
    let following = Following::new("verify_repair_crash");
    following.db.execute(SCHEMA);
    following.sync();
    in_copy(&following, PLANTED);

    let rhei = following.rhei.clone().env("FAILPOINTS", "repair.committing=return");
    let crashed = rhei.run(["verify", "--repair", "--table", "public.t"]);
    assert_ne!(crashed.code(), Some(0));

    let output = following.rhei.run(["verify", "--json"]);
    output.assert_code(3);
    assert_eq!(table(&report(&output), "public.t")["different"], 4);
    following.rhei.run_ok(["verify", "--repair"]);
    following.rhei.run_ok(["verify"]);
}

#[test]
fn a_table_that_is_rewritten_or_truncated_while_it_is_compared_is_never_called_different() {
    let following = Following::new("verify_rewritten");
    following.db.execute(SCHEMA);
    let rhei = following.rhei.clone().env("FAILPOINTS", "verify.standing=sleep(1500)");
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);

    for change in [
        "VACUUM FULL t",
        "ALTER TABLE t ALTER small TYPE bigint",
        "TRUNCATE untouched",
        "ALTER TABLE t ADD extra int DEFAULT 7; ALTER TABLE keyless RENAME b TO c",
    ] {
        let asking = following.rhei.clone();
        let verifying = std::thread::spawn(move || asking.run(["verify", "--json"]));
        wait_until(SOON, "a session stands at a snapshot", || {
            following.db.value(
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = \
                 'rhei/verify' AND state = 'idle in transaction' AND datname = current_database()",
            ) == "t"
        });
        following.db.execute(change);

        let found = report(&verifying.join().unwrap());
        for table in found["tables"].as_array().unwrap() {
            assert_ne!(table["verdict"], "different", "{change}: {found}");
        }
    }

    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);
    following.rhei.run_ok(["verify"]);
}

#[test]
fn keys_of_each_type_have_one_hash_on_both_sides() {
    let following = Following::new("verify_keys");
    let numbers = "-1, 0, 1, 32767, -32768";
    let keys = [
        ("smallint", format!("unnest(ARRAY[{numbers}]::smallint[])")),
        ("int", format!("unnest(ARRAY[{numbers}, 2147483647, -2147483648]::int[])")),
        (
            "bigint",
            format!(
                "unnest(ARRAY[{numbers}, 4294967295, 9223372036854775807, -4294967296]::int8[])"
            ),
        ),
        ("oid", "unnest(ARRAY[0, 4294967295]::oid[])".to_owned()),
        ("uuid", "unnest(ARRAY[gen_random_uuid(), gen_random_uuid()])".to_owned()),
        ("text", "unnest(ARRAY['', 'ä€𝄞', 'a', repeat('x', 1000)])".to_owned()),
        ("varchar(20)", "unnest(ARRAY['', 'b ', 'é']::varchar[])".to_owned()),
        ("char(4)", "unnest(ARRAY['a', 'ab']::char(4)[])".to_owned()),
        ("positive", "unnest(ARRAY[1, 70000]::positive[])".to_owned()),
        ("word", "unnest(ARRAY['one', 'two']::word[])".to_owned()),
        ("numeric(20, 2)", "unnest(ARRAY[0.5, -0.5]::numeric[])".to_owned()),
        ("timestamptz", "unnest(ARRAY['infinity', now()]::timestamptz[])".to_owned()),
        ("bytea", "unnest(ARRAY['', '\\x00ff']::bytea[])".to_owned()),
    ];
    following.db.execute(
        "CREATE DOMAIN positive AS int CHECK (value > 0); CREATE DOMAIN word AS varchar(9)",
    );
    for (number, (kind, values)) in keys.iter().enumerate() {
        following.db.execute(&format!(
            "CREATE TABLE k{number} (id {kind} PRIMARY KEY, v int);
             INSERT INTO k{number} SELECT id, 1 FROM {values} AS id"
        ));
    }
    following.sync();

    let found = report(following.rhei.run_ok(["verify", "--json"]).assert_code(0));
    assert_eq!(found["tables"].as_array().unwrap().len(), keys.len());
    in_copy(&following, "UPDATE public.k2 SET v = 2 WHERE id = 4294967295");
    let found = report(following.rhei.run(["verify", "--json"]).assert_code(3));
    assert_eq!(table(&found, "public.k2")["differences"].as_array().unwrap().len(), 1);
}

#[test]
fn a_verification_ends_when_its_client_goes_away() {
    let following = Following::new("verify_client");
    following.db.execute(SCHEMA);
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);

    let client = following.rhei.spawn(["verify", "--rate-limit", "100KB", "--table", "public.t"]);
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rhei/verify' \
                    AND datname = current_database()";
    wait_until(SOON, "the verification has begun", || following.db.value(sessions) != "0");
    client.kill9();
    wait_until(SOON, "the verification has ended", || following.db.value(sessions) == "0");
    running.stop(SOON).assert_code(0);
}

#[test]
fn samples_take_turns_until_every_row_was_compared() {
    let following = Following::new("verify_sample");
    following.db.execute(SCHEMA);
    following.sync();
    in_copy(&following, "UPDATE public.t SET small = 99 WHERE id = 777");

    let mut compared = 0;
    let mut differing = Vec::new();
    for turn in 0..4 {
        let output = following.rhei.run(["verify", "--sample", "25%", "--json"]);
        let found = report(&output);
        let t = table(&found, "public.t");
        assert_eq!(t["part"]["number"], turn);
        compared += t["source_rows"].as_u64().unwrap();
        differing.extend(rows(t));
        assert_eq!(output.code(), Some(if t["verdict"] == "equal" { 0 } else { 3 }));
    }
    assert_eq!(compared, 20000);
    assert_eq!(differing, ["different id=777: small"]);
}

#[test]
fn a_run_verifies_by_itself_and_says_what_it_found() {
    let following = Following::new("verify_scheduled");
    following.db.execute(SCHEMA);
    following.sync();
    in_copy(&following, "UPDATE public.t SET small = 99 WHERE id = 777");

    let rhei = following
        .rhei
        .clone()
        .env("RHEI_VERIFY_INTERVAL", "1s")
        .env("RHEI_VERIFY_RATE_LIMIT", "1GB");
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("the copy of a table differs from its source", SOON);
    assert!(!running.logs().contains("777"), "no values: {}", running.logs());

    // The log says it before the results of all tables are stored.
    crate::bed::wait_until(SOON, "the status shows the result", || {
        let status = rhei.status().unwrap();
        let mut tables = status["tables"].as_array().unwrap().iter();
        let t = tables.find(|table| table["source"] == "public.t").unwrap();
        t["verified"]["verdict"] == "different"
    });
    running.stop(SOON).assert_code(0);
}

#[test]
fn a_copy_that_is_written_all_the_time_is_found_equal_each_time() {
    let following = Following::new("verify_live");
    following.db.execute(SCHEMA);
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);

    let is_over = Arc::new(AtomicBool::new(false));
    let (session, stop) = (following.db.session(), Arc::clone(&is_over));
    let loading = std::thread::spawn(move || {
        let mut number = 0;
        while !stop.load(Ordering::Relaxed) {
            number += 1;
            session.execute(&format!(
                "BEGIN; UPDATE t SET small = small + 1, name = 'new {number}' WHERE id = {number}; \
                 DELETE FROM t WHERE id = {number} % 9000 + 100; INSERT INTO keyless VALUES ({number}, \
                 'x'); DELETE FROM keyless WHERE a = {number} - 3; COMMIT"
            ));
        }
    });

    for _ in 0..from_env("RHEI_TEST_VERIFICATIONS", 10) {
        following.rhei.run(["verify", "--json"]).assert_code(0);
    }

    is_over.store(true, Ordering::Relaxed);
    loading.join().unwrap();
    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);

    in_copy(&following, "UPDATE public.t SET small = small + 1 WHERE id = 19999");
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    for number in 0..from_env("RHEI_TEST_VERIFICATIONS", 3) {
        following.db.execute(&format!("UPDATE t SET small = small + 1 WHERE id < 5000 + {number}"));
        let found = report(following.rhei.run(["verify", "--json"]).assert_code(3));
        assert_eq!(rows(table(&found, "public.t")), ["different id=19999: small"]);
    }
    running.stop(SOON).assert_code(0);
}

#[test]
fn a_table_that_is_paused_or_unknown_is_not_called_equal() {
    let following = Following::new("verify_paused");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY, v numeric(50, 2))");
    following.sync();
    in_copy(
        &following,
        "UPDATE _rhei.tables SET state = 'error', error = 'a test', remedy = 'operator'",
    );

    let output = following.rhei.run(["verify", "--json"]);
    output.assert_code(1);
    let found = report(&output);
    assert_eq!(table(&found, "public.t")["verdict"], "not_verified");

    let unknown = following.rhei.run(["verify", "--table", "public.nothing"]);
    unknown.assert_code(1);
    assert!(unknown.stderr.contains("no table public.nothing"), "{}", unknown.stderr);
}

#[test]
fn partitions_row_filters_and_excluded_columns_are_honoured() {
    let following = Following::new("verify_shapes");
    if crate::bed::Cluster::shared().major() < 15 {
        return;
    }
    following.db.execute(
        "CREATE TABLE root (id int, region text, v text, secret text, PRIMARY KEY (id, region))
             PARTITION BY LIST (region);
         CREATE TABLE east PARTITION OF root FOR VALUES IN ('east');
         CREATE TABLE west PARTITION OF root FOR VALUES IN ('west');
         INSERT INTO root SELECT i, CASE WHEN i % 2 = 0 THEN 'east' ELSE 'west' END, 'v', 's'
             FROM generate_series(1, 1000) i;
         CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child () INHERITS (parent);
         INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2);
         CREATE TABLE filtered (id int PRIMARY KEY, v int);
         INSERT INTO filtered SELECT i, i FROM generate_series(1, 100) i;
         CREATE PUBLICATION rhei FOR TABLE root (id, region, v), ONLY parent, filtered WHERE (id > 50)
             WITH (publish_via_partition_root = true)",
    );
    following.sync();

    let output = following.rhei.run(["verify", "--json"]);
    output.assert_code(0);
    let found = report(&output);
    let counts: Vec<u64> = ["public.root", "public.parent", "public.filtered"]
        .iter()
        .map(|name| table(&found, name)["source_rows"].as_u64().unwrap())
        .collect();
    assert_eq!(counts, [1000, 1, 50]);
}
