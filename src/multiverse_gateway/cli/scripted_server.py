"""A model server without a model, for the demonstration and the tutorial: OpenAI's chat API, plain and streamed word by word.

    python -m multiverse_gateway.cli.scripted_server NAME [PORT]

It listens on the given port of 127.0.0.1, or on any free one, and prints the number. It stops when its standard input ends.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "demo-model"
WORD_SECONDS = 0.05
MAX_BODY = 1 << 20


def words_of(name: str) -> list[str]:
    """Return the words of the only answer that this server gives."""
    return f"Hello, this is server {name}. I have no model inside, but I speak like one: word after word.".split()


def completion(name: str, model: str) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""
    message = {"role": "assistant", "content": " ".join(words_of(name))}
    count = len(words_of(name))
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count},
    }


def events(name: str, model: str) -> Iterator[bytes]:
    """Return the events of a streamed answer, one for each word."""
    frame = {"id": f"chatcmpl-{name}", "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": f"{word} "}, None) for word in words_of(name)]
    for delta, reason in [*deltas, ({}, "stop")]:
        yield f"data: {json.dumps({**frame, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n".encode()
    yield b"data: [DONE]\n\n"


class ScriptedServer(ThreadingHTTPServer):
    """An HTTP server on 127.0.0.1; `port` 0 takes any free port."""

    daemon_threads = True

    def __init__(self, name: str, *, port: int = 0, word_seconds: float = WORD_SECONDS) -> None:
        super().__init__(("127.0.0.1", port), _Answer)
        self.name = name
        self.word_seconds = word_seconds


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        """Return the list of models, which has one entry."""
        if self.path.rstrip("/") == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": self.server.name}]})
        else:
            self._refuse(404, "This server supports only /v1/models and /v1/chat/completions.")

    def do_POST(self) -> None:
        """Answer a chat completion, as a stream if the request asks for one."""
        try:
            request = json.loads(self.rfile.read(min(MAX_BODY, int(self.headers.get("content-length") or 0))))
            model, stream = str(request["model"]), bool(request.get("stream"))
        except (ValueError, KeyError, TypeError):
            self._refuse(400, "The body must be a JSON object with a model.")
            return
        if self.path != "/v1/chat/completions":
            self.do_GET()
        elif stream:
            self._stream(model)
        else:
            self._send(200, completion(self.server.name, model))

    def _send(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})

    def _stream(self, model: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for event in events(self.server.name, model):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.wfile.flush()
                time.sleep(self.server.word_seconds)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Write no access log: the terminal shows only the port."""


def _main() -> None:
    with ScriptedServer(sys.argv[1], port=int(sys.argv[2]) if len(sys.argv) > 2 else 0) as server:
        print(server.server_port, flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.read()


if __name__ == "__main__":
    _main()
