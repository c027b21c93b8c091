#!/usr/bin/env bash
# Makes a small machine at Google Compute Engine that serves the gateway on https://DOMAIN, with daily backups into a bucket.
#
#   deploy/gce-setup.sh --project PROJECT --domain DOMAIN [--zone ZONE] [--machine TYPE] [--name NAME] [--bucket BUCKET]
#                       [--source GIT-URL] [--dry-run]
#
# Needs gcloud, signed in (gcloud auth login). Run again, it leaves alone what is there. --dry-run prints the commands.
set -euo pipefail

project='' domain='' zone=europe-west1-b machine=e2-small name=multiverse-gateway bucket='' dry=''
source=https://github.com/multiverse-gateway/multiverse-gateway
while [ $# -gt 0 ]; do
  case $1 in
    --project) project=${2:?} && shift 2 ;;
    --domain) domain=${2:?} && shift 2 ;;
    --zone) zone=${2:?} && shift 2 ;;
    --machine) machine=${2:?} && shift 2 ;;
    --name) name=${2:?} && shift 2 ;;
    --bucket) bucket=${2:?} && shift 2 ;;
    --source) source=${2:?} && shift 2 ;;
    --dry-run) dry=yes && shift ;;
    *) echo "unknown option $1; the first lines of $0 explain all" >&2 && exit 2 ;;
  esac
done
if [ -z "$project" ] || [ -z "$domain" ]; then
  echo "--project and --domain are needed; the first lines of $0 explain all" >&2
  exit 2
fi
[[ $domain =~ ^[A-Za-z0-9.-]+$ ]] || { echo "$domain is no name of a host" >&2 && exit 2; }
region=${zone%-*}
robot=$name@$project.iam.gserviceaccount.com

cloud() { # ARGUMENT...
  if [ -n "$dry" ]; then
    printf 'gcloud --project %q' "$project"
    printf ' %q' "$@"
    echo
  else
    gcloud --quiet --project "$project" "$@"
  fi
}

there() { [ -z "$dry" ] && gcloud --quiet --project "$project" "$@" >/dev/null 2>&1; }

backup=''
[ -z "$bucket" ] || backup="BACKUP_UPLOAD='gcloud storage cp \"\$FILE\" gs://$bucket/'"
startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat >"$startup" <<STARTUP
#!/bin/bash
# Runs at every start of the machine; installs once.
set -euo pipefail
[ ! -e /opt/multiverse-gateway/current ] || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq git python3-venv unattended-upgrades
[ -d /opt/multiverse-gateway-source ] || git clone --depth 1 $source /opt/multiverse-gateway-source
mkdir -p /etc/multiverse-gateway
cat >/etc/multiverse-gateway/backup.env <<'SETTINGS'
$backup
SETTINGS
/opt/multiverse-gateway-source/deploy/install.sh --domain $domain
STARTUP

cloud services enable compute.googleapis.com
# an account of its own that may do nothing, so that a break-in stays on the machine
there iam service-accounts describe "$robot" || cloud iam service-accounts create "$name" --display-name "Multiverse Gateway"
if [ -n "$bucket" ]; then
  there storage buckets describe "gs://$bucket" ||
    cloud storage buckets create "gs://$bucket" --location "$region" --uniform-bucket-level-access --public-access-prevention
  cloud storage buckets add-iam-policy-binding "gs://$bucket" --member "serviceAccount:$robot" --role roles/storage.objectCreator
fi
there compute addresses describe "$name" --region "$region" || cloud compute addresses create "$name" --region "$region"
there compute firewall-rules describe "$name-web" ||
  cloud compute firewall-rules create "$name-web" --allow tcp:80,tcp:443,udp:443 --target-tags "$name" --source-ranges 0.0.0.0/0
there compute instances describe "$name" --zone "$zone" ||
  cloud compute instances create "$name" --zone "$zone" --machine-type "$machine" --address "$name" --tags "$name" \
    --image-family debian-12 --image-project debian-cloud --boot-disk-size 20GB \
    --service-account "$robot" --scopes cloud-platform \
    --shielded-secure-boot --metadata enable-oslogin=TRUE --metadata-from-file "startup-script=$startup"

address='ADDRESS'
[ -n "$dry" ] || address=$(gcloud --project "$project" compute addresses describe "$name" --region "$region" --format 'value(address)')
cat <<TEXT

Now let the name $domain mean $address (an A record at whoever keeps your domain).
The machine installs the gateway meanwhile; see how far it is:
  gcloud --project $project compute ssh $name --zone $zone --command 'sudo journalctl --no-pager -u google-startup-scripts | tail -n 20'
When it is done, https://$domain serves. The admin key:
  gcloud --project $project compute ssh $name --zone $zone --command 'sudo grep ADMIN_API_KEY /etc/multiverse-gateway/settings.env'
TEXT
