//! What the optional event trigger at the source says of a table (schemas/ddl_trigger.sql): its columns as they are at
//! that place of the stream, which no Relation message and no later look at the catalogs can tell (trap 64).

use std::collections::BTreeMap;

use serde::Deserialize;

/// Prefix of the trigger's logical messages.
pub const PREFIX: &str = "rhei.ddl";

/// A table from a place of the stream on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Description {
    pub oid: u32,
    /// The highest `attnum` ever given out.
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
    /// `attmissingval` as it prints (an array of one element), by the oid of each table that holds rows.
    pub missing: BTreeMap<u32, Option<String>>,
}

impl Description {
    /// Bytes of memory that it takes, about.
    pub fn bytes(&self) -> usize {
        let missing = |missing: &Option<String>| 64 + missing.as_ref().map_or(0, String::len);
        let column = |column: &DescribedColumn| {
            size_of::<DescribedColumn>() + column.name.len() + column.missing.values().map(missing).sum::<usize>()
        };
        size_of::<Self>() + self.columns.iter().map(column).sum::<usize>()
    }

    /// None when it is not what the trigger sends: anybody may send messages of any prefix.
    pub fn parse(content: &[u8]) -> Option<Self> {
        serde_json::from_slice(content).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_trigger_sends_is_read_and_all_else_is_none() {
        let sent =
            br#"{"oid": 16385, "last_attnum": 2, "columns": [{"attnum": 2, "name": "v", "type": 23, "typmod": -1,
            "ndims": 0, "not_null": false, "is_generated": false, "missing": {"16385": "{7}", "16390": null}}]}"#;
        let description = Description::parse(sent).unwrap();
        assert_eq!((description.oid, description.last_attnum), (16385, 2));
        let missing = BTreeMap::from([(16385, Some("{7}".to_owned())), (16390, None)]);
        assert_eq!(description.columns[0].missing, missing);
        for other in [b"".as_slice(), b"hello", b"{}", b"{\"oid\": -1}", b"\xff"] {
            assert_eq!(Description::parse(other), None);
        }
    }
}
