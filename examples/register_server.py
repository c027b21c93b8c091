"""Offer a model server to the gateway: python register_server.py MODEL URL [NAME]

Run it again whenever the address of your tunnel changes. ADMIN_API_KEY is the key that the operator gave you.
"""

import json
import os
import sys
import urllib.error
import urllib.request

gateway = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1").removesuffix("/v1")
model, url, *owner = sys.argv[1:]

registration = {
    "model_name": model,
    "endpoint_url": url,
    "metadata": {"student_id": owner[0] if owner else None, "description": "registered by a script"},
}
request = urllib.request.Request(
    f"{gateway}/admin/register",
    data=json.dumps(registration).encode(),
    headers={"Content-Type": "application/json", "X-API-Key": os.environ["ADMIN_API_KEY"]},
)
try:
    with urllib.request.urlopen(request, timeout=60) as answer:
        record = json.load(answer)
except urllib.error.HTTPError as error:
    sys.exit(json.load(error)["error"]["message"])
print(f"{record['registration_id']} serves {model} and is {record['health_status']}")
