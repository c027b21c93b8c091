"""Complain when the gateway or one of the models named is down; quiet, with exit code 0, when all is well.

For cron, which sends what a command prints: */5 * * * * OPENAI_BASE_URL=https://gateway.example/v1 python check_health.py llama
"""

import json
import os
import sys
import urllib.request
from typing import Any

base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
key = os.environ.get("OPENAI_API_KEY", "none")


def read(url: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


try:
    health = read(base_url.removesuffix("/v1") + "/health")
    available = {model["id"]: model["available_servers"] for model in read(base_url + "/models")["data"]}
except OSError as error:
    sys.exit(f"The gateway does not answer: {error}")
troubles = [f"No server of {model} is healthy" for model in sys.argv[1:] if not available.get(model)]
if health["status"] != "ok":
    troubles.append(f"The gateway is {health['status']}, its database {health['database']}")
sys.exit("\n".join(troubles) or 0)
