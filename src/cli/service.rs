//! Tells a service manager how a long run is (systemd's `sd_notify`): when it is ready, what it
//! does, that it lives, that it stops. Without a `NOTIFY_SOCKET` in the environment no message is
//! sent.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sd_notify::NotifyState;
use tokio::{task::JoinHandle, time::MissedTickBehavior};

use crate::pipeline::{
    Event,
    copy_progress::CopyProgress,
    pulse::{LastLook, Pulse},
};

/// The least time between two messages with the status.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The service manager that has started this process. It gets messages until this is dropped.
pub struct Service {
    status: Arc<Mutex<String>>,
    copy_progress: CopyProgress,
    is_ready: bool,
    task: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Service {
    /// Returns the service manager that has started this process, if there is one.
    ///
    /// Where the manager has a watchdog, it hears of the engine only while `pulse` is alive. This
    /// is a task among the others of the runtime: a runtime that hangs is silent as well.
    pub fn from_environment(pulse: &Pulse, copy_progress: &CopyProgress) -> Option<Self> {
        std::env::var_os("NOTIFY_SOCKET")?;

        let status = Arc::new(Mutex::new("attaching to the source".to_owned()));
        let task = tokio::spawn(keep_told(pulse.clone(), Arc::clone(&status)));
        Some(Self { status, copy_progress: copy_progress.clone(), is_ready: false, task })
    }

    /// Takes note of what happens in the pipeline. A run is ready when it follows the source; its
    /// first copies may still be under way then, and the status says so.
    pub fn hear(&mut self, event: &Event) {
        if let Some(status) = self.status_after(event) {
            *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
        }

        if matches!(event, Event::Streaming { .. }) && !std::mem::replace(&mut self.is_ready, true)
        {
            // Who waits for this looks at the status next.
            let status = self.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
            tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
        }
    }

    fn status_after(&self, event: &Event) -> Option<String> {
        Some(match event {
            Event::WaitingForTransactions { .. } => {
                "waiting for transactions that are open at the source (the log names them)"
                    .to_owned()
            }
            Event::Pausing { pause } => format!(
                "not connected, as the log says; trying again in {} s",
                pause.as_secs_f64().ceil()
            ),
            Event::Streaming { checkpoint } => format!("following; the copy is at {checkpoint}"),
            Event::Cycle(report) => {
                let copies = self.copy_progress.progress().map(|(tables, total)| {
                    let (count, rows, all) = (tables.len(), total.rows, total.estimated_rows);
                    format!("; copying {count} tables, {rows} of about {all} rows")
                });
                format!(
                    "following; the copy is at {}, {} bytes of WAL behind{}",
                    report.checkpoint,
                    report.lag_bytes,
                    copies.unwrap_or_default()
                )
            }
            _ => return None,
        })
    }
}

/// Tells the service manager that this process does what it is there for.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// Tells the service manager that this process is about to end.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping after the open cycle")]);
}

/// A manager that does not listen is no concern of the pipeline.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}

/// Tells the status when it has changed, and of the watchdog while `pulse` is alive.
async fn keep_told(pulse: Pulse, status: Arc<Mutex<String>>) {
    // The watchdog wants to hear at least every second look: one that falls on a step which takes
    // a moment does no harm.
    let patience = sd_notify::watchdog_enabled();
    let look_interval =
        patience.map_or(STATUS_INTERVAL, |patience| (patience / 4).min(STATUS_INTERVAL));
    let mut looks = tokio::time::interval(look_interval);
    looks.set_missed_tick_behavior(MissedTickBehavior::Skip);

    let (mut last_look, mut told) = (LastLook::default(), String::new());
    loop {
        looks.tick().await;

        let current = status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if current != told {
            tell(&[NotifyState::Status(&current)]);
            told = current;
        }
        if patience.is_some() && pulse.is_alive(&mut last_look) {
            tell(&[NotifyState::Watchdog]);
        }
    }
}
