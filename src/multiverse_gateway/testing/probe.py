"""What every probe must do, as tests. Needs pytest with the anyio plug-in; no sockets are opened."""

from collections.abc import AsyncIterator, Callable

import anyio
import httpx2
import pytest

from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.protocols import Client, HealthProbe, ProbeResult

SECRET = "the-key-of-the-server"
LEAK = "words-of-the-server"

Answer = Callable[[httpx2.Request], httpx2.Response]


def make_server(**facts: object) -> Server:
    """Return a server that has a key."""
    values: dict[str, object] = {
        "id": ServerId("one"),
        "model_name": "tiny",
        "endpoint_url": "http://gpu.example:8000/prefix",
        "api_key": SECRET,
        "generation": 3,
        "registered_at": 1.0,
        "created_at": 1.0,
        "updated_at": 1.0,
    }
    return Server(**{**values, **facts})  # type: ignore[arg-type]


async def check(probe: HealthProbe, answer: Answer, server: Server | None = None) -> ProbeResult:
    """Probe a server that gives this answer."""
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), trust_env=False) as http:
        return await probe.check(server or make_server(), http)


def _fail(error: Exception) -> Answer:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise error

    return answer


def _always(status: int, content: bytes = LEAK.encode(), **headers: str) -> Answer:
    return lambda request: httpx2.Response(status, content=content, headers={"x-leak": LEAK, **headers})


BROKEN: dict[str, Answer] = {
    "refused": _fail(httpx2.ConnectError(f"connection refused by {LEAK}")),
    "too slow to connect": _fail(httpx2.ConnectTimeout(LEAK)),
    "too slow to answer": _fail(httpx2.ReadTimeout(LEAK)),
    "cut": _fail(httpx2.RemoteProtocolError(LEAK)),
    "no HTTP": _fail(httpx2.ReadError(LEAK)),
    "a key that cannot be a header": _fail(httpx2.LocalProtocolError(LEAK)),
    "no page": _always(404),
    "a fault": _always(500),
    "loading": _always(503),
    "a redirect": _always(302, location=f"http://{LEAK}.example"),
    "an odd status": _always(299),
    "a page": _always(200, f"<html>{LEAK}</html>".encode()),
    "nothing": _always(200, b""),
    "no UTF-8": _always(200, b'{"data": "\xff"}'),
    "another JSON": _always(200, b'{"hello": "%s"}' % LEAK.encode()),
    "a number": _always(200, b"1"),
    "a deep one": _always(200, b"[" * 100_000),
    "compressed": _always(200, b"\x1f\x8b", **{"content-encoding": "gzip"}),
    "too large": _always(200, b'{"data": [], "choices": [{}], "pad": "' + b" " * (1 << 20) + b'"}'),
}
"""Answers of servers that are not well, whatever is asked."""


class ProbeContract:
    """Subclass it with the fixtures `probe`, and `good`: the answer to it of a server that is well."""

    async def test_a_good_server_passes(self, probe: HealthProbe, good: Answer) -> None:
        """The result names the server and its generation."""
        result = await check(probe, good)
        assert (result.server_id, result.generation, result.passed) == ("one", 3, True)
        assert (result.reason, result.unauthorized) == (None, False)
        assert result.checked_at > 1e9
        assert 0 <= result.duration < 60

    async def test_the_servers_own_key_is_sent(self, probe: HealthProbe, good: Answer) -> None:
        """And nothing is when it has none; the request goes below the registered URL."""
        asked: list[httpx2.Request] = []

        def answer(request: httpx2.Request) -> httpx2.Response:
            asked.append(request)
            return good(request)

        await check(probe, answer)
        await check(probe, answer, make_server(api_key=None))
        assert [request.headers.get("authorization") for request in asked] == [f"Bearer {SECRET}", None]
        assert {request.headers["ngrok-skip-browser-warning"] for request in asked} == {"1"}
        assert all(str(request.url).startswith("http://gpu.example:8000/prefix/v1/") for request in asked)

    @pytest.mark.parametrize("status", [401, 403])
    @pytest.mark.parametrize("key", [None, SECRET])
    async def test_a_refused_key_is_told_apart(self, probe: HealthProbe, status: int, key: str | None) -> None:
        """Only the owner can help; the words say how."""
        result = await check(probe, _always(status), make_server(api_key=key))
        assert (result.passed, result.unauthorized) == (False, True)
        assert "api_key" in (result.reason or "")

    @pytest.mark.parametrize("name", BROKEN)
    async def test_a_reason_is_in_words(self, probe: HealthProbe, name: str) -> None:
        """One line for people: nothing that the server sent, no key, and it does not raise."""
        result = await check(probe, BROKEN[name])
        assert not result.passed
        assert not result.unauthorized
        reason = result.reason or ""
        assert 10 < len(reason) < 256
        assert reason.isprintable()
        assert LEAK not in reason
        assert SECRET not in reason

    async def test_an_endless_answer_is_left(self, probe: HealthProbe) -> None:
        """No more than a few MiB are read."""
        sent = 0

        async def pieces() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                yield b" " * (1 << 16)

        result = await check(probe, lambda request: httpx2.Response(200, content=pieces()))
        assert not result.passed
        assert sent < 100

    async def test_the_caller_owns_the_timeout(self, probe: HealthProbe) -> None:
        """Canceled, it ends at once and swallows nothing."""
        began = anyio.Event()

        class Silent(httpx2.AsyncBaseTransport):
            async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
                began.set()
                await anyio.sleep_forever()
                raise AssertionError

        async def run(http: Client) -> None:
            await probe.check(make_server(), http)
            raise AssertionError

        async with httpx2.AsyncClient(transport=Silent(), trust_env=False, timeout=None) as http, anyio.create_task_group() as group:
            group.start_soon(run, http)
            await began.wait()
            group.cancel_scope.cancel()
