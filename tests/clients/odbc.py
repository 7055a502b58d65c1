"""Asks a server through psqlODBC and prints each answer: the source and its copy have to print the same."""

import sys
import urllib.parse

import pyodbc

url = urllib.parse.urlparse(sys.argv[1])
settings = (
    f"DRIVER={{PostgreSQL Unicode}};SERVER={url.hostname};PORT={url.port};"
    f"DATABASE={url.path[1:]};UID={url.username};PWD=x;BoolsAsChar=0"
)
failed = False


def ask(name, question):
    global failed
    try:
        print(f"{name}: {question()}")
    except Exception as error:  # noqa: BLE001: every question is asked
        print(f"{name} FAILED: {str(error)[:300]}")
        failed = True


connection = pyodbc.connect(settings, autocommit=True)
columns = "id, b, i2, i4, i8, f4, f8, n, t, bs, d, ts, tstz, u, iv, ia, ta"
cursor = connection.cursor
ask("all", lambda: cursor().execute(f"SELECT {columns} FROM typed ORDER BY id").fetchall())
ask(
    "parameters",
    lambda: cursor().execute("SELECT id, n, ts FROM typed WHERE i8 = ? AND t = ?", 7_000_000_000, 'a "b", c').fetchall(),
)
ask("tables", lambda: [row.table_name for row in cursor().tables(tableType="TABLE", schema="public")])
ask("columns", lambda: [(row.column_name, row.type_name, row.nullable) for row in cursor().columns(table="typed")])
ask("keys", lambda: [(row.column_name, row.key_seq, row.pk_name) for row in cursor().primaryKeys(table="typed")])
ask("indexes", lambda: [(row.index_name, row.column_name, row.non_unique) for row in cursor().statistics(table="typed")])
ask("foreign keys", lambda: list(cursor().foreignKeys(table="typed")))
ask("types", lambda: [row.type_name for row in cursor().getTypeInfo()])
fetching = pyodbc.connect(settings + ";UseDeclareFetch=1;Fetch=3")
ask("cursor", lambda: fetching.cursor().execute("SELECT id, t FROM typed ORDER BY id").fetchall())
sys.exit(1 if failed else 0)
