"""Whether a whole answer is JSON, and the tokens that it reports."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from multiverse_gateway.core.answers import PassingJson, check_json, read_answer, reported_status


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"\xef\xbb\xbf{}",
        b"\xef\xbb\xbf [] ",
        b'{"a":NaN}',
        b"[-Infinity]",
        b'["\\ud83d", "\\uDE00"]',
        b' \r\n\t{"a": [1, -2.5e3, "\xc3\xa4", null, true]} \n',
        b'{"a": 1e9999}',
        b"[" * 200 + b"]" * 200,
    ],
)
def test_json_is_json(body: bytes) -> None:
    """Objects and arrays, however odd, pass."""
    assert check_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"3", b'"text"', b"null", b"{", b'{"a":1}{}', b'{"a":1}x', b'{"a" 1}', b"{1:2}", b"[1,]", b'{"a":nan}', b'{"a":01}',
        b'{"a":"\\x"}', b'{"a":"\n"}', b'{"a":tru}', b"<html>", b'{"a":"\xff"}', b'{"a":"\\ud83"}', b'{"a":1NaN}',
        b"\xef\xbb\xbf\xef\xbb\xbf{}", b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\xc3"}', b"[" * 200_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_json_fails_the_check(body: bytes) -> None:
    """F19, L06: broken, too deep or not UTF-8; no crash."""
    assert not check_json(body)


VALUES: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,  # of the usual hundred no new shape comes, and drawing them takes half a minute
)


@given(st.lists(VALUES) | st.dictionaries(st.text(), VALUES), st.booleans())
def test_whatever_json_writes_is_json(value: object, ascii_only: bool) -> None:
    """What the standard library writes passes; every true prefix of it fails."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert check_json(body)
    assert not check_json(body[:-1])


def test_characters_across_pieces_are_whole() -> None:
    """A long body is decoded in pieces, and no character suffers from where they are cut."""
    for shift in range(4):
        body = b'["' + b"x" * shift + "😀".encode() * 40_000 + b'"]'
        assert check_json(body)
        assert not check_json(body.replace("😀".encode(), b"\xf0\x9f\x98", 1))


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b'{"id": 1, "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}', (7, 2)),
        (b'\n{"usage": {"input_tokens": 7, "output_tokens": 2}}', (7, 2)),
        (b'\xef\xbb\xbf{"usage": {"prompt_tokens": 7}, "data": ["\xc3\xa4"]}', (7, 0)),
        (b'{"usage": {"prompt_tokens": 7, "completion_tokens": 9007199254740992}}', (7, 10_000_000)),
        (b'{"usage": {"prompt_tokens": -7, "completion_tokens": 1e999}}', (0, 10_000_000)),
        (b'{"usage": {"prompt_tokens": 2.5, "completion_tokens": "12"}, "object": 7}', (2, 0)),
        (b'{"usage": {"prompt_tokens": 7}, "error": 1e999, "choices": []}', (7, 0)),
        (b'{"usage": {"prompt_tokens": 7}, "score": NaN, "text": "\\ud83d"}', (7, 0)),
        (b'{"usage": null}', (0, 0)),
        (b'{"usage": "none"}', (0, 0)),
        (b"{}", (0, 0)),
        (b"[1]", (0, 0)),
        (b"[1", None),
        (b"{", None),
        (b'{"a": "\xff"}', None),
        (b'{"object": "\xff"}', None),
        (b'{"error": {"code": "\xff"}}', None),
        (b'{"a": ' + b"[" * 100_000, None),
        (b'{"usage": 7, "a": ' + b"[" * 100_000, None),
        (b"", None),
        (b"3", None),
    ],
)
def test_an_answer_reports_its_tokens(body: bytes, tokens: tuple[int, int] | None) -> None:
    """Or none; what is no JSON is no answer, and odd figures never break one (S8)."""
    answer = read_answer(body)
    assert (None if answer is None else answer.tokens) == tokens
    assert check_json(body) is (answer is not None)
    assert answer is None or not answer.reports_error


TRUTHY: tuple[object, ...] = ("Unexpected endpoint", {"message": "no memory"}, {"code": 500}, True, 7, ["no memory"], "x" * 1000)
ERRORS: list[dict[str, object]] = [
    *[{"error": error} for error in TRUTHY],
    {"object": "error", "message": "no memory", "code": 400},
    {"type": "error", "error": {"type": "overloaded_error"}},
    {"type": "error", "message": "no memory"},
    {"object": "error", "usage": {"prompt_tokens": 7}, "id": 7},
    {"object": "error", "usage": 7},
    {"error": "no memory", "usage": 7, "object": 7, "type": [7]},
]
MEMBERS = ("choices", "data", "output", "content", "results")


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_with_a_good_status_is_no_answer(error: dict[str, object]) -> None:
    """Unless it has what an answer has; members that are null count as absent."""
    answer = read_answer(json.dumps(error).encode())
    assert answer is not None
    assert answer.reports_error
    nothing: dict[str, object] = {**error, **dict.fromkeys(MEMBERS)}
    assert read_answer(json.dumps(nothing, indent=1).encode()) == answer
    assert read_answer(b"\xef\xbb\xbf\n" + json.dumps({**error, "note": "\ud83d", "free": float("nan")}).encode()) == answer
    for member in MEMBERS:
        for value in (b"[]", b'""', b"{}", b"[7]", b"false"):
            answer = read_answer(json.dumps(error).encode()[:-1] + b', "%b": %b}' % (member.encode(), value))
            assert answer is not None
            assert not answer.reports_error


@pytest.mark.parametrize("error", [None, "", {}, [], False, 0])
def test_an_empty_error_is_no_error(error: object) -> None:
    """OpenAI's Responses API has `error: null` in every answer."""
    answer = read_answer(json.dumps({"error": error, "object": "list", "usage": {"prompt_tokens": 7}}).encode())
    assert answer is not None
    assert (answer.reports_error, answer.tokens) == (False, (7, 0))


@pytest.mark.parametrize(
    ("report", "status"),
    [
        ({"error": {"code": 404}}, 404),
        ({"error": {"code": "503"}}, 503),
        ({"error": {"code": 429.0, "message": "x"}}, 429),
        ({"object": "error", "code": 400}, 400),
        ({"error": "no memory", "code": 401}, 401),
        ({"error": {"message": "no memory"}, "code": "500"}, 500),
        ({"error": {"code": "invalid"}, "code": 422}, 422),
        ({"error": {"code": None, "status": 404}}, None),
        ({"error": {"code": 200}}, None),
        ({"error": {"code": 399}}, None),
        ({"error": {"code": 600}}, None),
        ({"error": {"code": 1 << 70}}, None),
        ({"error": {"code": "\u0664\u0660\u0664"}}, None),
        ({"error": {"code": True}}, None),
        ({"error": {"code": "404 "}}, None),
        ({"error": {"code": "model_not_found"}}, None),
        ({"error": [{"code": 404}]}, None),
        ({"error": "404"}, None),
    ],
)
def test_an_error_may_name_a_status(report: object, status: int | None) -> None:
    """As a number or a string of digits, in the error or beside it."""
    body = json.dumps(report).encode()
    assert reported_status(body) == reported_status(b"\xef\xbb\xbf" + body) == status


@pytest.mark.parametrize(
    "report",
    [
        b'{"code": "\xff"}',
        b'{"error": {"code": "\xff"}}',
        b'{"error": "\xff"}',
        b"",
        b"no memory",
        b"[404]",
        b'{"code": 404',
        b'"code"',
        b'{"a":' * 20_000,
    ],
)
def test_what_is_no_object_names_no_status(report: bytes) -> None:
    """The error of a stream may be a text."""
    assert reported_status(report) is None


# Answers that are relayed while they come


def passed(body: bytes, *places: int) -> PassingJson:
    passing = PassingJson()
    cuts = [0, *sorted(places), len(body)]
    for start, end in pairwise(cuts):
        passing.feed(body[start:end])
    return passing


SMALL_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


@given(
    st.lists(SMALL_VALUES) | st.dictionaries(st.text(max_size=8), SMALL_VALUES), st.lists(st.integers(0, 200), max_size=5), st.booleans()
)
def test_whole_json_passes_however_it_is_cut(value: object, places: list[int], ascii_only: bool) -> None:
    """Strings with quotes, brackets and backslashes in them included."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assume(b"\xed\xa0" not in body and b"\xed\xb0" not in body)
    assert passed(body, *[min(place, len(body)) for place in places]).is_whole
    assert passed(b" \n" + body + b"\r\n").is_whole
    assert passed(b"\xef\xbb\xbf" + body, 2).is_whole


@given(st.lists(SMALL_VALUES, min_size=1) | st.dictionaries(st.text(max_size=8), SMALL_VALUES, min_size=1), st.data())
def test_json_that_was_cut_is_noticed(value: object, data: st.DataObject) -> None:
    """Wherever its end is missing."""
    body = json.dumps(value).encode()
    end = data.draw(st.integers(0, len(body) - 1))
    assert not passed(body[:end], end // 2).is_whole


@pytest.mark.parametrize("body", [b"", b"3", b'"text"', b"{]", b'{"a": "\xff"}', b'["\xc3', b"<html>", b"[1]]", b'{"a": "\\'])
def test_what_is_no_json_is_not_whole(body: bytes) -> None:
    assert not passed(body).is_whole


def test_the_tokens_of_a_passing_answer_stand_at_either_end() -> None:
    usage = b'"usage": {"prompt_tokens": 7, "details": {"cached": 1}, "total_tokens": 9}'
    filling = b'"data": "' + b"x" * 100_000 + b'"'
    assert passed(b"{" + usage + b"," + filling + b"}", 50_000).tokens == (7, 0)
    assert passed(b"{" + filling + b"," + usage + b"}", 50_000).tokens == (7, 0)
    assert passed(b"{" + filling + b"}", 50_000).tokens == (0, 0)
