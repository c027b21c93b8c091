"""What was read from engines, in words."""

from __future__ import annotations

import attrs

from multiverse_gateway.core.engine_facts import Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.servers import Capabilities
from multiverse_gateway.pages.engine_words import ENGINES, engine_facts
from multiverse_gateway.testing.store import make_server

SERVER = make_server(capabilities=Capabilities(context_length=4096))


def test_a_server_shows_its_engine_and_what_its_model_can_do() -> None:
    model = ModelFacts(
        name="tiny",
        is_loaded=True,
        context=8192,
        trained_context=131072,
        size=5_225_388_164,
        gpu_share=0.8,
        quantization="Q4_K_M",
        digest="500a",
        abilities=Abilities(chat=True, tools=True, vision=False),
    )
    measured = Measured(kind=EngineKind.OLLAMA, version="0.12.5", slots=1, model=model)
    assert engine_facts(SERVER, measured, cut_texts=2) == [
        ("Engine", "Ollama 0.12.5"),
        ("Engine's slots", "1 request at once"),
        ("Model in memory", "loaded, 80 % on the GPU"),
        ("Measured context", "8,192 tokens served (131,072 advertised); routing uses the registered 4,096"),
        ("Size", "5.2 GB, Q4_K_M"),
        ("Can do", "chat, tools"),
        ("Cannot do", "images"),
        ("Digest", "500a"),
        ("Cut texts", "2 long texts since the gateway started; a larger context would prevent that"),
    ]
    unloaded = attrs.evolve(measured, version=None, slots=None, model=ModelFacts(name="tiny", is_loaded=False))
    assert engine_facts(SERVER, unloaded) == [("Engine", "Ollama"), ("Model in memory", "not loaded; the next request loads it")]
    loaded = attrs.evolve(unloaded, model=ModelFacts(name="tiny", is_loaded=True))
    assert engine_facts(SERVER, loaded)[1] == ("Model in memory", "loaded")


def test_nothing_is_shown_of_what_was_not_read() -> None:
    assert engine_facts(SERVER, None) == ()
    assert engine_facts(SERVER, Measured(kind=EngineKind.OTHER)) == [("Engine", "not known")]
    assert set(ENGINES) == set(EngineKind)
