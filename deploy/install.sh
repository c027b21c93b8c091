#!/usr/bin/env bash
# Installs the gateway on a Linux machine with systemd, as a service with a user of its own, and starts it.
#
#   sudo deploy/install.sh [--from WHAT] [--domain NAME]
#
# --from WHAT    what pip understands: a wheel, 'multiverse-gateway[postgres,redis]', a checkout; this checkout by default
# --domain NAME  also installs Caddy, which serves https://NAME with a certificate that it gets and renews by itself
#
# Run again, it brings scripts and unit files up to date and calls update.sh. Settings and data stay as they are.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=deploy/common.sh
. "$here/common.sh"

what=
domain=
while [ $# -gt 0 ]; do
  case $1 in
    --from) what=${2:?} && shift 2 ;;
    --domain) domain=${2:?} && shift 2 ;;
    *) fail "unknown option $1; the first lines of $0 explain all" ;;
  esac
done
need_root
if [ -z "$what" ]; then
  if [ -f "$here/../pyproject.toml" ]; then what=$(cd "$here/.." && pwd); else what=multiverse-gateway; fi
fi
"${PYTHON:-python3}" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "Python 3.11 or newer with venv is needed; on Debian and Ubuntu: apt-get install python3-venv"

is_system && ! id "$account" >/dev/null 2>&1 &&
  useradd --system --user-group --home-dir "$state" --shell /usr/sbin/nologin "$account"
install -d "$home" "$releases" "$home/deploy" "$config"
install -d -m 0700 "$state" "$backups"
own "$state" "$backups"
[ "$here" = "$home/deploy" ] || cp -R "$here"/* "$home/deploy/"
echo "$what" >"$config/source"

if [ ! -e "$settings" ]; then
  key=mvg-admin-$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')
  sed "s|^MULTIVERSE_ADMIN_API_KEY=.*|MULTIVERSE_ADMIN_API_KEY=$key|" "$here/settings.env" | install -m 0640 /dev/stdin "$settings"
  ! is_system || chgrp "$account" "$settings"
fi
[ -e "$state/.env" ] || ln -s "$settings" "$state/.env"

if is_system; then
  install -m 0755 "$here/multiverse-gateway.sh" /usr/local/bin/multiverse-gateway
  install -m 0644 "$here/"multiverse-gateway*.service "$here/"multiverse-gateway*.timer /etc/systemd/system/
  install -m 0644 "$here/sysctl.conf" /etc/sysctl.d/60-multiverse-gateway.conf
  sysctl --quiet --load /etc/sysctl.d/60-multiverse-gateway.conf || say "Note: the kernel did not take $here/sysctl.conf"
  [ ! -d /run/systemd/system ] || systemctl daemon-reload
fi

if [ -n "$domain" ]; then
  command -v caddy >/dev/null || { apt-get update -qq && apt-get install -y -qq caddy; }
  install -d "$root/etc/caddy"
  if [ -e "$root/etc/caddy/Caddyfile" ] && ! grep -q 'Multiverse Gateway' "$root/etc/caddy/Caddyfile"; then
    mv "$root/etc/caddy/Caddyfile" "$root/etc/caddy/Caddyfile.before-multiverse-gateway"
  fi
  sed "s/{\$DOMAIN:gateway\.example}/$domain/" "$here/Caddyfile" >"$root/etc/caddy/Caddyfile"
  ! is_system || systemctl reload-or-restart caddy
fi

if [ -e "$current" ]; then
  exec "$home/deploy/update.sh"
fi
release=$(make_release "$what")
point "$current" "$release"
if is_system && [ -d /run/systemd/system ]; then
  systemctl enable --now multiverse-gateway.service multiverse-gateway-backup.timer
elif [ -n "${GATEWAY_SERVICE:-}" ]; then
  service start
else
  say "Installed, and not started: $state is where \`$current/bin/python -m multiverse_gateway run --replaceable\` has to run."
  exit 0
fi
answers "$(address)" "" 60 0 || fail "the gateway does not answer; look at: journalctl -u multiverse-gateway"
say "The gateway $(version_of "$current") serves on $(address)${domain:+, and on https://$domain}."
say "Its admin key stands in $settings."
