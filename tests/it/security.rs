//! The least that a role needs, secrets that are printed nowhere, and names that would be
//! statements if they were not quoted.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use crate::{
    bed::{
        Cluster, ClusterOptions, Output, Rhei, assert_same,
        cluster::quote,
        oracle::{Pair, assert_same_pairs, query_copy},
        temp_dir, wait_until,
    },
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

/// The blocks of SQL of a page.
fn sql_of(page: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    let page = fs::read_to_string(path).unwrap();
    page.split("```sql\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .collect()
}

#[test]
fn the_documented_role_is_enough_and_may_do_nothing_more() {
    let cluster = Cluster::start(ClusterOptions {
        hba: Some(
            "local all postgres trust\nhost shop rhei 127.0.0.1/32 scram-sha-256\n".to_owned(),
        ),
        ..ClusterOptions::default()
    });
    let server = cluster.maintenance();
    server.execute("CREATE ROLE shop_owner");
    server.execute("CREATE DATABASE shop OWNER shop_owner");
    server.execute("REVOKE ALL ON DATABASE shop FROM PUBLIC");
    let db = cluster.named("shop");
    db.execute(
        "REVOKE ALL ON SCHEMA public FROM PUBLIC; GRANT ALL ON SCHEMA public TO shop_owner WITH \
         GRANT OPTION;
         SET ROLE shop_owner;
         CREATE TABLE orders (id int PRIMARY KEY, v text); CREATE TABLE secrets (id int PRIMARY \
         KEY);
         CREATE TABLE customers (id int, part int, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
         CREATE TABLE customers_1 PARTITION OF customers FOR VALUES IN (1);
         INSERT INTO orders SELECT i, repeat('x', 9000) FROM generate_series(1, 50) i; INSERT INTO \
         customers VALUES (1, 1)",
    );
    let [as_superuser, as_owner] = sql_of("docs/security.md").try_into().unwrap();
    db.execute(&as_superuser);
    db.execute(&format!("SET ROLE shop_owner; {as_owner}"));

    let granted = db.query(
        "SELECT 'member of ' || roleid::regrole FROM pg_auth_members WHERE member = 'rhei'::regrole
         UNION ALL SELECT 'owns something' FROM pg_shdepend WHERE refobjid = 'rhei'::regrole AND \
         deptype = 'o'
         UNION ALL SELECT 'database ' || privilege_type FROM pg_database, aclexplode(datacl) WHERE \
         grantee = 'rhei'::regrole
         UNION ALL SELECT 'schema ' || privilege_type FROM pg_namespace, aclexplode(nspacl) WHERE \
         grantee = 'rhei'::regrole
         UNION ALL SELECT relname || ' ' || privilege_type FROM pg_class, aclexplode(relacl) WHERE \
         grantee = 'rhei'::regrole
         UNION ALL SELECT 'attribute ' || a FROM pg_roles, unnest(ARRAY[CASE WHEN rolsuper THEN \
         'super' END,
             CASE WHEN rolcreaterole OR rolcreatedb THEN 'create' END, CASE WHEN rolbypassrls THEN \
             'bypass' END,
             CASE WHEN rolreplication THEN 'replication' END]) a WHERE rolname = 'rhei' AND a IS \
             NOT NULL
         ORDER BY 1",
    );
    let granted: Vec<String> = granted.into_iter().map(|mut row| row.remove(0).unwrap()).collect();
    let expected = [
        "attribute replication",
        "customers SELECT",
        "customers_1 SELECT",
        "database CONNECT",
        "orders SELECT",
        "schema USAGE",
    ];
    assert_eq!(granted, expected);

    let folder = temp_dir();
    let rhei = Rhei::new(folder.path())
        .source(db.url_as("rhei"))
        .target("copy.duckdb")
        .env("PGPASSWORD", "change me");
    // What is granted on its root says nothing about a partition.
    db.execute("REVOKE SELECT ON customers_1 FROM rhei");
    let checked = rhei.run(["check"]);
    let mend = "GRANT SELECT ON \"public\".\"customers_1\" TO \"rhei\"";
    assert!(checked.assert_code(1).stdout.contains(mend), "{}", checked.stdout);
    db.execute(mend);
    let checked = rhei.run_ok(["check"]);
    assert!(checked.stdout.contains("0 errors"), "{}", checked.stdout);
    rhei.run_ok(["sync"]);
    let tables = ["public.orders", "public.customers"];
    assert_same(&db, rhei.target_path(), &tables);
    db.execute(
        "INSERT INTO orders VALUES (0, 'b'); UPDATE orders SET id = -1 WHERE id = 1; INSERT \
                INTO customers VALUES (2, 1)",
    );
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    // A shape that the catalogs have to be asked for, and a copy.
    db.execute(
        "ALTER TABLE orders ADD COLUMN n int DEFAULT 5; INSERT INTO orders VALUES (100, 'c', 6)",
    );
    rhei.run_ok(["resync", "public.customers"]);
    running.wait_for_log("all tables are live", SOON);
    rhei.run_ok(["status"]);
    running.stop(SOON).assert_code(0);
    rhei.run_ok(["sync"]);
    assert_same(&db, rhei.target_path(), &tables);
    rhei.run_ok(["backfill", "--force"]);
    assert_same(&db, rhei.target_path(), &tables);
}

/// What is searched for, in all that rhei prints and writes.
const SECRET: &str = "hush-4711-secret";

/// RDS and Aurora give no role the attribute REPLICATION, but membership in a role of theirs.
#[test]
fn a_member_of_the_role_that_rds_has_for_replication_passes_the_check() {
    let db = Cluster::shared().database("rds_role");
    db.execute(
        "CREATE ROLE rds_replication; CREATE ROLE of_rds LOGIN; CREATE TABLE t (id int PRIMARY \
         KEY); CREATE PUBLICATION rhei FOR TABLE t; GRANT SELECT ON t TO of_rds",
    );
    let folder = temp_dir();
    let rhei = Rhei::new(folder.path()).source(db.url_as("of_rds")).target("copy.duckdb");

    let checked = rhei.run(["check"]);
    checked.assert_code(1);
    assert!(checked.stdout.contains("\"of_rds\" may not replicate"), "{}", checked.stdout);

    db.execute("GRANT rds_replication TO of_rds");
    let checked = rhei.run_ok(["check"]);
    assert!(checked.stdout.contains("\"of_rds\" may replicate"), "{}", checked.stdout);
}

#[track_caller]
fn keeps_quiet(what: &str, output: &Output) {
    for (name, text) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        assert!(!text.contains("hush"), "{what}: the password is in {name}:\n{text}");
    }
}

fn holds(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn a_password_is_printed_nowhere_and_written_nowhere() {
    let cluster = Cluster::start(ClusterOptions {
        hba: Some("local all postgres trust\nhost all all all scram-sha-256\n".to_owned()),
        ..ClusterOptions::default()
    });
    let db = cluster.database("secrets");
    db.execute(&format!(
        "CREATE ROLE quiet LOGIN REPLICATION PASSWORD '{SECRET}'; CREATE TABLE t (id int PRIMARY \
         KEY);
         INSERT INTO t VALUES (1); GRANT SELECT ON t TO quiet; CREATE PUBLICATION rhei FOR TABLE t"
    ));
    let (port, name) = (cluster.port(), db.name().to_owned());
    let with_password = format!("postgresql://quiet:{SECRET}@127.0.0.1:{port}/{name}");
    let without = format!("postgresql://quiet@127.0.0.1:{port}/{name}");
    for way in
        ["url", "pairs", "RHEI_SOURCE_URL", "rhei.toml", "PGPASSWORD", "password_file", "pgpass"]
    {
        let folder = temp_dir();
        let rhei = Rhei::new(folder.path())
            .target("copy.duckdb")
            .env("RHEI_SOURCE_SLOT", &format!("quiet_{}", way.to_lowercase().replace('.', "_")));
        let mut mine = vec![];
        let rhei = match way {
            "url" => rhei.source(&with_password),
            "pairs" => rhei.source(format!(
                "host=127.0.0.1 port={port} user=quiet dbname={name} password={SECRET}"
            )),
            "RHEI_SOURCE_URL" => rhei.env("RHEI_SOURCE_URL", &with_password),
            "rhei.toml" => {
                mine.push("rhei.toml");
                rhei.config(&format!("[source]\nurl = \"{with_password}\"\n"))
            }
            "PGPASSWORD" => rhei.source(&without).env("PGPASSWORD", SECRET),
            "password_file" => {
                let file = folder.path().join("password");
                fs::write(&file, format!("{SECRET}\n")).unwrap();
                fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
                mine.push("password");
                let rhei = rhei
                    .source(&without)
                    .env("RHEI_SOURCE_PASSWORD_FILE", file.to_str().unwrap())
                    // It stands above the passwords that libpq would take.
                    .env("PGPASSWORD", "another one");

                let refused = rhei.run(["check"]);
                refused.assert_code(2);
                assert!(refused.stderr.contains("can be read by others"), "{}", refused.stderr);
                keeps_quiet(way, &refused);
                fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
                rhei
            }
            _ => {
                let file = folder.path().join(".pgpass");
                fs::write(&file, format!("127.0.0.1:*:*:quiet:{SECRET}\n")).unwrap();
                fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
                mine.push(".pgpass");
                rhei.source(&without)
            }
        };
        let loud = rhei.clone().env("RHEI_LOG", "trace");
        for command in [
            ["check", "-v"].as_slice(),
            &["init", "--output", "made.toml"],
            &["-v", "sync"],
            &["-v", "--log-format", "json", "sync"],
            &["status"],
            &["status", "--json"],
            &["jobs"],
        ] {
            keeps_quiet(way, &loud.run_ok(command));
        }
        let mut running = rhei.spawn(["-v", "--log-format", "json", "run"]);
        running.wait_for_log("following the source", SOON);
        keeps_quiet(way, &rhei.run_ok(["status", "--json"]));
        keeps_quiet(way, running.stop(SOON).assert_code(0));
        let made = fs::read_to_string(folder.path().join("made.toml")).unwrap();
        assert!(made.contains("PGPASSWORD") && made.contains("quiet"), "{made}");
        for entry in fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
            let file = entry.file_name().into_string().unwrap();
            if !mine.contains(&file.as_str()) && entry.file_type().unwrap().is_file() {
                assert!(
                    !holds(&fs::read(entry.path()).unwrap(), b"hush"),
                    "{way}: the password is in {file}"
                );
            }
        }
        // The walsender of a process that has ended takes a moment to notice.
        wait_until(SOON, "the slot is free", || {
            db.value("SELECT coalesce(bool_or(active), false) FROM pg_replication_slots") == "f"
        });
        db.query("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots");
    }
}

#[test]
fn what_fails_keeps_the_password_to_itself() {
    let cluster = Cluster::start(ClusterOptions {
        hba: Some("local all postgres trust\nhost all all all scram-sha-256\n".to_owned()),
        ..ClusterOptions::default()
    });
    cluster.maintenance().execute("CREATE ROLE quiet LOGIN PASSWORD 'another'");
    let port = cluster.port();
    let folder = temp_dir();
    for (number, source) in [
        // A wrong password, a database that is not there, nobody who answers.
        format!("postgresql://quiet:{SECRET}@127.0.0.1:{port}/postgres"),
        format!("postgresql://quiet:{SECRET}@127.0.0.1:{port}/none"),
        format!("postgresql://quiet:{SECRET}@127.0.0.1:1/none"),
        format!("postgresql://quiet:{SECRET}%@127.0.0.1:{port}/postgres"),
        // Strings that are wrong themselves.
        format!("postgresq://quiet:{SECRET}@127.0.0.1:{port}/postgres?sslmode=disable"),
        format!("postgresql://quiet:{SECRET}@127.0.0.1:many/postgres"),
        format!("postgresql://quiet:p@{SECRET}@127.0.0.1:{port}/postgres"),
        format!("host=127.0.0.1 user=quiet password='{SECRET}"),
        format!("host=127.0.0.1 user=quiet pass word={SECRET}"),
    ]
    .iter()
    .enumerate()
    {
        let code = if number < 4 { 1 } else { 2 };
        let rhei = Rhei::new(folder.path()).target("copy.duckdb").env("RHEI_LOG", "trace");
        for command in ["check", "init", "sync", "run"] {
            for format in ["text", "json"] {
                let output =
                    rhei.clone().source(source).run(["-v", "--log-format", format, command]);
                output.assert_code(code);
                keeps_quiet(source, &output);
            }
        }
        let from_file =
            rhei.clone().config(&format!("[source]\nurl = \"{source}\"\n")).run(["sync"]);
        keeps_quiet(source, from_file.assert_code(code));
        fs::remove_file(folder.path().join("rhei.toml")).unwrap();
    }
    for config in [
        format!("[source]\nurl = [\"postgresql://quiet:{SECRET}@h/d\"]\n"),
        format!("[source]\nurl = postgresql://quiet:{SECRET}@h/d\n"),
        format!("[source]\nurrl = \"postgresql://quiet:{SECRET}@h/d\"\n"),
        format!("[source]\nurl = \"postgresql://quiet:{SECRET}@h/d\n"),
        format!("[source]\n\"postgresql://quiet:{SECRET}@h/d\"\n"),
    ] {
        let output = Rhei::new(folder.path()).target("copy.duckdb").config(&config).run(["sync"]);
        keeps_quiet(&config, output.assert_code(2));
    }
}

/// As long as a name may be.
fn long(name: &str) -> String {
    let mut name = name.to_owned();
    while name.len() < 63 {
        name.push('z');
    }
    assert_eq!(name.len(), 63);
    name
}

#[test]
fn names_that_would_be_statements_are_copied_followed_and_renamed() {
    let following = Following::new("hostile");
    let db = &following.db;
    db.execute("CREATE TABLE canary (id int PRIMARY KEY); INSERT INTO canary VALUES (1)");
    let schemas = ["select".to_owned(), long("s \"'; DROP TABLE public.canary; -- ü")];
    let tables = [
        "order".to_owned(),
        "a\"b".to_owned(),
        "x\"; DROP TABLE public.canary; --".to_owned(),
        "x'; DROP TABLE public.canary; --".to_owned(),
        "%s %n {} {0} $1 ? :a \\ \\n".to_owned(),
        "a.b.c".to_owned(),
        " two\n lines\t".to_owned(),
        "_rhei".to_owned(),
        long("列 ü ẞ 🦆"),
    ];
    let columns = [
        "table".to_owned(),
        "\"".to_owned(),
        "'); DROP TABLE public.canary; --".to_owned(),
        "\\ $$ /* -- */".to_owned(),
        "from".to_owned(),
        long("{} %s ü"),
    ];
    let columns_sql = columns.map(|name| format!("{} text", quote(&name))).join(", ");
    let enum_name = quote("an \"enum'; --");
    for schema in &schemas {
        db.execute(&format!(
            "CREATE SCHEMA {}; CREATE TYPE {}.{enum_name} AS ENUM ('it''s', '\"', '\\', ';')",
            quote(schema),
            quote(schema)
        ));
    }
    let mut pairs = Vec::new();
    for schema in &schemas {
        for table in &tables {
            let name = format!("{}.{}", quote(schema), quote(table));
            db.execute(&format!(
                "CREATE TABLE {name} ({} int PRIMARY KEY, {columns_sql}, {} {}.{enum_name});
                 INSERT INTO {name} VALUES (1, 'a'), (2, 'b')",
                quote("primary key"),
                quote("enum \"e"),
                quote(schema),
            ));
            pairs.push((schema.clone(), table.clone()));
        }
    }
    let publication = long("p \"'; DROP TABLE public.canary; -- %s");
    db.execute(&format!("CREATE PUBLICATION {} FOR ALL TABLES", quote(&publication)));
    let slot = format!("{:x<63}", following.slot());
    let settings = |rest: &str| {
        let publication = toml_string(&publication);
        format!(
            "[source]\npublication = {publication}\nslot = \"{slot}\"\n[sync]\ninterval = \
             \"50ms\"\n{rest}"
        )
    };
    let rhei = following.rhei.clone().config(&settings(""));
    let same = |pairs: &[(String, String)]| {
        let pairs: Vec<Pair> = pairs
            .iter()
            .map(|name| Pair { source: name.clone(), target: name.clone(), excluded: Vec::new() })
            .collect();
        assert_same_pairs(db, following.copy(), &pairs);
        assert_same(db, following.copy(), &["public.canary"]);
    };
    rhei.run_ok(["check"]);
    rhei.run_ok(["sync"]);
    same(&pairs);
    let full = |(schema, table): &(String, String)| format!("{}.{}", quote(schema), quote(table));
    for pair in &pairs {
        let name = full(pair);
        db.execute(&format!(
            "INSERT INTO {name} SELECT i, 'c' FROM generate_series(3, 40) i; UPDATE {name} SET {} \
             = 'it''s', {} = '\"';
             DELETE FROM {name} WHERE {} = 2",
            quote("table"),
            quote("enum \"e"),
            quote("primary key"),
        ));
    }
    rhei.run_ok(["sync"]);
    same(&pairs);
    // Tables, columns, keys, labels and a schema get other names; a column comes and one goes.
    for (schema, table) in &mut pairs {
        let (old, new) = (
            full(&(schema.clone(), table.clone())),
            format!("{}'\"", &table.chars().take(9).collect::<String>()),
        );
        db.execute(&format!("ALTER TABLE {old} RENAME TO {}", quote(&new)));
        *table = new;
        let name = full(&(schema.clone(), table.clone()));
        db.execute(&format!(
            "ALTER TABLE {name} RENAME COLUMN {} TO {}; ALTER TABLE {name} RENAME COLUMN {} TO {};
             ALTER TABLE {name} ADD COLUMN {} text DEFAULT 'x\"''; --'; ALTER TABLE {name} DROP \
             COLUMN {};
             TRUNCATE {name}; INSERT INTO {name} VALUES (7)",
            quote("table"),
            quote("co\"l'; --"),
            quote("primary key"),
            quote("'; key \""),
            quote("new \"; '"),
            quote("from"),
        ));
    }
    rhei.run_ok(["sync"]);
    same(&pairs);
    let moved = "schema \"'; %s";
    db.execute(&format!("ALTER SCHEMA {} RENAME TO {}", quote(&schemas[1]), quote(moved)));
    pairs
        .iter_mut()
        .filter(|(schema, _)| *schema == schemas[1])
        .for_each(|(schema, _)| *schema = moved.to_owned());
    rhei.run_ok(["sync"]);
    same(&pairs);
    // The same names in settings and flags, and a way to nothing.
    let (schema, table) = pairs.last().unwrap().clone();
    rhei.run_ok(["backfill", "--table", &format!("{schema}.{table}"), "--force"]);
    rhei.run_ok(["backfill", "--force"]);
    same(&pairs);
    rhei.run_ok(["status"]);
    rhei.run_ok(["jobs", "--all"]);
    rhei.run_ok(["init", "--output", "made.toml"]);
    let key = toml_string(&format!("{schema}.{table}"));
    let rest = format!(
        "[tables.{key}]\ntarget = \"o\\\"ther; .na'me\"\nexclude_columns = [{}]\n",
        toml_string("new \"; '")
    );
    rhei.clone().config(&settings(&rest)).run_ok(["sync"]);
    let found =
        query_copy(following.copy(), "SELECT count(*)::VARCHAR FROM \"o\"\"ther; \".\"na'me\"");
    assert_eq!(found, [[Some("1".to_owned())]]);
}

fn toml_string(text: &str) -> String {
    format!(
        "\"{}\"",
        text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").replace('\t', "\\t")
    )
}

/// Whatever lies beside the target holds data of the source, or reaches the replicator.
#[test]
fn files_and_socket_are_for_their_owner_alone_from_the_moment_that_they_are_there() {
    use std::os::unix::fs::PermissionsExt;
    let following = Following::new("private");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.db.execute("INSERT INTO t VALUES (0)");
    following.wait_until_in_step();
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(following.copy().parent().unwrap()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("copy.duckdb") {
            let mode = entry.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{name} has mode {mode:o}");
            seen.push(name);
        }
    }
    for wanted in ["copy.duckdb", "copy.duckdb.wal", "copy.duckdb.rhei.sock"] {
        assert!(seen.iter().any(|name| name == wanted), "no {wanted} among {seen:?}");
    }
    running.stop(SOON).assert_code(0);
}
