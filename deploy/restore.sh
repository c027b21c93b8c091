#!/usr/bin/env bash
# Brings back a copy that backup.sh made, and the secret of the servers' keys if it is lost. The previous database is kept beside it.
#
#   sudo /opt/multiverse-gateway/deploy/restore.sh [FILE]     the newest copy by default
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=deploy/common.sh
. "$here/common.sh"
need_root

file=${1:-$(find "$backups" -maxdepth 1 -name 'multiverse-*.db' | sort | tail -n 1)}
[ -f "$file" ] || fail "there is no copy ${file:+named $file}${file:-in $backups}"
service stop
if [ ! -e "$state/multiverse.db.key" ] && [ -e "$backups/multiverse.db.key" ]; then
  as_service install -m 0600 "$backups/multiverse.db.key" "$state/multiverse.db.key"
fi
gateway restore --force "$file" >&2
service start
answers "$(address)" "" 60 0 || fail "the gateway does not answer; look at: journalctl -u multiverse-gateway"
say "The gateway serves again."
