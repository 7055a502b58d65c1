//! TLS by rustls, the same for SQL sessions and the replication socket.

use std::{
    future::Future,
    io,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rustls::{
    ClientConfig, RootCertStore,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};

use super::ConnectError;

/// `sslmode`, with libpq's meanings. `allow` is treated as `prefer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    Prefer,
    /// The connection is encrypted, but any server may answer; with a root certificate `require`
    /// means `verify-ca`, as with libpq.
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "disable" => Self::Disable,
            "allow" | "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }
}

/// How rhei verifies the server, and the certificate with which rhei identifies itself.
#[derive(Debug, Clone)]
pub struct TlsSettings {
    pub mode: SslMode,
    /// The path of a PEM file, or `system`.
    pub root_certificate: Option<String>,
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// Makes TLS streams. With `disable` no caller uses the connector.
#[derive(Clone)]
pub struct Connector(Arc<ClientConfig>);

/// Reads the certificates and decides how the server is verified.
pub fn connector(settings: &TlsSettings) -> Result<Connector, ConnectError> {
    let invalid = |reason: String| ConnectError::Invalid { reason };

    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid(error.to_string()))?;

    let mode = match settings.mode {
        SslMode::Require
            if settings.root_certificate.as_deref().is_some_and(|root| root != "system") =>
        {
            SslMode::VerifyCa
        }
        mode => mode,
    };

    let builder = if matches!(mode, SslMode::VerifyCa | SslMode::VerifyFull) {
        let roots = Arc::new(roots(settings)?);
        let chain = rustls::client::WebPkiServerVerifier::builder_with_provider(
            roots,
            Arc::clone(&provider),
        )
        .build()
        .map_err(|error| invalid(format!("sslrootcert: {error}")))?;

        if mode == SslMode::VerifyFull {
            builder.with_webpki_verifier(chain)
        } else {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyName {
                provider,
                chain: Some(chain),
            }))
        }
    } else {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyName { provider, chain: None }))
    };

    let config = match (&settings.certificate, &settings.key) {
        (Some(certificate), Some(key)) => {
            let chain = CertificateDer::pem_file_iter(certificate)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(|error| invalid(format!("sslcert {}: {error}", certificate.display())))?;

            let key = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| invalid(format!("sslkey {}: {error}", key.display())))?;

            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| invalid(format!("sslcert and sslkey: {error}")))?
        }
        (None, None) => builder.with_no_client_auth(),
        _ => return Err(invalid("sslcert and sslkey go together".to_owned())),
    };

    Ok(Connector(Arc::new(config)))
}

fn roots(settings: &TlsSettings) -> Result<RootCertStore, ConnectError> {
    let mut roots = RootCertStore::empty();

    match settings.root_certificate.as_deref() {
        None | Some("system") => {
            for certificate in rustls_native_certs::load_native_certs().certs {
                // A system store may hold certificates that rustls cannot read; the others are
                // enough.
                let _ = roots.add(certificate);
            }

            if roots.is_empty() {
                return Err(ConnectError::Invalid {
                    reason: "the system has no root certificates; name a file in sslrootcert"
                        .to_owned(),
                });
            }
        }
        Some(path) => {
            let invalid = |error: &dyn std::fmt::Display| ConnectError::Invalid {
                reason: format!("sslrootcert {path}: {error}"),
            };

            let certificates =
                CertificateDer::pem_file_iter(path).map_err(|error| invalid(&error))?;

            for certificate in certificates {
                let certificate = certificate.map_err(|error| invalid(&error))?;
                roots.add(certificate).map_err(|error| invalid(&error))?;
            }
        }
    }

    Ok(roots)
}

/// Verifies the chain but not the name (`verify-ca`), or nothing (`require`, `prefer`). Signatures
/// of the handshake are always verified.
#[derive(Debug)]
struct AnyName {
    provider: Arc<CryptoProvider>,
    chain: Option<Arc<rustls::client::WebPkiServerVerifier>>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use rustls::{CertificateError, Error};

        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };

        match chain.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            // The verifier checks the chain before the name.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl Connector {
    /// Runs the handshake on a socket on which the server has agreed to use TLS.
    pub async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        host: &str,
        socket: S,
    ) -> io::Result<tokio_rustls::client::TlsStream<S>> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        tokio_rustls::TlsConnector::from(Arc::clone(&self.0)).connect(name, socket).await
    }
}

/// Returns the `tls-server-end-point` binding: the hash of the server's certificate by the hash
/// function of its signature, SHA-256 at least.
pub fn server_end_point<S>(stream: &tokio_rustls::client::TlsStream<S>) -> Option<Vec<u8>> {
    use x509_cert::der::Decode;

    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    let parsed = x509_cert::Certificate::from_der(certificate).ok()?;

    Some(match parsed.signature_algorithm.oid.to_string().as_str() {
        // MD5 and SHA-1 with RSA, DSA, ECDSA are hashed with SHA-256 (RFC 5929), and so are the
        // SHA-256 signatures.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.10040.4.3"
        | "1.2.840.10045.4.1"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.3.2" => Sha256::digest(certificate).to_vec(),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Sha384::digest(certificate).to_vec(),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Sha512::digest(certificate).to_vec(),
        // Ed25519 and others name no hash: the stream has no channel binding, as with libpq.
        _ => return None,
    })
}

/// The connector that tokio-postgres asks for: it knows the host.
pub struct NamedConnector {
    connector: Connector,
    host: String,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> MakeTlsConnect<S> for Connector {
    type Stream = Stream<S>;
    type TlsConnect = NamedConnector;
    type Error = io::Error;

    fn make_tls_connect(&mut self, host: &str) -> Result<NamedConnector, io::Error> {
        Ok(NamedConnector { connector: self.clone(), host: host.to_owned() })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for NamedConnector {
    type Stream = Stream<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Stream<S>, io::Error>> + Send>>;

    fn connect(self, socket: S) -> Self::Future {
        Box::pin(async move { Ok(Stream(self.connector.handshake(&self.host, socket).await?)) })
    }
}

/// A TLS stream that returns its channel binding.
pub struct Stream<S>(tokio_rustls::client::TlsStream<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Stream<S> {
    fn channel_binding(&self) -> ChannelBinding {
        server_end_point(&self.0)
            .map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
