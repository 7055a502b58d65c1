//! What rhei makes at the source by itself, and what it leaves alone: new tables that join its
//! publication, tables without columns, names that differ by case, and `rhei drop`.

use std::time::Duration;

use crate::{bed::oracle::query_copy, following::Following};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn a_new_table_joins_the_publication_that_rhei_made_and_is_copied_and_followed() {
    let following = Following::new("new_tables_join");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let settings = format!(
        "[source]\nslot = \"{}\"\ntables = [\"public.*\"]\nexclude = [\"public.*_old\"]\n[sync]\n\
         interval = \
         \"50ms\"\ncatalog_interval = \"200ms\"\n",
        following.slot()
    );
    let rhei = following.rhei.clone().config(&settings);
    rhei.run_ok(["sync"]);

    // A sync finds what came since the last one.
    following.db.execute("CREATE TABLE one (id int PRIMARY KEY); INSERT INTO one VALUES (1)");
    rhei.run_ok(["sync"]);
    following.assert_same(&["public.t", "public.one"]);

    // A run finds it while it follows, also a partition tree, and leaves out what the settings do.
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    following.db.execute(
        "CREATE TABLE two (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         CREATE TABLE two_1 PARTITION OF two FOR VALUES FROM (0) TO (100);
         INSERT INTO two VALUES (1, 'a'); CREATE TABLE two_old (id int PRIMARY KEY)",
    );
    running.wait_for_log("new tables were added to the publication", SOON);
    running.wait_for_log("live table=\"public.two\"", SOON);
    let mark = running.log_mark();
    following.db.execute("UPDATE two SET v = 'b'; INSERT INTO two VALUES (2, 'c')");
    following.wait_settled(&mut running);
    running.assert_no_copies_since(mark);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t", "public.one", "public.two"]);

    let published = following
        .db
        .value("SELECT string_agg(tablename, ',' ORDER BY tablename) FROM pg_publication_tables");
    assert_eq!(published, "one,t,two");
}

#[test]
fn a_new_table_that_rhei_does_not_add_is_named_once_with_the_sql_that_publishes_it() {
    let following = Following::new("new_tables_warned");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let settings = |add: &str| {
        format!(
            "[source]\nslot = \"{}\"\nadd_tables = \"{add}\"\n[sync]\ninterval = \
             \"50ms\"\ncatalog_interval = \"100ms\"\n",
            following.slot()
        )
    };
    let rhei = following.rhei.clone().config(&settings("auto"));
    rhei.run_ok(["sync"]);

    // Publishing a table without a key would take UPDATE and DELETE from the application.
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    following.db.execute("CREATE TABLE log (line text); INSERT INTO log VALUES ('x')");
    let named = "the settings choose a table that is not published";
    running.wait_for_log(named, SOON);
    following.db.execute("UPDATE log SET line = 'y'; CREATE TABLE later (id int PRIMARY KEY)");
    running.wait_for_log("live table=\"public.later\"", SOON);
    let status = rhei.status().unwrap();
    let sql = status["not_published"]["public.log"].as_str().unwrap().to_owned();
    assert_eq!(sql, "ALTER PUBLICATION \"rhei\" ADD TABLE \"public\".\"log\"");
    let output = running.stop(SOON);
    output.assert_code(0);
    assert_eq!(output.stderr.matches(named).count(), 1, "{}", output.stderr);

    // With a key it joins by itself.
    following.db.execute("ALTER TABLE log ADD PRIMARY KEY (line)");
    rhei.run_ok(["sync"]);
    following.assert_same(&["public.t", "public.log", "public.later"]);

    let rhei = rhei.config(&settings("warn"));
    following.db.execute("CREATE TABLE last (id int PRIMARY KEY)");
    let synced = rhei.run_ok(["sync"]);
    assert!(synced.stderr.contains("table=\"public.last\""), "{}", synced.stderr);
    let count = "SELECT count(*) FROM pg_publication_tables WHERE tablename = 'last'";
    assert_eq!(following.db.value(count), "0");
}

/// A table without columns has no rows that could differ.
#[test]
fn a_table_without_columns_is_skipped_and_copied_when_it_has_some() {
    let following = Following::new("no_columns");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE e (); CREATE PUBLICATION rhei FOR ALL \
         TABLES",
    );
    let rhei = following.rhei.clone().config(&format!(
        "[source]\nslot = \"{}\"\n[sync]\ninterval = \"50ms\"\ncatalog_interval = \"200ms\"\n",
        following.slot()
    ));
    let synced = rhei.run_ok(["sync"]);
    assert!(synced.stderr.contains("no column that is published"), "{}", synced.stderr);

    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    following.db.execute("INSERT INTO e DEFAULT VALUES; INSERT INTO t VALUES (1)");
    following.wait_settled(&mut running);
    following.db.execute("ALTER TABLE e ADD COLUMN id int PRIMARY KEY DEFAULT 7");
    running.wait_for_log("live table=\"public.e\"", SOON);
    let mark = running.log_mark();
    following.db.execute("INSERT INTO e VALUES (8)");
    following.wait_settled(&mut running);
    running.assert_no_copies_since(mark);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t", "public.e"]);
}

#[test]
fn of_names_that_differ_by_case_the_one_in_lower_case_is_kept_and_the_others_are_shown() {
    let following = Following::new("names_by_case");
    following.db.execute(
        "CREATE SCHEMA \"Public\"; CREATE TABLE \"Public\".t (id int PRIMARY KEY, \"V\" int, v \
         int); CREATE TABLE public.t (id int PRIMARY KEY, v text); INSERT INTO public.t VALUES (1, \
         'lower'); INSERT INTO \"Public\".t VALUES (1, 2, 3)",
    );
    let synced = following.sync();
    let names = "names=\"the table is Public.t_2, column \\\"V\\\" is \\\"V_2\\\"\"";
    assert!(synced.stderr.contains(names), "{}", synced.stderr);

    let rows = query_copy(following.copy(), "SELECT v FROM public.t");
    assert_eq!(format!("{rows:?}"), "[[Some(\"lower\")]]");
    let rows = query_copy(following.copy(), "SELECT v::VARCHAR, \"V_2\"::VARCHAR FROM public.t_2");
    assert_eq!(format!("{rows:?}"), "[[Some(\"3\"), Some(\"2\")]]");

    let status = following.rhei.run_ok(["status"]).stdout;
    assert!(status.contains("called Public.t_2 in DuckDB"), "{status}");
    assert!(following.rhei.run_ok(["check"]).stdout.contains("the table is Public.t_2"));
}

#[test]
fn drop_removes_what_rhei_made_and_nothing_else_after_it_was_shown() {
    let following = Following::new("dropping");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY)");
    following.sync();
    let left = || {
        following.db.value(&format!(
            "SELECT (SELECT count(*) FROM pg_publication) || ' ' || (SELECT count(*) FROM \
             pg_replication_slots WHERE slot_name = '{}')",
            following.slot()
        ))
    };

    let shown = following.rhei.run_ok(["drop"]).stdout;
    assert!(
        shown.contains("DROP PUBLICATION \"rhei\"") && shown.contains("nothing was done"),
        "{shown}"
    );
    assert_eq!(left(), "1 1");

    // Without the file nothing proves whose the slot is.
    let stranger = following.rhei.clone().target("other.duckdb");
    assert!(stranger.run_ok(["drop"]).stdout.contains("stays: no file proves"), "{shown}");

    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let refused = following.rhei.run(["drop", "--yes"]);
    assert!(refused.assert_code(1).stderr.contains("is in use"), "{}", refused.stderr);
    running.stop(SOON).assert_code(0);

    following.rhei.run_ok(["drop", "--yes"]);
    assert_eq!(left(), "0 0");
    assert!(following.rhei.run_ok(["drop"]).stdout.contains("nothing to drop"));

    // A publication that others made stays.
    following.db.execute("CREATE PUBLICATION rhei FOR TABLE t");
    following.rhei.run_ok(["backfill", "--force"]);
    let done = following.rhei.run_ok(["drop", "--yes"]).stdout;
    assert!(done.contains("publication rhei stays"), "{done}");
    assert_eq!(left(), "1 0");
}
