"""Which pages may send what, by the headers of browsers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.origins import OriginPolicy

NONE = OriginPolicy()
CLASS = OriginPolicy.parse(["https://models.example/"], ["https://class.example"])
ANYBODY = OriginPolicy.parse([], ["*"])

FORMS = [
    None,
    b"",
    b" ",
    b"text/plain",
    b"TEXT/PLAIN",
    b" text/plain ; charset=utf-8",
    b"text/plain;charset=UTF-8",
    b"application/x-www-form-urlencoded",
    b"Application/X-WWW-Form-Urlencoded; a=b",
    b"multipart/form-data; boundary=x",
    b"multipart/form-data",
]
"""What a page may send to any site without being asked; `None` is no content type at all."""


def headers(content_type: bytes | None = None, **values: bytes | None) -> dict[bytes, bytes]:
    """Return headers, those that are `None` left out; `_` stands for `-`."""
    given = {b"content-type": content_type, b"host": b"gateway:8000"}
    given |= {name.replace("_", "-").encode(): value for name, value in values.items()}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("content_type", FORMS)
@pytest.mark.parametrize(
    ("site", "origin", "foreign"),
    [
        (b"cross-site", None, True),
        (b"cross-site", b"http://evil.example", True),
        (b"cross-site", b"null", True),
        (b"cross-site", b"http://gateway:8000", True),
        (b"same-site", None, True),
        (b"same-site", b"http://other.gateway", True),
        (b"Cross-Site", None, True),
        (b"same-origin", b"http://gateway:8000", False),
        (b"same-origin", None, False),
        (b"none", None, False),
        (None, b"http://evil.example", True),
        (None, b"null", True),
        (None, b"", True),
        (None, b"http://[", True),
        (None, b"http://gateway:8000@evil.example", True),
        (None, b"http://gateway", True),
        (None, b"http://gateway:8001", True),
        (None, b"ftp://gateway:8000", True),
        (None, b"chrome-extension://gateway:8000", True),
        (None, b"http://gateway:8000.evil.example", True),
        (None, b"\xff\xfe", True),
        (b"of-a-later-standard", b"http://evil.example", True),
        (b"of-a-later-standard", None, False),
        (None, b"http://gateway:8000", False),
        (None, b"HTTP://Gateway:8000", False),
        (None, b"https://gateway:8000", False),
        (None, None, False),
    ],
)
def test_a_form_of_another_site_is_found(content_type: bytes | None, site: bytes | None, origin: bytes | None, foreign: bool) -> None:
    """By `Sec-Fetch-Site` where a browser sends it, else by an `Origin` that is not ours; programs send neither."""
    assert NONE.is_foreign_form(headers(content_type, sec_fetch_site=site, origin=origin)) is foreign


@pytest.mark.parametrize("content_type", [b"application/json", b"application/json; charset=utf-8", b"audio/wav", b"text/plain, x/y"])
def test_what_no_form_can_send_is_left_to_cors(content_type: bytes) -> None:
    """A browser asks before it sends it for another site, and gets no leave."""
    assert not NONE.is_foreign_form(headers(content_type, sec_fetch_site=b"cross-site", origin=b"http://evil.example"))


@pytest.mark.parametrize("site", [None, b"cross-site", b"same-site"])
def test_an_origin_that_cors_allows_passes_whatever_the_browser_says(site: bytes | None) -> None:
    """The operator named it; with `*` all of them, `null` too."""
    form = headers(b"text/plain", sec_fetch_site=site, origin=b"https://class.example")
    assert not CLASS.is_foreign_form(form)
    assert CLASS.is_foreign_form({**form, b"origin": b"https://other.example"})
    assert not ANYBODY.is_foreign_form({**form, b"origin": b"null"})


def test_a_public_address_is_our_own_where_the_host_was_rewritten() -> None:
    """By a proxy in front; the standard port may be written or not."""
    form = headers(b"text/plain", origin=b"https://models.example")
    assert not CLASS.is_foreign_form(form)
    assert CLASS.is_own_page(form)
    assert not CLASS.is_foreign_form({**form, b"origin": b"https://models.example:443"})
    assert CLASS.is_foreign_form({**form, b"origin": b"http://models.example"})
    assert NONE.is_foreign_form(form)
    assert not NONE.is_foreign_form({**form, b"host": b"models.example:443"})


@pytest.mark.parametrize(
    ("policy", "origin", "allowed"),
    [
        (NONE, b"https://class.example", False),
        (CLASS, b"https://class.example", True),
        (CLASS, b"https://models.example", False),
        (CLASS, b"null", False),
        (CLASS, b"http://[", False),
        (OriginPolicy.parse([], ["https://Class.example:443/"]), b"https://class.example", True),
        (ANYBODY, b"null", True),
    ],
)
def test_cors_allows_what_was_listed(policy: OriginPolicy, origin: bytes, allowed: bool) -> None:
    """However its address was written in the settings."""
    assert policy.allows(origin) is allowed


def test_a_page_of_ours_says_so() -> None:
    """A request that says nothing does not count as one of our own pages."""
    assert not NONE.is_own_page(headers())
    assert not NONE.is_own_page({})
    assert not NONE.is_own_page({b"origin": b"http://gateway"})
    assert NONE.is_own_page(headers(origin=b"http://gateway:8000"))
    assert NONE.is_own_page(headers(sec_fetch_site=b"same-origin"))
    assert not NONE.is_own_page(headers(sec_fetch_site=b"none", origin=b"http://gateway:8000"))


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=40))
def test_no_origin_or_host_does_harm(origin: bytes, host: bytes, site: bytes) -> None:
    """Neither is parsed by anything that could fail."""
    sent = {b"origin": origin, b"host": host, b"sec-fetch-site": site}
    for policy in (NONE, CLASS, ANYBODY):
        policy.is_foreign_form(sent)
        policy.is_own_page({b"origin": origin, b"host": host})
        policy.allows(origin)
