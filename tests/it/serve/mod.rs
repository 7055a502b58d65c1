//! The endpoint of readers: what they see, while the replicator writes, is the source at one
//! commit, in the form that PostgreSQL gives; and they can only read.

mod clients;
mod commands;
mod forms;
mod limits;
mod refused;

use std::{io::Write, path::PathBuf, time::Duration};

use futures_util::StreamExt;

use crate::{
    bed::{Running, Session, wait_until},
    chaos::faults::SmallDisk,
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

/// A replicator that serves its copy on a socket in the folder of its file.
struct Served {
    following: Following,
    running: Running,
    folder: PathBuf,
}

impl Served {
    /// `setup` makes the tables at the source; `settings` are more of the section `[serve]`.
    fn new(name: &str, setup: &str, settings: &str) -> Self {
        Self::of(Following::new(name), setup, settings)
    }

    fn of(mut following: Following, setup: &str, settings: &str) -> Self {
        following.db.execute(setup);
        let folder = following.folder.path().to_owned();
        let slot = following.slot().to_owned();
        following.rhei = following.rhei.config(&format!(
            "[source]\nslot = \"{slot}\"\n[sync]\ninterval = \"50ms\"\n[serve]\nlisten = \"{}\"\n\
             {settings}\n",
            folder.display()
        ));
        following.sync();
        let mut running = following.run();
        running.wait_for_log("following the source", SOON);
        Self { following, running, folder }
    }

    fn config(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.folder).user("reader").dbname("copy");
        config
    }

    #[track_caller]
    fn session(&self) -> Session {
        Session::open(&self.config()).unwrap()
    }

    #[track_caller]
    fn settle(&mut self) {
        self.following.wait_settled(&mut self.running);
    }

    #[track_caller]
    fn stop(self) {
        self.running.stop(SOON).assert_code(0);
    }
}

/// The code of an error, as [`Session`] shows it.
fn code(error: &str) -> &str {
    error.rsplit_once(" (").and_then(|(_, rest)| rest.split(')').next()).unwrap_or(error)
}

/// Money moves between two tables in each transaction, so their sum is always the same.
#[test]
fn each_statement_and_each_transaction_sees_the_source_at_one_commit() {
    let served = Served::new(
        "serve_torn",
        "CREATE TABLE a (id int PRIMARY KEY, n bigint); CREATE TABLE b (id int PRIMARY KEY, n \
         bigint);
         INSERT INTO a SELECT i, 1000 FROM generate_series(1, 100) i;
         INSERT INTO b SELECT i, 1000 FROM generate_series(1, 100) i",
        "",
    );
    let end = std::time::Instant::now() + Duration::from_secs(4);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let session = served.following.db.session();
            let mut number = 0;
            while std::time::Instant::now() < end {
                number += 1;
                session.execute(&format!(
                    "BEGIN; UPDATE a SET n = n - 1 WHERE id = {0} % 100 + 1; UPDATE b SET n = n + \
                     1 WHERE id = {0} % 97 + 1; COMMIT",
                    number
                ));
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                let session = served.session();
                let mut seen = std::collections::BTreeSet::new();
                while std::time::Instant::now() < end {
                    let sums = "SELECT (SELECT sum(n) FROM a) + (SELECT sum(n) FROM b)";
                    assert_eq!(session.value(sums), "200000");

                    session.execute("BEGIN");
                    let one = session.value("SELECT sum(n) FROM a");
                    let lsn = session.value("SELECT lsn FROM _rhei.freshness");
                    let other = session.value("SELECT sum(n) FROM b");
                    assert_eq!(session.value("SELECT lsn FROM _rhei.freshness"), lsn);
                    session.execute("COMMIT");
                    let number = |text: &str| text.parse::<i64>().unwrap();
                    assert_eq!(number(&one) + number(&other), 200_000);
                    seen.insert(lsn);
                }
                assert!(seen.len() > 5, "the copy moved on meanwhile: {seen:?}");
            });
        }
    });
    served.stop();
}

#[test]
fn freshness_names_the_position_and_the_tables_that_are_not_live() {
    let mut served = Served::new(
        "serve_fresh",
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)",
        "",
    );
    served.following.db.execute("INSERT INTO t VALUES (2)");
    served.settle();

    let session = served.session();
    let row =
        session.query("SELECT lsn, age < INTERVAL '1 minute', live, not_live FROM _rhei.freshness");
    let checkpoint = served.following.rhei.status().unwrap()["checkpoint"]["lsn"].clone();
    assert_eq!(row[0][1..], [Some("t".to_owned()), Some("1".to_owned()), Some("{}".to_owned())]);
    assert_eq!(session.value("SHOW rhei_lsn"), checkpoint.as_str().unwrap());
    served.stop();
}

/// A compaction closes the file; a reader who stays in a transaction is ended, and can go on.
#[test]
fn a_reader_holds_up_a_compaction_for_a_while_only() {
    let served = Served::new(
        "serve_compact",
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM \
         generate_series(1, 1000) i",
        "",
    );
    let (staying, other) = (served.session(), served.session());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (client, prepared) = runtime.block_on(async {
        let (client, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let prepared = client.prepare("SELECT v FROM t WHERE id = $1").await.unwrap();
        assert_eq!(client.query(&prepared, &[&7]).await.unwrap().len(), 1);
        (client, prepared)
    });
    staying.execute("BEGIN");
    assert_eq!(staying.value("SELECT count(*) FROM t"), "1000");

    served.following.rhei.run_ok(["compact"]);
    let error = staying.try_query("SELECT count(*) FROM t").unwrap_err();
    assert_eq!(code(&error), "40001", "{error}");
    staying.execute("ROLLBACK");
    assert_eq!(staying.value("SELECT count(*) FROM t"), "1000");
    assert_eq!(other.value("SELECT count(*) FROM t"), "1000");

    // A statement that was prepared before runs over the new file.
    let rows = runtime.block_on(client.query(&prepared, &[&7])).unwrap();
    assert_eq!(rows.len(), 1);

    served.following.db.execute("INSERT INTO t VALUES (0, 'new')");
    wait_until(SOON, "the stream goes on", || other.value("SELECT count(*) FROM t") == "1001");
    served.stop();
}

/// A table is dropped, changed and copied again under an open transaction, which still sees it as
/// it was.
#[test]
fn an_open_transaction_keeps_its_view_while_tables_change_their_shape() {
    let mut served = Served::new(
        "serve_shapes",
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'one');
         CREATE TABLE gone (id int PRIMARY KEY); INSERT INTO gone VALUES (1)",
        "",
    );
    let session = served.session();
    session.execute("BEGIN");
    assert_eq!(session.value("SELECT v FROM t"), "one");

    served.following.db.execute(
        "ALTER TABLE t ADD COLUMN n int DEFAULT 7; UPDATE t SET v = 'two';
         ALTER TABLE t ALTER COLUMN id TYPE bigint; DROP TABLE gone",
    );
    served.settle();
    assert_eq!(session.value("SELECT v FROM t"), "one");
    assert_eq!(session.value("SELECT count(*) FROM gone"), "1");
    session.execute("COMMIT");
    assert_eq!(session.value("SELECT v || n FROM t"), "two7");
    served.stop();
}

#[test]
fn a_table_is_copied_again_under_an_open_transaction() {
    let mut served = Served::new(
        "serve_resync",
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'old' FROM \
         generate_series(1, 50000) i",
        "",
    );
    let session = served.session();
    session.execute("BEGIN");
    assert_eq!(session.value("SELECT count(*) FROM t WHERE v = 'old'"), "50000");

    let mark = served.running.log_mark();
    served.following.db.execute("UPDATE t SET v = 'new'");
    served.following.rhei.run_ok(["resync", "public.t"]);
    wait_until(SOON, "the table is copied again", || !served.running.copies_since(mark).is_empty());
    served.settle();
    assert_eq!(session.value("SELECT count(*) FROM t WHERE v = 'old'"), "50000");
    session.execute("COMMIT");
    assert_eq!(session.value("SELECT count(*) FROM t WHERE v = 'new'"), "50000");
    served.stop();
}

/// The file has to be opened again after a full disk, so that an open transaction may be ended.
#[test]
fn readers_and_the_stream_go_on_when_a_full_disk_has_room_again() {
    let following = Following::new("serve_full_disk");
    let Some(_disk) = SmallDisk::mount(following.folder.path(), 96) else {
        return println!("passed over: this machine lets no small disk be mounted");
    };
    let mut served = Served::of(
        following,
        "CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (id int PRIMARY KEY, v text);
         INSERT INTO a VALUES (0, ''); INSERT INTO b VALUES (0, '')",
        "",
    );
    let mark = served.running.log_mark();
    let (staying, reading) = (served.session(), served.session());
    staying.execute("BEGIN");
    assert_eq!(staying.value("SELECT count(*) FROM a"), "1");

    let ballast = served.folder.join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    served.following.db.execute(
        "BEGIN; INSERT INTO a SELECT i, repeat(md5(i::text), 30) FROM generate_series(1, 20000) i;
         INSERT INTO b SELECT * FROM a WHERE id > 0; COMMIT",
    );
    served.running.wait_for_log_after(mark, "the disk failed", SOON);

    // Nothing is published in half, and no reader sees half a transaction.
    let published = served.following.rhei.run(["publish", "--path", "ro.duckdb"]);
    published.assert_code(1);
    let counts = "SELECT (SELECT count(*) FROM a) || ' ' || (SELECT count(*) FROM b)";
    match reading.try_query(counts) {
        Ok(rows) => assert_eq!(rows[0][0].as_deref(), Some("1 1")),
        Err(error) => {
            assert!(["40001", "57P03", "58030", "XX000"].contains(&code(&error)), "{error}")
        }
    }

    drop(file);
    std::fs::remove_file(&ballast).unwrap();
    served.settle();
    if let Err(error) = staying.try_query("SELECT count(*) FROM a") {
        assert_eq!(code(&error), "40001", "{error}");
    }
    staying.execute("ROLLBACK");
    for session in [&staying, &reading, &served.session()] {
        assert_eq!(session.value(counts), "20001 20001");
    }
    served.running.assert_no_copies_since(mark);
    served.stop();
}

/// A bug that DuckDB meets in one statement, also in a reader's, ends the DuckDB of the process.
/// None that it would meet is known, so a failpoint says that it has.
#[test]
fn a_bug_of_duckdb_ends_its_sessions_and_not_the_replicator() {
    let served = Served::new("serve_bug", "CREATE TABLE t (id int PRIMARY KEY)", "");
    let Served { mut following, running, folder } = served;
    running.stop(SOON).assert_code(0);
    following.rhei = following.rhei.env("FAILPOINTS", "apply.invalidated=1*return(now)");
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let mark = running.log_mark();

    let mut served = Served { following, running, folder };
    let before = served.session();
    served.following.db.execute("INSERT INTO t VALUES (1)");
    served.running.wait_for_log_after(mark, "starting it again", SOON);
    wait_until(SOON, "readers can connect again", || Session::open(&served.config()).is_ok());
    assert!(before.try_query("SELECT 1").is_err(), "its session has ended");
    served.settle();
    assert_eq!(served.session().value("SELECT count(*) FROM t"), "1");
    served.running.assert_no_copies_since(mark);
    served.stop();
}

#[test]
fn settings_of_a_transaction_end_with_it() {
    let served = Served::new(
        "serve_settings",
        "CREATE SCHEMA other; CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE other.t (id int \
         PRIMARY KEY); INSERT INTO t VALUES (1); INSERT INTO other.t VALUES (2)",
        "",
    );
    let session = served.session();
    for (set, end, after) in [
        ("SET search_path = other", "ROLLBACK", "1"),
        ("SET LOCAL search_path = other", "COMMIT", "1"),
        ("SET search_path = other", "COMMIT", "2"),
    ] {
        session.execute(&format!("BEGIN; {set}"));
        assert_eq!(session.value("SELECT id FROM t"), "2");
        session.execute(end);
        assert_eq!(session.value("SELECT id FROM t"), after, "{set}, {end}");
    }

    // A transaction that has failed is rolled back by its COMMIT.
    session.execute("BEGIN; SET search_path = public");
    assert!(session.try_query("SELECT nonsense").is_err());
    session.execute("COMMIT");
    assert_eq!(session.value("SELECT id FROM t"), "2");
    served.stop();
}

#[test]
fn an_error_in_the_middle_of_a_copy_reaches_the_client_as_it_is() {
    let served = Served::new("serve_copy_error", "CREATE TABLE t (id int PRIMARY KEY)", "");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (client, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let lines = "COPY (SELECT (i // 1000)::TINYINT, repeat('x', 1000) FROM range(200000) r(i)) \
                     TO STDOUT";
        let lines = client.copy_out(lines).await.unwrap();
        let mut lines = std::pin::pin!(lines);
        let (mut rows, mut error) = (0, None);
        while let Some(line) = lines.next().await {
            match line {
                Ok(_) => rows += 1,
                Err(failed) => {
                    error = Some(failed);
                    break;
                }
            }
        }
        assert!(rows > 0, "some rows came before the error");
        let error = error.unwrap();
        assert_eq!(error.code().unwrap().code(), "22000", "{error}");
        assert!(client.simple_query("SELECT 1").await.is_ok());
    });
    served.stop();
}

/// psqlODBC reads keys by it: PostgreSQL prints its vectors without braces, and counts from 0.
#[test]
fn the_columns_of_a_key_are_a_vector_as_in_the_catalogs_of_postgres() {
    let served = Served::new(
        "serve_vectors",
        "CREATE TABLE t (a int, b text, c int, PRIMARY KEY (a, c)); INSERT INTO t VALUES (1, 'x', 2)",
        "",
    );
    let sql = "SELECT indkey, i.indkey[0], i.indkey[ indnatts - 1 ] FROM pg_catalog.pg_index i \
               WHERE indrelid = 'public.t'::regclass";
    let of_source = served.following.db.query(sql);
    assert_eq!(of_source[0][0].as_deref(), Some("1 3"));
    assert_eq!(served.session().query(sql), of_source);

    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (client, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let prepared = client.prepare("SELECT indkey, indclass FROM pg_index").await.unwrap();
        let types: Vec<u32> =
            prepared.columns().iter().map(|column| column.type_().oid()).collect();
        assert_eq!(types, [22, 30]);
    });
    served.stop();
}

#[test]
fn a_cursor_that_is_closed_early_and_a_commit_leave_their_transaction_as_it_should_be() {
    let served = Served::new(
        "serve_early",
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)",
        "",
    );
    let session = served.session();
    for _ in 0..20 {
        session.execute("BEGIN; DECLARE c CURSOR FOR SELECT repeat('x', 1000) FROM range(200000)");
        session.execute("FETCH 1 FROM c; CLOSE c");
        assert_eq!(session.value("SELECT count(*) FROM t"), "1000");
        session.execute("COMMIT");
    }

    // A portal that is left open is not read to its end.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (mut client, connection) =
            served.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let transaction = client.transaction().await.unwrap();
        let endless = "SELECT repeat('x', 1000) FROM range(1000000000)";
        let portal = transaction.bind(endless, &[]).await.unwrap();
        assert_eq!(transaction.query_portal(&portal, 10).await.unwrap().len(), 10);
        tokio::time::timeout(SOON / 2, transaction.commit()).await.unwrap().unwrap();
    });
    served.stop();
}

#[test]
fn open_results_of_a_session_are_limited_and_stale_cursors_are_refused() {
    let served = Served::new("serve_many", "CREATE TABLE t (id int PRIMARY KEY)", "");
    let session = served.session();
    session.execute("BEGIN");
    let refused = (0..100).find_map(|number| {
        let sql = format!("DECLARE c{number} CURSOR FOR SELECT * FROM range(1000000)");
        session.try_query(&sql).err()
    });
    assert_eq!(code(&refused.unwrap()), "54000");
    session.execute("ROLLBACK");

    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (client, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("BEGIN; DECLARE c CURSOR FOR SELECT 1 AS a").await.unwrap();
        let fetch = client.prepare("FETCH 1 FROM c").await.unwrap();
        client.batch_execute("CLOSE c; DECLARE c CURSOR FOR SELECT 1 AS a, 2 AS b").await.unwrap();
        let error = client.query(&fetch, &[]).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "0A000", "{error}");
    });
    served.stop();
}

#[test]
fn a_search_path_keeps_its_quotes_and_can_be_brought_back() {
    let served = Served::new(
        "serve_quotes",
        "CREATE SCHEMA \"My Schema\"; CREATE TABLE \"My Schema\".t (id int PRIMARY KEY); INSERT INTO \
         \"My Schema\".t VALUES (2); CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)",
        "",
    );
    let session = served.session();
    for back in ["RESET search_path", "SET search_path TO DEFAULT", "RESET ALL", "DISCARD ALL"] {
        session.execute("SET search_path TO \"My Schema\", public");
        assert_eq!(session.value("SELECT id FROM t"), "2");
        session.execute("RESET application_name");
        assert_eq!(session.value("SELECT id FROM t"), "2");
        session.execute(back);
        assert_eq!(session.value("SELECT id FROM t"), "1", "{back}");
    }

    // The places of an array are as many as it has, however they are asked for.
    let places = |sql: &str| session.query(sql).len();
    assert_eq!(places("SELECT generate_series(array_lower([7, 8], 1), array_upper([7, 8], 1))"), 2);
    assert_eq!(places("SELECT generate_series(array_lower(NULL, 1), array_upper(NULL, 1))"), 0);
    assert!(places("SELECT generate_series(array_lower([1], 1) - 1000000000, 1)") < 3);
    served.stop();
}
