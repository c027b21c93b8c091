"""Client keys, owners' tokens and usage counts, over HTTP."""

from __future__ import annotations

import csv
import io
import logging
from datetime import UTC, datetime
from typing import Any

import anyio
import httpx2
import pytest

from multiverse_gateway.admin_key import key_digest
from multiverse_gateway.core.budget import until_next_day
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.key_names import nth_secret
from multiverse_gateway.core.servers import ClientKey, KeyTerms
from multiverse_gateway.core.usage import Counts, Usage, UsageKey
from multiverse_gateway.issued_keys import LEASE_ROLE, create_keys, new_seed, renew_key
from multiverse_gateway.observability.logging import configure
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore
from support.exchanges import RecordingClient, envelope, sent_by
from support.gateways import ADMIN_KEY, BODY, Stage, stage

NOBODY = "00000000-0000-4000-8000-000000000000"


async def make_key(at: Stage, **fields: Any) -> dict[str, Any]:
    response = await at.client.post("/admin/keys", json={"name": "alice", **fields})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


async def models(at: Stage, key: str | None) -> httpx2.Response:
    return await at.client.get("/v1/models", headers={"x-api-key": key or ""})


# Client keys


async def test_a_key_is_shown_once_and_kept_as_a_hash() -> None:
    store = MemoryStore()
    async with stage(store=store) as at:
        made = await make_key(at, rate_limit=5, models=["tiny", "tiny"], expires_at="2030-01-01T00:00:00Z")
        assert made["key"].startswith("mvg-client-")
        (kept,) = (await store.load()).keys
        assert (kept.digest, kept.models, kept.rate_limit) == (key_digest(made["key"]).hex(), ("tiny",), 5)
        listed = await at.client.get("/admin/keys")
        assert made["key"] not in listed.text
        assert listed.json() == [{name: value for name, value in made.items() if name != "key"}]
        assert made["works"] is True


async def test_a_key_lets_in_until_it_is_revoked() -> None:
    """At once, and for good; another of its name may be made then."""
    async with stage(require_client_auth=True) as at:
        assert (await models(at, None)).status_code == 401
        made = await make_key(at)
        assert (await models(at, made["key"])).status_code == 200
        taken = await at.client.post("/admin/keys", json={"name": "alice"})
        assert (taken.status_code, taken.json()["error"]["param"]) == (400, "name")
        for _ in range(2):
            revoked = await at.client.delete(f"/admin/keys/{made['id']}")
            assert (revoked.status_code, revoked.json()["works"]) == (200, False)
        assert (await models(at, made["key"])).status_code == 401
        assert (await models(at, (await make_key(at))["key"])).status_code == 200
        unknown = await at.client.delete(f"/admin/keys/{NOBODY}")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "key_not_found")


async def test_a_key_is_over_when_it_says() -> None:
    async with stage(require_client_auth=True) as at:
        made = await make_key(at, expires_at="2026-06-01T00:00:00Z")
        assert (await models(at, made["key"])).status_code == 200
        at.clock.advance(30 * 86_400)
        assert (await models(at, made["key"])).status_code == 401
        late = await at.client.post("/admin/keys", json={"name": "bob", "expires_at": "2026-06-01T00:00:00Z"})
        assert late.json()["error"]["param"] == "expires_at"


@pytest.mark.parametrize(("general", "own", "allowed"), [(100, 2, 2), (2, None, 2), (2, 0, 5), (0, 2, 2)])
async def test_a_key_has_a_limit_of_its_own(general: int, own: int | None, allowed: int) -> None:
    """More or less than everybody's, or none; each key's calls are counted apart."""
    async with stage(rate_limit_per_minute=general) as at:
        made, other = await make_key(at, rate_limit=own), await make_key(at, name="bob", rate_limit=1)

        async def unknown_call(key: str) -> int:
            return (await at.client.get("/v1/files", headers={"x-api-key": key})).status_code

        assert [await unknown_call(made["key"]) for _ in range(5)] == [404] * allowed + [429] * (5 - allowed)
        assert [await unknown_call(other["key"]) for _ in range(2)] == [404, 429]


async def test_a_daily_limit_goes_on_where_it_was_saved() -> None:
    """What stands in the usage counts of today is used up, of all models and of that key; tomorrow nothing is."""
    store = MemoryStore()
    async with stage(store=store) as at:
        made, other = await make_key(at, daily_limit=5), await make_key(at, name="bob")
        assert [(made["daily_limit"], made["used_today"]), (other["daily_limit"], other["used_today"])] == [(5, 0), (None, None)]
    rows = [("2026-05-27", "tiny", made, 9), ("2026-05-28", "tiny", made, 2), ("2026-05-28", "b", made, 1), ("2026-05-28", "b", other, 7)]
    await store.add_usage(
        "batch", [Usage(key=UsageKey(day, model, client=key["id"]), counts=Counts(requests=count)) for day, model, key, count in rows]
    )

    async def used(at: Stage) -> dict[str, int | None]:
        return {record["name"]: record["used_today"] for record in (await at.client.get("/admin/keys")).json()}

    async with stage(store=store) as at:
        assert await used(at) == {"alice": 3, "bob": None}
        await store.add_usage("more", [Usage(key=UsageKey("2026-05-28", "tiny", client=made["id"]), counts=Counts(requests=9))])
        await at.gateway.usage_book.learn_day()
        assert await used(at) == {"alice": 5, "bob": None}
        assert [(await models(at, made["key"])).status_code for _ in range(9)] == [200] * 9
        at.clock.advance(86_400)
        await at.gateway.usage_book.learn_day()
        assert await used(at) == {"alice": 0, "bob": None}


@pytest.mark.parametrize(("began", "used"), [(-1.0, 0), (0.0, 1)])
async def test_a_request_is_of_the_day_in_which_it_came(began: float, used: int) -> None:
    """However late it ends: what was let in before midnight is not held against the new day."""
    async with stage() as at:
        await at.register()
        made = await make_key(at, daily_limit=5)
        at.clock.advance(until_next_day(at.clock.wall) + began)
        request = sent_by(made["id"], envelope(model=BODY["model_name"]), at.clock.monotonic)
        exchange = Exchange(at.gateway, request, RecordingClient())
        at.gateway.begin(exchange)
        at.clock.advance(600.0)
        at.gateway.finished(exchange)
        await at.gateway.usage_book.flush()
        await at.gateway.usage_book.learn_day()
        assert [record["used_today"] for record in (await at.client.get("/admin/keys")).json()] == [used]


async def test_a_key_for_some_models_sees_no_others() -> None:
    async with stage() as at:
        for name in ("tiny", "org/large"):
            await at.register(model_name=name)
        made = await make_key(at, models=["org/large"])
        assert [item["id"] for item in (await models(at, made["key"])).json()["data"]] == ["org/large"]
        assert len((await models(at, None)).json()["data"]) == 2
        headers = {"x-api-key": made["key"]}
        assert (await at.client.get("/v1/models/tiny", headers=headers)).status_code == 404
        assert (await at.client.get("/v1/models/org/large", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": " "}, "name"),
        ({"name": None}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "Ada\u202e"}, "name"),
        ({"name": "ü" * 65}, "name"),
        ({"rate_limit": -1}, "rate_limit"),
        ({"daily_limit": 0}, "daily_limit"),
        ({"daily_limit": 2.5}, "daily_limit"),
        ({"max_at_once": -1}, "max_at_once"),
        ({"max_at_once": 100_001}, "max_at_once"),
        ({"max_at_once": True}, "max_at_once"),
        ({"bulk": "yes"}, "bulk"),
        ({"models": "tiny"}, "models"),
        ({"models": ["tiny", "a b"]}, "models[1]"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59.999999+00:00"}, "expires_at"),
        ({"expires_at": "0001-01-01T00:00:00+12:00"}, "expires_at"),
        ({"key": "mine"}, "key"),
    ],
)
async def test_a_bad_key_is_not_made(fields: dict[str, Any], param: str) -> None:
    async with stage() as at:
        refused = await at.client.post("/admin/keys", json={"name": "alice", **fields})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert (await at.client.get("/admin/keys")).json() == []


@pytest.mark.parametrize(("fields", "limit"), [({}, 64), ({"max_at_once": None}, 64), ({"max_at_once": 0}, 0), ({"max_at_once": 3}, 3)])
async def test_a_new_key_gets_the_limit_of_the_setting_unless_it_names_its_own(fields: dict[str, Any], limit: int) -> None:
    """The limit is stored with the key, so a setting that changes later does not change the key."""
    store = MemoryStore()
    async with stage(store=store) as at:
        made = await make_key(at, **fields)
        assert (made["max_at_once"], made["bulk"]) == (limit, False)
    async with stage(store=store, max_at_once_per_key=5) as at:
        assert [record["max_at_once"] for record in (await at.client.get("/admin/keys")).json()] == [limit]
        assert (await make_key(at, name="bob"))["max_at_once"] == 5


async def test_a_key_can_be_changed() -> None:
    """Fields that the body leaves out keep their values, null sets the default of a new key, and the key itself stays the same."""
    async with stage(require_client_auth=True) as at:
        made = await make_key(at, rate_limit=5, daily_limit=9, max_at_once=3, models=["tiny"], expires_at="2030-01-01T00:00:00Z")
        path = f"/admin/keys/{made['id']}"
        record = {name: value for name, value in made.items() if name != "key"}
        assert (await at.client.patch(path, json={})).json() == record
        for change in ({"max_at_once": 0}, {"bulk": True, "models": []}, {"rate_limit": None, "expires_at": None}, {"daily_limit": 8}):
            changed = await at.client.patch(path, json=change)
            record |= change
            assert (changed.status_code, changed.json()) == (200, record)
        cleared = (await at.client.patch(path, json={"max_at_once": None, "bulk": None})).json()
        assert (cleared["max_at_once"], cleared["bulk"]) == (64, False)
        assert (await models(at, made["key"])).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_at_once": -1}, "max_at_once"),
        ({"bulk": 1}, "bulk"),
        ({"name": ""}, "name"),
        ({"name": "a\u202eb"}, "name"),
        ({"blocked": "yes"}, "blocked"),
        ({"id": NOBODY}, "id"),
    ],
)
async def test_a_change_that_cannot_be_used_changes_nothing(body: dict[str, Any], param: str) -> None:
    async with stage() as at:
        path = f"/admin/keys/{(await make_key(at))['id']}"
        before = (await at.client.get("/admin/keys")).json()
        refused = await at.client.patch(path, json={"rate_limit": 1, **body})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert (await at.client.get("/admin/keys")).json() == before


async def test_only_a_key_that_is_not_revoked_can_be_changed() -> None:
    """A change never brings a revoked key back."""
    async with stage() as at:
        path = f"/admin/keys/{(await make_key(at))['id']}"
        await at.client.delete(path)
        assert (await at.client.patch(path, json={"expires_at": None})).status_code == 400
        assert (await at.client.patch(f"/admin/keys/{NOBODY}", json={"bulk": True})).status_code == 404


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("Jürgen Müller", "Jürgen Müller"),
        ("Ju\u0308rgen", "Jürgen"),
        ("O'Brien", "O'Brien"),
        ("Ng, Anna", "Ng, Anna"),
        ("李明", "李明"),
        ("山田\u3000太郎", "山田 太郎"),
        ("\u0639\u0644\u06cc\u200c\u0631\u0636\u0627",) * 2,
        ("👩\u200d🎓", "👩\u200d🎓"),
        ("=1+1", "=1+1"),
        ("<b>&amp;", "<b>&amp;"),
        (" a  b\n", "a b"),
    ],
)
async def test_a_name_is_of_any_language(given: str, kept: str) -> None:
    """Two spellings of the same characters are one name; the log and the table of usage hold it."""
    async with stage() as at:
        made = await make_key(at, name=given)
        assert made["name"] == kept
        again = await at.client.post("/admin/keys", json={"name": kept})
        assert (again.status_code, again.json()["error"]["code"]) == (400, "key_name_taken")
        day = datetime.fromtimestamp(at.clock.wall, UTC).date().isoformat()
        row = Usage(key=UsageKey(day, "tiny", client=made["id"]), counts=Counts(requests=1))
        await at.gateway.store.add_usage("batch", [row])
        (line,) = csv.DictReader(io.StringIO((await at.client.get("/admin/usage?format=csv")).text))
        assert line["client"] == ("'=1+1" if kept == "=1+1" else kept)


@pytest.mark.parametrize(
    "unfit", ["\u202e", "\u2066", "\u200b", "\u200e", "\ufeff", "\u0000", "\u0085", "\u2028", "\u3164", "\ue000", "\u200d"]
)
async def test_a_name_has_no_characters_that_change_the_text_around_it(unfit: str) -> None:
    """The error says which one to remove; nothing is made, and no key is renamed."""
    async with stage() as at:
        path = f"/admin/keys/{(await make_key(at))['id']}"
        for refused in (
            await at.client.post("/admin/keys", json={"name": f"Ada{unfit}Lovelace"}),
            await at.client.patch(path, json={"name": f"Ada{unfit}Lovelace"}),
        ):
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, "name")
            assert f"remove U+{ord(unfit):04X}" in error["message"]
        assert [record["name"] for record in (await at.client.get("/admin/keys")).json()] == ["alice"]


async def test_a_name_begins_with_a_character_of_its_own() -> None:
    """A mark would join whatever stands before the name."""
    async with stage() as at:
        refused = await at.client.post("/admin/keys", json={"name": "\u0301a"})
        assert refused.json()["error"]["message"].endswith("remove U+0301")


class FailingStore(MemoryStore):
    """A store that saves so many client keys and then fails; after that, nothing can be read either."""

    left = 2

    async def save_key(self, key: ClientKey) -> None:
        if self.left == 0:
            raise StorageUnavailable("the disk is full")
        self.left -= 1
        await super().save_key(key)

    async def version(self) -> int:
        if self.left == 0:
            raise StorageUnavailable("the disk is gone")
        return await super().version()


async def test_keys_that_were_made_before_the_store_failed_are_returned() -> None:
    """They could not be shown later; if none was made, the error is told."""
    store = FailingStore()
    async with stage(store=store) as at:
        seed = new_seed()
        made = await create_keys(at.gateway, ["a", "b", "c"], KeyTerms(), seed)
        assert [(key.name, key.digest) for key in made] == [
            (name, key_digest(nth_secret(seed, number)).hex()) for number, name in enumerate(("a", "b"))
        ]
        store.left = 1
        key = await renew_key(at.gateway, made[0].id, seed)
        assert key.digest == key_digest(nth_secret(seed, 0)).hex()
        assert (await at.client.post("/admin/keys", json={"name": "d"})).status_code == 503
        store.left = 9
        assert [key["name"] for key in (await at.client.get("/admin/keys")).json()] != []


async def test_a_key_is_renamed_unless_the_name_is_taken() -> None:
    """A key that expired gives its name away, and cannot come back under it."""
    async with stage() as at:
        made, other = await make_key(at, expires_at="2026-06-01T00:00:00Z"), await make_key(at, name="bob")
        path = f"/admin/keys/{made['id']}"
        taken = await at.client.patch(path, json={"name": "bob", "rate_limit": 1})
        assert taken.json()["error"]["code"] == "key_name_taken"
        assert (await at.client.patch(path, json={"name": "Ada"})).json()["name"] == "Ada"
        assert (await at.client.patch(path, json={"name": None})).json()["name"] == "Ada"
        assert (await models(at, made["key"])).status_code == 200
        at.clock.advance(30 * 86_400)
        states = {record["name"]: record["state"] for record in (await at.client.get("/admin/keys")).json()}
        assert states == {"Ada": "expired", "bob": "active"}
        assert (await at.client.patch(f"/admin/keys/{other['id']}", json={"name": "Ada"})).json()["name"] == "Ada"
        back = await at.client.patch(path, json={"expires_at": None})
        assert back.json()["error"]["code"] == "key_name_taken"
        assert (await at.client.patch(path, json={"expires_at": None, "name": "Ada 2"})).json()["state"] == "active"


@pytest.mark.parametrize("required", [True, False])
async def test_a_blocked_key_is_rejected_until_it_is_unblocked(required: bool) -> None:
    """Also on an open gateway, and the error says why; a second key that works lets in, and a revoked key is just unknown."""
    async with stage(require_client_auth=required) as at:
        made, other = await make_key(at), await make_key(at, name="bob")
        path = f"/admin/keys/{made['id']}"
        blocked = (await at.client.patch(path, json={"blocked": True})).json()
        assert (blocked["state"], blocked["works"]) == ("blocked", False)
        at.clock.advance(60)
        assert (await at.client.patch(path, json={"blocked": True, "rate_limit": 3})).json()["blocked_at"] == blocked["blocked_at"]
        refused = await models(at, made["key"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "key_blocked")
        assert refused.headers["x-should-retry"] == "false"
        both = {"x-api-key": made["key"], "authorization": f"Bearer {other['key']}"}
        assert (await at.client.get("/v1/models", headers=both)).status_code == 200
        taken = await at.client.post("/admin/keys", json={"name": "alice"})
        assert taken.json()["error"]["code"] == "key_name_taken"
        unblocked = (await at.client.patch(path, json={"blocked": False})).json()
        assert (unblocked["state"], unblocked["blocked_at"], unblocked["rate_limit"]) == ("active", None, 3)
        assert (await models(at, made["key"])).status_code == 200
        await at.client.patch(path, json={"blocked": True})
        assert (await at.client.delete(path)).json()["state"] == "revoked"
        assert (await models(at, made["key"])).status_code == (401 if required else 200)


async def test_a_key_is_renewed_in_its_place() -> None:
    """The old one is rejected at once; name, limits, usage and a block stay; the hint shows which one it is."""
    async with stage(require_client_auth=True) as at:
        made = await make_key(at, rate_limit=5)
        assert made["hint"] == f"{made['key'][:15]}…{made['key'][-4:]}"
        path = f"/admin/keys/{made['id']}"
        renewed = (await at.client.post(f"{path}/renew")).json()
        assert renewed["key"] not in ("", made["key"])
        same = {name: value for name, value in made.items() if name not in ("key", "hint")}
        assert {name: renewed[name] for name in same} == same
        assert [(await models(at, key)).status_code for key in (made["key"], renewed["key"])] == [401, 200]
        await at.client.patch(path, json={"blocked": True})
        again = (await at.client.post(f"{path}/renew")).json()
        assert again["state"] == "blocked"
        assert [(await models(at, key)).status_code for key in (renewed["key"], again["key"])] == [401, 403]
        await at.client.delete(path)
        assert (await at.client.post(f"{path}/renew")).status_code == 400
        assert (await at.client.post(f"/admin/keys/{NOBODY}/renew")).status_code == 404


async def test_changes_of_several_processes_come_one_after_the_other() -> None:
    """Two gateways on one store change the same keys at once: no name is given twice, and no change undoes another one."""
    store = MemoryStore()
    async with stage(store=store) as here, stage(store=store) as there:
        made = await make_key(here)
        path = f"/admin/keys/{made['id']}"
        answers: list[httpx2.Response] = []

        async def send(at: Stage, method: str, path: str, body: dict[str, Any]) -> None:
            answers.append(await at.client.request(method, path, json=body))

        async with anyio.create_task_group() as group:
            for number in range(5):
                for at in (here, there):
                    group.start_soon(send, at, "POST", "/admin/keys", {"name": f"bob {number}"})
                group.start_soon(send, here, "PATCH", path, {"rate_limit": number})
            group.start_soon(send, there, "POST", f"{path}/renew", {})
            group.start_soon(send, here, "PATCH", path, {"blocked": True})
        names = [record["name"] for record in (await there.client.get("/admin/keys")).json()]
        assert sorted(names) == ["alice", *(f"bob {number}" for number in range(5))]
        assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201] * 5 + [400] * 5
        renewed = next(answer.json()["key"] for answer in answers if "key" in answer.json() and answer.json().get("name") == "alice")
        (kept,) = [key for key in (await store.load()).keys if key.id == made["id"]]
        assert (kept.digest, kept.blocked_at is not None) == (key_digest(renewed).hex(), True)


async def test_a_change_waits_for_another_one_and_then_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error that can be retried; nothing was changed, and the lease is free again afterward."""
    monkeypatch.setattr("multiverse_gateway.issued_keys.PATIENCE_SECONDS", 0.05)
    store = MemoryStore()
    async with stage(store=store) as at:
        assert await store.claim(LEASE_ROLE, "another process", 60.0)
        refused = await at.client.post("/admin/keys", json={"name": "alice"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        assert (await store.load()).keys == ()
        await store.claim(LEASE_ROLE, "another process", 0.0)
        await make_key(at)


# Owners' tokens


def as_owner(token: str) -> dict[str, str]:
    return {"x-api-key": "", "authorization": f"Bearer {token}"}


async def test_an_owner_changes_checks_and_removes_the_own_server_only() -> None:
    """X16: no token opens anybody else's server."""
    async with stage() as at:
        mine, other = await at.register(), await at.register(endpoint_url="http://other.example")
        headers = as_owner(mine["owner_token"])
        allowed: list[tuple[str, str, Any]] = [
            ("PUT", "/admin/register/{}", {"weight": 3}),
            ("GET", "/admin/servers/{}", None),
            ("GET", "/admin/servers/{}/history", None),
            ("POST", "/admin/servers/{}/health-check", None),
            ("DELETE", "/admin/register/{}", None),
        ]
        for method, path, body in allowed:
            foreign = await at.client.request(method, path.format(other["id"]), json=body, headers=headers)
            assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "insufficient_permissions"), path
        forbidden: list[tuple[str, str, Any]] = [
            ("GET", "/admin/servers", None),
            ("POST", "/admin/register", BODY),
            ("GET", "/admin/keys", None),
            ("POST", "/admin/keys", {"name": "x"}),
            ("PATCH", f"/admin/keys/{NOBODY}", {"max_at_once": 0}),
            ("GET", "/admin/usage", None),
            ("GET", "/admin/export?include_keys=true", None),
            ("POST", f"/admin/servers/{mine['id']}/owner-token", None),
            ("PATCH", f"/admin/register/{mine['id']}", None),
            ("GET", f"/admin/register/{mine['id']}/", None),
        ]
        for method, path, body in forbidden:
            assert (await at.client.request(method, path, json=body, headers=headers)).status_code == 403, path
        for method, path, body in allowed:
            done = await at.client.request(method, path.format(mine["id"]), json=body, headers=headers)
            assert done.status_code == 200, (path, done.text)
        assert list(at.gateway.table.routes) == [other["id"]]
        assert (await at.client.get(f"/admin/servers/{mine['id']}", headers=headers)).status_code == 403


async def test_a_token_is_made_once_and_again_when_an_operator_says() -> None:
    """Who registers again keeps the token; a new one makes the old one void, and nothing shows either again."""
    async with stage() as at:
        first = await at.register(metadata={"student_id": "s1"})
        again = await at.register(weight=2)
        assert (again["owner_token"], again["id"]) == (None, first["id"])
        path = f"/admin/servers/{first['id']}"
        assert (await at.client.get(path, headers=as_owner(first["owner_token"]))).status_code == 200
        renewed = (await at.client.post(f"{path}/owner-token")).json()
        assert (await at.client.get(path, headers=as_owner(first["owner_token"]))).status_code == 403
        shown = await at.client.get(path, headers=as_owner(renewed["owner_token"]))
        assert (shown.status_code, shown.json()["metadata"]["student_id"], shown.json()["weight"]) == (200, None, 2)
        everything = shown.text + (await at.client.get("/admin/export?include_keys=true")).text
        assert "mvg-owner" not in everything
        assert key_digest(renewed["owner_token"]).hex() not in everything
        assert (await at.client.post(f"/admin/servers/{NOBODY}/owner-token")).status_code == 404


# Use


async def used(at: Stage) -> None:
    rows = [
        Usage(key=UsageKey("2026-05-27", "tiny", "a", "s1", "key-1"), counts=Counts(requests=2, prompt_tokens=10, completion_tokens=4)),  # type: ignore[arg-type]
        Usage(key=UsageKey("2026-05-28", "tiny", "a", "s1", ""), counts=Counts(requests=1, canceled=1)),  # type: ignore[arg-type]
        Usage(key=UsageKey("2026-05-28", "=1+1", "b", "", "key-1"), counts=Counts(requests=4, prompt_tokens=1)),  # type: ignore[arg-type]
        Usage(key=UsageKey("2025-01-01", "old", "b", "", ""), counts=Counts(requests=9)),  # type: ignore[arg-type]
    ]
    await at.gateway.store.add_usage("batch", rows)


async def test_use_is_counted_by_what_is_asked_for() -> None:
    async with stage() as at:
        await used(at)
        whole = (await at.client.get("/admin/usage")).json()
        assert (whole["since"], whole["until"], len(whole["rows"])) == ("2026-04-29", "2026-05-28", 3)
        assert whole["total"] == {"requests": 7, "failed": 0, "prompt_tokens": 11, "completion_tokens": 4, "canceled": 1}
        by_model = (await at.client.get("/admin/usage?by=model&since=2025-01-01")).json()["rows"]
        assert {row["model"]: (row["requests"], row["day"], row["server"]) for row in by_model} == {
            "=1+1": (4, None, None),
            "old": (9, None, None),
            "tiny": (3, None, None),
        }
        assert [row["requests"] for row in (await at.client.get("/admin/usage?by=client&client=key-1")).json()["rows"]] == [6]
        assert (await at.client.get("/admin/usage?server=b&owner=&model=tiny")).json()["rows"] == []
        assert (await at.client.get("/admin/usage?until=0001-01-05")).json()["rows"] == []
        backwards = "since=2026-02-01&until=2026-01-01"
        for query, param in (
            ("by=hour", "by"),
            ("since=yesterday", "since"),
            (backwards, "since"),
            ("format=x", "format"),
        ):
            refused = await at.client.get(f"/admin/usage?{query}")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_use_comes_as_a_table() -> None:
    """For spreadsheets, which must not take a model's name for a formula; keys stand there by their names."""
    async with stage() as at:
        made = await make_key(at, name="alice")
        key = UsageKey("2026-05-28", "=1+1", client=made["id"])
        await at.gateway.store.add_usage("batch", [Usage(key=key, counts=Counts(requests=4))])
        answer = await at.client.get("/admin/usage?format=csv")
        assert answer.headers["content-type"].startswith("text/csv")
        assert "usage-2026-04-29-2026-05-28.csv" in answer.headers["content-disposition"]
        assert answer.text.partition("\r\n")[0].endswith(",requests,failed,prompt_tokens,completion_tokens,canceled")
        (row,) = csv.DictReader(io.StringIO(answer.text))
        assert (row["model"], row["client"], row["client_id"], row["requests"]) == ("'=1+1", "alice", made["id"], "4")


async def test_no_token_is_taught_to_the_log_which_knows_its_form() -> None:
    """Otherwise a client that asks in vain, again and again, would make it slow."""
    logs = configure(Settings(admin_api_key=ADMIN_KEY), outputs=False)
    try:
        async with stage() as at:
            at.probe.failing[BODY["endpoint_url"]] = "nobody listens there"
            *_, redactor = [
                handler.redactor for handler in logging.getLogger("multiverse_gateway").handlers if hasattr(handler, "redactor")
            ]
            before = set(redactor.secrets())
            assert (await at.client.post("/admin/register", json=BODY)).status_code == 503
            assert (await at.client.post("/admin/register", json={})).status_code == 400
            token = (await at.register(endpoint_url="http://other.example"))["owner_token"]
            key = (await make_key(at))["key"]
            assert set(redactor.secrets()) == before
            for secret in (token, key):
                assert secret not in redactor(f"somebody sent {secret}")
    finally:
        logs.close()


async def test_an_owner_asks_for_few_probes() -> None:
    """Each new address is probed: ten a minute, or a token would tell which ports are open where. Operators do as they must."""
    async with stage() as at:
        mine = await at.register()
        path = f"/admin/register/{mine['id']}"
        headers = as_owner(mine["owner_token"])
        for number in range(10):
            moved = await at.client.put(path, json={"endpoint_url": f"http://gpu.example:{9000 + number}"}, headers=headers)
            assert moved.status_code == 200
        refused = await at.client.put(path, json={"endpoint_url": "http://gpu.example:9999"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert at.probe.checked[-1].endpoint_url == "http://gpu.example:9009"
        assert (await at.client.put(path, json={"weight": 3}, headers=headers)).status_code == 200
        assert (await at.client.put(path, json={"endpoint_url": "http://gpu.example:9999"})).status_code == 200


async def test_an_owner_asks_for_few_checks() -> None:
    """S13: ten a minute by whatever call, from whatever address, for each owner; with the admin key as many as are wanted."""
    async with stage(trusted_proxies=("127.0.0.1/32",)) as at:
        mine, other = [await at.register(endpoint_url=f"http://{name}.example") for name in ("mine", "other")]
        owner = as_owner(mine["owner_token"])

        async def check(server: dict[str, Any], headers: dict[str, str]) -> httpx2.Response:
            return await at.client.post(f"/admin/servers/{server['id']}/health-check", headers=headers)

        moved = await at.client.put(f"/admin/register/{mine['id']}", json={"endpoint_url": "http://mine.example:9000"}, headers=owner)
        assert moved.status_code == 200
        before = len(at.probe.checked)
        answers = [await check(mine, {**owner, "x-forwarded-for": f"198.51.100.{number}"}) for number in range(200)]
        assert [answer.status_code for answer in answers] == [200] * 9 + [429] * 191
        assert len(at.probe.checked) == before + 9
        assert {answer.json()["error"]["code"] for answer in answers[9:]} == {"rate_limit_exceeded"}
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in answers[9:])
        assert (await check(other, as_owner(other["owner_token"]))).status_code == 200
        assert [(await check(mine, {})).status_code for _ in range(15)] == [200] * 15
        again = await at.client.put(f"/admin/register/{mine['id']}", json={"endpoint_url": "http://mine.example:9001"}, headers=owner)
        assert again.status_code == 429
        at.clock.advance(60)
        assert (await check(mine, owner)).status_code == 200
