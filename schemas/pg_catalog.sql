-- PostgreSQL's catalogs over the copy, for the clients of the endpoint: what psql, drivers and tools ask before they show a
-- table. Views of the database `_pg`, which lives in memory beside the file (`rhei_target`). Statements end with a semicolon at
-- the end of a line. Columns are those of PostgreSQL 16; a view that is empty here has them for the sake of joins.
--
-- Macros are not hygienic: a name inside one captures the caller's, so aliases begin with z. relpages is 0, else DuckDB's own
-- client would scan a table by ctid on several connections, which are not one snapshot. Oids of the file are shifted by 100000,
-- so that none is that of a type.

CREATE TABLE _pg.types(oid UINTEGER, typname VARCHAR, typlen INTEGER, typcategory VARCHAR, typarray UINTEGER, duckdb VARCHAR, display VARCHAR);
INSERT INTO _pg.types VALUES
    (16, 'bool', 1, 'B', 1000, 'BOOLEAN', 'boolean'),
    (17, 'bytea', -1, 'U', 1001, 'BLOB', 'bytea'),
    (18, 'char', 1, 'Z', 1002, NULL, '"char"'),
    (19, 'name', 64, 'S', 1003, NULL, 'name'),
    (20, 'int8', 8, 'N', 1016, 'BIGINT', 'bigint'),
    (21, 'int2', 2, 'N', 1005, 'SMALLINT', 'smallint'),
    (22, 'int2vector', -1, 'A', 1006, NULL, 'int2vector'),
    (23, 'int4', 4, 'N', 1007, 'INTEGER', 'integer'),
    (25, 'text', -1, 'S', 1009, 'VARCHAR', 'text'),
    (26, 'oid', 4, 'N', 1028, 'UINTEGER', 'oid'),
    (30, 'oidvector', -1, 'A', 1013, NULL, 'oidvector'),
    (114, 'json', -1, 'U', 199, 'JSON', 'json'),
    (700, 'float4', 4, 'N', 1021, 'FLOAT', 'real'),
    (701, 'float8', 8, 'N', 1022, 'DOUBLE', 'double precision'),
    (705, 'unknown', -2, 'X', 0, NULL, 'unknown'),
    (1042, 'bpchar', -1, 'S', 1014, NULL, 'character'),
    (1043, 'varchar', -1, 'S', 1015, NULL, 'character varying'),
    (1082, 'date', 4, 'D', 1182, 'DATE', 'date'),
    (1083, 'time', 8, 'D', 1183, 'TIME', 'time without time zone'),
    (1114, 'timestamp', 8, 'D', 1115, 'TIMESTAMP', 'timestamp without time zone'),
    (1184, 'timestamptz', 8, 'D', 1185, 'TIMESTAMP WITH TIME ZONE', 'timestamp with time zone'),
    (1186, 'interval', 16, 'T', 1187, 'INTERVAL', 'interval'),
    (1266, 'timetz', 12, 'D', 1270, 'TIME WITH TIME ZONE', 'time with time zone'),
    (1562, 'varbit', -1, 'V', 1563, 'BIT', 'bit varying'),
    (1700, 'numeric', -1, 'N', 1231, 'HUGEINT', 'numeric'),
    (2205, 'regclass', 4, 'N', 2210, NULL, 'regclass'),
    (2206, 'regtype', 4, 'N', 2211, NULL, 'regtype'),
    (2249, 'record', -1, 'P', 2287, NULL, 'record'),
    (2950, 'uuid', 16, 'U', 2951, 'UUID', 'uuid'),
    (3802, 'jsonb', -1, 'U', 3807, NULL, 'jsonb');
INSERT INTO _pg.types SELECT typarray, '_' || typname, -1, 'A', 0, duckdb || '[]', display || '[]' FROM _pg.types WHERE typarray > 0;

-- The oid of the type that a column has for a client. `serve::pg_type` says the same of results.
CREATE MACRO _pg.type_oid(t) AS coalesce(
    (SELECT zt.oid FROM _pg.types zt WHERE zt.duckdb = t),
    CASE
        WHEN t IN ('TINYINT', 'UTINYINT') THEN 21
        WHEN t = 'USMALLINT' THEN 23
        WHEN t LIKE '%[]' AND t LIKE 'DECIMAL%' THEN 1231
        WHEN t LIKE '%[]' THEN coalesce((SELECT zt.oid FROM _pg.types zt WHERE zt.duckdb = regexp_replace(t, '(\[[0-9]*\])+$', '[]')), 1009)
        WHEN t LIKE 'DECIMAL%' OR t IN ('UBIGINT', 'UHUGEINT', 'BIGNUM') THEN 1700
        WHEN t LIKE 'STRUCT%' THEN 2249
        WHEN t LIKE 'MAP%' OR t = 'VARIANT' THEN 114
        WHEN t LIKE 'TIMESTAMP\_%' ESCAPE '\' THEN 1114
        ELSE 25
    END)::UINTEGER;

CREATE VIEW _pg.relations AS
    SELECT (100000 + table_oid)::UINTEGER AS oid, (100000 + schema_oid)::UINTEGER AS ns, schema_name, table_name AS relname, 'r' AS relkind, estimated_size AS tuples, column_count AS natts, comment
    FROM duckdb_tables() WHERE database_name = 'rhei_target' AND schema_name NOT IN ('_rhei', 'main') AND table_name NOT LIKE '%\_\_rhei\_%' ESCAPE '\'
    UNION ALL
    SELECT (100000 + view_oid)::UINTEGER, (100000 + schema_oid)::UINTEGER, schema_name, view_name, 'v', 0, column_count, comment
    FROM duckdb_views() WHERE database_name = 'rhei_target' AND NOT internal AND schema_name NOT IN ('_rhei', 'main');

-- The keys that rhei follows the tables by: the primary key, or the unique index that is the replica identity.
CREATE VIEW _pg.keys AS
    SELECT r.oid AS relid, (1000000000 + r.oid)::UINTEGER AS oid, r.ns, r.schema_name, r.relname, t.replica_identity = 'd' AS is_primary, r.relname || CASE t.replica_identity WHEN 'd' THEN '_pkey' ELSE '_key' END AS conname, list(a.attnum ORDER BY c.key_position) AS attnums, list(c.target_name ORDER BY c.key_position) AS names
    FROM rhei_target._rhei.tables t
    JOIN _pg.relations r ON r.schema_name = t.target_schema AND r.relname = t.target_name AND r.relkind = 'r'
    JOIN rhei_target._rhei.columns c ON c.table_oid = t.oid AND c.key_position IS NOT NULL
    JOIN (SELECT schema_name, table_name, column_name, column_index::SMALLINT AS attnum FROM duckdb_columns() WHERE database_name = 'rhei_target') a ON a.schema_name = r.schema_name AND a.table_name = r.relname AND a.column_name = c.target_name
    WHERE t.replica_identity IN ('d', 'i') AND t.state <> 'dropped'
    GROUP BY ALL;

-- The tables of the copy have no constraints of their own; what those of the source have is known.
CREATE VIEW _pg.not_nulls AS
    SELECT t.target_schema, t.target_name AS target_table, c.target_name AS target_column, c.not_null
    FROM rhei_target._rhei.tables t JOIN rhei_target._rhei.columns c ON c.table_oid = t.oid
    WHERE t.state <> 'dropped';

CREATE VIEW _pg.freshness AS
    SELECT checkpoint_lsn AS lsn, checkpoint_time AS committed_at, now() - checkpoint_time AS age,
        (SELECT count(*) FROM rhei_target._rhei.tables WHERE state = 'live') AS live,
        coalesce((SELECT list(target_schema || '.' || target_name || ': ' || state ORDER BY target_schema, target_name) FROM rhei_target._rhei.tables WHERE state NOT IN ('live', 'dropped')), []) AS not_live
    FROM rhei_target._rhei.pipeline;

CREATE VIEW _pg.pg_namespace AS
    SELECT (100000 + oid)::UINTEGER AS oid, schema_name AS nspname, 10::UINTEGER AS nspowner, NULL::VARCHAR[] AS nspacl
    FROM duckdb_schemas() WHERE database_name = 'rhei_target' AND schema_name NOT IN ('_rhei', 'main', 'pg_catalog', 'information_schema')
    UNION ALL VALUES (11::UINTEGER, 'pg_catalog', 10::UINTEGER, NULL::VARCHAR[]);

CREATE VIEW _pg.pg_class AS
    SELECT oid, 1259::UINTEGER AS tableoid, relname, ns AS relnamespace, 0::UINTEGER AS reltype, 0::UINTEGER AS reloftype, 10::UINTEGER AS relowner, CASE relkind WHEN 'r' THEN 2 ELSE 0 END::UINTEGER AS relam, 0::UINTEGER AS relfilenode, 0::UINTEGER AS reltablespace, 0 AS relpages, tuples::FLOAT AS reltuples, 0 AS relallvisible, 0::UINTEGER AS reltoastrelid, oid IN (SELECT relid FROM _pg.keys) AS relhasindex, false AS relisshared, 'p' AS relpersistence, relkind, natts::SMALLINT AS relnatts, 0::SMALLINT AS relchecks, false AS relhasrules, false AS relhastriggers, false AS relhassubclass, false AS relrowsecurity, false AS relforcerowsecurity, true AS relispopulated, 'd' AS relreplident, false AS relispartition, 0::UINTEGER AS relrewrite, 0::UINTEGER AS relfrozenxid, 0::UINTEGER AS relminmxid, NULL::VARCHAR[] AS relacl, NULL::VARCHAR[] AS reloptions, NULL::VARCHAR AS relpartbound, false AS relhasoids
    FROM _pg.relations
    UNION ALL
    SELECT oid, 1259::UINTEGER, conname, ns, 0::UINTEGER, 0::UINTEGER, 10::UINTEGER, 403::UINTEGER, 0::UINTEGER, 0::UINTEGER, 0, 0, 0, 0::UINTEGER, false, false, 'p', 'i', len(attnums)::SMALLINT, 0::SMALLINT, false, false, false, false, false, true, 'n', false, 0::UINTEGER, 0::UINTEGER, 0::UINTEGER, NULL, NULL, NULL, false
    FROM _pg.keys;

CREATE VIEW _pg.pg_attribute AS
    SELECT r.oid AS attrelid, column_name AS attname, _pg.type_oid(data_type) AS atttypid, -1 AS attstattarget, coalesce(t.typlen, -1)::SMALLINT AS attlen, column_index::SMALLINT AS attnum, CASE WHEN data_type LIKE '%]' THEN 1 ELSE 0 END AS attndims, -1 AS attcacheoff, CASE WHEN data_type LIKE 'DECIMAL(%' AND data_type NOT LIKE '%]' THEN numeric_precision * 65536 + numeric_scale + 4 ELSE -1 END::INTEGER AS atttypmod, false AS attbyval, 'x' AS attstorage, 'i' AS attalign, coalesce(n.not_null, NOT is_nullable) AS attnotnull, false AS atthasdef, false AS atthasmissing, '' AS attidentity, '' AS attgenerated, false AS attisdropped, true AS attislocal, 0 AS attinhcount, CASE t.typcategory WHEN 'S' THEN 100 ELSE 0 END::UINTEGER AS attcollation, '' AS attcompression, NULL::VARCHAR[] AS attacl, NULL::VARCHAR[] AS attoptions, NULL::VARCHAR[] AS attfdwoptions, NULL::VARCHAR AS attmissingval
    FROM duckdb_columns() c
    JOIN _pg.relations r ON r.schema_name = c.schema_name AND r.relname = c.table_name
    LEFT JOIN _pg.types t ON t.oid = _pg.type_oid(c.data_type)
    LEFT JOIN _pg.not_nulls n ON n.target_schema = c.schema_name AND n.target_table = c.table_name AND n.target_column = c.column_name
    WHERE c.database_name = 'rhei_target'
    UNION ALL
    SELECT k.oid, unnest(k.names), 0::UINTEGER, -1, -1::SMALLINT, unnest(range(1, len(k.names) + 1))::SMALLINT, 0, -1, -1, false, 'x', 'i', false, false, false, '', '', false, true, 0, 0::UINTEGER, '', NULL, NULL, NULL, NULL
    FROM _pg.keys k;

CREATE VIEW _pg.pg_type AS
    SELECT oid, 1247::UINTEGER AS tableoid, typname, 11::UINTEGER AS typnamespace, 10::UINTEGER AS typowner, typlen::SMALLINT AS typlen, typlen BETWEEN 1 AND 8 AS typbyval, CASE typcategory WHEN 'P' THEN 'p' ELSE 'b' END AS typtype, typcategory, typname IN ('bool', 'text', 'oid', 'float8', 'timestamptz', 'interval', 'varbit') AS typispreferred, true AS typisdefined, ',' AS typdelim, 0::UINTEGER AS typrelid, CASE typcategory WHEN 'A' THEN 'array_subscript_handler' ELSE '-' END AS typsubscript, CASE WHEN typcategory = 'A' THEN coalesce((SELECT b.oid FROM _pg.types b WHERE b.typarray = t.oid), 0) ELSE 0 END::UINTEGER AS typelem, typarray, CASE typcategory WHEN 'A' THEN 'array_in' ELSE typname || CASE WHEN typname IN ('date', 'time', 'timestamp', 'timestamptz', 'timetz', 'interval', 'uuid', 'varbit', 'numeric', 'json', 'jsonb', 'record') THEN '_' ELSE '' END || 'in' END AS typinput, CASE typcategory WHEN 'A' THEN 'array_out' ELSE typname || CASE WHEN typname IN ('date', 'time', 'timestamp', 'timestamptz', 'timetz', 'interval', 'uuid', 'varbit', 'numeric', 'json', 'jsonb', 'record') THEN '_' ELSE '' END || 'out' END AS typoutput, CASE typcategory WHEN 'A' THEN 'array_recv' ELSE typname || CASE WHEN typname IN ('date', 'time', 'timestamp', 'timestamptz', 'timetz', 'interval', 'uuid', 'varbit', 'numeric', 'json', 'jsonb', 'record') THEN '_' ELSE '' END || 'recv' END AS typreceive, CASE typcategory WHEN 'A' THEN 'array_send' ELSE typname || CASE WHEN typname IN ('date', 'time', 'timestamp', 'timestamptz', 'timetz', 'interval', 'uuid', 'varbit', 'numeric', 'json', 'jsonb', 'record') THEN '_' ELSE '' END || 'send' END AS typsend, '-' AS typmodin, '-' AS typmodout, '-' AS typanalyze, 'i' AS typalign, 'x' AS typstorage, false AS typnotnull, 0::UINTEGER AS typbasetype, -1 AS typtypmod, 0 AS typndims, CASE typcategory WHEN 'S' THEN 100 ELSE 0 END::UINTEGER AS typcollation, NULL::VARCHAR AS typdefaultbin, NULL::VARCHAR AS typdefault, NULL::VARCHAR[] AS typacl
    FROM _pg.types t;

CREATE VIEW _pg.pg_index AS
    SELECT oid AS indexrelid, relid AS indrelid, len(attnums)::SMALLINT AS indnatts, len(attnums)::SMALLINT AS indnkeyatts, true AS indisunique, false AS indnullsnotdistinct, is_primary AS indisprimary, false AS indisexclusion, true AS indimmediate, false AS indisclustered, true AS indisvalid, false AS indcheckxmin, true AS indisready, true AS indislive, false AS indisreplident, attnums AS indkey, list_transform(attnums, lambda zx: 0::UINTEGER) AS indcollation, list_transform(attnums, lambda zx: 0::UINTEGER) AS indclass, list_transform(attnums, lambda zx: 0::SMALLINT) AS indoption, NULL::VARCHAR AS indexprs, NULL::VARCHAR AS indpred
    FROM _pg.keys;

CREATE VIEW _pg.pg_constraint AS
    SELECT oid, 2606::UINTEGER AS tableoid, conname, ns AS connamespace, CASE WHEN is_primary THEN 'p' ELSE 'u' END AS contype, false AS condeferrable, false AS condeferred, true AS convalidated, relid AS conrelid, 0::UINTEGER AS contypid, oid AS conindid, 0::UINTEGER AS conparentid, 0::UINTEGER AS confrelid, ' ' AS confupdtype, ' ' AS confdeltype, ' ' AS confmatchtype, true AS conislocal, 0 AS coninhcount, true AS connoinherit, attnums AS conkey, NULL::SMALLINT[] AS confkey, NULL::UINTEGER[] AS conpfeqop, NULL::VARCHAR AS conbin
    FROM _pg.keys;

CREATE VIEW _pg.pg_indexes AS
    SELECT schema_name AS schemaname, relname AS tablename, conname AS indexname, NULL::VARCHAR AS "tablespace", 'CREATE UNIQUE INDEX ' || conname || ' ON ' || schema_name || '.' || relname || ' USING btree (' || array_to_string(names, ', ') || ')' AS indexdef FROM _pg.keys;

CREATE VIEW _pg.pg_database AS
    SELECT 1::UINTEGER AS oid, database AS datname, 10::UINTEGER AS datdba, 6 AS "encoding", 'c' AS datlocprovider, false AS datistemplate, true AS datallowconn, -1 AS datconnlimit, 1663::UINTEGER AS dattablespace, 'C.UTF-8' AS datcollate, 'C.UTF-8' AS datctype, NULL::VARCHAR AS daticulocale, NULL::VARCHAR AS datlocale, NULL::VARCHAR AS daticurules, NULL::VARCHAR AS datcollversion, NULL::VARCHAR[] AS datacl, 0::UINTEGER AS datfrozenxid
    FROM rhei_target._rhei.pipeline;

CREATE VIEW _pg.pg_roles AS SELECT 10::UINTEGER AS oid, 'rhei' AS rolname, false AS rolsuper, true AS rolinherit, false AS rolcreaterole, false AS rolcreatedb, true AS rolcanlogin, false AS rolreplication, -1 AS rolconnlimit, '********' AS rolpassword, NULL::TIMESTAMPTZ AS rolvaliduntil, false AS rolbypassrls, NULL::VARCHAR[] AS rolconfig;
CREATE VIEW _pg.pg_authid AS SELECT * FROM _pg.pg_roles;
CREATE VIEW _pg.pg_user AS SELECT rolname AS usename, oid AS usesysid, false AS usecreatedb, false AS usesuper, false AS userepl, false AS usebypassrls, rolpassword AS passwd, rolvaliduntil AS valuntil, rolconfig AS useconfig FROM _pg.pg_roles;
CREATE VIEW _pg.pg_group AS SELECT '' AS groname, 0::UINTEGER AS grosysid, NULL::UINTEGER[] AS grolist WHERE false;
CREATE VIEW _pg.pg_auth_members AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS roleid, 0::UINTEGER AS member, 0::UINTEGER AS grantor, false AS admin_option WHERE false;
CREATE VIEW _pg.pg_description AS SELECT oid AS objoid, 1259::UINTEGER AS classoid, 0 AS objsubid, comment AS description FROM _pg.relations WHERE comment IS NOT NULL;
CREATE VIEW _pg.pg_shdescription AS SELECT 0::UINTEGER AS objoid, 0::UINTEGER AS classoid, '' AS description WHERE false;
CREATE VIEW _pg.pg_tables AS SELECT schema_name AS schemaname, relname AS tablename, 'rhei' AS tableowner, NULL::VARCHAR AS "tablespace", oid IN (SELECT relid FROM _pg.keys) AS hasindexes, false AS hasrules, false AS hastriggers, false AS rowsecurity FROM _pg.relations WHERE relkind = 'r';
CREATE VIEW _pg.pg_stat_all_tables AS SELECT oid AS relid, schema_name AS schemaname, relname, NULL::BIGINT AS seq_scan, NULL::BIGINT AS seq_tup_read, NULL::BIGINT AS idx_scan, NULL::BIGINT AS idx_tup_fetch, NULL::BIGINT AS n_tup_ins, NULL::BIGINT AS n_tup_upd, NULL::BIGINT AS n_tup_del, tuples::BIGINT AS n_live_tup, 0::BIGINT AS n_dead_tup, NULL::TIMESTAMPTZ AS last_vacuum, NULL::TIMESTAMPTZ AS last_autovacuum, NULL::TIMESTAMPTZ AS last_analyze, NULL::TIMESTAMPTZ AS last_autoanalyze FROM _pg.relations WHERE relkind = 'r';
CREATE VIEW _pg.pg_stat_user_tables AS FROM _pg.pg_stat_all_tables;
CREATE VIEW _pg.pg_views AS SELECT schema_name AS schemaname, relname AS viewname, 'rhei' AS viewowner, '' AS definition FROM _pg.relations WHERE relkind = 'v';
CREATE VIEW _pg.pg_matviews AS SELECT '' AS schemaname, '' AS matviewname, '' AS matviewowner, '' AS definition WHERE false;
CREATE VIEW _pg.pg_settings AS SELECT name, setting, NULL::VARCHAR AS unit, '' AS category, '' AS short_desc, '' AS context, vartype, 'default' AS source, setting AS boot_val, setting AS reset_val FROM (VALUES ('server_version', '16.0', 'string'), ('server_version_num', '160000', 'integer'), ('max_index_keys', '32', 'integer'), ('max_identifier_length', '63', 'integer'), ('standard_conforming_strings', 'on', 'bool'), ('TimeZone', 'UTC', 'string'), ('DateStyle', 'ISO, MDY', 'string'), ('search_path', 'public', 'string'), ('client_encoding', 'UTF8', 'string'), ('server_encoding', 'UTF8', 'string'), ('integer_datetimes', 'on', 'bool'), ('lc_collate', 'C.UTF-8', 'string'), ('lc_ctype', 'C.UTF-8', 'string'), ('lc_monetary', 'C', 'string'), ('transaction_read_only', 'on', 'bool'), ('default_transaction_read_only', 'on', 'bool'), ('transaction_isolation', 'repeatable read', 'string'), ('bytea_output', 'hex', 'string'), ('IntervalStyle', 'postgres', 'string'), ('jit', 'off', 'bool'), ('is_superuser', 'off', 'bool'), ('in_hot_standby', 'on', 'bool'), ('extra_float_digits', '1', 'integer')) t(name, setting, vartype);
CREATE VIEW _pg.pg_am AS SELECT * FROM (VALUES (2::UINTEGER, 'heap', '-', 't'), (403::UINTEGER, 'btree', '-', 'i')) t(oid, amname, amhandler, amtype);
CREATE VIEW _pg.pg_collation AS SELECT 100::UINTEGER AS oid, 'default' AS collname, 11::UINTEGER AS collnamespace, 'C' AS collcollate, 'C' AS collctype, -1 AS collencoding, NULL::VARCHAR AS colliculocale, NULL::VARCHAR AS collicurules, true AS collisdeterministic, 'c' AS collprovider;
CREATE VIEW _pg.pg_tablespace AS SELECT 1663::UINTEGER AS oid, 'pg_default' AS spcname, 10::UINTEGER AS spcowner, NULL::VARCHAR[] AS spcacl, NULL::VARCHAR[] AS spcoptions;
CREATE VIEW _pg.pg_language AS SELECT 12::UINTEGER AS oid, 2612::UINTEGER AS tableoid, 'internal' AS lanname, 0::UINTEGER AS lanplcallfoid, 0::UINTEGER AS laninline, 0::UINTEGER AS lanvalidator, 10::UINTEGER AS lanowner, false AS lanispl, false AS lanpltrusted, NULL::VARCHAR[] AS lanacl;
CREATE VIEW _pg.pg_stat_activity AS SELECT 0 AS pid, '' AS datname, '' AS usename, '' AS application_name, '' AS state, '' AS query WHERE false;
CREATE VIEW _pg.pg_attrdef AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, 0::UINTEGER AS adrelid, 0::SMALLINT AS adnum, '' AS adbin WHERE false;
CREATE VIEW _pg.pg_inherits AS SELECT 0::UINTEGER AS inhrelid, 0::UINTEGER AS inhparent, 0 AS inhseqno, false AS inhdetachpending WHERE false;
CREATE VIEW _pg.pg_policy AS SELECT 0::UINTEGER AS oid, '' AS polname, 0::UINTEGER AS polrelid, '' AS polcmd, true AS polpermissive, NULL::UINTEGER[] AS polroles, '' AS polqual, '' AS polwithcheck WHERE false;
CREATE VIEW _pg.pg_publication AS SELECT 0::UINTEGER AS oid, '' AS pubname, false AS puballtables, false AS pubinsert, false AS pubupdate, false AS pubdelete, false AS pubtruncate, false AS pubviaroot, 0::UINTEGER AS pubowner WHERE false;
CREATE VIEW _pg.pg_publication_rel AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS prpubid, 0::UINTEGER AS prrelid, '' AS prqual, NULL::SMALLINT[] AS prattrs WHERE false;
CREATE VIEW _pg.pg_publication_namespace AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS pnpubid, 0::UINTEGER AS pnnspid WHERE false;
CREATE VIEW _pg.pg_publication_tables AS SELECT '' AS pubname, '' AS schemaname, '' AS tablename WHERE false;
CREATE VIEW _pg.pg_subscription AS SELECT 0::UINTEGER AS oid, '' AS subname, 0::UINTEGER AS subdbid, 0::UINTEGER AS subowner, false AS subenabled, NULL::VARCHAR[] AS subpublications, false AS subbinary, '' AS substream, '' AS subtwophasestate, false AS subdisableonerr, '' AS suborigin, '' AS subsynccommit, '' AS subconninfo, '' AS subskiplsn WHERE false;
CREATE VIEW _pg.pg_statistic_ext AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS stxrelid, '' AS stxname, 0::UINTEGER AS stxnamespace, 0::UINTEGER AS stxowner, -1 AS stxstattarget, NULL::SMALLINT[] AS stxkeys, NULL::VARCHAR[] AS stxkind WHERE false;
CREATE VIEW _pg.pg_trigger AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, 0::UINTEGER AS tgrelid, 0::UINTEGER AS tgparentid, '' AS tgname, 0::UINTEGER AS tgfoid, 0 AS tgtype, '' AS tgenabled, false AS tgisinternal, 0::UINTEGER AS tgconstraint, false AS tgdeferrable, false AS tginitdeferred WHERE false;
CREATE VIEW _pg.pg_event_trigger AS SELECT 0::UINTEGER AS oid, '' AS evtname, '' AS evtevent, 0::UINTEGER AS evtowner, 0::UINTEGER AS evtfoid, '' AS evtenabled, NULL::VARCHAR[] AS evttags WHERE false;
CREATE VIEW _pg.pg_rewrite AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, '' AS rulename, 0::UINTEGER AS ev_class, '' AS ev_type, '' AS ev_enabled, false AS is_instead WHERE false;
CREATE VIEW _pg.pg_proc AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, '' AS proname, 0::UINTEGER AS pronamespace, 0::UINTEGER AS proowner, 0::UINTEGER AS prolang, 'f' AS prokind, false AS prosecdef, 0::UINTEGER AS prorettype, NULL::UINTEGER[] AS proargtypes, NULL::VARCHAR[] AS proargnames, '' AS prosrc, '' AS provolatile, '' AS proparallel, NULL::VARCHAR[] AS proacl, false AS proretset, 0 AS pronargs, false AS proisstrict, NULL::UINTEGER[] AS proallargtypes, NULL::VARCHAR[] AS proargmodes WHERE false;
CREATE VIEW _pg.pg_aggregate AS SELECT 0::UINTEGER AS aggfnoid, '' AS aggkind WHERE false;
CREATE VIEW _pg.pg_cast AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS castsource, 0::UINTEGER AS casttarget, 0::UINTEGER AS castfunc, '' AS castcontext, '' AS castmethod WHERE false;
CREATE VIEW _pg.pg_extension AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, '' AS extname, 0::UINTEGER AS extowner, 0::UINTEGER AS extnamespace, false AS extrelocatable, '' AS extversion, NULL::UINTEGER[] AS extconfig WHERE false;
CREATE VIEW _pg.pg_available_extensions AS SELECT '' AS name, '' AS default_version, '' AS installed_version, '' AS comment WHERE false;
CREATE VIEW _pg.pg_enum AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS enumtypid, 0::FLOAT AS enumsortorder, '' AS enumlabel WHERE false;
CREATE VIEW _pg.pg_range AS SELECT 0::UINTEGER AS rngtypid, 0::UINTEGER AS rngsubtype, 0::UINTEGER AS rngmultitypid, 0::UINTEGER AS rngcollation WHERE false;
CREATE VIEW _pg.pg_depend AS SELECT 0::UINTEGER AS classid, 0::UINTEGER AS objid, 0 AS objsubid, 0::UINTEGER AS refclassid, 0::UINTEGER AS refobjid, 0 AS refobjsubid, '' AS deptype WHERE false;
CREATE VIEW _pg.pg_operator AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, '' AS oprname, '' AS oprkind, 0::UINTEGER AS oprnamespace, 0::UINTEGER AS oprleft, 0::UINTEGER AS oprright, 0::UINTEGER AS oprresult, 0::UINTEGER AS oprcode WHERE false;
CREATE VIEW _pg.pg_opclass AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, '' AS opcname, 0::UINTEGER AS opcmethod, 0::UINTEGER AS opcnamespace, 0::UINTEGER AS opcintype, 0::UINTEGER AS opcfamily, false AS opcdefault WHERE false;
CREATE VIEW _pg.pg_opfamily AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, '' AS opfname, 0::UINTEGER AS opfmethod, 0::UINTEGER AS opfnamespace WHERE false;
CREATE VIEW _pg.pg_foreign_table AS SELECT 0::UINTEGER AS ftrelid, 0::UINTEGER AS ftserver, NULL::VARCHAR[] AS ftoptions WHERE false;
CREATE VIEW _pg.pg_foreign_server AS SELECT 0::UINTEGER AS oid, '' AS srvname, 0::UINTEGER AS srvowner, 0::UINTEGER AS srvfdw, NULL::VARCHAR[] AS srvacl, NULL::VARCHAR[] AS srvoptions, '' AS srvtype, '' AS srvversion WHERE false;
CREATE VIEW _pg.pg_foreign_data_wrapper AS SELECT 0::UINTEGER AS oid, '' AS fdwname, 0::UINTEGER AS fdwowner, 0::UINTEGER AS fdwhandler, 0::UINTEGER AS fdwvalidator, NULL::VARCHAR[] AS fdwacl, NULL::VARCHAR[] AS fdwoptions WHERE false;
CREATE VIEW _pg.pg_user_mappings AS SELECT '' AS srvname, '' AS usename, NULL::VARCHAR[] AS umoptions WHERE false;
CREATE VIEW _pg.pg_sequence AS SELECT 0::UINTEGER AS seqrelid, 0::UINTEGER AS seqtypid, 0::UINTEGER AS seqstart, 0::UINTEGER AS seqincrement, 0::UINTEGER AS seqmax, 0::UINTEGER AS seqmin, 0::UINTEGER AS seqcache, false AS seqcycle WHERE false;
CREATE VIEW _pg.pg_partitioned_table AS SELECT 0::UINTEGER AS partrelid, '' AS partstrat, 0 AS partnatts WHERE false;
CREATE VIEW _pg.pg_default_acl AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS defaclrole, 0::UINTEGER AS defaclnamespace, '' AS defaclobjtype, NULL::VARCHAR[] AS defaclacl WHERE false;
CREATE VIEW _pg.pg_db_role_setting AS SELECT 0::UINTEGER AS setdatabase, 0::UINTEGER AS setrole, NULL::VARCHAR[] AS setconfig WHERE false;
CREATE VIEW _pg.pg_largeobject_metadata AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS lomowner, NULL::VARCHAR[] AS lomacl WHERE false;
CREATE VIEW _pg.pg_conversion AS SELECT 0::UINTEGER AS oid, 0::UINTEGER AS tableoid, '' AS conname, 0::UINTEGER AS connamespace, 0 AS conforencoding, 0 AS contoencoding, 0::UINTEGER AS conproc, false AS condefault WHERE false;
CREATE VIEW _pg.pg_ts_config AS SELECT 0::UINTEGER AS oid, '' AS cfgname, 0::UINTEGER AS cfgnamespace, 0::UINTEGER AS cfgparser WHERE false;
CREATE VIEW _pg.pg_ts_dict AS SELECT 0::UINTEGER AS oid, '' AS dictname, 0::UINTEGER AS dictnamespace, 0::UINTEGER AS dicttemplate, '' AS dictinitoption WHERE false;
CREATE VIEW _pg.pg_ts_parser AS SELECT 0::UINTEGER AS oid, '' AS prsname, 0::UINTEGER AS prsnamespace WHERE false;
CREATE VIEW _pg.pg_ts_template AS SELECT 0::UINTEGER AS oid, '' AS tmplname, 0::UINTEGER AS tmplnamespace WHERE false;

CREATE VIEW _pg.information_schema_schemata AS SELECT _pg.database AS catalog_name, nspname AS schema_name, 'rhei' AS schema_owner FROM _pg.pg_namespace, (SELECT database FROM rhei_target._rhei.pipeline) _pg;
CREATE VIEW _pg.information_schema_tables AS SELECT d.database AS table_catalog, schema_name AS table_schema, relname AS table_name, CASE relkind WHEN 'v' THEN 'VIEW' ELSE 'BASE TABLE' END AS table_type, NULL::VARCHAR AS self_referencing_column_name, 'NO' AS is_insertable_into, 'NO' AS is_typed FROM _pg.relations, (SELECT database FROM rhei_target._rhei.pipeline) d;
CREATE VIEW _pg.information_schema_views AS SELECT d.database AS table_catalog, schema_name AS table_schema, relname AS table_name, NULL::VARCHAR AS view_definition, 'NONE' AS check_option, 'NO' AS is_updatable FROM _pg.relations, (SELECT database FROM rhei_target._rhei.pipeline) d WHERE relkind = 'v';
CREATE VIEW _pg.information_schema_columns AS SELECT d.database AS table_catalog, r.schema_name AS table_schema, r.relname AS table_name, a.attname AS column_name, a.attnum::INTEGER AS ordinal_position, NULL::VARCHAR AS column_default, CASE WHEN a.attnotnull THEN 'NO' ELSE 'YES' END AS is_nullable, CASE WHEN t.typcategory = 'A' THEN 'ARRAY' ELSE t.display END AS data_type, NULL::INTEGER AS character_maximum_length, NULL::INTEGER AS character_octet_length, CASE WHEN a.atttypmod > 4 THEN (a.atttypmod - 4) // 65536 END AS numeric_precision, CASE WHEN a.atttypmod > 4 THEN (a.atttypmod - 4) % 65536 END AS numeric_scale, NULL::INTEGER AS datetime_precision, d.database AS udt_catalog, 'pg_catalog' AS udt_schema, t.typname AS udt_name, 'NO' AS is_identity, 'NEVER' AS is_generated, 'NO' AS is_updatable FROM _pg.relations r JOIN _pg.pg_attribute a ON a.attrelid = r.oid JOIN _pg.types t ON t.oid = a.atttypid, (SELECT database FROM rhei_target._rhei.pipeline) d;
CREATE VIEW _pg.information_schema_table_constraints AS SELECT d.database AS constraint_catalog, schema_name AS constraint_schema, conname AS constraint_name, d.database AS table_catalog, schema_name AS table_schema, relname AS table_name, CASE WHEN is_primary THEN 'PRIMARY KEY' ELSE 'UNIQUE' END AS constraint_type, 'NO' AS is_deferrable, 'NO' AS initially_deferred FROM _pg.keys, (SELECT database FROM rhei_target._rhei.pipeline) d;
CREATE VIEW _pg.information_schema_key_column_usage AS SELECT d.database AS constraint_catalog, schema_name AS constraint_schema, conname AS constraint_name, d.database AS table_catalog, schema_name AS table_schema, relname AS table_name, unnest(names) AS column_name, unnest(range(1, len(names) + 1))::INTEGER AS ordinal_position, NULL::INTEGER AS position_in_unique_constraint FROM _pg.keys, (SELECT database FROM rhei_target._rhei.pipeline) d;

CREATE MACRO _pg.current_database() AS (SELECT zd.database FROM rhei_target._rhei.pipeline zd);
CREATE MACRO _pg.version() AS 'PostgreSQL 16.0 (rhei, DuckDB ' || (SELECT zv.library_version FROM pragma_version() zv) || ')';
CREATE MACRO _pg.current_setting(a, b := false) AS (SELECT zs.setting FROM _pg.pg_settings zs WHERE lower(zs.name) = lower(a));
CREATE MACRO _pg.set_config(a, b, c) AS CASE WHEN lower(a) = 'search_path' AND b <> '' THEN error('set_config does not set search_path here: use SET') ELSE b END;
CREATE MACRO _pg.pg_backend_pid() AS 1;
CREATE MACRO _pg.pg_is_in_recovery() AS true;
CREATE MACRO _pg.pg_is_wal_replay_paused() AS false;
CREATE MACRO _pg.pg_last_wal_replay_lsn() AS (SELECT zp.checkpoint_lsn FROM rhei_target._rhei.pipeline zp);
CREATE MACRO _pg.pg_last_xact_replay_timestamp() AS (SELECT zp.checkpoint_time FROM rhei_target._rhei.pipeline zp);
CREATE MACRO _pg.pg_postmaster_start_time() AS now();
CREATE MACRO _pg.pg_conf_load_time() AS now();
CREATE MACRO _pg.pg_my_temp_schema() AS 0;
CREATE MACRO _pg.pg_export_snapshot() AS error('snapshots cannot be shared here: one connection is one snapshot');
CREATE MACRO _pg.pg_get_userbyid(x) AS 'rhei';
CREATE MACRO _pg.getdatabaseencoding() AS 'UTF8';
CREATE MACRO _pg.pg_encoding_to_char(a) AS 'UTF8';
CREATE MACRO _pg.pg_char_to_encoding(a) AS 6;
CREATE MACRO _pg.pg_table_is_visible(x) AS coalesce((SELECT zr.schema_name = 'public' FROM _pg.relations zr WHERE zr.oid = x), (SELECT zk.schema_name = 'public' FROM _pg.keys zk WHERE zk.oid = x), false);
CREATE MACRO _pg.pg_type_is_visible(x) AS true;
CREATE MACRO _pg.pg_function_is_visible(x) AS true;
CREATE MACRO _pg.pg_statistics_obj_is_visible(x) AS true;
CREATE MACRO _pg.pg_get_expr(a, b, c := false) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_indexdef(a, b := 0, c := false) AS (SELECT CASE WHEN b > 0 THEN zk.names[b] ELSE 'CREATE UNIQUE INDEX ' || zk.conname || ' ON ' || zk.schema_name || '.' || zk.relname || ' USING btree (' || array_to_string(zk.names, ', ') || ')' END FROM _pg.keys zk WHERE zk.oid = a);
CREATE MACRO _pg.pg_get_constraintdef(a, b := false) AS (SELECT CASE WHEN zk.is_primary THEN 'PRIMARY KEY (' ELSE 'UNIQUE (' END || array_to_string(zk.names, ', ') || ')' FROM _pg.keys zk WHERE zk.oid = a);
CREATE MACRO _pg.pg_get_viewdef(a, b := false) AS (SELECT any_value(zv.sql) FROM duckdb_views() zv WHERE zv.database_name = 'rhei_target' AND (100000 + zv.view_oid)::VARCHAR = a::VARCHAR);
CREATE MACRO _pg.pg_get_function_result(a) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_function_arguments(a) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_function_identity_arguments(a) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_functiondef(a) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_triggerdef(a, b := false) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_ruledef(a, b := false) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_partkeydef(a) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_statisticsobjdef_columns(a) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_get_serial_sequence(a, b) AS NULL::VARCHAR;
CREATE MACRO _pg.pg_relation_is_publishable(a) AS false;
CREATE MACRO _pg.pg_tablespace_location(a) AS '';
CREATE MACRO _pg.pg_tablespace_size(a) AS 0::BIGINT;
CREATE MACRO _pg.pg_database_size(a) AS 0::BIGINT;
CREATE MACRO _pg.pg_table_size(a) AS 0::BIGINT;
CREATE MACRO _pg.pg_total_relation_size(a) AS 0::BIGINT;
CREATE MACRO _pg.pg_relation_size(a) AS 0::BIGINT;
CREATE MACRO _pg.pg_indexes_size(a) AS 0::BIGINT;
CREATE MACRO _pg.pg_size_pretty(a) AS a::VARCHAR || ' bytes';
CREATE MACRO _pg.pg_options_to_table(a) AS NULL;
CREATE MACRO _pg.format_type(o, m) AS (SELECT CASE WHEN zt.typname = 'numeric' AND m > 4 THEN 'numeric(' || ((m - 4) // 65536) || ',' || ((m - 4) % 65536) || ')' ELSE zt.display END FROM _pg.types zt WHERE zt.oid = o);
CREATE MACRO _pg.obj_description(a, b := 'pg_class') AS (SELECT any_value(zr.comment) FROM _pg.relations zr WHERE zr.oid = a AND b = 'pg_class');
CREATE MACRO _pg.col_description(a, b) AS NULL::VARCHAR;
CREATE MACRO _pg.shobj_description(a, b) AS NULL::VARCHAR;
CREATE MACRO _pg.regclass(x) AS CAST(coalesce(
    (SELECT any_value(zr.oid) FROM _pg.relations zr WHERE replace(x::VARCHAR, '"', '') IN (zr.schema_name || '.' || zr.relname, CASE zr.schema_name WHEN 'public' THEN zr.relname END)),
    CASE replace(x::VARCHAR, 'pg_catalog.', '') WHEN 'pg_class' THEN 1259 WHEN 'pg_type' THEN 1247 WHEN 'pg_proc' THEN 1255 WHEN 'pg_namespace' THEN 2615 WHEN 'pg_trigger' THEN 2620 WHEN 'pg_constraint' THEN 2606 WHEN 'pg_database' THEN 1262 WHEN 'pg_attrdef' THEN 2604 WHEN 'pg_rewrite' THEN 2618 WHEN 'pg_authid' THEN 1260 WHEN 'pg_tablespace' THEN 1213 WHEN 'pg_extension' THEN 3079 END,
    try_cast(x AS UINTEGER),
    error('relation "' || x || '" does not exist')) AS UINTEGER);
CREATE MACRO _pg.to_regclass(a) AS (SELECT any_value(zr.oid) FROM _pg.relations zr WHERE replace(a, '"', '') IN (zr.schema_name || '.' || zr.relname, CASE zr.schema_name WHEN 'public' THEN zr.relname END));
CREATE MACRO _pg.to_regtype(a) AS (SELECT any_value(zt.oid) FROM _pg.types zt WHERE lower(a) IN (zt.typname, zt.display));
CREATE MACRO _pg.array_upper(a, d) AS len(a);
CREATE MACRO _pg.array_lower(a, d) AS 1;
-- As many as an array may reasonably have: the whole list is made in one step.
CREATE MACRO _pg.series_of_array(a, b) AS unnest(CASE WHEN a IS NULL OR b IS NULL THEN [] ELSE range(greatest(a, 0), least(b, 10000) + 1) END);
CREATE MACRO _pg.array_remove(a, b) AS list_filter(a, lambda zx: zx IS DISTINCT FROM b);
CREATE MACRO _pg._pg_expandarray(a) AS unnest(list_transform(range(1, len(a) + 1), lambda zi: {'x': a[zi], 'n': zi::INTEGER}));
CREATE MACRO _pg.parse_ident(a) AS list_transform(regexp_extract_all(a, '"([^"]|"")*"|[^".]+'), lambda zx: CASE WHEN zx[1] = '"' THEN replace(zx[2:-2], '""', '"') ELSE lower(zx) END);
CREATE MACRO _pg.quote_ident(a) AS CASE WHEN regexp_full_match(a, '[a-z_][a-z0-9_]*') THEN a ELSE '"' || replace(a, '"', '""') || '"' END;
CREATE MACRO _pg.has_database_privilege(a, b, c := '') AS true;
CREATE MACRO _pg.has_table_privilege(a, b, c := '') AS true;
CREATE MACRO _pg.has_schema_privilege(a, b, c := '') AS true;
CREATE MACRO _pg.has_any_column_privilege(a, b, c := '') AS true;
CREATE MACRO _pg.has_column_privilege(a, b, c, d := '') AS true;
CREATE MACRO _pg.has_function_privilege(a, b, c := '') AS true;
CREATE MACRO _pg.to_char(a, b) AS CASE
    WHEN regexp_full_match(b, '(YYYY|MM|DD|HH24|MI|SS|[-/:., ])*') THEN strftime(a, replace(replace(replace(replace(replace(replace(b, 'YYYY', '%Y'), 'MM', '%m'), 'DD', '%d'), 'HH24', '%H'), 'MI', '%M'), 'SS', '%S'))
    ELSE error('to_char knows only YYYY, MM, DD, HH24, MI and SS here: use strftime') END;
CREATE MACRO _pg.pg_advisory_unlock_all() AS NULL::VARCHAR;
-- For questions about sequences, of which there are none; elsewhere json_object takes its place.
CREATE MACRO _pg.json_build_object(a, b, c := NULL, d := NULL, e := NULL, f := NULL, g := NULL, h := NULL, i := NULL, j := NULL, k := NULL, l := NULL, m := NULL, n := NULL) AS NULL::JSON;
