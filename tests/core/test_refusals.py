"""What the words of a refusal mean, and that no client can make a server say them."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from multiverse_gateway.core.refusals import lacks_endpoint, lacks_model
from support.memory import peak_of_memory

CHAT = json.dumps({"model": "llama3", "messages": [{"role": "user", "content": "Explain the model of the atom."}]}).encode()


def error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


@pytest.mark.parametrize(
    "refusal",
    [
        b'{"error":{"code":400,"message":"model not found","type":"invalid_request_error"}}',
        b'{"error":"model \'llama3\' not found, try pulling it first"}',
        b'{"object":"error","message":"The model `llama3` does not exist.","code":404}',
        b'{"error":{"message":"no","code":"model_not_found"}}',
        b'{"error":"Model \\"llama3\\" is not loaded"}',
        b'{"error":"Model llama3 failed to load: out of memory"}',
        b'{"error":{"message":"Failed to load model llama3"}}',
        b'{"detail":"Invalid model name passed in model=llama3"}',
        b'{"detail":"Model not found"}',
        b'["model llama3 not found"]',
        b"model llama3 not found",
        b'{"error":"No models loaded. Please load a model in the developer page or use the `lms load` command."}',
        b'{"detail":"No model is currently loaded."}',
        b'{"error":"Model is unloaded."}',
        b'{"error":"Model has unloaded or crashed."}',
        b'{"error":"The model llama3 is not currently loaded"}',
        b'{"error":{"message":"No such model: llama3"}}',
        b'{"error":{"message":"Unknown model: llama3"}}',
        b'{"error":"unknown model \\"llama3\\""}',
    ],
)
def test_servers_say_in_many_ways_that_they_lack_a_model(refusal: bytes) -> None:
    assert lacks_model(refusal, CHAT)


@pytest.mark.parametrize(
    "refusal",
    [
        b"",
        b'{"detail":"Not Found"}',
        b'{"error":{"message":"This model\'s maximum context length is 4096 tokens; the prompt was not found to fit"}}',
        b'{"error":{"message":"the model ran out of memory"}}',
        b'{"error":"remodel not found"}',
        b'{"error":"unknown model parameter: top_z"}',
        b'{"error":"the model is loaded, the tool is not"}',
        b'{"error":{"message":null,"code":404}, "model": "not found"}',
    ],
)
def test_other_refusals_say_nothing_about_the_model(refusal: bytes) -> None:
    assert not lacks_model(refusal, CHAT)


@pytest.mark.parametrize(
    ("refusal", "value"),
    [
        ("Response with id 'resp_ model m' not found", "resp_ model m"),
        ("tool 'model' not found", "model"),
        ("voice 'no such model' is bad", "no such model"),
        ("voice '... unknown model: x' is bad", "a voice of an unknown model: x"),
        ("voice `my model` does not exist", "my model"),
        ("file 'THE  MODEL\nfile' not found", "the model file"),
        ("voice 'a very long voice of a model th' not found", "a very long voice of a model that nobody knows"),
        ("voice '...e of a model that nobody knows' not found", "a very long voice of a model that nobody knows"),
    ],
)
@pytest.mark.parametrize("form", [False, True])
def test_words_that_a_server_repeats_are_not_its_own(refusal: str, value: str, form: bool) -> None:
    """S4: whole values, short ones in quotes, other case and white space, and values cut at either end; in JSON and in forms."""
    request = f'--x\r\ncontent-disposition: form-data; name="voice"\r\n\r\n{value}\r\n--x--'.encode()
    body = request if form else json.dumps({"model": "llama3", "tools": [{"name": value}]}).encode()
    assert not lacks_model(error(refusal), body)


def test_a_prompt_about_models_does_not_hide_that_a_model_is_missing() -> None:
    """Common words of a prompt do not count as repeated."""
    assert lacks_model(error("The model `llama3` does not exist."), CHAT)
    assert lacks_model(error("model not found"), b'{"model": "llama3", "messages": ["model", "the model", "model \\u00e4"]}')


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(TEXT, TEXT, st.sampled_from(["Response '{}' not found", 'file "{}" does not exist', "voice `{}` not found", "{} is not loaded"]))
def test_no_client_can_make_a_server_say_it(before: str, after: str, sentence: str) -> None:
    """Whatever a value says about a model, a server that repeats it whole has said nothing."""
    value = f"{before} model {after}"
    quoted = "{} is" not in sentence
    assume(quoted or " ".join(value.lower().split()) not in {"model", "the model", "a model", "this model"})
    request = json.dumps({"model": "m", "input": [{"deep": value}]}).encode()
    assert not lacks_model(error(sentence.format(value)), request)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_nothing_raises(refusal: bytes, request: bytes) -> None:
    """Both sides may be hostile."""
    lacks_model(refusal, request)
    lacks_model(b"model not found" + refusal, request)


def test_a_request_of_endless_values_is_looked_at_in_part() -> None:
    """The work is bounded."""
    request = json.dumps({"model": "m", "input": ["model", 3] * 20_000}).encode()
    assert lacks_model(error("The model `m` does not exist"), request)
    assert lacks_model(error("The model `m` does not exist"), b'["no", "object"]')


TINY = b"[]," * 300_000 + b"[]"


@pytest.mark.parametrize(
    ("refusal", "request_body"),
    [
        (b'{"error": {"message": "model m not found"}, "more": [%b]}' % TINY, CHAT),
        (error("model m not found"), b'{"model": "m", "input": [%b]}' % TINY),
        (error("model m not found"), b'{"model": "m", "input": [%b]}' % (b'"model",' * 100_000 + b"1")),
    ],
)
def test_neither_side_can_stop_the_gateway_with_tiny_values(refusal: bytes, request_body: bytes) -> None:
    """S6, S7: what takes seconds and hundreds of megabytes to decode is not decoded; a refusal of that size says nothing."""
    with peak_of_memory() as peak:
        assert lacks_model(refusal, request_body) == (len(refusal) < 1000)
    assert peak() < 2 << 20


def test_a_large_request_does_not_hide_what_a_server_repeats() -> None:
    """S4: words of a request with a picture in it are not the server's, and a model that is missing is still noticed."""
    request = json.dumps({"model": "llama3", "input": ["x" * 300_000, "a voice of the model prince"]}).encode()
    assert not lacks_model(error("There is no voice of the model prince: it was not found"), request)
    assert lacks_model(error("model 'llama3' not found"), request)


@pytest.mark.parametrize(
    "words", ["Unexpected endpoint", "Unexpected endpoint or method. (POST /v1/rerank). Returning 200", "unexpected ENDPOINT"]
)
def test_a_missing_endpoint_is_named_by_the_server_itself(words: str) -> None:
    """LM Studio does so; words that the request holds say nothing."""
    assert lacks_endpoint(error(words), CHAT)
    assert not lacks_endpoint(error(words), CHAT + words.upper().encode())
    assert not lacks_endpoint(error("x" * 3000 + words), CHAT)
    assert not lacks_endpoint(error("The endpoint was not expected."), CHAT)
