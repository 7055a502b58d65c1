//! Accepts connections, and serves each until it ends.

use std::{
    future::poll_fn,
    io::ErrorKind,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use futures_util::{SinkExt, StreamExt};
use pgwire::{
    api::{ClientInfo, DefaultClient, NoopHandler, PgWireConnectionState},
    error::{ErrorInfo, PgWireError},
    messages::{PgWireBackendMessage, PgWireFrontendMessage},
    tokio::{
        TlsAcceptor,
        server::{
            MaybeTls, PgWireMessageServerCodec, negotiate_tls, process_error, process_message,
        },
    },
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::{sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::{codec::Framed, sync::CancellationToken, task::TaskTracker};

use super::{
    Closed, Listen, ServeOptions, Shared,
    error::SqlError,
    handlers::{Handlers, Queries},
    session::Prepared,
    startup::Startup,
    stopping,
};
use crate::{olap::SharedFile, pipeline::meter::Meter};

/// How long a client may take to prove who it is, from its first byte on.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest message of a client that has not proven who it is, and of one that has. The crate
/// takes up to a gigabyte.
const MAX_STARTUP_BYTES: usize = 64 << 10;
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Sockets beyond two for each connection that is allowed: those of clients that only cancel.
const SPARE_SOCKETS: usize = 16;
/// How long a connection may take to end once it has to.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a stop waits for threads that read.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often statements and sessions are looked at whose time may be over.
const TICK: Duration = Duration::from_millis(50);

/// An endpoint that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen on {address}")]
    Bind { address: String, source: std::io::Error },
    #[error("{} cannot be used for TLS: {reason}", .path.display())]
    Tls { path: PathBuf, reason: String },
    /// Other machines can reach the address, and the endpoint asks for no password or has no TLS.
    #[error(
        "readers from other machines need a password and TLS, and {address} is not a loopback \
         address\nhint: set [serve.users], tls_cert and tls_key, or listen on 127.0.0.1"
    )]
    NotSafe { address: SocketAddr },
}

/// Serves readers until it is stopped.
pub struct Endpoint {
    stop: CancellationToken,
    connections: TaskTracker,
    tasks: [JoinHandle<()>; 2],
    socket: Option<PathBuf>,
    address: String,
    broken: CancellationToken,
    /// Shared with the threads that read.
    readers: Arc<()>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    async fn accept(&self) -> std::io::Result<Socket> {
        Ok(match self {
            Self::Tcp(listener) => Socket::Tcp(listener.accept().await?.0),
            Self::Unix(listener) => Socket::Unix(listener.accept().await?.0),
        })
    }
}

impl Endpoint {
    /// Begins to serve. `meter` counts sessions and statements.
    ///
    /// # Errors
    /// The address cannot be used, or is not safe as it is set up.
    pub async fn start(
        file: SharedFile,
        options: ServeOptions,
        meter: Meter,
    ) -> Result<Self, ServeError> {
        let tls = options.tls.as_ref().map(|(certificate, key)| acceptor(certificate, key));
        let (tls, certificate) = tls.transpose()?.unzip();
        if let Listen::Tcp(address) = &options.listen
            && !address.ip().is_loopback()
            && (options.users.is_empty() || tls.is_none())
        {
            return Err(ServeError::NotSafe { address: *address });
        }

        let (listener, address, socket) = bind(&options.listen).await?;
        let slots = Arc::new(Semaphore::new(options.max_connections));
        let sockets = options.max_connections.saturating_mul(2).saturating_add(SPARE_SOCKETS);
        let sockets = Arc::new(Semaphore::new(sockets.min(Semaphore::MAX_PERMITS)));
        let shared = Shared::new(file, options, meter);
        let startup = Startup::new(&shared, certificate.as_deref()).map_err(|error| {
            let path = shared.options.tls.as_ref().map(|(path, _)| path.clone());
            ServeError::Tls { path: path.unwrap_or_default(), reason: error.to_string() }
        })?;
        let handlers =
            Arc::new(Handlers { shared: Arc::clone(&shared), startup: Arc::new(startup) });

        let (stop, connections) = (CancellationToken::new(), TaskTracker::new());
        let accepting = accept(
            listener,
            Serving {
                handlers,
                tls,
                slots,
                sockets,
                stop: stop.clone(),
                connections: connections.clone(),
            },
        );
        let readers = Arc::clone(&shared.readers);
        let broken = shared.broken.clone();
        let ticking = async move {
            loop {
                sleep(TICK).await;
                shared.tick();
            }
        };
        let tasks = [tokio::spawn(accepting), tokio::spawn(ticking)];
        Ok(Self { stop, connections, tasks, socket, address, broken, readers })
    }

    /// Returns the address that clients connect to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns what is cancelled when a reader's statement has met a bug of DuckDB, which takes no
    /// other one then.
    pub fn broken(&self) -> CancellationToken {
        self.broken.clone()
    }

    /// Tells the log where readers can connect.
    pub fn announce(&self) {
        tracing::info!(event = "serving", address = self.address, "readers can connect");
    }

    /// Ends all connections, and waits until no thread reads any more, or for a while.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks[0].abort();
        self.connections.close();
        // Threads that read end with their statements.
        let _ = timeout(2 * CLOSE_TIMEOUT, self.connections.wait()).await;
        self.tasks[1].abort();
        for task in self.tasks {
            // Both were aborted.
            let _ = task.await;
        }
        // A thread that still reads has the file open.
        let since = Instant::now();
        while Arc::strong_count(&self.readers) > 1 && since.elapsed() < STOP_TIMEOUT {
            sleep(TICK).await;
        }
        if let Some(socket) = &self.socket {
            let _ = std::fs::remove_file(socket);
        }
    }
}

async fn bind(listen: &Listen) -> Result<(Listener, String, Option<PathBuf>), ServeError> {
    match listen {
        Listen::Tcp(address) => {
            let bound = TcpListener::bind(address).await;
            let failed = |source| ServeError::Bind { address: address.to_string(), source };
            let listener = bound.map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?.to_string();
            Ok((Listener::Tcp(listener), bound, None))
        }
        Listen::Unix { folder, port } => {
            let path = folder.join(format!(".s.PGSQL.{port}"));
            let failed = |source| ServeError::Bind { address: path.display().to_string(), source };
            // A process that crashed leaves its socket behind, where a connection is refused.
            match UnixStream::connect(&path).await {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    let _ = std::fs::remove_file(&path);
                }
                _ => return Err(failed(ErrorKind::AddrInUse.into())),
            }
            let listener = UnixListener::bind(&path).map_err(failed)?;
            Ok((Listener::Unix(listener), path.display().to_string(), Some(path.clone())))
        }
    }
}

/// Reads certificate and key. Returns the certificate's text too.
fn acceptor(certificate: &Path, key: &Path) -> Result<(TlsAcceptor, Vec<u8>), ServeError> {
    let failed = |path: &Path, reason: String| ServeError::Tls { path: path.to_owned(), reason };
    let text =
        std::fs::read(certificate).map_err(|error| failed(certificate, error.to_string()))?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| failed(certificate, error.to_string()))?;
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|error| failed(key, error.to_string()))?;

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|config| config.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|error| failed(certificate, error.to_string()))?;
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok((TlsAcceptor::from(Arc::new(config)), text))
}

/// What a connection needs.
#[derive(Clone)]
struct Serving {
    handlers: Arc<Handlers>,
    tls: Option<TlsAcceptor>,
    /// Clients that may have a session, and sockets that may be open.
    slots: Arc<Semaphore>,
    sockets: Arc<Semaphore>,
    stop: CancellationToken,
    connections: TaskTracker,
}

async fn accept(listener: Listener, serving: Serving) {
    loop {
        let socket = match listener.accept().await {
            Ok(socket) => socket,
            Err(error) => {
                // As when there are no more files: the next one may be possible in a moment.
                tracing::warn!(event = "accept_failed", %error, "a reader could not connect");
                sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        // Most of these sockets have no session: their clients have not even sent a user name.
        let Ok(open) = Arc::clone(&serving.sockets).try_acquire_owned() else {
            tracing::debug!(event = "too_many_sockets", "a socket of a reader was closed at once");
            continue;
        };
        let serving = serving.clone();
        let tracker = serving.connections.clone();
        tracker.spawn(async move {
            serving.serve(socket).await;
            drop(open);
        });
    }
}

type Client = Framed<MaybeTls, PgWireMessageServerCodec<Arc<Prepared>>>;

impl Serving {
    async fn serve(self, socket: Socket) {
        let deadline = tokio::time::Instant::now() + STARTUP_TIMEOUT;
        let negotiated = timeout_at(deadline, async {
            match socket {
                Socket::Tcp(socket) => negotiate_tls(socket, self.tls.clone()).await,
                Socket::Unix(socket) => Ok(Some(on_unix(socket))),
            }
        });
        let Ok(Ok(Some(mut client))) = negotiated.await else { return };
        // What came before TLS began is not from the client that TLS protects (CVE-2021-23214).
        if client.is_secure() && !client.read_buffer().is_empty() {
            return;
        }

        // A connection that only cancels needs no slot.
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok();
        let stop = self.stop.clone();
        let mut registration = Registration { shared: Arc::clone(&self.handlers.shared), pid: 0 };
        let reason = tokio::select! {
            () = self.messages(&mut client, (slot, deadline), &mut registration) => None,
            () = stop.cancelled() => Some(stopping()),
        };

        drop(registration);
        if let Some(reason) = reason {
            say(&mut client, reason).await;
        }
    }

    /// Acts on the messages of a client until the connection ends. The client has to have its
    /// session by the deadline.
    async fn messages(
        &self,
        client: &mut Client,
        (slot, deadline): (Option<OwnedSemaphorePermit>, tokio::time::Instant),
        registration: &mut Registration,
    ) {
        let mut closed = Closed::default();
        let shared = &self.handlers.shared;
        loop {
            let is_starting = matches!(
                client.state(),
                PgWireConnectionState::AwaitingStartup
                    | PgWireConnectionState::AuthenticationInProgress
            );
            let max_bytes = if is_starting { MAX_STARTUP_BYTES } else { MAX_MESSAGE_BYTES };
            let message = tokio::select! {
                message = next_message(client, max_bytes) => message,
                () = closed.token.cancelled() => return say(client, closed.reason()).await,
                () = sleep_until(deadline), if is_starting => return,
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(reason) => return say(client, reason).await,
            };

            let is_cancel = matches!(message, PgWireFrontendMessage::CancelRequest(_));
            if matches!(message, PgWireFrontendMessage::Terminate(_)) {
                return;
            }
            if is_starting && !is_cancel && slot.is_none() {
                let full = SqlError::fatal("53300", "sorry, too many clients already")
                    .hint("rhei.toml, [serve] max_connections, sets the limit");
                return say(client, full).await;
            }

            if is_starting && !is_cancel && !client.is_secure() && !is_local(client) {
                let open = SqlError::fatal("28000", "a connection from another machine needs TLS")
                    .hint("connect with sslmode=require");
                return say(client, open).await;
            }

            let is_extended = message.is_extended_query();
            let done = tokio::select! {
                done = dispatch(message, client, &self.handlers) => done,
                () = closed.token.cancelled() => return say(client, closed.reason()).await,
            };
            if is_cancel {
                return;
            }
            registration.pid = client.pid_and_secret_key().0;
            if let Err(error) = done {
                let is_fatal = error.is_fatal() || is_starting;
                tracing::debug!(%error, "a reader got an error");
                if process_error(client, error, is_extended).await.is_err() || is_fatal {
                    return;
                }
            }

            if is_starting {
                let (pid, _) = client.pid_and_secret_key();
                if let Some(session) = shared.sessions().get(&pid) {
                    closed = session.closed.clone();
                }
            }
        }
    }
}

/// Returns the next message of a client; `None` when the connection has ended.
async fn next_message(
    client: &mut Client,
    max_bytes: usize,
) -> Result<Option<PgWireFrontendMessage>, SqlError> {
    poll_fn(|context| match client.poll_next_unpin(context) {
        Poll::Ready(Some(Ok(message))) => Poll::Ready(Ok(Some(message))),
        Poll::Ready(_) => Poll::Ready(Ok(None)),
        // The rest of the message has not come yet.
        Poll::Pending if client.read_buffer().len() > max_bytes => Poll::Ready(Err(
            SqlError::fatal("54000", format!("a message is longer than {max_bytes} bytes")),
        )),
        Poll::Pending => Poll::Pending,
    })
    .await
}

/// Forgets the session of a connection, also after a panic.
struct Registration {
    shared: Arc<Shared>,
    pid: i32,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let session = self.shared.sessions().remove(&self.pid);
        if let Some(session) = session {
            self.shared.meter.readers().close();
            session.control.end(stopping());
        }
    }
}

async fn dispatch(
    message: PgWireFrontendMessage,
    client: &mut Client,
    handlers: &Arc<Handlers>,
) -> Result<(), PgWireError> {
    process_message(
        message,
        client,
        Arc::clone(&handlers.startup),
        Arc::new(Queries),
        Arc::new(Queries),
        Arc::new(NoopHandler),
        Arc::clone(handlers),
    )
    .await
}

/// Returns whether a client is on this machine; that of a unix socket has a loopback address too.
fn is_local(client: &Client) -> bool {
    client.socket_addr().ip().is_loopback()
}

fn on_unix(socket: UnixStream) -> Client {
    let client = DefaultClient::new(SocketAddr::from(([127, 0, 0, 1], 0)), false);
    let mut client = Framed::new(MaybeTls::Unix(socket), PgWireMessageServerCodec::new(client));
    client.set_state(PgWireConnectionState::AwaitingStartup);
    client
}

/// Sends a last error.
async fn say(client: &mut Client, reason: SqlError) {
    let info: ErrorInfo = PgWireError::from(reason).into();
    let sent = client.send(PgWireBackendMessage::ErrorResponse(info.into()));
    // A client that does not read does not learn the reason.
    let _ = timeout(CLOSE_TIMEOUT, sent).await;
}
