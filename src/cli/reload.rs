//! Steers a `rhei run` that goes on: reads the settings again, and changes what is logged.

use std::{collections::BTreeSet, process::ExitCode, sync::Arc};

use clap::Args;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::{CliError, Invocation, log};
use crate::{
    config::{Config, Inputs},
    control::{self, Steer},
    pipeline::Options,
};

/// The keys that take effect while the replicator runs, by their beginnings. The others say where
/// things are (source, slot, file, addresses), and take effect at the next start.
const LIVE: [&str; 10] = [
    "source.add_tables",
    "source.exclude",
    "source.on_slot_lost",
    "source.tables",
    "sync.",
    "backfill.",
    "supervisor.",
    "verify.",
    "tables.",
    "publish.interval",
];

/// Keys of [tables] that take effect at the next start, by their ends: they belong to the lake.
const OF_LAKE: [&str; 2] = [".partition_by", ".sort_by"];

fn is_live(key: &str) -> bool {
    let is_of_lake = key.starts_with("tables.") && OF_LAKE.iter().any(|end| key.ends_with(end));
    !is_of_lake && LIVE.iter().any(|live| key.starts_with(live))
}

/// Flags of `rhei log`.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// A level (error, warn, info, debug, trace), or a filter as in `RHEI_LOG`
    pub filter: String,
}

/// Runs `rhei reload`.
pub async fn reload(session: Invocation) -> Result<ExitCode, CliError> {
    let answer = ask(&session, "reload").await?;

    let keys = |name: &str| {
        let keys = answer[name].as_array().into_iter().flatten();
        keys.filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>().join(", ")
    };
    let (live, at_next_start) = (keys("changed"), keys("at_next_start"));

    if live.is_empty() && at_next_start.is_empty() {
        println!("the settings are as they were");
    }
    if !live.is_empty() {
        println!("changed: {live}");
    }
    if !at_next_start.is_empty() {
        println!("takes effect at the next start: {at_next_start}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs `rhei log`.
pub async fn set_log(session: Invocation, args: LogArgs) -> Result<ExitCode, CliError> {
    ask(&session, &format!("log {}", args.filter)).await?;
    println!("the replicator logs by the filter {} until it ends", args.filter);
    Ok(ExitCode::SUCCESS)
}

async fn ask(session: &Invocation, question: &str) -> Result<Value, CliError> {
    let path = session.target()?.path;
    let answer = control::request(&path, question).await.ok_or_else(|| {
        CliError::Failed(format!(
            "no replicator runs on {}\nhint: a start reads the settings anyway",
            path.display()
        ))
    })?;

    match answer["error"].as_str() {
        Some(error) => Err(CliError::Failed(format!("the running replicator answered: {error}"))),
        None => Ok(answer),
    }
}

/// The options of a run, which change when the settings are read again.
pub(super) struct Steering {
    pub options: watch::Receiver<Arc<Options>>,
    /// What is asked through the socket of the replicator.
    pub steer: mpsc::UnboundedSender<Steer>,
}

impl Steering {
    /// Listens to SIGHUP and to the socket for as long as the process lives.
    pub fn start(inputs: Inputs, session: &Invocation, options: &Arc<Options>) -> Self {
        let (steer, mut asked) = mpsc::unbounded_channel();
        let (changed, options) = watch::channel(Arc::clone(options));
        let reader = Reader { table: inputs.read_table().unwrap_or_default(), inputs, changed };
        let session = session.clone();

        tokio::spawn(async move {
            use tokio::signal::unix::{SignalKind, signal};
            let mut reader = reader;
            let Ok(mut hang_up) = signal(SignalKind::hangup()) else { return };

            loop {
                tokio::select! {
                    _ = hang_up.recv() => {
                        reader.read_again(&session);
                    }
                    Some(asked) = asked.recv() => match asked {
                        Steer::Reload(answer) => {
                            let _ = answer.send(reader.read_again(&session));
                        }
                        Steer::Log(filter, answer) => {
                            let _ = answer.send(set_filter(&filter));
                        }
                    },
                }
            }
        });

        Self { options, steer }
    }
}

fn set_filter(filter: &str) -> Value {
    match log::set_filter(filter) {
        Ok(()) => {
            tracing::info!(event = "log_filter_set", filter, "the log has another filter");
            json!({ "filter": filter })
        }
        Err(reason) => json!({ "error": format!("\"{filter}\" is no filter: {reason}") }),
    }
}

/// Reads the settings, and knows what it has read last.
struct Reader {
    inputs: Inputs,
    table: toml::Table,
    changed: watch::Sender<Arc<Options>>,
}

impl Reader {
    /// Reads the settings again. Settings that are refused change nothing. Returns which keys have
    /// changed.
    fn read_again(&mut self, session: &Invocation) -> Value {
        // The first of the two names the line of what it refuses.
        let read = Config::load(&self.inputs)
            .and_then(|config| self.inputs.read_table().map(|table| (table, config)));

        let (table, config) = match read {
            Ok(read) => read,
            Err(error) => {
                let error = crate::error::error_chain(&error);
                tracing::error!(
                    event = "settings_refused",
                    error,
                    "the settings were read again and are refused: those from before stay"
                );
                return json!({ "error": error });
            }
        };

        let differing = differing_keys(&self.table, &table);
        self.table = table;
        let (live, at_next_start): (Vec<_>, Vec<_>) =
            differing.into_iter().partition(|key| is_live(key));

        tracing::info!(
            event = "settings_read_again",
            changed = live.join(", "),
            at_next_start = at_next_start.join(", "),
            "the settings were read again"
        );

        if !live.is_empty() {
            let before = self.changed.borrow().clone();
            let session = Invocation { config, ..session.clone() };
            self.changed.send_replace(Arc::new(live_options(&before, &session)));
        }
        json!({ "changed": live, "at_next_start": at_next_start })
    }
}

/// Returns the options of the new settings, and keeps those that say where things are.
fn live_options(before: &Options, session: &Invocation) -> Options {
    let new = session.options(before.source.clone(), before.target.clone());

    let interval = new.publication.and_then(|(_, interval)| interval);
    let publication = before.publication.clone().map(|(options, _)| (options, interval));
    Options {
        publications: before.publications.clone(),
        slot: before.slot.clone(),
        failover_slot: before.failover_slot,
        publication,
        ..new
    }
}

/// Returns the keys, as `section.key` or `tables.schema.table.key`, whose values differ.
fn differing_keys(one: &toml::Table, other: &toml::Table) -> Vec<String> {
    let keys: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    let empty = toml::Table::new();
    let mut differing = Vec::new();

    for key in keys.into_iter().filter(|key| one.get(*key) != other.get(*key)) {
        let section = |table: &'_ toml::Table| match table.get(key) {
            Some(toml::Value::Table(keys)) => Some(keys.clone()),
            Some(_) => None,
            None => Some(empty.clone()),
        };
        match (section(one), section(other)) {
            (Some(one), Some(other)) => differing.extend(
                differing_keys(&one, &other).into_iter().map(|within| format!("{key}.{within}")),
            ),
            _ => differing.push(key.clone()),
        }
    }
    differing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_were_added_changed_or_taken_away_are_found() {
        let table = |text: &str| toml::from_str::<toml::Table>(text).unwrap();
        let before = table("[sync]\ninterval = \"1s\"\nmemory_limit = \"1GB\"\n[verify]\n");
        let after = table("[sync]\ninterval = \"2s\"\n[serve]\nlisten = \"x\"\n[verify]\n");

        let differing = differing_keys(&before, &after);
        assert_eq!(differing, ["serve.listen", "sync.interval", "sync.memory_limit"]);
        assert!(differing_keys(&after, &after).is_empty());
    }

    #[test]
    fn the_layout_of_a_table_waits_for_the_next_start() {
        let table = |text: &str| toml::from_str::<toml::Table>(text).unwrap();
        let before = table("[tables.\"a.b\"]\nsort_by = [\"x\"]\nexclude_columns = [\"y\"]");
        let differing = differing_keys(&before, &table(""));
        assert_eq!(differing, ["tables.a.b.exclude_columns", "tables.a.b.sort_by"]);
        let live: Vec<bool> = differing.iter().map(|key| is_live(key)).collect();
        assert_eq!(live, [true, false]);
        assert!(is_live("tables.a.sort_by.exclude_columns"));
    }
}
