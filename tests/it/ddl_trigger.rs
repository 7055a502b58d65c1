//! The optional event trigger at the source: who controls it, and what it says.

use std::time::Duration;

use crate::{bed::Cluster, following::Following};

const SOON: Duration = Duration::from_secs(60);

/// Roles are of the whole cluster: each test has its own, and drops what it may not leave behind.
fn role(following: &Following, name: &str) -> String {
    let role = format!("{name}_{}", following.db.name());
    let role = role.get(..role.len().min(60)).unwrap_or(&role).to_owned();
    following.db.execute(&format!("CREATE ROLE \"{role}\""));
    role
}

/// The function that the event trigger runs, and who owns it.
fn runs(following: &Following) -> Vec<Vec<Option<String>>> {
    following.db.query(
        "SELECT evtfoid::regprocedure::text, rolsuper::text FROM pg_event_trigger
         JOIN pg_proc p ON p.oid = evtfoid JOIN pg_roles r ON r.oid = proowner WHERE evtname = \
         'rhei_ddl'",
    )
}

/// Whoever owned it could replace it afterwards, and it runs in the DDL of every role, a
/// superuser's too.
#[test]
fn the_event_trigger_is_never_put_over_a_function_of_somebody_else() {
    let following = Following::new("foreign_function");
    let mallory = role(&following, "mallory");
    let db = &following.db;
    db.execute("CREATE TABLE t (id int PRIMARY KEY)");
    let theirs = |schema: &str, name: &str| {
        format!(
            "CREATE FUNCTION {schema}.{name}() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN \
             END';
             ALTER FUNCTION {schema}.{name}() OWNER TO \"{mallory}\";"
        )
    };
    let install = || following.rhei.run(["check", "--install-ddl-trigger"]);

    // Where the function used to stand: it is left alone, and nobody runs it.
    db.execute(&theirs("public", "rhei_emit_ddl"));
    let installed = install();
    assert!(installed.assert_code(0).stdout.contains("rhei_ddl describes"), "{}", installed.stdout);
    assert_eq!(runs(&following), [[Some("rhei.emit_ddl()".to_owned()), Some("true".to_owned())]]);
    db.execute("DROP EVENT TRIGGER rhei_ddl; DROP SCHEMA rhei CASCADE");

    for (before, what) in [
        (format!("CREATE SCHEMA rhei AUTHORIZATION \"{mallory}\""), "schema \"rhei\" belongs to"),
        (format!("CREATE SCHEMA rhei; GRANT CREATE ON SCHEMA rhei TO \"{mallory}\""), "to create"),
        (
            "CREATE SCHEMA rhei; GRANT CREATE ON SCHEMA rhei TO PUBLIC".to_owned(),
            "lets \"PUBLIC\" create",
        ),
        (
            format!("CREATE SCHEMA rhei; {}", theirs("rhei", "emit_ddl")),
            "function rhei.emit_ddl() belongs to",
        ),
    ] {
        db.execute(&before);
        let refused = install();
        let what = what.replace("to create", &format!("lets \"{mallory}\" create"));
        assert!(refused.assert_code(1).stderr.contains(&what), "{before}: {}", refused.stderr);
        assert!(refused.stderr.contains("hint: "), "{}", refused.stderr);
        assert!(runs(&following).is_empty(), "{before}");
        db.execute("DROP SCHEMA rhei CASCADE");
    }

    // Once more over its own, and over the one that superusers made in public.
    db.execute("CREATE FUNCTION public.of_a_superuser() RETURNS int LANGUAGE sql AS 'SELECT 1'");
    db.execute("DROP FUNCTION public.rhei_emit_ddl()");
    db.execute(
        "CREATE FUNCTION public.rhei_emit_ddl() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN \
         END';
         CREATE EVENT TRIGGER rhei_ddl ON ddl_command_end EXECUTE FUNCTION public.rhei_emit_ddl()",
    );
    install().assert_code(0);
    install().assert_code(0);
    assert_eq!(runs(&following), [[Some("rhei.emit_ddl()".to_owned()), Some("true".to_owned())]]);
    assert_eq!(db.value("SELECT count(*) FROM pg_proc WHERE proname = 'rhei_emit_ddl'"), "0");
    db.execute("DROP EVENT TRIGGER rhei_ddl; DROP SCHEMA rhei CASCADE");
    db.execute(&format!("DROP OWNED BY \"{mallory}\"; DROP ROLE \"{mallory}\""));
}

#[test]
fn an_event_trigger_that_others_control_is_an_error_and_is_not_listened_to() {
    let following = Following::new("foreign_trigger");
    let mallory = role(&following, "mallory");
    let db = &following.db;
    db.execute("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1)");
    following.rhei.run_ok(["check", "--install-ddl-trigger"]);
    following.sync();
    for (before, after, what) in [
        (
            format!("ALTER FUNCTION rhei.emit_ddl() OWNER TO \"{mallory}\""),
            "ALTER FUNCTION rhei.emit_ddl() OWNER TO postgres",
            "runs rhei.emit_ddl(), which belongs to",
        ),
        (
            format!("ALTER SCHEMA rhei OWNER TO \"{mallory}\""),
            "ALTER SCHEMA rhei OWNER TO postgres",
            "no superuser",
        ),
        (
            "GRANT CREATE ON SCHEMA rhei TO PUBLIC".to_owned(),
            "REVOKE CREATE ON SCHEMA rhei FROM PUBLIC",
            "\"PUBLIC\" may create objects",
        ),
        (
            "ALTER FUNCTION rhei.emit_ddl() SET SCHEMA public".to_owned(),
            "ALTER FUNCTION public.emit_ddl() SET SCHEMA rhei",
            "runs public.emit_ddl(), which is not",
        ),
    ] {
        db.execute(&before);
        let checked = following.rhei.run(["check"]);
        let is_error = |line: &str| line.starts_with("ERROR") && line.contains(what);
        assert!(
            checked.assert_code(1).stdout.lines().any(is_error),
            "{before}: {}",
            checked.stdout
        );
        // Two changes in a row leave a doubt, and nobody is believed about them.
        db.execute(
            "ALTER TABLE t DROP v; ALTER TABLE t ADD v int; INSERT INTO t VALUES ((SELECT max(id) \
             + 1 FROM t), 5)",
        );
        db.execute("ALTER TABLE t DROP v; ALTER TABLE t ADD v int");
        let synced = following.sync();
        assert!(
            synced.stderr.contains("rhei_ddl is not listened to"),
            "{before}: {}",
            synced.stderr
        );
        assert!(synced.stderr.contains("copying the table again"), "{before}: {}", synced.stderr);
        following.assert_same(&["public.t"]);
        db.execute(after);
    }
    let checked = following.rhei.run_ok(["check"]);
    assert!(checked.stdout.contains("rhei_ddl describes"), "{}", checked.stdout);
    db.execute(&format!("DROP OWNED BY \"{mallory}\"; DROP ROLE \"{mallory}\""));
}

/// Its tag is ALTER TYPE, and the tables that it changes are named nowhere in it.
#[test]
fn a_typed_table_is_described_when_its_type_changes() {
    for with_trigger in [true, false] {
        let following = Following::new("typed_table");
        following.db.execute(
            "CREATE TYPE made_of AS (id int, v int); CREATE TABLE t OF made_of (PRIMARY KEY (id));
             INSERT INTO t VALUES (1, 1), (2, 2)",
        );
        if with_trigger {
            following.rhei.run_ok(["check", "--install-ddl-trigger"]);
        }
        following.sync();
        for change in [
            "ALTER TYPE made_of ADD ATTRIBUTE w int CASCADE; INSERT INTO t VALUES (3, 3, 3)",
            "ALTER TYPE made_of RENAME ATTRIBUTE w TO x CASCADE; UPDATE t SET x = 7 WHERE id = 1",
            "ALTER TYPE made_of DROP ATTRIBUTE x CASCADE; ALTER TYPE made_of ADD ATTRIBUTE x text \
             CASCADE; INSERT INTO t VALUES (4, 4, 'four')",
            "ALTER TYPE made_of DROP ATTRIBUTE x CASCADE; INSERT INTO t VALUES (5, 5)",
        ] {
            following.db.execute(change);
        }
        let mut running = following.run();
        running.wait_for_log("following the source", SOON);
        following.wait_until_in_step();
        let ended = running.stop(SOON);
        ended.assert_code(0);
        assert_eq!(
            ended.stderr.contains("copying the table again"),
            !with_trigger,
            "{}",
            ended.stderr
        );
        if with_trigger {
            following.assert_same(&["public.t"]);
        }
    }
}

/// Any role may send a message of any prefix, at any place of the stream.
#[test]
fn a_description_that_another_role_forges_is_not_believed() {
    let following = Following::new("forged");
    let mallory = role(&following, "mallory");
    let db = &following.db;
    db.execute("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 2)");
    following.rhei.run_ok(["check", "--install-ddl-trigger"]);
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.wait_until_in_step();
    let mark = running.log_mark();

    let (oid, int) = (db.value("SELECT 't'::regclass::oid"), 23);
    let column = |attnum: u32, name: &str, missing: &str| {
        format!(
            r#"{{"attnum": {attnum}, "name": "{name}", "type": {int}, "typmod": -1, "ndims": 0, "not_null": false,
                "is_generated": false, "missing": {{"{oid}": {missing}}}}}"#
        )
    };
    let described = format!(
        r#"{{"oid": {oid}, "last_attnum": 3, "columns": [{}, {}, {}]}}"#,
        column(1, "id", "null"),
        column(2, "v", "null"),
        column(3, "n", "\"{666}\"")
    );
    let attacker = db.session();
    attacker.execute(&format!("SET SESSION AUTHORIZATION \"{mallory}\""));
    assert!(attacker.try_query("SELECT * FROM rhei.ddl_secret").is_err(), "the secret is readable");
    db.execute("ALTER TABLE t ADD n int DEFAULT 5");
    attacker.execute(&format!("SELECT pg_logical_emit_message(true, 'rhei.ddl', '{described}')"));
    attacker.execute(&format!(
        "SELECT pg_logical_emit_message(true, 'rhei.ddl', repeat('0', 64) || ' ' || \
         pg_current_xact_id() || ' {described}')"
    ));
    db.execute("INSERT INTO t VALUES (3, 3, 3)");
    running.wait_for_log_after(mark, "another shape", SOON);
    following.wait_until_in_step();
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
    attacker.execute("RESET SESSION AUTHORIZATION");
    db.execute(&format!("DROP OWNED BY \"{mallory}\"; DROP ROLE \"{mallory}\""));
}

#[test]
fn a_role_that_may_not_read_the_secret_is_told_what_to_grant() {
    let following = Following::new("secret");
    let reader = role(&following, "reader");
    let db = &following.db;
    // A publication of all tables, and the secret is in no copy of them.
    db.execute(&format!(
        "ALTER ROLE \"{reader}\" LOGIN REPLICATION; CREATE TABLE t (id int PRIMARY KEY, v int);
         INSERT INTO t VALUES (1, 1); CREATE PUBLICATION rhei FOR ALL TABLES; GRANT SELECT ON t TO \
         \"{reader}\""
    ));
    following.rhei.run_ok(["check", "--install-ddl-trigger"]);
    let rhei = following.rhei.clone().source(db.url_as(&reader));
    let grant = format!(
        "GRANT USAGE ON SCHEMA rhei TO \"{reader}\"; GRANT SELECT ON rhei.ddl_secret TO \
         \"{reader}\""
    );
    // Nobody can say which column is which by looking at the catalogs of now, and a savepoint has a
    // number of its own.
    let changes = "BEGIN; ALTER TABLE t ADD w int DEFAULT 1; SAVEPOINT s; ALTER TABLE t DROP v; \
                   RELEASE s;
         ALTER TABLE t ADD v int DEFAULT 2; INSERT INTO t SELECT max(id) + 1 FROM t; COMMIT;
         ALTER TABLE t DROP w; ALTER TABLE t RENAME v TO u; ALTER TABLE t ADD v int; INSERT INTO t \
         SELECT max(id) + 1 FROM t;
         ALTER TABLE t DROP u";
    rhei.run_ok(["sync"]);
    for may_read in [false, true] {
        let checked = rhei.run_ok(["check"]);
        let is_told = grant.split("; ").all(|sql| checked.stdout.contains(sql));
        assert_eq!(is_told, !may_read, "{}", checked.stdout);
        assert_eq!(checked.stdout.contains("rhei_ddl describes"), may_read, "{}", checked.stdout);
        db.execute(changes);
        let synced = rhei.run_ok(["sync"]);
        assert_eq!(synced.stderr.contains("not listened to"), !may_read, "{}", synced.stderr);
        assert_eq!(
            synced.stderr.contains("copying the table again"),
            !may_read,
            "{}",
            synced.stderr
        );
        following.assert_same(&["public.t"]);
        db.execute(&grant);
    }
    let secret = db.value("SELECT secret FROM rhei.ddl_secret");
    let file = std::fs::read(following.copy()).unwrap();
    assert!(
        !file.windows(secret.len()).any(|window| window == secret.as_bytes()),
        "the secret is in the copy"
    );
    assert!(!rhei.clone().env("RHEI_LOG", "trace").run_ok(["-v", "sync"]).stderr.contains(&secret));
    db.execute(&format!("DROP OWNED BY \"{reader}\"; DROP ROLE \"{reader}\""));
}

/// DDL is everybody's, and must not fail for what became of the secret.
#[test]
fn tables_can_be_changed_though_the_secret_is_gone() {
    let following = Following::new("no_secret");
    let db = &following.db;
    db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    following.rhei.run_ok(["check", "--install-ddl-trigger"]);
    following.sync();
    db.execute("REFRESH MATERIALIZED VIEW rhei.ddl_secret WITH NO DATA; ALTER TABLE t ADD a int");
    db.execute(
        "DROP MATERIALIZED VIEW rhei.ddl_secret; ALTER TABLE t ADD b int; INSERT INTO t \
                VALUES (2, 2, 2)",
    );
    let checked = following.rhei.run(["check"]);
    assert!(
        checked.assert_code(1).stdout.contains("no secret rhei.ddl_secret"),
        "{}",
        checked.stdout
    );
    following.sync();
    following.assert_same(&["public.t"]);
    let installed = following.rhei.run_ok(["check", "--install-ddl-trigger"]);
    assert!(installed.stdout.contains("rhei_ddl describes"), "{}", installed.stdout);
    // A name of the session's own that stands for a catalog would be read with the rights of a
    // superuser.
    db.execute(
        "CREATE TEMP TABLE pg_class (oid oid); CREATE TEMP TABLE pg_attribute (n int); \
                ALTER TABLE t ADD c int",
    );
    db.execute("INSERT INTO t VALUES (3, 3, 3, 3)");
    following.sync();
    following.assert_same(&["public.t"]);
}

/// A session may switch event triggers off, and a superuser the trigger itself: then a change comes
/// without a description, and the one before it says nothing of it.
#[test]
fn a_description_is_not_believed_after_a_change_that_nobody_described() {
    let change = "ALTER TABLE t DROP v, ADD v int; INSERT INTO t (id, v, w) VALUES (2, 20, 7)";
    let replica = format!("SET session_replication_role = replica; {change}");
    let in_one = format!("ALTER TABLE t ADD more int; {replica}");
    let without = format!("SET event_triggers = off; {change}");
    let mut cases = vec![(true, replica.clone()), (false, replica), (true, in_one)];
    if Cluster::shared().major() >= 17 {
        cases.push((true, without));
    }
    for (always, change) in cases {
        let following = Following::new("undescribed");
        // `v` is the last one, so the relation looks the same with the other column of that name.
        following.db.execute(
            "CREATE TABLE t (id int PRIMARY KEY, w int, v int); INSERT INTO t VALUES (1, 1, 10)",
        );
        following.rhei.run_ok(["check", "--install-ddl-trigger"]);
        if !always {
            following.db.execute("ALTER EVENT TRIGGER rhei_ddl ENABLE");
        }
        // Described, and no row after it: the description waits for one.
        let rhei = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "1h");
        let mut run = rhei.spawn(["run"]);
        run.wait_for_log("all tables are live", SOON);
        following.db.execute("ALTER TABLE t ALTER w SET NOT NULL");
        following.wait_until_in_step();
        following.db.execute(&change);
        following.wait_until_in_step();
        run.stop(SOON).assert_code(0);
        let mut run =
            following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms").spawn(["run"]);
        run.wait_for_log("following the source", SOON);
        following.db.execute("UPDATE t SET w = w + 1 WHERE id = 1");
        following.wait_until_in_step();
        run.stop(SOON).assert_code(0);
        following.assert_same(&["public.t"]);
    }
}
