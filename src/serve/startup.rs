//! Who may connect, and what a client learns at the beginning.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::{self, Debug},
    sync::Arc,
};

use async_trait::async_trait;
use futures_util::Sink;
use pgwire::{
    api::{
        ClientInfo, METADATA_USER, PidSecretKeyGenerator, RandomPidSecretKeyGenerator,
        auth::{
            AuthDriver, AuthOutcome, AuthSource, DefaultServerParameterProvider, LoginInfo,
            Password, ServerParameterProvider, StartupHandler, finish_authentication,
            mechanism::AuthMechanismFactory,
            protocol_negotiation,
            sasl::scram::{ScramAuth, gen_salted_password},
            save_startup_parameters_to_metadata,
        },
    },
    error::{PgWireError, PgWireResult},
    messages::{PgWireBackendMessage, PgWireFrontendMessage},
};

use super::{Shared, error::SqlError, session::Session};

/// The version that clients are told: what they may expect of catalogs and protocol.
pub const SERVER_VERSION: &str = "16.0";

/// The iterations of SCRAM, as PostgreSQL has them.
const ITERATIONS: usize = 4096;

/// The users that may connect, with their passwords.
#[derive(Clone, Default)]
pub struct Users(Arc<BTreeMap<String, String>>);

impl Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

impl Users {
    pub fn new(passwords: BTreeMap<String, String>) -> Self {
        Self(Arc::new(passwords))
    }

    /// Returns a user, with the password.
    pub fn first(&self) -> Option<(&str, &str)> {
        self.0.iter().next().map(|(user, password)| (user.as_str(), password.as_str()))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[async_trait]
impl AuthSource for Users {
    async fn get_password(&self, login: &LoginInfo) -> PgWireResult<Password> {
        // A name that is unknown takes as long as a wrong password, and gets the same error.
        let salt: [u8; 16] = rand::random();
        let known = login.user().and_then(|user| self.0.get(user));
        let password = known.cloned().unwrap_or_else(|| {
            let noise: [u128; 2] = rand::random();
            format!("{noise:x?}")
        });
        Ok(Password::new(Some(salt.to_vec()), gen_salted_password(&password, &salt, ITERATIONS)))
    }
}

/// Greets clients.
pub struct Startup {
    shared: Arc<Shared>,
    parameters: Arc<Parameters>,
    driver: AuthDriver<Arc<Parameters>>,
    scram: Option<ScramAuth>,
    keys: RandomPidSecretKeyGenerator,
}

impl Startup {
    /// # Errors
    /// The certificate cannot be read.
    pub fn new(shared: &Arc<Shared>, certificate: Option<&[u8]>) -> Result<Self, PgWireError> {
        let users = &shared.options.users;
        let mut scram = (!users.is_empty()).then(|| ScramAuth::new(Arc::new(users.clone())));
        if let Some(scram) = &mut scram {
            scram.set_iterations(ITERATIONS);
            if let Some(certificate) = certificate {
                scram.configure_certificate(certificate)?;
            }
        }

        let parameters = Arc::new(Parameters);
        Ok(Self {
            shared: Arc::clone(shared),
            driver: AuthDriver::new(Arc::clone(&parameters)),
            parameters,
            scram,
            keys: RandomPidSecretKeyGenerator::default(),
        })
    }

    /// Opens the session of a client that has proven who it is.
    async fn open_session<C: ClientInfo + Send>(&self, client: &mut C) -> PgWireResult<()> {
        let settings = settings_of(client.metadata());
        let (pid, key) = self.keys.generate(client);
        client.set_pid_and_secret_key(pid, key.clone());

        let session = Session::open(&self.shared, settings).await?;
        self.shared.register(pid, key, &session);
        client.session_extensions().insert(session);
        Ok(())
    }
}

/// Returns the settings of a startup message, also those of `options=-c name=value`.
fn settings_of(metadata: &HashMap<String, String>) -> BTreeMap<String, String> {
    let mut settings: BTreeMap<String, String> =
        metadata.iter().map(|(name, value)| (name.to_lowercase(), value.clone())).collect();
    let options = settings.remove("options").unwrap_or_default();
    let words = options.split_whitespace().filter_map(|word| {
        let word = word.strip_prefix("-c").unwrap_or(word);
        word.strip_prefix("--").unwrap_or(word).split_once('=')
    });
    let words: Vec<(String, String)> =
        words.map(|(name, value)| (name.to_lowercase(), value.replace("\\ ", " "))).collect();
    settings.extend(words);
    settings
}

#[async_trait]
impl StartupHandler for Startup {
    async fn on_startup<C>(
        &self,
        client: &mut C,
        message: PgWireFrontendMessage,
    ) -> PgWireResult<()>
    where
        C: ClientInfo + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let outcome = match message {
            PgWireFrontendMessage::Startup(ref startup) => {
                protocol_negotiation(client, startup).await?;
                save_startup_parameters_to_metadata(client, startup);

                let Some(scram) = &self.scram else {
                    self.open_session(client).await?;
                    return finish_authentication(client, &*self.parameters).await;
                };
                if !client.metadata().contains_key(METADATA_USER) {
                    return Err(SqlError::fatal("28000", "the client gave no user name").into());
                }
                self.driver.begin_authentication(client, scram.create()).await?
            }
            PgWireFrontendMessage::PasswordMessageFamily(message) => {
                self.driver.advance_authentication(client, message).await?
            }
            _ => return Ok(()),
        };

        if let AuthOutcome::Authenticated { final_message, .. } = outcome {
            self.open_session(client).await?;
            self.driver.complete_authentication(client, final_message).await?;
        }
        Ok(())
    }
}

/// What a client is told of the server.
pub struct Parameters;

impl ServerParameterProvider for Parameters {
    fn server_parameters<C: ClientInfo>(&self, client: &C) -> Option<HashMap<String, String>> {
        let mut defaults = DefaultServerParameterProvider::default();
        defaults.server_version = SERVER_VERSION.to_owned();
        defaults.in_hot_standby = true;
        defaults.is_superuser = false;
        defaults.default_transaction_read_only = true;
        defaults.time_zone = "UTC".to_owned();
        defaults.date_style = "ISO, MDY".to_owned();
        defaults.server_parameters(client)
    }
}
