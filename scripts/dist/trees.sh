# shellcheck shell=bash
# Bare trees of Debian to try packages in, and a throwaway Postgres beside them. Sourced; needs root.

# With the network of this machine: a server on loopback is on loopback in a tree, too.

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }
fail() { say "FAILED: $*"; exit 1; }

# Says why nothing is tried, and ends well, where trees cannot be made.
need_trees() {
  [ "$(id -u)" = 0 ] || { say "SKIPPED: only root can make trees of Debian"; exit 0; }
  command -v debootstrap >/dev/null || { say "SKIPPED: debootstrap is missing (scripts/setup.sh ci)"; exit 0; }
}

work=""
tidy() {
  local mounted
  stop_postgres
  [ -n "$work" ] || return 0
  # What lies below the folder of a tree that is still mounted is not of this folder.
  for mounted in $(awk -v at="$work/" 'index($2, at) == 1 { print $2 }' /proc/mounts | sort -r); do umount -l "$mounted"; done
  rm -rf --one-file-system "$work"
}
begin_work() {
  work="$(mktemp -d)"
  chmod 0755 "$work"
  trap tidy EXIT
}

# The archive that this machine installs from.
mirror() {
  local found="${RHEI_DEBIAN_MIRROR:-}"
  [ -n "$found" ] || found="$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Identifier: Packages' 2>/dev/null | head -n 1)"
  [ -n "$found" ] || { apt-get update -qq >&2; found="$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Identifier: Packages' | head -n 1)"; }
  printf '%s' "${found:?no archive of Debian is configured; RHEI_DEBIAN_MIRROR names one}"
}

# make_tree NAME SUITE [PACKAGES]: a tree in the cache, made once; prints its folder.
make_tree() {
  local folder="$RHEI_CACHE/trees/$1" suite="$2" packages="${3:-}" log
  if [ ! -d "$folder" ]; then
    say "making a bare tree of Debian ($1), once"
    mkdir -p "$RHEI_CACHE/trees"
    rm -rf --one-file-system "$folder.part"
    log="$folder.log"
    debootstrap --variant=minbase ${packages:+--include="$packages"} "$suite" "$folder.part" "$(mirror)" >"$log" 2>&1 </dev/null ||
      { tail -n 20 "$log" >&2; fail "debootstrap of $1"; }
    rm -rf "$folder.part"/var/cache/apt/archives/*.deb
    mv "$folder.part" "$folder"
  fi
  printf '%s' "$folder"
}

# fresh_tree NAME SUITE [PACKAGES]: a copy of the tree that may be written to; prints its folder.
fresh_tree() {
  local from copy="$work/$1.$RANDOM"
  from="$(make_tree "$@")"
  cp -a --reflink=auto "$from" "$copy"
  cp -L /etc/resolv.conf "$copy/etc/resolv.conf" 2>/dev/null || true
  printf '%s' "$copy"
}

# enter FOLDER: sets `entered`, the beginning of a command that runs in a tree, with the tree's own environment. The process of
# such a command is the command itself, so a signal reaches it.
enter() {
  # The mounts end with the process.
  # shellcheck disable=SC2016,SC2034
  entered=(unshare --mount --propagation private sh -c 'mount -t proc proc "$0/proc" && folder="$0" && exec env -i \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 chroot "$folder" "$@"' "$1")
}
in_tree() { # folder, command
  enter "$1"
  "${entered[@]}" "${@:2}"
}

postgres_bin() {
  local folder
  for folder in "$(pg_config --bindir 2>/dev/null)" /usr/lib/postgresql/*/bin; do
    if [ -x "$folder/initdb" ] && [ -x "$folder/pg_ctl" ]; then printf '%s' "$folder"; return; fi
  done
  fail "no Postgres server was found (scripts/setup.sh)"
}

port=""
as_postgres() { (cd / && runuser -u postgres -- "$@"); }
psql_admin() { "$(postgres_bin)/psql" -X -q -v ON_ERROR_STOP=1 -h 127.0.0.1 -p "$port" -U postgres "$@"; }

# A server on loopback, with a database `shop` of a shop that is in use. Only `rhei` needs a password.
start_postgres() {
  local data="$work/postgres" bin
  bin="$(postgres_bin)"
  mkdir "$data"
  chown postgres "$data"
  as_postgres "$bin/initdb" -D "$data/cluster" -U postgres -A trust -E UTF8 --locale=C --no-sync >/dev/null
  printf 'host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n' >"$data/cluster/pg_hba.conf"
  for _ in 1 2 3 4 5; do
    port=$((20000 + RANDOM % 20000))
    if as_postgres "$bin/pg_ctl" -D "$data/cluster" -s -w -l "$data/log" -o "-p $port -c listen_addresses=127.0.0.1 \
      -c unix_socket_directories= -c wal_level=logical -c fsync=off" start 2>/dev/null; then break; fi
    port=""
  done
  [ -n "$port" ] || { cat "$data/log" >&2; fail "Postgres did not start"; }
  psql_admin -d postgres -c 'CREATE DATABASE shop'
  psql_admin -d shop <<'SQL'
CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE orders (id bigint PRIMARY KEY, customer int REFERENCES customers, status text, total numeric(12,2), placed timestamptz);
INSERT INTO customers SELECT i, 'customer ' || i FROM generate_series(1, 10000) i;
INSERT INTO orders SELECT i, 1 + i % 10000, (ARRAY['open', 'paid', 'sent'])[1 + i % 3], i % 1000 + 0.99, now()
FROM generate_series(1, 200000) i;
SQL
}

stop_postgres() {
  [ -n "$port" ] || return 0
  as_postgres "$(postgres_bin)/pg_ctl" -D "$work/postgres/cluster" -s -m immediate stop || true
  port=""
}

# The archive to try: the first argument, or the newest in dist/.
find_archive() {
  local archive="${1:-}"
  # shellcheck disable=SC2012
  [ -n "$archive" ] || archive="$(ls -t dist/rhei-*.tar.gz 2>/dev/null | head -n 1)"
  [ -f "$archive" ] || fail "there is no archive to try; \`make dist\` makes one"
  printf '%s' "$archive"
}
