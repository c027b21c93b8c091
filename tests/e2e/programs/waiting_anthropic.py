"""Print a stream of Anthropic's library that may wait with comments, or which error it raised: BASE_URL MODEL."""

import sys

import anthropic

client = anthropic.Anthropic(
    base_url=sys.argv[1].removesuffix("/v1"),
    api_key="none",
    max_retries=0,
    default_headers={"X-Multiverse-Queue": "comments"},
)
try:
    with client.messages.stream(model=sys.argv[2], max_tokens=100, messages=[{"role": "user", "content": "Hello"}]) as stream:
        print("".join(stream.text_stream))
except anthropic.APIError as error:
    print("raised", type(error).__name__, error.message)
