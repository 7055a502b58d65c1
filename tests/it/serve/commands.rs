//! `rhei query`, `rhei wait` and `rhei serve`.

use std::time::Duration;

use super::{SOON, Served, code};
use crate::{
    bed::{Session, wait_until},
    following::Following,
};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'one'), (2, 'a \
                     \"b\", c')";

/// Whatever a script has committed is in what it reads after `wait --now`.
#[test]
fn a_script_reads_its_own_writes() {
    let served = Served::new("serve_wait", TABLE, "");
    for number in 3..15 {
        served.following.db.execute(&format!("INSERT INTO t VALUES ({number}, 'new')"));
        let sql = format!("SELECT count(*) AS n FROM t WHERE id = {number}");
        let arguments = ["query", "--at-least", "now", "--format", "csv", &sql];
        assert_eq!(served.following.rhei.run_ok(arguments).stdout, "n\n1\n");
    }
    let reached = served.following.rhei.run_ok(["wait", "--now"]).stdout;
    let lsn = reached.trim();
    assert!(lsn.contains('/'), "{reached}");
    served.following.rhei.run_ok(["wait", "--lsn", lsn]);

    let late = served.following.rhei.run(["wait", "--lsn", "FFFF/0", "--timeout", "1s"]);
    late.assert_code(1);
    assert!(late.stderr.contains("has not reached FFFF/0"), "{}", late.stderr);
    served.stop();
}

#[test]
fn query_prints_tables_csv_and_json_with_and_without_a_replicator() {
    let served = Served::new("serve_query", TABLE, "");
    let rhei = served.following.rhei.clone();
    let check = || {
        let sql = "SELECT * FROM t ORDER BY id";
        let csv = rhei.run_ok(["query", "--format", "csv", sql]).stdout;
        assert_eq!(csv, "id,v\n1,one\n2,\"a \"\"b\"\", c\"\n");
        let json = rhei.run_ok(["query", "--format", "json", "SELECT *, [id] AS l FROM t;"]).stdout;
        let rows: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(rows[1], serde_json::json!({"id": 2, "v": "a \"b\", c", "l": [2]}));
        let table = rhei.run_ok(["query", sql]).stdout;
        assert!(table.contains(" id ") && table.contains("one"), "{table}");
        assert_eq!(rhei.run_ok(["query", "--format", "json", "FROM t LIMIT 0"]).stdout, "[]\n");

        let refused = rhei.run(["query", "DELETE FROM t"]);
        refused.assert_code(1);
        assert!(refused.stderr.contains("read-only"), "{}", refused.stderr);
    };
    check();
    let Served { following, running, .. } = served;
    running.stop(SOON).assert_code(0);
    check();

    let late = following.rhei.run(["wait", "--lsn", "FFFF/0"]);
    late.assert_code(1);
    assert!(late.stderr.contains("no replicator runs"), "{}", late.stderr);
}

/// Without [serve] nobody can be let in: the command says what to set.
#[test]
fn query_of_a_replicator_that_serves_nobody_says_what_to_set() {
    let following = Following::new("serve_none");
    following.db.execute(TABLE);
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let refused = following.rhei.run(["query", "SELECT 1"]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("hint: set [serve] listen"), "{}", refused.stderr);
    running.stop(SOON).assert_code(0);
}

#[test]
fn serve_lets_readers_into_a_file_that_no_replicator_holds() {
    let served = Served::new("serve_alone", TABLE, "");
    let (config, folder) = (served.config(), served.folder.clone());
    let Served { following, running, .. } = served;
    running.stop(SOON).assert_code(0);
    assert!(
        folder
            .read_dir()
            .unwrap()
            .all(|file| { !file.unwrap().file_name().to_string_lossy().starts_with(".s.PGSQL") })
    );

    let mut serving = following.rhei.spawn(["serve"]);
    serving.wait_for_log("readers can connect", SOON);
    let (one, two) = (Session::open(&config).unwrap(), Session::open(&config).unwrap());
    assert_eq!(one.value("SELECT count(*) FROM t"), "2");
    assert_eq!(two.value("SELECT state FROM _rhei.tables"), "live");
    assert_eq!(code(&one.try_query("DROP TABLE t").unwrap_err()), "25006");

    // A query beside it is another reader of the file.
    let csv = following.rhei.run_ok(["query", "--format", "csv", "SELECT count(*) AS n FROM t"]);
    assert_eq!(csv.stdout, "n\n2\n");
    serving.stop(SOON).assert_code(0);
    wait_until(Duration::from_secs(10), "the session has ended", || {
        one.try_query("SELECT 1").is_err()
    });
}
