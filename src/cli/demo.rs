//! `rhei demo`: a throwaway Postgres with a shop in it, live writes, replication, queries; the user
//! configures nothing.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_postgres::SimpleQueryMessage;
use tokio_util::sync::CancellationToken;

use super::{CliError, Context, query};
use crate::{
    engine::{self, attach::Recopy},
    olap::{DuckDb, SharedFile, TargetOptions},
    pipeline::{EngineError, Event, Options, Writer, meter::Meter},
    serve::{Endpoint, Listen, ServeOptions},
    source::connection::{Environment, SourceOptions, SqlClient, connect_sql},
};

const SCHEMA: &str = include_str!("../../fixtures/demo/schema.sql");
const LOAD: &str = include_str!("../../fixtures/demo/load.sql");
const WRITES: &str = include_str!("../../fixtures/demo/writes.sql");
const QUERIES: &str = include_str!("../../fixtures/demo/queries.sql");

/// Flags of `rhei demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// How long to follow the live writes
    #[arg(long, default_value = "20", value_name = "SECONDS")]
    pub seconds: u64,
}

fn failed(what: impl Into<String>) -> CliError {
    CliError::Failed(what.into())
}

/// A server that stops when the demo ends, whether the demo succeeds or fails.
struct Throwaway {
    bin: PathBuf,
    folder: PathBuf,
    as_postgres: bool,
}

impl Throwaway {
    fn start() -> Result<Self, CliError> {
        let bin = find_postgres()?;
        let folder = std::env::temp_dir().join(format!("rhei-demo-{}", std::process::id()));
        std::fs::create_dir_all(&folder)
            .map_err(|error| failed(format!("cannot make {}: {error}", folder.display())))?;

        // initdb refuses to run as root.
        let as_postgres = std::fs::metadata("/proc/self")
            .is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0);
        if as_postgres {
            run(Command::new("chown").arg("postgres").arg(&folder), "chown")?;
        }

        let server = Self { bin, folder, as_postgres };
        let data = server.folder.join("data");
        run(
            server
                .command("initdb")
                .arg("-D")
                .arg(&data)
                .args(["-A", "trust", "-U", "postgres", "-E", "UTF8"])
                .args(["--locale=C", "--no-sync"]),
            "initdb",
        )?;

        let settings = format!(
            "-c wal_level=logical -c fsync=off -c synchronous_commit=off -c max_wal_size=4GB -c \
             listen_addresses='' -c unix_socket_directories={}",
            server.folder.display()
        );

        run(
            server
                .command("pg_ctl")
                .arg("-D")
                .arg(&data)
                .arg("-l")
                .arg(server.folder.join("log"))
                .args(["-w", "-o", &settings, "start"]),
            "pg_ctl start",
        )?;

        Ok(server)
    }

    fn command(&self, program: &str) -> Command {
        let path = self.bin.join(program);
        let mut command = if self.as_postgres {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(path);
            command
        } else {
            Command::new(path)
        };

        // The user of the server may not be allowed to read the current folder of the demo.
        command.current_dir(&self.folder);
        command
    }

    fn url(&self) -> String {
        format!("host={} user=postgres dbname=postgres", self.folder.display())
    }
}

impl Drop for Throwaway {
    fn drop(&mut self) {
        let data = self.folder.join("data");
        let _ = run(
            self.command("pg_ctl").arg("-D").arg(&data).args(["-m", "immediate", "-w", "stop"]),
            "pg_ctl stop",
        );
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn find_postgres() -> Result<PathBuf, CliError> {
    let has_initdb =
        |folder: &Path| folder.join("initdb").exists() && folder.join("pg_ctl").exists();

    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|folder| has_initdb(folder))
        .collect();
    found.sort();

    if let Some(newest) = found.pop() {
        return Ok(newest);
    }

    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        if has_initdb(&folder) {
            return Ok(folder);
        }
    }

    std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .find(|folder| has_initdb(folder))
        .ok_or_else(|| {
            failed(
                "no PostgreSQL server found for the demo\nhint: `make setup` installs one, or \
                    install the package postgresql",
            )
        })
}

fn run(command: &mut Command, what: &str) -> Result<(), CliError> {
    // The server that pg_ctl starts inherits the output, so reading from a pipe would never end.
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(failed(format!("{what} failed ({status})"))),
        Err(error) => Err(failed(format!("cannot run {what}: {error}"))),
    }
}

/// Runs the command.
pub async fn run_demo(args: DemoArgs, stop: CancellationToken) -> Result<ExitCode, CliError> {
    let target = PathBuf::from("demo.duckdb");
    remove_old(&target)?;

    println!("1. a throwaway Postgres with a shop in it");
    let started = Instant::now();
    let server = Throwaway::start()?;
    let source = SourceOptions::parse(&server.url(), &Environment::default())?;
    let client = connect_to_shop(&source, "demo").await?;

    tokio::select! {
        () = stop.cancelled() => return Ok(ExitCode::from(130)),
        loaded = load_shop(&client) => loaded?,
    }

    println!(
        "   {} rows in {:.1} s",
        thousands(count_rows(&client).await?),
        started.elapsed().as_secs_f64()
    );

    println!("2. a writer begins, rhei copies and follows");
    let replication = Replication::start(source, &target, &stop);
    replication.follow(args.seconds, &stop).await;
    replication.ask_live_copy().await?;
    if !replication.finish(&stop).await? {
        println!("stopped");
        return Ok(ExitCode::from(130));
    }

    println!("4. the same questions to both");
    let is_equal = ask_both(&client, &target).await?;

    drop(client);
    drop(server);
    println!();
    println!("the copy is in {0}: open it with `duckdb {0}`", target.display());

    Ok(if is_equal { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Removes the copy of an earlier demo.
fn remove_old(target: &Path) -> Result<(), CliError> {
    for old in [target.to_owned(), PathBuf::from("demo.duckdb.wal")] {
        if old.exists() {
            std::fs::remove_file(&old)
                .map_err(|error| failed(format!("cannot replace {}: {error}", old.display())))?;
        }
    }
    Ok(())
}

async fn connect_to_shop(source: &SourceOptions, purpose: &str) -> Result<SqlClient, CliError> {
    let client = connect_sql(source, purpose).await?;
    client
        .batch_execute("SET search_path = public")
        .await
        .map_err(crate::source::SourceError::from)?;
    Ok(client)
}

async fn load_shop(client: &tokio_postgres::Client) -> Result<(), CliError> {
    for sql in [SCHEMA, LOAD, "VACUUM ANALYZE"] {
        client.batch_execute(sql).await.map_err(crate::source::SourceError::from)?;
    }
    Ok(())
}

/// A writer at the source and a replicator that follows it.
struct Replication {
    context: Context,
    seen: Arc<Seen>,
    /// The number of transactions that the writer has committed.
    written: Arc<AtomicU64>,
    writer: JoinHandle<Result<(), CliError>>,
    writer_stop: CancellationToken,
    replicator: JoinHandle<Result<(), EngineError>>,
    replicator_stop: CancellationToken,
    /// Counts the events of the replicator; it ends when the context is dropped.
    listener: JoinHandle<()>,
}

impl Replication {
    fn start(source: SourceOptions, target: &Path, stop: &CancellationToken) -> Self {
        let (events, heard) = mpsc::unbounded_channel();
        let target_options = TargetOptions { path: target.to_owned(), ..TargetOptions::default() };
        let options = Options {
            interval: Duration::from_millis(200),
            ..Options::new(source.clone(), target_options)
        };
        let context = Context::new(options, events);

        let writer_stop = stop.child_token();
        let written = Arc::new(AtomicU64::new(0));
        let writer = tokio::spawn(write(source, writer_stop.clone(), Arc::clone(&written)));

        let replicator_stop = stop.child_token();
        let seen = Arc::new(Seen::default());
        let listener = tokio::spawn(listen(heard, Arc::clone(&seen)));
        let replicator =
            tokio::spawn(replicate(context.clone(), Arc::clone(&seen), replicator_stop.clone()));

        Self { context, seen, written, writer, writer_stop, replicator, replicator_stop, listener }
    }

    /// Shows the progress of the copy, and then for `seconds` how the stream is followed.
    async fn follow(&self, seconds: u64, stop: &CancellationToken) {
        let copying = Instant::now();
        let tables = SCHEMA.matches("CREATE TABLE").count() as u64;
        let bar = indicatif::ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(100));

        let mut streaming_since = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(Duration::from_millis(200)) => {}
            }

            if self.replicator.is_finished() {
                break;
            }

            if streaming_since.is_none() && self.seen.live.load(Ordering::Relaxed) == tables {
                streaming_since = Some(Instant::now());
                bar.suspend(|| self.print_copied(copying));
            }

            match streaming_since {
                None => bar.set_message(self.copying_message()),
                Some(since) => {
                    bar.set_message(self.following_message());
                    if since.elapsed() >= Duration::from_secs(seconds) {
                        break;
                    }
                }
            }
        }

        bar.finish_and_clear();
        if streaming_since.is_some() {
            self.print_followed(seconds);
        }
    }

    fn copying_message(&self) -> String {
        let rows = self.context.copy_progress.progress().map_or(0, |(_, total)| total.rows);
        format!("copying: {} rows", thousands(rows))
    }

    fn following_message(&self) -> String {
        format!(
            "following: {} transactions, {} row changes applied of {} written, {} bytes of WAL \
             behind",
            thousands(self.seen.transactions.load(Ordering::Relaxed)),
            thousands(self.seen.changes.load(Ordering::Relaxed)),
            thousands(self.written.load(Ordering::Relaxed)),
            thousands(self.seen.lag_bytes.load(Ordering::Relaxed)),
        )
    }

    fn print_copied(&self, since: Instant) {
        println!(
            "   copied {} rows in {:.1} s",
            thousands(self.seen.copied.load(Ordering::Relaxed)),
            since.elapsed().as_secs_f64()
        );
    }

    fn print_followed(&self, seconds: u64) {
        println!(
            "   followed {seconds} s: {} source transactions, {} row changes, {} bytes of WAL \
             behind",
            thousands(self.seen.transactions.load(Ordering::Relaxed)),
            thousands(self.seen.changes.load(Ordering::Relaxed)),
            thousands(self.seen.lag_bytes.load(Ordering::Relaxed)),
        );
    }

    /// Asks the copy something while the writer and the replicator go on, as any client would.
    async fn ask_live_copy(&self) -> Result<(), CliError> {
        const QUESTION: &str = "SELECT f.lsn, round(extract(epoch FROM f.age) * 1000), (SELECT \
                                count(*) FROM orders) FROM _rhei.freshness f";
        let Some(listen) = self.seen.endpoint.get() else { return Ok(()) };
        println!("3. the copy answers while the writer still writes");

        let client = query::connect(listen, None).await?;
        let started = Instant::now();
        for message in client.simple_query(QUESTION).await.map_err(query::failed)? {
            let SimpleQueryMessage::Row(row) = message else { continue };
            let cell = |at| row.get(at).unwrap_or("?");
            println!(
                "   {} orders as of {}, {} ms after their last commit; answered in {:.1} ms",
                cell(2),
                cell(0),
                cell(1),
                started.elapsed().as_secs_f64() * 1000.0
            );
        }
        println!("   any client of PostgreSQL could ask: {}", query::psql_line(listen));
        Ok(())
    }

    /// Ends the writer and brings the copy to where the writer ended. Returns `false` when the user
    /// has stopped the demo.
    async fn finish(self, stop: &CancellationToken) -> Result<bool, CliError> {
        self.writer_stop.cancel();
        let _ = self.writer.await;

        // The copy catches up with the last writes before the queries, so that both sides show the
        // same moment.
        self.replicator_stop.cancel();
        self.replicator.await.map_err(|_| failed("the replicator ended without a result"))??;
        if stop.is_cancelled() {
            return Ok(false);
        }

        let caught_up = engine::sync(&self.context, Recopy::None, stop).await?;
        drop(self.context);
        let _ = self.listener.await;

        println!(
            "   writer stopped after {} transactions; the copy is at {}, nothing is missing",
            thousands(self.written.load(Ordering::Relaxed)),
            caught_up.checkpoint
        );
        Ok(true)
    }
}

/// What the replicator has reported so far.
#[derive(Default)]
struct Seen {
    transactions: AtomicU64,
    changes: AtomicU64,
    copied: AtomicU64,
    lag_bytes: AtomicU64,
    /// The number of tables that are live.
    live: AtomicU64,
    /// Where readers can connect.
    endpoint: OnceLock<Listen>,
}

/// Counts the events of the replicator.
async fn listen(mut heard: mpsc::UnboundedReceiver<Event>, seen: Arc<Seen>) {
    while let Some(event) = heard.recv().await {
        match event {
            Event::CopyFinished { rows, .. } => {
                seen.copied.fetch_add(rows, Ordering::Relaxed);
            }
            Event::WentLive { .. } => {
                seen.live.fetch_add(1, Ordering::Relaxed);
            }
            Event::Cycle(report) => {
                seen.transactions.fetch_add(report.source_transactions, Ordering::Relaxed);
                let changes = report.inserted + report.updated + report.deleted;
                seen.changes.fetch_add(changes, Ordering::Relaxed);
                seen.lag_bytes.store(report.lag_bytes, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// Copies and follows the source until `stop`, and lets readers connect meanwhile.
async fn replicate(
    context: Context,
    seen: Arc<Seen>,
    stop: CancellationToken,
) -> Result<(), EngineError> {
    let mut target = DuckDb::open(&context.options.target)?;
    let file = target.share(None)?;
    let writer = Writer::new(target);

    let endpoint = match serve(&file, 5439).await {
        Some(endpoint) => Some(endpoint),
        None => serve(&file, 0).await,
    };
    if let Some(endpoint) = &endpoint
        && let Ok(listen) = endpoint.address().parse()
    {
        let _ = seen.endpoint.set(listen);
    }

    let (_command, commands) = mpsc::unbounded_channel();
    let ended = engine::run(&context, &writer, commands, &stop).await;
    if let Some(endpoint) = endpoint {
        endpoint.stop().await;
    }
    ended
}

/// Serves readers on a port of this machine; port 0 is any that is free.
async fn serve(file: &SharedFile, port: u16) -> Option<Endpoint> {
    let listen = Listen::Tcp(([127, 0, 0, 1], port).into());
    Endpoint::start(file.clone(), ServeOptions::on(listen), Meter::default()).await.ok()
}

/// Writes to the source until `stop`, one transaction after the other.
async fn write(
    source: SourceOptions,
    stop: CancellationToken,
    written: Arc<AtomicU64>,
) -> Result<(), CliError> {
    let client = connect_to_shop(&source, "demo writer").await?;

    while !stop.is_cancelled() {
        client.batch_execute(WRITES).await.map_err(crate::source::SourceError::from)?;
        written.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

async fn count_rows(client: &tokio_postgres::Client) -> Result<u64, CliError> {
    let query = "SELECT sum(c.reltuples)::bigint FROM pg_catalog.pg_class c JOIN \
                 pg_catalog.pg_namespace n ON n.oid = \
                 c.relnamespace WHERE n.nspname = 'public' AND c.relkind = 'r'";

    let row = client.query_one(query, &[]).await.map_err(crate::source::SourceError::from)?;
    let rows: i64 = row.try_get(0).map_err(crate::source::SourceError::from)?;
    Ok(rows.unsigned_abs())
}

/// Runs each question on both sides; returns whether all answers were equal.
async fn ask_both(client: &tokio_postgres::Client, target: &Path) -> Result<bool, CliError> {
    let copy = ::duckdb::Connection::open(target).map_err(crate::olap::TargetError::from)?;
    copy.execute_batch("SET TimeZone = 'UTC'; SET search_path = 'public'")
        .map_err(crate::olap::TargetError::from)?;

    let mut all_equal = true;
    for (number, question) in QUERIES.split("-- name:").skip(1).enumerate() {
        let (name, sql) = question.split_once('\n').unwrap_or((question, ""));
        let sql = sql.trim().trim_end_matches(';');

        let started = Instant::now();
        let theirs = ask_postgres(client, sql).await?;
        let postgres_time = started.elapsed();

        let started = Instant::now();
        let (header, ours) = ask_duckdb(&copy, sql)?;
        let duckdb_time = started.elapsed();

        if number == 0
            && let Some(since) =
                std::env::var("RHEI_DEMO_STARTED_AT").ok().and_then(|text| text.parse::<u64>().ok())
        {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
            println!("   (first query {} s after `make demo`)", now.saturating_sub(since));
        }

        let is_equal = theirs == ours;
        all_equal &= is_equal;

        println!();
        println!(
            "   {}: Postgres {:.1} ms, DuckDB {:.1} ms, {}",
            name.trim(),
            postgres_time.as_secs_f64() * 1000.0,
            duckdb_time.as_secs_f64() * 1000.0,
            if is_equal { "results equal" } else { "RESULTS DIFFER" }
        );

        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(header);

        for row in ours.iter().take(6) {
            table.add_row(row.iter().map(|value| value.as_deref().unwrap_or("NULL")));
        }
        println!("{table}");
    }

    Ok(all_equal)
}

type SchemaResolution = Vec<Vec<Option<String>>>;

async fn ask_postgres(
    client: &tokio_postgres::Client,
    sql: &str,
) -> Result<SchemaResolution, CliError> {
    let messages = client.simple_query(sql).await.map_err(crate::source::SourceError::from)?;

    let mut rows = Vec::new();
    for message in messages {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
            rows.push((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect());
        }
    }
    Ok(rows)
}

fn ask_duckdb(
    copy: &::duckdb::Connection,
    sql: &str,
) -> Result<(Vec<String>, SchemaResolution), CliError> {
    let ask = || {
        let mut statement = copy.prepare(&format!("SELECT COLUMNS(*)::VARCHAR FROM ({sql})"))?;
        let mut rows = statement.query([])?;
        let names = rows.as_ref().map(|statement| statement.column_names()).unwrap_or_default();

        let mut answer = Vec::new();
        while let Some(row) = rows.next()? {
            answer.push(
                (0..names.len()).map(|column| row.get(column)).collect::<Result<Vec<_>, _>>()?,
            );
        }
        Ok::<_, ::duckdb::Error>((names, answer))
    };
    Ok(ask().map_err(crate::olap::TargetError::from)?)
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
