"""The forms of errors."""

from __future__ import annotations

import json

import pytest

from multiverse_gateway.core import errors
from multiverse_gateway.core.errors import GatewayError, anthropic_type, is_anthropic

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GatewayError)]
EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@EVERY
def test_an_error_has_the_form_of_the_call(kind: type[GatewayError]) -> None:
    """OpenAI's, and on the calls of Anthropic's API Anthropic's, of the same message."""
    error = kind("message")
    openai = json.loads(error.body("/v1/chat/completions", "the-id"))
    assert openai == json.loads(error.body())
    assert openai["error"].keys() == {"message", "type", "param", "code"}
    anthropic = json.loads(error.body("/v1/messages/count_tokens", "the-id"))
    kind_of_error = anthropic_type(error.status)
    assert anthropic == {"type": "error", "error": {"type": kind_of_error, "message": openai["error"]["message"]}, "request_id": "the-id"}
    assert kind_of_error.endswith("_error") or error.status == 413


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
        (508, "api_error"),
        (529, "overloaded_error"),
    ],
)
def test_every_status_has_a_type(status: int, kind: str) -> None:
    """By Anthropic's page on errors; what it does not list is the client's mistake below 500, and the server's from there."""
    assert anthropic_type(status) == kind


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/message", "/v1/messages_of_others", "/admin/v1/messages", "/messages"])
def test_no_other_path_is_of_anthropic(path: str) -> None:
    """Only the call itself and those below it."""
    assert not is_anthropic(path)
    assert is_anthropic("/v1/messages")
    assert is_anthropic("/v1/messages/batches")


@EVERY
def test_an_error_says_whether_to_repeat(kind: type[GatewayError]) -> None:
    """What no repetition can change is marked for clients."""
    error = kind("message")
    named = dict(error.headers())
    assert named.get(b"x-should-retry") == (b"false" if kind.final else None)
    if error.status in (401, 403, 413, 415, 502, 504):
        assert kind.final


def test_a_compressed_request_learns_what_is_accepted() -> None:
    """RFC 9110, 15.5.16."""
    assert (b"accept-encoding", b"identity") in errors.CompressedRequest("message").headers()


def test_a_code_may_be_given() -> None:
    """Some errors have several."""
    assert json.loads(GatewayError("message", code="not_ready", param="model").body())["error"]["code"] == "not_ready"
