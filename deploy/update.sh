#!/usr/bin/env bash
# Updates an installed gateway while it serves, or brings back the release before.
#
#   sudo /opt/multiverse-gateway/deploy/update.sh [--from WHAT | --rollback]
#
# 1. The registry is backed up.
# 2. The new release is installed beside the old one and rehearsed on that copy.
# 3. New processes take over; the old ones finish their streams. When the new ones do not serve, everything stays as it was.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=deploy/common.sh
. "$here/common.sh"

what=$(cat "$config/source" 2>/dev/null) || fail "nothing is installed here; install.sh installs it"
rollback=
while [ $# -gt 0 ]; do
  case $1 in
    --from) what=${2:?} && shift 2 ;;
    --rollback) rollback=yes && shift ;;
    *) fail "unknown option $1; the first lines of $0 explain all" ;;
  esac
done
need_root

take_over() { # RELEASE: let it serve, and wait until nothing else does
  local since
  since=$(date +%s)
  point "$current" "$1"
  service reload
  answers "$(address)" "$(version_of "$1")" 90 "$since"
}

forget_old_releases() { # keep the two that the links name
  local release
  for release in "$releases"/*; do
    [ "$release" = "$(readlink "$current")" ] || [ "$release" = "$(readlink "$previous")" ] || rm -rf "$release"
  done
}

old=$(readlink "$current")
copy=$("$here/backup.sh")
if [ -n "$rollback" ]; then
  new=$(readlink "$previous") || fail "there is no release before this one"
else
  new=$(make_release "$what")
fi
say "Rehearsing $(version_of "$new") ..."
if ! as_service "$new/bin/python" "$here/rehearse.py" ${copy:+"$copy"}; then
  [ -n "$rollback" ] || rm -rf "$new"
  fail "this release does not come to serve with these settings and this registry (see above); $(version_of "$old") goes on.${rollback:+
  If a newer release has changed the registry, bring back the copy made before the update: restore.sh FILE, from $backups}"
fi
if ! take_over "$new"; then
  say "The new release did not take over; back to the old one ..."
  take_over "$old" || say "Look at: journalctl -u multiverse-gateway"
  fail "$(version_of "$new") did not take over, $(version_of "$old") goes on"
fi
[ "$old" = "$new" ] || point "$previous" "$old"
forget_old_releases
say "$(version_of "$new") serves; before, it was $(version_of "$old"). Back again: $0 --rollback"
