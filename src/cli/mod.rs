//! Commands, messages, progress. Only this module prints or chooses an exit code.

mod backfill;
mod bars;
mod check;
mod compact;
mod demo;
mod drop;
mod init;
mod jobs;
mod log;
mod progress;
mod publish;
mod query;
mod reload;
mod report;
mod run;
mod screen;
mod serve;
mod service;
mod shell;
mod status;
mod sync;
mod verify;
mod version;
mod wait;

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, ConfigError, Inputs, LakeSettings, OnUnrepresentable, Secret, read_password},
    olap::{
        TargetOptions,
        lake::{LakeOptions, Layout, S3Options, extension_folders},
    },
    pgoutput::QualifiedName,
    pipeline::{Context, Event, Options, options::TableSettings},
    source::connection::{Environment, SourceOptions},
};

use progress::{ProgressChoice, Style, Terminal};

/// Keeps a DuckDB copy of a PostgreSQL database, live and exact.
#[derive(Debug, Parser)]
#[command(
    version,
    long_version = version::LONG.as_str(),
    about,
    after_help = "Examples:
  rhei check --source postgresql://rhei@db.example.com/shop
  rhei sync --source postgresql://rhei@db.example.com/shop --target shop.duckdb
  rhei run --config rhei.toml
  rhei demo"
)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct GlobalArgs {
    /// Settings file [default: rhei.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The PostgreSQL database: a libpq URL or key=value string
    #[arg(long, global = true, value_name = "URL")]
    source: Option<String>,
    /// The DuckDB file, or the address of a lake (ducklake:..)
    #[arg(long, global = true, value_name = "PATH")]
    target: Option<PathBuf>,
    /// How logs look [default: text; json with --progress json]
    #[arg(long, global = true, value_enum)]
    log_format: Option<LogFormat>,
    /// How the progress of long work is shown
    #[arg(long, global = true, value_enum, default_value = "auto")]
    progress: ProgressChoice,
    /// Say more
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    verbose: bool,
    /// Say only what is wrong
    #[arg(short, long, global = true)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Catch up with the source, copying tables that need it, then stop
    #[command(
        after_help = "Examples:\n  rhei sync --target shop.duckdb\n  */5 * * * * rhei --config \
                      /etc/rhei.toml -q sync"
    )]
    Sync,
    /// Follow the source until SIGTERM or SIGINT
    #[command(after_help = "Examples:\n  rhei run\n  rhei run --log-format json")]
    Run,
    /// Copy tables, then stop; a later sync or run goes on without a gap
    #[command(
        after_help = "Examples:\n  rhei backfill\n  rhei backfill --table public.orders --force\n  \
                      rhei backfill --no-slot --target plain.duckdb"
    )]
    Backfill(backfill::BackfillArgs),
    /// Look for what stands in the way, with the SQL or setting that mends it
    #[command(
        after_help = "Examples:\n  rhei check --source postgresql://rhei@db.example.com/shop\n  \
                      rhei check --source postgresql://postgres@db.example.com/shop \
                      --install-ddl-trigger"
    )]
    Check(check::CheckArgs),
    /// Say how far the copy is
    #[command(after_help = "Examples:\n  rhei status\n  rhei status --json | jq .checkpoint.lsn")]
    Status(status::StatusArgs),
    /// Copy a table again while its old copy stays readable
    #[command(after_help = "Example:\n  rhei resync public.orders")]
    Resync(backfill::ResyncArgs),
    /// Pause copies: no more pieces are begun, the snapshot is given back, the stream goes on
    #[command(after_help = "Example:\n  rhei pause && sleep 3600 && rhei resume")]
    Pause,
    /// Go on with copies that were paused, from where they were
    #[command(after_help = "Example:\n  rhei resume")]
    Resume,
    /// List the pieces of copies: what is open, what failed and why
    #[command(
        after_help = "Examples:\n  rhei jobs\n  rhei jobs --all\n  rhei jobs --json | jq '.[] | \
                      select(.error)'"
    )]
    Jobs(jobs::JobsArgs),
    /// Rewrite the file without deleted rows and free space, also while a replicator runs
    #[command(
        after_help = "Examples:\n  rhei compact\n  rhei compact --json | jq .after.file_bytes"
    )]
    Compact(compact::CompactArgs),
    /// Prove that the copy is equal to its source, also while a replicator runs; 3 if it is not
    #[command(
        after_help = "Examples:\n  rhei verify\n  rhei verify --table public.orders --values\n  \
                      rhei verify --json | jq '.tables[] | select(.verdict != \"equal\")'\n  \
                      rhei verify --repair\n  rhei verify --sample 5% --rate-limit 50MB"
    )]
    Verify(verify::VerifyArgs),
    /// Run a statement over the copy, also while a replicator writes it
    #[command(after_help = "Examples:\n  rhei query 'SELECT count(*) FROM orders'\n  rhei query \
                      --at-least now --format csv 'FROM orders' > orders.csv\n  rhei query \
                      --format json 'SELECT * FROM _rhei.freshness' | jq")]
    Query(query::QueryArgs),
    /// Write a copy of the copy for tools that want a file, also while a replicator runs
    #[command(after_help = "Examples:\n  rhei publish --path shop.ro.duckdb\n  rhei publish \
                      --path shop-parquet --format parquet --keep 2\n  rhei publish --json | jq \
                      .lsn")]
    Publish(publish::PublishArgs),
    /// Have a running replicator read its settings again, as SIGHUP does
    #[command(after_help = "Example:\n  rhei reload")]
    Reload,
    /// Change what a running replicator logs
    #[command(after_help = "Examples:\n  rhei log debug\n  rhei log info")]
    Log(reload::LogArgs),
    /// Wait until the copy has reached a position of the source, to read your own writes
    #[command(
        after_help = "Examples:\n  rhei wait --now && rhei query 'SELECT count(*) FROM orders'\n  \
                      rhei wait --lsn 0/16B3748 --timeout 10s\n  rhei wait --now --settled \
                      --timeout 1h"
    )]
    Wait(wait::WaitArgs),
    /// Let readers connect to a file that no replicator holds, with PostgreSQL's protocol
    #[command(after_help = "Example:\n  rhei serve --target shop.duckdb & psql -h 127.0.0.1 -p \
                      5439 -d shop")]
    Serve,
    /// Remove the slot and the publication that rhei made; says what it would do first
    #[command(after_help = "Examples:\n  rhei drop\n  rhei drop --yes")]
    Drop(drop::DropArgs),
    /// Write a commented rhei.toml from what is found at the source
    #[command(after_help = "Example:\n  rhei init --source postgresql://rhei@db.example.com/shop \
                      --target shop.duckdb")]
    Init(init::InitArgs),
    /// Print completions for a shell
    #[command(after_help = "Example:\n  rhei completions bash > \
                      ~/.local/share/bash-completion/completions/rhei")]
    Completions(shell::CompletionsArgs),
    /// Write the man pages into a folder
    #[command(hide = true, after_help = "Example:\n  rhei man /usr/local/share/man/man1")]
    Man(shell::ManArgs),
    /// A throwaway Postgres, live writes, replication and queries; nothing to configure
    #[command(after_help = "Example:\n  rhei demo --seconds 60")]
    Demo(demo::DemoArgs),
}

/// The errors that end a command.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Engine(#[from] crate::pipeline::EngineError),
    #[error(transparent)]
    Observe(#[from] crate::observe::ObserveError),
    #[error(transparent)]
    Serve(#[from] crate::serve::ServeError),
    #[error("{0}")]
    Failed(String),
}

macro_rules! through_engine {
    ($($error:ty),*) => {$(
        impl From<$error> for CliError {
            fn from(error: $error) -> Self {
                Self::Engine(error.into())
            }
        }
    )*};
}
through_engine!(
    crate::source::SourceError,
    crate::source::connection::ConnectError,
    crate::source::catalog::CatalogError,
    crate::olap::TargetError
);

/// The settings that every command begins with.
#[derive(Clone)]
pub struct Invocation {
    config: Config,
    is_quiet: bool,
    style: Style,
}

impl Invocation {
    fn source(&self) -> Result<SourceOptions, CliError> {
        let url = self.config.source_url.as_ref().map(Secret::expose).unwrap_or_default();
        let mut environment = Environment::from_process();
        if let Some(file) = &self.config.source_password_file {
            environment = environment.with("PGPASSWORD", read_password(file)?.expose());
        }

        SourceOptions::parse(url, &environment).map_err(|error| match error {
            crate::source::connection::ConnectError::NoSource => ConfigError::NoSource.into(),
            error @ crate::source::connection::ConnectError::Invalid { .. } => {
                ConfigError::Environment {
                    variable: "source URL".to_owned(),
                    reason: error.to_string(),
                }
                .into()
            }
            error => error.into(),
        })
    }

    fn target(&self) -> Result<TargetOptions, CliError> {
        let config = &self.config;
        let lake = config.lake.as_ref().map(|lake| Arc::new(self.lake(lake)));
        let path = match &config.lake {
            Some(lake) => lake.state_path.clone(),
            None => config.target_path.clone().ok_or(ConfigError::NoTarget)?,
        };
        Ok(TargetOptions {
            path,
            lake,
            duckdb_memory_limit: config.duckdb_memory_limit.map(|size| format!("{}B", size.0)),
            threads: config.threads,
        })
    }

    /// Returns where a lake is, with the credentials that the environment has.
    fn lake(&self, lake: &LakeSettings) -> LakeOptions {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let key = variable("AWS_ACCESS_KEY_ID").zip(variable("AWS_SECRET_ACCESS_KEY"));

        let sections = self.config.table_settings.iter();
        let layouts = sections.filter_map(|(name, section)| {
            let (schema, table) = name.split_once('.')?;
            let layout = Layout {
                partition_by: section.partition_by.clone(),
                sort_by: section.sort_by.clone(),
            };
            (layout != Layout::default()).then(|| (QualifiedName::new(schema, table), layout))
        });

        LakeOptions {
            catalog: lake.catalog.expose().to_owned(),
            password: variable("RHEI_LAKE_PASSWORD"),
            data_path: lake.data_path.clone(),
            schema_prefix: lake.schema_prefix.clone(),
            keep_snapshots: lake.keep_snapshots,
            clean_after: lake.clean_after,
            file_bytes: lake.file_size.0 as u64,
            s3: S3Options {
                endpoint: lake.s3_endpoint.clone(),
                region: lake
                    .s3_region
                    .clone()
                    .or_else(|| variable("AWS_REGION"))
                    .or_else(|| variable("AWS_DEFAULT_REGION")),
                key: key.map(|(id, secret)| (id, secret, variable("AWS_SESSION_TOKEN"))),
            },
            extension_folders: extension_folders(
                variable("RHEI_EXTENSIONS").map(Into::into),
                variable("HOME").map(Into::into),
            ),
            layouts: layouts.collect(),
        }
    }

    /// Returns the settings of each table that has any.
    fn table_settings(&self) -> BTreeMap<String, TableSettings> {
        let mut table_settings = BTreeMap::new();
        for (name, section) in &self.config.table_settings {
            let target = section.target.as_ref().map(|target| match target.split_once('.') {
                Some((schema, name)) => QualifiedName::new(schema, name),
                None => QualifiedName::new(
                    name.split_once('.').map_or("main", |(schema, _)| schema),
                    target.clone(),
                ),
            });

            let types = section.columns.iter().filter_map(|(column, section)| {
                Some((column.clone(), section.duckdb_type.clone()?))
            });

            let settings = TableSettings {
                target,
                exclude_columns: section.exclude_columns.clone(),
                column_types: types.collect(),
                copy_priority: section.copy_priority,
                in_lake: None,
            };
            table_settings.insert(name.clone(), settings);
        }

        table_settings
    }

    /// Makes a pipeline from the settings, and the display of its progress.
    fn context(&self) -> Result<(Context, progress::Progress), CliError> {
        let (context, events) = self.pipeline()?;
        let progress =
            progress::Progress::start(events, self.style, context.copy_progress.clone(), None);
        Ok((context, progress))
    }

    /// The same, for a process that a service manager may have started.
    fn service_context(&self) -> Result<(Context, progress::Progress), CliError> {
        let (context, events) = self.pipeline()?;
        let copies = context.copy_progress.clone();
        let service = service::Service::from_environment(&context.pulse, &copies);
        Ok((context, progress::Progress::start(events, self.style, copies, service)))
    }

    /// Makes a pipeline from the settings, and the end at which its events arrive.
    fn pipeline(&self) -> Result<(Context, mpsc::UnboundedReceiver<Event>), CliError> {
        let options = self.options(self.source()?, self.target()?);
        let (events, heard) = mpsc::unbounded_channel();
        Ok((Context::new(options, events), heard))
    }

    /// Returns the settings of a pipeline between `source` and `target`.
    fn options(&self, source: SourceOptions, target: TargetOptions) -> Options {
        let config = &self.config;
        Options {
            source,
            target,
            publications: config.publications.clone(),
            slot: config.slot.clone(),
            failover_slot: config.failover_slot,
            on_slot_lost: config.on_slot_lost,
            add_tables: config.add_tables,
            tables: config.tables.clone(),
            exclude: config.exclude.clone(),
            table_settings: self.table_settings(),
            interval: config.interval,
            max_batch_rows: config.max_batch_rows,
            memory_limit_bytes: config.memory_limit.0,
            null_unrepresentable: config.on_unrepresentable == OnUnrepresentable::Null,
            trust_widening: config.trust_widening,
            catalog_interval: config.catalog_interval,
            workers: config.workers,
            rate_limit_bytes: config.rate_limit.map(|limit| limit.0 as u64),
            chunk_bytes: config.chunk_size.map(|size| size.0 as u64),
            snapshot_warning: config.snapshot_warning,
            supervision: config.supervision,
            verification: config.verification.clone(),
            publication: config.publication.clone(),
        }
    }

    /// Makes a command fail because of paused tables, after all other work is done. Tables that
    /// the settings accept as paused are a warning.
    fn report_paused(&self, paused: &[(String, String)]) -> Result<ExitCode, CliError> {
        let is_accepted = |table: &str| {
            let Some((schema, name)) = table.split_once('.') else { return false };
            let name = QualifiedName::new(schema, name);
            self.config.accept.iter().any(|pattern| pattern.matches(&name))
        };

        let (accepted, new): (Vec<_>, Vec<_>) =
            paused.iter().partition(|(table, _)| is_accepted(table));
        for (table, reason) in accepted {
            tracing::warn!(
                event = "pause_accepted",
                table,
                reason,
                "the table is paused, which the settings accept"
            );
        }

        let Some((first, reason)) = new.first() else { return Ok(ExitCode::SUCCESS) };
        let others = match new.len() {
            1 => String::new(),
            count => format!(" (and {} more; see `rhei status`)", count - 1),
        };
        Err(CliError::Failed(format!(
            "table {first} is paused: {reason}{others}\nhint: [sync] accept names tables that may \
             stay paused"
        )))
    }

    fn stop_on_signal(&self) -> CancellationToken {
        stop_on_signal()
    }
}

/// Returns a token that the first SIGINT or SIGTERM cancels. A second signal ends the process at
/// once, which is safe: what was committed stays, and what was not is done again.
fn stop_on_signal() -> CancellationToken {
    use tokio::signal::unix::{SignalKind, signal};

    let stop = CancellationToken::new();
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return stop;
    };

    let stopping = stop.clone();
    tokio::spawn(async move {
        for number in 1.. {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }

            if number > 1 {
                screen::close();
                std::process::exit(130);
            }

            tracing::info!(
                event = "stop_requested",
                "stopping after the open cycle; a second signal stops at once"
            );
            service::stopping();
            stopping.cancel();
        }
    });

    stop
}

/// Runs the whole program.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        screen::close();
        eprintln!(
            "error: rhei met a bug of its own: {panic}\nhint: nothing committed is lost; please \
             report this"
        );
    }));

    crate::failpoint::begin();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };

    log::start(&cli.global);
    // Every file and socket that rhei and DuckDB make is private to the user as soon as it exists.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // With a second provider in the dependency tree, rustls could not choose one by itself.
    let _ = rustls::crypto::ring::default_provider().install_default();

    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report::failed(&CliError::Failed(format!("cannot start: {error}"))),
    };

    let ended = runtime.block_on(dispatch(cli));
    // The shutdown does not wait for a call to DuckDB that is still running, since its result is no
    // longer needed.
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    screen::close();
    ended.unwrap_or_else(|error| report::failed(&error))
}

/// Lets those read the files of a lake in a folder who may read the folder; for the commands that
/// write it. A catalog that is a file is for these readers, too; the socket, and the folder of what
/// DuckDB spills, have modes of their own.
fn let_readers_in(config: &Config) {
    use std::os::unix::fs::PermissionsExt;

    let folder = config.lake.as_ref().and_then(|lake| lake.data_path.as_deref());
    let Some(Ok(folder)) = folder.map(std::fs::metadata) else { return };
    let closed_to_readers = !folder.permissions().mode() & 0o077;
    let mask = rustix::fs::Mode::from_raw_mode(closed_to_readers | 0o022);
    rustix::process::umask(mask);
}

async fn dispatch(cli: Cli) -> Result<ExitCode, CliError> {
    let style = Style::new(cli.global.progress, cli.global.quiet, Terminal::of_process());
    match cli.command {
        Command::Demo(args) => {
            return Box::pin(demo::run_demo(args, style, stop_on_signal())).await;
        }
        Command::Completions(args) => return Ok(shell::completions(&args)),
        Command::Man(args) => return shell::man(&args),
        _ => {}
    }

    let inputs = Inputs {
        file: cli.global.config,
        source: cli.global.source.map(Secret::new),
        target: cli.global.target,
        environment: std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with("RHEI_"))
            .collect(),
    };

    let session = Invocation { config: Config::load(&inputs)?, is_quiet: cli.global.quiet, style };
    if matches!(
        cli.command,
        Command::Sync
            | Command::Run
            | Command::Backfill(_)
            | Command::Compact(_)
            | Command::Verify(_)
    ) {
        let_readers_in(&session.config);
    }
    match cli.command {
        Command::Sync => Box::pin(sync::run(session)).await,
        Command::Run => Box::pin(run::run(session, inputs)).await,
        Command::Backfill(args) => Box::pin(backfill::run(session, args)).await,
        Command::Check(args) => Box::pin(check::run(session, args)).await,
        Command::Status(args) => Box::pin(status::run(session, args)).await,
        Command::Resync(args) => Box::pin(backfill::resync(session, args)).await,
        Command::Pause => Box::pin(backfill::pause(session, true)).await,
        Command::Resume => Box::pin(backfill::pause(session, false)).await,
        Command::Jobs(args) => Box::pin(jobs::run(session, args)).await,
        Command::Compact(args) => Box::pin(compact::run(session, args)).await,
        Command::Verify(args) => Box::pin(verify::run(session, args)).await,
        Command::Query(args) => Box::pin(query::run(session, args)).await,
        Command::Publish(args) => Box::pin(publish::run(session, args)).await,
        Command::Reload => Box::pin(reload::reload(session)).await,
        Command::Log(args) => Box::pin(reload::set_log(session, args)).await,
        Command::Wait(args) => Box::pin(wait::run(session, args)).await,
        Command::Serve => Box::pin(serve::run(session)).await,
        Command::Drop(args) => Box::pin(drop::run(session, args)).await,
        Command::Init(args) => Box::pin(init::run(session, args)).await,
        Command::Demo(_) | Command::Completions(_) | Command::Man(_) => Ok(ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn flags_stand_before_or_after_the_command() {
        Cli::command().debug_assert();
        for words in [["rhei", "--target", "a", "sync"], ["rhei", "sync", "--target", "a"]] {
            assert_eq!(Cli::try_parse_from(words).unwrap().global.target, Some("a".into()));
        }
    }

    #[test]
    fn every_help_ends_with_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Example"), "{}", command.get_name());
        }
    }
}
