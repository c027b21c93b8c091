"""A model whose only slot is taken until a gate opens: the next request waits in the queue."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess
from support.raw_client import RawClient
from support.sockets import serving, wait_until

CHAT = "/v1/chat/completions"


class Busy:
    """The model, its server, and the raw connections of a test, which end with `connections`. `key` is any client key that works."""

    def __init__(self, gateway: GatewayProcess, model: str, connections: ExitStack, *, key: str = "none") -> None:
        """Take the slot."""
        self.gateway = gateway
        self.model = model
        self.key = key
        self.server = Backend(model, models=(model,))
        self.gate = behaviours.Gate()
        self._connections = connections
        connections.enter_context(serving(self.server))
        gateway.register(model, self.server.url, max_concurrency=1)
        self.server.behave = self.gate.held()
        self.holder = self.ask(stream=False)
        wait_until(lambda: self.server.running == 1)

    def body(self, *, stream: bool) -> dict[str, Any]:
        """Return the body of a request."""
        return {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}

    def ask(
        self, key: str | None = None, *, stream: bool = True, comments: str = "comments", headers: Mapping[str, str] | None = None
    ) -> RawClient:
        """Send a request on a connection of its own, and read nothing."""
        client = self._connections.enter_context(RawClient(self.gateway.port))
        fields = {"authorization": f"Bearer {key or self.key}", "x-multiverse-queue": comments, **(headers or {})}
        client.request("POST", CHAT, json=self.body(stream=stream), headers=list(fields.items()))
        return client

    def queue(self, key: str | None = None) -> dict[str, Any]:
        """Return what `GET /v1/queue` tells the holder of a key."""
        answer = self.gateway.call("GET", "/v1/queue", headers={"authorization": f"Bearer {key or self.key}"})
        assert answer.status_code == 200, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def waiting(self) -> int:
        """Return how many requests wait for the model."""
        return next(int(entry["waiting"]) for entry in self.queue()["data"] if entry["model"] == self.model)

    def wait_for_comments(self) -> None:
        """Wait until a request with the key waits for so long that it has got a comment if it asked for them."""
        wait_until(lambda: any(entry["waited_seconds"] > 1.5 for entry in self.queue()["yours"]), within=60.0)


def stream_with_comments(gateway: GatewayProcess, model: str, command: Sequence[str], **more: Any) -> tuple[str, str]:
    """Run a program that reads a stream with comments, twice; return what it prints. `more` is for `subprocess`.

    The program gets the base URL and the model. Its first stream waits in the queue and is answered, its second one waits for a server that
    refuses it in the end, so that the error comes in the stream. `tests/e2e/programs` has such programs.
    """
    whole = [*command, gateway.base_url, model]
    with ExitStack() as connections:
        busy = Busy(gateway, model, connections)
        with subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more) as program:
            busy.wait_for_comments()
            busy.gate.open()
            answered, _ = program.communicate(timeout=60)
        busy.server.behave = behaviours.after(1.5, behaviours.context_too_long())
        refused = subprocess.run(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False, **more)
    return answered.strip(), refused.stdout.strip()


def check_program(gateway: GatewayProcess, model: str, command: Sequence[str], **more: Any) -> None:
    """Assert that the program prints the whole text of the first stream and nothing else, and that its library raises the second error."""
    answered, refused = stream_with_comments(gateway, model, command, **more)
    assert answered == f"{model} word1 word2 word3 word4", answered
    assert refused.startswith("raised "), refused
    assert "maximum context length" in refused, refused
