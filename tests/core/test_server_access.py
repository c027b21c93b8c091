"""What a server's answer to an empty object says about its letting the gateway in."""

from __future__ import annotations

import pytest

from multiverse_gateway.core.envelope import JSON_PATHS
from multiverse_gateway.core.server_access import Access, confirming_path, judge_access, refusal_of


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize("status", [200, 400, 404, 405, 415, 422, 429, 500, 501, 503])
def test_whatever_the_server_itself_says_lets_the_gateway_in(status: int, has_key: bool) -> None:
    """A server that wants another key would have said so first."""
    assert judge_access(status, has_key=has_key) == Access(granted=True)


@pytest.mark.parametrize("status", [301, 302, 308, 407, 502, 504, 530])
def test_what_a_proxy_or_tunnel_says_proves_nothing(status: int) -> None:
    """The server may never have seen the request."""
    assert judge_access(status, has_key=True) == Access()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_remedy(status: int) -> None:
    """Outside case 20: no stored key is spoken of where there is none; the Host header that Ollama wants is named."""
    with_key, without = refusal_of(status, has_key=True), refusal_of(status, has_key=False)
    assert with_key is not None
    assert without is not None
    assert "stored" in with_key
    assert "stored" not in without
    assert "api_key" in without
    assert ("Host header" in without) == ("Host header" in with_key) == (status == 403)
    assert max(len(with_key), len(without)) < 256
    assert judge_access(status, has_key=False) == Access(refusal=without)


def test_calls_that_take_no_json_are_confirmed_by_chat() -> None:
    assert {path: confirming_path(path) for path in JSON_PATHS} == {path: path for path in JSON_PATHS}
    assert confirming_path("/v1/audio/transcriptions") == confirming_path("/v1/anything") == "/v1/chat/completions"
