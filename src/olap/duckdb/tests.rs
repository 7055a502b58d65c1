use super::*;

fn new_file() -> (tempfile::TempDir, TargetOptions) {
    let folder = tempfile::tempdir().unwrap();
    let options =
        TargetOptions { path: folder.path().join("copy.duckdb"), ..TargetOptions::default() };
    (folder, options)
}

fn run(target: &mut DuckDb, sql: &str) -> Result<(), TargetError> {
    target.transaction(|target| Ok(target.connection.execute_batch(sql)?))
}

/// The rows of a commit that has failed are marked as deleted where they would have been
/// (docs/traps.md), so this DuckDB must not write them down.
#[test]
fn after_a_failed_commit_the_file_is_opened_again_and_no_later_row_is_lost() {
    let (_folder, options) = new_file();
    let count = |target: &DuckDb| -> u32 {
        target.connection.query_row("SELECT count(*) FROM a", [], |row| row.get(0)).unwrap()
    };

    let mut target = DuckDb::open(&options).unwrap();
    run(&mut target, "CREATE TABLE a AS FROM range(45) r(n); CREATE TABLE x AS FROM a").unwrap();
    run(&mut target, "DELETE FROM a WHERE n % 3 = 0").unwrap();

    let (other, loader) = (target.new_connection().unwrap(), target.new_connection().unwrap());
    let refused = target.transaction(|target| {
        target
            .connection
            .execute_batch("INSERT INTO a FROM range(9); DELETE FROM x WHERE n < 3")?;
        Ok(other.execute_batch("ALTER TABLE x ADD COLUMN m INT")?)
    });
    assert!(matches!(refused, Err(TargetError::CommitFailed(_))), "{refused:?}");

    // Until then no connection commits, and nothing is written into the file.
    other.execute_batch("BEGIN; INSERT INTO a VALUES (1)").unwrap();
    for refused in [
        other.commit(),
        loader.autocommit("INSERT INTO a VALUES (1)"),
        run(&mut target, "INSERT INTO a VALUES (1)"),
        target.connection.checkpoint(),
    ] {
        assert!(matches!(refused, Err(TargetError::CommitFailed(_))), "{refused:?}");
    }
    drop((other, loader));
    assert_eq!(count(&target), 30);

    target.reopen().unwrap();
    run(
        &mut target,
        "ALTER TABLE a ADD COLUMN m INT; INSERT INTO a (n) SELECT 100 + n FROM range(30) r(n)",
    )
    .unwrap();
    assert_eq!(count(&target), 60);
    drop(target);
    assert!(!compact::sibling(&options.path, ".wal").exists());
    assert_eq!(count(&DuckDb::open(&options).unwrap()), 60);
}

#[test]
fn a_target_that_is_dropped_after_a_failed_commit_leaves_its_log() {
    let (_folder, options) = new_file();
    let mut target = DuckDb::open(&options).unwrap();
    run(&mut target, "CREATE TABLE x (n BIGINT)").unwrap();
    let other = target.new_connection().unwrap();
    target
        .transaction(|target| {
            target.connection.execute_batch("INSERT INTO x VALUES (1)")?;
            Ok(other.execute_batch("ALTER TABLE x ADD COLUMN m INT")?)
        })
        .unwrap_err();

    drop((other, target));
    assert!(compact::sibling(&options.path, ".wal").exists());
}

#[test]
fn a_statement_that_commits_by_itself_and_is_refused_is_no_failed_commit() {
    let (_folder, options) = new_file();
    let target = DuckDb::open(&options).unwrap();

    let refused = target.connection.autocommit("SELECT error('no such file')").unwrap_err();
    assert!(!target.connection.has_failed_commit(), "{refused:?}");
    target.connection.autocommit("CREATE TABLE x (n BIGINT)").unwrap();

    target.connection.execute_batch("BEGIN; INSERT INTO x VALUES (1)").unwrap();
    let other = target.new_connection().unwrap();
    other.autocommit("ALTER TABLE x ADD COLUMN m INT").unwrap();
    let refused = target.connection.autocommit("COMMIT").unwrap_err();
    assert!(target.connection.has_failed_commit(), "{refused:?}");
}

/// DuckDB refuses to look into such a file even for the name of a schema.
#[test]
fn a_file_whose_checkpoint_has_failed_is_opened_again() {
    let (_folder, options) = new_file();
    let mut target = DuckDb::open(&options).unwrap();
    run(&mut target, "CREATE TABLE t AS FROM range(5) r(n)").unwrap();

    target.connection.execute_batch("SET GLOBAL debug_checkpoint_abort = 'before_header'").unwrap();
    assert!(target.connection.checkpoint().unwrap_err().wants_reopening());
    target.connection.execute_batch("SET GLOBAL debug_checkpoint_abort = 'none'").unwrap();

    target.reopen().unwrap();
    let rows: u32 =
        target.connection.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 5);
}

#[test]
fn what_has_no_room_in_memory_goes_beside_the_file_and_is_swept_away_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copy.duckdb");
    let spilled = folder.path().join("copy.duckdb.tmp");
    std::fs::create_dir(&spilled).unwrap();
    let [old, new] = ["duckdb_temp_storage_DEFAULT-0.tmp", "duckdb_temp_block-1.block"]
        .map(|name| spilled.join(name));
    for file in [&old, &new] {
        std::fs::write(file, "left behind").unwrap();
    }

    let an_hour_ago = SystemTime::now() - Duration::from_secs(3600);
    std::fs::File::options().write(true).open(&old).unwrap().set_modified(an_hour_ago).unwrap();

    let options = TargetOptions {
        path,
        duckdb_memory_limit: Some("32MB".to_owned()),
        ..TargetOptions::default()
    };
    let target = DuckDb::open(&options).unwrap();
    assert!(!old.exists() && new.exists());

    std::fs::remove_file(&new).unwrap();
    target
        .connection
        .execute_batch(
            "BEGIN; CREATE TABLE rhei_target.t AS SELECT i, \
             hash(i)::VARCHAR || hash(i + 1)::VARCHAR AS v FROM range(1500000) r(i); \
             CREATE TEMP TABLE sorted AS FROM rhei_target.t ORDER BY v;",
        )
        .unwrap();

    assert!(spilled.read_dir().unwrap().count() > 0);
    drop(target);
    assert_eq!(spilled.read_dir().unwrap().count(), 0);
}
