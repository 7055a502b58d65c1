#!/bin/sh
# Installs clients of Python into a folder of their own, and runs the test that holds them against the source.
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

RHEI_TEST_CLIENTS="$venv/bin/python" cargo test --locked ${RHEI_CARGO_FEATURES:-} --test it -- --nocapture \
    --ignored serve::clients::clients_of_python
