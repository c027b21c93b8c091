"""The fair queue over real sockets: whose turn it is when the only server of a model is busy. At both doors."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator

import httpx2
import pytest

from support import behaviours
from support.backends import Backend
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

SCRIPT, PERSON = ("a-key-of-the-script-0000000000001", "a-key-of-the-person-0000000000002")


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """Return a gateway with two client keys, and eight places."""
    door: Door = request.param
    settings = {"CLIENT_API_KEYS": f"{SCRIPT},{PERSON}", "MULTIVERSE_MAX_QUEUE": "8", **door_setting(door)}
    with GatewayProcess(settings) as process:
        yield process


class Callers:
    """Callers of one busy model; remembers who was answered, in order."""

    def __init__(self, gateway: GatewayProcess, model: str, stream: bool = False) -> None:
        self.gateway = gateway
        self.model = model
        self.stream = stream
        self.answers: list[tuple[str, httpx2.Response]] = []
        self.threads: list[threading.Thread] = []

    def call(self, name: str, key: str, **headers: str) -> None:
        """Send a request in the background."""

        def run() -> None:
            body = {"model": self.model, "messages": [{"role": "user", "content": name}], "stream": self.stream}
            with httpx2.Client(base_url=self.gateway.url, timeout=30) as client:
                sent = client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}", **headers})
            self.answers.append((name, sent))

        self.threads.append(thread := threading.Thread(target=run))
        thread.start()

    def waiting(self) -> int:
        """Return how many requests wait for the model."""
        return int(sum(self.figures("multiverse_requests_waiting").values()))

    def figures(self, metric: str) -> dict[str, float]:
        """Return what a metric says of the model, by band."""
        text = self.gateway.call("GET", "/metrics").text
        pattern = rf'^{metric}\{{band="(\w+)",model="{self.model}"\}} (\S+)$'
        return {band: float(value) for band, value in re.findall(pattern, text, re.MULTILINE)}

    def end(self) -> None:
        """Wait for all answers."""
        for thread in self.threads:
            thread.join(30)

    def names(self, status: int) -> list[str]:
        """Return who was answered so, in order."""
        return [name for name, answer in self.answers if answer.status_code == status]


@pytest.fixture
def busy(gateway: GatewayProcess) -> Iterator[Callable[..., tuple[Callers, Backend, behaviours.Gate]]]:
    """Return a maker of busy models: the script's first request is at the only server, which answers when the gate opens."""
    servers = []

    def make(model: str, slots: int = 1) -> tuple[Callers, Backend, behaviours.Gate]:
        server, gate = Backend(model, models=(model,)), behaviours.Gate()
        servers.append(running := serving(server))
        running.__enter__()
        gateway.register(model, server.url, max_concurrency=slots)
        server.behave = gate.held(behaviours.good())
        callers = Callers(gateway, model)
        callers.call("script", SCRIPT)
        wait_until(lambda: server.running == 1)
        return callers, server, gate

    yield make
    for running in servers:
        running.__exit__(None, None, None)


def test_a_person_does_not_wait_behind_a_script(busy: Callable[..., tuple[Callers, Backend, behaviours.Gate]]) -> None:
    """The script's eight requests fill the queue; the next person takes the place of the newest, and is served next."""
    callers, server, gate = busy("crowded")
    for number in range(8):
        callers.call("script", SCRIPT)
        wait_until(lambda number=number: callers.waiting() == number + 1)  # type: ignore[misc]
    callers.call("person", PERSON)
    wait_until(lambda: len(callers.answers) == 1)
    assert callers.names(503) == ["script"]
    refusal = callers.answers[0][1]
    assert refusal.json()["error"]["code"] == "overloaded"
    assert int(refusal.headers["retry-after"]) >= 1
    assert refusal.headers["x-multiverse-queue-length"] == "8"
    gate.open()
    callers.end()
    assert server.most_running == 1
    assert [json.loads(request.body)["messages"][0]["content"] for request in server.requests[:3]] == ["script", "person", "script"]
    assert callers.names(200).count("script") == 8
    waits = [int(answer.headers.get("x-multiverse-queued-ms", 0)) for _, answer in callers.answers if answer.status_code == 200]
    assert waits.count(0) == 1, "only the first one did not wait"
    assert callers.figures("multiverse_queue_wait_seconds_count") == {"interactive": 9.0}
    assert callers.figures("multiverse_queue_wait_seconds_sum")["interactive"] >= sum(waits) / 1000
    assert 0.5 <= callers.figures("multiverse_queue_fairness")["interactive"] <= 1.0, "two clients have waited"


def test_bulk_requests_leave_slots_free(busy: Callable[..., tuple[Callers, Backend, behaviours.Gate]]) -> None:
    """While anybody sends other requests, all bulk requests together hold a quarter of the slots: a person is served at once."""
    callers, server, gate = busy("mixed", slots=4)
    for number in range(6):
        callers.call("bulk", PERSON, **{"x-multiverse-priority": "Bulk"})
        wait_until(lambda number=number: (server.running, callers.waiting()) == (2, number))  # type: ignore[misc]
    server.behave = behaviours.good()
    callers.call("quick", PERSON)
    wait_until(lambda: callers.names(200) == ["quick"])
    assert (server.running, callers.waiting()) == (2, 5)
    assert callers.figures("multiverse_requests_waiting") == {"bulk": 5.0}
    gate.open()
    callers.end()
    assert callers.names(200).count("bulk") == 6
    assert callers.figures("multiverse_queue_wait_seconds_count") == {"bulk": 5.0}


def test_requests_of_a_bulk_key_are_bulk(gateway: GatewayProcess, busy: Callable[..., tuple[Callers, Backend, behaviours.Gate]]) -> None:
    """Without any header, and from the moment at which the key becomes one."""
    made = gateway.admin("POST", "/admin/keys", {"name": "nightly", "bulk": True}).json()
    callers, server, gate = busy("nightly", slots=4)
    for number in range(3):
        callers.call("bulk", made["key"])
        wait_until(lambda number=number: (server.running, callers.waiting()) == (2, number))  # type: ignore[misc]
    gateway.admin("PATCH", f"/admin/keys/{made['id']}", {"bulk": False})
    callers.call("interactive", made["key"])
    wait_until(lambda: server.running == 3)
    gate.open()
    callers.end()
    assert callers.names(200).count("bulk") == 3


def test_a_rejected_client_learns_that_its_own_requests_are_in_the_way(
    busy: Callable[..., tuple[Callers, Backend, behaviours.Gate]],
) -> None:
    """While a person uses the model, the script holds two of its four slots: its refusal does not say that every server is busy."""
    callers, server, gate = busy("shared", slots=4)
    callers.call("person", PERSON)
    wait_until(lambda: server.running == 2)
    for number in range(9):
        callers.call("script", SCRIPT)
        wait_until(lambda number=number: (server.running, callers.waiting()) == (3, number))  # type: ignore[misc]
    callers.call("script", SCRIPT)
    wait_until(lambda: callers.names(503) == ["script"])
    message = callers.answers[0][1].json()["error"]["message"]
    assert message.startswith(
        "Your requests hold half of the slots of the model 'shared', the limit of one client while others use it, and "
    )
    gate.open()
    callers.end()
    assert (callers.names(200).count("script"), server.most_running) == (10, 3)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_one_client_cannot_take_all_that_the_gateway_has_room_for(door: Door, large: bool) -> None:
    """Neither of the requests in progress nor of the memory for bodies, be its server without a limit: others are served at once."""
    settings = {"MULTIVERSE_BODY_BUDGET_BYTES": "4000000"} if large else {"MULTIVERSE_MAX_IN_FLIGHT": "8"}
    with GatewayProcess({"CLIENT_API_KEYS": f"{SCRIPT},{PERSON}", **settings, **door_setting(door)}) as gateway:
        server, other, gate = Backend("slow", models=("slow",)), Backend("quick", models=("quick",)), behaviours.Gate()
        server.behave = gate.held(behaviours.good())
        with serving(server, other):
            gateway.register("slow", server.url, max_concurrency=None)
            gateway.register("quick", other.url)
            script, person = Callers(gateway, "slow"), Callers(gateway, "quick")
            for number in range(1, 7):
                script.call("x" * 900_000 if large else "script", SCRIPT)
                wait_until(lambda number=number: server.running + len(script.answers) == number)  # type: ignore[misc]
            assert server.running == (2 if large else 4)
            assert {answer.json()["error"]["code"] for _, answer in script.answers} == {"overloaded"}
            for _ in range(2):
                person.call("x" * 900_000 if large else "person", PERSON)
                person.end()
            assert [answer.status_code for _, answer in person.answers] == [200, 200]
            gate.open()
            script.end()
            wait_until(lambda: "multiverse_body_bytes 0.0" in gateway.call("GET", "/metrics").text)
            again = Callers(gateway, "slow")
            again.call("x" * 900_000 if large else "script", SCRIPT)
            again.end()
            assert again.names(200), "what a client held is given back"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_caps_takes_half_of_the_gateway_at_most(door: Door, stream: bool) -> None:
    """Many clients of one model fill its half and a quarter with those that wait; another model is served at once all the same."""
    settings = {"MULTIVERSE_MAX_IN_FLIGHT": "8", "TRUSTED_PROXIES": "127.0.0.1/32", **door_setting(door)}
    with GatewayProcess(settings) as gateway:
        server, other, gate = Backend("slow", models=("slow",)), Backend("quick", models=("quick",)), behaviours.Gate()
        server.behave = gate.held(behaviours.good())
        with serving(server, other):
            gateway.register("slow", server.url, max_concurrency=None)
            gateway.register("quick", other.url)
            crowd, person = Callers(gateway, "slow", stream), Callers(gateway, "quick", stream)
            for number in range(4):
                crowd.call(f"student {number}", SCRIPT, **{"x-forwarded-for": f"198.51.100.{number}"})
                wait_until(lambda number=number: server.running == number + 1)  # type: ignore[misc]
            for number in range(4, 8):
                crowd.call(f"student {number}", SCRIPT, **{"x-forwarded-for": f"198.51.100.{number}"})
                wait_until(lambda number=number: crowd.waiting() + len(crowd.answers) == number - 3)  # type: ignore[misc]
            assert (server.running, crowd.waiting()) == (4, 2)
            assert "take up half of what the gateway handles at a time" in crowd.answers[0][1].json()["error"]["message"]
            person.call("person", PERSON, **{"x-forwarded-for": "198.51.100.99"})
            person.end()
            assert person.names(200) == ["person"]
            gate.open()
            crowd.end()
            assert (server.most_running, len(crowd.names(200)), len(crowd.names(503))) == (4, 6, 2)
