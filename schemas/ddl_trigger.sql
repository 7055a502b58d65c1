-- Optional, at the source: says in the stream itself what a table looks like after each change of it. With it, rhei follows
-- several changes in a row in place where it would otherwise have to copy the table again.
--
-- Installed by `rhei check --install-ddl-trigger`, by a superuser. Taken away again with
--   DROP EVENT TRIGGER rhei_ddl; DROP SCHEMA rhei CASCADE;
--
-- The function runs in the DDL of every role, so nobody but a superuser may own it or put another one in its place: what
-- stands under its names and belongs to somebody else is refused, and CREATE never takes over what is there.
--
-- Any role may send messages of any prefix, so rhei believes only those that are signed with a secret. The role that
-- replicates has to be able to read it, and nobody else:
--   GRANT USAGE ON SCHEMA rhei TO rhei; GRANT SELECT ON rhei.ddl_secret TO rhei;
-- A new secret: REFRESH MATERIALIZED VIEW rhei.ddl_secret. rhei reads it when it connects.
BEGIN;

DO $install$
DECLARE
    stranger name;
BEGIN
    IF NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        RAISE EXCEPTION 'role "%" is no superuser', current_user
            USING ERRCODE = 'insufficient_privilege';
    END IF;

    SELECT rolname INTO stranger FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_roles r ON r.oid = n.nspowner
    WHERE n.nspname = 'rhei' AND NOT r.rolsuper;

    IF FOUND THEN
        RAISE EXCEPTION 'schema "rhei" belongs to "%", who is no superuser', stranger
            USING HINT = 'look at what it is for, then ALTER SCHEMA rhei RENAME TO .. or DROP SCHEMA rhei CASCADE';
    END IF;

    SELECT coalesce(r.rolname, 'PUBLIC') INTO stranger
    FROM pg_catalog.pg_namespace n CROSS JOIN pg_catalog.aclexplode(n.nspacl) granted
    LEFT JOIN pg_catalog.pg_roles r ON r.oid = granted.grantee
    WHERE n.nspname = 'rhei' AND granted.privilege_type = 'CREATE' AND NOT coalesce(r.rolsuper, false);

    IF FOUND THEN
        RAISE EXCEPTION 'schema "rhei" lets "%" create objects in it', stranger
            USING HINT = 'REVOKE CREATE ON SCHEMA rhei from all roles that are no superusers';
    END IF;

    SELECT r.rolname INTO stranger
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    JOIN pg_catalog.pg_roles r ON r.oid = p.proowner
    WHERE n.nspname = 'rhei' AND p.proname = 'emit_ddl' AND NOT r.rolsuper;

    IF FOUND THEN
        RAISE EXCEPTION 'function rhei.emit_ddl() belongs to "%", who is no superuser', stranger
            USING HINT = 'look at what it is for, then DROP FUNCTION rhei.emit_ddl()';
    END IF;

    SELECT r.rolname INTO stranger
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_roles r ON r.oid = c.relowner
    WHERE n.nspname = 'rhei' AND c.relname = 'ddl_secret' AND NOT (r.rolsuper AND c.relkind = 'm');

    IF FOUND THEN
        RAISE EXCEPTION 'rhei.ddl_secret of "%" is no materialized view of a superuser', stranger
            USING HINT = 'look at what it is for, then drop it';
    END IF;

    IF pg_catalog.to_regnamespace('rhei') IS NULL THEN
        CREATE SCHEMA rhei;
    END IF;
END
$install$;

DROP EVENT TRIGGER IF EXISTS rhei_ddl;
DROP FUNCTION IF EXISTS rhei.emit_ddl();

-- 128 hexadecimal digits, two keys of one block of SHA-256 each. A table would be published by FOR ALL TABLES, and an unlogged
-- one is empty after a crash.
CREATE MATERIALIZED VIEW IF NOT EXISTS rhei.ddl_secret AS
    SELECT pg_catalog.string_agg(pg_catalog.replace(pg_catalog.gen_random_uuid()::text, '-', ''), '') AS secret
    FROM pg_catalog.generate_series(1, 4);

-- Where the function stood before it had a schema of its own.
DO $install$
BEGIN
    IF EXISTS (
        SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
        JOIN pg_catalog.pg_roles r ON r.oid = p.proowner
        WHERE n.nspname = 'public' AND p.proname = 'rhei_emit_ddl' AND p.pronargs = 0 AND r.rolsuper
    ) THEN
        DROP FUNCTION public.rhei_emit_ddl();
    END IF;
END
$install$;

-- The message is transactional: it is in the stream at the place of the change, and not at all when that is rolled back.
-- There is no EXCEPTION block: it would put the message into a subtransaction of its own, and PostgreSQL 15 decodes such a
-- message after the rows that follow it.
CREATE FUNCTION rhei.emit_ddl() RETURNS event_trigger
LANGUAGE plpgsql
-- The owner reads the secret, whoever changes a table.
SECURITY DEFINER
-- Temporary tables of the session come last, or they would stand before the catalogs.
SET search_path = pg_catalog, pg_temp
-- Values of `missing` are printed as the stream prints them.
SET DateStyle = 'ISO'
SET IntervalStyle = 'postgres'
SET TimeZone = 'UTC'
SET extra_float_digits = 3
SET bytea_output = 'hex'
SET lc_monetary = 'C'
-- The query looks expensive to the planner, and compiling it would take a thousand times longer than to run it.
SET jit = off
AS $rhei$
DECLARE
    described jsonb;
    key text;
    signed text;
BEGIN
    -- Whatever happened to the secret, nobody's DDL fails for it.
    PERFORM FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE nspname = 'rhei' AND relname = 'ddl_secret' AND relispopulated
        AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT');
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT secret INTO key FROM rhei.ddl_secret;

    FOR described IN
        WITH RECURSIVE commands AS (
            SELECT DISTINCT classid, objid FROM pg_event_trigger_ddl_commands()
        ), named(oid) AS (
            SELECT objid FROM commands WHERE classid = 'pg_class'::regclass
            UNION
            -- ALTER TYPE .. CASCADE changes the tables that are made of the type.
            SELECT typed.oid
            FROM commands
            JOIN pg_type t ON CASE classid
                WHEN 'pg_type'::regclass THEN t.oid = objid
                WHEN 'pg_class'::regclass THEN t.typrelid = objid
            END
            JOIN pg_class typed ON typed.reloftype = t.oid
        ), changed(oid) AS (
            SELECT oid FROM named
            UNION
            SELECT inhrelid FROM changed JOIN pg_inherits ON inhparent = changed.oid
        )
        SELECT jsonb_build_object(
            'oid', c.oid::bigint,
            'last_attnum', c.relnatts,
            'columns', (
                SELECT jsonb_agg(jsonb_build_object(
                    'attnum', a.attnum,
                    'name', a.attname,
                    'type', a.atttypid::bigint,
                    'typmod', a.atttypmod,
                    'ndims', a.attndims,
                    'not_null', a.attnotnull,
                    'is_generated', a.attgenerated <> '',
                    -- What older rows hold, by the table that holds rows: an array of one element, as it prints.
                    'missing', (
                        SELECT coalesce(jsonb_object_agg(leaf.relid::oid::bigint::text, m.attmissingval::text), '{}')
                        FROM (SELECT c.oid AS relid UNION SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf) leaf
                        JOIN pg_class l ON l.oid = leaf.relid AND l.relkind = 'r'
                        JOIN pg_attribute m ON m.attrelid = leaf.relid AND m.attname = a.attname AND NOT m.attisdropped
                    )
                ) ORDER BY a.attnum)
                FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            )
        )
        FROM changed JOIN pg_class c ON c.oid = changed.oid AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
    LOOP
        -- The number of the transaction is signed too, so that no message is one of another transaction.
        signed := pg_current_xact_id()::text || ' ' || described::text;
        PERFORM pg_logical_emit_message(true, 'rhei.ddl', encode(
            sha256(right(key, 64)::bytea || sha256(left(key, 64)::bytea || convert_to(signed, getdatabaseencoding()))),
            'hex'
        ) || ' ' || signed);
    END LOOP;
END
$rhei$;

CREATE EVENT TRIGGER rhei_ddl ON ddl_command_end
    WHEN TAG IN ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO', 'ALTER TABLE', 'ALTER TYPE')
    EXECUTE FUNCTION rhei.emit_ddl();
-- Also in sessions with session_replication_role = replica, whose changes are in the stream like others.
ALTER EVENT TRIGGER rhei_ddl ENABLE ALWAYS;

COMMIT;
