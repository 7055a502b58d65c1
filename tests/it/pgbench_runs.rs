//! Under pgbench: equal row for row, consistent at every sync, whole after any kill.

use std::time::Duration;

use crate::{
    bed::{Load, Pgbench, oracle::query_copy},
    following::{Following, from_env},
};

const SOON: Duration = Duration::from_secs(120);

const TABLES: [&str; 4] = [
    "public.pgbench_accounts",
    "public.pgbench_branches",
    "public.pgbench_history",
    "public.pgbench_tellers",
];

#[test]
fn four_tables_are_equal_row_for_row_after_tpcb() {
    let following = Following::new("tpcb");
    Pgbench::init(&following.db, from_env("RHEI_TEST_PGBENCH_SCALE", 1) as u32);
    following.sync();
    Pgbench::start(&following.db, &Load::transactions(500)).wait(SOON);
    following.sync();
    following.assert_same(&TABLES);
}

/// The invariant of TPC-B holds at every source commit, so it must hold in every state of the copy.
#[test]
fn each_sync_under_load_shows_the_source_at_one_commit() {
    let following = Following::new("under_load");
    Pgbench::init(&following.db, 1);
    let load = Pgbench::start(&following.db, &Load::seconds(600));
    for _ in 0..6 {
        following.sync();
        let sums = query_copy(
            following.copy(),
            "SELECT (SELECT sum(abalance) FROM public.pgbench_accounts)::VARCHAR, (SELECT \
             sum(tbalance) FROM public.pgbench_tellers)::VARCHAR,
                    (SELECT sum(bbalance) FROM public.pgbench_branches)::VARCHAR,
                    (SELECT coalesce(sum(delta), 0) FROM public.pgbench_history)::VARCHAR",
        );
        let sums = &sums[0];
        assert!(
            sums.iter().all(|sum| sum == &sums[0]),
            "torn: accounts, tellers, branches, history = {sums:?}"
        );
    }
    load.stop();
    following.sync();
    following.assert_same(&TABLES);
}

/// `pgbench_history` has no key, so anything applied twice or lost shows.
#[test]
fn kill_at_random_moments_loses_nothing_and_repeats_nothing() {
    let kills = from_env("RHEI_TEST_KILLS", 8);
    let seed = from_env("RHEI_TEST_SEED", 20_261_120);
    println!("RHEI_TEST_KILLS={kills} RHEI_TEST_SEED={seed}");
    let following = Following::new("killed");
    Pgbench::init(&following.db, 1);
    let load = Pgbench::start(&following.db, &Load::seconds(600));
    let mut state = seed;
    for _ in 0..kills {
        let running = following.run();
        // xorshift: a moment between 0 and 1.5 s, anywhere in start, copy, apply, commit and
        // acknowledgement.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // The moment itself is the input here, so this is a wait for nothing else.
        std::thread::sleep(Duration::from_millis(state % 1500));
        running.kill9();
    }
    load.stop();
    following.sync();
    following.assert_same(&TABLES);
}

/// Trap 25: a stopped run has told the source everything that is durable.
#[test]
fn a_terminated_run_has_saved_and_acknowledged_its_checkpoint() {
    let following = Following::new("terminated_run");
    Pgbench::init(&following.db, 1);
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    Pgbench::start(&following.db, &Load::transactions(100)).wait(SOON);
    let ended = running.stop(SOON);
    ended.assert_code(0);
    let slot = following.slot();
    let confirmed = following.db.value(&format!(
        "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{slot}' AND NOT \
         active"
    ));
    let stored = query_copy(following.copy(), "SELECT checkpoint_lsn FROM _rhei.pipeline");
    assert_eq!(stored[0][0].as_deref(), Some(confirmed.as_str()));
    following.sync();
    following.assert_same(&TABLES);
}
