-- Optional, at the source: says in the stream itself what a table looks like after each change of it. With it, rhei follows
-- several changes in a row in place where it would otherwise have to copy the table again.
--
-- Installed by `rhei check --install-ddl-trigger`, by a superuser. Taken away again with
--   DROP EVENT TRIGGER rhei_ddl; DROP FUNCTION rhei_emit_ddl();
--
-- The message is transactional: it is in the stream at the place of the change, and not at all when that is rolled back.
-- There is no EXCEPTION block: it would put the message into a subtransaction of its own, and PostgreSQL 15 decodes such a
-- message after the rows that follow it.
CREATE OR REPLACE FUNCTION public.rhei_emit_ddl() RETURNS event_trigger
LANGUAGE plpgsql
SET search_path = pg_catalog
AS $rhei$
DECLARE
    described jsonb;
BEGIN
    FOR described IN
        WITH RECURSIVE changed(oid) AS (
            SELECT DISTINCT objid FROM pg_event_trigger_ddl_commands()
            WHERE classid = 'pg_class'::regclass AND object_type IN ('table', 'table column')
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
        PERFORM pg_logical_emit_message(true, 'rhei.ddl', described::text);
    END LOOP;
END
$rhei$;

DROP EVENT TRIGGER IF EXISTS rhei_ddl;
CREATE EVENT TRIGGER rhei_ddl ON ddl_command_end
    WHEN TAG IN ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO', 'ALTER TABLE')
    EXECUTE FUNCTION public.rhei_emit_ddl();
