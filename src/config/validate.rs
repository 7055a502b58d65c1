//! The values that are refused although they can be read.

use super::{ByteSize, Publications, Settings};

impl Settings {
    /// Returns an error that names the first key whose value is refused, and says what the value
    /// has to be.
    pub(super) fn validate(&self) -> Result<(), String> {
        let Self { source, target, sync, backfill, verify, serve, publish, .. } = self;
        let checks = [
            ("sync.max_batch_rows", sync.max_batch_rows != Some(0), "must be at least 1"),
            ("backfill.workers", backfill.workers != Some(0), "must be at least 1"),
            (
                "backfill.rate_limit",
                is_at_least(backfill.rate_limit, 100_000),
                "must be at least 100KB",
            ),
            (
                "backfill.chunk_size",
                is_at_least(backfill.chunk_size, 1_000_000),
                "must be at least 1MB",
            ),
            (
                "verify.rate_limit",
                is_at_least(verify.rate_limit, 100_000),
                "must be at least 100KB",
            ),
            ("publish.keep", publish.keep != Some(0), "must be at least 1"),
            (
                "publish.path",
                publish.path.is_some() || publish.interval.is_none(),
                "is missing: publish.interval needs it",
            ),
            ("serve.max_connections", serve.max_connections != Some(0), "must be at least 1"),
            ("serve.max_statements", serve.max_statements != Some(0), "must be at least 1"),
            ("serve.nice", serve.nice.is_none_or(|nice| nice <= 19), "must be at most 19"),
            (
                "serve.tls_cert",
                serve.tls_cert.is_some() == serve.tls_key.is_some(),
                "and serve.tls_key belong together",
            ),
            ("target.threads", target.threads != Some(0), "must be at least 1"),
            (
                "source.publication",
                source.publication.as_ref().is_none_or(names_publications),
                "must name a publication",
            ),
            ("sync.memory_limit", is_at_least(sync.memory_limit, 64_000), "must be at least 64kB"),
            (
                "source.slot",
                source.slot.as_deref().is_none_or(is_slot_name),
                "may hold lower-case letters, digits and underscores, 63 at most",
            ),
        ];

        let mut checks = checks.into_iter().chain(self.lake_checks());
        if let Some((key, _, reason)) = checks.find(|(_, is_valid, _)| !is_valid) {
            return Err(format!("{key} {reason}"));
        }

        match self.tables.keys().find(|name| !is_table_name(name)) {
            Some(name) => {
                Err(format!("tables.\"{name}\" is not a table; expected [tables.\"schema.table\"]"))
            }
            None => Ok(()),
        }
    }

    /// Returns what has to hold of a lake: the key, whether it holds, and what the value has to be.
    fn lake_checks(&self) -> [(&'static str, bool, &'static str); 7] {
        let Self { target, publish, serve, .. } = self;
        [
            (
                "target.lake",
                target.lake.is_none() || target.path.is_none(),
                "takes the place of target.path: set one of them",
            ),
            (
                "target.lake",
                target.lake.as_ref().is_none_or(|lake| lake.expose().starts_with("ducklake:")),
                "must begin with ducklake:",
            ),
            (
                "target.lake",
                target.lake.as_ref().is_none_or(|lake| !lake.expose().contains("://")),
                "must be key=value after ducklake:postgres:, as host=db dbname=lake, and no URL",
            ),
            (
                "target.lake",
                target.lake.is_some() || !target.describes_lake(),
                "is missing: other settings describe a lake",
            ),
            (
                "serve.listen",
                serve.listen.is_none() || target.lake.is_none(),
                "does not go with target.lake: readers open the lake itself (docs/lake.md)",
            ),
            (
                "publish.path",
                publish.path.is_none() || target.lake.is_none(),
                "does not go with target.lake: other tools read the lake itself",
            ),
            (
                "target.schema_prefix",
                target.schema_prefix.as_deref().is_none_or(is_schema_prefix),
                "may hold lower-case letters, digits and underscores, 40 at most",
            ),
        ]
    }
}

/// Returns whether a size that the settings name has at least this number of bytes; a default does.
fn is_at_least(size: Option<ByteSize>, bytes: usize) -> bool {
    size.is_none_or(|size| size.0 >= bytes)
}

fn is_schema_prefix(prefix: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    prefix.len() <= 40 && prefix.bytes().all(is_plain)
}

fn names_publications(publications: &Publications) -> bool {
    match publications {
        Publications::One(name) => !name.is_empty(),
        Publications::Many(names) => !names.is_empty() && !names.iter().any(String::is_empty),
    }
}

fn is_slot_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    !name.is_empty() && name.len() <= 63 && name.bytes().all(is_allowed)
}

fn is_table_name(name: &str) -> bool {
    name.split_once('.').is_some_and(|(schema, table)| !schema.is_empty() && !table.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validated(text: &str) -> Result<(), String> {
        toml::from_str::<Settings>(text).unwrap().validate()
    }

    #[test]
    fn each_refused_value_is_named_with_what_it_has_to_be() {
        let long = format!("[source]\nslot = \"{}\"", "a".repeat(64));
        let slot = "source.slot may hold lower-case letters, digits and underscores, 63 at most";

        for (text, error) in [
            ("[sync]\nmax_batch_rows = 0", "sync.max_batch_rows must be at least 1"),
            ("[backfill]\nworkers = 0", "backfill.workers must be at least 1"),
            ("[backfill]\nrate_limit = \"99kB\"", "backfill.rate_limit must be at least 100KB"),
            ("[backfill]\nchunk_size = \"999kB\"", "backfill.chunk_size must be at least 1MB"),
            ("[verify]\nrate_limit = \"99kB\"", "verify.rate_limit must be at least 100KB"),
            ("[target]\nthreads = 0", "target.threads must be at least 1"),
            ("[source]\npublication = \"\"", "source.publication must name a publication"),
            ("[source]\npublication = []", "source.publication must name a publication"),
            ("[source]\npublication = [\"a\", \"\"]", "source.publication must name a publication"),
            ("[sync]\nmemory_limit = \"63kB\"", "sync.memory_limit must be at least 64kB"),
            ("[source]\nslot = \"\"", slot),
            ("[source]\nslot = \"Rhei\"", slot),
            (long.as_str(), slot),
            (
                "[tables.orders]",
                "tables.\"orders\" is not a table; expected [tables.\"schema.table\"]",
            ),
        ] {
            assert_eq!(validated(text), Err(error.to_owned()), "{text}");
        }
    }

    #[test]
    fn the_smallest_values_are_allowed() {
        let smallest = "[sync]\nmax_batch_rows = 1\nmemory_limit = \"64kB\"\n\
                        [backfill]\nworkers = 1\nrate_limit = \"100kB\"\nchunk_size = \"1MB\"\n\
                        [target]\nthreads = 1\n[source]\nslot = \"_\"\npublication = [\"a\"]\n\
                        [verify]\nrate_limit = \"100kB\"\n[tables.\"a.b\"]";

        assert_eq!(validated(smallest), Ok(()));
        assert_eq!(validated(""), Ok(()));
    }
}
