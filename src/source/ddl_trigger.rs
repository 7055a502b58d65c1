//! The optional event trigger at the source: its SQL, and whether the installed trigger is rhei's.
//! The trigger's function runs in the DDL of every role, so a function that a role other than a
//! superuser can replace is worse than none.

use tokio_postgres::Client;

use super::{catalog::CatalogError, quote::quote_identifier};
use crate::pgoutput::table_description::Secret;

/// The SQL that installs the trigger, in one transaction.
pub const SQL: &str = include_str!("../../schemas/ddl_trigger.sql");

/// The state of the event trigger with this name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DdlTrigger {
    /// No trigger, or one that is switched off, if only for some sessions (`ENABLE`, `ENABLE
    /// REPLICA`).
    Absent,
    /// A trigger that rhei ignores, since roles other than superusers could make it send any
    /// message.
    Foreign { why: String },
    /// A trigger whose messages cannot be verified: this role may not read the secret. The SQL in
    /// `grant` allows the role to read it.
    Unreadable { grant: String },
    /// A trigger whose messages are signed with this secret.
    Usable(Secret),
}

/// Reads the event trigger and the roles that control it.
///
/// # Errors
/// The source did not answer.
pub async fn look(client: &Client) -> Result<DdlTrigger, CatalogError> {
    let query = "SELECT evtenabled = 'A', n.nspname = 'rhei' AND p.proname = 'emit_ddl', \
         n.nspname || '.' || p.proname || '()', f.rolname::text, f.rolsuper, s.rolname::text, \
         s.rolsuper, \
         (SELECT coalesce(r.rolname::text, 'PUBLIC') \
          FROM aclexplode(n.nspacl) granted LEFT JOIN pg_roles r ON r.oid = granted.grantee \
          WHERE granted.privilege_type = 'CREATE' AND NOT coalesce(r.rolsuper, false) LIMIT 1), \
         has_schema_privilege(n.oid, 'USAGE'), current_user::text \
         FROM pg_event_trigger e JOIN pg_proc p ON p.oid = e.evtfoid \
         JOIN pg_namespace n ON n.oid = p.pronamespace \
         JOIN pg_roles f ON f.oid = p.proowner JOIN pg_roles s ON s.oid = n.nspowner WHERE evtname \
         = 'rhei_ddl'";

    let Some(row) = client.query_opt(query, &[]).await? else { return Ok(DdlTrigger::Absent) };

    let (is_enabled, is_ours): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    let (function, owner, is_owner_super): (String, String, bool) =
        (row.try_get(2)?, row.try_get(3)?, row.try_get(4)?);
    let (schema_owner, is_schema_super): (String, bool) = (row.try_get(5)?, row.try_get(6)?);
    let creator: Option<String> = row.try_get(7)?;

    let why = if !is_ours {
        Some(format!("runs {function}, which is not rhei.emit_ddl()"))
    } else if !is_owner_super {
        Some(format!("runs {function}, which belongs to \"{owner}\", who is no superuser"))
    } else if !is_schema_super {
        Some(format!(
            "has its function in schema \"rhei\" of \"{schema_owner}\", who is no superuser"
        ))
    } else {
        creator.map(|role| {
            format!("has its function in schema \"rhei\", in which \"{role}\" may create objects")
        })
    };

    if let Some(why) = why {
        return Ok(DdlTrigger::Foreign { why });
    }

    if !is_enabled {
        return Ok(DdlTrigger::Absent);
    }

    secret(client, row.try_get(8)?, &row.try_get::<_, String>(9)?).await
}

/// Reads the secret. `may_use` tells whether `user`, the role of this session, may use the secret's
/// schema.
async fn secret(client: &Client, may_use: bool, user: &str) -> Result<DdlTrigger, CatalogError> {
    let foreign = |why: &str| Ok(DdlTrigger::Foreign { why: why.to_owned() });
    let query = "SELECT relkind = 'm' AND relispopulated \
                 AND rolsuper, has_table_privilege(c.oid, 'SELECT'), \
         EXISTS (SELECT 1 FROM aclexplode(relacl) WHERE grantee = 0 AND privilege_type = 'SELECT') \
         FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace \
         JOIN pg_roles r ON r.oid = relowner \
         WHERE nspname = 'rhei' AND relname = 'ddl_secret'";

    let found = client.query_opt(query, &[]).await?;
    let (is_ours, may_select, may_anybody): (bool, bool, bool) = match &found {
        Some(row) => (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?),
        None => (false, false, false),
    };

    if !is_ours {
        return foreign("has no secret rhei.ddl_secret of a superuser to sign with");
    }

    if may_anybody {
        return foreign("signs with rhei.ddl_secret, which everybody may read");
    }

    if !may_use || !may_select {
        let role = quote_identifier(user);
        let grant = format!(
            "GRANT USAGE ON SCHEMA rhei TO {role}; GRANT SELECT ON rhei.ddl_secret TO {role}"
        );
        return Ok(DdlTrigger::Unreadable { grant });
    }

    let found = client.query_opt("SELECT secret FROM rhei.ddl_secret", &[]).await?;
    let secret = found.map(|row| row.try_get::<_, Option<String>>(0)).transpose()?.flatten();
    match secret.as_deref().and_then(Secret::parse) {
        Some(secret) => Ok(DdlTrigger::Usable(secret)),
        None => foreign("signs with rhei.ddl_secret, which is not what was installed"),
    }
}
