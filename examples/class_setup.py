"""Make a client key for each student of a class: python class_setup.py NAMES.txt [DAYS]

NAMES.txt has a name in each line. keys.csv is written beside it, readable by you only: hand each student their line. Names may be added
later: run the script again, and only their keys are made. The gateway must ask for keys, MULTIVERSE_REQUIRE_CLIENT_AUTH=true.
ADMIN_API_KEY is its admin key. It uses the command `multiverse-gateway keys create --from NAMES.txt`; see its `--help`.
"""

import os
import sys

from multiverse_gateway.cli import main

base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
names = sys.argv[1]
days = sys.argv[2] if len(sys.argv) > 2 else "120"

main(["keys", "create", "--from", names, "--days", days, "--gateway", base_url, "--base-url", base_url])
