"""Make a client key for each student of a class: python class_setup.py NAMES.txt [DAYS]

NAMES.txt has a name in each line. keys.csv is written beside it, readable by you only: hand each student their line.
The gateway must ask for keys, MULTIVERSE_REQUIRE_CLIENT_AUTH=true. ADMIN_API_KEY is its admin key.
"""

import csv
import json
import os
import sys
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
names = [name for name in map(str.strip, Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()) if name]
ends = datetime.now(UTC) + timedelta(days=int(sys.argv[2]) if len(sys.argv) > 2 else 120)


def make_key(name: str) -> str:
    request = urllib.request.Request(
        base_url.removesuffix("/v1") + "/admin/keys",
        data=json.dumps({"name": name, "expires_at": ends.isoformat()}).encode(),
        headers={"Content-Type": "application/json", "X-API-Key": os.environ["ADMIN_API_KEY"]},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["key"])


table_file = Path(sys.argv[1]).with_name("keys.csv")
with open(os.open(table_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="") as file:
    table = csv.writer(file)
    table.writerow(["name", "OPENAI_BASE_URL", "OPENAI_API_KEY"])
    for name in names:
        table.writerow([name, base_url, make_key(name)])
print(f"{len(names)} keys, which work until {ends:%Y-%m-%d}, are in {table_file}")
