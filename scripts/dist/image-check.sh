#!/usr/bin/env bash
# Builds the image where Docker is; where it is not, runs the steps of the Dockerfile's last stage in a bare tree of Debian 12,
# with the files of an archive for what the first stage builds, and then what the image runs, as the image's user.
#
#   scripts/dist/image-check.sh [ARCHIVE]      dist/rhei-*.tar.gz unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/env.sh
. scripts/dist/trees.sh

if docker info >/dev/null 2>&1; then
  docker build --quiet --build-arg COMMIT="$(git rev-parse HEAD)" -t rhei:check .
  docker run --rm rhei:check --version
  say "passed: the image was built"
  exit 0
fi
need_trees

archive="$(find_archive "${1:-}")"
begin_work
start_postgres
tree="$(fresh_tree bookworm bookworm)"
mkdir "$work/out"
tar -C "$work/out" --strip-components=1 -xzf "$archive"

# The instructions of the last stage, each on one line: the lines that end in a backslash joined, comments left out.
sed -e '/^#/d' Dockerfile | sed -e ':more' -e '/\\$/{N;s/\\\n[[:space:]]*//;b more' -e '}' |
  awk '/^FROM / { stage = "" } NF { stage = stage $0 "\n" } END { printf "%s", stage }' >"$work/steps"

user="" folder=/ health="" entry="" command="" signal=TERM
variables=()
enter "$tree"
# ["a", "b"] as the words a b; none of ours holds a space.
words() { tr -d '[]",' <<<"$1"; }

while read -r instruction rest; do
  say "$instruction $rest"
  case "$instruction" in
    FROM) [ "$rest" = debian:bookworm-slim ] || fail "the tree is of bookworm, and the image is $rest" ;;
    RUN) "${entered[@]}" env DEBIAN_FRONTEND=noninteractive sh -euc "$rest" >"$work/run.log" 2>&1 </dev/null || { cat "$work/run.log"; fail "RUN $rest"; } ;;
    COPY)
      [ "$rest" = "--from=build /out/usr/local/ /usr/local/" ] || fail "this does not know how to COPY $rest"
      cp -R "$work/out/." "$tree/usr/local/"
      ;;
    ENV) variables+=("$rest") ;;
    WORKDIR) folder="$rest" ;;
    USER) user="$rest" ;;
    HEALTHCHECK) health="$(words "${rest#*CMD }")" ;;
    ENTRYPOINT) entry="$(words "$rest")" ;;
    CMD) command="$(words "$rest")" ;;
    STOPSIGNAL) signal="${rest#SIG}" ;;
    VOLUME | EXPOSE) ;;
    *) fail "this does not know $instruction" ;;
  esac
done <"$work/steps"
[ -n "$user" ] && [ "${user%%:*}" != 0 ] || fail "the image runs as root"

psql_admin -d shop -c "CREATE ROLE rhei LOGIN REPLICATION PASSWORD 'hush'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO rhei;
  CREATE PUBLICATION rhei FOR TABLE orders, customers"
variables+=("RHEI_SOURCE_URL=postgresql://rhei@127.0.0.1:$port/shop" "PGPASSWORD=hush")

# As the image does: its user without any right, its variables, its folder.
inside=("${entered[@]}" setpriv --reuid "${user%%:*}" --regid "${user##*:}" --clear-groups --no-new-privs --inh-caps=-all
  --bounding-set=-all env "${variables[@]}" sh -c "cd $folder && exec \"\$@\"" -)

# shellcheck disable=SC2086
if "${inside[@]}" $health 2>/dev/null; then fail "the health check passes although nothing runs"; fi
# shellcheck disable=SC2086
"${inside[@]}" $entry $command >"$work/run.log" 2>&1 &
pid=$!
is_healthy=no
for _ in $(seq 300); do
  # shellcheck disable=SC2086
  if "${inside[@]}" $health 2>/dev/null; then is_healthy=yes; break; fi
  sleep 0.2
done
[ "$is_healthy" = yes ] || { cat "$work/run.log" >&2; fail "the health check does not pass"; }
"${inside[@]}" rhei wait --now --settled --timeout 60s >/dev/null || { cat "$work/run.log" >&2; fail "rhei wait"; }
"${inside[@]}" rhei status | grep -q 'public.orders *live *200000' || fail "the orders are not there"
kill -s "$signal" "$pid"
wait "$pid" || { cat "$work/run.log" >&2; fail "the image ended with $?"; }
[ "$(stat -c %u "$tree/data/copy.duckdb")" = "${user%%:*}" ] || fail "the copy belongs to somebody else"
say "passed: the steps of the last stage, in a tree"
