//! Credentials: what DuckDB keeps as secrets, so that no statement, error or catalog shows them.

use super::{LakeOptions, S3Options};
use crate::olap::names::literal;

/// The name of the secret of a catalog in PostgreSQL.
pub(super) const CATALOG: &str = "rhei_lake_catalog";

/// What the address of a catalog in PostgreSQL begins with; a libpq string of `key=value` follows.
/// DuckDB puts the password of a secret behind that string, so a URL does not go with a password.
const POSTGRES: &str = "ducklake:postgres:";

/// Returns the value of a key in a libpq string, and where it stands in the string: quotes and
/// backslashes as libpq reads them.
fn value_of(conninfo: &str, wanted: &str) -> Option<(std::ops::Range<usize>, String)> {
    let text = conninfo.as_bytes();
    let mut at = 0;
    let skip = |mut at: usize, what: fn(u8) -> bool| {
        while text.get(at).is_some_and(|&byte| what(byte)) {
            at += 1;
        }
        at
    };

    loop {
        let start = skip(at, |byte| byte.is_ascii_whitespace());
        let end = skip(start, |byte| byte != b'=' && !byte.is_ascii_whitespace());
        let key = conninfo.get(start..end).filter(|key| !key.is_empty())?;
        let equals = skip(end, |byte| byte.is_ascii_whitespace());
        if text.get(equals) != Some(&b'=') {
            return None;
        }

        at = skip(equals + 1, |byte| byte.is_ascii_whitespace());
        let is_quoted = text.get(at) == Some(&b'\'');
        at += usize::from(is_quoted);
        let mut value = Vec::new();
        while let Some(&byte) = text.get(at) {
            match byte {
                b'\\' => {
                    value.extend(text.get(at + 1));
                    at += 1;
                }
                b'\'' if is_quoted => break,
                byte if !is_quoted && byte.is_ascii_whitespace() => break,
                byte => value.push(byte),
            }
            at += 1;
        }
        at += usize::from(is_quoted);

        if key.eq_ignore_ascii_case(wanted) {
            return Some((start..at.min(text.len()), String::from_utf8_lossy(&value).into_owned()));
        }
    }
}

/// Where a password stands in the address of a catalog in PostgreSQL.
fn password_of(catalog: &str) -> Option<(std::ops::Range<usize>, String)> {
    let conninfo = catalog.strip_prefix(POSTGRES)?;
    let (place, password) = value_of(conninfo, "password")?;
    Some((place.start + POSTGRES.len()..place.end + POSTGRES.len(), password))
}

/// Returns the address of a catalog for DuckDB, which gets the password as a secret.
pub(super) fn address(catalog: &str) -> String {
    let mut address = catalog.to_owned();
    if let Some((place, _)) = password_of(catalog) {
        address.replace_range(place, "");
    }
    address
}

/// Returns the address of a catalog without its password, for people to read.
pub(super) fn shown(catalog: &str) -> String {
    let address = address(catalog);
    let may_hold_more = ["password=", "token=", "://"];
    if may_hold_more.iter().any(|sign| address.to_lowercase().contains(sign)) {
        let kind: Vec<&str> = catalog.split(':').take(2).collect();
        return format!("{}:(hidden)", kind.join(":"));
    }
    address.trim_end().to_owned()
}

/// Returns the statement that makes the secret of the catalog's password, if the address has one.
pub(super) fn of_catalog(options: &LakeOptions) -> Option<String> {
    let in_address = password_of(&options.catalog).map(|(_, password)| password);
    let password = in_address.or_else(|| options.password.clone())?;
    options.catalog.starts_with(POSTGRES).then(|| {
        format!(
            "CREATE OR REPLACE SECRET {CATALOG} (TYPE postgres, PASSWORD {})",
            literal(&password)
        )
    })
}

/// Returns the statement that makes the secret of the store.
pub(super) fn of_store(options: &S3Options) -> String {
    let mut values = vec!["TYPE s3".to_owned()];
    match &options.key {
        Some((id, secret, token)) => {
            values.push(format!("KEY_ID {}, SECRET {}", literal(id), literal(secret)));
            values.extend(token.as_ref().map(|token| format!("SESSION_TOKEN {}", literal(token))));
        }
        None => values.push("PROVIDER credential_chain".to_owned()),
    }

    values.extend(options.region.as_ref().map(|region| format!("REGION {}", literal(region))));
    if let Some(endpoint) = &options.endpoint {
        let (host, has_tls) = match endpoint.strip_prefix("http://") {
            Some(host) => (host, false),
            None => (endpoint.strip_prefix("https://").unwrap_or(endpoint), true),
        };
        // A store of one's own has no name for each bucket.
        let host = literal(host.trim_end_matches('/'));
        values.push(format!("ENDPOINT {host}, URL_STYLE 'path', USE_SSL {has_tls}"));
    }
    format!("CREATE OR REPLACE SECRET rhei_lake_store ({})", values.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_of_a_catalog_is_found_however_it_is_written() {
        for (catalog, password, shown) in [
            ("ducklake:lake.ducklake", None, "ducklake:lake.ducklake"),
            ("ducklake:sqlite:lake.db", None, "ducklake:sqlite:lake.db"),
            ("ducklake:postgres:dbname=l host=h", None, "ducklake:postgres:dbname=l host=h"),
            (
                "ducklake:postgres:dbname=l password=geheim host=h",
                Some("geheim"),
                "ducklake:postgres:dbname=l  host=h",
            ),
            (
                r"ducklake:postgres:password = 'it\'s a \\ secret' dbname=l",
                Some(r"it's a \ secret"),
                "ducklake:postgres: dbname=l",
            ),
            ("ducklake:postgres:postgresql://me:pw@host/lake", None, "ducklake:postgres:(hidden)"),
            ("ducklake:postgres:password=a password=b", Some("a"), "ducklake:postgres:(hidden)"),
            ("ducklake:md:lake?motherduck_token=x", None, "ducklake:md:(hidden)"),
        ] {
            assert_eq!(password_of(catalog).map(|(_, found)| found).as_deref(), password);
            assert_eq!(super::shown(catalog), shown);
        }
    }

    #[test]
    fn a_store_without_a_key_is_asked_with_the_credentials_that_aws_finds() {
        let own = S3Options {
            endpoint: Some("http://127.0.0.1:9000/".to_owned()),
            region: None,
            key: Some(("id".to_owned(), "it's".to_owned(), None)),
        };
        assert_eq!(
            of_store(&own),
            "CREATE OR REPLACE SECRET rhei_lake_store (TYPE s3, KEY_ID 'id', SECRET 'it''s', \
             ENDPOINT '127.0.0.1:9000', URL_STYLE 'path', USE_SSL false)"
        );
        let amazon = S3Options { region: Some("eu-central-1".to_owned()), ..S3Options::default() };
        assert_eq!(
            of_store(&amazon),
            "CREATE OR REPLACE SECRET rhei_lake_store (TYPE s3, PROVIDER credential_chain, \
             REGION 'eu-central-1')"
        );
    }
}
