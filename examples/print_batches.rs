//! Follows a database and prints its changes as Arrow batches, without a copy of it.
//!
//! ```sh
//! cargo run --example print_batches -- postgresql://postgres@localhost/shop
//! ```
//!
//! The program makes a publication `rhei` of all tables, unless it exists, and a slot
//! `print_batches`. Drop the slot when you are done with it:
//! `SELECT pg_drop_replication_slot('print_batches')`.

use arrow::{
    array::RecordBatch,
    util::display::{ArrayFormatter, FormatOptions},
};
use rhei::{Deletes, Environment, Feed, Options, SourceOptions, TargetOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("name a database: postgresql://user@host/database")?;

    let source = SourceOptions::parse(&url, &Environment::from_process())?;
    // A feed writes no file. Transactions that are too large for memory wait in this folder.
    let target = TargetOptions::new(std::env::temp_dir().join("unused.duckdb"));
    let options = Options { slot: "print_batches".to_owned(), ..Options::new(source, target) };

    let mut feed = Feed::open(&options).await?;
    eprintln!("following: each change that is committed from now on is printed");

    loop {
        let batch = tokio::select! {
            batch = feed.next() => batch?,
            _ = tokio::signal::ctrl_c() => break,
        };

        for changes in &batch.tables {
            let table = &changes.table.source;
            if changes.truncate.is_some() {
                println!("{table} was truncated");
            }

            let (Deletes::ByKey(deletes) | Deletes::Rows(deletes)) = &changes.deletes;
            for rows in deletes {
                print_rows(&format!("- {table}"), rows)?;
            }
            for rows in &changes.inserts {
                print_rows(&format!("+ {table}"), rows)?;
            }
        }

        for failure in &batch.failed {
            println!("{} brings no more changes: {}", failure.table, failure.reason);
        }

        // A program that stores the changes does so before this line.
        if !batch.is_part {
            feed.acknowledge(batch.end_lsn);
        }
    }

    Ok(feed.close().await?)
}

fn print_rows(what: &str, rows: &RecordBatch) -> Result<(), arrow::error::ArrowError> {
    let options = FormatOptions::default().with_null("NULL");
    let columns = rows
        .columns()
        .iter()
        .map(|column| ArrayFormatter::try_new(column, &options))
        .collect::<Result<Vec<_>, _>>()?;

    for row in 0..rows.num_rows() {
        let values: Vec<String> =
            columns.iter().map(|column| column.value(row).to_string()).collect();
        println!("{what}: {}", values.join(" | "));
    }
    Ok(())
}
