"""What is offered of the engines that were found on the gateway's own computer."""

from __future__ import annotations

import pytest

from multiverse_gateway.core.engine_offers import ENGINES, MAX_OFFERED, FoundEngine, Offer, found_engine, offers_of
from multiverse_gateway.testing.store import make_server

OLLAMA, STUDIO, LLAMA = ENGINES


@pytest.mark.parametrize(
    ("engine", "owned_by", "name"),
    [
        (OLLAMA, "library", "Ollama"),
        (OLLAMA, "", "Ollama"),
        (OLLAMA, None, "Ollama"),
        (STUDIO, "organization_owner", "LM Studio"),
        (STUDIO, "somebody", "LM Studio"),
        (LLAMA, "llamacpp", "llama.cpp"),
        (LLAMA, "vllm", "vLLM"),
        (LLAMA, "somebody", "a model server"),
    ],
)
def test_an_engine_is_called_by_what_it_says_or_by_its_port(engine: object, owned_by: str | None, name: str) -> None:
    """Port 8080 belongs to many programs, so its number alone proves nothing."""
    found = found_engine(engine, ["tiny"], owned_by)  # type: ignore[arg-type]
    assert found is not None
    assert (found.name, found.models) == (name, ("tiny",))


def test_another_gateway_is_no_engine() -> None:
    assert found_engine(LLAMA, ["tiny"], "multiverse-gateway") is None


def test_only_names_that_a_model_may_have_are_offered() -> None:
    """Each once, and not more than a menu can show."""
    found = found_engine(OLLAMA, ["a", "a", "", "two words", "<b>", "x" * 129, "ü", "b:1"], "library")
    assert found is not None
    assert found.models == ("a", "b:1")
    many = found_engine(OLLAMA, [f"m{number}" for number in range(1000)], "library")
    assert many is not None
    assert len(many.models) == MAX_OFFERED


def test_an_engine_whose_models_are_all_registered_offers_nothing() -> None:
    """One that has none says so; names that differ only in the tag that Ollama adds are one model."""
    full = FoundEngine(engine=OLLAMA, name="Ollama", models=("a:latest", "b"))
    empty = FoundEngine(engine=STUDIO, name="LM Studio", models=())
    servers = [make_server(name, model_name=name, endpoint_url=OLLAMA.url) for name in ("a", "b")]
    assert offers_of([full, empty], servers) == (Offer(engine=STUDIO, name="LM Studio", models=(), is_empty=True),)
    assert offers_of([full], servers[:1]) == (Offer(engine=OLLAMA, name="Ollama", models=("b",)),)
