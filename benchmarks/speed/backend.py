"""A model server that costs next to nothing, so that what is measured is what stands before it.

Bodies are not parsed: the beginning is searched. The model's name says what happens, since it survives every gateway:

    *-20ms    a stream has an event every 20 ms, or of any other number
    *-idle    a stream has one event, and then silence
    *-flood   a stream never ends, as fast as it is read
    others    answers and streams come at once

Each event carries `T` and the 15 digits of the monotonic clock in nanoseconds, the same clock in every process of a machine.
"""

import argparse
import asyncio
import json
import re
import socket
import time
from typing import cast

MODEL = re.compile(rb'"model"\s*:\s*"([^"]*)"')
STREAM = re.compile(rb'"stream"\s*:\s*true')
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
PACE = re.compile(r"-(\d+)ms$")
SEARCHED = 1024
EVENTS = 64
"""Events of one stream, without its end."""

_BASE = {"id": "chatcmpl-bench0000000000000001", "created": 1_700_000_000}
_WORDS = "The quick brown fox jumps over the lazy dog, again and again, until noon."


def answer(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data)


def chat(model: str) -> bytes:
    message = {"role": "assistant", "content": _WORDS}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 21, "completion_tokens": 16, "total_tokens": 37}
    return answer({**_BASE, "object": "chat.completion", "model": model, "choices": [choice], "usage": usage})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(model: str, delta: object, finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    data = {**_BASE, "object": "chat.completion.chunk", "model": model, "choices": [choice]}
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class Form:
    """The bytes of one model's answers, made once."""

    def __init__(self, model: str) -> None:
        self.chat = chat(model)
        self.event = event(model, {"role": "assistant", "content": "T%015d "}, None)
        self.end = chunk(event(model, {}, "stop")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        paced = PACE.search(model)
        self.pace = int(paced[1]) / 1000 if paced else 0.0
        self.idles = model.endswith("-idle")
        self.floods = model.endswith("-flood")

    def stamped(self) -> bytes:
        return chunk(self.event % time.monotonic_ns())


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"


class Connection(asyncio.Protocol):
    """One connection: its requests are answered one after the other."""

    models: bytes
    forms: dict[str, Form]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = bytearray()
        self.wanted = 0
        self.timer: asyncio.TimerHandle | None = None
        self.flood: bytes | None = None
        self.full = False
        self.loop = asyncio.get_running_loop()
        self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.flood = None

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer
        buffer += data
        while len(buffer) >= self.wanted and (end := buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(buffer[:end])
            length = LENGTH.search(head)
            size = end + 4 + int(length[1]) if length else self._size_of_chunked(end + 4) if CHUNKED.search(head) else end + 4
            if size > len(buffer):
                self.wanted = size
                return
            self.wanted = 0
            searched = bytes(buffer[end + 4 : min(size, end + 4 + SEARCHED)])
            del buffer[:size]
            self.request(head, searched)

    def _size_of_chunked(self, start: int) -> int:
        """Return where a chunked body ends, or one byte more than there is."""
        while (line := self.buffer.find(b"\r\n", start)) >= 0:
            length = int(self.buffer[start:line], 16)
            start = line + 4 + length
            if not length:
                return start
        return len(self.buffer) + 1

    def request(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET"):
            self.transport.write(self.models)
            return
        found = MODEL.search(body)
        model = found[1].decode() if found else "model"
        form = self.forms.get(model)
        if form is None:
            form = self.forms[model] = Form(model)
        if STREAM.search(body) is None:
            self.transport.write(form.chat)
        elif form.floods:
            self.flood = form.stamped() * 16
            self.transport.write(HEAD)
            self.pour()
        elif form.idles:
            self.transport.write(HEAD + form.stamped())
        elif form.pace:
            self.transport.write(HEAD + form.stamped())
            due = self.loop.time() + form.pace
            self.timer = self.loop.call_at(due, self.tick, form, EVENTS - 1, due)
        else:
            self.transport.write(HEAD + b"".join(form.stamped() for _ in range(EVENTS)) + form.end)

    def tick(self, form: Form, left: int, due: float) -> None:
        if not left:
            self.timer = None
            self.transport.write(form.end)
            return
        self.transport.write(form.stamped())
        due += form.pace
        self.timer = self.loop.call_at(due, self.tick, form, left - 1, due)

    def pour(self) -> None:
        if self.flood is not None and not self.full:
            self.transport.write(self.flood)
            self.loop.call_soon(self.pour)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self.pour()


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--models", default="model", help="what /v1/models lists, with commas between them")
    given = parser.parse_args()
    listed = [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "bench"} for name in given.models.split(",")]
    Connection.models = answer({"object": "list", "data": listed})
    Connection.forms = {}
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(given.port))
    else:
        uvloop.run(serve(given.port))


if __name__ == "__main__":
    main()
