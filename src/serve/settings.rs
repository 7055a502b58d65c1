//! The settings that a client makes with SET, as PostgreSQL keeps them: those of a transaction that
//! is rolled back are undone, and LOCAL ones end with it either way.

use std::{collections::BTreeMap, time::Duration};

use super::tokens::{Token, tokens};

type Values = BTreeMap<String, String>;

/// The settings of a session.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Those of the startup message.
    startup: Values,
    session: Values,
    transaction: Option<InTransaction>,
}

/// What the open transaction may undo.
#[derive(Debug, Clone)]
struct InTransaction {
    session_before: Values,
    local: Values,
}

/// How long a setting holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Session,
    Transaction,
}

impl Settings {
    pub fn new(startup: Values) -> Self {
        Self { session: startup.clone(), startup, transaction: None }
    }

    pub fn set(&mut self, name: &str, value: &str, scope: Scope) {
        let values = match (scope, &mut self.transaction) {
            (Scope::Session, transaction) => {
                if let Some(transaction) = transaction {
                    transaction.local.remove(name);
                }
                &mut self.session
            }
            (Scope::Transaction, Some(transaction)) => &mut transaction.local,
            // PostgreSQL warns that this has no effect.
            (Scope::Transaction, None) => return,
        };
        values.insert(name.to_owned(), value.to_owned());
    }

    /// Brings one setting, or all of them, back to that of the startup message.
    pub fn reset(&mut self, name: Option<&str>) {
        let Some(name) = name else {
            self.session.clone_from(&self.startup);
            if let Some(transaction) = &mut self.transaction {
                transaction.local.clear();
            }
            return;
        };

        if let Some(transaction) = &mut self.transaction {
            transaction.local.remove(name);
        }
        match self.startup.get(name) {
            Some(value) => self.session.insert(name.to_owned(), value.clone()),
            None => self.session.remove(name),
        };
    }

    pub fn begin(&mut self) {
        let session_before = &self.session;
        self.transaction.get_or_insert_with(|| InTransaction {
            session_before: session_before.clone(),
            local: Values::new(),
        });
    }

    pub fn commit(&mut self) {
        self.transaction = None;
    }

    pub fn roll_back(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            self.session = transaction.session_before;
        }
    }

    fn made(&self, name: &str) -> Option<&String> {
        let local = self.transaction.as_ref().and_then(|transaction| transaction.local.get(name));
        local.or_else(|| self.session.get(name))
    }

    /// Returns a setting as SHOW prints it.
    pub fn shown(&self, name: &str) -> String {
        let of = |settings: &[(&str, &str)]| {
            settings.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        of(&FIXED)
            .or_else(|| self.made(name).cloned())
            .or_else(|| of(&DEFAULTS))
            .unwrap_or_default()
    }

    /// Returns the schemas in which names are looked up.
    pub fn search_path(&self) -> Vec<String> {
        let path = self.made("search_path").map_or("public", String::as_str);
        tokens(path).iter().filter_map(Token::name).collect()
    }

    /// Returns the limit that the client has set with `SET statement_timeout`: milliseconds, or a
    /// number with a unit.
    pub fn statement_timeout(&self) -> Option<Duration> {
        let text = self.made("statement_timeout")?.replace(' ', "");
        let limit = match text.parse::<u64>() {
            Ok(millis) => Duration::from_millis(millis),
            Err(_) => humantime::parse_duration(&text).ok()?,
        };
        (!limit.is_zero()).then_some(limit)
    }
}

/// What holds here whatever a client sets: values are printed in UTC, as ISO.
const FIXED: [(&str, &str); 8] = [
    ("timezone", "UTC"),
    ("datestyle", "ISO, MDY"),
    ("server_version", super::startup::SERVER_VERSION),
    ("server_version_num", "160000"),
    ("transaction_isolation", "repeatable read"),
    ("transaction_read_only", "on"),
    ("server_encoding", "UTF8"),
    ("client_encoding", "UTF8"),
];

const DEFAULTS: [(&str, &str); 9] = [
    ("search_path", "public"),
    ("standard_conforming_strings", "on"),
    ("max_identifier_length", "63"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "repeatable read"),
    ("lc_collate", "C.UTF-8"),
    ("max_index_keys", "32"),
    ("statement_timeout", "0"),
    ("extra_float_digits", "1"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollback_undoes_settings_and_a_commit_keeps_all_but_local_ones() {
        let mut settings = Settings::default();
        settings.set("a", "0", Scope::Session);
        settings.set("b", "never", Scope::Transaction);
        assert_eq!([settings.shown("a"), settings.shown("b")], ["0", ""]);

        for (ends_well, after) in [(false, "0"), (true, "1")] {
            settings.begin();
            settings.set("a", "1", Scope::Session);
            settings.set("a", "2", Scope::Transaction);
            settings.begin();
            assert_eq!(settings.shown("a"), "2");
            if ends_well {
                settings.commit()
            } else {
                settings.roll_back()
            }
            assert_eq!(settings.shown("a"), after);
        }
    }

    #[test]
    fn a_reset_brings_back_what_the_client_began_with() {
        let startup = [("search_path".to_owned(), "\"My Schema\", other".to_owned())];
        let mut settings = Settings::new(startup.into());
        settings.set("search_path", "elsewhere", Scope::Session);
        assert_eq!(settings.search_path(), ["elsewhere"]);
        settings.set("other", "1", Scope::Session);
        settings.reset(Some("search_path"));
        assert_eq!(settings.shown("other"), "1");
        settings.reset(None);
        assert_eq!(settings.shown("other"), "");
        assert_eq!(settings.search_path(), ["My Schema", "other"]);
    }
}
