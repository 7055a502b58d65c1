//! The description of a table that the optional event trigger at the source sends
//! (schemas/ddl_trigger.sql): its columns at that position of the stream, which neither a Relation
//! message nor a later query on the catalogs can tell (trap 64).

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;
use sha2::{Digest, Sha256};

/// The prefix of the trigger's logical messages.
pub const PREFIX: &str = "rhei.ddl";

/// A table from a position of the stream on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Description {
    /// The transaction in which the description was sent.
    #[serde(skip)]
    pub xid: u32,
    pub oid: u32,
    /// The highest `attnum` ever assigned.
    pub last_attnum: i16,
    pub columns: Vec<DescribedColumn>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DescribedColumn {
    pub attnum: i16,
    pub name: String,
    #[serde(rename = "type")]
    pub type_oid: u32,
    pub typmod: i32,
    pub ndims: i32,
    pub not_null: bool,
    pub is_generated: bool,
    /// `attmissingval` as it prints (an array of one element), by the oid of each table that holds
    /// rows.
    pub missing: BTreeMap<u32, Option<String>>,
}

impl Description {
    /// Returns about how many bytes of memory the description takes.
    pub fn bytes(&self) -> usize {
        let missing = |missing: &Option<String>| 64 + missing.as_ref().map_or(0, String::len);
        let column = |column: &DescribedColumn| {
            size_of::<DescribedColumn>()
                + column.name.len()
                + column.missing.values().map(missing).sum::<usize>()
        };
        size_of::<Self>() + self.columns.iter().map(column).sum::<usize>()
    }

    /// Reads a message of transaction `xid`. Returns none when the trigger did not send the message
    /// in that transaction: any role may send messages of any prefix.
    pub fn read(content: &[u8], xid: u32, secret: &Secret) -> Option<Self> {
        let (signature, signed) = content.split_at_checked(SIGNATURE)?;
        let signed = signed.strip_prefix(b" ")?;
        if !secret.has_signed(signature, signed) {
            tracing::debug!(
                xid,
                "a description of a table that the event trigger did not sign is ignored"
            );
            return None;
        }

        let at = signed.iter().position(|&byte| byte == b' ')?;
        let (number, described) = signed.split_at_checked(at)?;
        // The stream carries the lower half of the number.
        let number: u64 = std::str::from_utf8(number).ok()?.parse().ok()?;
        if number & u64::from(u32::MAX) != u64::from(xid) {
            tracing::debug!(
                xid,
                "a description of a table that is of another transaction is ignored"
            );
            return None;
        }

        let described: Self = serde_json::from_slice(described).ok()?;
        Some(Self { xid, ..described })
    }
}

/// The number of hexadecimal digits of a SHA-256.
const SIGNATURE: usize = 64;

/// The secret with which the event trigger signs. Its output never shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret(..)")
    }
}

impl Secret {
    /// The length of two keys of one block of SHA-256 each, as the trigger's SQL makes them: the
    /// key of the inner hash and the key of the outer one.
    const BYTES: usize = 128;

    /// Reads the secret, and returns none when the trigger's SQL did not make it.
    pub fn parse(text: &str) -> Option<Self> {
        let is_secret =
            text.len() == Self::BYTES && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_secret.then(|| Self(text.to_owned()))
    }

    fn sign(&self, content: &[u8]) -> String {
        let (inner, outer) = self.0.split_at(Self::BYTES / 2);
        let inner = Sha256::new().chain_update(inner).chain_update(content).finalize();
        let hash = Sha256::new().chain_update(outer).chain_update(inner).finalize();
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Returns whether the signature fits, in a time that does not depend on where it differs.
    fn has_signed(&self, signature: &[u8], content: &[u8]) -> bool {
        let expected = self.sign(content);
        let differing =
            expected.bytes().zip(signature).fold(0, |found, (one, other)| found | (one ^ other));
        signature.len() == expected.len() && differing == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_trigger_sends_is_read_and_all_else_is_none() {
        let sent = r#"{"oid": 16385, "last_attnum": 2, "columns": [{
            "attnum": 2, "name": "v", "type": 23, "typmod": -1, "ndims": 0, "not_null": false,
            "is_generated": false, "missing": {"16385": "{7}", "16390": null}}]}"#;
        let secret = Secret::parse(&"0123456789abcdef".repeat(8)).unwrap();
        let signed = |secret: &Secret, text: &str| {
            format!("{} {text}", secret.sign(text.as_bytes())).into_bytes()
        };
        let message = signed(&secret, &format!("4294967303 {sent}"));
        let description = Description::read(&message, 7, &secret).unwrap();
        assert_eq!((description.oid, description.last_attnum), (16385, 2));
        let missing = BTreeMap::from([(16385, Some("{7}".to_owned())), (16390, None)]);
        assert_eq!(description.columns[0].missing, missing);
        for other in ["", "7", "7 ", "7 hello", "7 {}", "7 {\"oid\": -1}", "x {}", "-1 {}"] {
            assert_eq!(Description::read(&signed(&secret, other), 7, &secret), None, "{other}");
        }

        // The description is of another transaction, was changed on the way, or has another
        // signature.
        assert_eq!(Description::read(&message, 8, &secret), None);
        for at in 0..message.len() {
            let mut other = message.clone();
            other[at] ^= 1;
            assert_eq!(Description::read(&other, 7, &secret), None, "byte {at}");
            assert_eq!(Description::read(&message[..at], 7, &secret), None, "{at} bytes");
        }
        let another = Secret::parse(&"f".repeat(128)).unwrap();
        assert_eq!(Description::read(&signed(&another, &format!("7 {sent}")), 7, &secret), None);
        assert_eq!(Description::read(sent.as_bytes(), 7, &secret), None);
    }

    #[test]
    fn the_secret_is_not_printed() {
        let secret = Secret::parse(&"ab".repeat(64)).unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert_eq!(Secret::parse("ab"), None);
        assert_eq!(Secret::parse(&"x".repeat(128)), None);
    }
}
