//! Credentials: what DuckDB keeps as secrets, so that no statement, error or catalog shows them.

use super::{LakeOptions, S3Options};
use crate::olap::names::literal;

/// The name of the secret of a catalog in PostgreSQL.
pub(super) const CATALOG: &str = "rhei_lake_catalog";

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

/// Where a password stands in the address of a catalog.
fn password_of(catalog: &str) -> Option<(std::ops::Range<usize>, String)> {
    let (_, conninfo) = catalog.split_once("postgres:").filter(|(kind, _)| *kind == "ducklake:")?;
    let offset = catalog.len() - conninfo.len();

    // A URL: postgres://user:password@host/database
    let url = ["//", "postgres://", "postgresql://"]
        .into_iter()
        .find_map(|scheme| conninfo.strip_prefix(scheme));
    if let Some(rest) = url {
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        let (user, _) = authority.rsplit_once('@')?;
        let (name, password) = user.split_once(':')?;
        let start = catalog.len() - rest.len() + name.len();
        return Some((start..start + 1 + password.len(), percent_decoded(password)));
    }

    let (place, password) = value_of(conninfo, "password")?;
    Some((place.start + offset..place.end + offset, password))
}

fn percent_decoded(text: &str) -> String {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = (byte == b'%')
            .then(|| after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        decoded.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { after.get(2..).unwrap_or_default() } else { after };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Returns the address of a catalog without its password, for people to read.
pub(super) fn without_password(catalog: &str) -> String {
    let mut shown = catalog.to_owned();
    if let Some((place, _)) = password_of(catalog) {
        shown.replace_range(place, "");
    }
    // What else could hold a password is not shown at all.
    let is_known = !shown.to_lowercase().contains("password=") && !shown.contains("token=");
    if is_known {
        return shown.trim_end().to_owned();
    }
    let kind: Vec<&str> = catalog.split(':').take(2).collect();
    format!("{}:(hidden)", kind.join(":"))
}

/// Returns the address of a catalog for DuckDB, which gets the password as a secret.
pub(super) fn address(catalog: &str) -> String {
    let mut address = catalog.to_owned();
    if let Some((place, _)) = password_of(catalog) {
        address.replace_range(place, "");
    }
    address
}

/// Returns the statement that makes the secret of the catalog's password, if the address has one.
pub(super) fn of_catalog(options: &LakeOptions) -> Option<String> {
    let in_address = password_of(&options.catalog).map(|(_, password)| password);
    let password = in_address.or_else(|| options.password.clone())?;
    options.catalog.starts_with("ducklake:postgres:").then_some(())?;
    Some(format!(
        "CREATE OR REPLACE SECRET {CATALOG} (TYPE postgres, PASSWORD {})",
        literal(&password)
    ))
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
            (
                "ducklake:postgres://me:p%40ss%2F@host:5432/lake?sslmode=require",
                Some("p@ss/"),
                "ducklake:postgres://me@host:5432/lake?sslmode=require",
            ),
            ("ducklake:postgres://me@host/lake", None, "ducklake:postgres://me@host/lake"),
            (
                "ducklake:postgres:postgresql://me:pw@host/lake",
                Some("pw"),
                "ducklake:postgres:postgresql://me@host/lake",
            ),
            ("ducklake:md:lake?motherduck_token=x", None, "ducklake:md:(hidden)"),
        ] {
            assert_eq!(password_of(catalog).map(|(_, found)| found).as_deref(), password);
            assert_eq!(without_password(catalog), shown);
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
