//! Publications, the tables that they publish, and the published columns of these tables.
//!
//! A change of a partition arrives as a change of the topmost ancestor that any of the publications
//! publishes by `publish_via_partition_root`, also where another publication names the partition
//! itself (trap 61). So the rows of the view `pg_publication_tables` for one publication differ
//! from what a stream of several publications sends.

use std::collections::{HashMap, HashSet};

use tokio_postgres::{Client, Row};

use super::{
    CatalogError, SourceColumn,
    tables::{CANDIDATES, columns_of},
};
use crate::{pgoutput::QualifiedName, source::slot::MADE_BY_RHEI};

/// The publications of a pipeline, taken together.
#[derive(Debug, Clone)]
pub struct PublicationInfo {
    pub publications: Vec<Publication>,
    /// The fingerprint holds lines `publication OID`, and `table OID VERSION` for each row of
    /// pg_publication_rel (trap 41).
    pub fingerprint: String,
}

/// One publication.
#[derive(Debug, Clone)]
pub struct Publication {
    pub name: String,
    /// Which operations are published.
    pub insert: bool,
    pub update: bool,
    pub delete: bool,
    pub truncate: bool,
}

/// Reads the publications, and returns none when one of them is missing.
pub async fn publication(
    client: &Client,
    names: &[String],
) -> Result<Option<PublicationInfo>, CatalogError> {
    let rows = client
        .query(
            "SELECT oid, pubinsert, pubupdate, pubdelete, pubtruncate, pubname::text \
             FROM pg_publication WHERE pubname = ANY($1::text[]) \
             ORDER BY oid",
            &[&names],
        )
        .await?;

    if rows.len() < names.len() || rows.is_empty() {
        return Ok(None);
    }

    let mut info = PublicationInfo { publications: Vec::new(), fingerprint: String::new() };

    let mut oids: Vec<u32> = Vec::new();
    for row in &rows {
        let oid: u32 = row.try_get(0)?;
        oids.push(oid);
        info.fingerprint.push_str(&format!("publication {oid}\n"));
        info.publications.push(Publication {
            name: row.try_get(5)?,
            insert: row.try_get(1)?,
            update: row.try_get(2)?,
            delete: row.try_get(3)?,
            truncate: row.try_get(4)?,
        });
    }

    let members = client
        .query(
            "SELECT prrelid, string_agg(oid::text || ':' || xmin::text, ',' ORDER BY oid) \
             FROM pg_publication_rel \
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

/// How publications name tables: by the table or its roots, and by schemas.
pub(super) struct Naming {
    ancestors: HashMap<u32, Vec<u32>>,
    schemas: HashMap<u32, u32>,
    /// Oid and `xmin` of the rows of pg_publication_rel, by table.
    by_table: HashMap<u32, Vec<(u32, i64)>>,
    /// Oid and `xmin` of the rows of pg_publication_namespace, by schema.
    by_schema: HashMap<u32, Vec<(u32, i64)>>,
}

impl Naming {
    pub async fn read(
        client: &Client,
        publications: &[String],
        tables: &[u32],
    ) -> Result<Self, CatalogError> {
        let mut sql =
            "SELECT false, r.prrelid, r.oid, r.xmin::text::bigint FROM pg_publication_rel r \
             JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = ANY($1::text[])"
                .to_owned();

        // Publications of schemas came with PostgreSQL 15.
        if server_version_num(client).await? >= 150_000 {
            sql.push_str(
                " UNION ALL SELECT true, s.pnnspid, s.oid, s.xmin::text::bigint \
                 FROM pg_publication_namespace s \
                 JOIN pg_publication p ON p.oid = s.pnpubid WHERE p.pubname = ANY($1::text[])",
            );
        }

        let (mut by_table, mut by_schema): (HashMap<u32, Vec<_>>, HashMap<u32, Vec<_>>) =
            Default::default();
        for row in client.query(&sql, &[&publications]).await? {
            let named = if row.try_get(0)? { &mut by_schema } else { &mut by_table };
            named.entry(row.try_get(1)?).or_default().push((row.try_get(2)?, row.try_get(3)?));
        }

        let partitions = client
            .query(
                "SELECT oid FROM pg_class WHERE oid = ANY($1::oid[]) AND relispartition",
                &[&tables],
            )
            .await?;
        let partitions =
            partitions.iter().map(|row| row.try_get(0)).collect::<Result<Vec<u32>, _>>()?;
        let ancestors = ancestors(client, &partitions).await?;

        let mut schemas = HashMap::new();
        if !by_schema.is_empty() {
            let all: Vec<u32> =
                tables.iter().chain(ancestors.values().flatten()).copied().collect();
            let query = "SELECT oid, relnamespace FROM pg_class WHERE oid = ANY($1::oid[])";
            for row in client.query(query, &[&all]).await? {
                schemas.insert(row.try_get(0)?, row.try_get(1)?);
            }
        }

        Ok(Self { ancestors, schemas, by_table, by_schema })
    }

    fn with_ancestors(&self, table: u32) -> impl Iterator<Item = u32> {
        std::iter::once(table).chain(self.ancestors.get(&table).into_iter().flatten().copied())
    }

    /// Returns `OID:XMIN` of the rows that name the table or a root of it.
    pub fn publication_rows(&self, table: u32) -> String {
        text(
            self.with_ancestors(table)
                .filter_map(|oid| self.by_table.get(&oid))
                .flatten()
                .copied()
                .collect(),
        )
    }

    /// Returns `OID:XMIN` of the rows that name the table's schema, or the schema of a root of it.
    pub fn schema(&self, table: u32) -> String {
        let schemas: HashSet<u32> =
            self.with_ancestors(table).filter_map(|oid| self.schemas.get(&oid)).copied().collect();
        text(
            schemas
                .iter()
                .filter_map(|schema| self.by_schema.get(schema))
                .flatten()
                .copied()
                .collect(),
        )
    }
}

fn text(mut rows: Vec<(u32, i64)>) -> String {
    rows.sort_unstable();
    rows.iter().map(|(oid, xmin)| format!("{oid}:{xmin}")).collect::<Vec<_>>().join(",")
}

async fn server_version_num(client: &Client) -> Result<i32, CatalogError> {
    let row = client.query_one("SELECT current_setting('server_version_num')::int", &[]).await?;
    Ok(row.try_get(0)?)
}

/// A table as the publications together publish it.
pub(super) struct PublishedTable {
    pub oid: u32,
    pub name: QualifiedName,
    /// The publications' row filters as one condition.
    pub row_filter: Option<String>,
    /// Each publication that publishes the table, with the published columns.
    brought_by: Vec<Brought>,
}

/// The part of a table that one publication publishes.
struct Brought {
    publication_oid: u32,
    publication_xmin: i64,
    columns: Brings,
}

/// The columns of a table that a publication publishes.
#[derive(PartialEq, Eq)]
enum Brings {
    /// The columns of its column list, by `attnum`.
    Listed(Vec<i16>),
    /// All columns but the generated ones.
    Stored,
    /// All columns, also the generated ones (`publish_generated_columns` of PostgreSQL 18).
    All,
}

impl PublishedTable {
    /// Makes a table that belongs to no publication.
    pub fn unpublished(oid: u32) -> Self {
        let name = QualifiedName::new("", "");
        Self { oid, name, row_filter: None, brought_by: Vec::new() }
    }

    /// Returns whether the stream sends a column.
    pub fn brings(&self, column: &SourceColumn) -> bool {
        match self.brought_by.first() {
            Some(brought) => brought.brings(column),
            None => !column.is_generated,
        }
    }

    /// Returns `OID:XMIN` of each publication that publishes the table.
    pub fn publications(&self) -> String {
        let mut each: Vec<_> = self
            .brought_by
            .iter()
            .map(|by| format!("{}:{}", by.publication_oid, by.publication_xmin))
            .collect();
        each.sort_unstable();
        each.join(",")
    }

    /// Returns whether publications may publish the table with different columns.
    fn has_different_lists(&self) -> bool {
        self.brought_by
            .iter()
            .any(|by| Some(&by.columns) != self.brought_by.first().map(|first| &first.columns))
    }

    /// Returns whether publications publish the table with different columns, which the server
    /// detects only when it decodes a change of the table.
    fn has_conflict(&self, columns: &[SourceColumn]) -> bool {
        columns.iter().any(|column| {
            let brings = self.brings(column);
            self.brought_by.iter().any(|by| by.brings(column) != brings)
        })
    }
}

impl Brought {
    /// Reads a row of [`members_sql`].
    fn read(row: &Row) -> Result<Self, CatalogError> {
        let columns = match (row.try_get(8)?, row.try_get(7)?) {
            (Some(list), _) => Brings::Listed(list),
            (None, true) => Brings::All,
            (None, false) => Brings::Stored,
        };
        Ok(Self { publication_oid: row.try_get(3)?, publication_xmin: row.try_get(4)?, columns })
    }

    fn brings(&self, column: &SourceColumn) -> bool {
        match &self.columns {
            Brings::Listed(numbers) => numbers.contains(&column.attnum),
            Brings::Stored => !column.is_generated,
            Brings::All => true,
        }
    }
}

/// Returns the tables that the publications together publish; all of them, or those among `only`.
///
/// The result equals the view `pg_publication_tables` for each publication, read from the catalogs
/// beneath the view: from PostgreSQL 16 on the view opens every table, and so waits for the locks
/// that other sessions hold on any of them.
pub(super) async fn members(
    client: &Client,
    names: &[String],
    only: Option<&[u32]>,
) -> Result<Vec<PublishedTable>, CatalogError> {
    let sql = members_sql(server_version_num(client).await?);

    // The query for some tables needs their ancestors as well, since the ancestors decide whether a
    // partition is a table of its own.
    let asked = match only {
        None => None,
        Some(only) => Some(with_ancestors(client, only).await?),
    };
    let rows = client.query(&sql, &[&names, &asked]).await?;

    let covered = covered_by_a_root(client, &rows).await?;
    let only: Option<HashSet<u32>> = only.map(|only| only.iter().copied().collect());

    let mut members: Vec<PublishedTable> = Vec::new();
    for row in rows {
        let oid: u32 = row.try_get(0)?;
        if covered.contains(&oid) || only.as_ref().is_some_and(|only| !only.contains(&oid)) {
            continue;
        }

        let brought = Brought::read(&row)?;
        let row_filter: Option<String> = row.try_get(9)?;
        match members.last_mut().filter(|member| member.oid == oid) {
            Some(member) => {
                member.row_filter = joined_filters(member.row_filter.take(), row_filter);
                member.brought_by.push(brought);
            }
            None => members.push(PublishedTable {
                oid,
                name: QualifiedName { schema: row.try_get(1)?, name: row.try_get(2)? },
                row_filter,
                brought_by: vec![brought],
            }),
        }
    }

    Ok(members)
}

/// Returns the query of [`members`]: one row for each pair of a table and a publication that
/// publishes it, the rows of one table one after the other.
///
/// A publication publishes a partitioned table as itself or as its leaves. A publication of all
/// tables publishes no foreign tables.
fn members_sql(version: i32) -> String {
    let VersionedParts { in_schemas, is_by_schema, details, .. } = VersionedParts::of(version);
    let VersionedParts { with_generated, is_excepted, is_not_excepted, .. } =
        VersionedParts::of(version);

    // The condition on $2 names `brought.rel`: from a condition on `c.oid`, PostgreSQL makes an
    // index scan that begins once per table and goes through all of $2 each time.
    format!(
        "WITH RECURSIVE chosen AS MATERIALIZED ( \
           SELECT oid, xmin::text::bigint AS version, puballtables, pubviaroot, \
           {with_generated} AS with_generated \
           FROM pg_publication WHERE pubname = ANY($1::text[]) \
         ), named(pub, rel) AS ( \
           SELECT p.oid, r.prrelid FROM chosen p JOIN pg_publication_rel r ON r.prpubid = p.oid \
           JOIN pg_class c ON c.oid = r.prrelid AND c.relkind <> 'S' WHERE NOT {is_excepted} \
           {in_schemas} \
         ), tree(pub, rel) AS ( \
           SELECT pub, rel FROM named JOIN chosen p ON p.oid = pub WHERE NOT p.pubviaroot \
           UNION SELECT pub, i.inhrelid FROM tree JOIN pg_class parent ON parent.oid = rel \
           AND parent.relkind = 'p' \
           JOIN pg_inherits i ON i.inhparent = rel AND NOT i.inhdetachpending \
         ), brought(pub, rel) AS ( \
           SELECT pub, rel FROM named JOIN chosen p ON p.oid = pub WHERE p.pubviaroot \
           UNION SELECT pub, rel FROM tree JOIN pg_class c ON c.oid = rel AND c.relkind <> 'p' \
           UNION SELECT p.oid, c.oid FROM chosen p JOIN pg_class c ON p.puballtables \
           AND c.oid >= 16384 \
             AND c.relpersistence = 'p' AND c.relkind = ANY (CASE WHEN p.pubviaroot \
             THEN '{{r,p}}' ELSE '{{r}}' END::\"char\"[]) \
             AND NOT (p.pubviaroot AND c.relispartition) AND {is_not_excepted} \
         ) SELECT c.oid, n.nspname::text, c.relname::text, p.oid, p.version, p.pubviaroot, \
         c.relispartition, \
           p.with_generated, {details} \
         FROM brought JOIN chosen p ON p.oid = brought.pub JOIN pg_class c ON c.oid = brought.rel \
         JOIN pg_namespace n ON n.oid = c.relnamespace \
         LEFT JOIN pg_publication_rel listed ON listed.prpubid = p.oid AND listed.prrelid = c.oid \
           AND NOT p.puballtables AND NOT {is_by_schema} \
         WHERE $2::oid[] IS NULL OR brought.rel = ANY($2) ORDER BY c.oid, p.oid"
    )
}

/// The parts of the query of [`members`] that depend on the version of the server.
struct VersionedParts {
    /// Adds the tables of whole schemas.
    in_schemas: &'static str,
    /// The condition whether publication `p` publishes the schema of table `c`.
    is_by_schema: &'static str,
    /// The column list and the row filter.
    details: &'static str,
    /// The condition whether a publication publishes generated columns.
    with_generated: &'static str,
    /// The condition whether row `r` of pg_publication_rel names a table that a publication of all
    /// tables leaves out.
    is_excepted: &'static str,
    /// The condition whether publication `p`, of all tables, does not leave out table `c`: neither
    /// by its own name nor by that of a root.
    is_not_excepted: &'static str,
}

impl VersionedParts {
    fn of(version: i32) -> Self {
        // Column lists, row filters and whole schemas came with PostgreSQL 15.
        let (in_schemas, is_by_schema, details) = if version >= 150_000 {
            (
                "UNION SELECT p.oid, c.oid FROM chosen p \
                 JOIN pg_publication_namespace s ON s.pnpubid = p.oid \
                 JOIN pg_class c ON c.relnamespace = s.pnnspid WHERE c.relkind IN ('r', 'p') AND \
                 c.relpersistence = 'p'",
                "EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnpubid = p.oid AND \
                 s.pnnspid = c.relnamespace)",
                "listed.prattrs::int2[], pg_get_expr(listed.prqual, listed.prrelid)",
            )
        } else {
            ("", "false", "NULL::int2[], NULL::text")
        };

        let with_generated = if version >= 180_000 { "pubgencols = 's'" } else { "false" };
        // Publications that leave tables out came with PostgreSQL 19.
        let (is_excepted, is_not_excepted) = if version >= 190_000 {
            (
                "r.prexcept",
                "NOT EXISTS (SELECT FROM pg_publication_rel x WHERE x.prpubid = p.oid \
                 AND x.prexcept AND (x.prrelid = c.oid OR x.prrelid IN (SELECT relid FROM \
                 pg_partition_ancestors(c.oid))))",
            )
        } else {
            ("false", "true")
        };

        Self { in_schemas, is_by_schema, details, with_generated, is_excepted, is_not_excepted }
    }
}

async fn with_ancestors(client: &Client, oids: &[u32]) -> Result<Vec<u32>, CatalogError> {
    let ancestors = ancestors(client, oids).await?;
    Ok(oids.iter().copied().chain(ancestors.into_values().flatten()).collect())
}

/// Returns the partitions among the rows of [`members_sql`] whose changes arrive as changes of an
/// ancestor, because one of the publications publishes the ancestor by
/// `publish_via_partition_root` (trap 61).
async fn covered_by_a_root(client: &Client, rows: &[Row]) -> Result<HashSet<u32>, CatalogError> {
    let (mut roots, mut partitions) = (HashSet::new(), Vec::new());
    for row in rows {
        let oid: u32 = row.try_get(0)?;
        if row.try_get(5)? {
            roots.insert(oid);
        }
        if row.try_get(6)? {
            partitions.push(oid);
        }
    }

    let mut ancestors = ancestors(client, &partitions).await?;
    ancestors.retain(|_, all| all.iter().any(|ancestor| roots.contains(ancestor)));
    Ok(ancestors.into_keys().collect())
}

/// Joins the row filters of two publications. Several publications join their row filters by OR,
/// and a publication without a filter publishes all rows (trap 19).
fn joined_filters(one: Option<String>, two: Option<String>) -> Option<String> {
    match (one, two) {
        (Some(one), Some(two)) if one != two => Some(format!("({one}) OR ({two})")),
        (Some(one), Some(_)) => Some(one),
        _ => None,
    }
}

/// Returns the ancestors of the given tables that are partitions, from the nearest to the root. The
/// query locks none of them.
pub async fn ancestors(
    client: &Client,
    oids: &[u32],
) -> Result<HashMap<u32, Vec<u32>>, CatalogError> {
    let mut ancestors: HashMap<u32, Vec<u32>> = HashMap::new();
    if oids.is_empty() {
        return Ok(ancestors);
    }

    let rows = client
        .query(
            "SELECT part, ancestor.relid::oid FROM unnest($1::oid[]) AS part \
             CROSS JOIN LATERAL pg_partition_ancestors(part) WITH ORDINALITY AS ancestor(relid, \
             place) \
             WHERE ancestor.relid <> part ORDER BY part, place",
            &[&oids],
        )
        .await?;

    for row in rows {
        ancestors.entry(row.try_get(0)?).or_default().push(row.try_get(1)?);
    }

    Ok(ancestors)
}

/// What this role may do with a publication.
#[derive(Debug, Clone, Copy)]
pub struct PublicationRights {
    pub is_made_by_rhei: bool,
    pub may_alter: bool,
}

/// A table that could be published and is not.
#[derive(Debug, Clone)]
pub struct UnpublishedTable {
    pub name: QualifiedName,
    /// Whether this role may publish the table, as its owner.
    pub is_own: bool,
    /// Whether PostgreSQL accepts UPDATE and DELETE of the table once it is published.
    pub has_identity: bool,
}

/// Returns the tables that none of the publications holds, and what this role may do about it;
/// none when one of the publications is missing. rhei makes one publication at most, so of several
/// it has made none.
pub async fn unpublished(
    client: &Client,
    names: &[String],
) -> Result<Option<(PublicationRights, Vec<UnpublishedTable>)>, CatalogError> {
    let rows = client
        .query(
            "SELECT obj_description(oid, 'pg_publication') IS NOT DISTINCT FROM $2::text, \
             pg_has_role(pubowner, 'USAGE'), puballtables FROM pg_publication \
             WHERE pubname = ANY($1::text[])",
            &[&names, &MADE_BY_RHEI],
        )
        .await?;
    if rows.is_empty() || rows.len() < names.len() {
        return Ok(None);
    }

    let mut rights = PublicationRights { is_made_by_rhei: names.len() == 1, may_alter: true };
    for row in &rows {
        rights.is_made_by_rhei &= row.try_get::<_, bool>(0)?;
        rights.may_alter &= row.try_get::<_, bool>(1)?;
        if row.try_get(2)? {
            return Ok(Some((rights, Vec::new())));
        }
    }

    // Publications of schemas came with PostgreSQL 15.
    let by_schema = if server_version_num(client).await? >= 150_000 {
        "AND NOT EXISTS (SELECT FROM pg_publication_namespace s JOIN pg_publication p ON p.oid = \
         s.pnpubid WHERE p.pubname = ANY($1::text[]) AND s.pnnspid = n.oid)"
    } else {
        ""
    };

    // A tree some of whose partitions are published is published as its owner wants it.
    let rows = client
        .query(
            &format!(
                "WITH named AS MATERIALIZED (SELECT r.prrelid FROM pg_publication_rel r \
                 JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = ANY($1::text[])), \
                 published AS MATERIALIZED (SELECT prrelid AS oid FROM named UNION \
                 SELECT relid::oid FROM named, pg_partition_ancestors(prrelid)) \
                 SELECT n.nspname::text, c.relname::text, pg_has_role(c.relowner, 'USAGE'), \
                 c.relreplident IN ('f', 'i') OR (c.relreplident = 'd' AND EXISTS (SELECT \
                 FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate)) \
                 {CANDIDATES} AND c.oid NOT IN (SELECT oid FROM published) {by_schema} \
                 ORDER BY 1, 2"
            ),
            &[&names],
        )
        .await?;

    let mut tables = Vec::with_capacity(rows.len());
    for row in rows {
        tables.push(UnpublishedTable {
            name: QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? },
            is_own: row.try_get::<_, Option<bool>>(2)?.unwrap_or_default(),
            has_identity: row.try_get(3)?,
        });
    }
    Ok(Some((rights, tables)))
}

/// Returns oids and names of the tables that the publications publish.
pub async fn published_names(
    client: &Client,
    names: &[String],
) -> Result<Vec<(u32, QualifiedName)>, CatalogError> {
    let members = members(client, names, None).await?;
    Ok(members.into_iter().map(|member| (member.oid, member.name)).collect())
}

/// Returns the tables that two of the publications publish with different columns: decoding their
/// changes is an error (trap 19).
pub async fn conflicting_column_lists(
    client: &Client,
    names: &[String],
) -> Result<Vec<QualifiedName>, CatalogError> {
    let mut doubtful = members(client, names, None).await?;
    doubtful.retain(PublishedTable::has_different_lists);

    let oids: Vec<u32> = doubtful.iter().map(|member| member.oid).collect();
    let columns = columns_of(client, &oids).await?;

    let has_conflict = |member: &PublishedTable| {
        columns.get(&member.oid).is_some_and(|columns| member.has_conflict(columns))
    };

    Ok(doubtful.into_iter().filter(has_conflict).map(|member| member.name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trap 19.
    #[test]
    fn the_row_filters_of_several_publications_let_through_what_any_of_them_lets_through() {
        for (one, two, joined) in [
            (Some("a > 1"), Some("b > 2"), Some("(a > 1) OR (b > 2)")),
            (Some("a > 1"), Some("a > 1"), Some("a > 1")),
            (Some("a > 1"), None, None),
            (None, Some("b > 2"), None),
            (None, None, None),
        ] {
            let found = joined_filters(one.map(str::to_owned), two.map(str::to_owned));
            assert_eq!(found.as_deref(), joined, "{one:?}, {two:?}");
        }
    }
}
