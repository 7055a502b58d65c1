#!/usr/bin/env bash
# Runs the integration tests against every supported Postgres major, and names those that failed at the end.
#   scripts/test-matrix.sh [TEST-NAME]        RHEI_TEST_MAJORS="16 18" narrows it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh matrix
. scripts/env.sh

# Builds once; every major runs the same binary.
# shellcheck disable=SC2086
cargo test --locked $RHEI_CARGO_FEATURES --test it --no-run

failed=()
for major in ${RHEI_TEST_MAJORS:-14 15 16 17 18}; do
  bin=
  for folder in "$RHEI_PG_CACHE/$major".*/native/bin "/usr/lib/postgresql/$major/bin"; do
    if [ -x "$folder/initdb" ]; then bin="$folder"; fi
  done
  if [ -z "$bin" ]; then
    echo "== Postgres $major: not installed, skipped =="
    continue
  fi
  echo "== Postgres $major: $bin =="
  # shellcheck disable=SC2086
  RHEI_TEST_PG_MAJOR="$major" RHEI_TEST_PG_BIN="$bin" \
    cargo test --locked $RHEI_CARGO_FEATURES --test it -- "$@" </dev/null || failed+=("$major")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed on Postgres: ${failed[*]}" >&2
  exit 1
fi
echo "passed on every major that is installed"
