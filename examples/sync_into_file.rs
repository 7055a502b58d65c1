//! Brings a DuckDB file up to date with a database, and says what changed.
//!
//! ```sh
//! cargo run --example sync_into_file -- postgresql://postgres@localhost/shop shop.duckdb
//! ```
//!
//! The first call copies every table; later calls bring what was committed since.

use rhei::{Context, Environment, Event, Options, Recopy, SourceOptions, TargetOptions, sync};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(file)) = (arguments.next(), arguments.next()) else {
        return Err(
            "name a database and a file: postgresql://user@host/database copy.duckdb".into()
        );
    };

    let source = SourceOptions::parse(&url, &Environment::from_process())?;
    let options = Options::new(source, TargetOptions::new(file));

    let (events, mut happenings) = tokio::sync::mpsc::unbounded_channel();
    let context = Context::new(options, events);

    // A second task shows the progress while the copy is made.
    let progress = tokio::spawn(async move {
        while let Some(event) = happenings.recv().await {
            match event {
                Event::CopyFinished { table, rows } => println!("copied {rows} rows of {table}"),
                Event::CopyFailed { table, reason } => println!("{table} is not copied: {reason}"),
                _ => {}
            }
        }
    });

    let stop = CancellationToken::new();
    let report = sync(&context, Recopy::None, &stop).await?;

    drop(context);
    progress.await?;
    println!(
        "the copy is at {}: {} inserted, {} updated, {} deleted",
        report.checkpoint, report.inserted, report.updated, report.deleted
    );
    Ok(())
}
