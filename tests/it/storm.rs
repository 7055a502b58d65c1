//! Everything at once: what applications, migrations and operators do to tables while a run follows
//! them, and locks, deadlocks, cancelled statements and ended sessions beside it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use crate::{
    bed::{Cluster, ClusterOptions, Session, oracle::query_copy},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);
const TABLES: u32 = 5;

type Dice = Xoshiro256PlusPlus;

/// One of those who act at the source until the storm is over. Most of what they do may fail, as by
/// a lock or a deadlock.
type Actor = fn(&Session, &mut Dice);

fn table(dice: &mut Dice) -> String {
    format!("t{}", dice.random_range(0..TABLES))
}

fn pick<'a>(dice: &mut Dice, of: &[&'a str]) -> &'a str {
    of[dice.random_range(0..of.len())]
}

fn attempt(session: &Session, sql: &str) {
    if session.try_query(sql).is_err() {
        let _ = session.try_query("ROLLBACK");
    }
}

fn writes(session: &Session, dice: &mut Dice) {
    let (table, id) = (table(dice), dice.random_range(0..2000));
    let (leaf, key) = (dice.random_range(0..4), dice.random_range(0..400));
    attempt(
        session,
        &match dice.random_range(0..7) {
            0 => format!(
                "INSERT INTO {table} (id, a) SELECT i, i FROM generate_series({id}, {id} + 50) i \
                 ON CONFLICT DO NOTHING"
            ),
            1 => format!("UPDATE {table} SET a = {key}, v = repeat('x', {key}) WHERE id = {id}"),
            2 => format!("DELETE FROM {table} WHERE id BETWEEN {id} AND {id} + 20"),
            3 => format!(
                "INSERT INTO tree VALUES ({key}, 'v{id}') ON CONFLICT (id) DO UPDATE SET v = \
                 'again'"
            ),
            4 => format!(
                "INSERT INTO p{leaf} VALUES ({}, 'leaf') ON CONFLICT DO NOTHING",
                leaf * 100 + key % 100
            ),
            5 => {
                format!(
                    "BEGIN; UPDATE {table} SET a = a + 1 WHERE id < 50; DELETE FROM tree WHERE id \
                     = {key}; COMMIT"
                )
            }
            _ => format!(
                "BEGIN; INSERT INTO {table} (id) VALUES ({id}) ON CONFLICT DO NOTHING; ROLLBACK"
            ),
        },
    );
}

fn creates_and_drops(session: &Session, dice: &mut Dice) {
    let number = dice.random_range(0..4);
    attempt(
        session,
        &match dice.random_range(0..5) {
            0 | 1 => {
                format!(
                    "CREATE TABLE d{number} (id int PRIMARY KEY, v text); INSERT INTO d{number} \
                     VALUES (1, 'new')"
                )
            }
            2 => format!("DROP TABLE d{number}"),
            3 => format!("ALTER TABLE d{number} RENAME TO d{}", dice.random_range(0..4)),
            _ => format!(
                "BEGIN; DROP TABLE d{number}; CREATE TABLE d{number} (id int PRIMARY KEY, n int); \
                 COMMIT"
            ),
        },
    );
}

fn moves_partitions(session: &Session, dice: &mut Dice) {
    let leaf = dice.random_range(0..4);
    let bounds = format!("FOR VALUES FROM ({}) TO ({})", leaf * 100, leaf * 100 + 100);
    attempt(
        session,
        &match dice.random_range(0..6) {
            0 => format!("ALTER TABLE tree DETACH PARTITION p{leaf} CONCURRENTLY"),
            1 => format!("ALTER TABLE tree DETACH PARTITION p{leaf}"),
            2 | 3 => format!("ALTER TABLE tree ATTACH PARTITION p{leaf} {bounds}"),
            4 => format!(
                "BEGIN; DROP TABLE p{leaf}; CREATE TABLE p{leaf} PARTITION OF tree {bounds}; COMMIT"
            ),
            _ => format!("TRUNCATE p{leaf}"),
        },
    );
    attempt(session, &format!("ALTER TABLE tree DETACH PARTITION p{leaf} FINALIZE"));
}

fn maintains(session: &Session, dice: &mut Dice) {
    let table = table(dice);
    attempt(
        session,
        &match dice.random_range(0..7) {
            0 => format!("VACUUM FULL {table}"),
            1 => format!("CLUSTER {table} USING {table}_pkey"),
            2 => format!("REINDEX TABLE CONCURRENTLY {table}"),
            3 => format!("CREATE INDEX CONCURRENTLY {table}_a ON {table} (a)"),
            4 => format!("DROP INDEX CONCURRENTLY IF EXISTS {table}_a"),
            5 => format!("TRUNCATE {table}"),
            _ => format!("VACUUM ANALYZE {table}"),
        },
    );
}

fn alters(session: &Session, dice: &mut Dice) {
    let table = table(dice);
    let (kind, default) =
        (pick(dice, &["int", "bigint", "numeric", "text"]), dice.random_range(0..100));
    attempt(
        session,
        &match dice.random_range(0..6) {
            0 => format!("ALTER TABLE {table} ADD COLUMN extra int DEFAULT {default}"),
            1 => format!("ALTER TABLE {table} DROP COLUMN extra"),
            2 => format!("ALTER TABLE {table} ALTER a TYPE {kind} USING NULL"),
            3 => format!(
                "BEGIN; ALTER TABLE {table} RENAME v TO w; INSERT INTO {table} (id, w) VALUES \
                 (-{default}, 'renamed'); COMMIT"
            ),
            4 => format!("ALTER TABLE {table} RENAME w TO v"),
            _ => format!(
                "ALTER TABLE {table} ADD COLUMN u uuid DEFAULT gen_random_uuid(), DROP COLUMN IF \
                 EXISTS u"
            ),
        },
    );
    std::thread::sleep(Duration::from_millis(100));
}

fn locks(session: &Session, dice: &mut Dice) {
    let (first, second) = (table(dice), table(dice));
    let mode = pick(dice, &["ACCESS EXCLUSIVE", "SHARE", "EXCLUSIVE"]);
    let seconds = pick(dice, &["0.01", "0.1", "1.5"]);
    attempt(
        session,
        &format!(
            "BEGIN; LOCK TABLE {first} IN {mode} MODE; SELECT pg_sleep({seconds}); LOCK TABLE \
             {second} IN {mode} MODE; COMMIT"
        ),
    );
    std::thread::sleep(Duration::from_millis(200));
}

/// As an operator does who looks for what is in the way.
fn interferes(session: &Session, dice: &mut Dice) {
    std::thread::sleep(Duration::from_millis(700));
    let what = pick(
        dice,
        &["pg_cancel_backend", "pg_cancel_backend", "pg_cancel_backend", "pg_terminate_backend"],
    );
    attempt(
        session,
        &format!(
            "SELECT {what}(pid) FROM pg_stat_activity WHERE application_name LIKE 'rhei%' AND \
             datname = current_database() \
             ORDER BY random() LIMIT 1"
        ),
    );
}

/// `RHEI_TEST_STORM_SECONDS` has it last longer, `RHEI_TEST_SEED` be another one.
#[test]
fn a_run_outlives_a_storm_of_locks_and_schema_changes_and_is_equal_after_it() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let lasts = Duration::from_secs(number("RHEI_TEST_STORM_SECONDS").unwrap_or(60));
    let seed = number("RHEI_TEST_SEED").unwrap_or(20_261_129);
    let options =
        ClusterOptions::default().conf("deadlock_timeout = '100ms'").conf("lock_timeout = '5s'");
    let cluster = Cluster::start(options);
    let following = Following::of(cluster.database("storm"));
    for number in 0..TABLES {
        following.db.execute(&format!(
            "CREATE TABLE t{number} (id int PRIMARY KEY, a int, v text);
             INSERT INTO t{number} SELECT i, i, 'v' FROM generate_series(1, 1000) i"
        ));
    }
    following.db.execute(
        "CREATE TABLE tree (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         CREATE TABLE p0 PARTITION OF tree FOR VALUES FROM (0) TO (100);
         CREATE TABLE p1 PARTITION OF tree FOR VALUES FROM (100) TO (200);
         CREATE TABLE p2 PARTITION OF tree FOR VALUES FROM (200) TO (300);
         CREATE TABLE p3 PARTITION OF tree FOR VALUES FROM (300) TO (400);
         CREATE PUBLICATION rhei FOR ALL TABLES",
    );
    let mut running =
        following.rhei.clone().env("RHEI_SYNC_CATALOG_INTERVAL", "300ms").spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);

    let over = Arc::new(AtomicBool::new(false));
    let actors: [Actor; 9] = [
        writes,
        writes,
        creates_and_drops,
        moves_partitions,
        maintains,
        alters,
        locks,
        locks,
        interferes,
    ];
    let actors: Vec<_> = (0..)
        .zip(actors)
        .map(|(number, actor)| {
            let (session, over) = (following.db.session(), Arc::clone(&over));
            let mut dice = Dice::seed_from_u64(seed + number);
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    actor(&session, &mut dice);
                }
            })
        })
        .collect();
    let end = Instant::now() + lasts;
    while running.is_running() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    over.store(true, Ordering::Relaxed);
    actors.into_iter().for_each(|actor| actor.join().unwrap());
    assert!(running.is_running(), "seed {seed}: the run has ended\n{}", running.logs());

    following.wait_settled(&mut running);
    // Whatever the storm has led to, the stream alone brings what comes after it.
    let mark = running.log_mark();
    for number in 0..TABLES {
        following.db.execute(&format!(
            "DELETE FROM t{number} WHERE id % 3 = 0; INSERT INTO t{number} (id) VALUES (-1000)"
        ));
    }
    following.wait_settled(&mut running);
    running.assert_no_copies_since(mark);
    let logs = running.logs();
    running.stop(SOON).assert_code(0);

    let paused = query_copy(
        following.copy(),
        "SELECT source_name, error FROM _rhei.tables WHERE state = 'error'",
    );
    assert!(paused.is_empty(), "seed {seed}: {paused:?}\n{logs}");
    println!("seed {seed}: {} copies", logs.matches(" copied table=").count());
    following.assert_all_same();
}
