//! The server: its settings, the role, connections, slots.

use super::finding::{Finding, Findings, error, failure, ok, warning};
use crate::{
    cli::CliError,
    config::Config,
    source::{
        catalog::{self, ServerInfo, readiness},
        connection::SqlClient,
        quote::quote_identifier,
        slot,
    },
};

pub(super) async fn check(
    client: &SqlClient,
    config: &Config,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let server = catalog::server(client).await?;
    let judged = slot::check_server(&server)
        .and_then(|()| slot::check_failover(config.failover_slot, &server));

    findings.add(match judged {
        Ok(()) => {
            ok("server", format!("PostgreSQL {}, wal_level = {}", server.version, server.wal_level))
        }
        Err(slot::SlotError::WalLevel { .. }) => {
            let what =
                format!("wal_level is {}, and logical replication needs logical", server.wal_level);
            error("server", what)
                .sql("ALTER SYSTEM SET wal_level = logical")
                .hint("Then restart the source. `rhei backfill --no-slot` copies without it.")
        }
        Err(refused) => failure("server", &refused),
    });

    findings.add(role(&server));
    check_connections(client, config, findings).await?;
    check_slots(client, config, &server, findings).await
}

fn role(server: &ServerInfo) -> Finding {
    let role = quote_identifier(&server.user);
    if server.is_superuser || server.can_replicate {
        return ok("role", format!("{role} may replicate"));
    }
    error("role", format!("{role} may not replicate"))
        .sql(format!("ALTER ROLE {role} REPLICATION"))
        .hint(format!("At RDS and Aurora it is GRANT rds_replication TO {role}."))
}

/// How many SQL sessions a first copy opens at most beside its workers: for catalogs, and for
/// copies that are prepared.
const SQL_SESSIONS: i64 = 3;

/// How many replication sessions. The limits of a role and of a database count them, the server's
/// `max_connections` does not.
const REPLICATION_SESSIONS: i64 = 2;

async fn check_connections(
    client: &SqlClient,
    config: &Config,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let workers = i64::try_from(config.workers).unwrap_or(i64::MAX / 2);

    for limit in readiness::connection_limits(client).await? {
        let left = limit.limit - limit.used;
        let replication = if limit.of.is_some() { REPLICATION_SESSIONS } else { 0 };
        let needed = SQL_SESSIONS + workers + replication;
        let of = limit.of.as_deref().map_or("the server", |of| of);
        let what =
            format!("{of} has {left} of {} connections left, and rhei needs {needed}", limit.limit);

        let raised = limit.used + needed;
        findings.add(match (&limit.of, left < needed) {
            (_, false) => ok("connections", format!("{left} of {} left for {of}", limit.limit)),
            (Some(of), true) => {
                error("connections", what).sql(format!("ALTER {of} CONNECTION LIMIT {raised}"))
            }
            (None, true) => error("connections", what)
                .sql(format!("ALTER SYSTEM SET max_connections = {}", limit.limit + needed))
                .hint("Then restart the source, or end sessions that are idle."),
        });
    }
    Ok(())
}

async fn check_slots(
    client: &SqlClient,
    config: &Config,
    server: &ServerInfo,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let has_slot = catalog::slot(client, &config.slot).await?.is_some();

    for (name, used, max, needed) in [
        // A slot of its own, and a temporary one for the snapshot of tables that come later.
        ("max_replication_slots", server.used_slots, server.max_slots, i64::from(!has_slot)),
        ("max_wal_senders", server.used_senders, server.max_senders, 1),
    ] {
        let left = max - used;
        let mend = format!("ALTER SYSTEM SET {name} = {}", used + 4);
        findings.add(if left < needed {
            error(name, format!("{used} of {max} are in use, and rhei needs {needed} more"))
                .sql(mend)
                .hint("Then restart the source, or drop a slot that no consumer reads any more.")
        } else if left < needed + 1 {
            let what = format!("{used} of {max} are in use; tables that come later need another");
            warning(name, what).sql(mend).hint("Then restart the source.")
        } else {
            ok(name, format!("{used} of {max} in use"))
        });
    }

    let limits = readiness::slot_limits(client).await?;
    if let Some(timeout) = limits.idle_timeout {
        let timeout = humantime::format_duration(timeout);
        let what = format!(
            "the server invalidates a slot that no consumer has read for {timeout}: after such an \
             absence rhei has to copy every table again"
        );
        findings.add(warning("idle_replication_slot_timeout", what));
    }

    if limits.is_wal_unlimited {
        let what = "a slot holds back WAL without a limit while rhei is away, until the source's \
                    disk is full";
        findings.add(
            warning("max_slot_wal_keep_size", what)
                .sql("ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'")
                .sql("SELECT pg_reload_conf()")
                .hint("Choose what the disk can spare. A slot that needs more is given up then."),
        );
    }

    for blocker in catalog::open_transactions(client).await? {
        let what = format!("{blocker}: the creation of a slot waits for its end");
        findings.add(warning("open transactions", what));
    }
    Ok(())
}
