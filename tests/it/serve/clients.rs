//! What clients ask before they show anything.

use std::process::Command;

use super::{SOON, Served};
use crate::{
    bed::{Running, cluster::bin_dir},
    following::Following,
};

const SETUP: &str =
    "CREATE TABLE orders (id bigint PRIMARY KEY, \"Customer name\" text NOT NULL, total \
                     numeric(12,2), placed timestamptz);
                     CREATE TABLE lines (order_id bigint, line int, tags text[], PRIMARY KEY \
                     (order_id, line));
                     INSERT INTO orders VALUES (1, 'a', 1.50, '2024-01-01Z')";

fn psql(served: &Served, command: &str) -> (bool, String) {
    let output = Command::new(bin_dir().join("psql"))
        .args(["-X", "-h", served.folder.to_str().unwrap(), "-U", "reader", "-d", "copy"])
        .args(["-v", "ON_ERROR_STOP=1", "-c", command])
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn the_commands_of_psql_work() {
    let served = Served::new("serve_psql", SETUP, "");
    for command in [
        "\\d",
        "\\d orders",
        "\\d+ orders",
        "\\d lines_pkey",
        "\\dt",
        "\\dt+",
        "\\dn",
        "\\dn+",
        "\\df",
        "\\da",
        "\\l",
        "\\l+",
        "\\du",
        "\\dx",
        "\\dv",
        "\\di",
        "\\di+",
        "\\ds",
        "\\dm",
        "\\dT",
        "\\dp",
        "\\db",
        "\\dc",
        "\\dC",
        "\\dd",
        "\\dD",
        "\\des",
        "\\dew",
        "\\dF",
        "\\dg",
        "\\do",
        "\\dO",
        "\\dRp",
        "\\dRs",
        "\\dy",
        "\\z",
        "\\ddp",
        "\\drds",
        "\\dL",
        "\\dA",
        "\\dX",
        "\\dS",
        "\\conninfo",
        "\\encoding",
    ] {
        let (is_done, text) = psql(&served, command);
        assert!(is_done, "{command}: {text}");
    }

    let (_, described) = psql(&served, "\\d orders");
    for part in [
        "bigint",
        "Customer name",
        "numeric(12,2)",
        "timestamp with time zone",
        "\"orders_pkey\" PRIMARY KEY, btree (id)",
    ] {
        assert!(described.contains(part), "{part}: {described}");
    }
    let (_, tables) = psql(&served, "\\dt");
    assert!(tables.contains("orders") && tables.contains("lines"), "{tables}");
    assert!(!tables.contains("_rhei"), "{tables}");
    served.stop();
}

/// What psql asks when the tab key is pressed (`tab-complete.c`), and drivers at their start.
#[test]
fn questions_of_clients_have_answers() {
    let served = Served::new("serve_questions", SETUP, "");
    let session = served.session();
    for (sql, expected) in [
        (
            "SELECT c.relname FROM pg_catalog.pg_class c WHERE c.relkind IN ('r', 'S', 'v', 'm', \
             'f', 'p') AND (c.relname) LIKE 'ord%' AND pg_catalog.pg_table_is_visible(c.oid) AND \
             c.relnamespace <> (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = \
             'pg_catalog')",
            "orders",
        ),
        ("SELECT count(*) FROM information_schema.columns WHERE table_name = 'orders'", "4"),
        ("SELECT data_type FROM information_schema.columns WHERE column_name = 'tags'", "ARRAY"),
        ("SELECT 'public.orders'::regclass::oid > 0", "t"),
        (
            "SELECT string_agg(a.attname, ',' ORDER BY a.attnum) FROM pg_index i JOIN pg_attribute a ON \
          a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey) WHERE i.indrelid = \
          'lines'::regclass AND i.indisprimary",
            "order_id,line",
        ),
        ("SELECT current_database() <> ''", "t"),
        ("SELECT version() LIKE 'PostgreSQL 16%'", "t"),
        ("SHOW server_version", "16.0"),
        ("SHOW TRANSACTION ISOLATION LEVEL", "repeatable read"),
        ("SHOW search_path", "public"),
        ("SELECT pg_catalog.format_type(1700, 786438)", "numeric(12,2)"),
        ("SELECT set_config('bytea_output', 'hex', false)", "hex"),
        ("SELECT pg_is_in_recovery()", "t"),
        ("SELECT json_build_object('a', 1, 'b', 'x')", "{\"a\":1,\"b\":\"x\"}"),
        (
            "SELECT to_char(TIMESTAMP '2024-02-03 04:05:06', 'YYYY-MM-DD HH24:MI')",
            "2024-02-03 04:05",
        ),
    ] {
        assert_eq!(session.value(sql), expected, "{sql}");
    }
    session.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY");
    session.execute(
        "SET client_encoding TO 'UTF8'; SET extra_float_digits = 3; RESET ALL; DISCARD ALL",
    );
    session.execute(
        "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; SAVEPOINT a; ROLLBACK TO a; END",
    );
    served.stop();
}

/// As these tools ask PostgreSQL, which the source is: what it answers, the copy has to answer.
#[test]
fn questions_of_tools_are_answered() {
    let served = Served::new("serve_tools", SETUP, "");
    let source = served.following.db.session();
    let copy = served.session();
    let questions = include_str!("../../../fixtures/questions.sql").lines();
    let questions: Vec<&str> = questions.filter(|line| !line.starts_with("--")).collect();
    assert!(questions.len() > 20);
    for question in questions {
        let theirs =
            source.try_query(question).unwrap_or_else(|error| panic!("{question}: {error}"));
        let ours = copy.try_query(question).unwrap_or_else(|error| panic!("{question}: {error}"));
        // What there is of the server itself differs; what there is of the tables does not.
        let is_of_tables = question.contains("orders") || question.contains("n_live_tup");
        let width = |rows: &Vec<Vec<Option<String>>>| rows.first().map(Vec::len);
        if is_of_tables {
            assert_eq!(ours.len(), theirs.len(), "{question}");
            assert_eq!(width(&ours), width(&theirs), "{question}");
        }
    }
    served.stop();
}

#[test]
fn schemas_of_the_search_path_are_looked_up() {
    let served = Served::new(
        "serve_path",
        "CREATE SCHEMA sales; CREATE TABLE sales.t (id int PRIMARY KEY); INSERT INTO sales.t VALUES \
         (7)",
        "",
    );
    let session = served.session();
    assert!(session.try_query("SELECT id FROM t").is_err());
    session.execute("SET search_path TO sales, public");
    assert_eq!(session.value("SELECT id FROM t"), "7");
    assert_eq!(session.value("SELECT id FROM rhei_target.sales.t"), "7");
    served.stop();
}

/// A replicator that listens on a port, with a table of many types; and the URL of its copy.
fn served_on_a_port(name: &str) -> (Following, Running, String) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let served = Served::new(
        name,
        "CREATE TABLE typed (id int PRIMARY KEY, b boolean, i2 smallint, i4 int, i8 bigint, f4 real, \
         f8 float8, n numeric(12,2), t text, bs bytea, d date, ts timestamp, tstz timestamptz, u \
         uuid, iv interval, ia int[], ta text[]);
         INSERT INTO typed SELECT i, i % 2 = 0, i, i - 5, i * 1000000000::bigint, i * 0.5, i / 3.0, \
         i * 12.5 / 7, 'text ' || i, decode(md5(i::text), 'hex'), date '2024-01-01' + i, timestamp \
         '2024-01-01' + i * interval '1 hour', timestamptz '2024-01-01Z' + i * interval '1 minute', \
         md5(i::text)::uuid, i * interval '1 day 2 hours', ARRAY[i, NULL, -i], ARRAY['a', 'b ' || i, \
         NULL] FROM generate_series(1, 9) i;
         UPDATE typed SET n = 12.50, t = 'a \"b\", c', d = '2024-02-29' WHERE id = 7;
         INSERT INTO typed (id) VALUES (10)",
        "",
    );
    let Served { mut following, mut running, .. } = served;
    running.stop(SOON).assert_code(0);
    following.rhei = following.rhei.env("RHEI_SERVE_LISTEN", &format!("127.0.0.1:{port}"));
    running = following.run();
    running.wait_for_log("following the source", SOON);
    (following, running, format!("postgresql://postgres@127.0.0.1:{port}/copy"))
}

fn client(file: &str) -> String {
    format!("{}/tests/clients/{file}", env!("CARGO_MANIFEST_DIR"))
}

/// Each client asks the source and the copy the same, and gets the same from both.
/// RHEI_TEST_CLIENTS is the Python that has the clients.
#[test]
#[ignore = "needs clients from the package index: make clients"]
fn clients_of_python_get_what_the_source_gives() {
    let python = std::env::var("RHEI_TEST_CLIENTS").unwrap();
    let (following, running, copy) = served_on_a_port("serve_python");
    let output = Command::new(python)
        .arg(client("clients.py"))
        .args([&following.db.url(), &copy])
        .output()
        .unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    running.stop(SOON).assert_code(0);
}

/// RHEI_TEST_JDBC is the driver's jar, RHEI_TEST_NODE a folder with `pg` and `pg-cursor`, and
/// RHEI_TEST_ODBC a Python with `pyodbc`; what is not there is named.
#[test]
#[ignore = "needs drivers from the package index: make clients"]
fn clients_of_other_languages_print_the_same_for_source_and_copy() {
    let (following, running, copy) = served_on_a_port("serve_languages");
    let jdbc = |url: &str| {
        let (_, server) = url.split_once('@').unwrap();
        let server = server.split('?').next().unwrap();
        format!("jdbc:postgresql://{server}?user=postgres&sslmode=disable")
    };
    let run = |name: &str, url: &str, place: &str| match name {
        "RHEI_TEST_JDBC" => {
            Command::new("java").args(["-cp", place, &client("Jdbc.java"), &jdbc(url)]).output()
        }
        "RHEI_TEST_NODE" => {
            Command::new("node").env("NODE_PATH", place).args([&client("node.js"), url]).output()
        }
        _ => Command::new(place).args([&client("odbc.py"), url]).output(),
    };

    for name in ["RHEI_TEST_JDBC", "RHEI_TEST_NODE", "RHEI_TEST_ODBC"] {
        let Ok(place) = std::env::var(name) else {
            println!("missing  {name}");
            continue;
        };
        let [theirs, ours] = [following.db.url(), copy.clone()].map(|url| {
            let output = run(name, &url, &place).unwrap();
            let [printed, wrong] =
                [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
            assert!(output.status.success(), "{name} {url}: {printed}{wrong}");
            printed
        });
        for (theirs, ours) in theirs.lines().zip(ours.lines()) {
            assert_eq!(ours, theirs, "{name}");
        }
        assert_eq!(theirs.lines().count(), ours.lines().count());
        println!("ok       {name}: {} answers", ours.lines().count());
    }
    running.stop(SOON).assert_code(0);
}
