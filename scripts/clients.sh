#!/bin/sh
# Installs clients of Python and of Node into a folder of their own, and runs the tests that hold them, JDBC and psqlODBC against
# the source. What cannot be had is named; on Debian, libpostgresql-jdbc-java, odbc-postgresql and npm bring the rest.
set -eu
cd "$(dirname "$0")/.."
. scripts/env.sh

venv="${RHEI_CLIENTS:-${XDG_CACHE_HOME:-$HOME/.cache}/rhei/clients}"
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet \
        'duckdb==1.5.5' 'duckdb-extension-postgres-scanner==1.5.5' 'psycopg[binary]' psycopg2-binary asyncpg pg8000 \
        sqlalchemy pandas adbc-driver-postgresql pyarrow pytz
fi

export RHEI_TEST_CLIENTS="$venv/bin/python"

# pyodbc needs unixodbc, and the driver a name there.
if ls /usr/lib/*/odbc/psqlodbcw.so >/dev/null 2>&1; then
    "$venv/bin/python" -c 'import pyodbc' 2>/dev/null || "$venv/bin/pip" install --quiet pyodbc || true
    "$venv/bin/python" -c 'import pyodbc' 2>/dev/null && export RHEI_TEST_ODBC="$venv/bin/python"
fi
if command -v java >/dev/null && [ -e /usr/share/java/postgresql.jar ]; then
    export RHEI_TEST_JDBC=/usr/share/java/postgresql.jar
fi
if command -v npm >/dev/null; then
    [ -d "$venv/node/node_modules/pg-cursor" ] ||
        (mkdir -p "$venv/node" && cd "$venv/node" && npm install --silent pg pg-cursor >/dev/null) || true
    [ -d "$venv/node/node_modules/pg-cursor" ] && export RHEI_TEST_NODE="$venv/node/node_modules"
fi

cargo test --locked ${RHEI_CARGO_FEATURES:-} --test it -- --nocapture --ignored serve::clients::
