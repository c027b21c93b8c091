"""The core journey in the engines of Firefox and Safari."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from browser.conftest import SETTINGS
from browser.engines import Engine, Firefox, firefox, until, webkit
from browser.test_answers import PAYLOADS, SAFE, told
from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess

pytestmark = pytest.mark.e2e


def fill(engine: Engine, field: str, text: str) -> None:
    """Write into a field as a person does: the page hears of it."""
    engine.run(
        f"const field = document.getElementById({json.dumps(field)}); field.focus(); field.value = {json.dumps(text)};"
        'for (const name of ["input", "change"]) field.dispatchEvent(new Event(name, {bubbles: true}));'
    )


def press(engine: Engine, words: str, within: str = "body") -> None:
    """Press the button or link with these words."""
    places, words = json.dumps(f"{within} :is(button, a)"), json.dumps(words)
    until(
        engine,
        f"const found = [...document.querySelectorAll({places})].find((item) => item.textContent.trim() === {words});"
        "if (!found?.checkVisibility()) return false; found.click(); return true;",
    )


def see(engine: Engine, words: str, within: str = "body") -> None:
    """Wait until the page shows these words."""
    until(
        engine,
        f"return [...document.querySelectorAll({json.dumps(within)})].some((place) => place.innerText.includes({json.dumps(words)}));",
    )


@pytest.mark.parametrize("start", [firefox, webkit], ids=["firefox", "webkit"])
def test_the_core_journey(start: Callable[[Path], AbstractContextManager[Engine]], tmp_path: Path) -> None:
    """Sign in, register by the wizard, lose the server, see that by itself, talk, get a hostile answer, change, remove; keys."""
    erin = Backend("erin", behaviours.good(events=20, interval=0.05), models=["one-model"])
    with erin, GatewayProcess(SETTINGS) as gateway, start(tmp_path) as engine:
        engine.open(f"{gateway.url}/register")
        fill(engine, "key", gateway.admin_key)
        press(engine, "Sign in", "main")
        see(engine, "Server address")

        fill(engine, "endpoint_url", f"{erin.url}/v1/chat/completions")
        see(engine, f"It will be saved as {erin.url}.")
        press(engine, "Test connection")
        see(engine, "one-model answers.")
        until(engine, "return document.getElementById('model_name').value === 'one-model';")
        press(engine, "Register", "form")
        see(engine, "one-model is registered")

        engine.open(f"{gateway.url}/dashboard")
        see(engine, "Healthy", "tr[data-row]")
        erin.behave_models = behaviours.status(500)
        see(engine, "status 500", "tr[data-row]")
        erin.behave_models = behaviours.list_models
        press(engine, "one-model", "tr[data-row]")
        press(engine, "Check now")
        see(engine, "The check passed", "#toasts")

        press(engine, "Open in playground")
        see(engine, "Start a conversation.")
        fill(engine, "prompt", "Hello")
        press(engine, "Send")
        assert len(lengths(engine)) > 4
        see(engine, "tokens/s", ".measures")
        erin.behave = told("\n\n".join(["**An answer**.", *PAYLOADS]))
        press(engine, "Regenerate")
        see(engine, "An answer.", ".assistant .text")
        see(engine, "in all", ".assistant .measures")
        assert engine.run(f"return ({SAFE})();") == []
        assert engine.run("return window.hacked ?? null;") is None

        press(engine, "Dashboard", "nav")
        press(engine, "one-model", "tr[data-row]")
        press(engine, "Edit")
        see(engine, "Save changes")
        fill(engine, "student_id", "erin")
        press(engine, "Save changes")
        press(engine, "Save", "dialog[open]")
        see(engine, "Saved: Owner.")
        press(engine, "Delete", ".heading")
        press(engine, "Delete", "dialog[open]")
        see(engine, "one-model was removed.")
        see(engine, "Add your first model")

        engine.open(f"{gateway.url}/keys")
        fill(engine, "names", "李明")
        press(engine, "Create")
        see(engine, "The key of 李明")
        assert str(engine.run("return document.getElementById('made-key').textContent;")).startswith("mvg-client-")
        engine.run("location.reload();")
        see(engine, "New keys are shown only once")
        press(engine, "Details of the key")
        press(engine, "Revoke", ".heading")
        press(engine, "Revoke", "dialog[open]")
        see(engine, "The key of 李明 is revoked.")
        if isinstance(engine, Firefox):
            assert engine.troubles == []


def lengths(engine: Engine) -> set[int]:
    """Watch an answer grow, and return how long it was at each look."""
    seen: set[int] = set()
    until = time.monotonic() + 60
    while not engine.run("return document.querySelector('.assistant .measures')?.textContent ?? '';"):
        seen.add(engine.run("return document.querySelector('.assistant .text')?.textContent.length ?? 0;"))
        assert time.monotonic() < until
    return seen
