"""Whether a server lets the gateway in, and what its owner can do if it does not.

A refused request (401, 403) may be due to its content: a firewall may dislike a prompt. The gateway therefore sends a request of its own,
an empty JSON object with the stored key. Every server rejects that object, but a server that wants another key rejects the key first.
"""

from attrs import frozen

from multiverse_gateway.core.envelope import JSON_PATHS

CONFIRMING_PATH = "/v1/chat/completions"
"""The API path that shows whether a server lets the gateway in, where no other path is known."""

_UNDECIDED = frozenset({407, 502, 504, 530})
"""Statuses of proxies and tunnels: the server itself may never have seen the request."""
_WANTS_KEY = "the server requires a key: register it with its api_key"
HOST_HEADER = "Ollama does this behind a tunnel that does not rewrite the Host header (ngrok: --host-header=rewrite)"


@frozen
class Access:
    """What a server's answer to the empty object means: it let the gateway in (`granted`), refused it (`refusal`), or neither is known.

    `refusal` is for people: words and the remedy, nothing that the server sent.
    """

    granted: bool = False
    refusal: str | None = None


def judge_access(status: int, *, has_key: bool) -> Access:
    """Return what the status of an answer to the empty object means; `has_key` says whether a key was sent.

    >>> judge_access(400, has_key=True)
    Access(granted=True, refusal=None)
    >>> judge_access(401, has_key=False).refusal
    'the server requires a key: register it with its api_key'
    """
    refusal = refusal_of(status, has_key=has_key)
    return Access(refusal is None and status not in _UNDECIDED and not 300 <= status < 400, refusal)


def refusal_of(status: int, *, has_key: bool) -> str | None:
    """Return in words why a server refuses the gateway, and what helps; `None` if the status is not a refusal.

    A server without a stored key is never said to refuse one.
    """
    if status == 401:
        return "the server rejects the stored key: update its api_key" if has_key else _WANTS_KEY
    if status == 403:
        ours = "is the stored api_key right?" if has_key else "if the server requires a key, register it with its api_key."
        return f"the server refuses access (status 403): {ours} {HOST_HEADER}"
    return None


def confirming_path(path: str) -> str:
    """Return the API path by which a refusal of this one is confirmed: an empty JSON object means nothing to calls that take no JSON.

    >>> confirming_path("/v1/embeddings"), confirming_path("/v1/audio/speech")
    ('/v1/embeddings', '/v1/chat/completions')
    """
    return path if path in JSON_PATHS else CONFIRMING_PATH


def refusal_at(refusal: str, path: str) -> str:
    """Return the words of a refusal with the API path on which it was met, unless that is the path of chat."""
    return refusal if path == CONFIRMING_PATH else f"{refusal} (POST {path})"
