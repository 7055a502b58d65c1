//! Credentials: what DuckDB keeps as secrets, so that no statement, error or catalog shows them.

use duckdb::Connection;

use super::{LakeOptions, S3Options, address::conninfo_of};
use crate::olap::{TargetError, names::literal};

/// The name of the secret of a catalog in PostgreSQL.
pub(super) const CATALOG: &str = "rhei_lake_catalog";

/// Returns the statement that makes the secret of the catalog's password, if the address has one.
pub(super) fn of_catalog(options: &LakeOptions) -> Option<String> {
    let (_, in_address) = conninfo_of(&options.catalog)?;
    let password = in_address.or_else(|| options.password.clone())?;
    Some(format!(
        "CREATE OR REPLACE SECRET {CATALOG} (TYPE postgres, PASSWORD {})",
        literal(&password)
    ))
}

/// Makes the secret of the store, if the data is in one; also again, since credentials of a role
/// end after some hours.
pub(super) fn put_for_store(
    connection: &Connection,
    options: &LakeOptions,
) -> Result<(), TargetError> {
    if !options.is_in_store() {
        return Ok(());
    }
    connection.execute_batch(&of_store(&options.s3)).map_err(|source| match options.s3.key {
        // The error would show the statement.
        Some(_) => TargetError::NoSecret,
        None => TargetError::NoCredentials { source },
    })
}

/// Returns the statement that makes the secret of the store.
fn of_store(options: &S3Options) -> String {
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
