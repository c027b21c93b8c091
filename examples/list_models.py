"""Show the models there are, and how many of their servers are healthy: python list_models.py"""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key=os.environ.get("OPENAI_API_KEY", "none"))
for model in client.models.list():
    servers = model.model_extra or {}  # what the gateway adds to OpenAI's list
    print(f"{model.id}: {servers['available_servers']} of {servers['total_servers']} servers are healthy")
