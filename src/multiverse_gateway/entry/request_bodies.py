"""Bodies of requests: how large they may be, how slowly they may come, and what is read of those that nothing needs."""

from collections.abc import Callable
from typing import Any

import anyio
import msgspec

from multiverse_gateway.core.errors import (
    InvalidJSON,
    RequestTimeout,
    RequestTooLarge,
)
from multiverse_gateway.core.lenient import BOM, is_utf8
from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.entry.asgi_types import App, Message, Receive, Scope, Send
from multiverse_gateway.entry.framing import declared_length, may_have_body
from multiverse_gateway.entry.identity import Headers
from multiverse_gateway.relay.request_body import DROPPED_BYTES

GRACE = 5.0
"""Seconds for which a body may come as slowly as it likes."""
LEAST_RATE = 16 * 1024
"""Bytes per second that a body must come at on average, after `GRACE`."""


class ClientGone(Exception):
    """The caller left before its body was complete, and does not wait for an answer."""


def too_large(limit: int) -> RequestTooLarge:
    """Return the refusal of a body over the limit."""
    return RequestTooLarge(f"The body is larger than {limit:,} bytes; send a smaller one")


def body_deadline(received: int, elapsed: float, pause: float) -> float:
    """Return the seconds after its beginning by which more of a body must arrive.

    The last of the `received` bytes arrived `elapsed` seconds after the beginning; the next may take `pause` seconds, unless the whole
    body would then be slower than `LEAST_RATE`.

    >>> body_deadline(0, 0.0, 30.0), body_deadline(1 << 20, 60.0, 30.0), body_deadline(1 << 20, 10.0, 30.0)
    (5.0, 69.0, 40.0)
    """
    return min(elapsed + pause, GRACE + received / LEAST_RATE)


def too_slow() -> RequestTimeout:
    """Return the refusal of a body that did not come in time."""
    return RequestTimeout(f"The body arrived too slowly; send at least {LEAST_RATE // 1024} KiB per second, without long pauses")


async def read_body(receive: Receive, limit: int, pause: float, *, headers: Headers = ()) -> bytes:
    """Read a request's body of at most `limit` bytes.

    Raises:
        RequestTooLarge: The body is larger, which `headers` may declare before anything is read.
        RequestTimeout, ClientGone: As for `read_pieces`.
    """
    if (declared_length(headers) or 0) > limit:
        raise too_large(limit)
    size = 0

    def hold(count: int) -> None:
        nonlocal size
        size += count
        if size > limit:
            raise too_large(limit)

    return await read_pieces(receive, pause, hold)


async def read_pieces(receive: Receive, pause: float, hold: Callable[[int], None]) -> bytes:
    """Read a request's body, bounded in time; `hold` gets the size of each piece and raises an error if the body is too large to hold.

    Raises:
        RequestTimeout: Nothing arrives for `pause` seconds, or the body arrives too slowly; time in which the process was stopped does not
            count.
        ClientGone: The client disconnected.
    """
    begun = arrived = anyio.current_time()
    pieces: list[bytes] = []
    size = 0
    while True:
        deadline = begun + body_deadline(size, arrived - begun, pause)
        message: Message | None = None
        with anyio.CancelScope(deadline=deadline):
            message = await receive()
        now = anyio.current_time()
        if message is None:
            if not stopped_seconds(deadline, now):
                raise too_slow()
            begun += now - arrived  # the process was stopped, and what its sockets hold was not read yet
            arrived = now
            continue
        arrived = now
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        if piece:
            hold(len(piece))
            size += len(piece)
            pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object, whatever a hostile client made of it.

    Raises:
        InvalidJSON: It is not UTF-8, not JSON (NaN is not), nested too deeply, or no object.
    """
    body = body.removeprefix(BOM)
    if not is_utf8(body):
        raise InvalidJSON("The body is not UTF-8; encode it as UTF-8")
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidJSON("The body's JSON is nested too deeply; use fewer levels") from None
    except ValueError as error:
        what = f"not valid JSON ({error})" if body.strip() else "empty"
        raise InvalidJSON(f"The body is {what}; send a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidJSON("The body is not a JSON object; send one, such as {}")
    return value


async def run_draining(app: App, scope: Scope, receive: Receive, send: Send, *, patience: float) -> None:
    """Run an application that may answer before it has read the body: the rest is read and dropped while the answer is sent.

    Hypercorn needs this: with an unread body in its queue it does not get to sending. Bounded in bytes and time.
    """
    if not may_have_body(scope):
        await app(scope, receive, send)
        return
    lock = anyio.Lock()
    ended = False
    failure: Exception | None = None

    async def reading() -> Message:
        nonlocal ended
        async with lock:
            message = await receive()
            ended = ended or message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

    async def drain() -> None:
        left = DROPPED_BYTES
        with anyio.move_on_after(patience):
            while not ended and left > 0:
                left -= len((await reading()).get("body", b""))

    async with anyio.create_task_group() as group:

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and not ended:
                group.start_soon(drain)
            await send(message)

        try:
            await app(scope, reading, sending)
        except Exception as error:  # noqa: BLE001  nothing but cancellation leaves a group; raised below
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # else this frame and the error keep each other alive
