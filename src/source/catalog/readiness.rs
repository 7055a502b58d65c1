//! What may stand in the way of a first copy: rights, limits and settings of the server. Only
//! `rhei check` asks.

use std::time::Duration;

use tokio_postgres::{Client, error::SqlState};

use super::{CatalogError, tables::CANDIDATES};
use crate::{
    pgoutput::QualifiedName,
    source::quote::{quote_identifier, quote_table},
};

/// What keeps this role from reading a table.
#[derive(Debug, Clone)]
pub struct Obstacle {
    pub table: QualifiedName,
    /// Whether the role lacks USAGE on the table's schema.
    pub lacks_schema: bool,
    /// The columns that the role may not read; all of them where it has no right on the table.
    pub unreadable_columns: Vec<String>,
    /// Whether the role has the right to read some other columns of the table.
    pub may_read_others: bool,
    /// Whether row-level security would hide rows from the role.
    pub has_row_security: bool,
}

/// Returns what keeps this role from reading the tables with these oids, which hold rows
/// themselves. Tables without an obstacle are left out.
pub async fn obstacles(client: &Client, tables: &[u32]) -> Result<Vec<Obstacle>, CatalogError> {
    // Privilege functions return NULL for a table that was dropped since the snapshot.
    let rows = client
        .query(
            "SELECT n.nspname::text, c.relname::text, \
             coalesce(NOT has_schema_privilege(n.oid, 'USAGE'), false), \
             array(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid \
               AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> 'v' \
               AND NOT has_column_privilege(c.oid, a.attnum, 'SELECT') ORDER BY a.attnum), \
             coalesce(has_any_column_privilege(c.oid, 'SELECT'), false), \
             coalesce(row_security_active(c.oid), false) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.oid = ANY($1) ORDER BY 1, 2",
            &[&tables],
        )
        .await?;

    let mut obstacles = Vec::new();
    for row in rows {
        let obstacle = Obstacle {
            table: QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? },
            lacks_schema: row.try_get(2)?,
            unreadable_columns: row.try_get(3)?,
            may_read_others: row.try_get(4)?,
            has_row_security: row.try_get(5)?,
        };

        if obstacle.lacks_schema
            || obstacle.has_row_security
            || !obstacle.unreadable_columns.is_empty()
        {
            obstacles.push(obstacle);
        }
    }
    Ok(obstacles)
}

/// A limit on connections, and how many there are.
#[derive(Debug, Clone)]
pub struct ConnectionLimit {
    /// What the limit is of, as SQL names it: `ROLE "rhei"`; none for the whole server.
    pub of: Option<String>,
    pub limit: i64,
    pub used: i64,
}

/// Returns the limits on connections that concern this session. The session itself is not counted
/// as used.
pub async fn connection_limits(client: &Client) -> Result<Vec<ConnectionLimit>, CatalogError> {
    let row = client
        .query_one(
            "SELECT current_user::text, rolconnlimit::bigint, \
             (SELECT count(*) FROM pg_stat_activity WHERE usesysid = r.oid AND pid <> \
             pg_backend_pid()), \
             current_database()::text, datconnlimit::bigint, \
             (SELECT count(*) FROM pg_stat_activity WHERE datid = d.oid AND pid <> \
             pg_backend_pid() AND backend_type = 'client backend'), \
             current_setting('max_connections')::bigint - CASE WHEN rolsuper THEN 0 ELSE \
             current_setting('superuser_reserved_connections')::bigint + \
             coalesce(current_setting('reserved_connections', true)::bigint, 0) END, \
             (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid \
             <> pg_backend_pid()), rolsuper \
             FROM pg_roles r, pg_database d WHERE rolname = current_user AND datname = \
             current_database()",
            &[],
        )
        .await?;

    let (role, database): (String, String) = (row.try_get(0)?, row.try_get(3)?);
    let of_role = ConnectionLimit {
        of: Some(format!("ROLE {}", quote_identifier(&role))),
        limit: row.try_get(1)?,
        used: row.try_get(2)?,
    };
    let of_database = ConnectionLimit {
        of: Some(format!("DATABASE {}", quote_identifier(&database))),
        limit: row.try_get(4)?,
        used: row.try_get(5)?,
    };
    let of_server = ConnectionLimit { of: None, limit: row.try_get(6)?, used: row.try_get(7)? };

    // A limit of -1 is none, and superusers pass the limits of roles and databases.
    let is_super: bool = row.try_get(8)?;
    let narrow = [of_role, of_database].into_iter().filter(|it| it.limit >= 0 && !is_super);
    Ok(narrow.chain([of_server]).collect())
}

/// Settings of the server that end the life of a slot, or that never do.
#[derive(Debug, Clone)]
pub struct SlotLimits {
    /// After how long without use the server invalidates a slot (PostgreSQL 18 and newer).
    pub idle_timeout: Option<Duration>,
    /// Whether a slot holds back WAL without a limit, until the disk is full.
    pub is_wal_unlimited: bool,
}

pub async fn slot_limits(client: &Client) -> Result<SlotLimits, CatalogError> {
    let row = client
        .query_one(
            "SELECT (SELECT extract(epoch FROM (setting || unit)::interval)::bigint \
             FROM pg_settings WHERE name = 'idle_replication_slot_timeout'), \
             current_setting('max_slot_wal_keep_size') = '-1'",
            &[],
        )
        .await?;

    let seconds: Option<i64> = row.try_get(0)?;
    let idle_timeout = seconds
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0)
        .map(Duration::from_secs);
    Ok(SlotLimits { idle_timeout, is_wal_unlimited: row.try_get(1)? })
}

/// Returns those of the tables that a new publication could hold which belong to another role, so
/// that this role may not publish them.
pub async fn tables_of_others(client: &Client) -> Result<Vec<QualifiedName>, CatalogError> {
    let rows = client
        .query(
            &format!(
                "SELECT n.nspname::text, c.relname::text {CANDIDATES} \
                 AND NOT pg_has_role(c.relowner, 'USAGE') ORDER BY 1, 2"
            ),
            &[],
        )
        .await?;

    rows.iter()
        .map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }))
        .collect()
}

/// Returns the SQL after which the tables `named` (as `%I.%I` prints names) have their rows in the
/// WAL, or are no partitions any more.
pub async fn sql_for_wal(client: &Client, named: &[String]) -> Result<Vec<String>, CatalogError> {
    let rows = client
        .query(
            "SELECT CASE WHEN c.relkind = 'f' AND i.inhparent IS NULL THEN NULL \
             WHEN c.relkind = 'f' THEN format('ALTER TABLE %s DETACH PARTITION %s', \
             i.inhparent::regclass, c.oid::regclass) \
             ELSE format('ALTER TABLE %s SET LOGGED', c.oid::regclass) END \
             FROM unnest($1::text[]) name JOIN pg_class c ON c.oid = to_regclass(name) \
             LEFT JOIN pg_inherits i ON i.inhrelid = c.oid ORDER BY 1",
            &[&named],
        )
        .await?;

    let mut all = Vec::new();
    for row in rows {
        all.extend(row.try_get::<_, Option<String>>(0)?);
    }
    Ok(all)
}

/// Returns the publications that name this table itself, where others publish it too: without
/// these, one publication is left that says which columns are published.
pub async fn publications_too_many(
    client: &Client,
    table: &QualifiedName,
    publications: &[String],
) -> Result<Vec<String>, CatalogError> {
    let rows = client
        .query(
            "SELECT p.pubname::text FROM pg_publication p \
             JOIN pg_publication_rel r ON r.prpubid = p.oid \
             JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE p.pubname = ANY($1::text[]) AND n.nspname = $2::text AND c.relname = $3::text \
             ORDER BY array_position($1::text[], p.pubname::text)",
            &[&publications, &table.schema, &table.name],
        )
        .await?;

    let mut naming = Vec::new();
    for row in rows {
        naming.push(row.try_get::<_, String>(0)?);
    }

    // A publication of all tables, or of a schema, goes on publishing the table.
    let is_published_otherwise = naming.len() < publications.len();
    if !is_published_otherwise && !naming.is_empty() {
        naming.remove(0);
    }
    Ok(naming)
}

/// The result of a look for text that is not UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextCheck {
    Valid,
    /// The column holds a value that is not UTF-8.
    Invalid(String),
    /// The look would have taken longer than it may.
    Unfinished,
}

/// Looks through a table of a database in SQL_ASCII, whose text may be in any encoding. The table
/// is read once, and again for each column only where a value is not UTF-8.
pub async fn check_text(
    client: &Client,
    table: &QualifiedName,
    columns: &[&str],
) -> Result<TextCheck, CatalogError> {
    let quoted: Vec<String> = columns.iter().map(|column| quote_identifier(column)).collect();
    let whole = format!("ROW({})", quoted.join(", "));
    if quoted.is_empty() {
        return Ok(TextCheck::Valid);
    }

    match is_utf8(client, table, &whole).await? {
        Some(true) => return Ok(TextCheck::Valid),
        Some(false) => {}
        None => return Ok(TextCheck::Unfinished),
    }

    for (column, quoted) in columns.iter().zip(&quoted) {
        if is_utf8(client, table, quoted).await? == Some(false) {
            return Ok(TextCheck::Invalid((*column).to_owned()));
        }
    }
    Ok(TextCheck::Unfinished)
}

/// Returns whether an expression is UTF-8 in all rows of a table, or none when reading them would
/// take longer than a check may.
async fn is_utf8(
    client: &Client,
    table: &QualifiedName,
    expression: &str,
) -> Result<Option<bool>, CatalogError> {
    const TIMEOUT: &str = "30s";

    // The text of any value holds the bytes of the value, also of a field or an element.
    let table = quote_table(table);
    let sql = format!(
        "SET statement_timeout = '{TIMEOUT}'; \
         SELECT count(convert_from(convert_to(({expression})::text, 'SQL_ASCII'), 'UTF8')) \
         FROM {table}"
    );
    let checked = client.batch_execute(&sql).await;
    client.batch_execute("SET statement_timeout = 0").await?;

    match checked {
        Ok(()) => Ok(Some(true)),
        Err(error) if is_about_text(&error) => Ok(Some(false)),
        Err(error) if error.code() == Some(&SqlState::QUERY_CANCELED) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn is_about_text(error: &tokio_postgres::Error) -> bool {
    let codes = [SqlState::CHARACTER_NOT_IN_REPERTOIRE, SqlState::UNTRANSLATABLE_CHARACTER];
    error.code().is_some_and(|code| codes.contains(code))
}

/// Returns the SQL that converts the values of a column that are not UTF-8 from LATIN1.
pub fn sql_to_utf8(table: &QualifiedName, column: &str) -> String {
    let (table, column) = (quote_table(table), quote_identifier(column));
    format!(
        "DO $$ DECLARE one record; BEGIN \
         FOR one IN SELECT ctid, {column} AS value FROM {table} LOOP \
         BEGIN PERFORM convert_from(convert_to(one.value, 'SQL_ASCII'), 'UTF8'); \
         EXCEPTION WHEN character_not_in_repertoire OR untranslatable_character THEN \
         UPDATE {table} SET {column} = convert_from(convert(convert_to(one.value, \
         'SQL_ASCII'), 'LATIN1', 'UTF8'), 'UTF8') WHERE ctid = one.ctid; END; END LOOP; END $$"
    )
}

/// Returns the bytes of this database on the source's disk.
pub async fn database_bytes(client: &Client) -> Result<u64, CatalogError> {
    let row = client.query_one("SELECT pg_database_size(current_database())", &[]).await?;
    Ok(row.try_get::<_, i64>(0)?.unsigned_abs())
}
