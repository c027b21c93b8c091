"""Start a release of the gateway on a copy of its data and a free port, and see whether it comes to serve.

Run by the release's own Python in the directory of the service: `python rehearse.py [COPY]`. Exit code 0: it does.
COPY is a backup of the SQLite registry; without one the registry is left out.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

SECONDS = 60.0


def main() -> int:
    """Rehearse, and return the exit code."""
    with tempfile.TemporaryDirectory(prefix="multiverse-rehearsal-") as directory:
        changes = {"DATABASE_URL": "memory://", "RATE_LIMIT_STORAGE": "memory://", "WORKERS": "1", "LOG_FILE": ""}
        for copy in map(Path, sys.argv[1:]):
            database = shutil.copy(copy, Path(directory, "multiverse.db"))
            secret = Path("multiverse.db.key")
            if secret.exists():
                shutil.copy(secret, f"{database}.key")
            changes["DATABASE_URL"] = f"sqlite:///{database}"
        changes |= {"HOST": "127.0.0.1", "PORT": "0"}
        env = os.environ | {f"MULTIVERSE_{name}": value for name, value in changes.items()} | {"PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "multiverse_gateway", "run"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603  ourselves
        limit = threading.Timer(SECONDS, process.kill)
        limit.start()
        try:
            return 0 if serves(process) else 1
        finally:
            limit.cancel()
            process.send_signal(signal.SIGTERM)
            process.communicate()


def serves(process: "subprocess.Popen[str]") -> bool:
    """Read what it says until it serves, and ask it."""
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        _, mark, url = line.strip().partition(" serves on ")
        if mark and url.startswith("http://"):
            return answers(url)
    sys.stderr.write("".join(said[-20:]))
    return False


def answers(url: str) -> bool:
    """Ask it until it says that it is ready."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            with opener.open(f"{url}/readyz", timeout=SECONDS) as answer:
                return bool(answer.status == 200)
        except OSError:
            time.sleep(0.1)
    return False


if __name__ == "__main__":
    sys.exit(main())
