"""What the gateway may ask an engine: a few documents, none of which loads a model or generates a token.

llama.cpp's router loads the model that `/props?model=` names unless `autoload=false` is added; `/slots` wakes a sleeping llama.cpp, and
`/props` does not. Ollama's `/api/show` reads a model's files only.
"""

from urllib.parse import quote

import msgspec
from attrs import frozen

MODELS = "/v1/models"
PROPS = "/props"
MAX_ASKED = 64
"""Models of one engine that it is asked about one by one."""


@frozen
class Question:
    """A GET request for `target`, a path with its query; a POST request if there is a body, which is JSON."""

    target: str
    body: bytes | None = None


Answers = dict[Question, object]
"""What was answered: the documents (`documents.document`), by the question; a question that was not answered well has `None`."""


def props(model: str) -> Question:
    """Ask llama.cpp about a model; only its router looks at the name.

    >>> props("a/b:c").target
    '/props?model=a%2Fb%3Ac&autoload=false'
    """
    return Question(f"{PROPS}?model={quote(model, safe='')}&autoload=false")


def show(model: str) -> Question:
    """Ask Ollama about one model.

    >>> show("tiny")
    Question(target='/api/show', body=b'{"model":"tiny"}')
    """
    return Question("/api/show", msgspec.json.encode({"model": model}))


LIST = Question(MODELS)
OLLAMA_VERSION = Question("/api/version")
OLLAMA_TAGS = Question("/api/tags")
OLLAMA_LOADED = Question("/api/ps")
VLLM_VERSION = Question("/version")
SGLANG_MODEL = Question("/get_model_info")
SGLANG_SERVER = Question("/server_info")
SGLANG_OLD_SERVER = Question("/get_server_info")
INFO = Question("/info")
LM_STUDIO_MODELS = Question("/api/v1/models")
LM_STUDIO_OLD_MODELS = Question("/api/v0/models")
