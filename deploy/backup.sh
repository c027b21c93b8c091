#!/usr/bin/env bash
# Copies the registry while the gateway runs, proves that the copy can be brought back, and prints its name.
#
#   sudo /opt/multiverse-gateway/deploy/backup.sh
#
# BACKUP_FOLDER  where copies go; /var/backups/multiverse-gateway by default
# BACKUP_KEEP    how many are kept, 14 by default
# BACKUP_UPLOAD  a command that takes a copy elsewhere, such as: gcloud storage cp "$FILE" gs://my-bucket/
#
# They may stand in /etc/multiverse-gateway/backup.env. The secret of the servers' keys is copied beside the copies and not
# uploaded: whoever has both can read the keys. Keep it in another safe place. PostgreSQL is backed up with pg_dump instead.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=deploy/common.sh
. "$here/common.sh"
need_root

case $(setting database_url) in
  sqlite:*) ;;
  *) say "The registry is not in SQLite; back it up with its own tools." && exit 0 ;;
esac
install -d -m 0700 "$backups"
own "$backups"
FILE=$backups/multiverse-$(date -u +%Y%m%dT%H%M%S%NZ).db
servers=$(gateway backup --json "$FILE" | field servers)

scratch=$(as_service mktemp -d)
trap 'rm -rf "$scratch"' EXIT
brought_back=$(MULTIVERSE_DATABASE_URL=sqlite:///$scratch/check.db gateway restore --json "$FILE" | field servers)
[ "$servers" = "$brought_back" ] || fail "$FILE holds $servers servers, but only $brought_back could be brought back"

if [ -e "$state/multiverse.db.key" ]; then
  as_service install -m 0600 "$state/multiverse.db.key" "$backups/multiverse.db.key"
fi
if [ -n "${BACKUP_UPLOAD:-}" ]; then
  export FILE
  sh -c "$BACKUP_UPLOAD" >&2 || fail "$FILE is good, but was not uploaded: $BACKUP_UPLOAD"
fi
for old in $(find "$backups" -maxdepth 1 -name 'multiverse-*.db' | sort -r | tail -n "+$((${BACKUP_KEEP:-14} + 1))"); do
  rm "$old"
done
say "$FILE holds $servers servers."
echo "$FILE"
