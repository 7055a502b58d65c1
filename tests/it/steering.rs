//! A replicator that runs is steered: its settings are read again, and its log changes.

use std::{fs, time::Duration};

use crate::{
    bed::{Running, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

fn settings(following: &Following, more: &str) -> String {
    format!(
        "[source]\nslot = \"{}\"\npublication = \"all\"\n{more}\n[sync]\ninterval = \"50ms\"\n",
        following.slot()
    )
}

fn started(name: &str, more: &str) -> (Following, Running) {
    let following = Following::new(name);
    following.db.execute(
        "CREATE TABLE one (id int PRIMARY KEY); CREATE TABLE two (id int PRIMARY KEY); INSERT INTO \
         one VALUES (1); INSERT INTO two VALUES (1); CREATE PUBLICATION \"all\" FOR ALL TABLES",
    );
    let settings = settings(&following, more);
    let rhei = following.rhei.clone().config(&settings);
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    (following, running)
}

#[test]
fn settings_that_are_read_again_take_effect_while_the_run_goes_on() {
    let (following, mut running) = started("reload", "tables = [\"public.one\"]");
    let unchanged = following.rhei.run_ok(["reload"]).stdout;
    assert!(unchanged.contains("the settings are as they were"), "{unchanged}");

    // A table more, and a place that a run cannot change.
    let more = "tables = [\"public.*\"]\n[serve]\nlisten = \"127.0.0.1:1\"";
    let rhei = following.rhei.clone().config(&settings(&following, more));
    let said = rhei.run_ok(["reload"]).stdout;
    assert!(said.contains("changed: source.tables"), "{said}");
    assert!(said.contains("takes effect at the next start: serve.listen"), "{said}");

    running.wait_for_log("live table=\"public.two\"", SOON);
    following.db.execute("INSERT INTO one VALUES (2); INSERT INTO two VALUES (2)");
    following.wait_settled(&mut running);

    // What is refused changes nothing.
    fs::write(following.folder.path().join("rhei.toml"), "[sync]\nintervall = \"1s\"\n").unwrap();
    let refused = rhei.run(["--config", "/dev/null", "reload"]);
    let refused = refused.assert_code(1);
    assert!(refused.stderr.contains("intervall"), "{}", refused.stderr);
    following.db.execute("INSERT INTO two VALUES (3)");
    following.wait_settled(&mut running);

    // The signal does the same, and nobody's copy is made again.
    rhei.clone().config(&settings(&following, "exclude = [\"public.two\"]"));
    running.signal("HUP");
    running.wait_for_log("changed=\"source.exclude, source.tables\"", SOON);
    running.wait_for_log("no longer published; its copy is kept", SOON);
    following.db.execute("INSERT INTO one VALUES (3)");
    following.wait_settled(&mut running);

    let output = running.stop(SOON);
    output.assert_code(0);
    following.assert_same(&["public.one", "public.two"]);
    assert_eq!(output.stderr.matches("copied table=\"public.one\"").count(), 1);
}

#[test]
fn the_log_of_a_run_changes_on_request() {
    let (following, mut running) = started("log_filter", "");
    let refused = following.rhei.run(["log", "rhei=[[["]);
    assert!(refused.assert_code(1).stderr.contains("is no filter"), "{}", refused.stderr);

    following.rhei.run_ok(["log", "debug"]);
    running.wait_for_log("the log has another filter", SOON);
    following.db.execute("INSERT INTO one VALUES (2)");
    running.wait_for_log(" DEBUG ", SOON);

    following.rhei.run_ok(["log", "error"]);
    running.stop(SOON).assert_code(0);
    let refused = following.rhei.run(["log", "info"]);
    assert!(refused.assert_code(1).stderr.contains("no replicator runs"), "{}", refused.stderr);
}

/// A reload in the middle of a copy loses nothing of it.
#[test]
fn a_reload_in_the_middle_of_copies_and_changes_loses_nothing() {
    let following = Following::new("reload_storm");
    following.db.execute(
        "CREATE TABLE big (id int PRIMARY KEY, v text); INSERT INTO big SELECT i, repeat('x', 300) \
         FROM generate_series(1, 100000) i; CREATE TABLE n (id int PRIMARY KEY)",
    );
    let settings = |interval: u32| {
        format!(
            "[source]\nslot = \"{}\"\n[sync]\ninterval = \"{interval}ms\"\n[backfill]\nchunk_size \
             = \"1MB\"\nrate_limit = \"8MB\"\n",
            following.slot()
        )
    };
    let rhei = following.rhei.clone().config(&settings(50));
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("copying tables under one snapshot", SOON);

    for round in 1..6 {
        following.db.execute(&format!(
            "INSERT INTO n VALUES ({round}); UPDATE big SET v = 'r{round}' WHERE id % 5 = {round}"
        ));
        rhei.clone().config(&settings(50 + round));
        rhei.run_ok(["reload"]);
        let read = format!("{round} times");
        wait_until(SOON, &read, || {
            running.logs().matches("the settings were read again").count() >= round as usize
        });
    }

    following.wait_settled(&mut running);
    let output = running.stop(SOON);
    output.assert_code(0);
    following.assert_same(&["public.big", "public.n"]);

    // The copy went on each time, and was made once.
    for table in ["big", "n"] {
        let copied = format!("copied table=\"public.{table}\"");
        assert_eq!(output.stderr.matches(&copied).count(), 1, "{table}: {}", output.stderr);
    }
}
