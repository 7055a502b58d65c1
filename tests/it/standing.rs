//! The source and the copy are brought to one LSN while both go on: what `verify` stands on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arrow::array::AsArray;
use rhei::{
    Context, DuckDb, Environment, Options, SourceOptions, TargetOptions, Writer,
    internals::{backfill::stand, olap::TargetReader},
};
use tokio_util::sync::CancellationToken;

use crate::following::Following;

/// What both sides compute over all rows.
const SUMS: &str = "SELECT count(*)::bigint, coalesce(sum(id * 1000003 + v), 0)::bigint, \
                    (SELECT count(*) FROM public.log)::bigint FROM public.t";

fn options(following: &Following) -> Options {
    let source = SourceOptions::parse(&following.db.url(), &Environment::default()).unwrap();
    Options {
        slot: following.slot().to_owned(),
        interval: Duration::from_millis(50),
        ..Options::new(source, TargetOptions::new(following.copy()))
    }
}

/// Changes rows of two tables without a pause, each time in one transaction, until `stop`.
fn load(following: &Following, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let (session, stop) = (following.db.session(), Arc::clone(stop));
    std::thread::spawn(move || {
        let mut number = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            number += 1;
            session.execute(&format!(
                "BEGIN; UPDATE t SET v = v + {number} WHERE id = {number} % 100; \
                 INSERT INTO log VALUES ({number}); \
                 DELETE FROM t WHERE id = 1000 + {number} - 5; \
                 INSERT INTO t VALUES (1000 + {number}, {number}); COMMIT"
            ));
        }
        number
    })
}

#[test]
fn both_sides_stand_at_one_commit_while_rows_change_without_a_pause() {
    let following = Following::new("standing");
    following.db.execute(
        "CREATE TABLE t (id bigint PRIMARY KEY, v bigint); INSERT INTO t SELECT i, i FROM \
         generate_series(0, 99) i; CREATE TABLE log (number bigint PRIMARY KEY)",
    );
    following.sync();

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let is_over = Arc::new(AtomicBool::new(false));
    let loading = load(&following, &is_over);

    let seen = runtime.block_on(async {
        let (events, _happenings) = tokio::sync::mpsc::unbounded_channel();
        let context = Context::new(options(&following), events);
        let writer = Writer::new(DuckDb::open(&context.options.target).unwrap());

        let stop = CancellationToken::new();
        let (of_run, writer_of_run, stop_of_run) = (context.clone(), writer.clone(), stop.clone());
        let running = tokio::spawn(async move {
            let (_commands, commands) = tokio::sync::mpsc::unbounded_channel();
            rhei::run(&of_run, &writer_of_run, commands, &stop_of_run).await
        });

        let mut seen = Vec::new();
        for _ in 0..10 {
            let mut standing = stand(&context, &writer, 2).await.unwrap();

            let at_source = tokio::task::block_in_place(|| {
                let session = following.db.session();
                session.execute(&format!(
                    "BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{}'",
                    standing.snapshot.ids[0]
                ));
                let row = session.query(SUMS).remove(0);
                row.into_iter().map(|value| value.unwrap().parse().unwrap()).collect::<Vec<i64>>()
            });

            // Each reader sees the same, however late it asks.
            for reader in &mut standing.readers {
                let mut in_copy = Vec::new();
                let mut take = |batch: arrow::record_batch::RecordBatch| {
                    in_copy.extend(batch.columns().iter().map(|column| {
                        column.as_primitive::<arrow::datatypes::Int64Type>().value(0)
                    }));
                    Ok(())
                };
                tokio::task::block_in_place(|| reader.select(SUMS, &mut take)).unwrap();
                assert_eq!(in_copy, at_source, "at {}", standing.lsn);
            }
            seen.push(at_source[2]);
        }

        stop.cancel();
        running.await.unwrap().unwrap();
        seen
    });

    is_over.store(true, Ordering::Relaxed);
    assert!(loading.join().unwrap() > 0);

    // The load went on from one standing to the next.
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "{seen:?}");
    following.sync();
    following.assert_same(&["public.t", "public.log"]);
}
