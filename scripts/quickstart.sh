#!/usr/bin/env bash
# Replays docs/quickstart.md, as it is written, in a bare Debian that is booted under systemd, and says how long each step took.
#
#   scripts/quickstart.sh [ARCHIVE [SUITE]]     dist/rhei-*.tar.gz and trixie (Debian 13) unless given
#
# Every block of `sh` of the page runs in one shell, in order; one that fails ends the replay. Of what the page says only the
# address of the database is replaced, and the name of the archive. Then the service is looked at: is it what its unit says, and
# does it come back when it is killed and when it hangs.
#
# Needs root, debootstrap and systemd-nspawn; without them it says so and does nothing. RHEI_QUICKSTART_TIMES names a file that
# gets the table of times.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
. scripts/dist/trees.sh
need_trees
command -v systemd-nspawn >/dev/null || { say "SKIPPED: systemd-nspawn is missing (scripts/setup.sh ci)"; exit 0; }

archive="$(find_archive "${1:-}")"
suite="${2:-trixie}"
begin_work
start_postgres
tree="$(fresh_tree "$suite-systemd" "$suite" systemd,systemd-sysv,dbus,ca-certificates)"
mkdir "$tree/root/replay"
cp "$archive" "$tree/root/"

# The blocks of the page, each under its heading.
awk -v port="$port" -v archive="$(basename "$archive")" '
  function quoted(text) { gsub("\047", "\047\\\047\047", text); return "\047" text "\047" }
  /^## / { heading = substr($0, 4) }
  /^```sh$/ { inside = 1; print "begin " quoted(heading); next }
  /^```$/ { if (inside) { print "end" }; inside = 0; next }
  inside {
    gsub("db\\.example\\.com", "127.0.0.1:" port)
    gsub("rhei-[0-9.]+-linux-x86_64\\.tar\\.gz", archive)
    print
  }
' docs/quickstart.md >"$tree/root/replay/blocks"

cat >"$tree/root/replay/run" <<'REPLAY'
#!/bin/bash
# In the tree: the blocks of the page, then a look at the service.
set -Eeuo pipefail
cd /root
export HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive
step=""
started=0
trap 'echo "quickstart: FAILED in step: $step"; systemctl status --no-pager -l rhei || true; journalctl --no-pager -u rhei | tail -n 40' ERR
begin() { step="$1"; started="$(date +%s%N)"; }
end() { printf '%s\t%s\n' "$step" "$((($(date +%s%N) - started) / 1000000))" >>/root/replay/times; }
until_true() { # what, command: within a minute
  local what="$1"
  shift
  for _ in $(seq 300); do if "$@"; then return; fi; sleep 0.2; done
  echo "quickstart: FAILED: $what"
  false
}
of_unit() { systemctl show -P "$1" rhei; }

. /root/replay/blocks

step="the service is what its unit says"
[ "$(of_unit Type)" = notify ] && [ "$(of_unit WatchdogUSec)" = 5min ]
[ "$(stat -c '%U %a' /var/lib/rhei/shop.duckdb)" = "rhei 600" ]
case "$(of_unit StatusText)" in "following; the copy is at "*) ;; *) of_unit StatusText; false ;; esac
rhei --config /etc/rhei/rhei.toml --quiet status --running
systemd-analyze security --no-pager --threshold=29 rhei.service >/root/replay/security
tail -n 1 /root/replay/security
if journalctl --no-pager -u rhei | grep -E ' (WARN|ERROR) '; then echo "quickstart: the log warns"; false; fi

step="it comes back after a kill"
pid="$(of_unit MainPID)"
systemctl kill --kill-whom=main --signal=KILL rhei
until_true "it came back after a kill" sh -c "[ \"\$(systemctl show -P MainPID rhei)\" -gt 0 ] && [ \"\$(systemctl show -P MainPID rhei)\" != $pid ]"
until_true "it follows again" systemctl is-active --quiet rhei

step="it comes back after a hang"
mkdir -p /etc/systemd/system/rhei.service.d
printf '[Service]\nWatchdogSec=4s\nRestartSec=100ms\n' >/etc/systemd/system/rhei.service.d/test.conf
systemctl daemon-reload
systemctl restart rhei
sleep 6
[ "$(of_unit NRestarts)" = 0 ]
systemctl kill --kill-whom=main --signal=STOP rhei
until_true "it came back after a hang" sh -c '[ "$(systemctl show -P NRestarts rhei)" -ge 1 ] && systemctl is-active --quiet rhei'
journalctl --no-pager -u rhei | grep -c 'Watchdog timeout' >/dev/null

step="it ends well"
systemctl stop rhei
[ "$(of_unit Result)" = success ]
rhei --config /etc/rhei/rhei.toml query "SELECT count(*), count(*) FILTER (status = 'returned') FROM orders" --format csv | grep -qx 200000,100

echo passed >/root/replay/result
REPLAY
chmod +x "$tree/root/replay/run"

cat >"$tree/etc/systemd/system/replay.service" <<'UNIT'
[Unit]
Description=Replay of docs/quickstart.md
After=multi-user.target
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
ExecStart=/bin/bash -c '/root/replay/run >/root/replay/log 2>&1'
TimeoutStartSec=600
[Install]
WantedBy=default.target
UNIT
mkdir -p "$tree/etc/systemd/system/default.target.wants"
ln -s ../replay.service "$tree/etc/systemd/system/default.target.wants/replay.service"

booted=0
timeout 900 systemd-nspawn --quiet --register=no --keep-unit --resolv-conf=copy-host --timezone=off \
  --setenv=SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 -D "$tree" --boot </dev/null >"$work/boot.log" 2>&1 || booted=$?
if [ ! -f "$tree/root/replay/log" ]; then
  tail -n 20 "$work/boot.log" >&2
  say "SKIPPED: a tree cannot be booted here (systemd-nspawn ended with $booted)"
  exit 0
fi

cat "$tree/root/replay/log"
[ "$(cat "$tree/root/replay/result" 2>/dev/null)" = passed ] || fail "the replay on $suite"

awk -F '\t' '
  { if ($1 != last) { order[++count] = $1; last = $1 }; sum[$1] += $2; total += $2 }
  END {
    for (at = 1; at <= count; at++) printf "| %s | %.1f |\n", order[at], sum[order[at]] / 1000
    printf "| all | %.1f |\n", total / 1000
  }
' "$tree/root/replay/times" | tee "${RHEI_QUICKSTART_TIMES:-/dev/null}"
say "passed on $suite"
