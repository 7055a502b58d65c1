//! Where connection settings stand: strings and URLs as libpq reads them, services, password files.

use std::{collections::HashMap, path::Path};

use tokio_postgres::config::Host;

use super::{ConnectError, Environment};
use crate::conninfo;

pub(super) fn is_url(text: &str) -> bool {
    text.starts_with("postgres://") || text.starts_with("postgresql://")
}

/// The keys that tokio-postgres does not know, or whose values it knows only in part.
pub(super) const EXTRA_KEYS: [&str; 6] =
    ["sslmode", "sslrootcert", "sslcert", "sslkey", "service", "passfile"];

type Split = (String, HashMap<String, String>);

/// Takes the keys in [`EXTRA_KEYS`] out of a connection string.
pub(super) fn split_settings(text: &str) -> Result<Split, ConnectError> {
    let mut ours = HashMap::new();
    if is_url(text) {
        let Some((base, query)) = text.split_once('?') else { return Ok((text.to_owned(), ours)) };

        let mut kept = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some((key, value)) if EXTRA_KEYS.contains(&key) => {
                    ours.insert(key.to_owned(), percent_decoded(value)?);
                }
                _ => kept.push(pair),
            }
        }

        let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
        return Ok((format!("{base}{query}"), ours));
    }

    let pairs = conninfo::pairs(text).map_err(|reason| ConnectError::Invalid { reason })?;
    let (extra, kept): (Vec<_>, Vec<_>) =
        pairs.into_iter().partition(|(key, _)| EXTRA_KEYS.contains(&key.as_str()));
    ours.extend(extra);
    Ok((conninfo::joined(&kept), ours))
}

pub(super) fn percent_decoded(text: &str) -> Result<String, ConnectError> {
    let invalid =
        || ConnectError::Invalid { reason: "a percent escape in the URL is broken".to_owned() };

    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();

    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2).ok_or_else(invalid)?;
            let digits = std::str::from_utf8(digits).map_err(|_| invalid())?;
            bytes.push(u8::from_str_radix(digits, 16).map_err(|_| invalid())?);
            rest = after;
        } else {
            bytes.push(byte);
        }
    }

    String::from_utf8(bytes).map_err(|_| invalid())
}

pub(super) fn read_service(
    service: &str,
    environment: &Environment,
) -> Result<String, ConnectError> {
    let invalid = |reason: String| ConnectError::Invalid { reason };

    let file = environment.file("PGSERVICEFILE", ".pg_service.conf").ok_or_else(|| {
        invalid(format!(
            "service \"{service}\" is named, but there is no home folder to look it up"
        ))
    })?;

    let text = std::fs::read_to_string(&file).map_err(|error| {
        invalid(format!("service \"{service}\": cannot read {}: {error}", file.display()))
    })?;

    let mut is_inside = false;
    let mut found: Option<Vec<String>> = None;

    for line in
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            is_inside = name == service;
            if is_inside {
                found.get_or_insert_default();
            }
        } else if let (true, Some((key, value))) = (is_inside, line.split_once('=')) {
            let value = value.trim().replace('\\', "\\\\").replace('\'', "\\'");
            found.get_or_insert_default().push(format!("{}='{value}'", key.trim()));
        }
    }

    let settings = found
        .ok_or_else(|| invalid(format!("service \"{service}\" is not in {}", file.display())))?;
    Ok(settings.join(" "))
}

/// Returns the password of the first matching line of a password file. A file that other users can
/// read is not used, as with libpq.
pub(super) fn password_from(file: &Path, config: &tokio_postgres::Config) -> Option<String> {
    let data = std::fs::metadata(file).ok()?;
    if std::os::unix::fs::MetadataExt::mode(&data) & 0o077 != 0 {
        tracing::warn!(
            event = "password_file_ignored",
            file = %file.display(),
            "password file ignored: others can read it; chmod 600 mends that"
        );
        return None;
    }

    let text = std::fs::read_to_string(file).ok()?;

    let host = match (config.get_hosts().first(), config.get_hostaddrs().first()) {
        (Some(Host::Tcp(host)), _) => host.clone(),
        (Some(Host::Unix(_)), _) => "localhost".to_owned(),
        (None, address) => address?.to_string(),
    };
    let port = config.get_ports().first().copied().unwrap_or(5432).to_string();
    let wanted = [host.as_str(), &port, config.get_dbname()?, config.get_user()?];

    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = password_fields(line);
        let (password, keys) = fields.split_last()?;

        let fits = keys.len() == 4
            && keys.iter().zip(wanted).all(|(field, wanted)| field == "*" || field == wanted);
        fits.then(|| password.clone())
    })
}

pub(super) fn password_fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            // The password itself may hold colons.
            ':' if fields.len() < 5 => fields.push(String::new()),
            '\\' => fields.last_mut().into_iter().for_each(|field| field.extend(characters.next())),
            other => fields.last_mut().into_iter().for_each(|field| field.push(other)),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_password_file_is_asked_for_the_host_or_for_its_address_without_one() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"db:5432:shop:rhei:by name\n10.0.0.1:5432:shop:rhei:by address\n").unwrap();
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(file.path(), private).unwrap();

        for (settings, expected) in [
            ("host=db user=rhei dbname=shop", Some("by name")),
            ("hostaddr=10.0.0.1 user=rhei dbname=shop", Some("by address")),
            ("host=db hostaddr=10.0.0.1 user=rhei dbname=shop", Some("by name")),
            ("hostaddr=10.0.0.2 user=rhei dbname=shop", None),
            ("host=db user=other dbname=shop", None),
        ] {
            let config: tokio_postgres::Config = settings.parse().unwrap();
            let found = password_from(file.path(), &config);
            assert_eq!(found.as_deref(), expected, "{settings}");
        }
    }
}
