//! What a run of the pipeline shows to those who watch over it: `/metrics` for Prometheus,
//! `/healthz` and `/readyz` for those who start and stop it, and a status page at `/`.
//!
//! `metrics` lists every metric. `watch` looks at the source and the file now and then (`heads`
//! remembers when the source's end was where, `samples` is a history for the page, `process` asks
//! the operating system, `log_watch` remembers warnings). `status` judges and describes what was
//! seen, `export` writes it for Prometheus, and `http` serves it.
//!
//! No answer waits for the engine, the writer or the source: figures of the file are as of the last
//! look, and everything else is read from the numbers that the pipeline counts
//! ([`Meter`](crate::pipeline::meter::Meter)).

mod export;
mod heads;
mod http;
mod log_watch;
mod metrics;
mod process;
mod samples;
mod status;
mod watch;

use std::{net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, task::JoinHandle};

use crate::{
    olap::OlapEngine,
    pipeline::{Context, Writer},
};

use self::{
    export::Histograms,
    http::Site,
    watch::{Watched, take_samples, watch_file, watch_source},
};

pub use log_watch::LogWatch;
pub use metrics::{Kind, METRICS, Metric};

/// `[observe]` of the settings.
#[derive(Debug, Clone)]
pub struct ObserveOptions {
    /// Where metrics, health and the status page are served.
    pub listen: SocketAddr,
    /// How far the copy may be behind its source for `/readyz` to say that it is ready.
    pub ready_lag: Duration,
}

impl ObserveOptions {
    /// Returns the defaults for an address.
    pub fn on(listen: SocketAddr) -> Self {
        Self { listen, ready_lag: Duration::from_secs(30) }
    }
}

/// An address as the settings write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = text.replace("localhost:", "127.0.0.1:");
        address.parse().map(Self).map_err(|_| "it needs an IP address and a port".to_owned())
    }
}

/// What cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The address is in use, or is none of this machine.
    #[error(
        "cannot listen on {address}, where [observe] serves metrics and the status page\nhint: end \
         what listens there, or choose another port in [observe] listen"
    )]
    Bind {
        /// The address of the settings.
        address: SocketAddr,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A histogram has no buckets.
    #[error("the metrics cannot be set up")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
}

/// Serves until it is dropped.
pub struct Observe {
    watched: Arc<Watched>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Observe {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Observe {
    /// Begins to serve, and to look at the source.
    ///
    /// # Errors
    /// The address cannot be used.
    pub async fn start(context: &Context, options: ObserveOptions) -> Result<Self, ObserveError> {
        let address = options.listen;
        let failed = |source| ObserveError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;

        let histograms = Histograms::start(context)?;
        let watched = Arc::new(Watched::new(context.clone(), options));
        let site = Arc::new(Site {
            watched: Arc::clone(&watched),
            histograms: histograms.clone(),
            is_local: bound.ip().is_loopback(),
        });

        tracing::info!(
            event = "observing",
            address = %bound,
            "metrics, health and the status page can be read"
        );
        let tasks = vec![
            tokio::spawn(http::accept(listener, site)),
            tokio::spawn(watch_source(Arc::clone(&watched))),
            tokio::spawn(take_samples(Arc::clone(&watched), move || histograms.tidy())),
        ];
        Ok(Self { watched, tasks })
    }

    /// Looks at the file too, until the result is dropped.
    pub fn watch_file<T: OlapEngine + 'static>(&self, writer: Writer<T>) -> FileWatch {
        FileWatch(tokio::spawn(watch_file(Arc::clone(&self.watched), writer)))
    }
}

/// Looks at the file until it is dropped.
pub struct FileWatch(JoinHandle<()>);

impl Drop for FileWatch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_port_and_no_name_but_localhost() {
        let read = |text: &str| text.parse::<Address>().map(|address| address.0.to_string());
        assert_eq!(read("127.0.0.1:9187"), Ok("127.0.0.1:9187".to_owned()));
        assert_eq!(read("localhost:9187"), Ok("127.0.0.1:9187".to_owned()));
        assert_eq!(read("[::]:9187"), Ok("[::]:9187".to_owned()));
        for text in ["9187", "127.0.0.1", "db.example.com:9187", ""] {
            assert_eq!(read(text), Err("it needs an IP address and a port".to_owned()), "{text}");
        }
    }
}
