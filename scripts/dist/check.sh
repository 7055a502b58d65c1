#!/usr/bin/env bash
# Tries a package as its users will: in bare trees of Debian 12 and 13, under systemd, and as an image.
#
#   scripts/dist/check.sh [ARCHIVE]      dist/rhei-*.tar.gz unless given
#
# In a tree there is nothing but Debian's minimal system, so what the package lacks is missing there. Needs root and debootstrap;
# without them it says so and does nothing. Trees are made once, and kept in the cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/env.sh
. scripts/dist/trees.sh
need_trees

archive="$(find_archive "${1:-}")"
readonly suites=(bookworm trixie)
readonly secret="hush 4711"

# What is in the archive besides the binary.
check_contents() { # tree
  local root="$1/usr/local" doc="$1/usr/local/share/doc/rhei" file
  for file in bin/rhei share/man/man1/rhei.1 share/man/man1/rhei-sync.1 share/bash-completion/completions/rhei \
    share/zsh/site-functions/_rhei share/fish/vendor_completions.d/rhei.fish lib/systemd/system/rhei.service \
    lib/sysusers.d/rhei.conf; do
    [ -s "$root/$file" ] || fail "$file is missing"
  done
  for file in README.md LICENSE rhei.toml.example docs/quickstart.md rhei.cdx.json licences.txt cargo-deny.txt Cargo.lock; do
    [ -s "$doc/$file" ] || fail "share/doc/rhei/$file is missing"
  done
  bash -n "$root/share/bash-completion/completions/rhei"
  # All that is linked has its licence, and its place in the list.
  python3 - "$doc" <<'PYTHON'
import json, pathlib, sys
doc = pathlib.Path(sys.argv[1])
components = json.loads((doc / "rhei.cdx.json").read_text())["components"]
licences = (doc / "licences.txt").read_text()
for part in components:
    if part["scope"] == "required" and f"{part['name']} {part['version']}" not in licences:
        if part["name"] != "duckdb" or f"DuckDB {part['version']}" not in licences:
            sys.exit(f"{part['name']} {part['version']} has no licence in licences.txt")
names = {part["name"] for part in components}
assert {"duckdb", "arrow", "tokio", "rustls"} <= names, names
PYTHON
  if grep -q '^advisories NOT checked' "$doc/cargo-deny.txt"; then say "the package says that advisories were not checked"; fi
}

# The library is found in the package, wherever that was unpacked.
check_library() { # tree
  local libraries
  in_tree "$1" rhei --version || fail "rhei --version"
  libraries="$(in_tree "$1" env LD_TRACE_LOADED_OBJECTS=1 rhei)"
  case "$libraries" in *"not found"*) fail "a library is missing: $libraries" ;; esac
  [ ! -f "$1/usr/local/lib/rhei/libduckdb.so" ] ||
    grep -q 'libduckdb.so => /usr/local/bin/../lib/rhei/libduckdb.so' <<<"$libraries" || fail "libduckdb is not that of the package: $libraries"
}

# Waits for a command to be true, for a minute.
until_true() { # what, command
  local what="$1"
  shift
  for _ in $(seq 300); do if "$@" >/dev/null 2>&1; then return; fi; sleep 0.2; done
  fail "$what"
}

endpoint=0
ask() { "$(postgres_bin)/psql" -XAt "host=127.0.0.1 port=$endpoint dbname=shop user=anybody" -c "$1"; }

# sync, run and serve, with readers on the network of this machine.
check_commands() { # tree
  local tree="$1" slot="check_$RANDOM" copied rhei pid
  endpoint=$((40000 + RANDOM % 20000))
  install -m 0600 /dev/stdin "$tree/root/password" <<<"$secret"
  cat >"$tree/root/rhei.toml" <<TOML
[source]
url = "postgresql://rhei@127.0.0.1:$port/shop"
password_file = "/root/password"
slot = "$slot"
[target]
path = "/root/shop.duckdb"
[serve]
listen = "127.0.0.1:$endpoint"
TOML
  enter "$tree"
  rhei=("${entered[@]}" rhei --config /root/rhei.toml)

  "${rhei[@]}" check >/dev/null || fail "rhei check"
  "${rhei[@]}" --quiet sync || fail "rhei sync"
  copied="$("${rhei[@]}" query --format csv 'SELECT count(*) AS n FROM orders' | tail -n 1)"
  [ "$copied" = "$(psql_admin -d shop -Atc 'SELECT count(*) FROM orders')" ] || fail "rhei sync copied $copied orders"

  "${rhei[@]}" run >"$work/run.log" 2>&1 &
  pid=$!
  until_true "rhei run lets readers in" ask 'SELECT 1'
  psql_admin -d shop -c "INSERT INTO orders VALUES ($RANDOM + 1000000, 1, '$slot', 1, now())"
  "${rhei[@]}" wait --now --timeout 60s >/dev/null || fail "rhei wait"
  [ "$(ask "SELECT count(*) FROM orders WHERE status = '$slot'")" = 1 ] || fail "rhei run did not bring what was written"
  "${rhei[@]}" --quiet status --running || fail "rhei status --running"
  kill "$pid"
  wait "$pid" || { cat "$work/run.log" >&2; fail "rhei run ended with $?"; }

  "${rhei[@]}" serve >"$work/serve.log" 2>&1 &
  pid=$!
  until_true "rhei serve lets readers in" ask 'SELECT 1'
  [ "$(ask "SELECT count(*) FROM orders WHERE status = '$slot'")" = 1 ] || fail "rhei serve shows another copy"
  psql_admin -d shop -c "SELECT pg_drop_replication_slot('$slot')" >/dev/null
  kill "$pid"
  wait "$pid" || { cat "$work/serve.log" >&2; fail "rhei serve ended with $?"; }
}

# The unit, by the systemd of the tree.
check_unit() { # tree with systemd
  in_tree "$1" systemd-analyze verify --man=no /usr/local/lib/systemd/system/rhei.service || fail "systemd-analyze verify"
  in_tree "$1" systemd-analyze security --no-pager --offline=true --threshold=29 /usr/local/lib/systemd/system/rhei.service \
    >"$work/security" || { cat "$work/security" >&2; fail "systemd-analyze security"; }
  tail -n 1 "$work/security"
}

begin_work
start_postgres
psql_admin -d shop -c "CREATE ROLE rhei LOGIN REPLICATION PASSWORD '$secret'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO rhei;
  CREATE PUBLICATION rhei FOR TABLE orders, customers"

for suite in "${suites[@]}"; do
  say "$suite: a bare tree"
  tree="$(fresh_tree "$suite" "$suite")"
  tar -C "$tree/usr/local" --strip-components=1 -xzf "$archive"
  check_contents "$tree"
  check_library "$tree"
  check_commands "$tree"

  say "$suite: the unit"
  tree="$(fresh_tree "$suite-systemd" "$suite" systemd,systemd-sysv,dbus,ca-certificates)"
  tar -C "$tree/usr/local" --strip-components=1 -xzf "$archive"
  check_unit "$tree"
done

say "passed"
