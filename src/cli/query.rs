//! `rhei query`: runs a statement over the copy, also while a replicator writes it.

use std::{
    io::{IsTerminal, Write},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use futures_util::{StreamExt, TryStreamExt};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage, types::Type};

use super::{
    CliError, Invocation,
    wait::{self, Position},
};
use crate::{
    config::Span,
    control,
    olap::SharedFile,
    pipeline::meter::Meter,
    serve::{Endpoint, Listen, ServeOptions},
};

/// Flags of `rhei query`.
#[derive(Debug, Clone, Args)]
pub struct QueryArgs {
    /// The statement, in DuckDB's dialect
    pub sql: String,
    /// How rows are printed
    #[arg(long, value_enum, default_value = "table")]
    pub format: Format,
    /// Wait until the copy has what is committed at the source: "now", or before an LSN
    #[arg(long, value_name = "now|LSN")]
    pub at_least: Option<Position>,
    /// How long to wait for that
    #[arg(long, default_value = "60s", value_name = "TIME")]
    pub timeout: Span,
}

/// How rows are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Csv,
    /// An array with an object for each row
    Json,
    /// A stream of Arrow's IPC format, for pyarrow, polars, DuckDB
    Arrow,
}

/// Runs the command. A running replicator answers on its endpoint; otherwise this process opens the
/// file for reading.
pub async fn run(session: Invocation, args: QueryArgs) -> Result<ExitCode, CliError> {
    if let Some(position) = args.at_least {
        wait::wait(&session, position, args.timeout.0).await?;
    }

    let target = session.target()?;
    // A lake is open to every process.
    if target.lake.is_none() && control::request(&target.path, "status").await.is_some() {
        let Some(options) = &session.config.serve else {
            return Err(CliError::Failed(
                "a replicator has the copy open, and lets no reader in\nhint: set [serve] \
                 listen in rhei.toml, and start the replicator again"
                    .to_owned(),
            ));
        };
        let client = connect(&options.listen, Some(options)).await?;
        print(&client, &args).await?;
        return Ok(ExitCode::SUCCESS);
    }

    let file = SharedFile::open_read_only(&target)?;
    let folder = tempfile::tempdir().map_err(|error| CliError::Failed(error.to_string()))?;
    let listen = Listen::Unix { folder: folder.path().to_owned(), port: 5432 };
    let options =
        ServeOptions { statement_timeout: None, nice: 0, ..ServeOptions::on(listen.clone()) };
    let endpoint = Endpoint::start(file, options, Meter::default()).await?;
    let client = connect(&listen, None).await?;
    let printed = print(&client, &args).await;
    drop(client);
    endpoint.stop().await;
    printed?;
    Ok(ExitCode::SUCCESS)
}

/// Connects to a replicator of this machine.
pub async fn connect(listen: &Listen, options: Option<&ServeOptions>) -> Result<Client, CliError> {
    let mut config = tokio_postgres::Config::new();
    config.user("rhei").dbname("rhei").application_name("rhei query");
    config.connect_timeout(Duration::from_secs(10));
    match listen {
        Listen::Unix { folder, port } => config.host_path(folder).port(*port),
        Listen::Tcp(address) => {
            // The replicator of this file runs on this machine.
            let host = if address.ip().is_unspecified() {
                "127.0.0.1".to_owned()
            } else {
                address.ip().to_string()
            };
            config.host(&host).port(address.port())
        }
    };
    if let Some((user, password)) = options.and_then(|options| options.users.first()) {
        config.user(user).password(password);
    }

    let (client, connection) = config.connect(NoTls).await.map_err(failed)?;
    tokio::spawn(async move {
        // The client gets the error of a connection that breaks.
        let _ = connection.await;
    });
    Ok(client)
}

/// Returns the server's own words for an error.
pub fn failed(error: tokio_postgres::Error) -> CliError {
    CliError::Failed(match error.as_db_error() {
        Some(error) => {
            let hint = error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
            format!("{}{hint}", error.message())
        }
        None => crate::error::error_chain(&error),
    })
}

async fn print(client: &Client, args: &QueryArgs) -> Result<(), CliError> {
    match args.format {
        Format::Table => print_table(client, &args.sql).await,
        Format::Csv => print_copy(client, &args.sql, "FORMAT csv, HEADER").await,
        Format::Json => print_json(client, &args.sql).await,
        Format::Arrow if std::io::stdout().is_terminal() => Err(CliError::Failed(
            "Arrow is not for a terminal\nhint: rhei query --format arrow 'FROM orders' > \
             orders.arrows"
                .to_owned(),
        )),
        Format::Arrow => print_copy(client, &args.sql, "FORMAT arrow").await,
    }
}

/// Writes to standard output. A reader that has seen enough, as `head`, is no error.
fn write(bytes: &[u8]) -> Result<bool, CliError> {
    match std::io::stdout().write_all(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(CliError::Failed(format!("the rows cannot be written: {error}"))),
    }
}

async fn print_table(client: &Client, sql: &str) -> Result<(), CliError> {
    let types: Vec<Type> = match client.prepare(sql).await {
        Ok(prepared) => prepared.columns().iter().map(|column| column.type_().clone()).collect(),
        Err(error) => return Err(failed(error)),
    };

    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY);
    for message in client.simple_query(sql).await.map_err(failed)? {
        match message {
            SimpleQueryMessage::RowDescription(columns) => {
                table.set_header(columns.iter().map(|column| column.name().to_owned()));
            }
            SimpleQueryMessage::Row(row) => {
                let cells = (0..row.len()).map(|at| row.get(at).unwrap_or_default().to_owned());
                table.add_row(cells);
            }
            _ => {}
        }
    }

    for (column, of) in table.column_iter_mut().zip(&types) {
        let is_number = [
            Type::INT2,
            Type::INT4,
            Type::INT8,
            Type::OID,
            Type::FLOAT4,
            Type::FLOAT8,
            Type::NUMERIC,
        ]
        .contains(of);
        if is_number {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    write(format!("{table}\n").as_bytes()).map(|_| ())
}

async fn print_copy(client: &Client, sql: &str, options: &str) -> Result<(), CliError> {
    let sql = sql.trim_end_matches([';', ' ', '\n']);
    let copy = format!("COPY ({sql}\n) TO STDOUT ({options})");
    let lines = client.copy_out(&copy).await.map_err(failed)?;
    let mut lines = std::pin::pin!(lines);
    while let Some(line) = lines.try_next().await.map_err(failed)? {
        if !write(&line)? {
            break;
        }
    }
    Ok(())
}

async fn print_json(client: &Client, sql: &str) -> Result<(), CliError> {
    let sql = sql.trim_end_matches([';', ' ', '\n']);
    let objects = format!("SELECT to_json(_rhei_row) FROM ({sql}\n) AS _rhei_row");
    let rows = client.simple_query_raw(&objects).await.map_err(failed)?;
    let mut rows = std::pin::pin!(rows);
    let mut before = "[";
    while let Some(message) = rows.next().await {
        let SimpleQueryMessage::Row(row) = message.map_err(failed)? else { continue };
        let object = row.get(0).unwrap_or("null");
        if !write(format!("{before}\n{object}").as_bytes())? {
            return Ok(());
        }
        before = ",";
    }
    let end = if before == "[" { "[]\n" } else { "\n]\n" };
    write(end.as_bytes()).map(|_| ())
}

/// Returns the line that connects psql to a replicator.
pub fn psql_line(listen: &Listen) -> String {
    let quoted = |path: &Path| path.display().to_string();
    match listen {
        Listen::Unix { folder, port } => format!("psql -h {} -p {port} -d rhei", quoted(folder)),
        Listen::Tcp(address) => format!("psql -h {} -p {} -d rhei", address.ip(), address.port()),
    }
}
