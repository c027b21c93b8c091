"""Print a stream of openai 0.28 that may wait with comments, or which error it raised: BASE_URL MODEL."""

import sys

import openai

openai.api_base, openai.api_key = sys.argv[1], "none"
try:
    parts = openai.ChatCompletion.create(
        model=sys.argv[2],
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        headers={"X-Multiverse-Queue": "comments"},
    )
    print("".join(part["choices"][0]["delta"].get("content", "") for part in parts))
except openai.error.APIError as error:
    print("raised", type(error).__name__, error)
