//! What `run` does after a session has ended: begin another one at once or later, or end.

use std::time::{Duration, Instant};

use rand::RngExt;

use super::{
    attach::Recopy,
    session::{SessionEnd, wants_whole_from_now_on},
    supervisor::RestartBudget,
};
use crate::{
    Lsn,
    error::error_chain,
    pipeline::{
        EngineError, Options,
        error_policy::{Policy, Standstill, policy},
    },
};

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// A stream that lasted this long before it broke has recovered from earlier failures.
const HEALTHY_AFTER: Duration = Duration::from_secs(2);

/// Sessions that attach again within less than this are counted as quick ones.
const QUIET_PERIOD: Duration = Duration::from_secs(10);

/// After this number of quick sessions in a row the next one does not begin at once.
const MAX_QUICK_REATTACHES: u32 = 20;

/// The longest pause between looks for the first table of an empty publication.
const MAX_EMPTY_PAUSE: Duration = Duration::from_secs(2);

/// How often the log says that the publication is still empty.
const EMPTY_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// How one session went.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SessionRun {
    /// The session attached, and began to stream.
    pub(super) has_streamed: bool,
    /// How far the stream had come when the session ended.
    pub(super) position: Lsn,
    pub(super) lasted: Duration,
}

/// What `run` does after a session.
#[derive(Debug)]
pub(super) enum NextSession {
    AtOnce,
    After(Duration),
    /// The operator has stopped `run`.
    Stop,
    Fail(EngineError),
}

/// What `run` remembers from one session for the next one.
pub(super) struct RetryState {
    /// The tables that the next session has to copy again.
    pub(super) recopy: Recopy,
    /// The target has to be opened again first: a failed call of DuckDB may have left the file
    /// closed.
    pub(super) must_reopen: bool,
    /// The source is asked for whole transactions only.
    pub(super) no_streaming_in_progress: bool,
    /// A session of this run has streamed, so that an outage is waited for.
    has_streamed: bool,
    failures: u32,
    pause: Duration,
    quick_reattaches: u32,
    restarts: RestartBudget,
    standstill: Standstill,
    empty_logged_at: Option<Instant>,
    empty_pause: Duration,
    publications: String,
}

impl RetryState {
    pub(super) fn new(options: &Options, has_streamed: bool) -> Self {
        Self {
            recopy: Recopy::None,
            must_reopen: false,
            no_streaming_in_progress: false,
            has_streamed,
            failures: 0,
            pause: FIRST_PAUSE,
            quick_reattaches: 0,
            restarts: RestartBudget::new(options.supervision.restart),
            standstill: Standstill::default(),
            empty_logged_at: None,
            empty_pause: options.catalog_interval.min(MAX_EMPTY_PAUSE),
            publications: options.publications.join(", "),
        }
    }

    /// Takes note of a session that has just ended.
    pub(super) fn ended(&mut self, run: SessionRun) {
        // Once the session has streamed, the target has recorded the copies that were asked for.
        if run.has_streamed {
            self.recopy = Recopy::None;
        }
        self.has_streamed |= run.has_streamed;
    }

    /// Decides what follows from the end of a session.
    pub(super) fn next(
        &mut self,
        end: Result<SessionEnd, EngineError>,
        run: SessionRun,
    ) -> NextSession {
        match end {
            Ok(SessionEnd::Resync(tables)) => {
                tracing::info!(
                    event = "resync_requested",
                    ?tables,
                    "copying the tables again, as asked"
                );
                self.recopy = Recopy::Tables(tables);
                NextSession::AtOnce
            }
            Ok(SessionEnd::Reattach(reason)) => {
                tracing::info!(event = "reattaching", reason, "attaching to the source again");
                self.after_reattach(run.lasted)
            }
            Ok(SessionEnd::Done | SessionEnd::Stopped) => NextSession::Stop,
            // A table that was to be copied again is gone by now; all other tables go on.
            Err(EngineError::Setup(reason))
                if self.has_streamed && matches!(self.recopy, Recopy::Tables(_)) =>
            {
                tracing::error!(
                    event = "resync_refused",
                    reason,
                    "the tables are not copied again"
                );
                self.recopy = Recopy::None;
                NextSession::AtOnce
            }
            Err(EngineError::NoTable { .. }) => self.wait_for_first_table(),
            Err(error) => self.after_error(error, run),
        }
    }

    /// After many changes in a row, or after a change that a new session does not settle, the next
    /// session does not begin at once.
    fn after_reattach(&mut self, lasted: Duration) -> NextSession {
        self.quick_reattaches = if lasted < QUIET_PERIOD { self.quick_reattaches + 1 } else { 0 };

        match self.quick_reattaches.saturating_sub(MAX_QUICK_REATTACHES) {
            0 => NextSession::AtOnce,
            more => NextSession::After(FIRST_PAUSE * more.min(20)),
        }
    }

    fn wait_for_first_table(&mut self) -> NextSession {
        self.has_streamed = true;

        if self.empty_logged_at.is_none_or(|at| at.elapsed() >= EMPTY_LOG_INTERVAL) {
            self.empty_logged_at = Some(Instant::now());
            tracing::warn!(
                event = "publication_empty",
                publications = self.publications,
                "waiting for the first table: the publication holds none that [source] tables and \
                 exclude choose"
            );
        }

        NextSession::After(self.empty_pause)
    }

    fn after_error(&mut self, error: EngineError, run: SessionRun) -> NextSession {
        // The operator has to mend a session that cannot begin; a session that broke after it had
        // begun may heal.
        let policy = policy(&error);
        match policy {
            Policy::Passing => {}
            Policy::Outage | Policy::Disk if self.has_streamed => {}
            Policy::Restart if self.restarts.take() => {}
            Policy::Restart => {
                tracing::error!(
                    event = "restart_budget_spent",
                    "too many bugs in too short a time; rhei stops"
                );
                return NextSession::Fail(error);
            }
            Policy::Outage | Policy::Disk | Policy::Table | Policy::Operator => {
                return NextSession::Fail(error);
            }
        }

        self.must_reopen = policy == Policy::Disk || matches!(error, EngineError::Target(_));
        self.no_streaming_in_progress |= wants_whole_from_now_on(&error);

        // A session that breaks as soon as it streams may do so again and again.
        if run.has_streamed && run.lasted > HEALTHY_AFTER {
            (self.failures, self.pause) = (0, FIRST_PAUSE);
        }
        self.failures += 1;

        let is_end_of_stream = run.has_streamed && policy.is_waited_for();
        let left_alone =
            is_end_of_stream.then(|| self.standstill.ended(run.position, run.lasted)).flatten();

        let pause = left_alone.unwrap_or(self.pause).mul_f64(rand::rng().random_range(0.5..1.0));
        self.pause = (self.pause * 2).min(MAX_PAUSE);

        let (is_of_lake, is_of_commit) = match &error {
            EngineError::Target(error) => (error.is_of_lake(), error.wants_reopening()),
            _ => (false, false),
        };
        tracing::warn!(
            event = "session_failed",
            error = error_chain(&error),
            failures = self.failures,
            retry_in_ms = pause.as_millis() as u64,
            "{}; going on from the checkpoint",
            match policy {
                Policy::Disk if is_of_lake => "the lake has to be read again",
                Policy::Disk => "the disk failed",
                Policy::Restart if is_of_commit => "a commit to the target failed",
                Policy::Restart => "rhei met a bug",
                _ => "the stream broke",
            }
        );

        if left_alone.is_some() {
            tracing::error!(
                event = "stream_standstill",
                position = %run.position,
                "the source ends the stream at the same position again and again, and is left \
                 alone for longer and longer: its log says whether it crashes over what comes next \
                 there"
            );
        }

        NextSession::After(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        olap::TargetError,
        pgoutput::QualifiedName,
        pipeline::options::Budget,
        source::{
            SourceError,
            wire::{ServerMessage, WireError},
        },
    };

    const AT_ONCE: SessionRun =
        SessionRun { has_streamed: true, position: Lsn(7), lasted: Duration::from_millis(10) };
    const NOT_BEGUN: SessionRun = SessionRun { has_streamed: false, ..AT_ONCE };
    const LONG: SessionRun = SessionRun { lasted: Duration::from_secs(60), ..AT_ONCE };

    fn state() -> RetryState {
        RetryState::new(&Options::sample(), false)
    }

    fn closed() -> EngineError {
        SourceError::Wire(WireError::Closed).into()
    }

    fn refused(code: &str) -> EngineError {
        SourceError::Wire(WireError::Server(ServerMessage {
            code: code.to_owned(),
            ..ServerMessage::default()
        }))
        .into()
    }

    fn table() -> QualifiedName {
        QualifiedName::new("public", "orders")
    }

    fn end(
        state: &mut RetryState,
        end: Result<SessionEnd, EngineError>,
        run: SessionRun,
    ) -> String {
        state.ended(run);
        match state.next(end, run) {
            NextSession::AtOnce => "at once".to_owned(),
            NextSession::After(_) => "later".to_owned(),
            NextSession::Stop => "stop".to_owned(),
            NextSession::Fail(_) => "fail".to_owned(),
        }
    }

    /// The pause after an error, without its jitter: between the half and the whole of what is
    /// returned.
    fn is_pause_of(next: &NextSession, whole: Duration) -> bool {
        matches!(next, NextSession::After(pause) if *pause >= whole / 2 && *pause <= whole)
    }

    #[test]
    fn each_end_of_a_first_session_leads_to_one_next_step() {
        let setup = || EngineError::Setup("wal_level is replica".to_owned());
        let bug = || EngineError::Bug { what: "the session", why: "an index".to_owned() };
        let none = || EngineError::NoTable { asked: String::new(), publications: "p".to_owned() };
        let full = || TargetError::saying("IO Error: No space left on device").into();

        type End = Result<SessionEnd, EngineError>;
        let table: Vec<(&str, End, SessionRun, &str)> = vec![
            ("done", Ok(SessionEnd::Done), AT_ONCE, "stop"),
            ("stopped", Ok(SessionEnd::Stopped), AT_ONCE, "stop"),
            ("attach again", Ok(SessionEnd::Reattach("new".to_owned())), AT_ONCE, "at once"),
            ("resync", Ok(SessionEnd::Resync(vec![table()])), AT_ONCE, "at once"),
            ("closed before a stream", Err(closed()), NOT_BEGUN, "fail"),
            ("closed after a stream", Err(closed()), AT_ONCE, "later"),
            ("shutdown before a stream", Err(refused("57P01")), NOT_BEGUN, "fail"),
            ("shutdown after a stream", Err(refused("57P01")), AT_ONCE, "later"),
            ("a lock before a stream", Err(refused("55P03")), NOT_BEGUN, "later"),
            ("a wrong setting before a stream", Err(setup()), NOT_BEGUN, "fail"),
            ("a wrong setting after a stream", Err(setup()), AT_ONCE, "fail"),
            ("no privilege", Err(refused("42501")), AT_ONCE, "fail"),
            ("no table", Err(none()), NOT_BEGUN, "later"),
            ("a bug", Err(bug()), AT_ONCE, "later"),
            ("another copy is busy", Err(EngineError::Busy), NOT_BEGUN, "later"),
            ("full disk before", Err(full()), NOT_BEGUN, "fail"),
            ("full disk after", Err(full()), AT_ONCE, "later"),
        ];

        for (name, ended, run, expected) in table {
            assert_eq!(end(&mut state(), ended, run), expected, "{name}");
        }
    }

    #[test]
    fn pauses_grow_with_each_failure_and_begin_small_again_after_a_healthy_stream() {
        let mut state = state();
        let millis = Duration::from_millis;

        for (run, whole) in [
            (AT_ONCE, millis(500)),
            (NOT_BEGUN, millis(1000)),
            (NOT_BEGUN, millis(2000)),
            (NOT_BEGUN, millis(4000)),
            (SessionRun { position: Lsn(8), ..LONG }, millis(500)),
            (NOT_BEGUN, millis(1000)),
        ] {
            state.ended(run);
            let next = state.next(Err(closed()), run);
            assert!(is_pause_of(&next, whole), "{next:?} after {run:?}, not {whole:?}");
        }

        for _ in 0..20 {
            let _ = state.next(Err(closed()), NOT_BEGUN);
        }
        assert!(is_pause_of(&state.next(Err(closed()), NOT_BEGUN), MAX_PAUSE));
    }

    #[test]
    fn a_source_that_ends_at_the_same_position_is_left_alone_for_longer() {
        let mut state = state();
        for _ in 0..2 {
            assert_eq!(end(&mut state, Err(closed()), AT_ONCE), "later");
        }

        state.ended(AT_ONCE);
        let next = state.next(Err(closed()), AT_ONCE);
        assert!(is_pause_of(&next, Duration::from_secs(20)), "{next:?}");
    }

    #[test]
    fn sessions_that_reattach_and_again_are_slowed_down() {
        let mut state = state();
        let again = || Ok(SessionEnd::Reattach("a table is new".to_owned()));

        for number in 0..MAX_QUICK_REATTACHES {
            assert_eq!(end(&mut state, again(), AT_ONCE), "at once", "session {number}");
        }
        assert_eq!(end(&mut state, again(), AT_ONCE), "later");
        assert_eq!(end(&mut state, again(), LONG), "at once");
    }

    #[test]
    fn a_table_that_was_to_be_copied_again_and_is_gone_ends_nothing() {
        let mut state = state();
        let gone = || Err(EngineError::Setup("public.orders is not published".to_owned()));

        assert_eq!(end(&mut state, Ok(SessionEnd::Resync(vec![table()])), AT_ONCE), "at once");
        assert!(matches!(state.recopy, Recopy::Tables(_)));

        assert_eq!(end(&mut state, gone(), NOT_BEGUN), "at once");
        assert!(matches!(state.recopy, Recopy::None));
        assert_eq!(end(&mut state, gone(), NOT_BEGUN), "fail");
    }

    #[test]
    fn what_was_to_be_copied_again_is_kept_until_a_session_has_streamed() {
        let mut state = state();
        state.recopy = Recopy::AllOfSameCluster;

        state.ended(NOT_BEGUN);
        assert!(matches!(state.recopy, Recopy::AllOfSameCluster));
        state.ended(AT_ONCE);
        assert!(matches!(state.recopy, Recopy::None));
    }

    #[test]
    fn bugs_end_the_run_when_the_budget_of_restarts_is_spent() {
        let mut state = state();
        state.restarts = RestartBudget::new(Budget { max: 2, within: None });
        let bug = || Err(EngineError::Bug { what: "the session", why: "an index".to_owned() });

        let ends: Vec<String> = (0..3).map(|_| end(&mut state, bug(), AT_ONCE)).collect();
        assert_eq!(ends, ["later", "later", "fail"]);
    }

    #[test]
    fn only_errors_of_the_target_have_it_opened_again() {
        let full = || TargetError::saying("IO Error: No space left on device").into();
        for (name, error, must_reopen) in [
            ("closed", closed(), false),
            ("full disk", full(), true),
            ("server bug", refused("XX000"), false),
        ] {
            let mut state = state();
            end(&mut state, Err(error), AT_ONCE);
            assert_eq!(state.must_reopen, must_reopen, "{name}");
            assert_eq!(state.no_streaming_in_progress, name == "server bug", "{name}");
        }
    }
}
