//! `[publish]` and `rhei publish`: whoever opens the published path gets a whole copy as of one
//! commit of the source, whatever happens while another one is written.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    bed::{oracle::query_copy, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

fn published(following: &Following, flags: &[&str]) -> serde_json::Value {
    let flags = ["publish", "--json"].iter().chain(flags);
    serde_json::from_str(&following.rhei.run_ok(flags.copied()).stdout).unwrap()
}

/// Asks a file that may be replaced meanwhile.
fn ask(path: &Path, sql: &str) -> String {
    let config = duckdb::Config::default().access_mode(duckdb::AccessMode::ReadOnly).unwrap();
    let connection = duckdb::Connection::open_with_flags(path, config).unwrap();
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn ask_parquet(sql: &str) -> String {
    let connection = duckdb::Connection::open_in_memory().unwrap();
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Money moves between two tables in each transaction, so their sum is always the same.
fn accounts(name: &str, settings: &str) -> Following {
    let mut following = Following::new(name);
    following.db.execute(
        "CREATE TABLE a (id int PRIMARY KEY, n bigint); CREATE TABLE b (id int PRIMARY KEY, n \
         bigint);
         INSERT INTO a SELECT i, 1000 FROM generate_series(1, 20000) i;
         INSERT INTO b SELECT i, 1000 FROM generate_series(1, 20000) i",
    );
    let slot = following.slot().to_owned();
    following.rhei = following
        .rhei
        .config(&format!("[source]\nslot = \"{slot}\"\n[sync]\ninterval = \"50ms\"\n{settings}\n"));
    following
}

const SUM: &str = "SELECT ((SELECT sum(n) FROM public.a) + (SELECT sum(n) FROM public.b))::VARCHAR";

#[test]
fn each_published_file_is_the_source_at_one_commit_while_the_stream_goes_on() {
    let following = accounts(
        "publish_run",
        "[publish]\npath = \"ro.duckdb\"\ninterval = \"200ms\"\nkeep = 3\n[serve]\nlisten = \
         \"127.0.0.1:0\"",
    );
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let mark = running.log_mark();

    let path = following.folder.path().join("ro.duckdb");
    let end = Instant::now() + Duration::from_secs(5);
    let mut seen = std::collections::BTreeSet::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let session = following.db.session();
            let mut number = 0;
            while Instant::now() < end {
                number += 1;
                session.execute(&format!(
                    "BEGIN; UPDATE a SET n = n - 1 WHERE id = {0} % 100 + 1; UPDATE b SET n = n + \
                     1 WHERE id = {0} % 97 + 1; COMMIT",
                    number
                ));
            }
        });

        wait_until(SOON, "a copy is published", || path.exists());
        while Instant::now() < end {
            assert_eq!(ask(&path, SUM), "40000000");
            seen.insert(ask(&path, "SELECT lsn FROM _rhei.freshness"));
        }
    });
    assert!(seen.len() > 3, "new copies were published meanwhile: {seen:?}");

    // The last state is published too, and then nothing more is to do.
    following.wait_settled(&mut running);
    let end = following.rhei.status().unwrap()["checkpoint"]["lsn"].as_str().unwrap().to_owned();
    wait_until(SOON, "the last state is published", || {
        ask(&path, "SELECT lsn FROM _rhei.freshness") == end
    });
    let made = fs::metadata(&path).unwrap().modified().unwrap();
    let number = |number: u32| following.folder.path().join(format!("ro.older-{number}.duckdb"));
    assert_eq!([number(1), number(2), number(3)].map(|path| path.exists()), [true, true, false]);
    assert_eq!(ask(&number(1), SUM), "40000000");
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), made);

    running.assert_no_copies_since(mark);
    running.stop(SOON).assert_code(0);
    assert!(names_in(following.folder.path()).iter().all(|name| !name.contains("publishing")));
    following.assert_all_same();
}

#[test]
fn a_death_while_a_file_is_published_leaves_the_one_before() {
    let following = accounts("publish_killed", "");
    following.sync();
    let path = following.folder.path().join("ro.duckdb");
    let flags = ["--path", "ro.duckdb", "--keep", "2"];
    let first = published(&following, &flags)["lsn"].as_str().unwrap().to_owned();
    let lsn = "SELECT lsn FROM _rhei.freshness";

    following.db.execute("UPDATE a SET n = n + 1");
    following.sync();
    let dies = following.rhei.clone().env("FAILPOINTS", "publish.written=return");
    let ended = dies.run(["publish"].iter().chain(&flags).copied());
    assert_eq!(ended.code(), None, "{}", ended.stderr);
    assert_eq!(ask(&path, lsn), first);

    let dies = following.rhei.clone().env("FAILPOINTS", "publish.renamed=return");
    assert_eq!(dies.run(["publish"].iter().chain(&flags).copied()).code(), None);
    assert_eq!(ask(&path, SUM), "40020000");
    assert_eq!(ask(&following.folder.path().join("ro.older-1.duckdb"), lsn), first);

    published(&following, &flags);
    assert_eq!(ask(&path, SUM), "40020000");
    assert!(names_in(following.folder.path()).iter().all(|name| !name.contains("publishing")));
}

/// What is in the file beside the tables of the source is published too; what rhei keeps of itself
/// is not.
#[test]
fn a_published_file_holds_what_the_copy_holds_but_for_tables_that_are_not_live() {
    let following = Following::new("publish_what");
    following.db.execute(
        "CREATE TABLE good (id int PRIMARY KEY, v text, \"Odd Name\" numeric);
         CREATE TABLE bad (id int PRIMARY KEY, n numeric(5, 2)); CREATE TABLE empty (id int);
         INSERT INTO good SELECT i, 'v' || i, i FROM generate_series(1, 1000) i;
         INSERT INTO bad VALUES (1, 'NaN')",
    );
    following.rhei.run(["sync"]).assert_code(1);
    duckdb::Connection::open(following.copy())
        .unwrap()
        .execute_batch(
            "CREATE TABLE mine AS SELECT 42 AS answer; CREATE VIEW seen AS SELECT count(*)::VARCHAR \
             AS n FROM public.good; CREATE MACRO twice(x) AS x * 2",
        )
        .unwrap();

    let report = published(&following, &["--path", "ro.duckdb"]);
    assert_eq!(report["rows"], 1001, "{report}");
    assert_eq!(report["not_live"], serde_json::json!({ "public.bad": "error" }));

    let path = following.folder.path().join("ro.duckdb");
    let tables = "SELECT string_agg(schema_name || '.' || table_name, ' ' ORDER BY ALL) FROM \
                  duckdb_tables()";
    assert_eq!(ask(&path, tables), "_rhei.freshness main.mine public.empty public.good");
    assert_eq!(ask(&path, "SELECT n FROM seen"), "1000");
    assert_eq!(ask(&path, "SELECT twice(answer)::VARCHAR FROM mine"), "84");
    assert_eq!(ask(&path, "SELECT not_live[1] FROM _rhei.freshness"), "public.bad: error");
    crate::bed::assert_same(&following.db, &path, &["public.good", "public.empty"]);

    let itself = following.rhei.run(["publish", "--path", "copy.duckdb"]);
    itself.assert_code(1);
    assert!(itself.stderr.contains("that of the copy itself"), "{}", itself.stderr);
    let nowhere = following.rhei.run(["publish", "--path", "no/such/ro.duckdb"]);
    nowhere.assert_code(1);
    assert!(nowhere.stderr.contains("there is no folder"), "{}", nowhere.stderr);
}

/// Foreign keys and generated columns are of tables that users made; rhei makes none.
#[test]
fn tables_that_cannot_be_written_like_this_are_left_out_and_named() {
    let following = Following::new("publish_odd");
    following.db.execute("CREATE TABLE good (id int PRIMARY KEY); INSERT INTO good VALUES (1)");
    following.sync();
    duckdb::Connection::open(following.copy())
        .unwrap()
        .execute_batch(
            "CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (id int REFERENCES p (id)); CREATE \
             TABLE g (a int, b int GENERATED ALWAYS AS (a + 1)); INSERT INTO p VALUES (1); INSERT \
             INTO c VALUES (1); INSERT INTO g VALUES (1)",
        )
        .unwrap();
    let report = published(&following, &["--path", "ro.duckdb"]);
    assert_eq!(
        report["not_live"],
        serde_json::json!({
            "main.c": "it has a foreign key",
            "main.g": "it has a generated column",
        })
    );
    let path = following.folder.path().join("ro.duckdb");
    assert_eq!(ask(&path, "SELECT count(*)::VARCHAR FROM p"), "1");
    assert_eq!(ask(&path, "SELECT count(*)::VARCHAR FROM public.good"), "1");
}

/// A path that holds something else is left as it is, and a log that another tool left does no harm.
#[test]
fn only_what_rhei_published_is_replaced() {
    let following = accounts("publish_foreign", "");
    following.sync();
    let folder = following.folder.path();
    let refused = |flags: &[&str]| {
        let output = following.rhei.run(["publish"].iter().chain(flags).copied());
        output.assert_code(1);
        output.stderr.clone()
    };

    fs::write(folder.join("text.duckdb"), "not a database, but longer than sixteen bytes").unwrap();
    duckdb::Connection::open(folder.join("mine.duckdb"))
        .unwrap()
        .execute_batch("CREATE TABLE t (id int); INSERT INTO t VALUES (7)")
        .unwrap();
    for name in ["text.duckdb", "mine.duckdb"] {
        let said = refused(&["--path", name]);
        assert!(said.contains("no copy that rhei published"), "{said}");
    }
    assert_eq!(ask(&folder.join("mine.duckdb"), "SELECT id::VARCHAR FROM t"), "7");
    assert!(refused(&["--path", "copy.duckdb.wal"]).contains("that of the copy itself"));

    fs::create_dir_all(folder.join("lake/target")).unwrap();
    fs::write(folder.join("lake/manifest.json"), "{\"nodes\": {}}").unwrap();
    fs::write(folder.join("lake/target/manifest.json"), "{}").unwrap();
    let flags = ["--path", "lake", "--format", "parquet"];
    assert!(refused(&flags).contains("did not write"));
    fs::remove_file(folder.join("lake/manifest.json")).unwrap();
    published(&following, &flags);
    published(&following, &flags);
    assert_eq!(names_in(&folder.join("lake")).len(), 3, "{:?}", names_in(&folder.join("lake")));
    assert!(folder.join("lake/target/manifest.json").exists());

    published(&following, &["--path", "ro.duckdb"]);
    let path = folder.join("ro.duckdb");
    fs::write(folder.join("ro.duckdb.wal"), "of a tool that wrote into it").unwrap();
    published(&following, &["--path", "ro.duckdb"]);
    assert_eq!(ask(&path, SUM), "40000000");
}

/// A reader's transaction that has looked at the catalogs of all databases.
#[test]
fn a_reader_who_looks_at_catalogs_is_in_the_way_of_no_publication() {
    let following =
        accounts("publish_catalogs", "[publish]\npath = \"ro.duckdb\"\n[serve]\nlisten = \".\"");
    let slot = following.slot().to_owned();
    let mut following = following;
    let folder = following.folder.path().to_owned();
    following.rhei = following.rhei.config(&format!(
        "[source]\nslot = \"{slot}\"\n[publish]\npath = \"ro.duckdb\"\n[serve]\nlisten = \"{}\"\n",
        folder.display()
    ));
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);

    let mut config = tokio_postgres::Config::new();
    config.host_path(&folder).user("reader").dbname("copy");
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let session = crate::bed::Session::open(&config).unwrap();
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                session.execute("BEGIN");
                session.value("SELECT count(*) FROM pg_class");
                session.value("SELECT count(*) FROM duckdb_tables()");
                session.execute("COMMIT");
            }
        });
        let staying = crate::bed::Session::open(&config).unwrap();
        for _ in 0..5 {
            staying.execute("BEGIN; SELECT count(*) FROM duckdb_columns()");
            assert_eq!(published(&following, &[])["rows"], 40000);
            staying.execute("COMMIT");
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    running.stop(SOON).assert_code(0);
}

/// Types that Parquet would change are in the files as text.
#[test]
fn published_parquet_has_every_value_and_a_manifest_that_names_the_position() {
    let following = Following::new("publish_parquet");
    following.db.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE t (id int PRIMARY KEY, big numeric, \
         dec numeric(12, 3), f float8, at timestamptz, plain timestamp, day date, clock time, tz \
         timetz, span interval, who uuid, bytes bytea, list int[], doc jsonb, bits bit(5), m mood, \
         flag bool, c \"char\", o oid, x text);
         INSERT INTO t VALUES (1, 123456789012345678901234567890, 1.5, 'NaN', '2024-01-01 \
         00:00:00.123456+00', '2024-02-29 23:59:59.999999', '0044-03-15 BC', '24:00:00', \
         '12:00:00.000001+05:30', '1 mon 2 days 00:00:00.000007', \
         '00112233-4455-6677-8899-aabbccddeeff', '\\x00ff', '{1,NULL,3}', '{\"a\": [1]}', \
         B'10101', 'ok', true, 'x', 4294967295, 'é'),
         (2, -0.5, -1.5, '-Infinity', 'infinity', '-infinity', 'infinity', '00:00:00', \
         '00:00:00+00', '-1 year', NULL, '', '{}', 'null', B'00000', 'sad', false, NULL, 0, '');
         INSERT INTO t VALUES (3);
         CREATE TABLE \"We/ird\" (id int PRIMARY KEY)",
    );
    following.sync();

    let flags = ["--path", "lake", "--format", "parquet", "--keep", "2"];
    let report = published(&following, &flags);
    let lake = following.folder.path().join("lake");
    let manifest = || -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(lake.join("manifest.json")).unwrap()).unwrap()
    };
    let checkpoint = "SELECT checkpoint_lsn FROM _rhei.pipeline";
    assert_eq!(manifest()["lsn"], ask(following.copy(), checkpoint));
    assert_eq!(report["lsn"], manifest()["lsn"]);

    let version = lake.join(manifest()["version"].as_str().unwrap());
    assert_eq!(names_in(&version), ["manifest.json", "public.We%2Fird", "public.t"]);
    let files = version.join("public.t/*.parquet").display().to_string();
    let columns: Vec<String> = query_copy(
        following.copy(),
        "SELECT column_name FROM duckdb_columns() WHERE table_name = 't' ORDER BY column_index",
    )
    .iter()
    .map(|row| row[0].clone().unwrap())
    .collect();
    assert_eq!(columns.len(), 20);
    for column in &columns {
        let list = |from: &str| {
            format!(
                "SELECT list(coalesce(\"{column}\"::VARCHAR, 'NULL') ORDER BY id)::VARCHAR FROM {from}"
            )
        };
        let copy = ask(following.copy(), &list("public.t"));
        assert_eq!(ask_parquet(&list(&format!("'{files}'"))), copy, "{column}");
    }
    let empty = version.join("public.We%2Fird/*.parquet").display().to_string();
    assert_eq!(ask_parquet(&format!("SELECT count(*)::VARCHAR FROM '{empty}'")), "0");

    // The newest two stay; a death in the middle changes nothing.
    following.db.execute("INSERT INTO t VALUES (4)");
    following.sync();
    published(&following, &flags);
    let dies = following.rhei.clone().env("FAILPOINTS", "publish.written=return");
    let before = manifest();
    assert_eq!(dies.run(["publish"].iter().chain(&flags).copied()).code(), None);
    assert_eq!(manifest(), before);
    published(&following, &flags);
    let versions: Vec<PathBuf> = fs::read_dir(&lake)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(versions.len(), 2, "{versions:?}");
    assert!(versions.contains(&lake.join(manifest()["version"].as_str().unwrap())));
}

/// A replicator that lets readers in writes to no file but its own and the one of its settings.
#[test]
fn a_replicator_that_serves_publishes_to_the_path_of_its_settings_only() {
    let following = accounts(
        "publish_locked",
        "[publish]\npath = \"lake\"\nformat = \"parquet\"\n[serve]\nlisten = \"127.0.0.1:0\"",
    );
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);

    let refused = following.rhei.run(["publish", "--path", "other.duckdb", "--format", "duckdb"]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("that of its own [publish] section"), "{}", refused.stderr);
    assert!(!following.folder.path().join("other.duckdb").exists());

    assert_eq!(published(&following, &[])["rows"], 40000);
    assert_eq!(names_in(&following.folder.path().join("lake")).len(), 2);
    running.stop(SOON).assert_code(0);
}
