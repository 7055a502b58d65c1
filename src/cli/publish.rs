//! `rhei publish`: writes a copy of the copy for tools that want a file.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use indicatif::HumanBytes;
use serde_json::Value;

use super::{CliError, Invocation};
use crate::{
    control,
    engine::publication::publish,
    olap::{PublishFormat, PublishOptions, Publisher},
};

/// Flags of `rhei publish`. What is left out comes from the section [publish] of rhei.toml.
#[derive(Debug, Clone, Default, Args)]
pub struct PublishArgs {
    /// The file that is written, or the folder of Parquet files
    #[arg(long, value_name = "PATH")]
    pub path: Option<PathBuf>,
    /// What is written
    #[arg(long, value_enum)]
    pub format: Option<PublishFormat>,
    /// How many versions stay, with the newest
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
    /// For scripts
    #[arg(long)]
    pub json: bool,
}

/// Runs the command. A running replicator publishes beside its stream; otherwise this process does.
pub async fn run(session: Invocation, args: PublishArgs) -> Result<ExitCode, CliError> {
    let target = session.target()?;
    if target.lake.is_some() {
        return Err(CliError::Failed(
            "a lake is not published: other tools read the lake itself\nhint: docs/lake.md says how"
                .to_owned(),
        ));
    }

    let configured = session.config.publication.as_ref().map(|(options, _)| options.clone());
    let path = args.path.or(configured.as_ref().map(|options| options.path.clone()));
    let Some(path) = path else {
        return Err(CliError::Failed(
            "no path is given\nhint: rhei publish --path shop.ro.duckdb, or [publish] path in \
             rhei.toml"
                .to_owned(),
        ));
    };
    let absolute = std::path::absolute(&path);
    let options = PublishOptions {
        path: absolute.map_err(|error| CliError::Failed(error.to_string()))?,
        format: args.format.or(configured.as_ref().map(|c| c.format)).unwrap_or_default(),
        keep: args.keep.or(configured.map(|c| c.keep)).unwrap_or(1).max(1),
    };

    let question = serde_json::to_string(&options)
        .map_err(|error| CliError::Failed(format!("the path cannot be sent: {error}")))?;
    let published = match control::request(&target.path, &format!("publish {question}")).await {
        Some(answer) => match answer["error"].as_str() {
            Some(error) => return Err(CliError::Failed(error.to_owned())),
            None => answer,
        },
        None => serde_json::to_value(
            publish(Publisher::open(&target)?, options, None, &session.stop_on_signal()).await?,
        )
        .map_err(|error| CliError::Failed(format!("the result cannot be shown: {error}")))?,
    };

    if args.json {
        println!("{published}");
    } else {
        print_text(&published);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_text(published: &Value) {
    let number = |name: &str| published[name].as_u64().unwrap_or_default();
    println!(
        "{} has {} rows of {} tables as of {}: {} in {:.1} s",
        published["path"].as_str().unwrap_or_default(),
        number("rows"),
        number("tables"),
        published["lsn"].as_str().unwrap_or_default(),
        HumanBytes(number("bytes")),
        published["seconds"].as_f64().unwrap_or_default()
    );

    for (table, state) in published["not_live"].as_object().into_iter().flatten() {
        println!("left out: {table} ({})", state.as_str().unwrap_or_default());
    }
}
