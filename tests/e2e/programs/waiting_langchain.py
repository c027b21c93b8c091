"""Print a stream of LangChain that may wait with comments, or which error it raised: BASE_URL MODEL."""

import sys

import openai
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model=sys.argv[2],
    base_url=sys.argv[1],
    api_key="none",
    max_retries=0,
    default_headers={"X-Multiverse-Queue": "comments"},
)
try:
    print("".join(part.content for part in model.stream("Hello")))
except openai.APIError as error:
    print("raised", type(error).__name__, error.message)
