//! The values that are refused although they can be read.

use super::{ByteSize, Publications, Settings};
use crate::olap::lake::{CatalogKind, LayoutKey, address};

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
    fn lake_checks(&self) -> [(&'static str, bool, &'static str); 11] {
        let Self { target, publish, serve, tables, .. } = self;
        let is_catalog =
            |holds: fn(&str) -> bool| target.lake.as_ref().is_none_or(|lake| holds(lake.expose()));
        [
            (
                "target.lake",
                target.lake.is_none() || target.path.is_none(),
                "takes the place of target.path: set one of them",
            ),
            (
                "target.lake",
                is_catalog(|lake| CatalogKind::of(lake).is_some()),
                "must be ducklake:postgres:KEY=VALUE.., ducklake:sqlite:FILE, ducklake:FILE \
                 or ducklake:md:NAME",
            ),
            (
                "target.lake",
                is_catalog(|lake| !lake.contains("://")),
                "must be key=value after ducklake:postgres:, as host=db dbname=lake, and no URL",
            ),
            (
                "target.lake",
                is_catalog(address::is_readable),
                "must be key=value after ducklake:postgres:, with single quotes around a value \
                 that has spaces: password='two words'",
            ),
            (
                "target.lake",
                target.lake.is_some() || !target.describes_lake(),
                "is missing, and other settings of [target] are those of a lake: set it, or take \
                 data_path and the others out",
            ),
            (
                "target.data_path",
                target.data_path.as_deref().is_none_or(is_data_path),
                "must be s3://bucket/prefix or a folder: not /, and without ~, .., //, *, ? and [",
            ),
            ("target.file_size", is_at_least(target.file_size, 100_000), "must be at least 100KB"),
            (
                "tables",
                tables.values().all(|table| is_without_repeats(&table.partition_by)),
                "must not name a column twice in partition_by",
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

/// Returns whether this may be the place of a lake's data. `rhei compact` deletes files below it
/// that the lake does not know.
fn is_data_path(path: &str) -> bool {
    let place = path.strip_prefix("s3://");
    // DuckLake compares paths as texts, so each file has to have one path; and it lists the files
    // by a pattern that begins with this place.
    let is_plain = !place.unwrap_or(path).contains("//") && !path.contains(['*', '?', '[']);
    is_plain
        && match place {
            Some(place) => !place.is_empty() && !place.starts_with('/'),
            None => {
                !path.trim_matches('/').is_empty()
                    && !path.starts_with('~')
                    && !path.split('/').any(|part| part == "..")
            }
        }
}

fn is_without_repeats(keys: &[LayoutKey]) -> bool {
    keys.iter().enumerate().all(|(at, key)| !keys.iter().take(at).any(|before| before == key))
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
    fn a_lake_is_refused_that_could_not_be_opened_or_would_endanger_other_files() {
        let lake =
            |more: &str| format!("[target]\nlake = \"ducklake:postgres:dbname=lake\"\n{more}");
        for (text, key) in [
            ("[target]\nlake = \"ducklake:mysql:db=lake\"".to_owned(), "target.lake must be"),
            ("[target]\nlake = \"lake.db\"".to_owned(), "target.lake must be"),
            (
                "[target]\nlake = \"ducklake:postgres:password=geheim nis\"".to_owned(),
                "target.lake must be key=value",
            ),
            ("[target]\ndata_path = \"/lake\"".to_owned(), "target.lake is missing"),
            (lake("data_path = \"\""), "target.data_path must be"),
            (lake("data_path = \"/\""), "target.data_path must be"),
            (lake("data_path = \"s3://\""), "target.data_path must be"),
            (lake("data_path = \"gs://bucket/lake\""), "target.data_path must be"),
            (lake("data_path = \"s3://bucket//lake\""), "target.data_path must be"),
            (lake("data_path = \"/srv//lake\""), "target.data_path must be"),
            (lake("data_path = \"../lake\""), "target.data_path must be"),
            (lake("data_path = \"/srv/lake*\""), "target.data_path must be"),
            (lake("data_path = \"~/lake\""), "target.data_path must be"),
            (lake("file_size = \"1kB\""), "target.file_size must be"),
            (
                lake("[tables.\"a.b\"]\npartition_by = [\"day(at)\", \"day(at)\"]"),
                "tables must not name a column twice",
            ),
        ] {
            let error = validated(&text).unwrap_err();
            assert!(error.starts_with(key), "{text}: {error}");
            assert!(!error.contains("nis"), "the password is shown: {error}");
        }
        assert_eq!(validated(&lake("data_path = \"s3://bucket\"")), Ok(()));
        assert_eq!(validated(&lake("data_path = \"data\"")), Ok(()));
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
