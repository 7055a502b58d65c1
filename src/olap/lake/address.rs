//! The address of a lake's catalog, as DuckDB's ATTACH takes it, and the password in it.

use std::path::Path;

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
    match address.strip_prefix(POSTGRES) {
        Some(conninfo) => Pairs::of(conninfo).all(|pair| pair.is_ok()),
        None => true,
    }
}

/// What the address of a catalog in PostgreSQL begins with. DuckDB puts the password of a secret
/// behind the libpq string that follows, so a URL does not go with a password.
const POSTGRES: &str = "ducklake:postgres:";

/// The pairs of a libpq string: the place of each, its key and its value. Quotes and backslashes as
/// libpq reads them.
struct Pairs<'a> {
    conninfo: &'a str,
    at: usize,
}

impl<'a> Pairs<'a> {
    fn of(conninfo: &'a str) -> Self {
        Self { conninfo, at: 0 }
    }

    fn skip(&mut self, what: fn(u8) -> bool) {
        let rest = self.conninfo.as_bytes().get(self.at..).unwrap_or_default();
        self.at += rest.iter().take_while(|byte| what(**byte)).count();
    }
}

/// A libpq string does not go on with `key=value`, or a quote is not closed.
#[derive(Debug, PartialEq, Eq)]
struct Unreadable;

impl<'a> Iterator for Pairs<'a> {
    type Item = Result<(std::ops::Range<usize>, &'a str, String), Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        let text = self.conninfo.as_bytes();
        self.skip(|byte| byte.is_ascii_whitespace());
        let start = self.at;
        if start >= text.len() {
            return None;
        }

        self.skip(|byte| byte != b'=' && !byte.is_ascii_whitespace());
        let key = self.conninfo.get(start..self.at).unwrap_or_default();
        self.skip(|byte| byte.is_ascii_whitespace());
        if key.is_empty() || text.get(self.at) != Some(&b'=') {
            self.at = text.len();
            return Some(Err(Unreadable));
        }

        self.at += 1;
        self.skip(|byte| byte.is_ascii_whitespace());
        let is_quoted = text.get(self.at) == Some(&b'\'');
        self.at += usize::from(is_quoted);
        let mut value = Vec::new();
        loop {
            match text.get(self.at) {
                None if is_quoted => return Some(Err(Unreadable)),
                None => break,
                Some(b'\\') => {
                    value.extend(text.get(self.at + 1));
                    self.at += 1;
                }
                Some(b'\'') if is_quoted => break,
                Some(byte) if !is_quoted && byte.is_ascii_whitespace() => break,
                Some(byte) => value.push(*byte),
            }
            self.at += 1;
        }

        self.at = (self.at + usize::from(is_quoted)).min(text.len());
        Some(Ok((start..self.at, key, String::from_utf8_lossy(&value).into_owned())))
    }
}

/// Where a password stands in the address of a catalog in PostgreSQL.
pub(super) fn password_of(catalog: &str) -> Option<(std::ops::Range<usize>, String)> {
    let conninfo = catalog.strip_prefix(POSTGRES)?;
    let (place, _, password) = Pairs::of(conninfo)
        .map_while(Result::ok)
        .find(|(_, key, _)| key.eq_ignore_ascii_case("password"))?;
    Some((place.start + POSTGRES.len()..place.end + POSTGRES.len(), password))
}

/// Returns the address of a catalog for DuckDB, which gets the password as a secret.
pub(super) fn without_password(catalog: &str) -> String {
    let mut address = catalog.to_owned();
    if let Some((place, _)) = password_of(catalog) {
        address.replace_range(place, "");
    }
    address
}

/// Returns the address of a catalog without its password, for people to read.
pub(super) fn shown(catalog: &str) -> String {
    let address = without_password(catalog);
    let may_hold_more = ["password=", "token=", "://"];
    if may_hold_more.iter().any(|sign| address.to_lowercase().contains(sign)) {
        let kind: Vec<&str> = catalog.split(':').take(2).collect();
        return format!("{}:(hidden)", kind.join(":"));
    }
    address.trim_end().to_owned()
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
            assert!(is_readable(catalog) != catalog.contains("://"), "{catalog}");
        }
    }

    #[test]
    fn an_address_that_cannot_be_read_to_its_end_is_told() {
        for conninfo in ["dbname=l password=two words", "l", "password='open", "=x", "a=b c"] {
            assert!(!is_readable(&format!("ducklake:postgres:{conninfo}")), "{conninfo}");
        }
        for conninfo in ["", "dbname=l password='two words' host=", "dbname = l\thost=h "] {
            assert!(is_readable(&format!("ducklake:postgres:{conninfo}")), "{conninfo}");
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
