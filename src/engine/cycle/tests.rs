use std::{collections::VecDeque, sync::Mutex};

use super::{
    memory_target::{Events, MemoryTarget, Seen},
    *,
};
use crate::{
    change::{Deletes, TableChanges, assemble::Assembler},
    checkpoint::DurableLsn,
    engine::schema::samples::{ORDERS, followed, orders},
    pipeline::Options,
    source::SourcePosition,
};

/// The oid of a second table.
const ITEMS: u32 = ORDERS + 1;

/// A consumer that yields what a test has written down.
struct Script {
    deliveries: VecDeque<Result<Delivery, SourceError>>,
    /// The errors that break the stream while a batch is applied.
    breaks: VecDeque<SourceError>,
    /// Told when the consumer is asked for more while a batch is applied.
    asked: Option<std::sync::mpsc::Sender<()>>,
    acknowledged: Mutex<Vec<Lsn>>,
    position: SourcePosition,
    assembler: Assembler,
}

impl CdcConsumer for Script {
    async fn next_batch(&mut self, _limits: &BatchLimits) -> Result<Delivery, SourceError> {
        self.deliveries.pop_front().unwrap_or(Ok(Delivery::Ended))
    }

    async fn fill(&mut self, _limits: &BatchLimits) -> Result<(), SourceError> {
        if let Some(asked) = &self.asked {
            asked.send(()).unwrap();
        }
        self.breaks.pop_front().map_or(Ok(()), Err)
    }

    fn assembler(&mut self) -> &mut Assembler {
        &mut self.assembler
    }

    fn acknowledge(&self, durable: DurableLsn) {
        self.acknowledged.lock().unwrap().push(durable.lsn());
    }

    fn position(&self) -> SourcePosition {
        self.position
    }
}

/// An engine over a script and a target in memory.
struct Bench {
    engine: SyncEngine<Script, MemoryTarget>,
    target: MemoryTarget,
}

impl Bench {
    fn new(deliveries: impl IntoIterator<Item = ChangeBatch>) -> Self {
        let options = Options::sample();
        let context = Context::new(options, tokio::sync::mpsc::unbounded_channel().0);

        let script = Script {
            deliveries: deliveries.into_iter().map(|batch| Ok(Delivery::Batch(batch))).collect(),
            breaks: VecDeque::new(),
            asked: None,
            acknowledged: Mutex::default(),
            position: SourcePosition::default(),
            assembler: Assembler::new(Lsn(100), []),
        };

        let target = MemoryTarget::default();
        let checkpoint = Checkpoint { lsn: Lsn(100), commit_time_us: None };
        let writer = Writer::new(target.clone());
        Self { engine: SyncEngine::new(script, writer, checkpoint, &context), target }
    }

    /// Refuses the first applies, in order; `None` lets one pass.
    fn refusing(self, refusals: impl IntoIterator<Item = Option<TargetError>>) -> Self {
        self.target.0.lock().unwrap().refusals = refusals.into_iter().collect();
        self
    }

    async fn cycle(&mut self) -> Result<Cycle, EngineError> {
        self.engine.sync_once(CycleOptions::default(), &CancellationToken::new()).await
    }

    fn events(&self) -> std::sync::MutexGuard<'_, Events> {
        self.target.0.lock().unwrap()
    }

    fn committed(&self) -> Vec<Seen> {
        self.events().committed.clone()
    }

    fn acknowledged(&self) -> Vec<Lsn> {
        self.engine.consumer.acknowledged.lock().unwrap().clone()
    }
}

fn table(oid: u32) -> Arc<TableSpec> {
    let mut source = orders();
    source.oid = oid;
    followed(&source)
}

/// One changed row in each of these tables, committed before `end_lsn`.
fn batch(end_lsn: u64, tables: &[u32]) -> ChangeBatch {
    let changes = |oid: &u32| TableChanges {
        table: table(*oid),
        truncate: None,
        deletes: Deletes::ByKey(Vec::new()),
        inserts: Vec::new(),
        patch: None,
        nulled: Vec::new(),
        counts: RowCounts { inserted: 1, ..RowCounts::default() },
    };

    ChangeBatch {
        is_part: false,
        continues: false,
        end_lsn: Lsn(end_lsn),
        commit_times_us: Vec::new(),
        source_transactions: 1,
        schema_changes: Vec::new(),
        tables: tables.iter().map(changes).collect(),
        failed: Vec::new(),
    }
}

fn part(end_lsn: u64, tables: &[u32]) -> ChangeBatch {
    ChangeBatch { is_part: true, ..batch(end_lsn, tables) }
}

fn seen(end_lsn: u64, changed: &[u32], failed: &[u32]) -> Seen {
    Seen { end_lsn: Lsn(end_lsn), changed: changed.to_vec(), failed: failed.to_vec() }
}

/// An error that concerns the rows of one table.
fn refused(oid: u32) -> TargetError {
    let source = Box::new(TargetError::saying("Conversion Error: 1e400 is out of range"));
    TargetError::Table { oid, table: format!("public.t{oid}"), source }
}

fn diverged(oid: u32) -> TargetError {
    let source = TargetError::Diverged { what: "rows to delete", expected: 1, found: 0 };
    TargetError::Table { oid, table: format!("public.t{oid}"), source: Box::new(source) }
}

fn conflict() -> TargetError {
    TargetError::saying("TransactionContext Error: Failed to commit: write-write conflict")
}

fn failure(oid: u32, remedy: Remedy) -> TableFailure {
    let spec = table(oid);
    TableFailure { oid, table: spec.source.clone(), reason: "a test".to_owned(), remedy }
}

#[tokio::test]
async fn a_batch_is_acknowledged_once_it_is_committed() {
    let mut bench = Bench::new([batch(200, &[ORDERS]), batch(300, &[ORDERS])]);

    let cycle = bench.cycle().await.unwrap();
    assert_eq!((cycle.report.inserted, cycle.report.checkpoint), (1, Lsn(200)));
    assert_eq!(cycle.next, NextStep::Wait);
    assert_eq!(bench.acknowledged(), [Lsn(200)]);

    bench.cycle().await.unwrap();
    assert_eq!(bench.acknowledged(), [Lsn(200), Lsn(300)]);
    assert_eq!(bench.committed(), [seen(200, &[ORDERS], &[]), seen(300, &[ORDERS], &[])]);
}

#[tokio::test]
async fn a_batch_that_is_refused_as_a_whole_moves_nothing() {
    let refused = TargetError::saying("IO Error: No space left on device");
    let mut bench = Bench::new([batch(200, &[ORDERS])]).refusing([Some(refused)]);

    assert!(bench.cycle().await.is_err());
    assert_eq!(bench.engine.checkpoint().lsn, Lsn(100));
    assert!(bench.acknowledged().is_empty() && bench.committed().is_empty());
}

#[tokio::test]
async fn a_table_that_is_refused_is_paused_and_the_others_go_on_in_the_same_batch() {
    let first = batch(200, &[ORDERS, ITEMS]);
    let mut bench =
        Bench::new([first, batch(300, &[ORDERS, ITEMS])]).refusing([Some(refused(ORDERS))]);

    let cycle = bench.cycle().await.unwrap();
    let paused: Vec<(u32, Remedy)> =
        cycle.report.paused.iter().map(|failure| (failure.oid, failure.remedy)).collect();
    assert_eq!(paused, [(ORDERS, Remedy::Operator)]);

    // What comes for the table later is not applied any more.
    bench.cycle().await.unwrap();
    let expected = [seen(200, &[ITEMS], &[ORDERS]), seen(300, &[ITEMS], &[])];
    assert_eq!(bench.committed(), expected);
}

#[tokio::test]
async fn two_tables_that_are_refused_are_both_paused() {
    let refusals = [Some(refused(ITEMS)), Some(refused(ORDERS))];
    let mut bench = Bench::new([batch(200, &[ORDERS, ITEMS])]).refusing(refusals);

    bench.cycle().await.unwrap();
    assert_eq!(bench.committed(), [seen(200, &[], &[ITEMS, ORDERS])]);
}

#[tokio::test]
async fn an_error_about_a_table_that_is_not_in_the_batch_is_not_hidden() {
    let mut bench = Bench::new([batch(200, &[ORDERS])]).refusing([Some(refused(ITEMS))]);
    assert!(matches!(bench.cycle().await, Err(EngineError::Target(_))));
}

#[tokio::test]
async fn a_table_that_is_refused_while_it_is_copied_is_copied_again() {
    let mut bench = Bench::new([batch(200, &[ORDERS])]).refusing([Some(refused(ORDERS))]);
    bench.engine.copying.insert(ORDERS, table(ORDERS));

    let cycle = bench.cycle().await.unwrap();
    assert_eq!(cycle.report.paused[0].remedy, Remedy::CopyAgain);
    assert_eq!(bench.engine.take_to_copy(), BTreeSet::from([ORDERS]));
    assert!(bench.engine.copying.is_empty());
}

#[tokio::test]
async fn a_copy_that_differs_without_a_known_cause_is_for_the_operator() {
    let mut bench = Bench::new([batch(200, &[ORDERS])]).refusing([Some(diverged(ORDERS))]);

    let cycle = bench.cycle().await.unwrap();
    assert_eq!(cycle.report.paused[0].remedy, Remedy::Operator);
    assert!(!bench.engine.has_to_copy());
}

#[tokio::test]
async fn a_table_that_was_copied_again_too_often_is_paused() {
    let again = |end_lsn| ChangeBatch {
        failed: vec![failure(ORDERS, Remedy::CopyAgain)],
        ..batch(end_lsn, &[])
    };
    let mut bench = Bench::new((0..=MAX_RECOPIES as u64).map(|number| again(200 + number)));

    let mut remedies = Vec::new();
    for _ in 0..=MAX_RECOPIES {
        remedies.push(bench.cycle().await.unwrap().report.paused[0].remedy);
    }
    assert_eq!(remedies.pop(), Some(Remedy::Operator));
    assert!(remedies.iter().all(|remedy| *remedy == Remedy::CopyAgain));
}

#[tokio::test]
async fn the_parts_of_a_transaction_are_committed_and_acknowledged_together() {
    let parts = [part(150, &[ORDERS]), part(160, &[ORDERS]), batch(200, &[ITEMS])];
    let mut bench = Bench::new(parts);

    let cycle = bench.cycle().await.unwrap();
    assert_eq!((cycle.report.inserted, cycle.report.checkpoint), (3, Lsn(200)));
    assert_eq!(bench.acknowledged(), [Lsn(200)]);
    assert_eq!(bench.committed().len(), 3);
    assert_eq!(bench.events().rolled_back, 0);
}

#[tokio::test]
async fn parts_without_an_end_are_rolled_back() {
    let mut bench = Bench::new([part(150, &[ORDERS])]);

    let cycle = bench.cycle().await.unwrap();
    assert_eq!(cycle.next, NextStep::EndOfStream);
    assert_eq!(bench.engine.checkpoint().lsn, Lsn(100));
    assert_eq!(bench.events().rolled_back, 1);
    assert_eq!(bench.committed(), []);
    assert!(bench.acknowledged().is_empty());
}

#[tokio::test]
async fn a_table_that_is_refused_within_parts_is_left_out_when_they_are_read_again() {
    let parts = [part(150, &[ORDERS]), batch(200, &[ORDERS])];
    let mut bench = Bench::new(parts).refusing([None, Some(refused(ORDERS))]);

    let cycle = bench.cycle().await.unwrap();
    assert!(matches!(cycle.next, NextStep::Reattach(_)), "{:?}", cycle.next);
    assert_eq!(cycle.report.checkpoint, Lsn(100));

    // Only the pause is committed, at the old checkpoint.
    assert_eq!(bench.committed(), [seen(100, &[], &[ORDERS])]);
    assert!(bench.acknowledged().is_empty());
}

#[tokio::test]
async fn a_table_that_fails_at_the_source_within_parts_is_left_out_too() {
    let end =
        ChangeBatch { failed: vec![failure(ITEMS, Remedy::CopyAltered)], ..batch(200, &[ORDERS]) };
    let mut bench = Bench::new([part(150, &[ORDERS]), end]);

    let cycle = bench.cycle().await.unwrap();
    assert!(matches!(cycle.next, NextStep::Reattach(_)), "{:?}", cycle.next);
    assert_eq!(bench.committed(), [seen(100, &[], &[ITEMS])]);
}

#[tokio::test]
async fn a_conflict_within_parts_begins_another_session() {
    let parts = [part(150, &[ORDERS]), batch(200, &[ORDERS])];
    let mut bench = Bench::new(parts).refusing([None, Some(conflict())]);

    assert!(matches!(bench.cycle().await, Err(EngineError::Busy)));
    assert!(bench.committed().is_empty() && bench.acknowledged().is_empty());
}

#[tokio::test]
async fn a_stop_comes_before_anything_that_is_waiting() {
    let mut bench = Bench::new([batch(200, &[ORDERS])]);
    let stop = CancellationToken::new();
    stop.cancel();

    let cycle = bench.engine.sync_once(CycleOptions::default(), &stop).await.unwrap();
    assert_eq!(cycle.next, NextStep::Stop);
    assert!(bench.committed().is_empty());
}

#[tokio::test]
async fn a_full_batch_is_followed_by_the_next_one_at_once() {
    let mut bench = Bench::new([batch(200, &[ORDERS, ITEMS]), batch(300, &[ORDERS])]);
    bench.engine.limits.max_rows = 2;

    assert_eq!(bench.cycle().await.unwrap().next, NextStep::Continue);
    assert_eq!(bench.cycle().await.unwrap().next, NextStep::Wait);
}

#[tokio::test]
async fn a_stream_that_breaks_during_a_batch_ends_the_next_cycle_and_not_this_one() {
    let mut bench = Bench::new([batch(200, &[ORDERS]), batch(300, &[ORDERS])]);
    bench.engine.consumer.breaks.push_back(SourceError::StreamEnded);

    // The target waits until the consumer was asked for more.
    let (asked, gate) = std::sync::mpsc::channel();
    bench.engine.consumer.asked = Some(asked);
    bench.events().gate = Some(gate);

    bench.cycle().await.unwrap();
    assert_eq!(bench.acknowledged(), [Lsn(200)]);
    assert!(matches!(bench.cycle().await, Err(EngineError::Source(SourceError::StreamEnded))));
    assert_eq!(bench.committed().len(), 1);
}

#[tokio::test]
async fn an_idle_position_is_saved_when_a_copy_or_the_server_waits_for_it_or_it_is_far_ahead() {
    let saved = |options: CycleOptions, end_lsn: u64, reply_requested: bool| async move {
        let mut bench = Bench::new([batch(end_lsn, &[])]);
        bench.engine.consumer.position.reply_requested = reply_requested;
        bench.engine.sync_once(options, &CancellationToken::new()).await.unwrap();
        !bench.committed().is_empty()
    };
    let (idle, save) =
        (CycleOptions::default(), CycleOptions { save_idle: true, ..CycleOptions::default() });

    for (name, options, end_lsn, reply_requested, expected) in [
        ("a little further", idle, 200, false, false),
        ("a little further, and asked for", save, 200, false, true),
        ("a little further, and the server waits", idle, 200, true, true),
        ("no further, and asked for", save, 100, false, false),
        ("no further, and the server waits", idle, 100, true, false),
        ("far behind", idle, 100 + IDLE_BYTES, false, true),
    ] {
        assert_eq!(saved(options, end_lsn, reply_requested).await, expected, "{name}");
    }
}

#[tokio::test]
async fn a_truncate_ends_the_copy_of_its_table() {
    let mut truncating = batch(200, &[ORDERS]);
    truncating.tables[0].truncate = Some(700);
    let mut bench = Bench::new([truncating]);
    bench.engine.copying.insert(ORDERS, table(ORDERS));

    bench.cycle().await.unwrap();
    assert!(bench.engine.copying.is_empty());
    assert!(bench.engine.catching_up.contains_key(&ORDERS));
}

#[tokio::test]
async fn a_question_without_catalogs_is_answered_with_the_shape_that_is_known() {
    let question = crate::change::followed::SchemaQuery {
        relation: crate::engine::schema::samples::relation(&orders()),
        commit_lsn: Lsn(150),
        xid: 700,
        description: None,
        has_open_rows: false,
        has_parts: false,
    };
    let mut bench = Bench::new([batch(200, &[ORDERS])]);
    bench.engine.consumer.deliveries.push_front(Ok(Delivery::SchemaQuery(question)));

    assert_eq!(bench.cycle().await.unwrap().report.checkpoint, Lsn(200));
}
