//! The optional event trigger at the source: its SQL, and whether the one that is there is rhei's. Its function runs in the
//! DDL of every role, so one that anybody but a superuser can replace is worse than none.

use tokio_postgres::Client;

use super::catalog::CatalogError;

/// The SQL that installs it, in one transaction.
pub const SQL: &str = include_str!("../../schemas/ddl_trigger.sql");

/// What stands under the trigger's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DdlTrigger {
    /// None, or one that is switched off.
    Absent,
    /// One that rhei does not listen to, since it is not under a superuser's control.
    Foreign {
        why: String,
    },
    Usable,
}

/// Looks for the event trigger, and at who controls it.
///
/// # Errors
/// The source did not answer.
pub async fn look(client: &Client) -> Result<DdlTrigger, CatalogError> {
    let query = "SELECT evtenabled IN ('O', 'A'), n.nspname = 'rhei' AND p.proname = 'emit_ddl', \
         n.nspname || '.' || p.proname || '()', f.rolname::text, f.rolsuper, s.rolname::text, s.rolsuper, \
         (SELECT coalesce(r.rolname::text, 'PUBLIC') \
          FROM aclexplode(n.nspacl) granted LEFT JOIN pg_roles r ON r.oid = granted.grantee \
          WHERE granted.privilege_type = 'CREATE' AND NOT coalesce(r.rolsuper, false) LIMIT 1) \
         FROM pg_event_trigger e JOIN pg_proc p ON p.oid = e.evtfoid JOIN pg_namespace n ON n.oid = p.pronamespace \
         JOIN pg_roles f ON f.oid = p.proowner JOIN pg_roles s ON s.oid = n.nspowner WHERE evtname = 'rhei_ddl'";
    let Some(row) = client.query_opt(query, &[]).await? else { return Ok(DdlTrigger::Absent) };
    let (is_enabled, is_ours): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    let (function, owner, is_owner_super): (String, String, bool) = (row.try_get(2)?, row.try_get(3)?, row.try_get(4)?);
    let (schema_owner, is_schema_super): (String, bool) = (row.try_get(5)?, row.try_get(6)?);
    let creator: Option<String> = row.try_get(7)?;

    let why = if !is_ours {
        Some(format!("runs {function}, which is not rhei.emit_ddl()"))
    } else if !is_owner_super {
        Some(format!("runs {function}, which belongs to \"{owner}\", who is no superuser"))
    } else if !is_schema_super {
        Some(format!("has its function in schema \"rhei\" of \"{schema_owner}\", who is no superuser"))
    } else {
        creator.map(|role| format!("has its function in schema \"rhei\", in which \"{role}\" may create objects"))
    };

    Ok(match why {
        Some(why) => DdlTrigger::Foreign { why },
        None if is_enabled => DdlTrigger::Usable,
        None => DdlTrigger::Absent,
    })
}
