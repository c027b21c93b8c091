"""The probe that asks for the list of models."""

from __future__ import annotations

import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway import Settings
from multiverse_gateway.probes import models
from multiverse_gateway.probes.models import ModelsProbe, judge
from multiverse_gateway.testing.probe import Answer, ProbeContract

LISTS = [
    ({"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]}, ("tiny", "other")),
    ({"models": [{"name": "tiny"}]}, ("tiny",)),
    ({"models": [{"model": "tiny"}], "data": [{"id": "tiny"}]}, ("tiny",)),
    ([{"id": "tiny"}], ("tiny",)),
    (["tiny"], ("tiny",)),
    ({"data": []}, ()),
    ({"object": "list", "data": None}, ()),
    ({"data": [1, None, {}, {"id": 5}, {"id": "x" * 300}, {"id": "tiny"}]}, ("x" * 256, "tiny")),
    ({"data": [{"id": str(number)} for number in range(2000)] + [{"id": "tiny"}]}, tuple(map(str, range(1000)))),
]


class TestModelsProbe(ProbeContract):
    """It keeps the contract."""

    @pytest.fixture
    def probe(self) -> ModelsProbe:
        """Return one."""
        return models.create(Settings())

    @pytest.fixture
    def good(self) -> Answer:
        """Return the answer of a good server."""

        def answer(request: httpx2.Request) -> httpx2.Response:
            assert (request.method, request.url.path) == ("GET", "/prefix/v1/models")
            return httpx2.Response(200, json={"data": [{"id": "tiny"}]})

        return answer


@pytest.mark.parametrize(("answer", "names"), LISTS)
def test_a_list_of_models_passes(answer: object, names: tuple[str, ...]) -> None:
    """As OpenAI, Ollama (null when it has none), or others write it; names are cut and counted."""
    finding = judge("tiny", 200, json.dumps(answer).encode())
    assert (finding.reason, finding.models) == (None, names)
    assert (finding.warning is None) == ("tiny" in names)


def test_a_model_that_is_not_listed_is_only_a_warning() -> None:
    """Many servers answer to any name."""
    finding = judge("tiny", 200, b'{"data": [{"id": "large"}]}')
    assert finding.reason is None
    assert "registered model" in (finding.warning or "")


@given(
    st.integers(200, 599),
    st.binary(max_size=200) | st.recursive(st.none() | st.text(), st.lists).map(lambda value: json.dumps(value).encode()),
)
def test_any_answer_is_judged(status: int, body: bytes) -> None:
    finding = judge("tiny", status, body)
    assert finding.reason is None or status != 200 or not finding.models


def test_a_list_that_only_the_fast_parser_rejects_passes() -> None:
    """Half of a surrogate pair or NaN somewhere in it; names with escapes stay what they are."""
    finding = judge("tiny", 200, rb'{"data": [{"id": "tiny", "score": NaN}, {"id": "\ud55c"}]}')
    assert (finding.reason, finding.models[0]) == (None, "tiny")
    assert judge("tiny", 200, rb'{"data": [{"id": "tiny"}, {"id": "\ud55c"}]}').models == ("tiny", "\ud55c")
