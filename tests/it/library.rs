//! The library's own face: a feed of Arrow batches without a copy, and a sync into a file.

use std::time::Duration;

use arrow::array::{AsArray, RecordBatch};
use rhei::{
    ChangeBatch, Context, Deletes, Environment, Event, Feed, Options, Recopy, SourceOptions,
    TargetOptions, sync,
};
use tokio_util::sync::CancellationToken;

use crate::{bed::Db, following::Following};

fn block_on<F: Future>(work: F) -> F::Output {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(work)
}

fn options(following: &Following) -> Options {
    let source = SourceOptions::parse(&following.db.url(), &Environment::default()).unwrap();
    let target = TargetOptions::new(following.copy());
    Options {
        slot: following.slot().to_owned(),
        interval: Duration::from_millis(50),
        ..Options::new(source, target)
    }
}

async fn next(feed: &mut Feed) -> ChangeBatch {
    tokio::time::timeout(Duration::from_secs(60), feed.next()).await.unwrap().unwrap()
}

/// The values of the first column, an integer.
fn ids(batches: &[RecordBatch]) -> Vec<i32> {
    let of = |batch: &RecordBatch| {
        let column = batch.column(0).as_primitive::<arrow::datatypes::Int32Type>();
        column.values().to_vec()
    };
    batches.iter().flat_map(of).collect()
}

fn changed(batch: &ChangeBatch) -> (Vec<i32>, Vec<i32>) {
    let changes = &batch.tables[0];
    let (Deletes::ByKey(deletes) | Deletes::Rows(deletes)) = &changes.deletes;
    (ids(deletes), ids(&changes.inserts))
}

fn with_table(name: &str) -> Following {
    let following = Following::new(name);
    following
        .db
        .execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')");
    following
}

fn execute(db: &Db, sql: &str) {
    tokio::task::block_in_place(|| db.execute(sql));
}

#[test]
fn a_feed_begins_when_its_slot_is_made_and_brings_what_was_not_acknowledged_again() {
    let following = with_table("feed");
    let (db, options) = (&following.db, options(&following));

    block_on(async {
        let mut feed = Feed::open(&options).await.unwrap();
        execute(db, "UPDATE t SET v = 'b'; INSERT INTO t VALUES (2, 'c')");
        let first = next(&mut feed).await;
        assert_eq!(changed(&first), (vec![1], vec![1, 2]));
        feed.acknowledge(first.end_lsn);

        execute(db, "DELETE FROM t WHERE id = 2");
        let second = next(&mut feed).await;
        assert_eq!(changed(&second), (vec![2], vec![]));
        feed.close().await.unwrap();

        // The second batch was not acknowledged, the first one was.
        let mut feed = Feed::open(&options).await.unwrap();
        let again = next(&mut feed).await;
        assert_eq!(changed(&again), (vec![2], vec![]));
        assert!(again.end_lsn >= second.end_lsn);
        feed.acknowledge(again.end_lsn);
        feed.close().await.unwrap();
    });
}

#[test]
fn a_feed_says_which_table_has_another_shape_and_brings_the_others() {
    let following = with_table("feed_shapes");
    following.db.execute("CREATE TABLE other (id int PRIMARY KEY)");
    let (db, options) = (&following.db, options(&following));

    block_on(async {
        let mut feed = Feed::open(&options).await.unwrap();
        execute(db, "ALTER TABLE t ADD COLUMN more int; INSERT INTO t VALUES (2, 'c', 3)");
        let batch = next(&mut feed).await;
        assert!(batch.tables.is_empty());
        assert_eq!(batch.failed[0].table.to_string(), "public.t");
        feed.acknowledge(batch.end_lsn);

        execute(db, "INSERT INTO other VALUES (7)");
        assert_eq!(changed(&next(&mut feed).await), (vec![], vec![7]));
        feed.close().await.unwrap();

        // A new feed knows the new shape.
        let mut feed = Feed::open(&options).await.unwrap();
        execute(db, "INSERT INTO t VALUES (3, 'd', 4)");
        loop {
            let batch = next(&mut feed).await;
            let of_t = batch.tables.iter().find(|changes| changes.table.source.name == "t");
            if let Some(changes) = of_t {
                assert_eq!(ids(&changes.inserts), [3]);
                assert_eq!(changes.inserts[0].num_columns(), 3);
                break;
            }
        }
        feed.close().await.unwrap();
    });
}

#[test]
fn the_library_brings_a_file_up_to_date_and_reports_what_it_copied() {
    let following = with_table("library_sync");
    let options = options(&following);

    block_on(async {
        let (events, mut happenings) = tokio::sync::mpsc::unbounded_channel();
        let context = Context::new(options, events);
        let stop = CancellationToken::new();

        sync(&context, Recopy::None, &stop).await.unwrap();
        execute(&following.db, "INSERT INTO t VALUES (2, 'b'), (3, 'c')");
        let report = sync(&context, Recopy::None, &stop).await.unwrap();
        assert_eq!((report.inserted, report.source_transactions), (2, 1));

        drop(context);
        let mut copied = Vec::new();
        while let Some(event) = happenings.recv().await {
            if let Event::CopyFinished { table, rows } = event {
                copied.push((table, rows));
            }
        }
        assert_eq!(copied, [("public.t".to_owned(), 1)]);
    });
    following.assert_same(&["public.t"]);
}
