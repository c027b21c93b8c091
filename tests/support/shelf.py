"""A model server that stores responses, as OpenAI's does: it answers every call for them, for those that it made itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qs

import attrs

from support import answers
from support.backends import Exchange


@attrs.define(eq=False)
class Shelf:
    """The behavior of such a server; give each backend one of its own.

    `holds_back` streams the first event only, until the response is canceled.
    """

    name: str
    holds_back: bool = False
    stored: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    began: int = 0
    cancelled: asyncio.Event = attrs.field(factory=asyncio.Event)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        request = exchange.request
        parts = request.path.removeprefix("/v1/responses").strip("/").split("/")
        if request.method == "POST" and parts == [""]:
            await self._make(exchange)
        elif parts[0] in self.stored:
            await self._show(exchange, parts[0], parts[1:])
        else:
            await self._refuse(exchange, parts[0])

    async def _make(self, exchange: Exchange) -> None:
        request = exchange.request
        previous = request.asked("previous_response_id")
        if previous is not None and previous not in self.stored:
            await self._refuse(exchange, previous)
            return
        self.began += 1
        made = answers.response_object(self.name, exchange.model, "Hello") | {"previous_response_id": previous}
        made["id"] = f"resp_{self.name}_{self.began}"
        if request.asked("background"):
            made["status"] = "queued"
        if request.asked("store") is not False:
            self.stored[made["id"]] = made
        if request.wants_stream:
            await self._stream(exchange, made)
        else:
            await exchange.answer(200, json.dumps(made).encode())

    async def _stream(self, exchange: Exchange, made: dict[str, Any]) -> None:
        created, completed = (
            answers.event({"type": kind, "response": made, "sequence_number": number}, name=kind)
            for number, kind in enumerate(("response.created", "response.completed"))
        )
        await exchange.start_stream()
        await exchange.chunk(created)
        if self.holds_back:
            await self.cancelled.wait()
        await exchange.chunk(completed, last=True)

    async def _show(self, exchange: Exchange, name: str, part: list[str]) -> None:
        request, made = exchange.request, self.stored[name]
        if request.method == "DELETE":
            del self.stored[name]
            made = {"id": name, "object": "response", "deleted": True}
        elif part == ["cancel"]:
            self.cancelled.set()
            made["status"] = "cancelled"
        elif part == ["input_items"]:
            made = {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
        elif parse_qs(request.target.partition("?")[2]).get("stream") == ["true"]:
            await self._stream(exchange, made)
            return
        await exchange.answer(200, json.dumps(made).encode(), headers=[("set-cookie", "a=b"), ("x-powered-by", "shelf")])

    async def _refuse(self, exchange: Exchange, name: str) -> None:
        await exchange.answer(404, answers.error_body(f"Response with id '{name}' not found.", kind="invalid_request_error"))
