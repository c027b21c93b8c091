"""Ask a model, at once and word by word: python use_model.py MODEL [QUESTION]"""

import os
import sys

from openai import OpenAI

model, *question = sys.argv[1:]
messages = [{"role": "user", "content": " ".join(question) or "Say hello."}]
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),  # a key of yours, where the gateway asks for one
)

answer = client.chat.completions.create(model=model, messages=messages)
print(answer.choices[0].message.content)

for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
