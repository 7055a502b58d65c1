//! Schema changes while it follows: in place where that is exact, else by a new copy; never a wrong
//! row.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    bed::{lake::Kind, oracle::query_copy, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

/// What `_rhei` says of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    target: String,
    state: String,
    copy_lsn: String,
    epoch: u32,
}

/// By `schema.name` at the source when it was last seen, and oid.
fn known(following: &Following) -> BTreeMap<(String, String), Known> {
    let rows = query_copy(
        following.copy(),
        "SELECT source_schema, oid::VARCHAR, target_schema || '.' || target_name, state, copy_lsn, \
         epoch::VARCHAR FROM _rhei.tables",
    );
    rows.into_iter()
        .map(|row| {
            let cell = |at: usize| row[at].clone().unwrap();
            let known = Known {
                target: cell(2),
                state: cell(3),
                copy_lsn: cell(4),
                epoch: cell(5).parse().unwrap(),
            };
            ((cell(0), cell(1)), known)
        })
        .collect()
}

/// A line of the page for operators: a change, and what becomes of it.
#[derive(Debug)]
struct Line {
    /// `t` is in it.
    schema: String,
    sql: String,
    outcome: String,
}

impl Line {
    fn execute(&self, following: &Following) {
        let session = following.db.session();
        session.execute(&format!("SET search_path = {}", self.schema));
        for statement in self.sql.split("; ") {
            session.execute(statement);
        }
    }

    /// A row of the table changes afterwards, if that is possible.
    fn go_on(&self, following: &Following) {
        let is_refused = self.sql.contains("NOTHING");
        let is_elsewhere = ["DROP TABLE", "RENAME TO u", "SET SCHEMA"]
            .iter()
            .any(|elsewhere| self.sql.contains(elsewhere));
        if !is_elsewhere && !is_refused {
            following.db.execute(&format!("UPDATE {}.t SET at = now() WHERE true", self.schema));
        }
    }

    #[track_caller]
    fn assert_happened(
        &self,
        before: &BTreeMap<(String, String), Known>,
        after: &BTreeMap<(String, String), Known>,
    ) {
        let Line { schema, sql, outcome } = self;
        let of_line = before.iter().find(|((other, _), _)| other == schema);
        let ((_, oid), was) = of_line.unwrap();
        let (_, is) = after.iter().find(|((_, other), _)| other == oid).unwrap_or_else(|| {
            after
                .iter()
                .find(|(_, other)| other.target == was.target)
                .unwrap_or_else(|| panic!("{sql}: it is lost"))
        });
        let happened = match (was, is) {
            _ if is.state == "dropped" => "dropped",
            _ if is.copy_lsn != was.copy_lsn => "copied again",
            _ if is.target != was.target => "renamed",
            _ if is.epoch != was.epoch => "in place",
            _ => "nothing",
        };
        assert!(outcome.starts_with(happened), "{sql}: {happened}, documented: {outcome}");
        assert!(["live", "dropped"].contains(&is.state.as_str()), "{sql}: {is:?}");
    }
}

/// The page for operators, line by line: for tables that are published with all others, and for
/// those that a publication names. Each line has a schema of its own. On a lake, the lines of the
/// section of lakes take the place of the others.
fn documented(what: &str) -> Vec<(Following, Vec<Line>)> {
    let page: &'static str = include_str!("../../docs/schema-changes.md");
    let setup = page.split("```sql").nth(1).unwrap().split("```").next().unwrap();
    let lines_of = |section: &'static str| {
        let lines = section.lines();
        let lines = lines.filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"));
        lines.map(|line| line.split_once("` | ").unwrap())
    };
    let (in_lake, sections): (Vec<_>, Vec<_>) =
        page.split("\n### ").partition(|section| section.starts_with("In a lake"));
    let in_lake: BTreeMap<&str, &str> = in_lake.into_iter().flat_map(lines_of).collect();
    let (all, named): (Vec<_>, Vec<_>) = sections
        .into_iter()
        .flat_map(|section| {
            let is_named = section.starts_with("Tables that a publication names");
            lines_of(section).map(move |line| (line, is_named))
        })
        .partition(|(_, is_named)| !is_named);
    let are_known = in_lake.keys().all(|sql| all.iter().any(|((other, _), _)| other == sql));
    assert!(!in_lake.is_empty() && are_known, "{in_lake:?}");
    assert!(
        all.len() > 40 && named.len() > 3,
        "{} and {} lines were found",
        all.len(),
        named.len()
    );
    let of_lines = |name: &str, lines: Vec<((&str, &str), bool)>| {
        let following = Following::new(&format!("{what}_{name}"));
        let lines: Vec<Line> = lines
            .into_iter()
            .enumerate()
            .map(|(number, ((sql, outcome), _))| Line {
                schema: format!("c{number}"),
                sql: sql.replace("{schema}", &number.to_string()),
                outcome: match (Kind::of_all_tests(), in_lake.get(sql)) {
                    (Some(_), Some(outcome)) => outcome.to_string(),
                    _ => outcome.to_owned(),
                },
            })
            .collect();
        for Line { schema, .. } in &lines {
            following
                .db
                .execute(&format!("CREATE SCHEMA {schema}; SET search_path = {schema}; {setup}"));
        }
        (following, lines)
    };
    let all = of_lines("all", all);
    all.0.db.execute("CREATE PUBLICATION rhei FOR ALL TABLES");
    vec![all, of_lines("named", named)]
}

#[test]
fn each_change_does_what_the_documentation_says() {
    for (following, lines) in documented("documented") {
        following.sync();
        following.assert_all_same();
        let before = known(&following);
        lines.iter().for_each(|line| line.execute(&following));
        following.sync();
        following.assert_all_same();
        let after = known(&following);
        lines.iter().for_each(|line| line.assert_happened(&before, &after));
        // And goes on from there.
        lines.iter().for_each(|line| line.go_on(&following));
        following.sync();
        following.assert_all_same();
    }
}

/// `sync` mends by copying what the stream has lost. A run is compared as it was left: once
/// stopped, and once killed before DuckDB has written the changes from its log into the file, in a
/// time zone in which nothing may be read again.
#[test]
fn each_change_does_so_while_a_run_follows_and_nothing_else_is_copied() {
    for (following, lines) in documented("lived") {
        let rhei = following
            .rhei
            .clone()
            .env("RHEI_SYNC_CATALOG_INTERVAL", "100ms")
            .env("TZ", "America/New_York");
        let mut running = rhei.spawn(["run"]);
        following.wait_settled(&mut running);
        running.stop(SOON).assert_code(0);
        following.assert_all_same();
        let before = known(&following);

        let mut running = rhei.spawn(["run"]);
        following.wait_settled(&mut running);
        assert_eq!(running.copies(), [""; 0]);
        for line in &lines {
            let copies = running.copies().len();
            line.execute(&following);
            following.wait_settled(&mut running);
            let copied = running.copies().split_off(copies);
            let of_line = format!("{}.t", line.schema);
            let moved = format!("Other {}.t", line.schema.trim_start_matches('c'));
            let (of_line, others): (Vec<_>, Vec<_>) =
                copied.into_iter().partition(|table| [&of_line, &moved].contains(&table));
            let is_documented = line.outcome.starts_with("copied again");
            // A look between two statements has seen each alone, and the first one in place.
            let in_place = format!("the table has another shape table={}.t", line.schema);
            let is_seen_apart =
                line.sql.contains("; ") && of_line.is_empty() && running.logs().contains(&in_place);
            assert_eq!(
                !of_line.is_empty(),
                is_documented && !is_seen_apart,
                "{line:?}: copied {of_line:?}\n{}",
                running.logs()
            );
            let is_new = |table: &String| {
                line.sql.contains("fresh") && *table == format!("{}.fresh", line.schema)
            };
            assert!(others.iter().all(is_new), "{line:?}: copied {others:?}\n{}", running.logs());
        }
        running.kill9();
        following.assert_all_same();
        let after = known(&following);
        lines.iter().for_each(|line| line.assert_happened(&before, &after));

        // And goes on from there.
        let mut running = rhei.spawn(["run"]);
        lines.iter().for_each(|line| line.go_on(&following));
        following.wait_settled(&mut running);
        assert_eq!(running.copies(), [""; 0], "{}", running.logs());
        running.stop(SOON).assert_code(0);
        following.assert_all_same();
    }
}

/// Traps 63, 68: every row comes in the shape that it has by then, and all of them arrive in the
/// last one.
#[test]
fn a_transaction_that_changes_the_shape_between_its_rows_arrives_whole() {
    Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY, a int, b text);
         CREATE TABLE other (id int PRIMARY KEY, v text);
         INSERT INTO t SELECT i, i, 'b' || i FROM generate_series(1, 10) i",
        &["public.t", "public.other"],
        &[
            "INSERT INTO other VALUES (1, 'before')",
            "BEGIN; INSERT INTO t VALUES (11, 11, 'old'); UPDATE t SET a = 0 WHERE id = 1;
             ALTER TABLE t ADD COLUMN c text DEFAULT 'c'; INSERT INTO t VALUES (12, 12, 'mid', \
             'mine');
             ALTER TABLE t DROP COLUMN a; UPDATE t SET b = 'x' WHERE id IN (2, 11); ALTER TABLE t \
             RENAME b TO a;
             INSERT INTO t VALUES (13, 'new', NULL); DELETE FROM t WHERE id = 3; INSERT INTO other \
             VALUES (2, 'inside'); COMMIT",
            "UPDATE t SET a = 'after' WHERE id = 12",
        ],
    );
}

/// Trap 69: DuckDB wants ALTER before DELETE in a transaction, and TRUNCATE is a DELETE to it.
#[test]
fn every_order_of_rows_and_alter_in_one_batch_arrives() {
    let orders = [
        [
            "UPDATE t SET v = 'u' WHERE id = 1",
            "ALTER TABLE t ADD x int",
            "DELETE FROM t WHERE id = 2",
        ],
        ["TRUNCATE t", "ALTER TABLE t ADD x int DEFAULT 4", "INSERT INTO t VALUES (9, 'n', 1)"],
        ["INSERT INTO t VALUES (9, 'n')", "ALTER TABLE t RENAME v TO w", "TRUNCATE t"],
        ["DELETE FROM t", "ALTER TABLE t DROP v", "INSERT INTO t VALUES (9)"],
        ["ALTER TABLE t ALTER v TYPE text", "UPDATE t SET id = id + 10", "ALTER TABLE t ADD x int"],
    ];
    let following = Following::new("orders");
    let mut tables = Vec::new();
    for number in 0..orders.len() * 2 {
        following.db.execute(&format!(
            "CREATE SCHEMA o{number}; CREATE TABLE o{number}.t (id int PRIMARY KEY, v varchar(9));
             INSERT INTO o{number}.t VALUES (1, 'a'), (2, 'b'), (3, 'c')"
        ));
        tables.push(format!("o{number}.t"));
    }
    following.sync();
    for (number, order) in orders.iter().flat_map(|order| [order, order]).enumerate() {
        let session = following.db.session();
        session.execute(&format!("SET search_path = o{number}"));
        let is_one = number % 2 == 0;
        if is_one {
            session.execute("BEGIN");
        }
        order.iter().for_each(|statement| session.execute(statement));
        if is_one {
            session.execute("COMMIT");
        }
    }
    following.sync();
    following.assert_same(&tables.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Names swapped between two live tables, and back.
#[test]
fn tables_that_swap_their_names_keep_their_rows() {
    Following::follows(
        "CREATE TABLE a (id int PRIMARY KEY, of_a int); CREATE TABLE b (id int PRIMARY KEY, of_b \
         text);
         INSERT INTO a VALUES (1, 1); INSERT INTO b VALUES (1, 'b')",
        &["public.a", "public.b"],
        &[
            "BEGIN; ALTER TABLE a RENAME TO x; ALTER TABLE b RENAME TO a; ALTER TABLE x RENAME TO \
             b; COMMIT",
            "INSERT INTO a VALUES (2, 'in a'); INSERT INTO b VALUES (2, 22)",
        ],
    );
}

/// Trap 64: what the stream says is older than what the catalogs say.
#[test]
fn several_changes_before_a_look_are_followed() {
    let following = Following::follows(
        "CREATE TABLE t (id int PRIMARY KEY, a int); INSERT INTO t VALUES (1, 1), (2, 2)",
        &["public.t"],
        &[
            "ALTER TABLE t ADD b text DEFAULT 'b'",
            "INSERT INTO t VALUES (3, 3, 'three')",
            "ALTER TABLE t ADD c int; UPDATE t SET c = id WHERE id < 3",
            "ALTER TABLE t DROP a; INSERT INTO t VALUES (4, 'four', 4)",
        ],
    );
    // A column of the same name and type in the place of another one: the wire does not tell them
    // apart.
    following.db.execute(
        "ALTER TABLE t DROP c; ALTER TABLE t ADD c int; INSERT INTO t VALUES (5, 'five', 5); \
         UPDATE t SET b = 'x' WHERE id = 1",
    );
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Traps 43, 44, 70, 71: what the stream never mentions, found while it runs.
#[test]
fn a_run_finds_what_the_stream_never_mentions() {
    let following = Following::new("silent");
    following.db.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok');
         CREATE TABLE t (id int PRIMARY KEY, m mood, n int); INSERT INTO t VALUES (1, 'sad', 1), \
         (2, 'ok', 2);
         CREATE TABLE gone (id int PRIMARY KEY);
         CREATE TABLE tree (id int, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF tree FOR VALUES FROM (0) TO (10); INSERT INTO tree VALUES \
         (1, 'one');
         CREATE PUBLICATION rhei FOR ALL TABLES WITH (publish_via_partition_root = true)",
    );
    let rhei = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms");
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    let changes = [
        ("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'", "a label of an enum was renamed"),
        ("ALTER TABLE t ALTER n TYPE int USING n * 100", "it was rewritten"),
        ("CREATE TABLE fresh (id int PRIMARY KEY); INSERT INTO fresh VALUES (7)", "fresh"),
        ("DROP TABLE gone", "no longer published"),
        (
            "CREATE TABLE full_leaf (id int NOT NULL, v text); INSERT INTO full_leaf VALUES (11, \
             'came along');
          ALTER TABLE tree ATTACH PARTITION full_leaf FOR VALUES FROM (10) TO (20)",
            "copying the table again table=public.tree",
        ),
        ("TRUNCATE leaf", "the file of a partition was replaced"),
        ("ALTER TABLE tree DETACH PARTITION full_leaf", "a partition was detached"),
        ("ALTER TABLE t RENAME TO renamed", "is now called public.renamed"),
        ("ALTER TABLE renamed ADD late text DEFAULT 'late'", "the table has another shape"),
    ];
    for (sql, said) in changes {
        let mark = running.log_mark();
        following.db.execute(sql);
        running.wait_for_log_after(mark, said, SOON);
        // Each of them is settled before the next one comes.
        match said {
            "the table has another shape" => {}
            "no longer published" | "is now called public.renamed" => {
                running.wait_for_log_after(mark, "following the source", SOON);
            }
            _ => drop(running.wait_for_log_after(mark, "all tables are live", SOON)),
        }
    }
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.renamed", "public.fresh", "public.tree", "public.full_leaf"]);
}

/// Daily partitions made in advance must not cost a copy of the tree each.
#[test]
fn an_empty_partition_changes_nothing() {
    let following = Following::new("empty_partition");
    following.db.execute(
        "CREATE TABLE tree (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF tree FOR VALUES FROM (0) TO (10); INSERT INTO tree VALUES \
         (1, 'one')",
    );
    following.sync();
    following.db.execute("CREATE TABLE next PARTITION OF tree FOR VALUES FROM (10) TO (20)");
    let output = following.sync();
    assert!(!output.stderr.contains("copied"), "{}", output.stderr);
    following
        .db
        .execute("INSERT INTO tree VALUES (11, 'eleven'); UPDATE tree SET id = 12 WHERE id = 1");
    let output = following.sync();
    assert!(!output.stderr.contains("copied"), "{}", output.stderr);
    following.assert_same(&["public.tree"]);
}

/// Trap 67, and the setting that trusts.
#[test]
fn a_widened_number_is_not_copied_again_when_the_settings_trust_it() {
    let following = Following::new("widened");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int2, f float4); INSERT INTO t VALUES (1, 1, 0.1), \
         (2, 2, 1e10)",
    );
    following.sync();
    // No lake widens this one.
    let float = if Kind::of_all_tests().is_none() { ", ALTER f TYPE float8" } else { "" };
    following.db.execute(&format!(
        "ALTER TABLE t ALTER id TYPE bigint, ALTER n TYPE int{float}; INSERT INTO t VALUES \
         (3000000000, 70000, 0.1)"
    ));
    let output = following.rhei.clone().env("RHEI_SYNC_TRUST_WIDENING", "true").run_ok(["sync"]);
    assert!(!output.stderr.contains("copied"), "{}", output.stderr);
    following.assert_same(&["public.t"]);
}

/// A stop at any moment of a schema change: the next start goes on from the checkpoint.
#[test]
fn a_kill_during_schema_changes_loses_nothing() {
    let following = Following::new("killed_ddl");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT i, i FROM \
         generate_series(1, 2000) i",
    );
    following.sync();
    for round in 0..8 {
        let running = following.run();
        let column = format!("c{round}");
        following.db.execute(&format!(
            "ALTER TABLE t ADD {column} int DEFAULT {round}; UPDATE t SET v = v + 1 WHERE id % 7 = \
             {};
             BEGIN; INSERT INTO t (id, v) VALUES ({}, 0); ALTER TABLE t RENAME {column} TO \
             d{round}; DELETE FROM t WHERE id = {}; COMMIT",
            round % 7,
            10_000 + round,
            round + 1
        ));
        if round % 3 == 2 {
            following.db.execute(&format!("ALTER TABLE t ALTER d{round} TYPE bigint"));
        }
        let wanted = following.db.wal_lsn();
        if round % 2 == 0 {
            // Somewhere in the middle of it.
            running.kill9();
        } else {
            let slot = following.slot().to_owned();
            wait_until(SOON, "the slot passes the change", || {
                following.db.value(&format!(
                    "SELECT confirmed_flush_lsn >= '{wanted}'::pg_lsn - 4096 FROM \
                     pg_replication_slots WHERE slot_name = '{slot}'"
                )) == "t"
            });
            running.kill9();
        }
    }
    following.sync();
    following.assert_same(&["public.t"]);
}

/// DuckDB's log holds the statements of a schema change, not what they did to rows, and a crash
/// replays them.
#[test]
fn what_older_rows_have_in_a_new_column_outlives_a_kill() {
    let following = Following::new("killed_default");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 100)",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    // A lake takes no such defaults for older rows.
    let nested = match Kind::of_all_tests() {
        None => ", ADD j jsonb DEFAULT '{\"a\": [1, null]}', ADD l text[] DEFAULT '{\"a,b\",NULL}'",
        Some(_) => "",
    };
    following.db.execute(&format!(
        "ALTER TABLE t ADD n int DEFAULT 7, ADD v text DEFAULT 'it''s', ADD w timestamptz DEFAULT \
         '2024-03-31 01:30+02', ADD f float8 DEFAULT 0.1, ADD b bytea DEFAULT '\\x00ff', ADD i \
         interval DEFAULT '1 month -3 days', ADD g numeric(30,5) DEFAULT -0.00001{nested};
         INSERT INTO t (id) VALUES (101); DELETE FROM t WHERE id = 1"
    ));
    let (slot, wanted) = (following.slot(), following.db.wal_lsn());
    wait_until(SOON, "the slot passes the change", || {
        following.db.value(&format!(
            "SELECT confirmed_flush_lsn >= '{wanted}'::pg_lsn FROM pg_replication_slots WHERE \
             slot_name = '{slot}'"
        )) == "t"
    });
    let ended = running.kill9();
    assert!(ended.stderr.contains("another shape"), "not followed in place:\n{}", ended.stderr);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Trap 64: with the trigger the stream says itself which column is which, so changes that the
/// catalogs no longer show are followed in place.
#[test]
fn with_the_event_trigger_changes_in_a_row_are_followed_in_place() {
    let changes = [
        "ALTER TABLE t ADD b text DEFAULT 'b'; INSERT INTO t VALUES (3, 3, 'three')",
        "ALTER TABLE t RENAME b TO c; UPDATE t SET c = 'x' WHERE id = 1",
        "ALTER TABLE t DROP c; ALTER TABLE t ADD c text; INSERT INTO t VALUES (4, 4, 'four')",
        "ALTER TABLE t DROP c; ALTER TABLE t ADD d int DEFAULT 5; DELETE FROM t WHERE id = 2",
        "ALTER TABLE tree ADD v text DEFAULT 'v'; UPDATE tree SET v = 'w' WHERE id = 1; ALTER \
         TABLE tree RENAME v TO w; UPDATE tree SET w = 'y' WHERE id = 2",
    ];
    for with_trigger in [true, false] {
        let following = Following::new("ddl_trigger");
        following.db.execute(
            "CREATE TABLE t (id int PRIMARY KEY, a int); INSERT INTO t VALUES (1, 1), (2, 2);
             CREATE TABLE tree (id int PRIMARY KEY) PARTITION BY RANGE (id);
             CREATE TABLE leaf PARTITION OF tree FOR VALUES FROM (0) TO (10); INSERT INTO tree \
             VALUES (1), (2), (3)",
        );
        if with_trigger {
            let checked = following.rhei.run_ok(["check", "--install-ddl-trigger"]);
            assert!(checked.stdout.contains("rhei_ddl describes"), "{}", checked.stdout);
        }
        following.sync();
        for change in changes {
            following.db.execute(change);
        }
        // Rolled back, and somebody else's: neither is a description.
        following.db.execute(
            "BEGIN; ALTER TABLE t ADD never int; ROLLBACK;
             SELECT pg_logical_emit_message(true, 'rhei.ddl', 'nonsense'), \
             pg_logical_emit_message(true, 'other', 'x')",
        );
        let output = following.sync();
        assert_eq!(
            output.stderr.contains("copying the table again"),
            !with_trigger,
            "{}",
            output.stderr
        );
        following.assert_same(&["public.t", "public.tree"]);
    }
}

/// A pause is lifted by a copy only: no look at the catalogs makes the table look live.
#[test]
fn a_paused_table_stays_paused_whatever_becomes_of_its_shape() {
    let following = Following::new("paused_shape");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric(5,2), v text); CREATE TABLE other (id int \
         PRIMARY KEY)",
    );
    following.sync();
    let state =
        || query_copy(following.copy(), "SELECT state FROM _rhei.tables WHERE source_name = 't'");
    let mut running =
        following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "50ms").spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    following.db.execute("INSERT INTO t VALUES (7, 'NaN', 'x')");
    following
        .db
        .execute("ALTER TABLE t ALTER v SET STORAGE EXTERNAL; ALTER TABLE t ALTER v SET NOT NULL");
    following.db.execute(
        "ALTER TABLE t ADD more int; INSERT INTO t VALUES (8, 1, 'y', 2); INSERT INTO \
                  other VALUES (1)",
    );
    let slot = following.slot().to_owned();
    let end = following.db.wal_lsn();
    wait_until(SOON, "the slot passes all of it", || {
        following.db.execute("SELECT pg_logical_emit_message(false, 'rhei.test', 'go on')");
        following.db.value(&format!(
            "SELECT confirmed_flush_lsn >= '{end}'::pg_lsn FROM pg_replication_slots WHERE \
             slot_name = '{slot}'"
        )) == "t"
    });
    running.stop(SOON).assert_code(0);
    assert_eq!(state(), [[Some("error".to_owned())]]);
    following.rhei.run(["sync"]).assert_code(1);
    assert_eq!(state(), [[Some("error".to_owned())]]);
    following.assert_same(&["public.other"]);
    following.db.execute("DELETE FROM t WHERE id = 7");
    following.rhei.run_ok(["resync", "public.t"]);
    following.sync();
    following.assert_same(&["public.t", "public.other"]);
}

/// A key that comes under REPLICA IDENTITY FULL is adopted by a look, and the server does not
/// describe the table again.
#[test]
fn a_key_that_comes_under_replica_identity_full_is_used_from_the_look_on() {
    let following = Following::new("late_key");
    following.db.execute(
        "CREATE TABLE t (id int NOT NULL, v text); ALTER TABLE t REPLICA IDENTITY FULL;
         INSERT INTO t SELECT i, 'v' FROM generate_series(1, 20) i",
    );
    let mut running =
        following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "50ms").spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    let mark = running.log_mark();
    following.db.execute("ALTER TABLE t ADD PRIMARY KEY (id); INSERT INTO t VALUES (100, 'first')");
    running.wait_for_log_after(mark, "the table has another shape", SOON);
    for id in 101..120 {
        following.db.execute(&format!(
            "INSERT INTO t VALUES ({id}, 'more'); UPDATE t SET v = 'u' WHERE id = {} - 100",
            id
        ));
    }
    following.db.execute("TRUNCATE t; INSERT INTO t VALUES (1, 'last'); UPDATE t SET id = 2");
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Changes of a leaf while it was detached are nowhere in the stream.
#[test]
fn a_leaf_that_was_detached_and_attached_again_is_noticed() {
    let following = Following::new("reattached");
    following.db.execute(
        "CREATE TABLE tree (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF tree FOR VALUES FROM (0) TO (10); INSERT INTO tree VALUES \
         (1, 'one'), (2, 'two')",
    );
    following.sync();
    following.db.execute(
        "ALTER TABLE tree DETACH PARTITION leaf; UPDATE leaf SET v = 'silent' \
                          WHERE id = 1; DELETE FROM leaf WHERE id = 2",
    );
    following.db.execute("ALTER TABLE tree ATTACH PARTITION leaf FOR VALUES FROM (0) TO (10)");
    following.sync();
    following.assert_same(&["public.tree"]);
}

/// Whatever the column's older rows hold concerns its table only.
#[test]
fn a_default_that_duckdb_cannot_hold_pauses_its_table_and_no_other() {
    let following = Following::new("bad_default");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY); INSERT INTO \
         t VALUES (1)",
    );
    following.sync();
    following.db.execute(
        "ALTER TABLE t ADD n numeric(5,2) DEFAULT 'NaN'; INSERT INTO t VALUES (2, 1); INSERT INTO \
         other VALUES (1)",
    );
    let output = following.rhei.run(["sync"]);
    output.assert_code(1);
    assert!(
        output.stderr.contains("public.t") && output.stderr.contains("NaN"),
        "{}",
        output.stderr
    );
    following.assert_same(&["public.other"]);
    following.rhei.clone().env("RHEI_SYNC_ON_UNREPRESENTABLE", "null").run_ok(["sync"]);
    let rows = query_copy(following.copy(), "SELECT n::VARCHAR FROM public.t ORDER BY id");
    assert_eq!(rows, [[None], [Some("1.00".to_owned())]]);
}

/// DuckDB takes `"T"` and `t` for one name; the copy that is only kept gives way.
#[test]
fn a_table_may_take_the_name_of_a_dropped_one_that_differs_by_case() {
    let following = Following::new("kept_case");
    following.db.execute(
        "CREATE TABLE \"T\" (id int PRIMARY KEY); INSERT INTO \"T\" VALUES (1); CREATE PUBLICATION \
         rhei FOR ALL TABLES",
    );
    following.sync();
    following.db.execute(
        "DROP TABLE \"T\"; CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t \
                  VALUES (1, 'new')",
    );
    following.sync();
    following.assert_same(&["public.t"]);
}
