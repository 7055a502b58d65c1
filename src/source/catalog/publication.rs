//! What is published: publications, the tables that they bring, and which columns of those.
//!
//! A change of a partition comes as a change of the topmost ancestor that any of the publications brings by
//! `publish_via_partition_root`, also where another publication names the partition itself (trap 61). So what the view
//! `pg_publication_tables` says of one publication is not yet what a stream of several brings.

use std::collections::HashMap;

use tokio_postgres::Client;

use super::{CatalogError, SourceColumn};
use crate::change::QualifiedName;

/// The publications of a pipeline, taken together.
#[derive(Debug, Clone)]
pub struct PublicationInfo {
    pub insert: bool,
    pub update: bool,
    pub delete: bool,
    pub truncate: bool,
    /// Lines `publication OID`, and `table OID VERSION` for each row of pg_publication_rel (trap 41).
    pub fingerprint: String,
}

/// None when one of them is missing.
pub async fn publication(client: &Client, names: &[String]) -> Result<Option<PublicationInfo>, CatalogError> {
    let rows = client
        .query(
            "SELECT oid, pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication WHERE pubname = ANY($1::text[]) \
             ORDER BY oid",
            &[&names],
        )
        .await?;
    if rows.len() < names.len() || rows.is_empty() {
        return Ok(None);
    }
    let mut info =
        PublicationInfo { insert: true, update: true, delete: true, truncate: true, fingerprint: String::new() };
    let mut oids: Vec<u32> = Vec::new();
    for row in &rows {
        let oid: u32 = row.try_get(0)?;
        oids.push(oid);
        info.fingerprint.push_str(&format!("publication {oid}\n"));
        info.insert &= row.try_get::<_, bool>(1)?;
        info.update &= row.try_get::<_, bool>(2)?;
        info.delete &= row.try_get::<_, bool>(3)?;
        info.truncate &= row.try_get::<_, bool>(4)?;
    }
    let members = client
        .query(
            "SELECT prrelid, string_agg(oid::text || ':' || xmin::text, ',' ORDER BY oid) FROM pg_publication_rel \
             WHERE prpubid = ANY($1) GROUP BY prrelid ORDER BY prrelid",
            &[&oids],
        )
        .await?;
    for row in members {
        let (oid, version): (u32, String) = (row.try_get(0)?, row.try_get(1)?);
        info.fingerprint.push_str(&format!("table {oid} {version}\n"));
    }
    Ok(Some(info))
}

/// Row filters, column lists and schemas in publications came with 15.
pub(super) async fn has_pg15_publications(client: &Client) -> Result<bool, CatalogError> {
    Ok(server_version_num(client).await? >= 150_000)
}

async fn server_version_num(client: &Client) -> Result<i32, CatalogError> {
    let row = client.query_one("SELECT current_setting('server_version_num')::int", &[]).await?;
    Ok(row.try_get(0)?)
}

/// A table as the publications together bring it.
pub(super) struct Member {
    pub oid: u32,
    pub name: QualifiedName,
    /// The publications' row filters as one condition.
    pub row_filter: Option<String>,
    /// Each publication that brings it, with the columns that it brings.
    brought_by: Vec<Brought>,
}

/// What one publication brings of a table.
struct Brought {
    publication_oid: u32,
    publication_xmin: i64,
    /// Before 15: none, and all of them are meant.
    columns: Option<Vec<String>>,
}

impl Member {
    /// A table that no publication is asked about.
    pub fn unpublished(oid: u32) -> Self {
        let name = QualifiedName::new("", "");
        Self { oid, name, row_filter: None, brought_by: Vec::new() }
    }

    /// Whether the stream brings a column.
    pub fn brings(&self, column: &SourceColumn) -> bool {
        match self.brought_by.first().and_then(|brought| brought.columns.as_ref()) {
            Some(names) => names.contains(&column.name),
            None => !column.is_generated,
        }
    }

    /// `OID:XMIN` of each publication that brings it.
    pub fn publications(&self) -> String {
        let mut each: Vec<_> =
            self.brought_by.iter().map(|by| format!("{}:{}", by.publication_oid, by.publication_xmin)).collect();
        each.sort_unstable();
        each.join(",")
    }

    /// Publications bring it with different columns, which the server finds only when it decodes a change of it.
    fn has_conflict(&self) -> bool {
        self.brought_by.iter().any(|by| Some(&by.columns) != self.brought_by.first().map(|first| &first.columns))
    }
}

/// What the publications together bring; all of it, or of one table only.
pub(super) async fn members(client: &Client, names: &[String], only: Option<u32>) -> Result<Vec<Member>, CatalogError> {
    let version = server_version_num(client).await?;
    // 15 to 17 list generated columns there, and never send them (trap 20). A list of all others is none then.
    let is_sent = if version >= 180_000 { "" } else { "AND a.attgenerated = ''" };
    let details = if version >= 150_000 {
        format!(
            "ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid \
             AND a.attname = ANY (p.attnames) {is_sent} ORDER BY a.attnum), p.rowfilter"
        )
    } else {
        "NULL::text[], NULL::text".to_owned()
    };

    // Of one table its ancestors are needed as well: they decide whether it is a table of its own.
    let rows = client
        .query(
            &format!(
                "SELECT c.oid, p.schemaname::text, p.tablename::text, q.oid, q.xmin::text::bigint, q.pubviaroot, \
                 ARRAY(SELECT relid::oid FROM pg_partition_ancestors(c.oid) WHERE relid <> c.oid), {details} \
                 FROM pg_publication_tables p JOIN pg_publication q ON q.pubname = p.pubname \
                 JOIN pg_namespace n ON n.nspname = p.schemaname \
                 JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename \
                 WHERE p.pubname = ANY($1::text[]) AND ($2::oid IS NULL OR c.oid = $2 \
                 OR c.oid IN (SELECT relid FROM pg_partition_ancestors($2))) ORDER BY c.oid, q.oid"
            ),
            &[&names, &only],
        )
        .await?;

    let mut roots: Vec<u32> = Vec::new();
    for row in &rows {
        if row.try_get(5)? {
            roots.push(row.try_get(0)?);
        }
    }
    let mut members: Vec<Member> = Vec::new();
    for row in rows {
        let oid: u32 = row.try_get(0)?;
        let ancestors: Vec<u32> = row.try_get(6)?;
        if only.is_some_and(|only| only != oid) || ancestors.iter().any(|ancestor| roots.contains(ancestor)) {
            continue;
        }

        let brought =
            Brought { publication_oid: row.try_get(3)?, publication_xmin: row.try_get(4)?, columns: row.try_get(7)? };
        let row_filter: Option<String> = row.try_get(8)?;
        match members.last_mut().filter(|member| member.oid == oid) {
            // Several publications join their filters by OR, and one without a filter wins (trap 19).
            Some(member) => {
                member.row_filter = match (member.row_filter.take(), row_filter) {
                    (Some(one), Some(two)) if one != two => Some(format!("({one}) OR ({two})")),
                    (Some(one), Some(_)) => Some(one),
                    _ => None,
                };
                member.brought_by.push(brought);
            }
            None => members.push(Member {
                oid,
                name: QualifiedName { schema: row.try_get(1)?, name: row.try_get(2)? },
                row_filter,
                brought_by: vec![brought],
            }),
        }
    }
    Ok(members)
}

/// The ancestors of those of these tables that are partitions, from the nearest to the root.
pub async fn ancestors(client: &Client, oids: &[u32]) -> Result<HashMap<u32, Vec<u32>>, CatalogError> {
    let rows = client
        .query(
            "SELECT part, ancestor.relid::oid FROM unnest($1::oid[]) AS part \
             CROSS JOIN LATERAL pg_partition_ancestors(part) WITH ORDINALITY AS ancestor(relid, place) \
             WHERE ancestor.relid <> part ORDER BY part, place",
            &[&oids],
        )
        .await?;
    let mut ancestors: HashMap<u32, Vec<u32>> = HashMap::new();
    for row in rows {
        ancestors.entry(row.try_get(0)?).or_default().push(row.try_get(1)?);
    }
    Ok(ancestors)
}

/// Oids and names of the tables that the publications bring.
pub async fn published_names(client: &Client, names: &[String]) -> Result<Vec<(u32, QualifiedName)>, CatalogError> {
    let members = members(client, names, None).await?;
    Ok(members.into_iter().map(|member| (member.oid, member.name)).collect())
}

/// Tables that two of the publications bring with different columns: decoding their changes is an error (trap 19).
pub async fn conflicting_column_lists(client: &Client, names: &[String]) -> Result<Vec<QualifiedName>, CatalogError> {
    let members = members(client, names, None).await?;
    Ok(members.into_iter().filter(Member::has_conflict).map(|member| member.name).collect())
}
