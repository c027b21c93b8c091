"""Which cap a registration gives a server, from answers as the real engines send them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.caps import MODELS_PATH, OLLAMA, UNSTATED, VLLM, Stated, cap_of, owner_of, paths_for, stated_by, target_of
from multiverse_gateway.core.servers import MAX_CONCURRENCY, Server, ServerId

PATHS = paths_for(None)

ANSWERS: list[tuple[str, Any, int | None]] = [
    ("/props", {"default_generation_settings": {"n_ctx": 512}, "total_slots": 4, "model_path": "tiny.gguf", "is_sleeping": False}, 4),
    ("/props", {"total_slots": 1}, 1),
    ("/props", {"role": "router", "max_instances": 4, "default_generation_settings": {"n_ctx": 0}}, None),
    ("/props", {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, None),
    ("/server_info", {"model_path": "m", "max_running_requests": 32, "internal_states": [{}], "version": "0.5"}, 32),
    ("/get_server_info", {"max_running_requests": 48}, 48),
    ("/get_server_info", {"max_running_requests": None, "internal_states": [{"effective_max_running_requests_per_dp": 20}] * 2}, 40),
    ("/get_server_info", {"max_running_requests": None, "internal_states": [{"max_running_requests": 17}]}, 17),
    ("/get_server_info", {"max_running_requests": None, "internal_states": [{}, 5, None]}, None),
    ("/get_server_info", {"max_running_requests": None, "internal_states": {}}, None),
    ("/server_info", {"vllm_config": "model='m', max_num_seqs=256"}, None),
    ("/info", {"model_id": "m", "max_concurrent_requests": 128, "max_input_length": 1024}, 128),
    ("/info", {"name": "something else"}, None),
    ("/api/version", {"version": "0.12.5"}, 1),
    ("/api/version", {"version": "0.6.30", "deployment_id": ""}, None),
    ("/api/version", {"version": "v1", "commit": "c", "build_date": "d"}, None),
    ("/api/version", {"version": 1}, None),
    ("/api/version", {"error": "Unexpected endpoint or method. (GET /api/version)"}, None),
]


@pytest.mark.parametrize(("path", "answer", "limit"), ANSWERS)
def test_engines_state_their_limit_each_in_its_own_way(path: str, answer: Any, limit: int | None) -> None:
    stated = stated_by(path, 200, json.dumps(answer).encode())
    assert (None if stated is None else stated.limit) == limit
    assert stated_by(path, 401, json.dumps(answer).encode()) is None


@pytest.mark.parametrize("number", [True, False, 0, -1, 4.0, "4", None, [4], {}])
def test_only_a_whole_number_from_one_is_a_limit(number: object) -> None:
    for path, name in (("/props", "total_slots"), ("/server_info", "max_running_requests"), ("/info", "max_concurrent_requests")):
        assert stated_by(path, 200, json.dumps({name: number}).encode()) is None


def test_a_limit_is_never_larger_than_one_that_can_be_registered() -> None:
    assert stated_by("/info", 200, b'{"max_concurrent_requests": 1000000}') == Stated(
        MAX_CONCURRENCY, "TGI states that it takes at most 4096 at once"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["total_slots", "max_running_requests", "internal_states", "max_concurrent_requests", "version", "data", "owned_by"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(st.sampled_from(PATHS), json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=32))
def test_whatever_a_server_answers_it_is_read_or_ignored(path: str, body: bytes) -> None:
    """A stranger writes these answers: no exception, and no limit that a registration would refuse."""
    stated = stated_by(path, 200, body)
    assert stated is None or stated.limit is None or 1 <= stated.limit <= MAX_CONCURRENCY


def test_deeply_nested_answers_state_nothing() -> None:
    assert stated_by("/props", 200, b"[" * 100_000) is None


def test_the_list_of_models_names_its_engine() -> None:
    entries: list[object] = [{"id": "other", "owned_by": "me"}, "text", {"id": "tiny:latest", "owned_by": "library"}]
    assert owner_of(entries, "tiny") == "library"
    assert owner_of(entries, "unlisted") == "me"
    assert owner_of([{"id": "tiny", "owned_by": 5}], "tiny") == ""
    assert owner_of([], "tiny") == ""
    assert len(owner_of([{"id": "tiny", "owned_by": "x" * 1000}], "tiny")) == 64
    assert stated_by(MODELS_PATH, 200, b'{"data": [{"id": "m", "owned_by": "vllm"}]}') == VLLM
    assert stated_by(MODELS_PATH, 200, b'{"data": [{"id": "m", "owned_by": "me"}]}') is None
    assert stated_by(MODELS_PATH, 200, b'{"data": null}') is None


def test_known_engines_are_asked_one_thing_and_strangers_everything_that_is_free() -> None:
    assert paths_for("llamacpp") == ("/props",)
    assert paths_for("library") == ("/api/version",)
    assert paths_for("vllm") == ()
    assert MODELS_PATH in paths_for(None)
    assert MODELS_PATH not in paths_for("somebody")
    assert set(paths_for("somebody")) == {"/props", "/server_info", "/get_server_info", "/info", "/api/version"}
    for path in PATHS:
        assert "model=" not in target_of(path, "tiny") or target_of(path, "tiny").endswith("&autoload=false")


def server(max_concurrency: int | None) -> Server:
    return Server(
        id=ServerId("x"),
        model_name="tiny",
        endpoint_url="http://gpu.example",
        max_concurrency=max_concurrency,
        registered_at=1.0,
        created_at=1.0,
        updated_at=1.0,
    )


SLOTS = Stated(4, "llama.cpp states 4 slots")


@pytest.mark.parametrize(
    ("stated", "wanted", "existing", "limit", "reason"),
    [
        (None, 8, None, 8, "The registration sets the limit to 8."),
        (None, None, None, None, "The registration asks for no limit."),
        (None, 8, server(2), 8, "The registration sets the limit to 8."),
        (None, None, server(2), None, "The registration asks for no limit."),
        (SLOTS, None, None, 4, "llama.cpp states 4 slots, so it gets at most 4 requests at once."),
        (OLLAMA, None, None, 1, f"{OLLAMA.fact}, so it gets at most 1 request at once."),
        (VLLM, None, None, None, "vLLM does not state how many requests it answers at once, so there is no limit."),
        (UNSTATED, None, None, None, "The server does not state how many requests it answers at once, so there is no limit."),
        (SLOTS, None, server(2), 2, "It keeps its limit of 2; the registration sets no other one."),
        (UNSTATED, None, server(None), None, "It was registered without a limit before, and keeps none."),
        (
            SLOTS,
            None,
            server(None),
            None,
            "It was registered without a limit before, and keeps none. llama.cpp states 4 slots: set max_concurrency to 4 to use that.",
        ),
    ],
)
def test_the_registration_decides_then_the_record_then_the_engine(
    stated: Stated | None, wanted: int | None, existing: Server | None, limit: int | None, reason: str
) -> None:
    cap = cap_of(stated, wanted=wanted, existing=existing)
    assert (cap.limit, cap.reason) == (limit, reason)
