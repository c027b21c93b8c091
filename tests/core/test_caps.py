"""Which cap a registration gives a server, from answers as the real engines send them."""

from __future__ import annotations

from typing import Any

import pytest

from multiverse_gateway.core.caps import OLLAMA, UNSTATED, VLLM, Stated, cap_of, owner_of, stated_by
from multiverse_gateway.core.engine_facts import Question, read_engine
from multiverse_gateway.core.servers import MAX_CONCURRENCY, Server, ServerId

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


def stated(path: str, answer: object) -> Stated:
    """Return what an answer states; `/props` is asked with the name of a model."""
    return stated_by(read_engine({Question(path): answer}))


@pytest.mark.parametrize(("path", "answer", "limit"), ANSWERS)
def test_engines_state_their_limit_each_in_its_own_way(path: str, answer: Any, limit: int | None) -> None:
    assert stated(path, answer).limit == limit


@pytest.mark.parametrize("number", [True, False, 0, -1, 4.0, "4", None, [4], {}])
def test_only_a_whole_number_from_one_is_a_limit(number: object) -> None:
    for path, name in (("/props", "total_slots"), ("/server_info", "max_running_requests"), ("/info", "max_concurrent_requests")):
        assert stated(path, {name: number}) == UNSTATED


def test_a_limit_is_never_larger_than_one_that_can_be_registered() -> None:
    assert stated("/info", {"max_concurrent_requests": 1000000}) == Stated(MAX_CONCURRENCY, "TGI states that it takes at most 4096 at once")


def test_the_fact_names_the_engine() -> None:
    assert stated("/props", {"total_slots": 1}).fact == "llama.cpp states 1 slot"
    assert stated("/server_info", {"max_running_requests": 2}).fact == "SGLang states that it runs at most 2 at once"
    assert (
        stated("/info", {"max_concurrent_requests": 2, "model_type": {"embedding": {}}}).fact
        == "TEI states that it takes at most 2 at once"
    )
    assert stated("/api/version", {"version": "0.12.5"}) == OLLAMA


def test_the_list_of_models_names_its_engine() -> None:
    entries: list[object] = [{"id": "other", "owned_by": "me"}, "text", {"id": "tiny:latest", "owned_by": "library"}]
    assert owner_of(entries, "tiny") == "library"
    assert owner_of(entries, "unlisted") == "me"
    assert owner_of([{"id": "tiny", "owned_by": 5}], "tiny") == ""
    assert owner_of([], "tiny") == ""
    assert len(owner_of([{"id": "tiny", "owned_by": "x" * 1000}], "tiny")) == 64
    assert stated("/v1/models", {"data": [{"id": "m", "owned_by": "vllm"}]}) == VLLM
    assert stated("/v1/models", {"data": [{"id": "m", "owned_by": "me"}]}) == UNSTATED
    assert stated("/v1/models", {"data": None}) == UNSTATED


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
