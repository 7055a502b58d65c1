//! What only a lake has: many processes read it, several copies share it, one process writes a
//! copy, and a commit whose answer is lost has happened once or not at all.
//!
//! What a lake has in common with a file, the tests of files prove for it as well: `make test-lake`
//! runs them with `RHEI_TEST_TARGET`.

use std::{collections::BTreeSet, time::Duration};

use rhei::internals::failpoint::UPKEEP;

use crate::{
    bed::{
        Cut, Db, Lake, Load, Pgbench, Reader, Rhei,
        lake::{Kind, LOCKED, catalogs},
        oracle::{Pair, assert_same_pairs, query_copy},
        wait_until,
    },
    following::Following,
    observe::Observed,
};

const SOON: Duration = Duration::from_secs(120);

const TPCB: [&str; 4] = [
    "public.pgbench_accounts",
    "public.pgbench_branches",
    "public.pgbench_history",
    "public.pgbench_tellers",
];

/// The four sums of TPC-B, which are equal at each commit of the source.
const SUMS: [&str; 4] = [
    "SELECT sum(abalance)::VARCHAR FROM public.pgbench_accounts",
    "SELECT sum(tbalance)::VARCHAR FROM public.pgbench_tellers",
    "SELECT sum(bbalance)::VARCHAR FROM public.pgbench_branches",
    "SELECT coalesce(sum(delta), 0)::VARCHAR FROM public.pgbench_history",
];

/// Follows TPC-B while three processes read the lake, each by a connection that it keeps.
#[track_caller]
fn readers_see_one_commit_of_the_source(kind: Kind, name: &str) {
    let following = Following::in_lake(name, kind);
    Pgbench::init(&following.db, 1);
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);

    let load = Pgbench::start(&following.db, &Load::seconds(600));
    let lake = Lake::at(following.copy()).unwrap();
    let mut readers = [(); 3].map(|()| Reader::spawn(&lake, &SUMS));
    for reader in &mut readers {
        wait_until(SOON, "a reader looks thirty times", || reader.looks() >= 30);
    }
    for reader in readers {
        let seen = reader.end();
        assert!(seen.len() > 2, "a reader saw no change: {seen:?}");
    }
    load.stop();

    following.wait_settled(&mut running);
    running.sigterm();
    let output = running.wait(SOON);
    assert_eq!(output.copies().len(), 4, "something was copied again:\n{}", output.stderr);
    following.assert_same(&TPCB);
}

#[test]
fn readers_of_a_lake_in_a_folder_see_the_source_at_one_commit() {
    readers_see_one_commit_of_the_source(Kind::Postgres, "lake_readers");
}

#[test]
fn readers_of_a_lake_in_a_store_see_the_source_at_one_commit() {
    readers_see_one_commit_of_the_source(Kind::S3, "lake_store_readers");
}

#[test]
fn readers_of_a_lake_whose_catalog_is_a_file_see_the_source_at_one_commit() {
    readers_see_one_commit_of_the_source(Kind::Sqlite, "lake_sqlite_readers");
}

#[test]
fn each_commit_to_a_lake_names_its_position_at_the_source() {
    let following = Following::in_lake("lake_messages", Kind::Postgres);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    following.sync();
    following.db.execute("INSERT INTO t VALUES (2)");
    following.sync();

    let found = query_copy(
        following.copy(),
        "SELECT commit_message FROM copied.snapshots() \
         WHERE commit_extra_info LIKE '%\"inserted\":1%'",
    );
    assert_eq!(found.len(), 1, "{found:?}");
    let message = found[0][0].as_deref().unwrap();
    let before = format!("SELECT '{message}'::pg_lsn <= pg_current_wal_lsn()");
    assert_eq!(following.db.value(&before), "t");
}

/// Two sources, two processes, one lake: each is as its source, and no commit is lost.
#[test]
fn several_copies_share_a_lake() {
    let one = Following::in_lake("lake_one", Kind::Postgres);
    let lake = Lake::at(one.copy()).unwrap();
    let mut two = Following::new("lake_two");
    lake.shared("two_", two.copy());
    two.rhei = two.rhei.clone().deadline(SOON);

    for following in [&one, &two] {
        Pgbench::init(&following.db, 1);
    }
    let mut running = [one.run(), two.run()];
    for running in &mut running {
        running.wait_for_log("all tables are live", SOON);
    }
    let loads = [&one, &two].map(|it| Pgbench::start(&it.db, &Load::transactions(3000)));
    for load in loads {
        load.wait(SOON);
    }
    for (following, running) in [&one, &two].into_iter().zip(&mut running) {
        following.wait_settled(running);
    }
    for running in running {
        running.sigterm();
        let output = running.wait(SOON);
        output.assert_code(0);
        assert_eq!(output.copies().len(), 4, "something was copied again:\n{}", output.stderr);
    }

    one.assert_same(&TPCB);
    let pairs: Vec<Pair> = TPCB
        .iter()
        .map(|name| Pair::new(name).target(&name.replace("public", "two_public")))
        .collect();
    assert_same_pairs(&two.db, two.copy(), &pairs);
}

#[test]
fn a_second_process_is_refused_while_the_first_one_writes() {
    let following = Following::in_lake("lake_refused", Kind::Postgres);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);

    // On this machine a file is locked; from another folder the lake itself says so.
    let second = following.rhei.run(["sync"]);
    second.assert_code(1);
    assert!(second.stderr.contains("another rhei on this machine"), "{}", second.stderr);

    let elsewhere = following.folder.path().join("elsewhere.duckdb");
    Lake::at(following.copy()).unwrap().shared("", &elsewhere);
    let second = following.rhei.clone().target(&elsewhere).run(["sync"]);
    second.assert_code(1);
    assert!(second.stderr.contains("the copy in the lake is written by"), "{}", second.stderr);

    running.sigterm();
    running.wait(SOON).assert_code(0);
    following.rhei.clone().target(&elsewhere).run_ok(["sync"]);
    following.assert_same(&["public.t"]);
}

/// Where DuckLake keeps the row of the pipeline.
fn inlined_pipeline(catalog: &Db) -> String {
    catalog.value(
        "SELECT i.table_name FROM ducklake_inlined_data_tables i \
         JOIN ducklake_table t USING (table_id) WHERE t.table_name = 'pipeline'",
    )
}

/// A process that was stopped for a while finds another one in its place, and writes nothing more.
#[test]
fn a_process_that_another_one_has_replaced_writes_nothing_more() {
    let following = Following::in_lake("lake_fenced", Kind::Postgres);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);

    // As a process of another host does that has waited in vain for a sign of life.
    let lake = Lake::at(following.copy()).unwrap();
    let catalog = catalogs().named(lake.database());
    let inlined = inlined_pipeline(&catalog);
    catalog.execute(&format!(
        "UPDATE {inlined} SET writer = 'elsewhere/7/89abcdef/0123456789abcdef' \
         WHERE end_snapshot IS NULL"
    ));
    following.db.execute("INSERT INTO t VALUES (2)");

    let output = running.wait(SOON);
    output.assert_code(1);
    assert!(
        output.stderr.contains("process 7 on elsewhere has taken over the copy"),
        "{}",
        output.stderr
    );
    let rows = query_copy(following.copy(), "SELECT count(*)::VARCHAR FROM public.t");
    assert_eq!(rows, [[Some("1".to_owned())]]);
}

/// Cuts commits off while `write` writes to a table without a key, where what is applied twice or
/// not at all shows. Returns the log.
fn cut_commits(kind: Kind, name: &str, write: &str) -> String {
    let mut following = Following::new(name);
    following.db.execute(
        "CREATE TABLE t (n int, v text); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t \
         SELECT i, 'old' FROM generate_series(1, 500) i",
    );
    let mut lake = Lake::new(kind, following.copy());
    let cut = Cut::before(catalogs().port());
    lake.catalog = cut.through(&lake.catalog);
    lake.shared("", following.copy());
    following.rhei = following.rhei.clone().deadline(SOON);

    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    for round in 0..6 {
        cut.arm("INSERT INTO", round % 2 == 0);
        wait_until(SOON, "a commit is cut off", || {
            following.db.execute(write);
            // Not many changes at once: a batch of more than a hundred rows makes files.
            let count = "SELECT count(*)::VARCHAR FROM public.t";
            wait_until(SOON, "the copy has the rows of the source", || {
                assert!(running.is_running(), "{}", running.logs());
                let copied = query_copy(following.copy(), count).remove(0).remove(0);
                copied == Some(following.db.value("SELECT count(*) FROM t"))
            });
            cut.cuts() > round
        });
    }

    following.wait_settled(&mut running);
    running.sigterm();
    let output = running.wait(SOON);
    output.assert_code(0);
    println!("{}", output.stderr);
    following.assert_same(&["public.t"]);
    output.stderr
}

#[test]
fn a_small_commit_whose_answer_is_lost_happens_once() {
    for kind in [Kind::Postgres, Kind::S3] {
        let write = "INSERT INTO t SELECT i, 'new' FROM generate_series(1, 3) i";
        let log = cut_commits(kind, "lake_cut", write);
        assert!(log.contains("the commit is in the lake"), "{log}");
        assert!(!log.contains("copying the table again"), "{log}");
    }
}

/// DuckLake deletes the files of such a commit.
#[test]
fn a_large_commit_whose_answer_is_lost_has_its_table_copied_again() {
    for kind in [Kind::Postgres, Kind::S3] {
        let write = "INSERT INTO t SELECT i, 'new' FROM generate_series(1, 1000) i; DELETE FROM t \
                     WHERE n = 7";
        let log = cut_commits(kind, "lake_cut_large", write);
        assert!(log.contains("copying the table again"), "{log}");
    }
}

/// Whatever step a death cuts off: the lake is as the source, and the next upkeep leaves no file
/// that no snapshot names.
#[test]
fn a_death_in_the_upkeep_leaves_a_readable_lake_and_no_file_for_ever() {
    let following = Following::in_lake("lake_upkeep", Kind::Postgres);
    let rhei = following
        .rhei
        .clone()
        .env("RHEI_TARGET_CLEAN_AFTER", "1ms")
        .env("RHEI_TARGET_KEEP_SNAPSHOTS", "1ms");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); \
         INSERT INTO t SELECT i, md5(i::text) FROM generate_series(1, 5000) i",
    );
    rhei.run_ok(["sync"]);

    for place in UPKEEP {
        for step in 0..3 {
            following.db.execute(&format!(
                "UPDATE t SET v = v || 'x' WHERE id % 3 = {step}; \
                 DELETE FROM t WHERE id % 97 = {step}"
            ));
            let synced = rhei.run_ok(["sync"]).stderr;
            assert!(!synced.contains("copied table"), "copied again:\n{synced}");
        }
        let died = rhei.clone().env("FAILPOINTS", &format!("{place}=1*return")).run(["compact"]);
        assert_eq!(died.code(), None, "nothing comes by {place}: {}", died.stderr);
        following.assert_same(&["public.t"]);

        rhei.run_ok(["compact"]);
        following.assert_same(&["public.t"]);
        rhei.run_ok(["verify"]);
    }

    rhei.run_ok(["compact"]);
    let lake = Lake::at(following.copy()).unwrap();
    let known: BTreeSet<String> = query_copy(
        following.copy(),
        "SELECT parse_filename(data_file) \
         FROM ducklake_list_files('copied', 't', schema => 'public') UNION \
         SELECT parse_filename(delete_file) \
         FROM ducklake_list_files('copied', 't', schema => 'public') WHERE delete_file IS NOT NULL",
    )
    .into_iter()
    .flatten()
    .flatten()
    .collect();
    let catalog = catalogs().named(lake.database());
    let rows = format!("SELECT count(*) < 5 FROM {}", inlined_pipeline(&catalog));
    assert_eq!(catalog.value(&rows), "t", "rows that no snapshot sees stay in the catalog");

    let pattern = format!("{}/public/**", lake.data_path);
    let there: BTreeSet<String> = query_copy(
        following.copy(),
        &format!("SELECT parse_filename(file) FROM glob('{pattern}')"),
    )
    .into_iter()
    .flatten()
    .flatten()
    .collect();
    assert_eq!(there, known);
}

/// DuckLake takes inlined rows for rows of another shape, and cannot merge files, when the
/// catalog's table for them was made later than the shape.
#[test]
fn small_changes_among_changes_of_shape_keep_their_columns_and_the_files_are_merged() {
    let mut following = Following::in_lake("lake_shapes", Kind::Postgres);
    following.rhei = following.rhei.clone().env("RHEI_BACKFILL_CHUNK_SIZE", "1MiB");
    following.db.execute(
        "CREATE TABLE large (id int PRIMARY KEY, v text); INSERT INTO large SELECT i, md5(i::text) \
         || md5((-i)::text) FROM generate_series(1, 120000) i; CREATE TABLE small (id int PRIMARY \
         KEY, a int); INSERT INTO small VALUES (1, 1); CREATE TABLE empty (id int PRIMARY KEY, l \
         int[])",
    );
    following.sync();
    let chunks = query_copy(
        following.copy(),
        "SELECT count(DISTINCT id)::VARCHAR FROM _rhei.jobs WHERE table_oid = (SELECT oid FROM \
         _rhei.tables WHERE source_name = 'large')",
    );
    let chunks: u32 = chunks[0][0].as_deref().unwrap().parse().unwrap();
    assert!(chunks > 4, "{chunks} chunks, which is a file each");
    let files =
        "SELECT count(*)::VARCHAR FROM ducklake_list_files('copied', 'large', schema => 'public')";
    let count =
        || query_copy(following.copy(), files)[0][0].clone().unwrap().parse::<u32>().unwrap();

    for change in [
        "ALTER TABLE small ADD b int DEFAULT 7",
        "ALTER TABLE large ADD c int",
        "INSERT INTO small VALUES (2, 2, 2)",
        "CREATE TABLE another (id int PRIMARY KEY); INSERT INTO another VALUES (1)",
        "INSERT INTO small VALUES (3, 3, 3); INSERT INTO empty VALUES (1, '{1,NULL}')",
        "ALTER TABLE empty ADD v int; INSERT INTO empty VALUES (2, '{}', 5)",
        "ALTER TABLE small DROP a; INSERT INTO large VALUES (-1, 'x', 5); UPDATE small SET b = 9",
    ] {
        following.db.execute(change);
        let synced = following.sync().stderr;
        let copied = synced.lines().filter(|line| line.contains("copied table"));
        let is_new = |line: &str| line.contains("public.another");
        assert!(copied.into_iter().all(is_new), "{change}: copied again:\n{synced}");
    }
    let tables = ["public.large", "public.small", "public.empty", "public.another"];
    following.assert_same(&tables);

    let lake = Lake::at(following.copy()).unwrap();
    let catalog = catalogs().named(lake.database());
    let count_inlined = |condition: &str| {
        catalog.value(&format!(
            "SELECT count(*) FROM ducklake_inlined_data_tables i WHERE {condition} EXISTS \
             (SELECT FROM ducklake_schema_versions v WHERE (v.table_id, v.schema_version) = \
             (i.table_id, i.schema_version))"
        ))
    };
    assert_ne!(count_inlined(""), "0");
    assert_eq!(count_inlined("NOT"), "0", "tables that have the version of another table");

    following.rhei.run_ok(["compact"]);
    assert!(count() <= 4, "{} files", count());
    following.assert_same(&tables);
    following.rhei.run_ok(["verify"]);
}

/// DuckLake has columns of its own, and ends the process for a date within a struct that it keeps
/// in the catalog: those tables must not be inlined, also not after they were moved.
#[test]
fn tables_that_must_not_be_inlined_are_not_wherever_they_are_moved() {
    let mut following = Following::in_lake("lake_nested", Kind::Postgres);
    let slot = following.slot().to_owned();
    following.rhei = following.rhei.clone().config(&format!(
        "[source]\nslot = \"{slot}\"\n[tables.\"public.dated\"]\ncolumns.s.type = \"STRUCT\"\n\
         [tables.\"other.dated\"]\ncolumns.s.type = \"STRUCT\"\n"
    ));
    following.db.execute(
        "CREATE TYPE spell AS (d date, n int); CREATE TABLE dated (id int PRIMARY KEY, s spell); \
         INSERT INTO dated VALUES (1, (DATE '2024-02-29', 1)); CREATE TABLE own (row_id int \
         PRIMARY KEY, begin_snapshot int, _ducklake_internal_row_id text); INSERT INTO own VALUES \
         (1, 2, 'x')",
    );
    following.sync();
    following.db.execute(
        "INSERT INTO dated VALUES (2, (DATE '0001-01-01', 2)); UPDATE own SET row_id = 5; INSERT \
         INTO own VALUES (6, 7, NULL); CREATE SCHEMA other; ALTER TABLE dated SET SCHEMA other; \
         INSERT INTO other.dated VALUES (3, (NULL, 3))",
    );
    following.sync();
    following.db.execute("INSERT INTO other.dated VALUES (4, NULL)");
    let synced = following.sync().stderr;
    assert!(!synced.contains("copied table"), "copied again:\n{synced}");

    let dates = query_copy(
        following.copy(),
        "SELECT string_agg(id || ':' || coalesce(s.d::VARCHAR, '-'), ' ' ORDER BY id) FROM other.dated",
    );
    assert_eq!(dates, [[Some("1:2024-02-29 2:0001-01-01 3:- 4:-".to_owned())]]);
    let own = query_copy(
        following.copy(),
        "SELECT string_agg(concat_ws(' ', row_id_1, begin_snapshot_2, \
         _ducklake_internal_row_id_3), ', ' ORDER BY row_id_1) FROM public.own",
    );
    assert_eq!(own, [[Some("5 2 x, 6 7".to_owned())]]);
    following.rhei.run_ok(["compact"]);
    following.rhei.run_ok(["verify"]);
}

#[test]
fn a_lake_without_its_extensions_says_what_to_install() {
    let following = Following::in_lake("lake_extensions", Kind::Postgres);
    let output = following.rhei.clone().env("RHEI_EXTENSIONS", "/nowhere").run(["status"]);
    output.assert_code(1);
    for words in ["extension ducklake is missing", "/nowhere", "INSTALL ducklake"] {
        assert!(output.stderr.contains(words), "{}", output.stderr);
    }
}

#[test]
fn a_password_opens_the_catalog_and_is_never_shown() {
    let following = Following::new("lake_password");
    let mut lake = Lake::new(Kind::Postgres, following.copy());
    catalogs().maintenance().execute(&format!(
        "SET password_encryption = 'scram-sha-256'; CREATE ROLE {LOCKED} LOGIN PASSWORD \
         'ge''heim nis'",
    ));
    let owner = format!("ALTER DATABASE {} OWNER TO {LOCKED}", lake.database());
    catalogs().maintenance().execute(&owner);
    let address = lake.catalog.replace("user=postgres", &format!("user={LOCKED}"));
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");

    // In the address, as libpq quotes it.
    lake.catalog = format!("{address} password='ge\\'heim nis'");
    lake.shared("", following.copy());
    let synced = following.sync();
    let status = following.rhei.run_ok(["status"]);
    let databases = following.rhei.run(["query", "FROM duckdb_databases()"]);
    let secrets = following.rhei.run(["query", "FROM duckdb_secrets()"]);
    following.assert_same(&["public.t"]);

    // Beside it, right and wrong.
    lake.catalog = address;
    lake.shared("", following.copy());
    let beside = |password| following.rhei.clone().env("RHEI_LAKE_PASSWORD", password);
    let counted = beside("ge'heim nis").run_ok(["query", "--format", "csv", "FROM t"]);
    assert_eq!(counted.stdout, "id\n1\n");
    let refused = beside("another geheim").run(["status"]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("authentication failed"), "{}", refused.stderr);

    for output in [&synced, &status, &databases, &secrets, &counted, &refused] {
        let text = format!("{}{}", output.stdout, output.stderr);
        assert!(!text.contains("heim"), "{text}");
    }
}

/// What no Parquet file keeps exactly is kept as text, or refused by name.
#[test]
fn a_type_that_a_lake_does_not_keep_is_text_there() {
    let following = Following::in_lake("lake_types", Kind::Postgres);
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, i interval, z timetz, a interval[], d date[]); \
         INSERT INTO t VALUES (1, '1 mon -3 days 00:00:00.000001', '24:00+14', '{1 us,-1 mon}', \
         '{infinity,2020-02-29}')",
    );
    following.sync();
    following.db.execute("INSERT INTO t SELECT 2, i, z, a, d FROM t");
    let synced = following.sync().stderr;
    assert!(!synced.contains("copied table"), "copied again:\n{synced}");
    following.assert_same(&["public.t"]);
    following.rhei.run_ok(["compact"]);
    following.assert_same(&["public.t"]);
    following.rhei.run_ok(["verify"]);

    let wanted = following.rhei.clone().config(
        "[source]\nslot = \"lake_types\"\n[tables.\"public.t\"]\ncolumns.i.type = \"INTERVAL\"\n",
    );
    let refused = wanted.run(["check"]);
    assert!(
        format!("{}{}", refused.stdout, refused.stderr).contains("no lake keeps every INTERVAL"),
        "{}{}",
        refused.stdout,
        refused.stderr
    );
}

/// Files are divided and sorted as the settings say, and say what they hold: readers skip the rest.
#[test]
fn partitions_and_order_of_a_table_are_as_the_settings_say() {
    let mut following = Following::in_lake("lake_layout", Kind::Postgres);
    let slot = following.slot().to_owned();
    following.rhei = following.rhei.clone().config(&format!(
        "[source]\nslot = \"{slot}\"\n[target]\nfile_size = \"64MB\"\n\
         [tables.\"public.t\"]\npartition_by = [\"month(at)\"]\n\
         sort_by = [\"id\"]\n"
    ));
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, at timestamptz); INSERT INTO t \
         SELECT i, timestamptz '2024-01-01' + i * interval '1 hour' \
         FROM generate_series(1, 4000) i",
    );
    following.sync();
    following.db.execute("UPDATE t SET at = at + interval '40 days' WHERE id % 5 = 0");
    let synced = following.sync().stderr;
    assert!(!synced.contains("copied table"), "copied again:\n{synced}");
    following.assert_same(&["public.t"]);

    let files = query_copy(
        following.copy(),
        "SELECT count(*)::VARCHAR FROM ducklake_list_files('copied', 't', schema => 'public')",
    );
    let files: u32 = files[0][0].as_deref().unwrap().parse().unwrap();
    assert!(files >= 6, "{files} files for six months");
}

/// An earlier time is there for as long as its snapshot.
#[test]
fn the_past_of_a_lake_can_be_read() {
    let following = Following::in_lake("lake_past", Kind::Postgres);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    following.sync();
    let then = query_copy(
        following.copy(),
        "SELECT max(snapshot_id)::VARCHAR FROM copied.snapshots() WHERE author = 'rhei'",
    );
    following.db.execute("INSERT INTO t VALUES (2), (3)");
    following.sync();

    let count = |at: &str| {
        query_copy(following.copy(), &format!("SELECT count(*)::VARCHAR FROM public.t {at}"))
    };
    let then = then[0][0].as_deref().unwrap();
    assert_eq!(count(&format!("AT (VERSION => {then})")), [[Some("1".to_owned())]]);
    assert_eq!(count(""), [[Some("3".to_owned())]]);
}

#[test]
fn the_metrics_of_a_lake_count_its_files_and_snapshots() {
    let observed = Observed::of(
        Following::in_lake("lake_metrics", Kind::Postgres),
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)",
        "",
    );
    observed.wait_for_metric("rhei_lake_files{kind=\"data\"}", "counts a file", |it| it > 0.0);
    observed.wait_for_metric("rhei_lake_snapshots", "counts snapshots", |it| it > 1.0);
    observed.wait_for_metric("rhei_lake_catalog_bytes", "is known", |it| it > 1e6);
}

/// What rhei says of a copy in a lake.
#[test]
fn the_commands_work_on_a_lake_with_and_without_a_replicator() {
    let following = Following::in_lake("lake_commands", Kind::Postgres);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2)");
    // A replicator in the middle of a step says so, and answers the next time.
    let answered = |rhei: &Rhei, command: &[&str]| {
        let mut answer = String::new();
        wait_until(SOON, &format!("rhei {} answers", command.join(" ")), || {
            let output = rhei.run(command);
            answer = output.stdout.clone();
            output.code() == Some(0)
        });
        answer
    };
    let ask = |rhei: &Rhei| {
        rhei.run_ok(["check"]);
        let status = answered(rhei, &["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        assert!(status["file"]["lake"]["snapshots"].as_u64().unwrap() > 0, "{status}");
        answered(rhei, &["jobs"]);
        rhei.run_ok(["verify"]);
        let rows = rhei.run_ok(["query", "--format", "csv", "SELECT count(*) AS n FROM t"]).stdout;
        assert_eq!(rows, "n\n2\n");
        // Refused while the copy is read.
        answered(rhei, &["compact"]);
    };

    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    following.rhei.run_ok(["wait", "--now"]);
    ask(&following.rhei);
    let refused = following.rhei.run(["publish", "--path", "shop.ro.duckdb"]);
    refused.assert_code(1);
    assert!(refused.stderr.contains("a lake is not published"), "{}", refused.stderr);
    running.sigterm();
    running.wait(SOON).assert_code(0);
    ask(&following.rhei);
}
