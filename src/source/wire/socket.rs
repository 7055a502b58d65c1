//! The socket, plain or with TLS.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::WireError;
use crate::source::connection::{
    ConnectError, SourceOptions,
    options::{Address, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, TCP_USER_TIMEOUT},
    tls::{self, SslMode},
};

/// A socket of any kind.
pub(in crate::source) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Socket {
    /// Returns another handle of the same socket, for the watermark of
    /// [`StreamReader`](super::stream::StreamReader).
    pub(super) fn handle(&self) -> Option<OwnedFd> {
        let stream = match self {
            Self::Tcp(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
            Self::Unix(_) => return None,
        };
        if cfg!(target_os = "linux") { stream.as_fd().try_clone_to_owned().ok() } else { None }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

pub(super) fn keep_alive(stream: &TcpStream, source: &SourceOptions) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);

    if let Some((idle, interval)) = source.keepalives() {
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(idle.min(KEEPALIVE_IDLE))
            .with_interval(interval.unwrap_or(KEEPALIVE_INTERVAL));
        socket.set_tcp_keepalive(&keepalive)?;
    }
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(source.tcp_user_timeout().unwrap_or(TCP_USER_TIMEOUT)))?;
    Ok(())
}

/// Asks the server for TLS, as `sslmode` requires.
pub(super) async fn negotiate_tls(
    source: &SourceOptions,
    host: &str,
    mut stream: TcpStream,
    address: &Address,
) -> Result<Socket, WireError> {
    if source.tls.mode == SslMode::Disable {
        return Ok(Socket::Tcp(stream));
    }

    let failed = |detail: String| ConnectError::Tls { address: address.to_string(), detail };
    let mut out = BytesMut::new();
    frontend::ssl_request(&mut out);
    stream.write_all(&out).await?;

    // One byte and no more: after an `S` only TLS may follow, never bytes that arrived in plain
    // text.
    match stream.read_u8().await? {
        b'S' => {
            let connector = tls::connector(&source.tls)?;
            let stream = connector
                .handshake(host, stream)
                .await
                .map_err(|error| failed(error.to_string()))?;
            Ok(Socket::Tls(Box::new(stream)))
        }
        b'N' if source.tls.mode == SslMode::Prefer => Ok(Socket::Tcp(stream)),
        b'N' => Err(failed("the server does not offer TLS".to_owned()).into()),
        tag => Err(WireError::Unexpected { tag, during: "asking for TLS" }),
    }
}
