"""Clients of other languages and libraries: each asks the source and its copy the same, and gets the same.

Called by the test `clients_of_python_get_what_the_source_gives`, which makes the tables:
    clients.py SOURCE_DSN COPY_DSN
Prints a line for each client; exits with 1 when one of them fails. A client that is not installed is named.
"""

import asyncio
import datetime
import decimal
import sys

SOURCE, COPY = sys.argv[1], sys.argv[2]

COLUMNS = "id, b, i2, i4, i8, f4, f8, n, t, bs, d, ts, tstz, u, iv, ia, ta"
ALL = f"SELECT {COLUMNS} FROM typed ORDER BY id"
ONE = f"SELECT {COLUMNS} FROM typed WHERE i8 = {{}} AND n = {{}} AND t = {{}} AND d = {{}}"
VALUES = (7_000_000_000, decimal.Decimal("12.50"), 'a "b", c', datetime.date(2024, 2, 29))


def same(ask):
    """Asks both, and returns how many rows there were."""
    theirs, ours = ask(SOURCE), ask(COPY)
    different = [pair for pair in zip(theirs, ours) if pair[0] != pair[1]]
    if different and isinstance(different[0][0], dict):
        different = [{k: (v, ours[k]) for k, v in theirs.items() if v != ours[k]} for theirs, ours in different]
    assert theirs == ours, f"{len(theirs)} and {len(ours)} results, of which differ: {different}"
    return len(ours)


def psycopg_3():
    import psycopg

    def ask(dsn):
        rows = []
        with psycopg.connect(dsn) as connection:
            for binary in (False, True):
                cursor = connection.cursor(binary=binary)
                rows += cursor.execute(ALL).fetchall()
                for prepare in (False, True):
                    rows += cursor.execute(ONE.format(*["%s"] * 4), VALUES, prepare=prepare).fetchall()
            with connection.cursor(name="reading") as cursor:
                cursor.itersize = 2
                rows += list(cursor.execute(ALL))
            with connection.pipeline():
                first = connection.execute("SELECT count(*) FROM typed")
                second = connection.execute("SELECT id FROM typed WHERE id = ANY(%s) ORDER BY id", ([1, 2],))
                rows += first.fetchall() + second.fetchall()
            for form in ("text", "binary", "csv"):
                with connection.cursor().copy(f"COPY (SELECT id, t, n FROM typed ORDER BY id) TO STDOUT (FORMAT {form})") as lines:
                    rows.append(b"".join(bytes(line) for line in lines))
        return rows

    return same(ask)


def psycopg_2():
    import psycopg2

    def ask(dsn):
        connection = psycopg2.connect(dsn)
        cursor = connection.cursor()
        cursor.execute(ALL)
        rows = cursor.fetchall()
        cursor.execute(ONE.format(*["%s"] * 4), VALUES)
        rows += cursor.fetchall()
        named = connection.cursor("reading")
        named.execute(ALL)
        rows += named.fetchall()
        return [[bytes(v) if isinstance(v, memoryview) else v for v in row] for row in rows]

    return same(ask)


def asyncpg():
    import asyncpg

    async def asked(dsn):
        connection = await asyncpg.connect(dsn)
        rows = [tuple(row) for row in await connection.fetch(ALL)]
        question = ONE.format("$1", "$2", "$3", "$4")
        rows += [tuple(row) for row in await connection.fetch(question, *VALUES)]
        rows.append(await connection.fetchval("SELECT $1::int8[]", [1, None, 3]))
        async with connection.transaction(readonly=True):
            async for row in connection.cursor(ALL, prefetch=2):
                rows.append(tuple(row))
        await connection.close()
        return rows

    return same(lambda dsn: asyncio.run(asked(dsn)))


def pg8000():
    import urllib.parse

    import pg8000.native

    def ask(dsn):
        url = urllib.parse.urlparse(dsn)
        connection = pg8000.native.Connection(url.username, host=url.hostname, port=url.port, database=url.path[1:])
        rows = connection.run(ALL)
        names = [":a", ":b", ":c", ":d"]
        return rows + connection.run(ONE.format(*names), a=VALUES[0], b=VALUES[1], c=VALUES[2], d=VALUES[3])

    return same(ask)


def sqlalchemy_reflection():
    import sqlalchemy

    def ask(dsn):
        engine = sqlalchemy.create_engine(dsn.replace("postgresql://", "postgresql+psycopg://"))
        inspector = sqlalchemy.inspect(engine)
        found = [sorted(inspector.get_table_names()), inspector.get_pk_constraint("typed")["constrained_columns"]]
        found.append([(c["name"], str(c["type"])) for c in inspector.get_columns("typed")])
        metadata = sqlalchemy.MetaData()
        metadata.reflect(engine, only=["typed"])
        table = metadata.tables["typed"]
        with engine.connect() as connection:
            query = sqlalchemy.select(table.c.id, table.c.n).where(table.c.i4 > 0).order_by(table.c.id)
            found += [tuple(row) for row in connection.execute(query)]
        return found

    return same(ask)


def pandas():
    import pandas
    import sqlalchemy

    def ask(dsn):
        engine = sqlalchemy.create_engine(dsn.replace("postgresql://", "postgresql+psycopg2://"))
        return pandas.read_sql("SELECT i4 > 0 AS positive, sum(n) AS n FROM typed WHERE id < 10 GROUP BY 1 ORDER BY 1", engine).to_dict("list")["n"]

    return same(ask)


def adbc():
    import adbc_driver_postgresql.dbapi

    def ask(dsn):
        with adbc_driver_postgresql.dbapi.connect(dsn) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT id, b, i2, i4, i8, f4, f8, t, bs, d, ts, tstz, ia FROM typed ORDER BY id")
            return cursor.fetch_arrow_table().to_pylist()

    return same(ask)


def duckdb_attach():
    import glob
    import os

    import duckdb

    packages = os.path.dirname(os.path.dirname(duckdb.__file__))
    extension = glob.glob(f"{packages}/**/postgres_scanner*.duckdb_extension*", recursive=True)
    if not extension:
        raise ImportError("duckdb-extension-postgres-scanner")

    def ask(dsn):
        connection = duckdb.connect()
        connection.execute(f"LOAD '{extension[0]}'")
        connection.execute(f"ATTACH '{dsn}' AS live (TYPE postgres, READ_ONLY)")
        rows = connection.execute(f"SELECT {COLUMNS} FROM live.public.typed ORDER BY id").fetchall()
        rows += connection.execute("SELECT count(*), sum(n), max(t) FROM live.public.typed WHERE i4 > 0").fetchall()
        return rows + connection.execute("FROM postgres_query('live', 'SELECT 42 AS x')").fetchall()

    return same(ask)


CLIENTS = [psycopg_3, psycopg_2, asyncpg, pg8000, sqlalchemy_reflection, pandas, adbc, duckdb_attach]

failed = False
for client in CLIENTS:
    try:
        print(f"ok       {client.__name__}: {client()} results")
    except ImportError as missing:
        print(f"missing  {client.__name__}: {missing}")
    except Exception as error:
        failed = True
        print(f"FAILED   {client.__name__}: {type(error).__name__} {str(error)[:2000]}")
sys.exit(failed)
