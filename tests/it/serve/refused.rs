//! Readers can only read.

use super::{SOON, Served, code};
use crate::bed::{oracle::query_copy, wait_until};

/// A statement of the list, and whether it may also succeed because it does nothing.
fn statements() -> Vec<&'static str> {
    let list = include_str!("../../../fixtures/hostile.sql");
    list.lines().filter(|line| !line.starts_with("--") && !line.is_empty()).collect()
}

#[test]
fn hostile_statements_are_refused_or_end_and_the_replicator_goes_on() {
    let served = Served::new(
        "serve_hostile",
        "CREATE TABLE kept (id int PRIMARY KEY, v text); INSERT INTO kept VALUES (1, 'one')",
        "statement_timeout = \"2s\"\nmax_statements = 4",
    );
    let all = statements();
    assert!(all.len() > 150, "{}", all.len());

    let chunks: Vec<&[&str]> = all.chunks(all.len().div_ceil(3)).collect();
    std::thread::scope(|scope| {
        for chunk in chunks {
            let served = &served;
            scope.spawn(move || {
                let session = served.session();
                for statement in chunk {
                    let failed = session.try_query(statement);
                    let error = failed.expect_err(statement);
                    assert!(code(&error).len() == 5, "{statement}: {error}");
                    assert!(!code(&error).starts_with("XX"), "{statement}: {error}");
                    let _ = session.try_query("ROLLBACK");
                    assert_eq!(session.value("SELECT count(*) FROM kept"), "1", "{statement}");
                }
            });
        }
    });

    served.following.db.execute("INSERT INTO kept VALUES (2, 'two')");
    let session = served.session();
    wait_until(SOON, "the replicator goes on", || {
        session.value("SELECT count(*) FROM kept") == "2"
    });
    let copy = served.following.copy().to_owned();
    drop(session);
    let Served { following, running, .. } = served;
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.kept"]);

    let tables = query_copy(
        &copy,
        "SELECT schema_name || '.' || table_name FROM duckdb_tables() WHERE database_name = \
         'copied' AND schema_name <> '_rhei' ORDER BY 1",
    );
    assert_eq!(tables, [[Some("public.kept".to_owned())]]);
}

/// A bug that is known of DuckDB 1.5.5 (its issue 21890): planning the statement fails.
#[test]
fn a_bug_of_duckdb_in_planning_is_an_error_of_its_statement_alone() {
    let served = Served::new(
        "serve_plan_bug",
        "CREATE TABLE kept (id int PRIMARY KEY); INSERT INTO kept VALUES (1)",
        "",
    );
    let session = served.session();
    let error = session
        .try_query(
            "SELECT id FROM kept GROUP BY id HAVING (SELECT count(*) FROM kept k WHERE TRY(kept.id \
             + kept.id) > 0) > 0",
        )
        .unwrap_err();
    assert_eq!(code(&error), "XX000", "{error}");
    assert!(!error.contains("Stack Trace"), "{error}");
    served.following.db.execute("INSERT INTO kept VALUES (2)");
    wait_until(SOON, "the replicator goes on", || {
        session.value("SELECT count(*) FROM kept") == "2"
    });
    served.stop();
}

/// Whatever a client writes, also deep inside of itself, gets an error or a result.
#[test]
fn statements_that_nest_deeply_or_are_long_get_an_answer() {
    let served = Served::new("serve_deep", "CREATE TABLE t (id int PRIMARY KEY)", "");
    let session = served.session();
    for statement in [
        format!("SELECT {}1{}", "(".repeat(5000), ")".repeat(5000)),
        format!("SELECT {}1", "-".repeat(5001).replace("--", "- -")),
        format!("SELECT {}1{}", "[".repeat(500), "]".repeat(500)),
        format!("SELECT 1{}", " + 1".repeat(20_000)),
        format!("SELECT '{}'", "x".repeat(2_000_000)),
        format!("SELECT {} FROM t", vec!["id"; 5000].join(", ")),
        format!("SELECT * FROM {}t{}", "(SELECT * FROM ".repeat(300), ")".repeat(300)),
    ] {
        let _ = session.try_query(&statement);
        assert_eq!(session.value("SELECT 1"), "1", "{}", &statement[..40]);
    }
    served.stop();
}
