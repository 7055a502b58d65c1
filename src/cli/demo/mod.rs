//! `rhei demo`: a throwaway Postgres with a shop in it, live writes, replication, queries; the user
//! configures nothing.

mod server;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use server::{KeptShop, Purpose, Throwaway};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_postgres::SimpleQueryMessage;
use tokio_util::sync::CancellationToken;

use super::{
    CliError, Context,
    bars::thousands,
    progress::Style,
    query,
    screen::{self, print_above},
};
use crate::{
    engine::{self, attach::Recopy},
    olap::{DuckDb, SharedFile, TargetOptions},
    pipeline::{EngineError, Event, Options, Writer, meter::Meter},
    serve::{Endpoint, Listen, ServeOptions},
    source::connection::{Environment, SourceOptions, SqlClient, connect_sql},
};

const SCHEMA: &str = include_str!("../../../fixtures/demo/schema.sql");
const LOAD: &str = include_str!("../../../fixtures/demo/load.sql");
const WRITES: &str = include_str!("../../../fixtures/demo/writes.sql");
const QUERIES: &str = include_str!("../../../fixtures/demo/queries.sql");

/// Flags of `rhei demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// How long to follow the live writes
    #[arg(long, default_value = "8", value_name = "SECONDS")]
    pub seconds: u64,
}

fn failed(what: impl Into<String>) -> CliError {
    CliError::Failed(what.into())
}

/// Runs the command.
pub async fn run_demo(
    args: DemoArgs,
    style: Style,
    stop: CancellationToken,
) -> Result<ExitCode, CliError> {
    let target = PathBuf::from("demo.duckdb");
    remove_old(&target)?;

    println!("1. a throwaway Postgres with a shop in it");
    let started = Instant::now();
    let (server, source, is_kept) = tokio::select! {
        () = stop.cancelled() => return Ok(ExitCode::from(130)),
        opened = open_shop() => opened?,
    };
    let client = connect_to_shop(&source, "demo").await?;

    println!(
        "   {} rows{} in {:.1} s",
        thousands(count_rows(&client).await?),
        if is_kept { " kept from an earlier demo," } else { "" },
        started.elapsed().as_secs_f64()
    );

    println!("2. a writer begins, rhei copies and follows");
    let replication = Replication::start(source, &target, style, &stop);
    replication.follow(args.seconds, &stop).await?;
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

/// Starts a server with the shop in it, and returns also whether an earlier demo has made the shop.
async fn open_shop() -> Result<(Throwaway, SourceOptions, bool), CliError> {
    let options = |server: &Throwaway| SourceOptions::parse(&server.url(), &Environment::default());

    let mut server = Throwaway::new()?;
    let kept = KeptShop::of(&server, &[SCHEMA, LOAD])?;
    if kept.restore(&server) {
        match server.start(Purpose::Source) {
            Ok(()) => {
                let options = options(&server)?;
                return Ok((server, options, true));
            }
            // The machine was switched off while the shop was written, say.
            Err(_) => kept.forget(&server)?,
        }
    }

    server.make_data()?;
    server.start(Purpose::Load)?;
    let client = connect_sql(&options(&server)?, "demo").await?;
    load_shop(&client).await?;
    drop(client);
    server.stop()?;
    kept.keep(&server);

    server.start(Purpose::Source)?;
    let options = options(&server)?;
    Ok((server, options, false))
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
    let set = client.batch_execute("SET search_path = public; SET TimeZone = 'UTC'").await;
    set.map_err(crate::source::SourceError::from)?;
    Ok(client)
}

async fn load_shop(client: &tokio_postgres::Client) -> Result<(), CliError> {
    // One transaction: what it writes to tables of its own goes past the WAL of a server that only
    // loads.
    for sql in [&format!("SET search_path = public; {SCHEMA}; {LOAD}"), "VACUUM ANALYZE"] {
        client.batch_execute(sql).await.map_err(crate::source::SourceError::from)?;
    }
    Ok(())
}

/// A writer at the source and a replicator that follows it.
struct Replication {
    context: Context,
    style: Style,
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
    fn start(source: SourceOptions, target: &Path, style: Style, stop: &CancellationToken) -> Self {
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

        Self {
            context,
            style,
            seen,
            written,
            writer,
            writer_stop,
            replicator,
            replicator_stop,
            listener,
        }
    }

    /// Shows the progress of the copy, and then for `seconds` how the stream is followed, and how
    /// the copy answers meanwhile.
    async fn follow(&self, seconds: u64, stop: &CancellationToken) -> Result<(), CliError> {
        let copying = Instant::now();
        let tables = SCHEMA.matches("CREATE TABLE").count() as u64;
        while self.seen.live.load(Ordering::Relaxed) < tables {
            self.show_line(|| self.copying_line());
            if !self.pause(stop).await {
                return Ok(());
            }
        }

        print_above(&format!(
            "   copied {} rows in {:.1} s",
            thousands(self.seen.copied.load(Ordering::Relaxed)),
            copying.elapsed().as_secs_f64()
        ));

        let mut reader = Reader::connect(self.seen.endpoint.get()).await?;
        let following = Instant::now();
        while following.elapsed() < Duration::from_secs(seconds) {
            self.show_line(|| self.following_line());
            if let Some(reader) = &mut reader {
                reader.ask(&self.written).await?;
            }
            if !self.pause(stop).await {
                break;
            }
        }

        screen::show(Vec::new());
        if let (Some(reader), Some(listen)) = (reader, self.seen.endpoint.get()) {
            println!("   {} answers; any client could ask:", thousands(reader.answers));
            println!("   {}", query::psql_line(listen));
        }
        println!("   in {} s, {}", following.elapsed().as_secs(), self.following_line());
        Ok(())
    }

    /// Waits a moment. Returns `false` when the replicator has ended or the user stops the demo.
    async fn pause(&self, stop: &CancellationToken) -> bool {
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }

        let goes_on = !stop.is_cancelled() && !self.replicator.is_finished();
        if !goes_on {
            screen::show(Vec::new());
        }
        goes_on
    }

    fn show_line(&self, line: impl FnOnce() -> String) {
        if self.style == Style::Bars {
            screen::show(vec![format!("   {}", line())]);
        }
    }

    fn copying_line(&self) -> String {
        let rows = self.context.copy_progress.overview().map_or(0, |all| all.total.rows);
        format!("copying: {} rows", thousands(rows))
    }

    fn following_line(&self) -> String {
        format!(
            "followed {} source transactions, {} row changes; {} bytes of WAL behind",
            thousands(self.seen.transactions.load(Ordering::Relaxed)),
            thousands(self.seen.changes.load(Ordering::Relaxed)),
            thousands(self.seen.lag_bytes.load(Ordering::Relaxed)),
        )
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

/// A client that asks the copy something while the writer and the replicator go on.
struct Reader {
    client: tokio_postgres::Client,
    last_line: Option<Instant>,
    answers: u64,
}

impl Reader {
    const LINE_INTERVAL: Duration = Duration::from_secs(2);

    /// Connects to where readers can; none when there is no such place.
    async fn connect(endpoint: Option<&Listen>) -> Result<Option<Self>, CliError> {
        let Some(listen) = endpoint else { return Ok(None) };
        println!("3. a client of PostgreSQL asks the copy while the writer writes");
        let client = query::connect(listen, None).await?;
        Ok(Some(Self { client, last_line: None, answers: 0 }))
    }

    /// Asks, and prints the answer when the last one is long enough ago.
    async fn ask(&mut self, written: &AtomicU64) -> Result<(), CliError> {
        const QUESTION: &str = "SELECT f.lsn, round(extract(epoch FROM f.age) * 1000), (SELECT \
                                count(*) FROM orders) FROM _rhei.freshness f";
        let asked = Instant::now();
        let answer = self.client.simple_query(QUESTION).await.map_err(query::failed)?;
        let took = asked.elapsed().as_secs_f64() * 1000.0;
        self.answers += 1;

        if self.last_line.is_some_and(|last| last.elapsed() < Self::LINE_INTERVAL) {
            return Ok(());
        }
        self.last_line = Some(asked);

        for message in answer {
            let SimpleQueryMessage::Row(row) = message else { continue };
            let cell = |at| row.get(at).unwrap_or("?");
            let orders = cell(2).parse().map_or_else(|_| cell(2).to_owned(), thousands);
            print_above(&format!(
                "   {orders} orders at {}, {} ms old, answered in {took:.1} ms; {} transactions \
                 written",
                cell(0),
                cell(1),
                thousands(written.load(Ordering::Relaxed)),
            ));
        }
        Ok(())
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
        table.load_preset(comfy_table::presets::NOTHING);
        table.set_header(header);

        for row in ours.iter().take(6) {
            table.add_row(row.iter().map(|value| value.as_deref().unwrap_or("NULL")));
        }
        for line in table.lines() {
            println!("     {}", line.trim());
        }
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
