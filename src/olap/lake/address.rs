//! The address of a lake's catalog, as DuckDB's ATTACH takes it, and the password in it.

use std::path::Path;

use crate::conninfo;

/// What keeps the catalog of a lake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CatalogKind {
    /// A PostgreSQL database: `ducklake:postgres:` and a libpq string of `key=value`.
    Postgres,
    /// A SQLite file: `ducklake:sqlite:FILE`.
    Sqlite,
    /// A DuckDB file: `ducklake:FILE`.
    DuckDb,
    /// A database of MotherDuck: `ducklake:md:NAME`.
    MotherDuck,
}

impl CatalogKind {
    /// Returns the kind of the catalog at an address; `None` for one that rhei does not know.
    pub fn of(address: &str) -> Option<Self> {
        let place = address.strip_prefix("ducklake:")?;
        match place.split_once(':') {
            Some(("postgres", _)) => Some(Self::Postgres),
            Some(("sqlite", file)) if !file.is_empty() => Some(Self::Sqlite),
            Some(("md", _)) => Some(Self::MotherDuck),
            Some(("duckdb", file)) if !file.is_empty() => Some(Self::DuckDb),
            // A file whose name holds a colon.
            Some((before, _)) if before.contains(['/', '.']) => Some(Self::DuckDb),
            Some(_) => None,
            None => (!place.is_empty()).then_some(Self::DuckDb),
        }
    }
}

/// Returns the file that is the catalog, if it is one.
pub(super) fn file_of(address: &str) -> Option<&Path> {
    let place = address.strip_prefix("ducklake:")?;
    match CatalogKind::of(address)? {
        CatalogKind::Sqlite => place.strip_prefix("sqlite:").map(Path::new),
        CatalogKind::DuckDb => Some(Path::new(place.strip_prefix("duckdb:").unwrap_or(place))),
        CatalogKind::Postgres | CatalogKind::MotherDuck => None,
    }
}

/// Returns whether the address of a catalog can be read: where it is a libpq string, all of it has
/// to be. A value with a space in it that lacks its quotes would be cut off.
pub fn is_readable(address: &str) -> bool {
    address.strip_prefix(POSTGRES).is_none_or(|conninfo| conninfo::pairs(conninfo).is_ok())
}

/// What the address of a catalog in PostgreSQL begins with. DuckDB puts the password of a secret
/// behind the libpq string that follows, so a URL does not go with a password.
const POSTGRES: &str = "ducklake:postgres:";

/// Returns the libpq string of a catalog in PostgreSQL, without its password, and the password;
/// `None` for another catalog.
pub(super) fn conninfo_of(catalog: &str) -> Option<(String, Option<String>)> {
    let pairs = conninfo::pairs(catalog.strip_prefix(POSTGRES)?).ok()?;
    let (passwords, others): (Vec<_>, Vec<_>) =
        pairs.into_iter().partition(|(key, _)| key == "password");
    // libpq takes the last one.
    let password = passwords.into_iter().next_back().map(|(_, password)| password);
    Some((conninfo::joined(&others), password))
}

/// Returns the address of a catalog for DuckDB, which gets the password as a secret.
pub(super) fn without_password(catalog: &str) -> String {
    match conninfo_of(catalog) {
        Some((conninfo, _)) => format!("{POSTGRES}{conninfo}"),
        None => catalog.to_owned(),
    }
}

/// Returns the address of a catalog without its password, for people to read.
pub(super) fn shown(catalog: &str) -> String {
    let address = without_password(catalog);
    let may_hold_more = ["password", "token=", "://"];
    if may_hold_more.iter().any(|sign| address.to_lowercase().contains(sign)) {
        let kind: Vec<&str> = catalog.split(':').take(2).collect();
        return format!("{}:(hidden)", kind.join(":"));
    }
    address
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
                "ducklake:postgres:dbname=l host=h",
            ),
            (
                r"ducklake:postgres:password = 'it\'s a \\ secret' dbname=l",
                Some(r"it's a \ secret"),
                "ducklake:postgres:dbname=l",
            ),
            ("ducklake:postgres:password=a password=b", Some("b"), "ducklake:postgres:"),
            ("ducklake:postgres:postgresql://me:pw@host/lake", None, "ducklake:postgres:(hidden)"),
            ("ducklake:postgres:password=two words", None, "ducklake:postgres:(hidden)"),
            ("ducklake:postgres:PASSWORD=geheim", None, "ducklake:postgres:(hidden)"),
            ("ducklake:md:lake?motherduck_token=x", None, "ducklake:md:(hidden)"),
        ] {
            assert_eq!(conninfo_of(catalog).and_then(|(_, found)| found).as_deref(), password);
            assert_eq!(super::shown(catalog), shown);
            let is_hidden = shown.starts_with("ducklake:postgres:(hidden)");
            assert_eq!(is_readable(catalog), !is_hidden, "{catalog}");
        }
    }

    #[test]
    fn the_kind_of_a_catalog_is_told_by_its_address() {
        for (address, kind) in [
            ("ducklake:postgres:dbname=l", Some(CatalogKind::Postgres)),
            ("ducklake:sqlite:l.db", Some(CatalogKind::Sqlite)),
            ("ducklake:l.ducklake", Some(CatalogKind::DuckDb)),
            ("ducklake:/data/a:b.ducklake", Some(CatalogKind::DuckDb)),
            ("ducklake:duckdb:l.db", Some(CatalogKind::DuckDb)),
            ("ducklake:md:lake", Some(CatalogKind::MotherDuck)),
            ("ducklake:mysql:db=lake", None),
            ("ducklake:sqlite:", None),
            ("ducklake:", None),
            ("postgres:dbname=l", None),
        ] {
            assert_eq!(CatalogKind::of(address), kind, "{address}");
        }
        assert_eq!(file_of("ducklake:sqlite:/a/l.db"), Some(Path::new("/a/l.db")));
        assert_eq!(file_of("ducklake:l.ducklake"), Some(Path::new("l.ducklake")));
        assert_eq!(file_of("ducklake:postgres:dbname=l"), None);
    }
}
