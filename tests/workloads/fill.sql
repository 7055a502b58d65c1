-- Rows for tables that nobody knows: values by the type of each column, references to rows that exist. What a table refuses is left out.
CREATE SCHEMA filling;

-- Which rows are made up, by the text of their primary keys.
CREATE TABLE filling.rows (relation oid, key text, PRIMARY KEY (relation, key));

-- The name of the primary key, if that is one column.
CREATE FUNCTION filling.key_of(relation oid) RETURNS text LANGUAGE sql AS $$
  SELECT quote_ident(attname) FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
  WHERE indrelid = relation AND indisprimary AND indnkeyatts = 1
$$;

CREATE FUNCTION filling.value_of(relation oid, number smallint, type oid, modifier int) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  referenced text;
  base oid := type;
  kind record;
BEGIN
  SELECT format('(SELECT %I FROM %s ORDER BY random() LIMIT 1)', a.attname, c.confrelid::regclass) INTO referenced
    FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = c.confkey[array_position(c.conkey, number)]
    WHERE c.conrelid = relation AND c.contype = 'f' AND number = ANY (c.conkey) LIMIT 1;
  IF referenced IS NOT NULL THEN RETURN referenced; END IF;
  SELECT t.typname, t.typtype, t.typcategory INTO kind FROM pg_type t WHERE t.oid = base;
  IF kind.typtype = 'e' THEN
    RETURN (SELECT quote_literal(enumlabel) FROM pg_enum WHERE enumtypid = base ORDER BY random() LIMIT 1);
  END IF;
  RETURN CASE
    WHEN kind.typcategory = 'A' THEN '''{}'''
    WHEN kind.typname = 'int2' THEN '(random() * 30000)::int2'
    WHEN kind.typname IN ('int4', 'int8') THEN '(random() * 1000000000)::int'
    WHEN kind.typname = 'bool' THEN 'random() < 0.5'
    WHEN kind.typname IN ('text', 'varchar', 'bpchar') THEN
      format('left(md5(random()::text || i), %s)', CASE WHEN modifier > 4 THEN least(modifier - 4, 24) ELSE 24 END)
    WHEN kind.typname IN ('timestamp', 'timestamptz') THEN 'now() - random() * interval ''100 days'''
    WHEN kind.typname = 'date' THEN 'current_date - i'
    WHEN kind.typname = 'time' THEN 'localtime'
    WHEN kind.typname IN ('numeric', 'float4', 'float8') THEN 'random() * 0.9'
    WHEN kind.typname = 'uuid' THEN 'gen_random_uuid()'
    WHEN kind.typname IN ('json', 'jsonb') THEN '''{"a": ["b", 1.50, null]}'''
    WHEN kind.typname = 'bytea' THEN '''\x80049528''::bytea'
    WHEN kind.typname = 'interval' THEN 'interval ''1 month 30 days'''
    WHEN kind.typname = 'inet' THEN '''10.0.0.1''::inet'
    WHEN kind.typname = 'tsvector' THEN 'to_tsvector(''simple'', ''some words'')'
  END;
END $$;

-- Inserts, updates and deletes some rows of every table of `public` that is not the application's own record of its migrations.
CREATE FUNCTION filling.fill(wanted int) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  relation record;
  names text;
  vals text;
  changed text;
BEGIN
  -- A refusal has to come while it can be caught.
  SET CONSTRAINTS ALL IMMEDIATE;
  FOR relation IN
    SELECT oid, oid::regclass AS name FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname !~ '^(django_|alembic_|auth_permission$)' ORDER BY oid
  LOOP
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum), string_agg(value, ', ' ORDER BY attnum),
           min(format('%I = %s', attname, value)) FILTER (WHERE typcategory = 'S' AND value LIKE 'left(%')
      INTO names, vals, changed
      FROM (SELECT attname, attnum, typcategory, filling.value_of(attrelid, attnum, atttypid, atttypmod) AS value
            FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
            WHERE attrelid = relation.oid AND attnum > 0 AND NOT attisdropped AND attidentity = '' AND attgenerated = ''
              AND NOT (atthasdef AND pg_get_serial_sequence(relation.name::text, attname) IS NOT NULL)) columns
      WHERE value IS NOT NULL;
    CONTINUE WHEN names IS NULL OR filling.key_of(relation.oid) IS NULL;
    BEGIN
      EXECUTE format('WITH new AS (INSERT INTO %s (%s) SELECT %s FROM generate_series(1, %s) i RETURNING %s::text AS key)
                      INSERT INTO filling.rows SELECT %s, key FROM new',
                     relation.name, names, vals, wanted, filling.key_of(relation.oid), relation.oid);
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
    BEGIN
      EXECUTE format('UPDATE %s SET %s FROM generate_series(1, 1) i WHERE %s::text IN (SELECT key FROM filling.rows WHERE relation = %s ORDER BY random() LIMIT 2)',
                     relation.name, changed, filling.key_of(relation.oid), relation.oid);
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
    BEGIN
      EXECUTE format('DELETE FROM %s WHERE %s::text IN (SELECT key FROM filling.rows WHERE relation = %s ORDER BY random() LIMIT 1)',
                     relation.name, filling.key_of(relation.oid), relation.oid);
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
  END LOOP;
END $$;

-- For a migration that does not get along with rows that were made up.
CREATE FUNCTION filling.empty() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  relation record;
BEGIN
  -- In any order.
  SET LOCAL session_replication_role = replica;
  FOR relation IN
    SELECT oid, oid::regclass AS name, filling.key_of(oid) AS key FROM pg_class
    WHERE oid IN (SELECT rows.relation FROM filling.rows) AND filling.key_of(oid) IS NOT NULL
  LOOP
    EXECUTE format('DELETE FROM %s WHERE %s::text IN (SELECT key FROM filling.rows WHERE relation = %s)',
                   relation.name, relation.key, relation.oid);
  END LOOP;
  DELETE FROM filling.rows;
END $$;
