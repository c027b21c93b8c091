"""What the gateway reads of a request."""

from __future__ import annotations

import json
import time
import tracemalloc
from contextlib import suppress
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.envelope import Envelope, EnvelopeError
from multiverse_gateway.core.forms import MAX_FORM_PARTS
from multiverse_gateway.core.reading import read_envelope
from multiverse_gateway.core.rewriting import asking_for_usage, with_model

CHAT = "/v1/chat/completions"
SPEECH = "/v1/audio/transcriptions"
FORM = "multipart/form-data; boundary=xYz"


def read(body: bytes | str | dict[str, Any], path: str = CHAT, content_type: str = "application/json") -> Envelope:
    if isinstance(body, dict):
        body = json.dumps(body)
    return read_envelope(path, content_type, body.encode() if isinstance(body, str) else body)


def refused(body: bytes | str | dict[str, Any], content_type: str = "application/json") -> EnvelopeError:
    with pytest.raises(EnvelopeError) as raised:
        read(body, SPEECH if content_type.startswith("multipart") else CHAT, content_type)
    assert ";" in raised.value.message or ". " in raised.value.message  # what is wrong, and what to send instead
    assert str(raised.value) == raised.value.message
    return raised.value


def form(*parts: tuple[str, bytes], end: bytes = b"--xYz--\r\n") -> bytes:
    return b"".join(b"--xYz\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + end


def form_field(name: str, content: bytes) -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"', content


MODEL = form_field("model", b"whisper-1")


def test_the_envelope_of_a_chat_request_is_read() -> None:
    """Model, stream and the wish for usage come from the top level of the body."""
    body = {"messages": [], "model": "llama", "stream": True, "stream_options": {"include_usage": True}, "new_parameter": [1]}
    assert read(body) == Envelope("llama", True, False, True, CHAT, Dialect.CHAT)


def test_an_envelope_is_a_value() -> None:
    """An envelope cannot be changed, so the same one may serve many requests."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        read({"model": "m"}).model = "n"  # type: ignore[misc]


@pytest.mark.parametrize("content_type", ["", "application/json", "application/json; charset=utf-8", "text/plain", "nonsense;;"])
def test_anything_but_a_form_is_read_as_json(content_type: str) -> None:
    """Clients often send no or another content type with JSON."""
    assert read({"model": "m"}, content_type=content_type).model == "m"


@pytest.mark.parametrize(("stream", "expected"), [(True, True), (False, False), (None, False)])
def test_stream_is_a_boolean_or_null(stream: bool | None, expected: bool) -> None:
    """Null is what SDKs send for a default."""
    assert read({"model": "m", "stream": stream}).stream is expected
    assert read({"model": "m"}).stream is False


@pytest.mark.parametrize("stream", [1, 0, "true", [], {}, 1.5])
def test_any_other_stream_is_refused(stream: object) -> None:
    """A stream that is no boolean would be read by servers as they like."""
    assert refused({"model": "m", "stream": stream}).param == "stream"


@pytest.mark.parametrize(
    "options", [None, {}, {"include_usage": False}, {"include_usage": 1}, {"include_usage": None}, [], "include_usage", 7]
)
def test_usage_is_wanted_only_if_asked_for(options: object) -> None:
    """Only `include_usage: true` asks for usage; other shapes are the server's to judge."""
    assert read({"model": "m", "stream_options": options}).wants_usage is False


@pytest.mark.parametrize(
    ("path", "body", "stateful"),
    [
        (CHAT, {}, False),
        (CHAT, {"store": None}, False),
        (CHAT, {"store": False}, False),
        (CHAT, {"store": True}, True),
        (CHAT, {"store": "yes"}, True),
        ("/v1/completions", {}, False),
        ("/v1/embeddings", {}, False),
        ("/v1/rerank", {}, False),
        ("/v1/reranking", {}, False),
        ("/v1/score", {}, False),
        ("/v1/moderations", {}, False),
        ("/v1/messages", {}, False),
        ("/v1/messages/count_tokens", {}, False),
        ("/v1/messages/batches", {}, True),
        ("/v1/audio/speech", {}, False),
        ("/v1/audio/", {"background": True}, True),
        ("/v1/images/generations", {}, False),
        ("/v1/images/edits", {}, True),
        ("/v1/images/variations", {}, True),
        ("/v1/responses", {}, True),
        ("/v1/responses", {"store": None}, True),
        ("/v1/responses", {"store": True}, True),
        ("/v1/responses", {"store": 0}, True),
        ("/v1/responses", {"store": False}, False),
        ("/v1/responses", {"store": False, "background": False, "previous_response_id": None, "conversation": None}, False),
        ("/v1/responses", {"store": False, "background": True}, True),
        ("/v1/responses", {"store": False, "previous_response_id": "resp_1"}, True),
        ("/v1/responses", {"store": False, "conversation": "conv_1"}, True),
        ("/v1/responses", {"store": False, "conversation": {"id": "conv_1"}}, True),
        ("/v1/responses", {"store": False, "model_config": 1}, False),
        ("/v1/responses/compact", {"store": False}, True),
        ("/v1/batches", {}, True),
        ("/v1/files", {}, True),
        ("/v1/fine_tuning/jobs", {}, True),
        ("/v1/threads", {}, True),
        ("/v1/audios", {}, True),
        ("/v1/unknown", {}, True),
    ],
)
def test_what_leaves_something_behind_is_stateful(path: str, body: dict[str, Any], stateful: bool) -> None:
    """Only a call that is known to leave nothing on its server may be repeated after a server has read it."""
    assert read({"model": "m", **body}, path).stateful is stateful
    assert read({"model": "m", **body, "a name that is not known": 1}, path).stateful is stateful


@pytest.mark.parametrize(("path", "stateful"), [(SPEECH, False), ("/v1/audio/translations", False), ("/v1/images/edits", True)])
def test_a_form_leaves_something_behind_as_its_path_does(path: str, stateful: bool) -> None:
    """A transcription may be repeated; an edited image may have been paid for."""
    assert read(form(MODEL), path, FORM).stateful is stateful


@pytest.mark.parametrize(
    ("path", "dialect"), [("/v1/responses", Dialect.RESPONSES), ("/v1/messages", Dialect.MESSAGES), ("/x", Dialect.OTHER)]
)
def test_the_dialect_follows_from_the_path(path: str, dialect: Dialect) -> None:
    """The envelope says in which dialect the answer will come."""
    envelope = read({"model": "m"}, path)
    assert (envelope.path, envelope.dialect) == (path, dialect)


@pytest.mark.parametrize("model", ["m", "ä/b:c@d-1.5", "x" * 256, "\u4f60\u597d", "\U0001f600", " "])
def test_any_string_of_up_to_256_characters_is_a_model(model: str) -> None:
    """Whether it exists is for the routing table to say."""
    assert read({"model": model}).model == model
    assert read(json.dumps({"model": model}, ensure_ascii=False)).model == model


@pytest.mark.parametrize(
    "body", [{}, {"model": None}, {"model": ""}, {"model": 7}, {"model": ["m"]}, {"model": {}}, {"model": "x" * 257}, {"Model": "m"}]
)
def test_a_body_without_a_usable_model_is_refused(body: dict[str, Any]) -> None:
    """The error points at the field `model`."""
    assert refused(body).param == "model"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \n",
        b"null",
        b"[]",
        b'"model"',
        b"7",
        b"model=m",
        b"{",
        b'{"model":"m"',
        b'{"model":"m"} x',
        b'{"model":"m"}{"model":"m"}',
        b"{'model':'m'}",
        b'{"model":"m",}',
        b'\xef\xbb\xbf{"model":"m"}',
        b'{"model":"m","x":NaN}',
        b'{"model":"m","x":Infinity}',
        b'{"model":"m","x":-Infinity}',
        b'{"model":"m","x":01}',
        b'{"model":"m","x":"\n"}',
        b'{"model":"\\ud800"}',
        b'{"model":"\\udc00 low"}',
        b'{"model":"\\ud800\\u0041"}',
        b'{"model":"m","x":"\\ud800 and more text"}',
        b'{"model":"\xff"}',
        b'{"model":"m","x":"\xff"}',
        b'{"model":"m","x":"\xed\xa0\x80"}',
        b'{"model":"m","x":"\xc3',
        b'{"model":"m","x":"\xc3"}',
        '{"model":"m"}'.encode("utf-16"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    """Malformed JSON, NaN, lone surrogates and bytes that are not UTF-8 never reach a server (L06)."""
    assert refused(body).code == "invalid_json"


def test_bytes_that_are_not_utf8_are_found_across_pieces() -> None:
    """A character may lie across the pieces in which a large body is checked; half of one at the end is an error (L06)."""
    for shift in range(4):
        body = b'{"model":"m","x":"' + b"a" * ((1 << 16) - 18 - shift) + "😀".encode() + b'"}'
        assert read(body).model == "m"
        assert refused(body.replace(b"\x80", b"x")).code == "invalid_json"
    for padding in (0, 1 << 17):
        assert "UTF-8" in refused(b'{"model":"m"}' + b" " * padding + b"\xf0\x9f").message


@pytest.mark.parametrize("shape", ["array", "object"])
def test_nesting_that_is_too_deep_is_refused_at_once(shape: str) -> None:
    """A hundred thousand levels cost neither the stack nor the time (L06)."""
    nested = b"[" * 100_000 + b"]" * 100_000 if shape == "array" else b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    for name in (b"x", b"model", b"stream_options"):
        started = time.perf_counter()
        message = refused(b'{"model":"m","' + name + b'":' + nested + b"}").message
        assert "deep" in message or "not a string" in message
        assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("name", ["x", "model", "stream", "store", "stream_options"])
def test_endless_numbers_never_raise_anything_else(name: str) -> None:
    """A number of 10^5 digits is relayed for the server to judge, or rejected in the place of a value that the gateway reads (L06)."""
    body = f'{{"{name}":{"9" * 100_000},"model":"m"}}'
    if name in {"model", "stream"}:
        assert isinstance(refused(body), EnvelopeError)
    else:
        assert read(body).model == "m"


def test_a_body_of_very_many_keys_is_read() -> None:
    """A million keys are skipped, not stored (L06)."""
    body = b'{"model":"m"' + b"".join(b',"k%d":1' % number for number in range(200_000)) + b"}"
    assert read(body).model == "m"


@pytest.mark.parametrize(
    "body",
    [
        r'{"model":"a","model":"b"}',
        r'{"model":"a","model":"a"}',
        r'{"model":"a","x":1,"\u006dodel":"b"}',
        r'{"\u006dodel":"a","model":"b"}',
        r'{"\u006D\u006F\u0064\u0065\u006C":"a","model":"b"}',
        r'{"model":"a","model":null}',
        r'{"model":null,"model":"a"}',
        r'{"model":null,"model":null}',
        r'{"model" : "a" , "model" : {"model":"b"}}',
        r'{"model":"a","model":"b","model":"c"}',
        r'{"model":"a","messages":["\\"],"model":"b"}',
    ],
)
def test_a_body_that_names_the_model_twice_is_refused(body: str) -> None:
    """The gateway and the server might read different ones, however they are spelled (L06)."""
    error = refused(body)
    assert (error.param, "twice" in error.message) == ("model", True)


@pytest.mark.parametrize(
    "body",
    [
        r'{"model":"m","stream":true,"stream":false}',
        r'{"model":"m","stream":null,"stream":null}',
        r'{"stream":true,"model":"m","\u0073tream":true}',
    ],
)
def test_a_body_that_says_stream_twice_is_refused(body: str) -> None:
    """The server might stream where the gateway does not expect it."""
    assert "twice" in refused(body).message


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "tools": [{"function": {"parameters": {"properties": {"model": {"type": "string"}, "stream": {}}}}}]},
        {"metadata": {"model": "x", "stream": 1}, "model": "m"},
        {"model": "m", "messages": [{"role": "model", "content": '{"model":"x","model":"y"} \\u006dodel'}]},
        {"model": "m", "stream_options": {"model": "x"}, "store": {"model": "x"}},
    ],
)
def test_a_nested_model_is_none_of_our_business(body: dict[str, Any]) -> None:
    """Tools, metadata and messages may say `model` as often as they like."""
    assert read(body).model == "m"


FOLDED = {"\u017f": "s", "\u212a": "k"}


def folded(name: str) -> str:
    """Fold a name as Go's `strings.EqualFold` compares: ASCII case, and the two other letters that fold to one of ASCII."""
    return "".join(FOLDED.get(letter, letter.lower() if letter.isascii() else letter) for letter in name)


def is_ambiguous(body: bytes) -> bool:
    """Return whether two parsers could find different values of `model` or `stream` at the top level of an object."""
    names = [name for name, _ in json.loads(body, object_pairs_hook=list)]
    return any(
        [folded(name) for name in names].count(wanted) > 1 or any(folded(name) == wanted != name for name in names)
        for wanted in ("model", "stream")
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"model":"small","Model":"big"}', "model"),
        ('{"Model":"big","model":"small"}', "model"),
        ('{"model":"small","MODEL":"big"}', "model"),
        ('{"model":"small","mOdeL" : "big"}', "model"),
        (r'{"model":"small","M\u006fdel":"big"}', "model"),
        (r'{"model":"small","\u004dodel":"big"}', "model"),
        (r'{"model":"small","\u004D\u004f\u0044\u0045\u004C":null}', "model"),
        ('{"model":"small","x":{"a":[1,"}"]},"Model":[["big"]]}', "model"),
        ('{"Model":"big"}', "model"),
        ('{"model":"small","Stream":true}', "stream"),
        ('{"model":"small","stream":false,"STREAM":true}', "stream"),
        ('{"model":"small","stream":false,"\u017ftream":true}', "stream"),
        (r'{"model":"small","\u017ftream":true}', "stream"),
        (r'{"model":"small","\u017FTREAM":true}', "stream"),
    ],
)
@pytest.mark.parametrize("padding", ["", "text " * 60_000])
def test_a_name_that_folds_to_model_or_stream_is_rejected(body: str, param: str, padding: str) -> None:
    """Go's JSON parser ignores case and takes the last of such names, so the server could use another model than the gateway counts."""
    body = body.replace("{", json.dumps({"padding": padding})[:-1] + ", ", 1)
    error = refused(body)
    assert (error.param, f"`{param}`" in error.message) == (param, True)


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "messages": [{"role": "user", "content": 'Why "Model": and "Stream" ? {"Model":"x"} \u004dodel \u017ftream'}]},
        {"model": "m", "tools": [{"Model": {"Stream": True, "\u017ftream": 1}}], "metadata": {"MODEL": "x"}, "unknown": {"Model": 1}},
        {"model": "m", "models": [], "modeL ": 1, " Model": 1, "Mode1": 2, "Streams": 1, "modell": 1, "\ufb05ream": 1, "\u212aey": 1},
        {"model": "Model", "stream": True, "unknown": "Stream", "Unknown": "\u017ftream"},
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_only_names_at_the_top_level_are_compared(body: dict[str, Any], is_ascii: bool) -> None:
    """A prompt, a tool, metadata and values may contain any name, and a name that folds to another word is the server's to judge."""
    assert read(json.dumps(body, ensure_ascii=is_ascii)).model == body["model"]


LETTERS = {"s": "sS\u017f", "k": "kK\u212a"}
FOLDING_NAMES = st.sampled_from(["model", "stream", "key", "store", "mode1"]).flatmap(
    lambda name: st.tuples(*[st.sampled_from(LETTERS.get(letter, letter + letter.upper())) for letter in name]).map("".join)
)
ANY_NAMES = (
    st.sampled_from(["model", "stream", "messages", "temperature", "x"])
    | FOLDING_NAMES
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
)
NESTED = st.recursive(
    st.sampled_from(["m", True, None, '"Model":', "\u017ftream"]),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(ANY_NAMES, children, max_size=2),
    max_leaves=4,
)


@given(st.lists(st.tuples(ANY_NAMES, NESTED, st.sets(st.integers(0, 6))), max_size=4), st.booleans(), st.sampled_from(["", " ", "\n\t"]))
@example([("MODEL", "big", {0})], False, "")
@example([("\u017ftream", True, set())], False, "")
def test_exactly_the_ambiguous_bodies_are_rejected(members: list[tuple[str, Any, set[int]]], is_ascii: bool, space: str) -> None:
    """An oracle that decodes every name at the top level agrees: a body is rejected if, and only if, two parsers could differ."""
    pieces = ['"model":"small"']
    for name, value, escaped in members:
        letters = [json.dumps(letter, ensure_ascii=is_ascii)[1:-1] for letter in name]
        for place in escaped & set(range(len(name))):
            if ord(name[place]) < 0x10000:
                letters[place] = f"\\u{ord(name[place]):04x}"
        pieces.append(f'"{"".join(letters)}"{space}:{space}{json.dumps(value, ensure_ascii=is_ascii)}')
    body = ("{" + f"{space},{space}".join(pieces) + "}").encode()
    streams = [value for name, value, _ in members if name == "stream"]
    if is_ambiguous(body) or (streams and streams[0] not in (True, None)):
        assert refused(body).param in {"model", "stream"}
    else:
        assert read(body).model == "small"


def test_a_large_value_that_is_not_a_model_is_not_built() -> None:
    """A list of millions of lists in place of the model's name takes little more memory than the body itself."""
    for name in ("model", "stream", "store", "stream_options", "Model", "unknown"):
        body = b'{"%b":[' % name.encode() + b"[]," * 400_000 + (b"1]}" if name == "model" else b'1],"model":"m"}')
        tracemalloc.start()
        with suppress(EnvelopeError):
            read(body)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * len(body), name


@pytest.mark.parametrize("padding", [b"", b" " * 300_000])
@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b'{"model":1e999}', "model", None),
        (b'{"model":7}', "model", None),
        (b'{"model":"m","stream":1}', "stream", None),
        (b"[1]", None, "invalid_json"),
        (b"7", None, "invalid_json"),
        (b'{"model":"m"', None, "invalid_json"),
    ],
)
def test_a_large_body_is_refused_as_a_small_one(padding: bytes, body: bytes, param: str | None, code: str | None) -> None:
    """The types of a large one are checked first; what is wrong is said alike."""
    error = refused(padding + body)
    assert (error.param, error.code) == (param, code)
    assert "which some servers" not in error.message


def test_a_body_of_too_many_unknown_names_is_rejected() -> None:
    """Millions of names that the gateway does not know would hold up every other request while they are compared."""
    assert "fields" in refused(b'{"model":"m"' + b',"":1' * 1_100_000 + b"}").message
    assert read(b'{"model":"m","messages":[{' + b'"":1,' * 1_100_000 + b'"":1}]}').model == "m"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: st.lists(children) | st.dictionaries(st.sampled_from(["model", "stream", "x", "ä"]), children),
    max_leaves=8,
)
NAMES = st.sampled_from(["model", "stream", "store", "stream_options", "messages", "ä"])


def spelled(name: str, escaped: list[bool]) -> str:
    return "".join(f"\\u{ord(char):04x}" if escape else char for char, escape in zip(name, escaped + [False] * len(name), strict=False))


@given(st.lists(st.tuples(NAMES, JSON, st.lists(st.booleans(), max_size=6))))
def test_the_envelope_says_what_a_json_parser_says(members: list[tuple[str, Any, list[bool]]]) -> None:
    """Either the envelope agrees with the standard library's parser, or the body is refused."""
    body = "{" + ",".join(f'"{spelled(name, escaped)}":{json.dumps(value)}' for name, value, escaped in members) + "}"
    names = [name for name, _, _ in members]
    try:
        envelope = read(body)
    except EnvelopeError:
        return
    parsed = json.loads(body)
    assert (envelope.model, envelope.stream) == (parsed["model"], parsed.get("stream") or False)
    assert names.count("model") == 1
    assert names.count("stream") <= 1
    assert envelope.stateful is not any(parsed.get("store") is harmless for harmless in (None, False))


@given(
    st.binary() | st.text().map(lambda text: f'{{"model":"{text}"'.encode("utf-8", "surrogatepass")),
    st.sampled_from(["", FORM, "multipart/x"]),
)
@example(b'{"model":"m"}\x00', "")
def test_no_bytes_raise_anything_but_an_envelope_error(body: bytes, content_type: str) -> None:
    """Whatever a client sends is read or refused."""
    try:
        envelope = read_envelope(CHAT, content_type, body)
    except EnvelopeError:
        return
    assert msgspec.json.decode(body)["model"] == envelope.model


AUDIO = bytes(range(256)) * 64 + b'\r\n--xY\r\n\r\nContent-Disposition: form-data; name="model"\r\n\r\nevil\r\n--Xyz\r\n'


def test_the_model_of_a_form_is_read() -> None:
    """Audio requests carry their model in a form, before or after the file."""
    file = ('Content-Disposition: form-data; name="file"; filename="a;name=\\"model\\".wav"\r\nContent-Type: audio/wav', AUDIO)
    for body in (form(MODEL, file), form(file, MODEL), b"\r\n" + form(file, MODEL), form(file, MODEL, end=b"--xYz--")):
        assert read(body, SPEECH, FORM) == Envelope("whisper-1", False, False, False, SPEECH, Dialect.OTHER)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data;boundary=xYz",
        'Multipart/Form-Data ; Boundary="xYz"',
        "multipart/form-data; charset=UTF-8; boundary=xYz ",
    ],
)
def test_the_boundary_is_found_in_any_usual_spelling(content_type: str) -> None:
    """Parameters may be quoted, in any order and case."""
    assert read(form(MODEL), SPEECH, content_type).model == "whisper-1"


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="',
        'multipart/form-data; boundary=""',
        'multipart/form-data; boundary="xYz "',
        f"multipart/form-data; boundary={'x' * 71}",
        'multipart/form-data; boundary="x\u00e4z"',
        "multipart/form-data; boundary=xYz; boundary=abc",
        "multipart/form-data; boundary=xYz; charset=utf-7",
        "multipart/mixed; boundary=xYz",
        "multipart/",
    ],
)
def test_a_form_without_one_clear_boundary_is_refused(content_type: str) -> None:
    """Two parsers could cut it in two ways."""
    refused(form(MODEL), content_type)


@pytest.mark.parametrize(
    ("text", "stream"),
    [(b"true", True), (b"True", True), (b"1", True), (b"false", False), (b"0", False), (b"", False)],
)
def test_stream_in_a_form_is_a_word(text: bytes, stream: bool) -> None:
    """Forms have no booleans; SDKs write them as words."""
    assert read(form(MODEL, form_field("stream", text)), "/v1/chat/completions", FORM).stream is stream


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/v1/audio/speech", "/v1/images/generations", "/v1/score", "/v1/unknown"])
def test_a_path_that_has_no_streams_needs_none(path: str) -> None:
    """S4: whatever the client asks for, the plain answer is good there, and no server is to blame for it."""
    assert not read(b'{"model": "m", "stream": true}', path).stream


DISPOSITION = 'Content-Disposition: form-data; name="model"'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (form(MODEL, MODEL), "model"),
        (form(MODEL, form_field("stream", b"true"), form_field("stream", b"true")), "stream"),
        (form(MODEL, form_field("stream", b"maybe")), "stream"),
        (form(form_field("file", b"x")), "model"),
        (form(form_field("model", b"")), "model"),
        (form(form_field("model", b"x" * 257)), "model"),
        (form(form_field("model", b"\xff")), "model"),
        (form((DISPOSITION + '; filename="a"', b"m")), "model"),
        (form((DISPOSITION + "; filename*=utf-8''a", b"m")), "model"),
        (form((DISPOSITION + "; name=other", b"m")), None),
        (form((DISPOSITION + "; name*=utf-8''other", b"m")), None),
        (form(('Content-Disposition: form-data; name="mod\\el"', b"m")), None),
        (form(("Content-Disposition: form-data; name=", b"m")), None),
        (form(('Content-Disposition: form-data; name="model', b"m")), None),
        (form(("Content-Disposition: form-data", b"m")), None),
        (form(('Content-Disposition: attachment; name="model"', b"m")), None),
        (form((DISPOSITION + "\r\n" + DISPOSITION, b"m")), None),
        (form((DISPOSITION + "\r\nContent-Transfer-Encoding: base64", b"m")), None),
        (form((DISPOSITION + "\r\n folded", b"m")), None),
        (form((DISPOSITION + "\r\nX: a\nY: b", b"m")), None),
        (form((DISPOSITION + "\r\nno colon", b"m")), None),
        (form(("Content-Type: text/plain", b"m")), None),
        (form(("", b"m")), None),
        (b'--xYz\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nm\r\n--xYz--', None),
        (form(MODEL).replace(b"\r\n", b"\n"), None),
        (form(MODEL, end=b""), None),
        (form(MODEL, end=b"--xYz"), None),
        (form(MODEL, end=b"--xYz-"), None),
        (form(MODEL, end=b"--xYzz\r\n"), None),
        (form(MODEL)[:40], None),
        (form(MODEL) + form(MODEL), None),
        (form((DISPOSITION + "\r\nX: " + "x" * 9000, b"m")), None),
        (form(*[form_field("tag", b"x")] * MAX_FORM_PARTS, MODEL), None),
        (b"preamble\r\n" + form(MODEL), None),
        (b"", None),
        (b'{"model":"m"}', None),
    ],
)
def test_a_form_that_two_parsers_could_read_differently_is_refused(body: bytes, param: str | None) -> None:
    """Twice the same field, hidden names, encodings and cut-off forms never reach a server."""
    assert refused(body, FORM).param == param


def test_a_plain_transfer_encoding_is_harmless() -> None:
    """Some clients mark their binary parts."""
    head = DISPOSITION + "\r\nContent-Transfer-Encoding: 8bit"
    assert read(form((head, b"m")), SPEECH, FORM).model == "m"


@given(st.lists(st.tuples(st.sampled_from(["model", "file", "tag"]), st.binary(max_size=40)), max_size=4))
def test_a_form_gives_back_what_was_put_in(parts: list[tuple[str, bytes]]) -> None:
    """Either the one model field, byte for byte, or an error."""
    models = [content for name, content in parts if name == "model"]
    try:
        model = read(form(*[form_field(name, content) for name, content in parts]), SPEECH, FORM).model
    except EnvelopeError:
        return
    assert [model.encode()] == models


@pytest.mark.parametrize(
    ("path", "body", "leaves"),
    [
        ("/v1/chat/completions", {"stream": True}, True),
        ("/v1/completions", {"stream": True}, True),
        ("/v1/chat/completions", {"stream": False}, False),
        ("/v1/chat/completions", {}, False),
        ("/v1/chat/completions", {"stream": True, "stream_options": None}, False),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"include_usage": False}}, False),
        ("/v1/responses", {"stream": True}, False),
        ("/v1/messages", {"stream": True}, False),
    ],
)
def test_tokens_of_a_stream_may_be_asked_for_when_the_client_said_nothing(path: str, body: dict[str, Any], leaves: bool) -> None:
    written = json.dumps({"model": "m", **body}).encode()
    assert read_envelope(path, "application/json", written).leaves_usage is leaves


@given(st.dictionaries(st.text(), st.integers() | st.text(), max_size=3), st.sampled_from(["", " ", "\n\t"]))
def test_asking_for_tokens_adds_one_field(fields: dict[str, Any], before: str) -> None:
    """Everything else of the body stays, byte for byte."""
    body = (before + json.dumps({"model": "m", **fields})).encode()
    asking = asking_for_usage(body)
    assert asking.replace(b'"stream_options":{"include_usage":true},', b"", 1) == body
    assert json.loads(asking) == {"stream_options": {"include_usage": True}, **json.loads(body)}


@pytest.mark.parametrize(
    ("written", "model"),
    [
        ("llama3.2:latest", "llama3.2"),
        ("llama3.2", "llama3.2"),
        ("llama3.2:3b", "llama3.2:3b"),
        (":latest", ":latest"),
        ("latest", "latest"),
    ],
)
def test_a_model_without_a_tag_is_the_latest(written: str, model: str) -> None:
    """Ollama gives one model two names; it is routed by the short one, and the body keeps the one that it has."""
    for envelope in (read({"model": written}), read(form(form_field("model", written.encode())), SPEECH, FORM)):
        assert (envelope.model, envelope.written_model) == (model, written)


@given(
    st.lists(st.tuples(NAMES, JSON, st.lists(st.booleans(), max_size=6)), max_size=5),
    st.sampled_from(["m", "llama3.2:latest", "\u00e4 \\"]),
    st.sampled_from(["", " ", "\n\t"]),
    st.integers(0, 5),
)
def test_another_model_is_written_in_its_place(members: list[tuple[str, Any, list[bool]]], model: str, space: str, at: int) -> None:
    """Exactly the value of the top-level field changes, wherever it stands, however it is written and whatever else has its name."""
    pieces = [
        f'"{spelled(name, escaped)}"{space}:{space}{json.dumps(value)}'
        for name, value, escaped in members
        if name not in {"model", "stream"}
    ]
    pieces.insert(at, f'"model"{space}:{space}')
    before, after = (
        "{" + f"{space},".join(pieces[: min(at, len(pieces) - 1) + 1]),
        space + "".join(f",{piece}" for piece in pieces[at + 1 :]) + "}",
    )
    body = (before + json.dumps(model) + after).encode()
    assert read(body).written_model == model
    assert with_model(body, "application/json", "new:latest") == (before + '"new:latest"' + after).encode()


@pytest.mark.parametrize("nested", [b'{"model":"m"}', b'["m","m"]', b'"\\"model\\":\\"m\\""'])
def test_a_model_is_found_among_many_like_it(nested: bytes) -> None:
    """A large body full of the same name costs no more than any other."""
    many = b"[" + b",".join([nested] * 50_000) + b"]"
    for start, end in ((b'{"messages":' + many + b',"model":', b"}"), (b'{"model":', b',"messages":' + many + b"}")):
        assert with_model(start + b'"m"' + end, "", "n") == start + b'"n"' + end


def test_another_model_is_written_into_a_form() -> None:
    """Files and boundaries stay as they are."""
    file = ('Content-Disposition: form-data; name="file"; filename="a.wav"', AUDIO)
    for parts in ((MODEL, file), (file, MODEL)):
        other = [form_field("model", b"whisper-1:latest") if part is MODEL else part for part in parts]
        assert with_model(form(*parts), FORM, "whisper-1:latest") == form(*other)


# Stored responses


RESPONSES = "/v1/responses"


@pytest.mark.parametrize("path", [RESPONSES, f"{RESPONSES}/compact"])
@pytest.mark.parametrize("rest", [{}, {"Model_": 1, "unknown": {"Previous_Response_Id": "x"}}])
def test_the_response_that_a_request_continues_is_known(path: str, rest: dict[str, Any]) -> None:
    """Wherever responses are made; the envelope is stateful, and "not found" speaks of that response."""
    found = read({"model": "llama", "previous_response_id": "resp_1", **rest}, path)
    assert (found.response_id, found.names_response, found.stateful) == ("resp_1", True, True)
    for empty in (None, ""):
        assert read({"model": "llama", "previous_response_id": empty, **rest}, path).response_id is None
    assert read({"model": "llama", **rest}, path).response_id is None


def test_other_calls_continue_no_response() -> None:
    """A field of that name means nothing there, but makes the call stateful as ever."""
    for path in (CHAT, "/v1/responsesx"):
        found = read({"model": "llama", "previous_response_id": 7}, path)
        assert (found.response_id, found.stateful) == (None, True)


@pytest.mark.parametrize(
    "fields",
    [
        '"previous_response_id": "a", "previous_response_id": "b"',
        '"previous_response_id": null, "previous_response_id": "b"',
        '"previous_response_id": "a", "previous\\u005fresponse_id": "a"',
        '"previous_response_id": "a", "PREVIOUS_RESPONSE_ID": "b"',
        '"Previous_response_id": "b"',
        '"previou\\u017f_re\\u017fpon\\u017fe_id": "b"',
        '"previous_response_id": 7',
        '"previous_response_id": false',
        '"previous_response_id": ["a"]',
        '"previous_response_id": {"a": "b"}, "previous_response_id": "c"',
    ],
)
def test_a_body_that_names_two_responses_is_refused(fields: str) -> None:
    """Or that some server could read so, or whose response is no text: the gateway checks whose response it is."""
    with pytest.raises(EnvelopeError) as raised:
        read(f'{{"model": "llama", {fields}}}', RESPONSES)
    assert raised.value.param == "previous_response_id"


@pytest.mark.parametrize(("path", "stored"), [(RESPONSES, True), (f"{RESPONSES}/compact", False), (CHAT, False)])
def test_only_responses_are_stored(path: str, stored: bool) -> None:
    assert read({"model": "llama"}, path).stores_response is stored
    assert not read({"model": "llama", "store": False}, path).stores_response
    assert read({"model": "llama", "store": False, "background": True}, path).stores_response is stored
