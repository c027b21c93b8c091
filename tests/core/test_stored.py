"""Stored responses: whose they are, where they are, how long they are known, and which calls ask for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core import stored
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.stored import (
    StoredResponse,
    StoredResponses,
    id_of,
    lookup_of,
    model_elsewhere,
    response_key,
    response_not_found,
    usable_id,
)

PATH = "/v1/responses/resp_1"


def response(key: str, server: str = "a", until: float = 100.0) -> StoredResponse:
    return StoredResponse(key, ServerId(server), 1, until)


# Whose


@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\n")), st.text()), min_size=2, max_size=2, unique=True))
def test_no_two_callers_and_ids_share_a_key(pairs: list[tuple[str, str]]) -> None:
    """Any text may be an id; a caller is a key's id or an address, which has no line feed."""
    first, second = [response_key(*pair) for pair in pairs]
    assert first != second
    assert len(first) == 64


# Where


def test_a_response_is_known_until_its_time_is_over() -> None:
    known = StoredResponses()
    known.add(response("k", until=50.0))
    assert known.find("k", 49.0) == response("k", until=50.0)
    assert known.find("k", 50.0) is None
    assert known.find("other", 0.0) is None


def test_what_was_made_here_is_saved_once() -> None:
    """What came from the store is not saved again, and what is made while the store is written waits for the next time."""
    known = StoredResponses()
    known.learn(response("of the store"))
    known.add(response("one"))
    known.add(response("two"))
    saving = known.unsaved
    assert [each.key for each in saving] == ["one", "two"]
    known.add(response("two", "b"))
    known.saved(saving)
    assert known.unsaved == (response("two", "b"),)
    assert known.find("two", 0.0) == response("two", "b")
    known.saved(saving)
    assert known.unsaved == (response("two", "b"),)


def test_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients make them, so they are bounded; one that is used again is new."""
    monkeypatch.setattr(stored, "MOST_KEPT", 3)
    known = StoredResponses()
    for key in ("one", "two", "three", "one", "four"):
        known.add(response(key))
    assert [key for key in ("one", "two", "three", "four") if known.find(key, 0.0) is None] == ["two"]
    assert [each.key for each in known.unsaved] == ["three", "one", "four"]


# Which calls


@pytest.mark.parametrize(
    ("method", "path", "query", "stream"),
    [
        ("GET", PATH, b"", False),
        ("GET", PATH, b"stream=true&starting_after=3", True),
        ("GET", PATH, b"stream=false&stream=1", True),
        ("GET", PATH, b"stream=false", False),
        ("GET", PATH, b"stream", False),
        ("DELETE", PATH, b"stream=true", False),
        ("GET", f"{PATH}/input_items", b"stream=true", False),
        ("POST", f"{PATH}/cancel", b"", False),
        ("POST", f"{PATH}/a_call_of_later", b"", False),
    ],
)
def test_calls_for_a_stored_response_are_told_by_their_path(method: str, path: str, query: bytes, stream: bool) -> None:
    """Whatever else the path of a POST says, it needs the server of the response that stands in it."""
    found = lookup_of(method, path, query)
    assert found is not None
    assert (found.response_id, found.method, found.stream) == ("resp_1", method, stream)
    assert found.stateful
    assert found.names_response
    assert found.answers_json
    assert not found.stores_response


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/responses"),
        ("POST", "/v1/responses/input_tokens"),
        ("POST", "/v1/responses/compact"),
        ("PUT", PATH),
        ("HEAD", PATH),
        ("DELETE", f"{PATH}/input_items"),
        ("GET", f"{PATH}/cancel"),
        ("GET", f"{PATH}/input_items/more"),
        ("GET", "/v1/responses/"),
        ("GET", "/v1/chat/completions/x"),
    ],
)
def test_other_calls_are_none_of_them(method: str, path: str) -> None:
    assert lookup_of(method, path, b"") is None


# Ids


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"id": "resp_1"}', "resp_1"),
        (b'\xef\xbb\xbf{"id": "resp_1", "x": NaN}', "resp_1"),
        (b'{"id": "NaN", "x": 1}', "NaN"),
        (b'{"id": null}', None),
        (b'{"id": ["resp_1"]}', None),
        (b'{"other": "resp_1"}', None),
        (b"[]", None),
        (b'{"id": "resp_1"', None),
    ],
)
def test_the_id_of_an_answer(body: bytes, expected: str | None) -> None:
    assert id_of(body) == expected


def test_a_usable_id_is_a_text_of_a_reasonable_length() -> None:
    assert [usable_id(value) for value in ("x", "x" * 1024, "x" * 1025, "", None, 7)] == ["x", "x" * 1024, None, None, None, None]


def test_the_refusals_say_what_to_do() -> None:
    """And clients do not repeat the request."""
    for error in (response_not_found(), model_elsewhere("tiny")):
        assert "one server" in error.message
        assert "as input instead" in error.message
        assert (error.status, error.final) == (404, True)
    assert "'tiny'" in model_elsewhere("tiny").message
