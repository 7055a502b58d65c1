//! Locks at the source: rhei keeps none beyond its statement, and one that somebody else holds
//! stops one table, not the stream.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use crate::{bed::Rhei, following::Following};

const SOON: Duration = Duration::from_secs(60);

fn slowly(rhei: &Rhei) -> Rhei {
    rhei.clone().env("RHEI_BACKFILL_CHUNK_SIZE", "1MB").env("RHEI_BACKFILL_RATE_LIMIT", "2MB")
}

/// Whether a relation of a user is locked by one of our sessions in another way than the copy of
/// `table` has to.
fn strange_locks(following: &Following, table: &str) -> String {
    following.db.value(&format!(
        "SELECT coalesce(string_agg(DISTINCT format('%s %s by %s', l.relation::regclass, l.mode, \
         a.application_name), ', '), '') \
         FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'relation' AND \
         l.relation >= 16384 \
         AND a.datname = current_database() AND a.application_name LIKE 'rhei/%' AND NOT (l.mode = \
         'AccessShareLock' AND l.relation IN \
         (SELECT '{table}'::regclass UNION SELECT indexrelid FROM pg_index WHERE indrelid = \
         '{table}'::regclass \
          UNION SELECT reltoastrelid FROM pg_class WHERE oid = '{table}'::regclass))"
    ))
}

/// Everything that somebody may do to other tables goes through within a second, and the copy goes
/// on.
#[test]
fn ddl_on_other_tables_waits_for_no_copy() {
    let following = Following::new("ddl_beside");
    following.db.execute(
        "CREATE TABLE large (id int PRIMARY KEY, v text);
         INSERT INTO large SELECT i, repeat('x', 200) FROM generate_series(1, 60000) i;
         CREATE TABLE tree (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF tree FOR VALUES FROM (0) TO (10);
         CREATE TABLE gone PARTITION OF tree FOR VALUES FROM (10) TO (20); INSERT INTO tree VALUES \
         (1), (11);
         CREATE TABLE free (id int PRIMARY KEY, v text); INSERT INTO free VALUES (25, 'free');
         CREATE TABLE plain (id int PRIMARY KEY, v text); INSERT INTO plain SELECT i, 'plain' FROM \
         generate_series(1, 100) i;
         CREATE TABLE dropped (id int PRIMARY KEY); INSERT INTO dropped VALUES (1)",
    );
    let mut running = slowly(&following.rhei).spawn(["run"]);
    for table in ["tree", "free", "plain", "dropped"] {
        running.wait_for_log(&format!("live table=\"public.{table}\""), SOON);
    }
    for change in [
        "ALTER TABLE tree ADD COLUMN late int",
        "ALTER TABLE tree DETACH PARTITION gone",
        "ALTER TABLE tree ATTACH PARTITION free FOR VALUES FROM (20) TO (30)",
        "TRUNCATE leaf",
        "VACUUM FULL plain",
        "CLUSTER plain USING plain_pkey",
        "ALTER TABLE plain ALTER v TYPE varchar(20)",
        "DROP TABLE dropped",
        "REINDEX TABLE plain",
    ] {
        // The tables differ by a column, so that is made the same first.
        if change.contains("ATTACH") {
            following.db.execute("SET lock_timeout = '1s'; ALTER TABLE free ADD COLUMN late int");
        }
        let session = following.db.session();
        session.execute("SET lock_timeout = '1s'");
        session.execute(change);
        assert_eq!(strange_locks(&following, "large"), "", "after {change}");
    }
    assert!(
        !running.logs().contains("live table=\"public.large\""),
        "the copy was over before:\n{}",
        running.logs()
    );
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.large", "public.tree", "public.plain"]);
}

/// Ends a thread that writes, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Each update is a transaction.
fn update_without_pause(following: &Following, is_over: &AtomicBool) {
    let session = following.db.session();
    while !is_over.load(Ordering::Relaxed) {
        session.execute("UPDATE hot SET n = n + 1 WHERE id = (random() * 999)::int + 1");
    }
}

/// As VACUUM FULL or an ALTER in an open transaction hold it.
struct Lock(crate::bed::Session);

fn lock(following: &Following, table: &str) -> Lock {
    let session = following.db.session();
    session.execute(&format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"));
    Lock(session)
}

impl Lock {
    fn release(self) {
        self.0.execute("COMMIT");
    }
}

/// With two tables locked as long as it takes, a third one's changes and shapes arrive, a fourth
/// one is copied and goes live, and a `run` or `sync` that begins meanwhile gets as far.
#[test]
fn a_lock_stops_one_table_and_no_other() {
    let following = Following::new("one_locked");
    following.db.execute(
        "CREATE TABLE a (id int PRIMARY KEY, v text); INSERT INTO a SELECT i, 'a' FROM \
         generate_series(1, 100) i;
         CREATE TABLE b (id int PRIMARY KEY, v text); INSERT INTO b SELECT i, 'b' FROM \
         generate_series(1, 100) i;
         CREATE TABLE c (id int PRIMARY KEY, v text); CREATE TABLE d (id int PRIMARY KEY); CREATE \
         PUBLICATION rhei FOR TABLE c, d",
    );
    following.sync();
    let d = lock(&following, "d");
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    following.db.execute("INSERT INTO c VALUES (1, 'one')");
    following.wait_until_in_step();
    following.db.execute(
        "SET lock_timeout = '5s'; ALTER TABLE c ADD n int DEFAULT 7; INSERT INTO \
                          c VALUES (2, 'two')",
    );
    following.wait_until_in_step();
    following.db.execute("ALTER PUBLICATION rhei ADD TABLE a, b");
    let a = lock(&following, "a");
    running.wait_for_log("wait for their copy", SOON);
    running.wait_for_log("live table=\"public.b\"", SOON);
    following.db.execute("INSERT INTO c VALUES (3, 'three')");
    following.wait_until_in_step();
    running.kill9();

    let mut running = following.run();
    running.wait_for_log("wait for their copy", SOON);
    following.db.execute("INSERT INTO c VALUES (4, 'four')");
    following.wait_until_in_step();
    d.release();
    a.release();
    following.wait_settled(&mut running);
    let copied = running.copies();
    assert_eq!(copied, ["public.a"]);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.a", "public.b", "public.c", "public.d"]);

    let d = lock(&following, "d");
    following.db.execute("INSERT INTO c VALUES (5, 'five')");
    following.sync();
    d.release();
    following.assert_same(&["public.c", "public.d"]);
}

/// Its snapshot is given back, and what was copied of it stays.
#[test]
fn a_table_that_is_locked_while_it_is_copied_waits_and_goes_on_where_it_was() {
    let following = Following::new("locked_midway");
    following.db.execute(
        "CREATE TABLE large (id int PRIMARY KEY, v text);
         INSERT INTO large SELECT i, repeat('x', 200) FROM generate_series(1, 30000) i;
         CREATE TABLE c (id int PRIMARY KEY); CREATE PUBLICATION rhei FOR TABLE large, c",
    );
    let mut running = slowly(&following.rhei).spawn(["run"]);
    running.wait_for_log("live table=\"public.c\"", SOON);
    let large = lock(&following, "large");
    running.wait_for_log("the rest of the table waits to be copied", SOON);
    following.db.execute("INSERT INTO c VALUES (1)");
    following.wait_until_in_step();
    running.wait_for_log("wait for their copy", SOON);
    following.db.execute("INSERT INTO c VALUES (2)");
    following.wait_until_in_step();
    large.release();
    running.wait_for_log("live table=\"public.large\"", SOON);
    assert!(running.logs().contains("the table's copy goes on where it was"), "{}", running.logs());
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.large", "public.c"]);
}

/// A copy that waits for its table is given up by a stop, and the lock's owner never waits for
/// rhei.
#[test]
fn a_stop_is_heard_while_a_table_is_locked() {
    let following = Following::new("locked_stop");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY);
         CREATE PUBLICATION rhei FOR TABLE t, other",
    );
    let locked = lock(&following, "t");
    let mut syncing = following.rhei.spawn(["sync"]);
    syncing.wait_for_log("waiting for transactions", SOON);
    syncing.sigterm();
    syncing.wait(SOON);
    locked.release();
    following.sync();
    following.assert_same(&["public.t", "public.other"]);
}

/// A table that changes without a pause is copied again while another transaction stays open:
/// neither it nor the stream of the other tables waits for that.
#[test]
fn a_hot_table_is_copied_again_without_holding_the_stream() {
    let following = Following::new("hot");
    following.db.execute(
        "CREATE TABLE hot (id int PRIMARY KEY, n int); INSERT INTO hot SELECT i, 0 FROM \
         generate_series(1, 1000) i;
         CREATE TABLE c (id int PRIMARY KEY)",
    );
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&is_over);
        scope.spawn(|| update_without_pause(&following, &is_over));
        for round in 1..=3 {
            let etl = following.db.session();
            etl.execute("BEGIN; SELECT pg_current_xact_id()");
            let mark = running.log_mark();
            following.rhei.run_ok(["resync", "public.hot"]);
            running.wait_for_log_after(mark, "live table=\"public.hot\"", SOON);
            following.db.execute(&format!("INSERT INTO c VALUES ({round})"));
            following.wait_until_in_step();
            etl.execute("COMMIT");
        }
    });
    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.hot", "public.c"]);
}

/// When the snapshot is known, the stream is past it each time, and a change of the table has gone
/// by. Only a stream that stays behind the source lets the copy begin.
#[test]
fn a_table_that_changes_while_every_snapshot_is_taken_is_copied_in_the_end() {
    let following = Following::new("always_late");
    following.db.execute(
        "CREATE TABLE hot (id int PRIMARY KEY, n int); INSERT INTO hot SELECT i, 0 FROM \
         generate_series(1, 1000) i",
    );
    following.sync();
    // A look at the catalogs has the stream wait for a moment, which would do as well.
    let rhei = following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "1h");
    let mut running = rhei.env("FAILPOINTS", "copy.snapshot=sleep(500)").spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&is_over);
        scope.spawn(|| update_without_pause(&following, &is_over));
        let mark = running.log_mark();
        following.rhei.run_ok(["resync", "public.hot"]);
        running.wait_for_log_after(mark, "live table=\"public.hot\"", SOON);
    });
    following.wait_until_in_step();
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.hot"]);
}

/// PostgreSQL makes a slot only when every transaction that has written is over. The copy of
/// another table needs none: it begins, and goes live, while one transaction keeps a lock as VACUUM
/// FULL does, others have written into that table and are still open, and more of them commit all
/// the time.
#[test]
fn a_table_is_copied_and_goes_live_while_other_transactions_stay_open() {
    let following = Following::new("open_transactions");
    following.db.execute(
        "CREATE TABLE locked (id int PRIMARY KEY); INSERT INTO locked VALUES (1); CREATE TABLE \
         other (id int PRIMARY KEY);
         CREATE PUBLICATION rhei FOR ALL TABLES",
    );
    let mut running =
        following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms").spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    let lock = lock(&following, "locked");

    for round in 0..6 {
        let table = format!("fresh{round}");
        let open = following.db.session();
        following.db.execute(&format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, v text);
             INSERT INTO {table} SELECT i, 'old' FROM generate_series(1, 3000) i"
        ));
        open.execute(&format!(
            "BEGIN; INSERT INTO {table} VALUES (-1, 'late'); UPDATE {table} SET v = 'late' WHERE \
             id = 3000"
        ));
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let over = Over(&is_over);
            for writer in 0..2 {
                let (session, table, is_over) = (following.db.session(), &table, &is_over);
                scope.spawn(move || {
                    let mut id = 1 + writer;
                    while !is_over.load(Ordering::Relaxed) {
                        let fresh = 10_000 + id;
                        session.execute(&format!(
                            "BEGIN; UPDATE {table} SET v = v || 'x' WHERE id = {}; INSERT INTO \
                             {table} VALUES ({fresh}, 'new');
                             DELETE FROM {table} WHERE id = {}; COMMIT",
                            1 + id % 1000,
                            1000 + id % 1000
                        ));
                        id += 2;
                    }
                });
            }
            running.wait_for_log(&format!("live table=\"public.{table}\""), SOON);
            drop(over);
        });
        following.db.execute(&format!("INSERT INTO other VALUES ({round})"));
        following.wait_until_in_step();
        open.execute("COMMIT");
        following.wait_until_in_step();
        let copies = running
            .copies()
            .into_iter()
            .filter(|copied| *copied == format!("public.{table}"))
            .count();
        assert_eq!(copies, 1, "{}", running.logs());
        if round % 2 == 0 {
            running.kill9();
            running =
                following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "100ms").spawn(["run"]);
        }
        following.wait_until_in_step();
    }
    assert!(!running.logs().contains("waiting for transactions"), "{}", running.logs());
    lock.release();
    following.wait_settled(&mut running);
    running.stop(SOON).assert_code(0);
    let mut tables: Vec<String> = (0..6).map(|round| format!("public.fresh{round}")).collect();
    tables.extend(["public.locked".to_owned(), "public.other".to_owned()]);
    following.assert_same(&tables.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Such a table was said to wait for its copy for ever.
#[test]
fn a_table_that_is_dropped_before_its_copy_begins_is_dropped_in_the_copy_too() {
    let following = Following::new("dropped_before");
    following.db.execute(
        "CREATE TABLE stays (id int PRIMARY KEY);
         CREATE PUBLICATION rhei FOR ALL TABLES",
    );
    following.sync();

    following.db.execute("CREATE TABLE brief (id int PRIMARY KEY)");
    let lock = lock(&following, "brief");
    let mut running = following.rhei.spawn(["run"]);
    running.wait_for_log("wait for their copy", SOON);

    lock.0.execute("DROP TABLE brief; COMMIT");
    following.rhei.wait_settled(&mut running, &following.db.wal_lsn(), SOON);
    let status = following.rhei.status().unwrap();
    let tables = status["tables"].as_array().unwrap();
    let brief = tables.iter().find(|table| table["source"] == "public.brief").unwrap();
    assert_eq!(brief["state"], "dropped", "{status:#}");
    following.rhei.run_ok(["verify"]);
    running.stop(SOON).assert_code(0);
}
