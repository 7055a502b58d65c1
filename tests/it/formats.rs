//! Files that an older rhei wrote: they are brought to the format of this one, and go on.

use std::{path::Path, time::Duration};

use duckdb::Connection;

use crate::{bed::oracle::query_copy, following::Following};

const SOON: Duration = Duration::from_secs(60);

/// The state of a file as the last rhei of format 3 wrote it.
const FORMAT_3: &str = include_str!("../../fixtures/state/format_3.sql");

/// The columns of `_rhei`, in order, with their types.
fn layout(connection: &Connection) -> Vec<String> {
    let mut statement = connection
        .prepare(
            "SELECT concat_ws(' ', table_name, column_index, column_name, data_type, is_nullable, \
             column_default) FROM duckdb_columns() WHERE schema_name = '_rhei' AND NOT \
             starts_with(table_name, 'pending_') ORDER BY table_name, column_index",
        )
        .unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

/// Takes from a file what the formats after 3 added to it.
fn write_as_format_3(copy: &Path) {
    let file = Connection::open(copy).unwrap();
    file.execute_batch("DROP TABLE _rhei.verifications; DROP TABLE _rhei.repairs").unwrap();
    for (table, column) in [
        ("tables", "remedy"),
        ("tables", "copy_xids"),
        ("tables", "truncated_by"),
        ("tables", "pipeline_id"),
        ("pipeline", "pipeline_id"),
        ("pipeline", "writer"),
        ("pipeline", "attempt"),
        ("columns", "pipeline_id"),
        ("cycles", "pipeline_id"),
        ("jobs", "pipeline_id"),
    ] {
        file.execute_batch(&format!("ALTER TABLE _rhei.{table} DROP COLUMN {column}")).unwrap();
    }
    file.execute_batch("UPDATE _rhei.pipeline SET format_version = 3, rhei_version = '0.0.3'")
        .unwrap();

    let old = Connection::open_in_memory().unwrap();
    old.execute_batch(FORMAT_3).unwrap();
    assert_eq!(layout(&file), layout(&old), "the file is not as format 3 was");
}

fn format_of(copy: &Path) -> Option<String> {
    query_copy(copy, "SELECT format_version::VARCHAR FROM _rhei.pipeline")[0][0].clone()
}

/// A copy of two tables, in format 3, that changes at the source wait for.
fn in_format_3(name: &str) -> Following {
    let following = Following::new(name);
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM \
         generate_series(1, 100) i; CREATE TABLE other (a numeric(8, 2)[], b timestamptz); INSERT \
         INTO other VALUES ('{1.5}', now())",
    );
    following.sync();
    write_as_format_3(following.copy());
    following.db.execute(
        "UPDATE t SET v = 'changed' WHERE id < 10; DELETE FROM t WHERE id > 90; INSERT INTO other \
         VALUES (NULL, NULL)",
    );
    following
}

#[test]
fn a_file_of_format_3_goes_on_in_a_run_without_another_copy() {
    let following = in_format_3("format_3_run");

    let mut running = following.run();
    running.wait_for_log("brought to the format of this rhei", SOON);
    following.wait_settled(&mut running);
    assert_eq!(running.copies(), Vec::<String>::new());
    running.stop(SOON).assert_code(0);

    following.assert_same(&["public.t", "public.other"]);
    assert_ne!(format_of(following.copy()).as_deref(), Some("3"));
}

#[test]
fn a_kill_in_the_middle_of_a_migration_leaves_the_old_format() {
    let following = in_format_3("format_3_killed");

    let killed = following.rhei.clone().env("FAILPOINTS", "migration.written=return").run(["sync"]);
    assert_eq!(killed.code(), None, "{}", killed.stderr);
    assert_eq!(format_of(following.copy()).as_deref(), Some("3"));

    let synced = following.sync();
    assert_eq!(synced.copies(), Vec::<String>::new());
    following.assert_same(&["public.t", "public.other"]);
}

#[test]
fn a_reader_of_an_older_file_says_what_brings_it_to_the_new_format() {
    let following = in_format_3("format_3_status");
    for command in ["status", "jobs"] {
        let output = following.rhei.run([command]);
        output.assert_code(1);
        assert!(
            output.stderr.contains("in format 3") && output.stderr.contains("`rhei sync`"),
            "{command}: {}",
            output.stderr
        );
    }
    assert_eq!(format_of(following.copy()).as_deref(), Some("3"));
}

#[test]
fn a_file_of_a_newer_format_is_refused_and_left_as_it_is() {
    let following = in_format_3("format_newer");
    let file = Connection::open(following.copy()).unwrap();
    file.execute_batch("UPDATE _rhei.pipeline SET format_version = 1000").unwrap();
    let before = layout(&file);
    drop(file);

    let refused = following.rhei.run(["sync"]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("in format 1000"), "{}", refused.stderr);
    assert_eq!(layout(&Connection::open(following.copy()).unwrap()), before);
}
