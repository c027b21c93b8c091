"""Signing in: sessions, forms, the link of the first start."""

from __future__ import annotations

import pytest

from multiverse_gateway.web.sessions import LINK_SECONDS, MAX_SESSIONS, SESSION_SECONDS, Session, Sessions, cookies, is_own_origin
from support.gateways import Clock

Headers = list[tuple[bytes, bytes]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    return Sessions(lambda: clock.monotonic)


def with_cookie(token: str, name: str = "mvg_session") -> Headers:
    """Return the headers of a browser that has the cookie."""
    return [(b"cookie", f"theme=dark; {name}={token}".encode())]


def from_us(*more: tuple[bytes, bytes]) -> Headers:
    """Return the headers of a request of our own pages."""
    return [(b"host", b"gateway"), (b"origin", b"http://gateway"), *more]


def test_a_session_is_found_by_its_cookie_and_ends(sessions: Sessions, clock: Clock) -> None:
    """After twelve hours, or when it is closed."""
    token, session = sessions.open()
    assert sessions.find(with_cookie(token)) is session
    assert sessions.lasts(session)
    clock.advance(SESSION_SECONDS - 1)
    assert sessions.find(with_cookie(token)) is session
    clock.advance(2)
    assert sessions.find(with_cookie(token)) is None
    assert not sessions.lasts(session)
    token, session = sessions.open()
    assert len(sessions) == 1, "the ended one is forgotten"
    sessions.close(with_cookie(token))
    assert sessions.find(with_cookie(token)) is None
    assert not sessions.lasts(session)


def test_a_token_that_a_browser_brings_is_not_adopted(sessions: Sessions) -> None:
    """Fixation: what we did not make means nothing."""
    assert sessions.find(with_cookie("chosen-by-an-attacker")) is None
    assert sessions.find([(b"cookie", b"\xff\xfe=;;; ="), (b"cookie", b"mvg_session")]) is None
    token, _ = sessions.open()
    assert token != "chosen-by-an-attacker"


def test_a_session_over_tls_needs_the_cookie_that_only_tls_can_set(sessions: Sessions) -> None:
    """And the other way round."""
    token, session = sessions.open(secure=True)
    assert sessions.find(with_cookie(token, "__Host-mvg_session")) is session
    assert sessions.find(with_cookie(token)) is None
    plain, _ = sessions.open()
    assert sessions.find(with_cookie(plain, "__Host-mvg_session")) is None


def test_sessions_are_bounded(sessions: Sessions) -> None:
    """The oldest goes."""
    first, _ = sessions.open()
    for _ in range(MAX_SESSIONS):
        sessions.open()
    assert len(sessions) == MAX_SESSIONS
    assert sessions.find(with_cookie(first)) is None


def test_the_cookie_is_out_of_reach_for_scripts_and_other_sites(sessions: Sessions) -> None:
    """Attributes that browsers act on."""
    assert sessions.cookie("t", secure=False) == "mvg_session=t; HttpOnly; Max-Age=43200; Path=/; SameSite=Lax"
    assert sessions.cookie("t", secure=True) == "__Host-mvg_session=t; HttpOnly; Max-Age=43200; Path=/; SameSite=Lax; Secure"
    assert "Max-Age=0" in sessions.end_cookie(secure=False)


def test_secrets_do_not_show(sessions: Sessions) -> None:
    """Not in repr, which logs may write."""
    token, session = sessions.open()
    assert token not in repr(sessions)
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
    """By what browsers say and pages cannot forge."""
    assert is_own_origin(headers) is own


def test_a_session_stands_for_a_key_only_with_its_token(sessions: Sessions) -> None:
    """Reading needs the cookie; changing needs origin and token as well."""
    token, session = sessions.open()
    cookie = with_cookie(token)
    assert sessions.stands_for_key("GET", cookie)
    assert not sessions.stands_for_key("GET", [])
    assert not sessions.stands_for_key("POST", cookie)
    assert not sessions.stands_for_key("POST", [*from_us(), *cookie])
    proof = (b"x-csrf-token", session.token.encode())
    assert sessions.stands_for_key("POST", [*from_us(proof), *cookie])
    assert not sessions.stands_for_key("POST", [proof, *cookie])
    assert not sessions.stands_for_key("POST", [*from_us((b"x-csrf-token", b"wrong")), *cookie])
    _, other = sessions.open()
    assert not sessions.stands_for_key("POST", [*from_us((b"x-csrf-token", other.token.encode())), *cookie])


def test_the_form_to_sign_in_is_bound_to_its_browser(sessions: Sessions) -> None:
    """Nobody can sign somebody else in with an account of their own."""
    nonce, token = sessions.form_token([])
    cookie = with_cookie(nonce, "mvg_form")
    assert sessions.form_token(cookie) == (nonce, token)
    assert sessions.is_own_form([*from_us(), *cookie], token)
    assert not sessions.is_own_form(from_us(), token)
    assert not sessions.is_own_form(cookie, token)
    assert not sessions.is_own_form([*from_us(), *cookie], sessions.form_token([])[1])


def test_the_link_works_once_and_for_a_quarter_of_an_hour(sessions: Sessions, clock: Clock) -> None:
    """Then never again."""
    link = sessions.create_link()
    assert not sessions.use_link("guessed")
    assert sessions.use_link(link)
    assert not sessions.use_link(link)
    late = sessions.create_link()
    clock.advance(LINK_SECONDS + 1)
    assert not sessions.use_link(late)


def test_notes_are_told_once() -> None:
    """By the next page."""
    session = Session("token", 0.0)
    session.note("success", "done")
    assert session.take_notes() == [("success", "done")]
    assert session.take_notes() == []


def test_cookies_are_read_leniently() -> None:
    """What cannot be read counts for nothing."""
    assert cookies([(b"cookie", b"a=1; b=2")]) == {"a": "1", "b": "2"}
    assert cookies([(b"host", b"x")]) == {}
