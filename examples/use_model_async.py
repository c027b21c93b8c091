"""Ask many questions at the same time; the gateway spreads them over the servers: python use_model_async.py MODEL QUESTION..."""

import asyncio
import os
import sys

from openai import AsyncOpenAI


async def main(model: str, questions: list[str]) -> None:
    url, key = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), os.environ.get("OPENAI_API_KEY", "none")
    async with AsyncOpenAI(base_url=url, api_key=key) as client:

        async def ask(question: str) -> None:
            raw = await client.chat.completions.with_raw_response.create(model=model, messages=[{"role": "user", "content": question}])
            answer = raw.parse()
            print(f"{question} -> {answer.choices[0].message.content}  (server {raw.headers['x-gateway-server-id']})")

        await asyncio.gather(*map(ask, questions))


asyncio.run(main(sys.argv[1], sys.argv[2:] or ["One?", "Two?", "Three?", "Four?"]))
