//! What endangers a copy in a lake: outages of its catalog, lost answers while tables are copied,
//! data that is away, or files that are not its own.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use crate::{
    bed::{
        Cut, Lake, Load, Pgbench,
        lake::{Kind, catalogs},
        oracle::query_copy,
        s3::Store,
        wait_until,
    },
    following::Following,
};

const SOON: Duration = Duration::from_secs(120);

/// A lake whose catalog is reached by way of the cut.
fn in_lake_through(cut: &Cut, name: &str) -> Following {
    let mut following = Following::new(name);
    let mut lake = Lake::new(Kind::Postgres, following.copy());
    lake.catalog = cut.through(&lake.catalog);
    lake.shared("", following.copy());
    following.rhei = following.rhei.clone().deadline(SOON);
    following
}

/// The first column of the first row.
fn value(following: &Following, sql: &str) -> String {
    query_copy(following.copy(), sql)[0][0].clone().unwrap()
}

/// The Parquet files below a folder.
fn parquet_files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let each =
        entries.flat_map(|path| if path.is_dir() { parquet_files(&path) } else { vec![path] });
    each.filter(|path| path.extension().is_some_and(|ending| ending == "parquet")).collect()
}

/// Loads take turns where the catalog is a SQLite file, and workers take turns at reading when the
/// stream is late.
#[test]
fn two_copies_into_a_lake_in_a_sqlite_file_and_the_stream_do_not_wait_for_each_other() {
    let mut following = Following::in_lake("lake_turns", Kind::Sqlite);
    following.rhei = following
        .rhei
        .clone()
        .env("RHEI_SYNC_MEMORY_LIMIT", "1MB")
        .env("RHEI_BACKFILL_CHUNK_SIZE", "4MB")
        .env("RHEI_BACKFILL_RATE_LIMIT", "6MB");
    following.db.execute(
        "CREATE TABLE written (id int PRIMARY KEY, n int); INSERT INTO written VALUES (1, 1); \
         CREATE TABLE large (id int PRIMARY KEY, v text); INSERT INTO large \
         SELECT i, md5(i::text) FROM generate_series(1, 300000) i",
    );
    let write = "UPDATE written SET n = n + 1 WHERE id = 1;\n";
    let load = Pgbench::start(&following.db, &Load::seconds(600).rate(50).script(write));
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    load.stop();

    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.written", "public.large"]);
}

/// Many small tables are copied in one transaction.
#[test]
fn small_tables_are_copied_once_although_the_answer_to_their_commit_is_lost() {
    for lets_commit in [true, false] {
        let cut = Cut::before(catalogs().port());
        let following = in_lake_through(&cut, &format!("lake_bundle_{lets_commit}"));
        // Without a key, so that nothing repairs rows that are there twice.
        let tables: Vec<String> = (1..=20).map(|n| format!("public.small_{n}")).collect();
        for table in &tables {
            following.db.execute(&format!(
                "CREATE TABLE {table} (n int, v text); ALTER TABLE {table} REPLICA IDENTITY FULL; \
                 INSERT INTO {table} SELECT i, 'a value of a bundle' FROM generate_series(1, 5) i"
            ));
        }
        cut.arm("a value of a bundle", lets_commit);
        let mut running = following.run();
        running.wait_for_log("all tables are live", SOON);
        assert_eq!(cut.cuts(), 1, "no commit was cut off");

        following.wait_settled(&mut running);
        running.stop(SOON).assert_code(0);
        following.assert_same(&tables.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// A process that was cut off while another one took over must not load any more.
#[test]
fn a_load_of_a_process_that_was_replaced_meanwhile_adds_nothing() {
    let cut = Cut::before(catalogs().port());
    let following = in_lake_through(&cut, "lake_replaced");
    following.db.execute(
        "CREATE TABLE t (n int, v text); INSERT INTO t SELECT i, 'a row to be copied' \
         FROM generate_series(1, 50) i",
    );
    cut.arm_and_go_down("a row to be copied", true);
    let running = following.run();
    wait_until(SOON, "the commit of the load is cut off", || cut.cuts() == 1);
    cut.down();

    // As another process does that takes over.
    let catalog = catalogs().named(Lake::at(following.copy()).unwrap().database());
    let table = |name: &str| {
        catalog.value(&format!(
            "SELECT i.table_name FROM ducklake_inlined_data_tables i \
             JOIN ducklake_table t USING (table_id) WHERE t.table_name = '{name}' \
             AND t.end_snapshot IS NULL"
        ))
    };
    let other = "elsewhere/7/89abcdef/0123456789abcdef";
    catalog.execute(&format!(
        "UPDATE {} SET payload = '{other}' WHERE id = '0' AND end_snapshot IS NULL; \
         UPDATE {} SET writer = '{other}' WHERE end_snapshot IS NULL",
        table("jobs"),
        table("pipeline")
    ));
    cut.up();

    let output = running.wait(SOON);
    output.assert_code(1);
    assert!(output.stderr.contains("process 7 on elsewhere has taken over"), "{}", output.stderr);
    let writer = format!(
        "SELECT convert_from(payload, 'UTF8') FROM {} WHERE id = '0' AND end_snapshot IS NULL",
        table("jobs")
    );
    assert_eq!(catalog.value(&writer), other, "{}", output.stderr);
    let rows = value(&following, "SELECT count(*)::VARCHAR FROM public.t__rhei_shadow");
    assert_eq!(rows, "50", "{}", output.stderr);
}

#[test]
fn an_outage_of_the_catalog_during_a_copy_is_waited_for() {
    let cut = Cut::before(catalogs().port());
    let mut following = in_lake_through(&cut, "lake_outage");
    following.rhei = following
        .rhei
        .clone()
        .env("RHEI_BACKFILL_CHUNK_SIZE", "1MB")
        .env("RHEI_BACKFILL_RATE_LIMIT", "2MB");
    following.db.execute(
        "CREATE TABLE small (id int PRIMARY KEY, v text); INSERT INTO small VALUES (0, 'first')",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.db.execute(
        "CREATE TABLE t (n int, v text); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t \
         SELECT i, md5(i::text) FROM generate_series(1, 200000) i; ALTER PUBLICATION rhei ADD \
         TABLE t",
    );

    for round in 1..=4 {
        // Loads, each of which adds a file, meet the outage first, and then the stream.
        let (mark, lets_commit) = (running.log_mark(), round % 2 == 1);
        if round <= 2 {
            cut.arm_and_go_down(".parquet'", lets_commit);
        } else {
            cut.arm_and_go_down("written beside the copy", lets_commit);
            following
                .db
                .execute(&format!("INSERT INTO small VALUES ({round}, 'written beside the copy')"));
        }
        wait_until(SOON, "a commit is cut off", || {
            assert!(running.is_running(), "{}", running.logs());
            cut.cuts() == round
        });
        cut.down();
        running.wait_for_log_after(mark, "the lake cannot be used now", SOON);
        cut.up();
    }
    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.small", "public.t"]);
}

/// DuckLake 1.0 meets a bug of its own when it loses the catalog while it reads rows that the catalog
/// holds, and DuckDB takes no statement of the process any more after that.
#[test]
fn a_run_survives_a_lost_connection_that_its_duckdb_does_not_survive() {
    const READ: [&str; 2] = ["\"ducklake_inlined_data_", "\" WHERE \"begin_snapshot\" <="];
    let cut = Cut::before(catalogs().port());
    let mut following = in_lake_through(&cut, "lake_bug");
    following.rhei = following
        .rhei
        .clone()
        .env("RHEI_BACKFILL_CHUNK_SIZE", "1MB")
        .env("RHEI_BACKFILL_RATE_LIMIT", "2MB");
    following.db.execute(
        "CREATE TABLE small (id int PRIMARY KEY, v text); INSERT INTO small VALUES (0, 'first')",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.db.execute(
        "CREATE TABLE t (n int PRIMARY KEY, v text); INSERT INTO t \
         SELECT i, md5(i::text) FROM generate_series(1, 200000) i; ALTER PUBLICATION rhei ADD \
         TABLE t",
    );
    running.wait_for_log("copying table=\"public.t\"", SOON);

    // Loaders have transactions open, which a DuckDB that has failed cannot roll back.
    for round in 1..=3 {
        let mark = running.log_mark();
        cut.arm_query(&READ);
        following.db.execute(&format!("INSERT INTO small VALUES ({round}, 'beside the copy')"));
        wait_until(SOON, "a read is cut off", || {
            assert!(running.is_running(), "{}", running.logs());
            cut.cuts() == round
        });
        if round == 3 {
            // The catalog stays away for longer than DuckDB lives.
            cut.down();
            running.wait_for_log_after(mark, "the target cannot be opened now", SOON);
            cut.up();
        }
        running.wait_for_log_after(mark, "following the source", SOON);
    }
    following.wait_settled(&mut running);
    let logs = running.logs();
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.small", "public.t"]);

    // The rows beside the copy came by the stream.
    assert!(logs.contains("starting it again"), "DuckDB survived:\n{logs}");
    for table in ["small", "t"] {
        let copied = format!("INFO copied table=\"public.{table}\"");
        assert_eq!(logs.matches(&copied).count(), 1, "{logs}");
    }
}

/// As above; a `sync` leaves the rest to the next one, and says so.
#[test]
fn a_sync_whose_duckdb_has_failed_says_so_and_the_next_one_goes_on() {
    let cut = Cut::before(catalogs().port());
    let following = in_lake_through(&cut, "lake_bug_sync");
    following.db.execute("CREATE TABLE t (number int PRIMARY KEY, v text)");
    following.sync();
    following.db.execute("INSERT INTO t SELECT i, md5(i::text) FROM generate_series(1, 50) i");
    following.sync();
    following.db.execute("UPDATE t SET v = 'another'");

    // Rows of the table itself, which the catalog holds.
    cut.arm_query(&["\"ducklake_inlined_data_", "\"number\"", "\" WHERE \"begin_snapshot\" <="]);
    let failed = following.rhei.run(["sync"]);
    assert_eq!((failed.code(), cut.cuts()), (Some(1), 1), "{}", failed.stderr);
    assert!(failed.stderr.contains("error: DuckDB has failed"), "{}", failed.stderr);
    assert!(failed.stderr.lines().count() < 30, "{}", failed.stderr);

    let mended = following.sync();
    assert!(!mended.stderr.contains("INFO copied table="), "copied again:\n{}", mended.stderr);
    following.assert_same(&["public.t"]);
}

/// A lake that was not left in peace looks for files that a failed commit has lost; those of a
/// volume that is not mounted are not lost.
#[test]
fn data_that_is_away_is_waited_for_and_not_copied_again() {
    let following = Following::in_lake("lake_away", Kind::Postgres);
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, md5(i::text) \
         FROM generate_series(1, 1000) i",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.wait_settled(&mut running);
    running.kill9();

    let data = Lake::at(following.copy()).unwrap().data_path;
    let aside = format!("{data}.aside");
    let joining = following.folder.path().join("joining.duckdb");
    Lake::at(following.copy()).unwrap().shared("joining_", &joining);
    let another = following.rhei.clone().target(&joining);
    fs::rename(&data, &aside).unwrap();
    // Missing, and as a mount point without its volume.
    for is_there in [false, true] {
        let _ = fs::remove_dir_all(&data);
        if is_there {
            fs::create_dir(&data).unwrap();
        }
        // Also a copy that is about to join the lake.
        for rhei in [&following.rhei, &another] {
            let refused = rhei.run(["sync"]);
            assert_eq!(refused.code(), Some(1), "{is_there}: {}", refused.stderr);
            assert!(
                refused.stderr.contains("the data of the lake is not in"),
                "{}",
                refused.stderr
            );
        }
    }
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&aside, &data).unwrap();

    let synced = following.sync();
    assert!(!synced.stderr.contains("INFO copied table="), "copied again:\n{}", synced.stderr);
    following.rhei.clone().env("RHEI_TARGET_CLEAN_AFTER", "1ms").run_ok(["compact"]);
    following.assert_same(&["public.t"]);

    // The mark stays for the next time, and is made where files are that the lake knows.
    let mark = Path::new(&data).join(".rhei-lake");
    fs::remove_file(&mark).unwrap();
    following.sync();
    assert!(mark.exists());
    fs::remove_dir_all(Path::new(&data).join("public")).unwrap();
    following.rhei.spawn(["run"]).wait_for_log("following the source", SOON);
    let synced = following.sync();
    assert!(synced.stderr.contains("INFO copied table="), "{}", synced.stderr);
    following.assert_same(&["public.t"]);

    // Data that is gone for good is given up by an empty mark, also after an end in peace.
    fs::remove_dir_all(&data).unwrap();
    following.rhei.run(["sync"]).assert_code(1);
    fs::create_dir_all(&data).unwrap();
    fs::write(&mark, "").unwrap();
    let synced = following.sync();
    assert!(synced.stderr.contains("INFO copied table="), "{}", synced.stderr);
    following.assert_same(&["public.t"]);
}

/// As DuckLake leaves it when the answer to a commit was lost.
#[test]
fn a_table_that_lacks_a_file_is_copied_again_by_the_very_next_sync() {
    let following = Following::in_lake("lake_lacks", Kind::Postgres);
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, md5(i::text) \
         FROM generate_series(1, 1000) i; CREATE TABLE whole (id int PRIMARY KEY); INSERT INTO \
         whole SELECT generate_series(1, 1000)",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.wait_settled(&mut running);
    running.kill9();
    let data = Lake::at(following.copy()).unwrap().data_path;
    let of_table = |path: &&std::path::PathBuf| path.display().to_string().contains("/t__rhei");
    let files = parquet_files(Path::new(&data));
    fs::remove_file(files.iter().find(of_table).expect("a file of t")).unwrap();

    let synced = following.sync();
    assert_eq!(synced.stderr.matches("INFO copied table=").count(), 1, "{}", synced.stderr);
    following.assert_same(&["public.t", "public.whole"]);
}

/// `rhei compact` deletes the files below `data_path` that the lake does not know.
#[test]
fn files_that_are_not_of_the_lake_are_not_endangered() {
    let following = Following::in_lake("lake_others", Kind::Postgres);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let data = Lake::at(following.copy()).unwrap().data_path;
    let of_others = Path::new(&data).join("sales/2024.parquet");
    fs::create_dir_all(of_others.parent().unwrap()).unwrap();
    fs::write(&of_others, "a file of others").unwrap();

    for command in ["check", "sync"] {
        let refused = following.rhei.run([command]);
        refused.assert_code(1);
        let text = format!("{}{}", refused.stdout, refused.stderr);
        assert!(text.contains("holds files of others, such as"), "{text}");
    }
    fs::remove_file(&of_others).unwrap();
    following.sync();
    following.assert_same(&["public.t"]);
}

/// DuckLake compares paths as texts, and takes every file for one that it does not know when its
/// own paths are spelled in another way.
#[test]
fn files_that_the_lake_knows_by_another_spelling_are_not_deleted() {
    let mut following = Following::in_lake("lake_spelling", Kind::Postgres);
    let mut lake = Lake::at(following.copy()).unwrap();
    let spelled =
        following.folder.path().join("there").display().to_string().replacen('/', "//", 2);
    let made = duckdb::Connection::open_in_memory().unwrap();
    let mut opening = lake.opening();
    let attach = opening.pop().unwrap();
    opening.push(attach.replace("(READ_ONLY)", &format!("(DATA_PATH '{spelled}/')")));
    for statement in opening {
        made.execute_batch(&statement).unwrap();
    }
    drop(made);
    // The settings refuse this spelling, and the lake says itself where its data is.
    lake.data_path = String::new();
    lake.shared("", following.copy());
    following.rhei = following
        .rhei
        .clone()
        .env("RHEI_TARGET_CLEAN_AFTER", "1ms")
        .env("RHEI_TARGET_KEEP_SNAPSHOTS", "1ms");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, md5(i::text) \
         FROM generate_series(1, 1000) i",
    );
    following.sync();

    let refused = following.rhei.run(["compact"]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("under other paths"), "{}", refused.stderr);
    following.assert_same(&["public.t"]);
}

/// The tables of DuckLake change with each commit to the lake.
#[test]
fn a_catalog_in_the_database_of_the_source_is_not_copied_into_the_lake() {
    let following = Following::new("lake_within");
    let mut lake = Lake::new(Kind::Postgres, following.copy());
    let url = following.db.url();
    let port = url.rsplit_once(':').unwrap().1.split_once('/').unwrap().0;
    lake.catalog = format!(
        "ducklake:postgres:host=127.0.0.1 port={port} user=postgres dbname={}",
        following.db.name()
    );
    lake.shared("", following.copy());
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.db.execute("INSERT INTO t VALUES (2); CREATE TABLE u (id int PRIMARY KEY)");
    running.wait_for_log("public.u", SOON);
    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);

    following.assert_same(&["public.t", "public.u"]);
    let tables = "SELECT string_agg(table_name, ' ' ORDER BY table_name) \
                  FROM duckdb_tables() WHERE database_name = 'copied' AND schema_name = 'public'";
    assert_eq!(value(&following, tables), "t u");
}

#[test]
fn a_layout_by_a_column_that_is_not_there_is_refused_by_name() {
    let mut following = Following::in_lake("lake_typo", Kind::Postgres);
    let slot = following.slot().to_owned();
    following.rhei = following.rhei.clone().config(&format!(
        "[source]\nslot = \"{slot}\"\n[tables.\"public.t\"]\nsort_by = [\"custmer\"]\n"
    ));
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY, customer int)");
    for command in ["check", "sync"] {
        let refused = following.rhei.run([command]);
        refused.assert_code(1);
        let text = format!("{}{}", refused.stdout, refused.stderr);
        assert!(text.contains("has no column \"custmer\" in its copy"), "{text}");
    }
}

#[test]
fn a_table_that_loses_a_column_of_its_layout_goes_on_without_it() {
    let mut following = Following::in_lake("lake_unsorted", Kind::Postgres);
    let slot = following.slot().to_owned();
    following.rhei = following.rhei.clone().config(&format!(
        "[source]\nslot = \"{slot}\"\n[tables.\"public.t\"]\npartition_by = [\"day(at)\"]\n\
         sort_by = [\"id\"]\n"
    ));
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, at date); INSERT INTO t VALUES (1, '2024-02-29')",
    );
    following.sync();
    following.db.execute("ALTER TABLE t DROP at; INSERT INTO t VALUES (2)");
    let synced = following.sync();
    assert!(synced.stderr.contains("no longer partitions or sorts"), "{}", synced.stderr);
    following.db.execute("INSERT INTO t VALUES (3)");
    let synced = following.sync();
    assert!(!synced.stderr.contains("INFO copied table="), "copied again:\n{}", synced.stderr);
    following.assert_same(&["public.t"]);
}

#[test]
fn whoever_may_read_the_folder_of_a_lake_may_read_its_files() {
    for (mode, readable) in [(0o755, 0o044), (0o750, 0o040), (0o700, 0o000)] {
        let following = Following::in_lake(&format!("lake_mode_{mode:o}"), Kind::Postgres);
        let data = Lake::at(following.copy()).unwrap().data_path;
        fs::create_dir(&data).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(mode)).unwrap();
        following.db.execute(
            "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)",
        );
        following.sync();

        let files = parquet_files(Path::new(&data));
        assert!(!files.is_empty());
        for file in files {
            let found = fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!(found & 0o077, readable, "{} in a folder of {mode:o}", file.display());
        }
        let spilled = fs::metadata(format!("{}.tmp", following.copy().display())).unwrap();
        assert_eq!(spilled.permissions().mode() & 0o077, 0);
    }
}

#[test]
fn status_does_not_call_a_replicator_stopped_that_it_cannot_ask() {
    let following = Following::in_lake("lake_elsewhere", Kind::Postgres);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    let elsewhere = following.folder.path().join("elsewhere.duckdb");
    Lake::at(following.copy()).unwrap().shared("", &elsewhere);
    let asks = following.rhei.clone().target(&elsewhere);
    let replicator = || {
        let status = asks.run_ok(["status", "--json"]).stdout;
        serde_json::from_str::<serde_json::Value>(&status).unwrap()["replicator"].clone()
    };
    assert_eq!(replicator(), "elsewhere");
    let text = asks.run_ok(["status"]).stdout;
    assert!(text.contains(&format!("process {}", running.pid())), "{text}");

    running.stop(SOON).assert_code(0);
    assert_eq!(replicator(), "stopped");
}

/// Files are left for a day, and so are snapshots that an open transaction may need.
#[test]
fn snapshots_expire_as_soon_as_the_settings_say_but_not_under_an_open_transaction() {
    let mut following = Following::in_lake("lake_expiry", Kind::Postgres);
    following.rhei = following.rhei.clone().env("RHEI_TARGET_KEEP_SNAPSHOTS", "1ms");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    following.sync();
    let lake = Lake::at(following.copy()).unwrap();
    wait_until(SOON, "old snapshots expire", || {
        following.rhei.run_ok(["compact"]);
        lake.snapshots() <= 3
    });

    let reader = lake.open().unwrap();
    let count = |expected: u32| {
        let found: u32 =
            reader.query_row("SELECT count(*) FROM public.t", [], |row| row.get(0)).unwrap();
        assert_eq!(found, expected);
    };
    reader.execute_batch("BEGIN").unwrap();
    count(1);
    let before = lake.snapshots();
    for id in 2..5 {
        following.db.execute(&format!("INSERT INTO t VALUES ({id})"));
        following.sync();
        following.rhei.run_ok(["compact"]);
        count(1);
    }
    assert!(lake.snapshots() >= before + 9, "{} snapshots", lake.snapshots());

    reader.execute_batch("COMMIT").unwrap();
    count(4);
    wait_until(SOON, "old snapshots expire again", || {
        following.rhei.run_ok(["compact"]);
        lake.snapshots() <= 3
    });
    following.assert_same(&["public.t"]);
}

/// A check fails where the next sync would.
#[test]
fn a_role_that_may_not_make_the_tables_of_a_catalog_is_told_by_check() {
    let following = Following::in_lake("lake_rights", Kind::Postgres);
    let mut lake = Lake::at(following.copy()).unwrap();
    catalogs().maintenance().execute("CREATE ROLE may_nothing LOGIN");
    let catalog = catalogs().named(lake.database());
    catalog.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC");
    lake.catalog = lake.catalog.replace("user=postgres", "user=may_nothing");
    lake.shared("", following.copy());
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");

    let refused = following.rhei.run(["check"]);
    refused.assert_code(1);
    assert!(
        refused.stdout.contains("role may_nothing may not make the tables of lake"),
        "{}{}",
        refused.stdout,
        refused.stderr
    );
    following.rhei.run(["sync"]).assert_code(1);
    catalog.execute("GRANT CREATE ON SCHEMA public TO may_nothing");
    following.rhei.run_ok(["check"]);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// Credentials of a role end after some hours, and AWS clients find new ones where they found them.
#[test]
fn credentials_that_end_are_replaced_while_the_replicator_runs() {
    let store = Store::start("first", "first-secret");
    let mut following = Following::new("lake_credentials");
    let mut lake = Lake::new(Kind::Postgres, following.copy());
    lake.data_path = store.new_bucket();
    lake.shared("", following.copy());
    let file = following.folder.path().join("credentials");
    let write = |key: &str| {
        let text =
            format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {key}-secret\n");
        fs::write(&file, text).unwrap();
    };
    write("first");
    following.rhei = following
        .rhei
        .clone()
        .deadline(SOON)
        .env("RHEI_TARGET_S3_ENDPOINT", &store.endpoint())
        .env("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_REGION", "us-east-1");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, md5(i::text) \
         FROM generate_series(1, 1000) i",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);

    store.replace_key("second", "second-secret");
    following.db.execute(
        "INSERT INTO t SELECT i, 'x' FROM generate_series(1001, 3000) i; DELETE FROM t WHERE id < 9",
    );
    running.wait_for_log("the lake cannot be used now", SOON);
    write("second");
    following.wait_settled(&mut running);
    assert_eq!(running.copies().len(), 1, "copied again:\n{}", running.logs());
    running.stop(SOON).assert_code(0);

    let reader = lake.open_with(&store.secret_of("second", "second-secret")).unwrap();
    let copied: String = reader
        .query_row("SELECT concat_ws(' ', count(*), sum(id)) FROM public.t", [], |row| row.get(0))
        .unwrap();
    assert_eq!(copied, following.db.value("SELECT concat_ws(' ', count(*), sum(id)) FROM t"));
}

/// Whatever stays refused ends a sync, and is told.
#[test]
fn a_copy_into_a_store_that_refuses_it_ends_with_the_reason() {
    let store = Store::start("first", "first-secret");
    let mut following = Following::new("lake_forbidden");
    let mut lake = Lake::new(Kind::Postgres, following.copy());
    lake.data_path = store.new_bucket();
    lake.shared("", following.copy());
    following.rhei = following
        .rhei
        .clone()
        .deadline(SOON)
        .env("RHEI_TARGET_S3_ENDPOINT", &store.endpoint())
        .env("AWS_ACCESS_KEY_ID", "first")
        .env("AWS_SECRET_ACCESS_KEY", "first-secret")
        .env("AWS_REGION", "us-east-1");
    following.db.execute("CREATE TABLE s (id int PRIMARY KEY)");
    following.sync();
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, md5(i::text) \
         FROM generate_series(1, 1000) i",
    );
    store.refuse_writes();

    let refused = following.rhei.run(["sync"]);
    refused.assert_code(1);
    for words in ["a load of copied rows into the lake failed again", "the lake cannot be used now"]
    {
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
}

#[test]
fn a_lake_that_is_not_there_yet_is_checked_whatever_keeps_its_catalog() {
    for kind in [Kind::Postgres, Kind::S3, Kind::Sqlite, Kind::DuckDb] {
        let following = Following::in_lake(&format!("lake_new_{kind:?}").to_lowercase(), kind);
        following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
        let checked = following.rhei.run_ok(["check"]).stdout;
        assert!(checked.contains("will be made"), "{kind:?}: {checked}");
        following.sync();
        following.assert_same(&["public.t"]);
    }
}
