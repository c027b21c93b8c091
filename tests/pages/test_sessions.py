"""Signing in: sessions, forms, the link of the first start."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from http.cookies import SimpleCookie

import pytest

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.origins import OriginPolicy
from multiverse_gateway.pages.sessions import (
    LINK_SECONDS,
    SESSION_SECONDS,
    Session,
    Sessions,
    cookie_values,
    end_note,
    form_token,
    is_own_form,
)
from multiverse_gateway.stores.memory import MemoryStore
from support.gateways import Stage, stage

Headers = list[tuple[bytes, bytes]]
NONE = OriginPolicy()


class BreakableStore(MemoryStore):
    """A store that can be out of reach."""

    is_broken = False

    async def version(self) -> int:
        if self.is_broken:
            raise StorageUnavailable("away")
        return await super().version()

    async def open_session(self, digest: str, until: float) -> None:
        if self.is_broken:
            raise StorageUnavailable("away")
        await super().open_session(digest, until)

    async def close_session(self, digest: str) -> bool:
        if self.is_broken:
            raise StorageUnavailable("away")
        return await super().close_session(digest)


@asynccontextmanager
async def processes(store: MemoryStore, count: int = 1) -> AsyncIterator[list[tuple[Stage, Sessions]]]:
    """Run several gateways on one store."""
    async with AsyncExitStack() as stack:
        stages = [await stack.enter_async_context(stage(store=store)) for _ in range(count)]
        yield [(staged, Sessions(staged.gateway)) for staged in stages]


@pytest.fixture
async def staged() -> AsyncIterator[Stage]:
    async with stage() as running:
        yield running


@pytest.fixture
def sessions(staged: Stage) -> Sessions:
    return Sessions(staged.gateway)


def with_cookie(token: str, name: str = "mvg_session") -> Headers:
    """Return the headers of a browser that has the cookie."""
    return [(b"cookie", f"theme=dark; {name}={token}".encode())]


def from_us(*more: tuple[bytes, bytes]) -> Headers:
    """Return the headers of a request of our own pages."""
    return [(b"host", b"gateway"), (b"origin", b"http://gateway"), *more]


def found(sessions: Sessions, token: str, name: str = "mvg_session") -> Session:
    """Return the session of a token that has one."""
    session = sessions.find(with_cookie(token, name))
    assert session is not None
    return session


async def test_a_session_is_found_by_its_cookie_and_ends(staged: Stage, sessions: Sessions) -> None:
    """After twelve hours, or when it is closed."""
    token = await sessions.open()
    session = found(sessions, token)
    staged.clock.advance(SESSION_SECONDS - 1)
    assert sessions.lasts(session)
    staged.clock.advance(2)
    assert sessions.find(with_cookie(token)) is None
    assert not sessions.lasts(session)
    token = await sessions.open()
    assert len(staged.gateway.registrations.registry.sessions) == 1, "the ended one is forgotten"
    await sessions.close(session := found(sessions, token))
    assert sessions.find(with_cookie(token)) is None
    assert not sessions.lasts(session)
    await sessions.close(session)


async def test_a_token_that_a_browser_brings_is_not_adopted(sessions: Sessions) -> None:
    """X09: Fixation: what we did not make means nothing."""
    assert await sessions.seek(with_cookie("chosen-by-an-attacker")) is None
    assert await sessions.seek([(b"cookie", b"\xff\xfe=;;; ="), (b"cookie", b"mvg_session")]) is None
    assert await sessions.open() != "chosen-by-an-attacker"


async def test_what_the_store_keeps_opens_nothing(staged: Stage, sessions: Sessions) -> None:
    """Who reads the database, or a backup of it, is not signed in by that."""
    token = await sessions.open()
    (digest,) = staged.gateway.registrations.registry.sessions
    assert token not in digest
    assert sessions.find(with_cookie(digest)) is None


async def test_a_session_over_tls_needs_the_cookie_that_only_tls_can_set(sessions: Sessions) -> None:
    """X09: And the other way round."""
    token = await sessions.open(secure=True)
    assert found(sessions, token, "__Host-mvg_session").digest
    assert sessions.find(with_cookie(token)) is None
    plain = await sessions.open()
    assert sessions.find(with_cookie(plain, "__Host-mvg_session")) is None


async def test_every_process_knows_a_session() -> None:
    """At once where somebody asks; and its end after the next look at the store."""
    async with processes(MemoryStore(wall=lambda: 0.0), 2) as [(_, here), (other, there)]:
        token = await here.open()
        cookie = with_cookie(token)
        assert there.find(cookie) is None
        session = await there.seek(cookie)
        assert session == here.find(cookie)
        assert session is not None
        await here.close(session)
        await other.gateway.refresh()
        assert not there.lasts(session)
        assert await there.seek(cookie) is None


async def test_one_can_sign_in_and_out_while_the_store_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """Here only; what the store knows comes back with it, except what was ended here."""
    store = BreakableStore(wall=lambda: 0.0)
    async with processes(store) as [(staged, sessions)]:
        before = await sessions.open()
        store.is_broken = True
        during = await sessions.open()
        assert await sessions.seek(with_cookie(during))
        assert await sessions.seek(with_cookie("unknown")) is None
        await sessions.close(found(sessions, before))
        assert sessions.find(with_cookie(before)) is None
        store.is_broken = False
        await staged.gateway.refresh()
        assert sessions.find(with_cookie(before)) is None, "it was ended"
        await sessions.open()
        assert sessions.find(with_cookie(before)) is None
        await sessions.close(found(sessions, during))
        assert sessions.find(with_cookie(during)) is None
        assert sum("in this process only" in record.message for record in caplog.records) == 2


async def test_the_cookie_is_out_of_reach_for_scripts_and_other_sites(sessions: Sessions) -> None:
    """X09: Attributes that browsers act on."""
    assert sessions.cookie("t", secure=False) == "mvg_session=t; HttpOnly; Max-Age=43200; Path=/; SameSite=Lax"
    assert sessions.cookie("t", secure=True) == "__Host-mvg_session=t; HttpOnly; Max-Age=43200; Path=/; SameSite=Lax; Secure"
    assert "Max-Age=0" in sessions.end_cookie(secure=False)


async def test_secrets_do_not_show(sessions: Sessions) -> None:
    """Not in repr, which logs may write."""
    token = await sessions.open()
    session = found(sessions, token)
    assert token not in repr(sessions) + repr(session)
    assert session.token not in repr(session)


@pytest.mark.parametrize(
    ("headers", "own"),
    [
        (from_us(), True),
        (from_us((b"sec-fetch-site", b"same-origin")), True),
        (from_us((b"sec-fetch-site", b"cross-site")), False),
        (from_us((b"sec-fetch-site", b"same-site")), False),
        ([(b"host", b"gateway"), (b"origin", b"http://evil.example")], False),
        ([(b"host", b"gateway"), (b"origin", b"null")], False),
        ([(b"host", b"gateway:8000"), (b"origin", b"http://gateway:9000")], False),
        ([(b"host", b"gateway")], False),
        ([], False),
    ],
)
def test_only_our_own_pages_may_change_something(headers: Headers, own: bool) -> None:
    """X08: By what browsers say and pages cannot forge."""
    assert NONE.is_own_page(dict(headers)) is own


async def test_a_session_stands_for_a_key_only_with_its_token(sessions: Sessions) -> None:
    """Reading needs the cookie; changing needs origin and token as well."""
    token = await sessions.open()
    cookie, session = with_cookie(token), found(sessions, token)
    assert sessions.stands_for_key("GET", cookie)
    assert not sessions.stands_for_key("GET", [])
    assert not sessions.stands_for_key("POST", cookie)
    assert not sessions.stands_for_key("POST", [*from_us(), *cookie])
    proof = (b"x-csrf-token", session.token.encode())
    assert sessions.stands_for_key("POST", [*from_us(proof), *cookie])
    assert not sessions.stands_for_key("POST", [proof, *cookie])
    assert not sessions.stands_for_key("POST", [*from_us((b"x-csrf-token", b"wrong")), *cookie])
    other = found(sessions, await sessions.open())
    assert not sessions.stands_for_key("POST", [*from_us((b"x-csrf-token", other.token.encode())), *cookie])


def test_the_form_to_sign_in_is_bound_to_its_browser() -> None:
    """Nobody can sign somebody else in with an account of their own."""
    nonce, token = form_token([])
    cookie = with_cookie(nonce, "mvg_form")
    assert form_token(cookie) == (nonce, token)
    assert is_own_form([*from_us(), *cookie], token, NONE)
    assert not is_own_form(from_us(), token, NONE)
    assert not is_own_form(cookie, token, NONE)
    assert not is_own_form([*from_us(), *cookie], form_token([])[1], NONE)


@pytest.mark.parametrize("brought", [r'"a\015\012Set-Cookie: mvg_session=stolen"', r'"a\073 Domain=example"', "short", "x" * 33])
def test_the_forms_secret_is_ours_or_a_new_one(brought: str) -> None:
    """What a browser brings goes into a header again: nothing that is not of our making."""
    cookie = with_cookie(brought, "mvg_form")
    nonce, token = form_token(cookie)
    assert re.fullmatch("[A-Za-z0-9_-]{32}", nonce)
    assert form_token(cookie)[0] != nonce
    assert not is_own_form([*from_us(), *cookie], token, NONE)


async def test_the_link_works_once_and_for_a_quarter_of_an_hour(staged: Stage, sessions: Sessions) -> None:
    """Then never again; and it is no session."""
    link = await sessions.create_link()
    assert sessions.find(with_cookie(link)) is None
    assert not await sessions.use_link("guessed")
    assert await sessions.use_link(link)
    assert not await sessions.use_link(link)
    late = await sessions.create_link()
    staged.clock.advance(LINK_SECONDS + 1)
    assert not await sessions.use_link(late)


async def test_the_link_works_once_whatever_the_store_does() -> None:
    """Also while it is away."""
    store = BreakableStore(wall=lambda: 0.0)
    async with processes(store, 2) as [(_, here), (other, there)]:
        link = await here.create_link()
        await other.gateway.refresh()
        assert await there.use_link(link)
        assert not await here.use_link(link)
        store.is_broken = True
        link = await here.create_link()
        assert await here.use_link(link)
        assert not await here.use_link(link)


def test_the_next_page_says_what_was_done() -> None:
    """Of the same session, and of no other."""
    session, other = Session("digest", "token"), Session("other", "another token")
    jar = SimpleCookie(session.note("success", '"it\'s; done" 完了'))
    cookie = with_cookie(jar["mvg_note"].value, "mvg_note")
    assert session.noted(cookie) == ("success", '"it\'s; done" 完了')
    assert other.noted(cookie) is None
    assert session.noted(with_cookie("forged.note", "mvg_note")) is None
    assert session.noted([]) is None
    assert "Max-Age=0" in end_note()


STRANGE = [
    b'prefs={"a":1}',
    b"k[]=1",
    b"a=b c",
    b"caf\xe9=\xff\xfe",
    "snow\u2603=\u2603".encode(),
    b"long=" + b"x" * 4000,
    b"=without a name",
    b"without a value",
    b"",
    b";;; ,=,",
    b'open="quote',
    b"path=/; expires=Thu, 01 Jan 1970 00:00:00 GMT",
    b"$Version=1",
    b"mvg_session_other=1",
    b"xmvg_session=1",
    b"MVG_SESSION=1",
    b"mvg_session=",
    b"mvg_session=of-another-application",
    b'mvg_session="quoted"',
    b"mvg_session",
]
"""Cookies of other applications on the host."""


@pytest.mark.parametrize("other", STRANGE)
async def test_cookies_of_other_applications_lock_nobody_out(sessions: Sessions, other: bytes) -> None:
    """Whatever they look like, before ours or behind it, in one header or, as HTTP/2 sends them, in several."""
    token = await sessions.open()
    ours = f"mvg_session={token}".encode()
    for sent in (other + b"; " + ours, ours + b"; " + other, other + b";" + ours, other + b"; a=b; " + ours + b";"):
        assert sessions.find([(b"cookie", sent)]) is not None
    assert sessions.find([(b"cookie", other), (b"cookie", ours)]) is not None
    assert sessions.find([(b"cookie", other)]) is None


def test_a_cookie_is_found_by_its_exact_name() -> None:
    """Each of its values is, in their order."""
    assert list(cookie_values([(b"cookie", b"a=1; b=2; a = 3=4 "), (b"host", b"a=5"), (b"cookie", b"a=")], "a")) == ["1", "3=4", ""]


@pytest.mark.parametrize("other", STRANGE)
def test_notes_and_forms_are_found_among_other_cookies(other: bytes) -> None:
    """The other two cookies that the pages set."""
    session = Session("digest", "token")
    note = SimpleCookie(session.note("success", "done"))["mvg_note"].value.encode()
    nonce, token = form_token([])
    cookie = (b"cookie", b"; ".join([other, b"mvg_note=x", b"mvg_form=x", b"mvg_note=" + note, b"mvg_form=" + nonce.encode()]))
    assert session.noted([cookie]) == ("success", "done")
    assert is_own_form([*from_us(), cookie], token, NONE)
