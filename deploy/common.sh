# shellcheck shell=bash disable=SC2034  # the scripts that source this use the names
# Sourced by the scripts beside it: where things lie, and what all of them do.
#
# GATEWAY_ROOT     puts everything below another directory; then no user is made, and nothing of the system is touched
# GATEWAY_SERVICE  a program that is called with start, stop or reload, where systemd does not run the gateway

root=${GATEWAY_ROOT:-}
home=$root/opt/multiverse-gateway
releases=$home/releases
current=$home/current
previous=$home/previous
config=$root/etc/multiverse-gateway
settings=$config/settings.env
state=$root/var/lib/multiverse-gateway
if [ -r "$config/backup.env" ]; then
  # shellcheck source=/dev/null
  . "$config/backup.env"
fi
backups=${BACKUP_FOLDER:-$root/var/backups/multiverse-gateway}
account=multiverse-gateway
unset GATEWAY_ROOT

say() { echo "$*" >&2; }

fail() {
  say "Error: $*"
  exit 1
}

is_system() { [ -z "$root" ]; }

need_root() {
  ! is_system || [ "$(id -u)" -eq 0 ] || fail "run this as root (sudo $0)"
}

own() { # FILE...: give to the service
  ! is_system || chown "$account:$account" "$@"
}

as_service() { # COMMAND...: run as the user of the service, in its directory
  if is_system; then
    (cd "$state" && runuser -u "$account" -- "$@")
  else
    (cd "$state" && "$@")
  fi
}

gateway() { as_service "$current/bin/python" -m multiverse_gateway "$@"; }

service() { # start | stop | reload
  if [ -n "${GATEWAY_SERVICE:-}" ]; then
    "$GATEWAY_SERVICE" "$1"
  elif is_system && [ -d /run/systemd/system ]; then
    systemctl "$1" multiverse-gateway
  else
    fail "systemd does not run here: name a program in GATEWAY_SERVICE that can $1 the gateway"
  fi
}

field() { # NAME: print a field of the JSON on standard input
  "$current/bin/python" -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

setting() { gateway settings --json | field "$1"; }

make_release() { # WHAT: install what pip understands into a directory of its own, and print its name
  local release
  release=$releases/$(date -u +%Y%m%dT%H%M%S)-$$
  say "Installing $1 ..."
  "${PYTHON:-python3}" -m venv "$release" >&2
  "$release/bin/python" -m pip install --quiet --disable-pip-version-check "$1" >&2
  echo "$release"
}

point() { # LINK TARGET: let a link point elsewhere, in one step
  ln -s "$2" "$1.new"
  mv -T "$1.new" "$1"
}

answers() { # URL VERSION SECONDS SINCE: wait until only processes answer that are of this version and not older than SINCE (epoch)
  "$current/bin/python" - "$@" <<'PYTHON'
import json, sys, time, urllib.request

url, version, seconds, since = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
deadline, right = time.monotonic() + seconds, 0
while right < 8 and time.monotonic() < deadline:
    try:
        with opener.open(url + "/readyz", timeout=5), opener.open(url + "/health", timeout=5) as answer:
            health = json.load(answer)
    except (OSError, ValueError):
        right = 0
    else:
        fresh = time.time() - health["uptime_seconds"] >= since - 1
        right = right + 1 if fresh and version in ("", health["version"]) else 0
    time.sleep(0.05)
sys.exit(right < 8)
PYTHON
}

address() { echo "http://127.0.0.1:$(setting port)"; }

version_of() { "$1/bin/python" -c 'import multiverse_gateway; print(multiverse_gateway.__version__)'; }
