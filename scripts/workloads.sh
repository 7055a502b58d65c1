#!/usr/bin/env bash
# Follows the migration histories of two applications, forwards and back, with rows in their tables (docs/testing.md).
# Installs both, each in an environment of its own, from the package index that pip is configured for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh

folder="$RHEI_CACHE/workloads"

install() { # name of the environment, packages
  local environment="$folder/$1"
  shift
  [ -f "$environment/installed" ] && [ "$(cat "$environment/installed")" = "$*" ] && return 0
  echo "workloads: installing $*" >&2
  rm -rf "$environment"
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check "$@" >&2
  echo "$*" >"$environment/installed"
}

install wagtail "wagtail==7.0.10" "psycopg[binary]==3.3.9"
install airflow "apache-airflow==2.10.5" "psycopg2-binary==2.9.13"

RHEI_WORKLOADS="$folder" exec cargo test --locked $RHEI_CARGO_FEATURES --test it -- --ignored --nocapture workloads::
