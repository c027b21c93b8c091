"""Make a key for each student of a class: python class_setup.py NAMES.txt

NAMES.txt has a name in each line. Two files are written beside it, readable by you only:
keys.csv, to hand out, and keys.env, whose lines belong into the gateway's .env; reload or restart the gateway then.
"""

import csv
import os
import secrets
import sys
from pathlib import Path

names = [name for name in map(str.strip, Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()) if name]
keys = {name: f"class-{secrets.token_urlsafe(24)}" for name in names}
folder = Path(sys.argv[1]).parent


def opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


with open(folder / "keys.csv", "w", encoding="utf-8", newline="", opener=opener) as file:
    table = csv.writer(file)
    table.writerow(["name", "OPENAI_BASE_URL", "OPENAI_API_KEY"])
    table.writerows([name, os.environ.get("OPENAI_BASE_URL", "https://gateway.example/v1"), key] for name, key in keys.items())
with open(folder / "keys.env", "w", encoding="utf-8", opener=opener) as file:
    file.write(f"MULTIVERSE_REQUIRE_CLIENT_AUTH=true\nMULTIVERSE_CLIENT_API_KEYS={','.join(keys.values())}\n")
print(f"{len(keys)} keys are in {folder / 'keys.csv'}; add the lines of {folder / 'keys.env'} to the gateway's .env")
