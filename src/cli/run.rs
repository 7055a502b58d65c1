//! `rhei run`: follows the source until a signal.

use std::process::ExitCode;

use tokio::sync::mpsc;

use super::{CliError, Invocation};
use crate::{control::Control, engine, olap::DuckDb, pipeline::Writer, serve::Endpoint};

/// Runs the command.
pub async fn run(session: Invocation) -> Result<ExitCode, CliError> {
    let (context, progress) = session.context()?;
    let stop = session.stop_on_signal();

    // The file is opened once: two DuckDB instances on one file do not lock each other out in one
    // process.
    let writer = Writer::new(DuckDb::open(&context.options.target)?);

    let endpoint = match session.config.serve.clone() {
        Some(options) => {
            let publication = session.config.publication.clone().map(|(options, _)| options);
            let file =
                writer.call(move |target: &mut DuckDb| target.share(publication.as_ref())).await?;
            let endpoint = Endpoint::start(file, options).await?;
            endpoint.announce();
            Some(endpoint)
        }
        None => None,
    };

    let (command, commands) = mpsc::unbounded_channel();
    let control = Control::listen(&context, writer.clone(), command);

    let ended = engine::run(&context, &writer, commands, &stop).await;

    if let Some(endpoint) = endpoint {
        endpoint.stop().await;
    }

    drop((control, writer));
    drop(context);
    progress.finish().await;

    ended?;
    Ok(ExitCode::SUCCESS)
}
