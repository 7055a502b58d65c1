//! Authentication: a password, or SCRAM, by which both sides prove to each other that they know the
//! password.

use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{self, ScramSha256},
    },
    message::{
        backend::{AuthenticationSaslBody, Message},
        frontend,
    },
};
use tokio_postgres::config::ChannelBinding;

use super::{Frame, ReplicationClient, WireError, frame::HEADER_BYTES};
use crate::source::connection::{ConnectError, SourceOptions, error::from_sqlstate};

impl ReplicationClient {
    /// Answers what the server asks for until the server takes commands. `binding` is the hash of
    /// the server's certificate, which binds SCRAM to the TLS connection.
    pub(super) async fn authenticate(
        &mut self,
        source: &SourceOptions,
        is_tls: bool,
        binding: Option<Vec<u8>>,
    ) -> Result<(), WireError> {
        let address = self.address.clone();
        let mut authentication = Authentication::new(source, address, is_tls, binding);

        loop {
            let frame = self.receive().await.map_err(|error| authentication.refused(error))?;
            if frame.tag == b'K' {
                self.backend_pid = backend_pid(&frame);
            }
            match authentication.next(&frame)? {
                Next::Answer(answer) => self.send(&answer).await?,
                Next::Receive => {}
                Next::Done => return Ok(()),
            }
        }
    }
}

/// Returns the number of the process in a BackendKeyData message.
fn backend_pid(frame: &Frame) -> Option<i32> {
    frame.body.first_chunk().map(|pid| i32::from_be_bytes(*pid))
}

/// The state of one authentication.
struct Authentication<'a> {
    source: &'a SourceOptions,
    address: String,
    is_tls: bool,
    binding: Option<Vec<u8>>,
    scram: Option<Scram>,
    /// The server has said that the client may enter.
    is_accepted: bool,
}

/// What follows from one message of the server.
enum Next {
    Answer(BytesMut),
    Receive,
    /// The server takes commands.
    Done,
}

struct Scram {
    exchange: ScramSha256,
    /// SCRAM proves both sides to each other; the server sends its proof last.
    is_proven: bool,
}

impl<'a> Authentication<'a> {
    fn new(
        source: &'a SourceOptions,
        address: String,
        is_tls: bool,
        binding: Option<Vec<u8>>,
    ) -> Self {
        Self { source, address, is_tls, binding, scram: None, is_accepted: false }
    }

    /// Takes one message. A server that takes commands before it has accepted the client has proven
    /// nothing, whatever the settings require of it.
    fn next(&mut self, frame: &Frame) -> Result<Next, WireError> {
        match frame.tag {
            b'K' if self.is_accepted => Ok(Next::Receive),
            b'Z' if self.is_accepted => Ok(Next::Done),
            b'R' => Ok(self.answer(frame)?.map_or(Next::Receive, Next::Answer)),
            tag => Err(unexpected(tag)),
        }
    }

    /// Returns the answer to one request, or none when the message asks for none.
    fn answer(&mut self, frame: &Frame) -> Result<Option<BytesMut>, WireError> {
        let needs_binding = self.needs_binding();

        match parsed(frame)? {
            Some(Message::AuthenticationOk) => self.accept().map(|()| None),
            Some(Message::AuthenticationCleartextPassword) if !needs_binding => {
                self.cleartext_password().map(Some)
            }
            Some(Message::AuthenticationMd5Password(body)) if !needs_binding => {
                self.md5_password(body.salt()).map(Some)
            }
            Some(Message::AuthenticationSasl(body)) => self.start_scram(&body).map(Some),
            Some(Message::AuthenticationSaslContinue(body)) => {
                self.continue_scram(body.data()).map(Some)
            }
            Some(Message::AuthenticationSaslFinal(body)) => {
                self.finish_scram(body.data()).map(|()| None)
            }
            Some(Message::AuthenticationGss) => Err(WireError::Authentication("GSSAPI")),
            Some(Message::AuthenticationSspi) => Err(WireError::Authentication("SSPI")),
            _ => Err(unexpected(frame.tag)),
        }
    }

    /// Checks whether the server may let us in.
    fn accept(&mut self) -> Result<(), WireError> {
        match &self.scram {
            None if self.needs_binding() => {
                return Err(WireError::Authentication(
                    "without the channel binding that is required",
                ));
            }
            Some(scram) if !scram.is_proven => return Err(WireError::Unproven),
            _ => {}
        }

        self.is_accepted = true;
        Ok(())
    }

    fn cleartext_password(&self) -> Result<BytesMut, WireError> {
        let mut out = BytesMut::new();
        frontend::password_message(self.password()?, &mut out)?;
        Ok(out)
    }

    fn md5_password(&self, salt: [u8; 4]) -> Result<BytesMut, WireError> {
        let mut out = BytesMut::new();
        let hash = md5_hash(self.source.user().as_bytes(), self.password()?, salt);
        frontend::password_message(hash.as_bytes(), &mut out)?;
        Ok(out)
    }

    fn start_scram(&mut self, body: &AuthenticationSaslBody) -> Result<BytesMut, WireError> {
        let offered: Vec<String> = body.mechanisms().map(|name| Ok(name.to_owned())).collect()?;
        let (mechanism, channel) = self.mechanism(&offered)?;

        let mut out = BytesMut::new();
        let exchange = ScramSha256::new(self.password()?, channel);
        frontend::sasl_initial_response(mechanism, exchange.message(), &mut out)?;
        self.scram = Some(Scram { exchange, is_proven: false });
        Ok(out)
    }

    /// Chooses one of the mechanisms that the server offers, and how it is bound to the connection.
    fn mechanism(
        &self,
        offered: &[String],
    ) -> Result<(&'static str, sasl::ChannelBinding), WireError> {
        let has = |name: &str| offered.iter().any(|offered| offered == name);
        let refuses_binding = self.source.channel_binding() == ChannelBinding::Disable;

        let (mechanism, channel) = match &self.binding {
            Some(hash) if has(sasl::SCRAM_SHA_256_PLUS) && !refuses_binding => {
                (sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(hash.clone()))
            }
            _ if self.needs_binding() => {
                return Err(WireError::Authentication(
                    "without the channel binding that is required",
                ));
            }
            // When the server offered PLUS and an attacker removed the offer, `unrequested` lets
            // the server notice.
            Some(_) if self.is_tls && !refuses_binding => {
                (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested())
            }
            _ => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
        };

        if !has(mechanism) {
            return Err(WireError::Authentication("SASL without SCRAM-SHA-256"));
        }
        Ok((mechanism, channel))
    }

    fn continue_scram(&mut self, challenge: &[u8]) -> Result<BytesMut, WireError> {
        let exchange = &mut self.started_scram()?.exchange;
        exchange.update(challenge)?;

        let mut out = BytesMut::new();
        frontend::sasl_response(exchange.message(), &mut out)?;
        Ok(out)
    }

    fn finish_scram(&mut self, proof: &[u8]) -> Result<(), WireError> {
        let scram = self.started_scram()?;
        scram.exchange.finish(proof)?;
        scram.is_proven = true;
        Ok(())
    }

    fn started_scram(&mut self) -> Result<&mut Scram, WireError> {
        self.scram.as_mut().ok_or_else(|| unexpected(b'R'))
    }

    fn needs_binding(&self) -> bool {
        self.source.channel_binding() == ChannelBinding::Require
    }

    fn password(&self) -> Result<&[u8], ConnectError> {
        self.source
            .password()
            .ok_or_else(|| ConnectError::NoPassword { address: self.address.clone() })
    }

    /// Translates the server's refusal of the session.
    fn refused(&self, error: WireError) -> WireError {
        match error {
            // SQL sessions come first, so the role may connect, and the server speaks UTF-8.
            WireError::Server(message) if message.code == "42501" => {
                ConnectError::MayNotReplicate { user: self.source.user().to_owned() }.into()
            }
            WireError::Server(message) if message.code == "0A000" => {
                let address = self.address.clone();
                ConnectError::Pooler { address, detail: message.message }.into()
            }
            WireError::Server(message) => {
                from_sqlstate(&message.code, &message.message, self.source, self.address.clone())
                    .into()
            }
            other => other,
        }
    }
}

fn unexpected(tag: u8) -> WireError {
    WireError::Unexpected { tag, during: "authenticating" }
}

/// Parses a message, which postgres-protocol does from the bytes of the whole frame.
fn parsed(frame: &Frame) -> Result<Option<Message>, WireError> {
    let mut whole = BytesMut::with_capacity(frame.body.len() + HEADER_BYTES);
    whole.extend_from_slice(&[frame.tag]);
    whole.extend_from_slice(&(frame.body.len() as u32 + 4).to_be_bytes());
    whole.extend_from_slice(&frame.body);
    Ok(Message::parse(&mut whole)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::connection::Environment;

    fn frame(tag: u8, body: &[u8]) -> Frame {
        Frame { tag, body: bytes::Bytes::copy_from_slice(body) }
    }

    /// What comes of the messages of a server, the last one decides.
    fn outcome(settings: &str, messages: &[Frame]) -> String {
        let url = format!("postgres://rhei:secret@localhost/shop?{settings}");
        let source = SourceOptions::parse(&url, &Environment::default()).unwrap();
        let mut authentication = Authentication::new(&source, String::new(), false, None);

        let mut last = String::new();
        for message in messages {
            last = match authentication.next(message) {
                Ok(Next::Answer(_)) => "answer".to_owned(),
                Ok(Next::Receive) => "receive".to_owned(),
                Ok(Next::Done) => "done".to_owned(),
                Err(error) => return error.to_string(),
            };
        }
        last
    }

    #[test]
    fn a_server_takes_commands_only_after_it_has_accepted_the_client_by_a_proof() {
        let ok = || frame(b'R', &0_i32.to_be_bytes());
        let cleartext = || frame(b'R', &3_i32.to_be_bytes());
        let sasl = || frame(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0");
        let key = || frame(b'K', &[0; 8]);
        let ready = || frame(b'Z', b"I");
        let required = "channel_binding=require";

        for (name, settings, messages, expected) in [
            ("trust", "", vec![ok(), key(), ready()], "done"),
            ("a password", "", vec![cleartext(), ok(), ready()], "done"),
            ("a password is asked for", "", vec![cleartext()], "answer"),
            ("scram begins", "", vec![sasl()], "answer"),
            ("ready at once", "", vec![ready()], "unexpected message"),
            ("a key at once", "", vec![key()], "unexpected message"),
            ("ready after a password", "", vec![cleartext(), ready()], "unexpected message"),
            ("scram without proof", "", vec![sasl(), ok()], "without having proven"),
            ("ready instead of a proof", "", vec![sasl(), ready()], "unexpected message"),
            ("binding, ready at once", required, vec![ready()], "unexpected message"),
            ("binding, trust", required, vec![ok()], "channel binding that is required"),
            ("binding, cleartext", required, vec![cleartext()], "unexpected message"),
            ("binding, plain scram", required, vec![sasl()], "channel binding that is required"),
        ] {
            let found = outcome(settings, &messages);
            assert!(found.contains(expected), "{name}: {found}");
        }
    }
}
