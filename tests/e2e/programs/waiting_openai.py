"""Print a stream of openai 2 or 3 that may wait with comments, or which error it raised: [async|responses] BASE_URL MODEL."""

import asyncio
import sys

import openai

URL, MODEL = sys.argv[-2:]
OPTIONS = {"base_url": URL, "api_key": "none", "max_retries": 0, "default_headers": {"X-Multiverse-Queue": "comments"}}
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": True}


async def ask():
    """Read the stream with the asynchronous client."""
    async with openai.AsyncOpenAI(**OPTIONS) as client:
        return [chunk async for chunk in await client.chat.completions.create(**REQUEST)]


def texts():
    """Return the pieces of the text, by one of the library's three ways to read a stream."""
    if "responses" in sys.argv:
        events = openai.OpenAI(**OPTIONS).responses.create(model=MODEL, input="Hello", stream=True)
        return [event.delta for event in events if event.type == "response.output_text.delta"]
    chunks = asyncio.run(ask()) if "async" in sys.argv else list(openai.OpenAI(**OPTIONS).chat.completions.create(**REQUEST))
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


try:
    print("".join(texts()))
except openai.APIError as error:
    print("raised", type(error).__name__, error.message)
