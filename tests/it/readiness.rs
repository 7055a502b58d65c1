//! `rhei check` fails exactly when the next `rhei sync` would, and the SQL that it prints mends it.

use std::{
    fs,
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::bed::{Cluster, ClusterOptions, Db, Output, Rhei, assert_same, temp_dir, wait_until};

/// A source in order: a role with the least rights, a table in a schema, a partition tree, and a
/// publication that another role has made.
const SOUND: &str = "CREATE SCHEMA app; \
    CREATE TABLE app.t (id int PRIMARY KEY, v text, w text); \
    INSERT INTO app.t SELECT i, 'v' || i, 'w' FROM generate_series(1, 50) i; \
    CREATE TABLE app.p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); \
    CREATE TABLE app.p1 PARTITION OF app.p FOR VALUES FROM (0) TO (100); \
    INSERT INTO app.p VALUES (1, 'one'); \
    CREATE PUBLICATION rhei FOR TABLE app.t, app.p WITH (publish_via_partition_root = true); \
    GRANT USAGE ON SCHEMA app TO ROLE; GRANT SELECT ON ALL TABLES IN SCHEMA app TO ROLE";

const TABLES: [&str; 2] = ["app.t", "app.p"];

/// A source that stands in the way of a copy.
struct Broken {
    name: &'static str,
    /// Run by a superuser in the database; ROLE and DATABASE stand for the names.
    sql: &'static str,
    /// The lines of `[source]`.
    settings: &'static str,
    /// The encoding of the database.
    encoding: &'static str,
    /// The tables that are equal in the end.
    tables: &'static [&'static str],
    /// What has to be run besides the SQL.
    command: &'static [&'static str],
}

impl Broken {
    const fn by(name: &'static str, sql: &'static str) -> Self {
        Self { name, sql, settings: "", encoding: "UTF8", tables: &TABLES, command: &[] }
    }

    const fn settings(self, settings: &'static str) -> Self {
        Self { settings, ..self }
    }
}

const BROKEN: &[Broken] = &[
    Broken::by("no_replication", "ALTER ROLE ROLE NOREPLICATION"),
    Broken::by("no_connect", "REVOKE CONNECT ON DATABASE DATABASE FROM PUBLIC"),
    Broken::by("no_select", "REVOKE SELECT ON app.t FROM ROLE"),
    Broken::by("no_usage", "REVOKE USAGE ON SCHEMA app FROM ROLE"),
    Broken::by(
        "nothing_granted",
        "REVOKE ALL ON ALL TABLES IN SCHEMA app FROM ROLE; REVOKE USAGE ON SCHEMA app FROM ROLE",
    ),
    Broken::by("no_select_on_a_partition", "REVOKE SELECT ON app.p1 FROM ROLE"),
    Broken::by(
        "some_columns",
        "REVOKE SELECT ON app.t FROM ROLE; GRANT SELECT (id, v) ON app.t TO ROLE",
    ),
    Broken::by("row_security", "ALTER TABLE app.t ENABLE ROW LEVEL SECURITY"),
    Broken::by(
        "row_security_of_a_partition",
        "ALTER TABLE app.p1 ENABLE ROW LEVEL SECURITY; CREATE POLICY all_rows ON app.p1 USING \
         (true)",
    ),
    Broken::by(
        "row_security_of_the_owner",
        "ALTER TABLE app.t OWNER TO ROLE; ALTER TABLE app.t ENABLE ROW LEVEL SECURITY; ALTER \
         TABLE app.t FORCE ROW LEVEL SECURITY",
    ),
    Broken::by("publication_without_a_right", "DROP PUBLICATION rhei"),
    Broken::by(
        "publication_of_tables_of_others",
        "DROP PUBLICATION rhei; GRANT CREATE ON DATABASE DATABASE TO ROLE; ALTER TABLE app.p \
         OWNER TO ROLE",
    ),
    Broken::by(
        "publication_without_create",
        "DROP PUBLICATION rhei; ALTER TABLE app.p OWNER TO ROLE; ALTER TABLE app.t OWNER TO \
         ROLE",
    ),
    Broken::by("partial_publication", "ALTER PUBLICATION rhei SET (publish = 'insert, update')"),
    Broken::by("empty_publication", "ALTER PUBLICATION rhei DROP TABLE app.t, app.p"),
    Broken::by(
        "publication_of_other_tables",
        "ALTER PUBLICATION rhei DROP TABLE app.t, app.p; CREATE TABLE app.x (id int PRIMARY \
         KEY); ALTER PUBLICATION rhei ADD TABLE app.x",
    )
    .settings("tables = [\"app.t\", \"app.p\"]"),
    Broken {
        settings: "publication = [\"other\", \"rhei\"]",
        // The first publication is left, which leaves a column out.
        tables: &["app.p"],
        ..Broken::by("two_column_lists", "CREATE PUBLICATION other FOR TABLE app.t (id, v)")
    },
    Broken::by(
        "a_column_list_beside_all_tables",
        "DROP PUBLICATION rhei; CREATE PUBLICATION rhei FOR ALL TABLES WITH \
         (publish_via_partition_root = true); CREATE PUBLICATION other FOR TABLE app.t (id, v)",
    )
    .settings("publication = [\"rhei\", \"other\"]"),
    Broken::by("a_slot_of_others", "SELECT pg_create_logical_replication_slot('SLOT', 'pgoutput')"),
    Broken::by(
        "a_slot_of_another_plugin",
        "SELECT pg_create_logical_replication_slot('SLOT', 'test_decoding')",
    ),
    Broken::by("a_physical_slot", "SELECT pg_create_physical_replication_slot('SLOT')"),
    Broken::by(
        "an_unlogged_partition",
        "CREATE UNLOGGED TABLE app.p2 PARTITION OF app.p FOR VALUES FROM (100) TO (200); INSERT \
         INTO app.p VALUES (100, 'x'); GRANT SELECT ON app.p2 TO ROLE",
    ),
    Broken::by(
        "a_foreign_partition",
        "CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nowhere FOREIGN DATA WRAPPER \
         nothing; ALTER PUBLICATION rhei DROP TABLE app.p; ALTER TABLE app.p DROP CONSTRAINT \
         p_pkey; ALTER TABLE app.p REPLICA IDENTITY FULL; ALTER TABLE app.p1 REPLICA IDENTITY \
         FULL; CREATE FOREIGN TABLE app.p3 PARTITION OF app.p FOR VALUES FROM (200) TO (300) \
         SERVER nowhere; ALTER PUBLICATION rhei ADD TABLE app.p",
    ),
    Broken::by("a_role_with_few_connections", "ALTER ROLE ROLE CONNECTION LIMIT 3"),
    Broken::by("a_database_with_few_connections", "ALTER DATABASE DATABASE CONNECTION LIMIT 4"),
    Broken {
        encoding: "SQL_ASCII",
        command: &["backfill", "--table", "app.t"],
        // The oracle reads UTF-8.
        tables: &["app.p"],
        ..Broken::by("latin1_in_sql_ascii", "UPDATE app.t SET v = E'caf\\351' WHERE id = 7")
    },
];

/// A database whose role is of this database alone.
struct Source {
    db: Db,
    role: String,
    rhei: Rhei,
    _folder: tempfile::TempDir,
}

impl Source {
    fn new(cluster: &Cluster, name: &str, settings: &str, encoding: &str) -> Self {
        let database = format!("s_{name}");
        let role = format!("r_{name}");
        let server = cluster.maintenance();
        server.execute(&format!("CREATE ROLE {role} LOGIN REPLICATION"));
        server.execute(&format!(
            "CREATE DATABASE {database} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' \
             LC_CTYPE 'C'"
        ));

        let db = cluster.named(&database);
        let folder = temp_dir();
        let rhei = Rhei::new(folder.path())
            .source(db.url_as(&role))
            .target("copy.duckdb")
            .config(&format!("[source]\nslot = \"{database}\"\n{settings}\n"));

        let source = Self { db, role, rhei, _folder: folder };
        source.execute(SOUND);
        source
    }

    /// Runs SQL as a superuser.
    fn execute(&self, sql: &str) {
        let sql = sql
            .replace("DATABASE DATABASE", &format!("DATABASE {}", self.db.name()))
            .replace("SLOT", self.db.name())
            .replace("ROLE ROLE", &format!("ROLE {}", self.role))
            .replace("TO ROLE", &format!("TO {}", self.role))
            .replace("FROM ROLE", &format!("FROM {}", self.role));
        self.db.query(&sql);
    }

    fn check(&self) -> (Output, Value) {
        let output = self.rhei.run(["check", "--json"]);
        let found = serde_json::from_str(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}:\n{}\n{}", output.stdout, output.stderr));
        (output, found)
    }

    fn end(self) {
        let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE \
                   NOT active";
        self.db.query(sql);
    }
}

/// Returns the SQL of all errors.
fn mending_sql(found: &Value) -> Vec<String> {
    let findings = found["findings"].as_array().unwrap().iter();
    let errors = findings.filter(|finding| finding["level"] == "error");
    errors
        .flat_map(|finding| finding["sql"].as_array().unwrap().clone())
        .map(|sql| sql.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn check_fails_exactly_when_sync_would_and_its_sql_mends_the_source() {
    let cluster = Cluster::start(ClusterOptions::default());
    let sound = Source::new(&cluster, "sound", "", "UTF8");
    sound.rhei.run_ok(["check"]);
    sound.rhei.run_ok(["sync"]);
    sound.rhei.run_ok(["check"]);
    sound.end();

    for broken in BROKEN {
        let Broken { name, settings, encoding, .. } = *broken;
        let source = Source::new(&cluster, name, settings, encoding);
        source.execute(broken.sql);

        let (checked, found) = source.check();
        assert_eq!(checked.code(), Some(1), "{name}: check\n{found:#}");
        let synced = source.rhei.run(["sync"]);
        assert_eq!(synced.code(), Some(1), "{name}: sync\n{}", synced.stderr);
        assert!(synced.stderr.contains("error: "), "{name}: {}", synced.stderr);

        let sql = mending_sql(&found);
        assert!(!sql.is_empty(), "{name}: no SQL\n{found:#}");
        sql.iter().for_each(|sql| source.execute(sql));
        if !broken.command.is_empty() {
            source.rhei.run_ok(broken.command);
        }

        let (checked, found) = source.check();
        assert_eq!(checked.code(), Some(0), "{name}: check after {sql:?}\n{found:#}");
        let synced = source.rhei.run(["sync"]);
        assert_eq!(synced.code(), Some(0), "{name}: sync after {sql:?}\n{}", synced.stderr);
        assert_same(&source.db, source.rhei.target_path(), broken.tables);
        source.end();
    }
}

/// Settings of the server, each of which takes a restart.
#[test]
fn check_finds_settings_of_the_server_that_stop_a_sync_and_names_better_ones() {
    for (name, options, sql) in [
        ("wal_level", ClusterOptions { wal_level: "replica", ..ClusterOptions::default() }, ""),
        (
            "slots",
            ClusterOptions::default().conf("max_replication_slots = 1"),
            "SELECT pg_create_physical_replication_slot('taken')",
        ),
        ("senders", ClusterOptions::default().conf("max_wal_senders = 0"), ""),
        (
            "connections",
            ClusterOptions::default()
                .conf("max_connections = 6")
                .conf("max_wal_senders = 3")
                .conf("superuser_reserved_connections = 3"),
            "",
        ),
    ] {
        let cluster = Cluster::start(options);
        let source = Source::new(&cluster, name, "", "UTF8");
        if !sql.is_empty() {
            source.execute(sql);
        }

        let (checked, found) = source.check();
        assert_eq!(checked.code(), Some(1), "{name}: check\n{found:#}");
        assert_eq!(source.rhei.run(["sync"]).code(), Some(1), "{name}: sync");

        let sql = mending_sql(&found);
        assert!(!sql.is_empty(), "{name}: no SQL\n{found:#}");
        sql.iter().for_each(|sql| source.execute(sql));
        cluster.restart();

        let (checked, found) = source.check();
        assert_eq!(checked.code(), Some(0), "{name}: check after {sql:?}\n{found:#}");
        source.rhei.run_ok(["sync"]);
        assert_same(&source.db, source.rhei.target_path(), &TABLES);
    }
}

/// What is unusual and does not stop a copy is no error.
#[test]
fn what_does_not_stop_a_sync_is_no_error_of_check() {
    let cluster = Cluster::start(ClusterOptions::default());
    for (name, sql) in [
        ("no_columns", "CREATE TABLE app.e (); ALTER PUBLICATION rhei ADD TABLE app.e"),
        (
            "no_key",
            "CREATE TABLE app.k (a int); ALTER PUBLICATION rhei ADD TABLE app.k; GRANT SELECT ON \
             app.k TO ROLE",
        ),
        (
            "names",
            "CREATE SCHEMA \"App\"; GRANT USAGE ON SCHEMA \"App\" TO ROLE; CREATE TABLE \
             \"App\".t (id int PRIMARY KEY, \"ID\" int, rowid int); GRANT SELECT ON \"App\".t TO \
             ROLE; ALTER PUBLICATION rhei ADD TABLE \"App\".t",
        ),
        ("unlogged", "CREATE UNLOGGED TABLE app.u (id int PRIMARY KEY)"),
        (
            "a_column_list",
            "ALTER PUBLICATION rhei DROP TABLE app.t; ALTER PUBLICATION rhei ADD TABLE app.t \
             (id, v); REVOKE SELECT ON app.t FROM ROLE; GRANT SELECT (id, v) ON app.t TO ROLE",
        ),
        ("read_only_by_default", "ALTER ROLE ROLE SET default_transaction_read_only = on"),
        (
            "types_of_a_hidden_schema",
            "CREATE SCHEMA hidden; CREATE TYPE hidden.e AS ENUM ('a'); CREATE TYPE hidden.c AS \
             (a int); REVOKE ALL ON TYPE hidden.e FROM PUBLIC; CREATE TABLE app.x (id int \
             PRIMARY KEY, e hidden.e, c hidden.c); INSERT INTO app.x VALUES (1, 'a', row(1)); \
             GRANT SELECT ON app.x TO ROLE; ALTER PUBLICATION rhei ADD TABLE app.x",
        ),
        (
            "row_security_that_does_not_apply",
            "ALTER TABLE app.t ENABLE ROW LEVEL SECURITY; ALTER ROLE ROLE BYPASSRLS",
        ),
    ] {
        let source = Source::new(&cluster, name, "", "UTF8");
        source.execute(sql);
        let (checked, found) = source.check();
        assert_eq!(checked.code(), Some(0), "{name}: check\n{found:#}");
        let synced = source.rhei.run(["sync"]);
        assert_eq!(synced.code(), Some(0), "{name}: sync\n{}", synced.stderr);
        let again = source.rhei.run(["sync"]);
        assert_eq!(again.code(), Some(0), "{name}: sync again\n{}", again.stderr);
        source.end();
    }
}

/// Reports 9: what the settings accept is a warning, and what is new is an error.
#[test]
fn a_pause_that_the_settings_accept_fails_no_sync() {
    let cluster = Cluster::start(ClusterOptions::default());
    let accept = "[sync]\naccept = [\"app.n\"]";
    let source = Source::new(&cluster, "accept", accept, "UTF8");
    source.execute(
        "CREATE TABLE app.n (id int PRIMARY KEY, n numeric(9,0)); INSERT INTO app.n VALUES (1, \
         'NaN'); CREATE TABLE app.m (LIKE app.n INCLUDING ALL); \
         ALTER PUBLICATION rhei ADD TABLE app.n, app.m; GRANT SELECT ON app.n, app.m TO ROLE",
    );

    for _ in 0..2 {
        let synced = source.rhei.run_ok(["sync"]);
        assert!(synced.stderr.contains("which the settings accept"), "{}", synced.stderr);
    }
    source.rhei.run_ok(["check"]);

    source.execute("INSERT INTO app.m VALUES (1, 'NaN')");
    let synced = source.rhei.run(["sync"]);
    synced.assert_code(1);
    assert!(synced.stderr.contains("table app.m is paused"), "{}", synced.stderr);
    let (checked, found) = source.check();
    assert_eq!(checked.code(), Some(1), "{found:#}");
}

struct Bouncer(Child);

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Poolers that refuse replication, that leave the wish for it out, and that keep a session.
#[test]
fn a_pooler_is_recognised_and_the_way_around_is_named() {
    let cluster = Cluster::start(ClusterOptions::default());
    let source = Source::new(&cluster, "pooler", "", "UTF8");
    let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"];
    let program = program.into_iter().find(|path| fs::metadata(path).is_ok());
    let program = program.expect("pgbouncer is installed by `make setup`");

    for settings in [
        "pool_mode = transaction",
        "pool_mode = session",
        "pool_mode = transaction\nignore_startup_parameters = options,replication",
    ] {
        let folder = temp_dir();
        let port = free_port();
        let users = folder.path().join("users.txt");
        fs::write(&users, format!("\"{}\" \"\"\n", source.role)).unwrap();
        let file = folder.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = \
             127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = trust\nauth_file = \
             {}\nuser = {}\n{settings}\n",
            cluster.port(),
            users.display(),
            if crate::bed::cluster::is_root() { "nobody" } else { "" },
        );
        let text = text.replace("\nuser = \n", "\n");
        fs::write(&file, text).unwrap();
        crate::bed::cluster::shell(&format!("chmod -R a+rX '{}'", folder.path().display()));

        let log = fs::File::create(folder.path().join("log")).unwrap();
        let _bouncer = Bouncer(
            Command::new(program).arg(&file).stdin(Stdio::null()).stderr(log).spawn().unwrap(),
        );
        wait_until(Duration::from_secs(30), "pgbouncer listens", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });

        let url = format!(
            "postgresql://{}@127.0.0.1:{port}/{}?sslmode=disable",
            source.role,
            source.db.name()
        );
        let rhei = source.rhei.clone().source(url);
        for command in ["check", "sync"] {
            let output = rhei.run([command]);
            let text = format!("{}{}", output.stdout, output.stderr);
            assert_eq!(output.code(), Some(1), "{settings}: {command}\n{text}");
            for words in ["a connection pooler answers at 127.0.0.1", "the server's own address"] {
                assert!(text.contains(words), "{settings}: {command}\n{text}");
            }
        }
    }

    source.rhei.run_ok(["check"]);
}
