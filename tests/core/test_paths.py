"""The one spelling of API paths."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.paths import CALLS, OWN_SEGMENTS, api_path, below, hint, is_api, is_root, without_origin

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("call", sorted(CALLS))
def test_every_known_call_has_one_spelling(call: str) -> None:
    """With `/v1` or without, with slashes too many, or as a whole URL."""
    bare = call.removeprefix("/v1")
    spellings = [call, bare, f"{call}/", f"{bare}/", f"/{call}", f"/{bare}", call.replace("/", "//"), f"http://host:80{call}"]
    for spelling in [*spellings, f"HTTPS://gpu.example{bare}", f"http://host/{call}/"]:
        assert api_path("POST", spelling) == call, spelling
    assert hint(call) is None


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("POST", "/rerank", "/v1/rerank"),
        ("POST", "/v2/rerank", "/v1/rerank"),
        ("POST", "/v2/rerank/", "/v1/rerank"),
        ("GET", "/models", "/v1/models"),
        ("HEAD", "/models/", "/v1/models"),
        ("GET", "/models/org/name:7b", "/v1/models/org/name:7b"),
        ("GET", "http://host/models", "/v1/models"),
        ("GET", "/v1/models/", "/v1/models"),
        ("GET", "/v1//models", "/v1/models"),
        ("GET", "/v1/", "/v1"),
        ("POST", "/v1/unknown/", "/v1/unknown"),
        ("POST", "/responses/resp_1/cancel", "/v1/responses/resp_1/cancel"),
        ("GET", "/responses/resp_1", "/v1/responses/resp_1"),
        ("OPTIONS", "/chat/completions", "/v1/chat/completions"),
        ("OPTIONS", "/models", "/v1/models"),
        ("DELETE", "/responses/resp_1/", "/v1/responses/resp_1"),
    ],
)
def test_other_spellings_are_found(method: str, path: str, found: str) -> None:
    """The siblings that clients are known to send."""
    assert api_path(method, path) == found


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "//admin/register"),
        ("POST", "/admin//register"),
        ("POST", "http://host/admin/register"),
        ("POST", "/admin/register/"),
        ("GET", "//link/token"),
        ("POST", "/models"),
        ("GET", "/chat/completions"),
        ("POST", "/V1/chat/completions"),
        ("POST", "/v10/chat/completions"),
        ("POST", "/v2/chat/completions"),
        ("POST", "/x/v1/chat/completions"),
        ("POST", "//host/v1/chat/completions"),
        ("POST", "ftp://host/v1/chat/completions"),
        ("POST", "http:///v1/chat/completions"),
        ("POST", "/./v1/chat/completions"),
        ("POST", "/../v1/chat/completions"),
        ("POST", "\\v1\\chat\\completions"),
        ("POST", "/responses/../admin/register"),
        ("GET", "/models/../admin/export"),
        ("OPTIONS", "*"),
        ("GET", "/"),
        ("GET", "//"),
        ("GET", ""),
        ("GET", "http://host"),
        ("GET", "/docs/"),
    ],
)
def test_everything_else_stays_as_it_came(method: str, path: str) -> None:
    """No spelling leads to the admin API or to a page."""
    assert api_path(method, path) == path


@pytest.mark.parametrize("path", ["/models", "/models/", "/models/live", "//models"])
def test_a_browser_gets_the_page(path: str) -> None:
    """What asks for HTML gets the page of models; the list by its whole path is never a page."""
    assert api_path("GET", path, wants_page=True) == path
    assert api_path("GET", "/v1/models", wants_page=True) == "/v1/models"


PIECES = st.sampled_from(
    ["/", "//", "v1", "v2", "admin", "link", "models", "chat", "completions", "responses", "rerank", ".", "..", "%2e", "x"]
)
TARGETS = st.tuples(st.sampled_from(["", "http://host", "https://h:1", "http://"]), st.lists(PIECES, max_size=8).map("".join)).map("".join)


@given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "BREW"]), TARGETS | st.text(max_size=20), st.booleans())
def test_a_path_becomes_an_api_path_or_stays(method: str, path: str, wants_page: bool) -> None:
    """A rewritten path is one of the API, has no slash too many, is made of the same pieces, and is not rewritten again."""
    found = api_path(method, path, wants_page=wants_page)
    assert api_path(method, found, wants_page=wants_page) == found
    if found == path:
        return
    assert is_api(found)
    assert "//" not in found
    assert not found.endswith("/")
    pieces = [piece for piece in without_origin(path).split("/") if piece]
    assert [piece for piece in found.split("/") if piece and piece != "v1"] == [
        piece for piece in pieces if piece not in ("v1", "v2" if pieces == ["v2", "rerank"] else "v1")
    ]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/v1", "name"),
        ("/v1/v1", "twice"),
        ("/v1/v1/chat/completions", "twice"),
        ("/v1/v1/models", "twice"),
        ("/v1/chat/completions/chat/completions", "base URL"),
        ("/v1/chat/completions/v1/chat/completions", "base URL"),
        ("/v1/completions/models", "base URL"),
        ("/v1/embeddings/embeddings", "base URL"),
        ("/v1/messages/messages", "base URL"),
        ("/v1/chat/completions/audio/speech", "base URL"),
        ("/v1/chat/completions/files", "base URL"),
        ("/v1/messages/count_tokens/messages", "base URL"),
        ("/v1/engines/big/completions", "model in the body"),
    ],
)
def test_a_wrong_base_url_is_explained(path: str, word: str) -> None:
    """The hint says what to change."""
    advice = hint(path)
    assert advice is not None
    assert word in advice


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/resp_1/cancel",
        "/v1/responses/compact",
        "/v1/messages/batches",
        "/v1/chat/completions/chatcmpl-1/messages",
        "/v1/v1x",
        "/v1/unknown",
    ],
)
def test_a_path_that_may_exist_has_no_hint(path: str) -> None:
    """Calls that the gateway does not know are the servers' to judge."""
    assert hint(path) is None
    assert re.fullmatch(r"/v1/\S+", path)


@pytest.mark.parametrize(
    ("path", "root", "rest"),
    [
        ("/ai/v1/models", "/ai", "/v1/models"),
        ("/v1/models", "/ai", "/v1/models"),
        ("/ai", "/ai", "/"),
        ("/ai/", "/ai", "/"),
        ("/ai/ai/x", "/ai", "/ai/x"),
        ("/aim/x", "/ai", "/aim/x"),
        ("/AI/x", "/ai", "/AI/x"),
        ("/a/b/x", "/a/b", "/x"),
        ("/a/x", "/a/b", "/a/x"),
        ("//ai/x", "/ai", "//ai/x"),
        ("/x", "", "/x"),
    ],
)
def test_the_root_of_a_proxy_is_taken_off_once(path: str, root: str, rest: str) -> None:
    """Where it is there; a path that only begins alike is another one."""
    assert below(path, root) == rest


@given(st.text("/aiv1.", max_size=20), st.sampled_from(["", "/ai", "/a/i"]))
def test_what_is_below_a_root_is_a_path(path: str, root: str) -> None:
    """Taking the root off never makes a path that was not there: putting it before gives the same again."""
    path = f"/{path}"
    assert below(root + path, root) == path
    assert below(path, root).startswith("/")


@pytest.mark.parametrize("root", ["", "/ai", "/ai/gateway", "/AI", "/~user/x-y_z.1", "/v10", "/administration"])
def test_a_proxy_may_serve_below_most_paths(root: str) -> None:
    """Such as these."""
    assert is_root(root)


@pytest.mark.parametrize(
    "root",
    [
        "ai",
        "/",
        "/ai/",
        "//ai",
        "/a//b",
        "/a/../b",
        "/.",
        "/a b",
        "/a?b",
        "/%61",
        "/ä",
        "http://x",
        *(f"/{name}" for name in sorted(OWN_SEGMENTS)),
    ],
)
def test_but_below_none_that_could_be_taken_for_another(root: str) -> None:
    """Neither what is no plain path nor what the gateway's own paths begin with."""
    assert not is_root(root)
    assert not is_root(f"{root}/x") or root in ("", "/")
