//! Copies that run beside the stream and outlive its sessions, one round after the other.
//!
//! A round reports what it has done ([`RoundUpdate`]), and the task that follows the stream acts
//! upon the report between two batches ([`super::SyncEngine::handle_copy_event`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    backfill::{self, CopyEvent, CopyOutcome, CopyRound, SlotWithSnapshot},
    engine::supervisor::RestartBudget,
    error::error_chain,
    olap::OlapEngine,
    pgoutput::QualifiedName,
    pipeline::{
        Context, EngineError, Writer,
        error_policy::{Policy, policy},
        options::Budget,
    },
    source::LsnBarrier,
};

/// How far the stream stays behind the source while the next round begins, after a round that came
/// too late for a table. The distance doubles each time.
const FIRST_TRAIL: Duration = Duration::from_millis(200);
const MAX_TRAIL: Duration = Duration::from_secs(20);
/// A round begins when the stream has found no other table to copy for this time,
const QUIET_BEFORE_ROUND: Duration = Duration::from_secs(1);
/// and after this time at the latest.
const MAX_WAIT_FOR_QUIET: Duration = Duration::from_secs(10);
/// How long the scheduler waits before it asks about locked tables again. It names them in the log
/// every minute.
const LOCKED_PAUSE: Duration = Duration::from_secs(1);
const LOCKED_WARNING: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// A failure of a round that has run for this time does not count with the failure of the round
/// before.
const QUIET_PERIOD: Duration = Duration::from_secs(60);
/// How often the copy of one table is restarted because its rows did not fit or the table changed.
const MAX_COPY_RESTARTS: u32 = 10;

/// Something that a round reports.
pub enum RoundUpdate {
    Event(CopyEvent),
    /// The round has ended, and these tables were not done.
    Ended {
        unfinished: BTreeSet<u32>,
    },
}

/// The tables that have to be copied, and the round that copies some of them.
pub struct CopyScheduler<T> {
    context: Context,
    writer: Writer<T>,
    hold: LsnBarrier,
    wanted: BTreeSet<u32>,
    first: Option<SlotWithSnapshot>,
    running: Option<Running>,
    /// Rounds in a row that came too late for a table.
    races: u32,
    failures: RoundFailures,
    restarts: CopyRestarts,
    not_before: Option<Instant>,
    /// When the first of the wanted tables was asked for.
    wanted_since: Instant,
    /// When tables that are locked were named last.
    said_locked: Option<Instant>,
    is_paused: bool,
}

struct Running {
    task: JoinHandle<Result<(), EngineError>>,
    events: mpsc::Receiver<CopyEvent>,
    stop: CancellationToken,
    /// The tables for which the round was begun.
    asked: BTreeSet<u32>,
    /// The tables whose copies were adopted and are not done.
    tables: BTreeSet<u32>,
    began: Instant,
}

impl<T: OlapEngine + 'static> CopyScheduler<T> {
    /// Creates a scheduler. `patience` is how often in a row a round may fail before that is an
    /// error.
    pub fn new(context: &Context, writer: &Writer<T>, patience: u32) -> Self {
        Self {
            context: context.clone(),
            writer: writer.clone(),
            hold: context.barrier.clone(),
            wanted: BTreeSet::new(),
            first: None,
            running: None,
            races: 0,
            failures: RoundFailures::new(context.options.supervision.restart, patience),
            restarts: CopyRestarts::default(),
            not_before: None,
            wanted_since: Instant::now(),
            said_locked: None,
            is_paused: false,
        }
    }

    /// Returns the barrier at which rounds hold the stream.
    pub fn hold(&self) -> LsnBarrier {
        self.hold.clone()
    }

    /// Returns whether the stream stands at a snapshot until the tables that are copied under it
    /// are known.
    pub fn is_holding(&self) -> bool {
        self.hold.get().is_some()
    }

    pub fn want(&mut self, oids: impl IntoIterator<Item = u32>) {
        self.wanted.extend(oids);
    }

    /// Asks for copies of the tables that the stream or a look at the catalogs has found. The round
    /// begins a moment later, since a migration changes many tables in a row, and one round is to
    /// copy them all.
    pub fn want_soon(&mut self, oids: BTreeSet<u32>) {
        if oids.is_empty() {
            return;
        }

        let now = Instant::now();
        if self.wanted.is_empty() {
            self.wanted_since = now;
        }

        self.wanted.extend(oids);
        self.not_before = self.not_before.max(Some(quiet_at(now, self.wanted_since)));
    }

    /// Sets the slot of the pipeline, whose snapshot the next round uses.
    pub fn use_first(&mut self, first: Option<SlotWithSnapshot>) {
        if first.is_some() {
            self.first = first;
        }
    }

    /// Returns whether a round is copying this table.
    pub fn is_active(&self, oid: u32) -> bool {
        self.running.as_ref().is_some_and(|running| running.tables.contains(&oid))
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_none() && (self.wanted.is_empty() || self.is_paused)
    }

    /// Returns whether nothing is left to copy, though the round may still have to end.
    pub fn has_all(&self) -> bool {
        self.wanted.is_empty()
            && self.running.as_ref().is_none_or(|running| running.tables.is_empty())
    }

    /// Pauses copies, so that no more chunks are begun and the snapshot is given back, or lets
    /// copies go on. Finished chunks stay.
    pub fn pause(&mut self, is_paused: bool) {
        self.is_paused = is_paused;
        self.context.copy_progress.set_paused(is_paused);

        if !is_paused {
            tracing::info!(event = "copies_continued", "copies go on");
            return;
        }

        tracing::info!(event = "copies_paused", "copies are paused");
        if let Some(running) = &self.running {
            running.stop.cancel();
        }
    }

    /// Records how the plan of a round was judged: the tables of `adopted` are being copied now,
    /// the round came too late for those of `too_late`, and all others need no copy.
    pub fn planned(&mut self, adopted: &BTreeSet<u32>, too_late: &BTreeSet<u32>) {
        if let Some(running) = &self.running {
            self.wanted.retain(|oid| !running.asked.contains(oid));
        }

        self.wanted.extend(too_late);
        self.races = if too_late.is_empty() { 0 } else { self.races + 1 };
        if let Some(running) = &mut self.running {
            running.tables.extend(adopted);
        }
    }

    /// Returns the tables for which the round was begun.
    pub fn asked(&self) -> BTreeSet<u32> {
        self.running.as_ref().map(|running| running.asked.clone()).unwrap_or_default()
    }

    /// Asks for a restart of the copy of a table whose copy failed. Returns `false` when the copy
    /// was restarted too often.
    pub fn restart_copy(&mut self, oid: u32) -> bool {
        let is_wanted = self.restarts.take(oid);
        if is_wanted {
            self.wanted.insert(oid);
        }
        is_wanted
    }

    /// Records that the table's copy has come to its end.
    pub fn live(&mut self, oid: u32) {
        self.restarts.forget(oid);
    }

    /// Records that the copy of the table is done, or failed.
    pub fn done(&mut self, oid: u32, copied: &CopyOutcome) {
        if *copied == CopyOutcome::Done {
            self.failures.in_a_row = 0;
        }
        if let Some(running) = &mut self.running {
            running.tables.remove(&oid);
        }
    }

    /// Keeps tables that other sessions have locked for a later round.
    fn locked(&mut self, tables: &BTreeMap<u32, QualifiedName>) {
        if let Some(running) = &mut self.running {
            running.asked.retain(|oid| !tables.contains_key(oid));
        }
        self.not_before = Some(Instant::now() + LOCKED_PAUSE);

        if self.said_locked.is_none_or(|said| said.elapsed() >= LOCKED_WARNING) {
            self.said_locked = Some(Instant::now());
            let names: Vec<String> = tables.values().take(10).map(ToString::to_string).collect();
            tracing::warn!(
                event = "tables_locked",
                tables = names.join(", "),
                count = tables.len(),
                "tables wait for their copy: other sessions at the source have locked them"
            );
        }
    }

    fn begin(&mut self) {
        // The stream starts at the snapshot of the pipeline's own slot, so it must not pass changes
        // of the tables before the round has adopted them.
        if let Some(first) = &self.first {
            self.hold.set(first.created.consistent_point);
        }

        let (event_tx, events) = mpsc::channel(16);
        let stop = CancellationToken::new();
        let round = CopyRound {
            wanted: Some(self.wanted.clone()),
            first: self.first.take(),
            trail: trail_after(self.races),
            is_plain: false,
            hold: self.hold.clone(),
            event_tx,
            stop: stop.clone(),
        };

        let (context, writer) = (self.context.clone(), self.writer.clone());
        let task = tokio::spawn(async move { backfill::run(&context, &writer, round).await });

        self.running = Some(Running {
            task,
            events,
            stop,
            asked: self.wanted.clone(),
            tables: BTreeSet::new(),
            began: Instant::now(),
        });
    }

    /// Begins a round when one is due, and waits for its next event; waits for ever when there is
    /// nothing to copy. The caller may drop the future at any time.
    ///
    /// # Errors
    /// A round met an error that no retry mends, or failed too often.
    pub async fn next(&mut self) -> Result<RoundUpdate, EngineError> {
        loop {
            let Some(running) = &mut self.running else {
                if self.wanted.is_empty() || self.is_paused {
                    std::future::pending::<()>().await;
                }
                if let Some(not_before) = self.not_before {
                    tokio::time::sleep_until(not_before).await;
                    self.not_before = None;
                }

                self.begin();
                continue;
            };

            match running.events.recv().await {
                Some(CopyEvent::Locked(tables)) => {
                    self.locked(&tables);
                    continue;
                }
                Some(CopyEvent::Postponed(tables)) => {
                    running.asked.retain(|oid| !tables.contains(oid));
                    continue;
                }
                Some(event) => return Ok(RoundUpdate::Event(event)),
                None => {}
            }

            let ended = (&mut running.task)
                .await
                .unwrap_or_else(|lost| Err(EngineError::lost("a copy", lost)));

            let (unfinished, lasted) = match self.running.take() {
                Some(running) => (running.tables, running.began.elapsed()),
                None => (BTreeSet::new(), Duration::ZERO),
            };

            if let Err(error) = ended {
                // Only another session opens the target again.
                let is_over = matches!(&error, EngineError::Target(of) if of.wants_reopening());
                let pause =
                    if is_over { None } else { self.failures.count(policy(&error), lasted) };
                let Some(pause) = pause else { return Err(error) };

                let retry_in_ms = pause.as_millis() as u64;
                tracing::warn!(
                    event = "copies_interrupted",
                    error = error_chain(&error),
                    retry_in_ms,
                    "a copy broke off; it goes on where it was"
                );
                self.not_before = Some(Instant::now() + pause);
            }

            return Ok(RoundUpdate::Ended { unfinished });
        }
    }

    /// Forgets the tables that were to be copied: none of these requests holds for what comes now.
    pub async fn reset(&mut self) {
        self.shutdown().await;
        self.wanted.clear();
        self.restarts = CopyRestarts::default();
        self.first = None;
        self.failures.in_a_row = 0;
        (self.races, self.not_before) = (0, None);
    }

    /// Lets chunks that have begun come to their end, within the grace period. The caller may begin
    /// another round after that.
    pub async fn shutdown(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        running.stop.cancel();
        drop(running.events);

        if tokio::time::timeout(self.context.options.supervision.grace, &mut running.task)
            .await
            .is_err()
        {
            tracing::warn!(
                event = "chunks_given_up",
                "chunks that were being copied are given up; they are copied again"
            );
            running.task.abort();
            // The tasks of the round are gone; a call to DuckDB that has begun comes to its end by
            // itself.
            let _ = running.task.await;
        }
    }
}

/// Returns how far the stream stays behind the source while the next round begins, after this
/// number of rounds in a row that came too late for a table.
fn trail_after(races: u32) -> Option<Duration> {
    let doublings = races.checked_sub(1)?;
    Some((FIRST_TRAIL * 2_u32.saturating_pow(doublings.min(10))).min(MAX_TRAIL))
}

/// Returns when the next round begins if another table was found `now`, and the first one at
/// `wanted_since`.
fn quiet_at(now: Instant, wanted_since: Instant) -> Instant {
    (now + QUIET_BEFORE_ROUND).min(wanted_since + MAX_WAIT_FOR_QUIET)
}

/// The failures of rounds, and how many of them are borne.
struct RoundFailures {
    in_a_row: u32,
    /// How often in a row a round may fail before that is an error.
    patience: u32,
    /// How often a round may begin again after a bug.
    budget: RestartBudget,
}

impl RoundFailures {
    fn new(budget: Budget, patience: u32) -> Self {
        Self { in_a_row: 0, patience, budget: RestartBudget::new(budget) }
    }

    /// Counts the failure of a round that has lasted this long. Returns the pause before the next
    /// round, or `None` when no other round is to follow.
    fn count(&mut self, policy: Policy, lasted: Duration) -> Option<Duration> {
        if lasted > QUIET_PERIOD {
            self.in_a_row = 0;
        }

        self.in_a_row += 1;
        let is_over = match policy {
            Policy::Outage | Policy::Passing => false,
            Policy::Restart => !self.budget.take(),
            // The whole session waits for a disk that is full.
            Policy::Disk | Policy::Table | Policy::Operator => true,
        };

        if is_over || self.in_a_row > self.patience {
            return None;
        }

        Some((FIRST_PAUSE * 2_u32.saturating_pow(self.in_a_row.min(10))).min(MAX_PAUSE))
    }
}

/// How often the copy was restarted, by table.
#[derive(Default)]
struct CopyRestarts(BTreeMap<u32, u32>);

impl CopyRestarts {
    /// Counts a restart. Returns `false` when the copy of the table was restarted too often.
    fn take(&mut self, oid: u32) -> bool {
        let count = self.0.entry(oid).or_default();
        *count += 1;
        *count <= MAX_COPY_RESTARTS
    }

    fn forget(&mut self, oid: u32) {
        self.0.remove(&oid);
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use tokio::runtime::Runtime;

    use super::*;
    use crate::{
        olap::{DuckDb, TargetOptions},
        pipeline::Options,
    };

    const SHORT: Duration = Duration::from_secs(1);
    const LONG: Duration = Duration::from_secs(61);

    /// A name, the patience, how the rounds failed, and the pauses in milliseconds.
    type Failing<'a> = (&'a str, u32, &'a [(Policy, Duration)], &'a [Option<u128>]);

    #[test]
    fn the_stream_stays_further_behind_with_each_round_that_came_too_late() {
        for (races, expected) in [
            (0, None),
            (1, Some(200)),
            (2, Some(400)),
            (3, Some(800)),
            (7, Some(12_800)),
            (8, Some(20_000)),
            (u32::MAX, Some(20_000)),
        ] {
            let trail = trail_after(races).map(|trail| trail.as_millis());
            assert_eq!(trail, expected, "{races} rounds came too late");
        }
    }

    #[test]
    fn a_round_begins_when_no_other_table_comes_and_after_ten_seconds_in_any_case() {
        let (since, millis) = (Instant::now(), Duration::from_millis);

        for (name, found_after, begins_after) in [
            ("the first table", 0, 1000),
            ("a table of the same migration", 500, 1500),
            ("a table of a long migration", 5000, 6000),
            ("a table shortly before the end", 9500, 10_000),
            ("a table at the end", 10_000, 10_000),
            ("a table while a round runs", 30_000, 10_000),
        ] {
            let begins = quiet_at(since + millis(found_after), since);
            assert_eq!(begins, since + millis(begins_after), "{name}");
        }
    }

    #[test]
    fn each_failure_of_a_round_leads_to_a_pause_or_to_an_error() {
        let (outage, bug) = ((Policy::Outage, SHORT), (Policy::Restart, SHORT));
        let long_outage = (Policy::Outage, LONG);

        // The bugs that are borne are two.
        let cases: &[Failing<'_>] = &[
            (
                "an outage is waited for, longer each time",
                10,
                &[outage; 7],
                &[
                    Some(1000),
                    Some(2000),
                    Some(4000),
                    Some(8000),
                    Some(16_000),
                    Some(30_000),
                    Some(30_000),
                ],
            ),
            ("a lock passes", 10, &[(Policy::Passing, SHORT)], &[Some(1000)]),
            ("patience ends", 2, &[outage; 3], &[Some(1000), Some(2000), None]),
            ("there is no patience", 0, &[outage], &[None]),
            (
                "a long round was healthy",
                2,
                &[outage, outage, long_outage, outage],
                &[Some(1000), Some(2000), Some(1000), Some(2000)],
            ),
            (
                "a round as long as the limit",
                2,
                &[outage, (Policy::Outage, QUIET_PERIOD)],
                &[Some(1000), Some(2000)],
            ),
            ("bugs are borne twice", 10, &[bug; 3], &[Some(1000), Some(2000), None]),
            (
                "an outage is no bug",
                10,
                &[bug, outage, bug, bug],
                &[Some(1000), Some(2000), Some(4000), None],
            ),
            (
                "bugs of long rounds count",
                10,
                &[(Policy::Restart, LONG); 3],
                &[Some(1000), Some(1000), None],
            ),
            ("a disk is full", 10, &[(Policy::Disk, SHORT)], &[None]),
            ("a table without a name", 10, &[(Policy::Table, SHORT)], &[None]),
            ("only the operator helps", 10, &[(Policy::Operator, LONG)], &[None]),
        ];

        for (name, patience, rounds, expected) in cases {
            let mut failures = RoundFailures::new(Budget { max: 2, within: None }, *patience);
            let pauses: Vec<Option<u128>> = rounds
                .iter()
                .map(|&(policy, lasted)| failures.count(policy, lasted).map(|it| it.as_millis()))
                .collect();
            assert_eq!(pauses, *expected, "{name}");
        }
    }

    #[test]
    fn the_copy_of_a_table_is_restarted_a_few_times_and_of_others_beside_it() {
        let mut restarts = CopyRestarts::default();
        let taken: Vec<bool> = (0..=MAX_COPY_RESTARTS).map(|_| restarts.take(1)).collect();
        assert_eq!(taken.iter().filter(|is_taken| **is_taken).count(), 10);
        assert!(!restarts.take(1) && restarts.take(2));

        // The copy has come to its end.
        restarts.forget(1);
        assert!(restarts.take(1));
    }

    fn oids(oids: &[u32]) -> BTreeSet<u32> {
        oids.iter().copied().collect()
    }

    /// A scheduler without a server, and what it needs for as long as it lives.
    struct Bench {
        copies: CopyScheduler<DuckDb>,
        runtime: Runtime,
        _folder: TempDir,
    }

    impl Bench {
        fn new(wanted: &[u32]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("shop.duckdb");
            let target = TargetOptions { path, ..TargetOptions::default() };
            let writer = Writer::new(DuckDb::open(&target).unwrap());

            let options = Options { target, ..Options::sample() };
            let context = Context::new(options, mpsc::unbounded_channel().0);

            let mut copies = CopyScheduler::new(&context, &writer, 3);
            copies.want(oids(wanted));
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            Self { copies, runtime, _folder: folder }
        }

        /// Begins a round for all tables that are wanted, which never does anything.
        fn begin(&mut self) -> CancellationToken {
            let stop = CancellationToken::new();
            self.copies.running = Some(Running {
                task: self.runtime.spawn(std::future::pending()),
                events: mpsc::channel(1).1,
                stop: stop.clone(),
                asked: self.copies.wanted.clone(),
                tables: BTreeSet::new(),
                began: Instant::now(),
            });
            stop
        }
    }

    #[test]
    fn a_planned_round_leaves_the_tables_for_which_it_came_too_late() {
        let mut bench = Bench::new(&[1, 2, 3]);
        bench.begin();
        // The third table needs no copy any more, and the fourth one comes while the round begins.
        bench.copies.want([4]);
        bench.copies.planned(&oids(&[1]), &oids(&[2]));

        assert_eq!(bench.copies.wanted, oids(&[2, 4]));
        let active: Vec<bool> = (1..=4).map(|oid| bench.copies.is_active(oid)).collect();
        assert_eq!(active, [true, false, false, false]);
    }

    #[test]
    fn rounds_that_come_too_late_count_only_in_a_row() {
        let mut bench = Bench::new(&[1, 2]);
        let mut races = Vec::new();
        for too_late in [&[2][..], &[2], &[], &[2]] {
            bench.begin();
            bench.copies.planned(&oids(&[1]), &oids(too_late));
            races.push(bench.copies.races);
        }
        assert_eq!(races, [1, 2, 0, 1]);
    }

    #[test]
    fn locked_tables_stay_wanted_and_the_next_round_waits_a_moment() {
        let mut bench = Bench::new(&[1, 2]);
        bench.begin();
        let before = Instant::now();
        bench.copies.locked(&BTreeMap::from([(2, QualifiedName::new("public", "t2"))]));
        bench.copies.planned(&oids(&[1]), &oids(&[]));

        assert_eq!(bench.copies.wanted, oids(&[2]));
        assert!(bench.copies.not_before.is_some_and(|at| at >= before + LOCKED_PAUSE));
    }

    #[test]
    fn copies_that_are_paused_are_idle_once_the_round_has_ended() {
        let mut bench = Bench::new(&[1]);
        assert!(!bench.copies.is_idle(), "a table waits");
        let stop = bench.begin();

        bench.copies.pause(true);
        assert!(stop.is_cancelled() && !bench.copies.is_idle(), "the round has to end");
        bench.copies.running = None;
        assert!(bench.copies.is_idle() && !bench.copies.has_all(), "the table still waits");

        bench.copies.pause(false);
        assert!(!bench.copies.is_idle(), "copies go on");
    }

    #[test]
    fn all_is_copied_when_the_last_table_of_the_round_is_done() {
        let mut bench = Bench::new(&[1, 2]);
        bench.begin();
        bench.copies.planned(&oids(&[1, 2]), &oids(&[]));

        bench.copies.done(1, &CopyOutcome::Done);
        assert!(!bench.copies.has_all() && bench.copies.is_active(2));
        bench.copies.done(2, &CopyOutcome::Changed);
        assert!(bench.copies.has_all() && !bench.copies.is_idle(), "the round still has to end");
    }

    #[test]
    fn only_a_copy_that_succeeds_makes_up_for_earlier_failures() {
        let mut bench = Bench::new(&[1, 2]);
        bench.copies.failures.in_a_row = 2;
        bench.copies.done(1, &CopyOutcome::Changed);
        assert_eq!(bench.copies.failures.in_a_row, 2);
        bench.copies.done(2, &CopyOutcome::Done);
        assert_eq!(bench.copies.failures.in_a_row, 0);
    }

    #[test]
    fn a_copy_that_was_restarted_too_often_is_not_wanted_any_more() {
        let mut bench = Bench::new(&[]);
        for _ in 0..MAX_COPY_RESTARTS {
            assert!(bench.copies.restart_copy(1));
        }
        assert_eq!(std::mem::take(&mut bench.copies.wanted), oids(&[1]));
        assert!(!bench.copies.restart_copy(1));
        assert!(bench.copies.wanted.is_empty());
    }

    #[test]
    fn tables_of_one_migration_put_off_the_round_and_no_table_does_not() {
        let mut bench = Bench::new(&[]);
        bench.copies.want_soon(oids(&[]));
        assert_eq!(bench.copies.not_before, None);

        bench.copies.want_soon(oids(&[1]));
        let (first, since) = (bench.copies.not_before, bench.copies.wanted_since);
        assert_eq!(first, Some(since + QUIET_BEFORE_ROUND));

        bench.copies.want_soon(oids(&[2]));
        assert!(bench.copies.not_before >= first);
        assert_eq!((bench.copies.wanted_since, bench.copies.wanted), (since, oids(&[1, 2])));
    }
}
