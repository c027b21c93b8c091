"""Model servers that each fail in their own way, on real sockets, and one that is well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import attrs

from multiverse_gateway.protocols import ProbeStep
from support.sockets import free_port

_LIST = json.dumps({"object": "list", "data": [{"id": "tiny"}]}).encode()
_CHOICE = json.dumps({"choices": [{"message": {"role": "assistant", "content": "H"}}]}).encode()


def _answer(status: int, body: bytes = b"{}", *headers: bytes) -> bytes:
    head = b"HTTP/1.1 %d Test" % status
    return b"\r\n".join([head, b"content-type: application/json", b"content-length: %d" % len(body), *headers, b"", body])


@attrs.frozen
class Trouble:
    """One way to fail: what the server answers to each method, and at which step of a probe that shows."""

    step: ProbeStep | None
    get: bytes = _answer(200, _LIST)
    post: bytes = _answer(200, _CHOICE)


ANSWERS: Mapping[str, Trouble] = {
    "well": Trouble(None),
    "wants-a-key": Trouble(ProbeStep.ACCESS, _answer(401)),
    "refuses": Trouble(ProbeStep.ACCESS, _answer(403)),
    "lists-but-refuses": Trouble(ProbeStep.ACCESS, post=_answer(401)),
    "idle-tunnel": Trouble(ProbeStep.CONNECTION, _answer(530)),
    "offline-tunnel": Trouble(ProbeStep.CONNECTION, _answer(404, b"{}", b"ngrok-error-code: ERR_NGROK_3200")),
    "moved": Trouble(ProbeStep.ANSWER, _answer(302, b"", b"location: http://elsewhere.example")),
    "elsewhere": Trouble(ProbeStep.ANSWER, _answer(404)),
    "loading": Trouble(ProbeStep.ANSWER, _answer(503)),
    "broken": Trouble(ProbeStep.ANSWER, _answer(500)),
    "page": Trouble(ProbeStep.ANSWER, _answer(200, b"<html>")),
    "no-list": Trouble(ProbeStep.ANSWER, _answer(200, b'{"hello": "world"}')),
    "compressed": Trouble(ProbeStep.ANSWER, _answer(200, b"x", b"content-encoding: gzip")),
    "huge": Trouble(ProbeStep.ANSWER, _answer(200, b" " * ((1 << 20) + 1))),
    "hangs-up": Trouble(ProbeStep.ANSWER, b""),
}
"""What happens to a request, by the first part of its path."""

STEPS: Mapping[str, ProbeStep | None] = {name: trouble.step for name, trouble in ANSWERS.items()} | {
    "nowhere": ProbeStep.NAME,
    "private": ProbeStep.ADDRESS,
    "metadata": ProbeStep.ADDRESS,
    "closed": ProbeStep.CONNECTION,
    "no-tls": ProbeStep.CONNECTION,
}
"""The step of a probe at which each server of `troubled` fails."""

NETWORKS = "127.0.0.0/8"
"""What a gateway must be allowed to dial to reach these servers."""

_NAMES = {"private.example": "10.20.30.40", "metadata.example": "169.254.169.254"}


async def resolve(host: str, port: int) -> Sequence[str]:
    """Resolve the names of these servers."""
    if host not in _NAMES:
        raise OSError("no such name")
    return [_NAMES[host]]


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        first = await reader.readexactly(1)
        if first == b"\x16":  # TLS, which this server does not speak
            writer.write(_answer(400))
            await writer.drain()
            return
        method, path, _ = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split(" ", 2)
        trouble = ANSWERS[path.split("/")[1]]
        writer.write(trouble.get if method == "GET" else trouble.post)
        await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


@asynccontextmanager
async def troubled() -> AsyncIterator[Mapping[str, str]]:
    """Run the servers, and yield their URLs by name."""
    server = await asyncio.start_server(_serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    urls = {name: f"http://127.0.0.1:{port}/{name}" for name in ANSWERS}
    urls |= {
        "nowhere": "http://nowhere.example:8000",
        "private": "http://private.example:8000",
        "metadata": "http://metadata.example:8000",
        "closed": f"http://127.0.0.1:{free_port()}",
        "no-tls": f"https://127.0.0.1:{port}",
    }
    async with server:
        yield urls
