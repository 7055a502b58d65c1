#!/usr/bin/env bash
# Measures the first copy. DuckDB's postgres extension takes part when it can be fetched: from PyPI, where DuckDB publishes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh

readonly version=1.5.5
readonly folder="$RHEI_CACHE/extensions-$version"
if [ -z "${RHEI_POSTGRES_EXTENSION:-}" ] && command -v python3 >/dev/null; then
  if ! ls "$folder"/*.duckdb_extension >/dev/null 2>&1; then
    mkdir -p "$folder"
    if python3 -m pip download --quiet --no-deps --dest "$folder" "duckdb-extension-postgres-scanner==$version" </dev/null; then
      (cd "$folder" && python3 -m zipfile -e ./*.whl . && find . -name '*.duckdb_extension*' -type f -exec mv {} . \;)
      for packed in "$folder"/*.gz; do if [ -f "$packed" ]; then gunzip -f "$packed"; fi; done
    fi
  fi
  for found in "$folder"/*.duckdb_extension; do
    if [ -f "$found" ]; then export RHEI_POSTGRES_EXTENSION="$found"; fi
  done
fi
# shellcheck disable=SC2086
exec cargo bench --locked $RHEI_CARGO_FEATURES --bench backfill
