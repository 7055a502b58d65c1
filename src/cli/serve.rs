//! `rhei serve`: lets readers connect to a file that no replicator holds.

use std::process::ExitCode;

use super::{CliError, Invocation, service};
use crate::{
    olap::SharedFile,
    pipeline::meter::Meter,
    serve::{Endpoint, Listen, ServeOptions},
};

/// Where readers connect when no setting says it.
const DEFAULT_ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 5439);

/// Runs the command.
pub async fn run(session: Invocation) -> Result<ExitCode, CliError> {
    let target = session.target()?;
    if target.lake.is_some() {
        return Err(CliError::Failed(
            "a lake is not served: readers open the lake itself\nhint: docs/lake.md says how"
                .to_owned(),
        ));
    }

    let file = SharedFile::open_read_only(&target)?;
    let listen = Listen::Tcp(DEFAULT_ADDRESS.into());
    let options = session.config.serve.clone().unwrap_or_else(|| ServeOptions::on(listen));
    let stop = session.stop_on_signal();

    let endpoint = Endpoint::start(file, options, Meter::default()).await?;
    endpoint.announce();
    service::ready();
    stop.cancelled().await;
    endpoint.stop().await;
    Ok(ExitCode::SUCCESS)
}
