"""Reading bodies strictly, and what the operations do to the registry."""

from pathlib import Path
from typing import Any

import anyio
import attrs
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from multiverse_gateway.alias_book import save_alias
from multiverse_gateway.api.connection_tests import try_connection
from multiverse_gateway.api.exports import ImportCounts, export_of, import_counts
from multiverse_gateway.api.request_reading import parse_change, parse_import, parse_registration, parse_test
from multiverse_gateway.api.response_types import iso_or_none
from multiverse_gateway.core.errors import BadRequest, InvalidField, ProbeRefused, ServerNotFound
from multiverse_gateway.core.health import HealthState, ProbeFailed
from multiverse_gateway.core.servers import Capabilities, Server, ServerId
from multiverse_gateway.registration import export_registry, import_registry, register, remove, server_id_of, update
from multiverse_gateway.stores.sqlite import SqliteStore
from support.gateways import BODY, Stage, stage

FULL: dict[str, Any] = {
    **BODY,
    "api_key": "sk-backend",
    "capabilities": {"max_tokens": 100, "context_length": 4096, "streaming": False},
    "metadata": {"student_id": "s1", "description": "in the lab"},
    "max_concurrency": 4,
    "weight": 7,
}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"model_name": ""}, "model_name"),
    ({"model_name": "a b"}, "model_name"),
    ({"model_name": "x" * 129}, "model_name"),
    ({"model_name": "ti\nny"}, "model_name"),
    ({"model_name": 5}, "model_name"),
    ({"endpoint_url": "ftp://host"}, "endpoint_url"),
    ({"endpoint_url": "http://user:word@host"}, "endpoint_url"),
    ({"endpoint_url": "http://host/?q=1"}, "endpoint_url"),
    ({"endpoint_url": ["http://host"]}, "endpoint_url"),
    ({"api_key": ""}, "api_key"),
    ({"api_key": "two words"}, "api_key"),
    ({"api_key": "line\r\nbreak"}, "api_key"),
    ({"api_key": "ключ"}, "api_key"),
    ({"api_key": "k" * 513}, "api_key"),
    ({"api_key": 12345}, "api_key"),
    ({"capabilities": []}, "capabilities"),
    ({"capabilities": {"max_tokens": True}}, "capabilities.max_tokens"),
    ({"capabilities": {"max_tokens": 0}}, "capabilities.max_tokens"),
    ({"capabilities": {"max_tokens": 1.0}}, "capabilities.max_tokens"),
    ({"capabilities": {"context_length": "4096"}}, "capabilities.context_length"),
    ({"capabilities": {"context_length": 2**70}}, "capabilities.context_length"),
    ({"capabilities": {"streaming": 1}}, "capabilities.streaming"),
    ({"capabilities": {"vision": True}}, "capabilities.vision"),
    ({"metadata": "me"}, "metadata"),
    ({"metadata": {"student_id": 7}}, "metadata.student_id"),
    ({"metadata": {"student_id": "s" * 129}}, "metadata.student_id"),
    ({"metadata": {"description": "d" * 1001}}, "metadata.description"),
    ({"metadata": {"description": "a\x00b"}}, "metadata.description"),
    ({"metadata": {"description": "a\u202eb"}}, "metadata.description"),
    ({"metadata": {"owner": "x"}}, "metadata.owner"),
    ({"max_concurrency": 0}, "max_concurrency"),
    ({"max_concurrency": 4097}, "max_concurrency"),
    ({"max_concurrency": True}, "max_concurrency"),
    ({"weight": 101}, "weight"),
    ({"weight": 1.5}, "weight"),
    ({"id": "x"}, "id"),
    ({"health_status": "healthy"}, "health_status"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    """TC-REG-002: in registrations, updates and imports alike, and the message is a sentence that says what to do."""
    for parse in (parse_registration, parse_test):
        with pytest.raises(BadRequest) as caught:
            parse({**BODY, **fields}) if not (parse is parse_test and fields == {"model_name": ""}) else parse({**BODY, "model_name": "?"})
        assert caught.value.param == param
        assert len(caught.value.message) > 15
    with pytest.raises(BadRequest) as caught:
        parse_change(fields)
    assert caught.value.param == param
    with pytest.raises(BadRequest) as caught:
        parse_import({"servers": [BODY, {**BODY, **fields}]})
    assert caught.value.param == f"servers[1].{param}"


@pytest.mark.parametrize("missing", ["model_name", "endpoint_url"])
def test_what_must_be_there_is_named(missing: str) -> None:
    for body in ({name: value for name, value in BODY.items() if name != missing}, {**BODY, missing: None}):
        with pytest.raises(BadRequest, match="missing") as caught:
            parse_registration(body)
        assert caught.value.param == missing
    with pytest.raises(BadRequest, match="cannot be cleared"):
        parse_change({missing: None})


def test_everything_is_read() -> None:
    found = parse_registration(FULL)
    assert (found.api_key, found.max_concurrency, found.weight) == ("sk-backend", 4, 7)
    assert found.capabilities == Capabilities(max_tokens=100, context_length=4096, streaming=False)
    assert (found.metadata.student_id, found.metadata.description) == ("s1", "in the lab")
    assert "sk-backend" not in repr(found)


def test_null_stands_for_the_default() -> None:
    names = ("api_key", "capabilities", "metadata", "max_concurrency", "weight")
    assert parse_registration({**BODY, **dict.fromkeys(names)}) == parse_registration(BODY)


def test_a_change_keeps_what_it_does_not_name() -> None:
    server = server_of(FULL)
    assert parse_change({}).apply(server) == server
    changed = parse_change({"capabilities": {"max_tokens": None}, "metadata": {"description": " new "}, "api_key": None}).apply(server)
    assert changed.capabilities == Capabilities(max_tokens=None, context_length=4096, streaming=False)
    assert (changed.metadata.student_id, changed.metadata.description, changed.api_key) == ("s1", "new", None)
    assert parse_change({"capabilities": None}).apply(server).capabilities == Capabilities()


def server_of(body: dict[str, Any]) -> Server:
    fields = {field.name: getattr(parse_registration(body), field.name) for field in attrs.fields(type(parse_registration(body)))}
    return Server(id=ServerId("x"), registered_at=1.0, created_at=1.0, updated_at=1.0, **fields)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*FULL, "registration_id", "registered_at", "servers", "format"]) | st.text(max_size=8)


@given(st.dictionaries(names, json_values | st.sampled_from(list(FULL.values())), max_size=6) | json_values)
def test_whatever_the_body_is_it_is_read_or_refused(body: Any) -> None:
    """No other exception than ours comes out, and its text can be sent."""
    for parse in (parse_registration, parse_test, parse_change, parse_import, lambda item: parse_import({"servers": [item]})):
        try:
            parse(body)
        except BadRequest as error:
            error.body().decode()


@pytest.mark.parametrize("text", ["", "x", "../../etc", "\x00", "123"])
def test_no_id_is_no_server(text: str) -> None:
    with pytest.raises(ServerNotFound):
        server_id_of(text)


def test_instants_have_a_zone() -> None:
    assert iso_or_none(None) is None
    assert iso_or_none(1_780_000_000.25) == "2026-05-28T20:26:40.250+00:00"


# The operations


def states(at: Stage) -> dict[str, HealthState]:
    return {server_id: route.health.state for server_id, route in at.gateway.table.routes.items()}


async def test_registering_routes_at_once() -> None:
    """TC-REG-001: when it returns, this process sends requests to the server."""
    async with stage() as at:
        accepted = await register(at.gateway, parse_registration(FULL))
        server = accepted.server
        assert accepted.is_new
        assert states(at) == {server.id: HealthState.HEALTHY}
        assert [item.passed for item in await at.gateway.store.history(server.id, 10)] == [True]


async def test_a_server_that_fails_its_probe_is_not_accepted() -> None:
    async with stage() as at:
        at.probe.failing["http://gpu.example:8000"] = "it is off"
        with pytest.raises(ProbeRefused, match="it is off"):
            await register(at.gateway, parse_registration(BODY))
        assert (await at.gateway.store.load()).servers == ()


async def test_registering_again_updates_the_record() -> None:
    """Owners run their scripts again: same id, new facts; a new key begins a generation, the rest does not."""
    async with stage() as at:
        first = (await register(at.gateway, parse_registration(BODY))).server
        at.clock.advance(10)
        accepted = await register(at.gateway, parse_registration({**BODY, "metadata": {"student_id": "s9"}}))
        second, created = accepted.server, accepted.is_new
        assert (second.id, created, second.generation, second.metadata.student_id) == (first.id, False, 1, "s9")
        assert (second.registered_at, second.updated_at) == (first.registered_at, first.updated_at + 10)
        third = (await register(at.gateway, parse_registration({**BODY, "api_key": "k"}))).server
        assert (third.id, third.generation) == (first.id, 2)
        assert states(at) == {first.id: HealthState.HEALTHY}


async def test_two_registrations_at_once_give_one_id() -> None:
    async with stage() as at:
        at.probe.waiting_for = 2
        ids = []

        async def run() -> None:
            accepted = await register(at.gateway, parse_registration(BODY))
            ids.append((accepted.server.id, accepted.is_new))

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            group.start_soon(run)
        assert len({server_id for server_id, _ in ids}) == 1
        assert sorted(created for _, created in ids) == [False, True]
        assert len((await at.gateway.store.load()).servers) == 1


async def test_registering_again_lifts_what_took_it_out() -> None:
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(BODY))).server
        for _ in range(3):
            at.gateway.health_book.report(server.id, ProbeFailed(1, "off", False))
        assert states(at) == {server.id: HealthState.DEACTIVATED}
        await register(at.gateway, parse_registration(BODY))
        assert states(at) == {server.id: HealthState.HEALTHY}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9000",
        "http://localhost:9000",
        "http://gpu.localhost:9000",
        "http://[::1]:9000",
        "http://10.0.0.1:9000",
        "http://169.254.169.254",
        "http://[::ffff:10.0.0.1]:9000",
        "http://0.0.0.0:9000",
    ],
)
async def test_closed_addresses_are_refused_before_anything_is_dialled(url: str) -> None:
    """In registrations, updates, tests and imports."""
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(BODY))).server
        before = len(at.probe.checked)
        bad = {**BODY, "endpoint_url": url}
        for attempt in (
            lambda: register(at.gateway, parse_registration(bad)),
            lambda: update(at.gateway, server.id, parse_change({"endpoint_url": url})),
            lambda: try_connection(at.gateway, parse_test(bad)),
            lambda: import_registry(at.gateway, parse_import({"servers": [bad]})),
        ):
            with pytest.raises(BadRequest) as caught:
                await attempt()
            assert str(caught.value.param).endswith("endpoint_url")
        assert len(at.probe.checked) == before
        assert (await at.gateway.store.load()).servers == (server,)


async def test_private_addresses_open_by_setting_but_never_the_gateway_itself() -> None:
    async with stage(allow_private_networks="true", port=8000) as at:
        accepted = await register(at.gateway, parse_registration({**BODY, "endpoint_url": "http://127.0.0.1:9000"}))
        assert accepted.is_new
        with pytest.raises(BadRequest, match="this gateway itself"):
            await register(at.gateway, parse_registration({**BODY, "endpoint_url": "http://127.0.0.1:8000"}))


async def test_an_update_probes_only_what_it_must() -> None:
    """TC-REG-006: a note needs no probe and no new generation; a URL, key or model does."""
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(FULL))).server
        server = await update(at.gateway, server.id, parse_change({"metadata": {"description": "x"}, "weight": 2}))
        assert (len(at.probe.checked), server.generation, server.weight, server.metadata.student_id) == (1, 1, 2, "s1")
        assert states(at) == {server.id: HealthState.HEALTHY}
        for generation, change in enumerate(({"endpoint_url": "http://new.example"}, {"api_key": None}, {"model_name": "other"}), start=2):
            server = await update(at.gateway, server.id, parse_change(change))
            assert (len(at.probe.checked), server.generation) == (generation, generation)
            assert states(at) == {server.id: HealthState.HEALTHY}
        assert list(at.gateway.table.models) == ["other"]


async def test_nothing_changes_when_the_new_url_fails() -> None:
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(FULL))).server
        at.probe.failing["http://new.example"] = "nobody there"
        with pytest.raises(ProbeRefused):
            await update(at.gateway, server.id, parse_change({"endpoint_url": "http://new.example", "weight": 9}))
        assert (await at.gateway.store.load()).servers == (server,)
        assert states(at) == {server.id: HealthState.HEALTHY}


async def test_an_update_cannot_take_another_servers_place() -> None:
    async with stage() as at:
        await register(at.gateway, parse_registration(BODY))
        other = (await register(at.gateway, parse_registration({**BODY, "endpoint_url": "http://other.example"}))).server
        with pytest.raises(BadRequest, match="already registered"):
            await update(at.gateway, other.id, parse_change({"endpoint_url": BODY["endpoint_url"]}))


async def test_an_update_revives_a_server_that_was_taken_out() -> None:
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(BODY))).server
        for _ in range(3):
            at.gateway.health_book.report(server.id, ProbeFailed(1, "off", False))
        await update(at.gateway, server.id, parse_change({"weight": 3}))
        assert states(at) == {server.id: HealthState.HEALTHY}


async def test_a_server_removed_during_its_update_stays_removed() -> None:
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(BODY))).server
        at.probe.arrived, at.probe.gate = anyio.Event(), anyio.Event()

        async def change() -> None:
            with pytest.raises(ServerNotFound):
                await update(at.gateway, server.id, parse_change({"endpoint_url": "http://new.example"}))

        async with anyio.create_task_group() as group:
            group.start_soon(change)
            await at.probe.arrived.wait()
            await remove(at.gateway, server.id)
            at.probe.gate.set()
        assert states(at) == {}


async def test_removal_stops_routing_and_is_final() -> None:
    """TC-REG-004, TC-REG-005: a second removal is an error; the same server registered later is a new one (US-004)."""
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(BODY))).server
        await remove(at.gateway, server.id)
        assert states(at) == {}
        with pytest.raises(ServerNotFound):
            await remove(at.gateway, server.id)
        accepted = await register(at.gateway, parse_registration(BODY))
        again, created = accepted.server, accepted.is_new
        assert created
        assert again.id != server.id


async def test_a_test_says_step_by_step_what_works() -> None:
    async with stage() as at:
        good = attrs.asdict(await try_connection(at.gateway, parse_test({"endpoint_url": "http://a.example"})))
        assert (good["ok"], [(step["step"], step["ok"]) for step in good["steps"]]) == (
            True,
            [("address", True), ("answer", True), ("key", True), ("model", True)],
        )
        at.probe.failing["http://b.example"] = "no answer"
        bad = attrs.asdict(await try_connection(at.gateway, parse_test({"endpoint_url": "http://b.example"})))
        assert (bad["ok"], bad["reason"], bad["steps"][-1]) == (False, "no answer", {"step": "answer", "ok": False, "message": "no answer"})
        at.probe.unauthorized.add("http://c.example")
        denied = attrs.asdict(await try_connection(at.gateway, parse_test({"endpoint_url": "http://c.example"})))
        assert [(step["step"], step["ok"]) for step in denied["steps"]] == [("address", True), ("answer", True), ("key", False)]
        assert (await at.gateway.store.load()).servers == ()


async def exported_from(at: Stage, *, include_keys: bool = False) -> dict[str, Any]:
    """Return the export of a gateway, as its API writes it."""
    registry = await export_registry(at.gateway, include_keys=include_keys)
    return attrs.asdict(export_of(registry, wall=at.gateway.wall(), include_keys=include_keys))


async def test_a_registry_survives_its_way_through_a_file() -> None:
    """What was exported with keys makes the same registry elsewhere, unproven until probed; importing twice changes nothing."""
    async with stage() as one, stage() as other:
        for body in (FULL, {**BODY, "endpoint_url": "http://second.example"}):
            await register(one.gateway, parse_registration(body))
        exported = await exported_from(one, include_keys=True)
        assert import_counts(await import_registry(other.gateway, parse_import(exported))) == ImportCounts(imported=2, created=2)
        assert (await exported_from(other, include_keys=True))["servers"] == exported["servers"]
        assert set(states(other).values()) == {HealthState.PROBING}
        assert all(route.health.next_probe.at <= other.clock.monotonic for route in other.gateway.table.routes.values())
        assert (await import_registry(other.gateway, parse_import(exported))).unchanged == 2


async def test_an_export_has_no_keys_and_an_import_without_keeps_them() -> None:
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(FULL))).server
        exported = await exported_from(at)
        assert "sk-backend" not in str(exported)
        exported["servers"][0]["weight"] = 9
        assert (await import_registry(at.gateway, parse_import(exported))).updated == 1
        assert at.gateway.table.routes[server.id].server.api_key == "sk-backend"
        assert at.gateway.table.routes[server.id].server.weight == 9
        assert states(at) == {server.id: HealthState.HEALTHY}


async def test_an_import_gives_a_removed_servers_id_to_nobody() -> None:
    async with stage() as at:
        server = (await register(at.gateway, parse_registration(FULL))).server
        exported = await exported_from(at)
        await remove(at.gateway, server.id)
        assert (await import_registry(at.gateway, parse_import(exported))).created == 1
        assert list(states(at)) != [server.id]


async def test_an_export_has_aliases_and_the_limits_of_hosts_that_their_servers_do_not_show() -> None:
    """Both are the same elsewhere; importing them twice changes nothing, and an export of an older version has neither."""
    async with stage() as one, stage() as other:
        for name in ("first", "second", "third"):
            body = {**BODY, "model_name": name, "upstream_model": f"org/{name}", "max_concurrency": 2}
            await register(one.gateway, parse_registration(body))
        (host,) = one.gateway.table.hosts.values()
        await register(one.gateway, parse_registration({**BODY, "endpoint_url": "http://second.example", "max_concurrency": 3}))
        await one.gateway.store.save_host(attrs.evolve(host, max_concurrency=5))
        await save_alias(one.gateway, "best", ["first", "other"])
        await save_alias(one.gateway, "other", ["second"])
        exported = await exported_from(one)
        assert exported["aliases"] == [{"name": "best", "models": ["first", "other"]}, {"name": "other", "models": ["second"]}]
        assert [(len(each["servers"]), each["max_concurrency"]) for each in exported["hosts"]] == [(3, 5)]
        assert {each["upstream_model"] for each in exported["servers"]} == {"org/first", "org/second", "org/third", None}

        older = {name: value for name, value in exported.items() if name not in ("aliases", "hosts")}
        counts = import_counts(await import_registry(other.gateway, parse_import(older)))
        assert (counts.created, counts.aliases) == (4, UNSET)
        assert other.gateway.registrations.registry.aliases == ()
        for created in (2, 0):
            plan = await import_registry(other.gateway, parse_import(exported))
            assert (plan.unchanged, plan.aliases) == (4, created)
            again = await exported_from(other)
            assert {**again, "exported_at": ""} == {**exported, "exported_at": ""}
        assert sorted(each.max_concurrency or 0 for each in other.gateway.table.hosts.values()) == [3, 5]
        assert {route.server.host_id for route in other.gateway.table.routes.values()} == set(other.gateway.table.hosts)


async def test_an_import_with_a_loop_of_aliases_changes_nothing() -> None:
    """Aliases are judged as they are once all are saved, whatever their order."""
    async with stage() as at:
        await save_alias(at.gateway, "a", ["b"])
        swapped = {"servers": [], "aliases": [{"name": "b", "models": ["a"]}, {"name": "a", "models": ["phi"]}]}
        looped = {"servers": [BODY], "aliases": [{"name": "x", "models": ["phi"]}, {"name": "b", "models": ["a"]}]}
        with pytest.raises(InvalidField) as caught:
            await import_registry(at.gateway, parse_import(looped))
        assert caught.value.param == "aliases[1].models"
        assert (states(at), len(at.gateway.registrations.registry.aliases)) == ({}, 1)
        assert (await import_registry(at.gateway, parse_import(swapped))).aliases == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "servers"),
        ({"servers": {}}, "servers"),
        ({"servers": [], "format": 2}, "format"),
        ({"servers": [], "more": 1}, "more"),
        ({"servers": [], "aliases": [{"name": "a b", "models": ["phi"]}]}, "aliases[0].name"),
        ({"servers": [], "aliases": [{"name": "a"}]}, "aliases[0].models"),
        ({"servers": [], "hosts": [{"servers": ["x"]}]}, "hosts[0].servers[0]"),
        ({"servers": [BODY], "hosts": [{"servers": ["6b29fc40-ca47-1067-b31d-00dd010662da"]}]}, "hosts[0].servers"),
        ({"servers": ["x"]}, "servers[0]"),
        ({"servers": [{**BODY, "registration_id": "x"}]}, "servers[0].registration_id"),
        ({"servers": [{**BODY, "registered_at": "yesterday"}]}, "servers[0].registered_at"),
        ({"servers": [{**BODY, "registered_at": "2026-05-01T12:00:00"}]}, "servers[0].registered_at"),
    ],
)
def test_a_bad_import_is_refused_whole(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_import(body)
    assert caught.value.param == param


async def test_two_processes_that_register_the_same_at_once_get_one_record(tmp_path: Path) -> None:
    """The second one updates what the first one made: each time one 201, one 200, the same id, and never an error."""
    database = tmp_path / "registry.db"
    async with stage(store=SqliteStore(database)) as one, stage(store=SqliteStore(database)) as two:
        for number in range(10):
            body = {**BODY, "endpoint_url": f"http://gpu-{number}.example"}
            answers: list[httpx2.Response] = []

            async def register(there: Stage, body: dict[str, Any] = body, answers: list[httpx2.Response] = answers) -> None:
                answers.append(await there.client.post("/admin/register", json=body))

            async with anyio.create_task_group() as group:
                group.start_soon(register, one)
                group.start_soon(register, two)
            assert sorted(answer.status_code for answer in answers) == [200, 201], [answer.text for answer in answers]
            assert len({answer.json()["registration_id"] for answer in answers}) == 1
