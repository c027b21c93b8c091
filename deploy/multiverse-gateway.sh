#!/bin/sh
# The command of an installed gateway: runs as the user of the service, where its settings and its database are.
cd /var/lib/multiverse-gateway 2>/dev/null || { echo "Run this as root: sudo multiverse-gateway $*" >&2; exit 1; }
exec runuser -u multiverse-gateway -- /opt/multiverse-gateway/current/bin/python -m multiverse_gateway "$@"
