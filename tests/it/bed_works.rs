//! The bed itself, without rhei.

use std::{path::Path, time::Duration};

use crate::bed::{
    self, Cluster, ClusterOptions, Load, Pgbench, Rhei,
    cluster::{bin_dir, is_alive},
    oracle::{self, Pair},
};

fn make_copy(file: &Path, sql: &str) {
    let copy = duckdb::Connection::open(file).unwrap();
    copy.execute_batch(sql).unwrap();
    copy.close().unwrap();
}

#[test]
fn each_test_gets_a_fresh_database_of_the_shared_cluster() {
    let cluster = Cluster::shared();
    let (a, b) = (cluster.database("fresh"), cluster.database("fresh"));
    a.execute("CREATE TABLE t (x int); INSERT INTO t VALUES (1), (NULL)");
    assert_eq!(a.query("SELECT x FROM t ORDER BY x"), [[Some("1".to_owned())], [None]]);
    assert!(b.try_query("SELECT * FROM t").unwrap_err().contains("42P01"));
    assert_eq!(a.value("SHOW wal_level"), "logical");
    assert_eq!(a.value("SHOW max_prepared_transactions"), "10");
    let name = a.name().to_owned();
    a.execute("SELECT pg_create_logical_replication_slot('bed_fresh', 'pgoutput')");
    drop(a);
    let left = format!("SELECT count(*) FROM pg_database WHERE datname = '{name}'");
    assert_eq!(cluster.maintenance().value(&left), "0");
}

#[test]
fn both_urls_reach_the_database() {
    let db = Cluster::shared().database("urls");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for url in [db.url(), db.socket_url()] {
        runtime.block_on(async {
            let (client, connection) =
                tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            let row = client.query_one("SELECT current_database()::text", &[]).await.unwrap();
            assert_eq!(row.get::<_, String>(0), db.name());
        });
    }
}

#[test]
fn the_major_under_test_is_the_one_asked_for() {
    let version = Cluster::shared().maintenance().value("SHOW server_version_num");
    assert_eq!(version.parse::<u32>().unwrap() / 10_000, Cluster::shared().major());
    assert_eq!(Cluster::shared().bin(), bin_dir());
}

#[test]
fn what_was_committed_survives_kill_9_and_every_way_to_stop() {
    let cluster = Cluster::start(ClusterOptions::durable().conf("work_mem = '7MB'"));
    let db = cluster.database("durable");
    assert_eq!(db.value("SHOW work_mem"), "7MB");
    db.execute("CREATE TABLE t (x int); INSERT INTO t VALUES (1)");
    let open = db.session();
    open.execute("BEGIN; INSERT INTO t VALUES (2)");
    cluster.kill9();
    assert!(!cluster.is_running());
    assert!(open.try_query("COMMIT").is_err());
    cluster.start_again();
    assert_eq!(db.value("SELECT sum(x) FROM t"), "1");
    cluster.stop_immediate();
    cluster.start_again();
    cluster.stop_fast();
    assert!(!cluster.is_running());
    cluster.start_again();
    assert_eq!(db.value("SELECT sum(x) FROM t"), "1");
}

#[test]
fn a_dropped_cluster_leaves_nothing() {
    let cluster = Cluster::start(ClusterOptions::default());
    let (pid, folder) = (cluster.postmaster_pid().unwrap(), cluster.folder().to_owned());
    assert!(is_alive(pid) && folder.exists());
    drop(cluster);
    bed::wait_until(Duration::from_secs(10), "the server is gone", || {
        !is_alive(pid) && !folder.exists()
    });
}

/// Not a test by itself: the next one runs it in a process of its own and kills that.
#[test]
#[ignore = "helper of the next test"]
fn holds_a_cluster_until_it_is_killed() {
    let Some(note) = std::env::var_os("BED_NOTE") else { return };
    let cluster = Cluster::start(ClusterOptions::default());
    let text = format!("{} {}", cluster.postmaster_pid().unwrap(), cluster.folder().display());
    std::fs::write(Path::new(&note).with_extension("part"), text).unwrap();
    std::fs::rename(Path::new(&note).with_extension("part"), &note).unwrap();
    std::thread::park();
}

#[test]
fn a_killed_test_process_leaves_nothing() {
    let folder = bed::temp_dir();
    let note = folder.path().join("note");
    let mut process = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "bed_works::holds_a_cluster_until_it_is_killed"])
        .env("BED_NOTE", &note)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    bed::wait_until(Duration::from_secs(60), "the cluster starts", || note.exists());
    let text = std::fs::read_to_string(&note).unwrap();
    let (pid, cluster) = text.split_once(' ').unwrap();
    let pid = pid.parse().unwrap();
    assert!(is_alive(pid));
    process.kill().unwrap();
    process.wait().unwrap();
    bed::wait_until(Duration::from_secs(30), "the watchdog cleans up", || {
        !is_alive(pid) && !Path::new(cluster).exists()
    });
}

#[test]
fn the_oracle_finds_every_planted_difference() {
    let db = Cluster::shared().database("planted");
    let folder = bed::temp_dir();
    let file = folder.path().join("copy.duckdb");
    db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, n numeric(9,2));
         INSERT INTO t VALUES (1, 'same', 1.50), (2, 'changed', 2), (3, 'missing', 3), (5, NULL, \
         NULL), (6, 'twice', 6);
         CREATE TABLE bag (v int); INSERT INTO bag VALUES (1), (1), (2);
         CREATE TABLE wide (id int PRIMARY KEY, a int, b int); CREATE TABLE gone (id int)",
    );
    make_copy(
        &file,
        "CREATE SCHEMA IF NOT EXISTS public; CREATE TABLE public.t (id INTEGER, v VARCHAR, n \
         DECIMAL(9,2));
         INSERT INTO public.t VALUES (1, 'same', 1.50), (2, 'Changed', 2), (4, 'extra', 4), (5, \
         '', NULL), (6, 'twice', 6), (6, 'twice', 6);
         CREATE TABLE public.bag (v INTEGER); INSERT INTO public.bag VALUES (1), (2), (2);
         CREATE TABLE public.wide (id INTEGER, a INTEGER, c INTEGER)",
    );
    let report = oracle::compare(
        &db,
        &file,
        &["public.t", "public.bag", "public.wide", "public.gone"].map(Pair::new),
    );
    let report = report.join("\n");
    for expected in [
        "public.t: 5 rows in the source, 6 in the copy; 1 only in the source, 2 only in the copy, \
         2 different",
        r#"different: id="2" v: source "changed" copy "Changed""#,
        r#"different: id="5" v: source NULL copy """#,
        r#"only in the source: id="3""#,
        r#"only in the copy: id="4""#,
        r#"only in the copy: id="6""#,
        "public.bag: 3 rows in the source, 3 in the copy; 1 only in the source, 1 only in the \
         copy, 0 different",
        "public.wide: column b is missing in the copy",
        "public.wide: column c is only in the copy",
        "public.gone: no such table in the copy",
    ] {
        assert!(report.contains(expected), "no {expected:?} in:\n{report}");
    }
}

const TYPES: &str = "
    CREATE DOMAIN pos AS int CHECK (value > 0); CREATE DOMAIN tags AS text[]; CREATE TYPE mood AS \
    ENUM ('sad', 'ok');
    CREATE TABLE t (id int PRIMARY KEY, b bool, i8 int8, f4 float4, f8 float8, n numeric(10,3), \
    tiny numeric(4,4), free numeric,
        m money, s text, c char(5), bin bytea, d date, ts timestamp, tz timestamptz, tm time, iv \
        interval, u uuid, js json, jb jsonb,
        e mood, dom pos, ip inet, arr int[], words tags, grid int[][], chars char(3)[], fs \
        float8[], days date[], moods mood[]);
    INSERT INTO t VALUES
    (1, true, 9223372036854775807, 1e-45, 0.1::float8 + 0.2, 1234567.890, 0.0001, 1.500, -1234.56, \
    E'a\\tb', 'ab', '\\x00ff', '4713-01-01 BC',
        '2000-02-29 12:00:00.000001', '2024-07-01 00:00:00+02', '24:00:00', '1 mon -2 days \
        +03:04:05.6', '0f0e0d0c-0b0a-0908-0706-050403020100',
        '{\"a\": 1, \"a\":2 }', '{\"b\": [1, 2]}', 'sad', 7, '10.0.0.1', '{1,NULL,3}', \
        '{x,\"NULL\",\"a,b\"}', '{{1,2},{3,4}}', '{ab,c}',
        '{NaN,-0,1e300}', '{2024-01-01,infinity}', '{ok}'),
    (2, false, -1, 'NaN', '-Infinity', -0.5, -0.5, 'NaN', 0, '', '', '', 'infinity', '-infinity', \
    'infinity', '00:00:00.1', '-178000000 years',
        '00000000-0000-0000-0000-000000000000', 'null', '1', 'ok', 1, '::1/128', '{}', '{}', '{}', \
        '{}', '{}', '{}', '{}'),
    (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, \
    NULL, NULL, NULL, NULL, NULL, NULL, NULL,
        NULL, NULL, NULL, NULL, NULL, NULL, NULL),
    (4, NULL, 0, '-0', '-0', 0, 0, 1e100, 1, 'é𝄞', 'xxxxx', '\\x27', '5874897-12-31', '0044-03-15 \
    12:00:00 BC', '1900-01-01 00:00:00+00', '23:59:59.999999',
        '24:00:00', NULL, '1e400', '\"\"', 'ok', 1, '10.0.0.0/8', '{2147483647}', NULL, NULL, \
        NULL, NULL, NULL, NULL)";

const TYPES_COPY: &str = r#"
    CREATE SCHEMA public;
    CREATE TABLE public.t (id INTEGER, b BOOLEAN, i8 BIGINT, f4 FLOAT, f8 DOUBLE, n DECIMAL(10,3), tiny DECIMAL(4,4), free VARCHAR,
        m DECIMAL(19,2), s VARCHAR, c VARCHAR, bin BLOB, d DATE, ts TIMESTAMP, tz TIMESTAMPTZ, tm TIME, iv INTERVAL, u UUID, js JSON, jb JSON,
        e VARCHAR, dom INTEGER, ip VARCHAR, arr INTEGER[], words VARCHAR[], grid INTEGER[][], chars VARCHAR[], fs DOUBLE[], days DATE[], moods VARCHAR[]);
    INSERT INTO public.t VALUES
    (1, true, 9223372036854775807, CAST('1e-45' AS FLOAT), CAST('0.1' AS DOUBLE) + CAST('0.2' AS DOUBLE), 1234567.890, 0.0001, '1.500', -1234.56, chr(97) || chr(9) || 'b',
        'ab   ', '\x00\xFF'::BLOB, DATE '4713-01-01 (BC)', TIMESTAMP '2000-02-29 12:00:00.000001', TIMESTAMPTZ '2024-06-30 22:00:00+00',
        TIME '24:00:00', to_months(1) + to_days(-2) + to_microseconds(11045600000), '0f0e0d0c-0b0a-0908-0706-050403020100', '{"a": 1, "a":2 }', '{"b": [1, 2]}', 'sad', 7,
        '10.0.0.1', [1, NULL, 3], ['x', 'NULL', 'a,b'], [[1, 2], [3, 4]], ['ab ', 'c  '], ['NaN'::DOUBLE, '-0'::DOUBLE, 1e300], [DATE '2024-01-01', DATE 'infinity'], ['ok']),
    (2, false, -1, 'NaN', '-Infinity', -0.5, -0.5, 'NaN', 0, '', '     ', ''::BLOB, 'infinity', '-infinity', 'infinity', '00:00:00.1',
        to_months(-2136000000), '00000000-0000-0000-0000-000000000000', 'null', '1', 'ok', 1, '::1', [], [], [], [], [], [], []),
    (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
        NULL, NULL, NULL, NULL, NULL, NULL, NULL),
    (4, NULL, 0, '-0', '-0', 0, 0, '1' || repeat('0', 100), 1, 'é𝄞', 'xxxxx', '\x27'::BLOB, DATE '5874897-12-31', TIMESTAMP '0044-03-15 (BC) 12:00:00',
        TIMESTAMPTZ '1900-01-01 00:00:00+00', '23:59:59.999999', to_microseconds(86400000000), NULL, '1e400', '""', 'ok', 1, '10.0.0.0/8', [2147483647],
        NULL, NULL, NULL, NULL, NULL, NULL);
"#;

#[test]
fn the_oracle_takes_equal_values_of_every_type_family_as_equal() {
    let db = Cluster::shared().database("types");
    let folder = bed::temp_dir();
    let file = folder.path().join("copy.duckdb");
    db.execute(TYPES);
    make_copy(&file, TYPES_COPY);
    oracle::assert_same(&db, &file, &["public.t"]);
}

#[test]
fn the_oracle_tells_apart_values_that_only_look_equal() {
    let db = Cluster::shared().database("lookalike");
    db.execute(TYPES);
    let folder = bed::temp_dir();
    for (number, (column, value, id)) in [
        ("f8", "0.0", 4),
        ("f8", "0.3", 1),
        ("f4", "0", 1),
        ("c", "'ab'", 1),
        ("iv", "INTERVAL 1 DAY", 4),
        ("tm", "TIME '00:00:00'", 1),
        ("js", r#"'{"a":1,"a":2}'"#, 1),
        ("free", "'1.5'", 1),
        ("words", "['x', NULL, 'a,b']", 1),
        ("words", "NULL", 2),
        ("grid", "[[1, 2, 3, 4]]", 1),
        ("arr", "[1, 3, NULL]", 1),
        ("ts", "ts + INTERVAL 1 MICROSECOND", 1),
        ("tz", "tz + INTERVAL 2 HOUR", 1),
        ("bin", "NULL", 2),
        ("d", "DATE '-infinity'", 2),
    ]
    .into_iter()
    .enumerate()
    {
        let file = folder.path().join(format!("{number}.duckdb"));
        // Not an UPDATE: that keeps -0 where 0 is written over it, and 24 hours where it is 1 day.
        make_copy(
            &file,
            &format!(
                "{TYPES_COPY}; CREATE OR REPLACE TABLE public.t AS \
                 SELECT * REPLACE (CASE WHEN id = {id} THEN {value} ELSE {column} END AS {column}) \
                 FROM public.t"
            ),
        );
        let report = oracle::compare(&db, &file, &[Pair::new("public.t")]).join("\n");
        assert!(report.contains("1 different"), "{column} = {value} was not found:\n{report}");
    }
}

/// The four tables, written out by hand as the copy must have them.
const DEMO_COPY: [(&str, &str, &str); 4] = [
    (
        "customers",
        "id BIGINT, reference UUID, name VARCHAR, email VARCHAR, country VARCHAR, born DATE, \
         newsletter BOOLEAN, \
         interests VARCHAR[], profile JSON, created_at TIMESTAMPTZ",
        "id, reference, name, email, country, born, newsletter, to_json(interests), profile, \
         created_at",
    ),
    (
        "orders",
        "id BIGINT, customer_id BIGINT, status VARCHAR, total DECIMAL(12,2), ordered_at \
         TIMESTAMPTZ, deliver_on DATE, \
         gift BOOLEAN, note VARCHAR",
        "*",
    ),
    (
        "order_lines",
        "order_id BIGINT, line INTEGER, sku VARCHAR, quantity INTEGER, unit_price DECIMAL(10,2), \
         attributes JSON",
        "*",
    ),
    (
        "payments",
        "id UUID, order_id BIGINT, method VARCHAR, amount DECIMAL(12,2), paid_at TIMESTAMPTZ, fees \
         DECIMAL(8,4)[], raw JSON",
        "id, order_id, method, amount, paid_at, to_json(fees), raw",
    ),
];

#[test]
fn the_demo_queries_give_the_same_text_on_both_sides() {
    let cluster = Cluster::start(ClusterOptions::default());
    let db = cluster.database("shop");
    db.execute(include_str!("../../fixtures/demo/schema.sql"));
    db.execute(include_str!("../../fixtures/demo/load.sql"));
    for _ in 0..10 {
        db.execute(include_str!("../../fixtures/demo/writes.sql"));
    }
    let folder = bed::temp_dir();
    let file = folder.path().join("copy.duckdb");
    let mut load = "CREATE SCHEMA public;".to_owned();
    for (table, columns, select) in DEMO_COPY {
        let csv = cluster.folder().join(format!("{table}.csv"));
        let csv = csv.display();
        db.execute(&format!(
            "SET TimeZone = 'UTC'; COPY (SELECT {select} FROM {table}) TO '{csv}' (FORMAT csv, \
             FORCE_QUOTE *)"
        ));
        load.push_str(&format!(
            "CREATE TABLE public.{table} ({columns}); COPY public.{table} FROM '{csv}' (FORMAT \
             csv, HEADER false, NULLSTR '', \
             ALLOW_QUOTED_NULLS false);"
        ));
    }
    make_copy(&file, &load);
    oracle::assert_same(
        &db,
        &file,
        &["public.customers", "public.orders", "public.order_lines", "public.payments"],
    );

    let queries = include_str!("../../fixtures/demo/queries.sql").split("-- name: ").skip(1);
    let mut count = 0;
    for query in queries {
        let (name, sql) = query.split_once('\n').unwrap();
        let sql = sql.trim().trim_end_matches(';');
        let session = db.session();
        session.execute("SET TimeZone = 'UTC'");
        let expected = session.query(sql);
        assert_eq!(expected.len(), 8, "{name}");
        assert_eq!(oracle::query_copy(&file, sql), expected, "{name}");
        count += 1;
    }
    assert_eq!(count, 3);
}

#[test]
fn pgbench_runs_in_the_background_and_counts_its_transactions() {
    let db = Cluster::shared().database("pgbench");
    Pgbench::init(&db, 1);
    let done =
        Pgbench::start(&db, &Load::transactions(20).clients(2)).wait(Duration::from_secs(60));
    assert_eq!(done, 40);
    assert_eq!(db.value("SELECT count(*) FROM pgbench_history"), "40");
    let mut endless = Pgbench::start(&db, &Load::seconds(600));
    bed::wait_until(Duration::from_secs(30), "it writes", || {
        db.value("SELECT count(*) > 40 FROM pgbench_history") == "t"
    });
    assert!(endless.is_running());
    endless.stop();
}

#[test]
fn the_binary_runs_away_from_its_callers_surroundings() {
    let folder = bed::temp_dir();
    let output = Rhei::new(folder.path()).run(["--version"]);
    assert!(output.code().is_some(), "{output:?}");
}
