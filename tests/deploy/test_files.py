"""The files of `deploy/` that cannot be run without systemd, Docker or Google: what reads them says that they are right."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from multiverse_gateway.settings import load_settings
from multiverse_gateway.settings.checks import PREFIX
from multiverse_gateway.settings.sources import parse_dotenv
from support.require import require, require_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="deploy/ is for Linux")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service")) + sorted(DEPLOY.glob("*.timer"))
FAKE_GCLOUD = """#!/bin/bash
echo "$*" >>"$CALLS"
all=$*
case $all in *startup-script=*) cp "${all##*startup-script=}" "$CALLS.startup" ;; esac
case "$*" in
  *"describe multiverse-gateway --region"*--format*) echo 192.0.2.44 ;;
  *describe*) exit "$THERE" ;;
esac
"""


def call(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program in the checkout."""
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_scripts_are_clean() -> None:
    """By shellcheck, all that the project has."""
    program = require_program("shellcheck", "the shell scripts")
    scripts = [*DEPLOY.glob("*.sh"), ROOT / "scripts/demo", ROOT / "scripts/test", ROOT / "scripts/venv.sh", ROOT / ".ci/run"]
    done = call(program, "--external-sources", *scripts)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """Return the units with programs that exist here."""
    written = []
    for unit in UNITS:
        target = tmp_path / unit.name
        target.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
        written.append(target)
    return written


def test_systemd_understands_the_units(units: list[Path]) -> None:
    """Without a word of complaint."""
    program = require_program("systemd-analyze", "the units")
    done = call(program, "verify", *units)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_service_is_in_a_sandbox() -> None:
    """Systemd's own judgment, 0 (shut) to 10 (open)."""
    program = require_program("systemd-analyze", "the units")
    done = call(program, "security", "--offline=yes", "--threshold=20", "--no-pager", DEPLOY / "multiverse-gateway.service")
    assert done.returncode == 0, done.stdout


def test_the_stop_waits_longer_than_the_grace() -> None:
    """Else systemd would kill what still streams."""
    settings = load_settings(env=parse_dotenv((DEPLOY / "settings.env").read_text()), cwd=DEPLOY)
    unit = (DEPLOY / "multiverse-gateway.service").read_text()
    match = re.search(r"TimeoutStopSec=(\d+)", unit)
    assert match is not None
    assert int(match[1]) > settings.shutdown_grace_seconds
    assert settings.trusted_proxies


def test_caddy_understands_its_file() -> None:
    """As it is, and with another name and gateway."""
    program = require_program("caddy", "the Caddyfile")
    for env in ({"HOME": "/tmp"}, {"HOME": "/tmp", "DOMAIN": "other.example", "GATEWAY": "gateway:8000"}):
        done = call(program, "adapt", "--config", DEPLOY / "Caddyfile", "--adapter", "caddyfile", env=env)
        assert done.returncode == 0, done.stderr
        assert env.get("GATEWAY", "127.0.0.1:8000") in done.stdout
        assert env.get("DOMAIN", "gateway.example") in done.stdout
        assert "warn" not in done.stderr


def test_compose_names_settings_that_exist() -> None:
    """And starts two gateways on shared stores."""
    services = require("yaml", "the compose file").safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    gateway = services["gateway"]
    secret = "a-secret-of-enough-characters-0123456789"
    given = {name: re.sub(r"\$\{\w+:\?\}", secret, str(value)) for name, value in gateway["environment"].items()}
    assert all(name.startswith(PREFIX) for name in given)
    settings = load_settings(env=given, cwd=DEPLOY)
    assert settings.database_url.startswith("postgresql://")
    assert settings.rate_limit_storage.startswith("redis://")
    assert gateway["deploy"]["replicas"] == 2
    assert int(gateway["stop_grace_period"].rstrip("s")) > settings.shutdown_grace_seconds
    assert set(gateway["depends_on"]) <= set(services)


def test_kubernetes_manifests_fit_the_gateway() -> None:
    """Settings that exist, paths that answer, and more time to end than the grace."""
    yaml = require("yaml", "the manifests")
    found = [part for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for part in yaml.safe_load_all(path.read_text())]
    by_kind = {part["kind"]: part for part in found}
    assert set(by_kind) == {"ConfigMap", "Deployment", "Ingress", "PodDisruptionBudget", "Service"}
    settings = load_settings(env=by_kind["ConfigMap"]["data"], cwd=DEPLOY)
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > settings.shutdown_grace_seconds + 5
    assert pod["enableServiceLinks"] is False
    [container] = pod["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    [backend] = by_kind["Ingress"]["spec"]["rules"][0]["http"]["paths"]
    assert backend["backend"]["service"]["name"] == by_kind["Service"]["metadata"]["name"]


def test_the_image_copies_what_is_there() -> None:
    """Out of the checkout, and starts our command as a user of its own."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") and "--from" not in line for word in shlex.split(line)[1:-1]]
    assert copied
    assert all((ROOT / path).exists() for path in copied)
    assert "USER multiverse-gateway" in lines


@pytest.mark.parametrize("there", [False, True])
def test_a_machine_at_google_is_ordered_once(tmp_path: Path, there: bool) -> None:
    """What is there is left alone; the first start of the machine installs."""
    gcloud, calls = tmp_path / "gcloud", tmp_path / "calls"
    gcloud.write_text(FAKE_GCLOUD)
    gcloud.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "THERE": "0" if there else "1"}
    done = call(DEPLOY / "gce-setup.sh", "--project", "school", "--domain", "gateway.school.example", "--bucket", "school-backups", env=env)
    assert done.returncode == 0, done.stderr
    assert "192.0.2.44" in done.stdout
    made = [line for line in calls.read_text().splitlines() if " create " in line]
    assert len(made) == (0 if there else 5)
    if not there:
        assert any("--allow tcp:80,tcp:443,udp:443" in line for line in made)
        startup = Path(f"{calls}.startup")
        assert "install.sh --domain gateway.school.example" in startup.read_text()
        assert """BACKUP_UPLOAD='gcloud storage cp "$FILE" gs://school-backups/'""" in startup.read_text()
        subprocess.run(["bash", "-n", startup], check=True, timeout=60)


def test_a_machine_at_google_can_be_looked_at_first() -> None:
    """Nothing is called then."""
    done = call(
        DEPLOY / "gce-setup.sh", "--project", "school", "--domain", "gateway.school.example", "--dry-run", env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gcloud --project school compute") >= 4
    assert call(DEPLOY / "gce-setup.sh", "--project", "school").returncode == 2
