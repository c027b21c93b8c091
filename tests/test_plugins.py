"""Balancers, probes and stores by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from multiverse_gateway import Settings, SettingsError, WallLink, create_app, lifespan, plugins
from multiverse_gateway.balancers.round_robin import RoundRobin
from multiverse_gateway.probes.models import ModelsProbe
from multiverse_gateway.stores.memory import MemoryStore
from multiverse_gateway.testing.store import make_usage

SETTINGS = Settings(database_url="memory://")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package with plug-ins of which only one works."""
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[multiverse_gateway.balancers]\n"
        "plugged = plugged:create\n"
        "absent = plugged:nothing\n"
        "incomplete = plugged.absent:create\n"
        "no_callable = plugged:NAME\n"
        "[multiverse_gateway.stores]\n"
        "outdated = plugged:Outdated\n"
        "small = plugged:Small\n"
    )
    (tmp_path / "plugged.py").write_text(
        "from multiverse_gateway.stores.memory import MemoryStore\n"
        "NAME = 'x'\n"
        "class Last:\n"
        "    def __init__(self, settings):\n"
        "        self.port = settings.port\n"
        "    def pick(self, servers, load, request):\n"
        "        return servers[-1]\n"
        "create = Last\n"
        "class Outdated:\n"
        "    def __init__(self, settings):\n"
        "        self._inner = MemoryStore()\n"
        "    def __getattr__(self, name):\n"
        "        if name in ('requests_on', 'close_session'):\n"
        "            raise AttributeError(name)\n"
        "        return getattr(self._inner, name)\n"
        "class Small(Outdated):\n"
        "    def __getattr__(self, name):\n"
        "        if name in ('open_session', 'close_session', 'save_wall_link', 'remove_wall_link', 'add_usage', 'usage', 'requests_on'):\n"
        "            raise AttributeError(name)\n"
        "        return getattr(self._inner, name)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_what_the_settings_name_is_made() -> None:
    assert isinstance(plugins.balancer(SETTINGS), RoundRobin)
    assert isinstance(plugins.probe(SETTINGS), ModelsProbe)
    assert isinstance(plugins.store(SETTINGS), MemoryStore)


@pytest.mark.usefixtures("installed")
def test_another_package_offers_its_own() -> None:
    """It gets the settings."""
    assert "plugged" in plugins.available("balancers")
    assert "round_robin" in plugins.available("balancers")
    assert plugins.load("balancers", "plugged", Settings(port=81)).port == 81


@pytest.mark.usefixtures("installed")
def test_one_that_was_written_for_an_older_version_is_refused_at_the_start() -> None:
    """With what it lacks and whose it is, and not by an error when that is first asked for."""
    with pytest.raises(SettingsError, match=r"outdated.*close_session, requests_on.*plugged"):
        plugins.store(Settings(database_url="outdated://here"))


@pytest.mark.usefixtures("installed")
async def test_a_store_may_leave_sessions_and_counts_of_use_to_the_memory_of_the_process() -> None:
    """It works by its name, and as an instance that an application passes."""
    stores = [plugins.store(Settings(database_url="small://here")), plugins.completed(plugins.load("stores", "small", SETTINGS))]
    for store in stores:
        await store.add_usage("first", [make_usage("2026-05-01")])
        assert await store.requests_on("2026-05-01") == {"id of alice": 1}
        await store.open_session("ab" * 32, 1e10)
        assert (await store.load()).sessions == {"ab" * 32: 1e10}
        before = await store.version()
        link = WallLink(id="one", name="Hall", digest="ab" * 32, created_at=1.0)
        await store.save_wall_link(link)
        assert (await store.load()).wall_links == (link,)
        assert await store.remove_wall_link("one")
        assert not await store.remove_wall_link("one")
        assert await store.version() > before
    app = create_app(SETTINGS, store=plugins.load("stores", "small", SETTINGS))
    async with lifespan(app):
        assert await app.state.gateway.store.usage("2026-05-01", "2026-05-02") == ()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["absent", "incomplete", "no_callable"])
def test_a_broken_one_is_told_with_its_package(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name}.*plugged"):
        plugins.load("balancers", name, SETTINGS)


@pytest.mark.parametrize("kind", ["balancers", "probes", "stores"])
def test_an_unknown_name_lists_what_there_is(kind: str) -> None:
    with pytest.raises(SettingsError, match=plugins.available(kind)[0]) as error:
        plugins.load(kind, "nonesuch", SETTINGS)
    assert "nonesuch" in str(error.value)


def test_a_database_of_an_unknown_kind_lists_what_there_is() -> None:
    with pytest.raises(SettingsError, match="mysql"):
        plugins.store(Settings(database_url="mysql://host/database"))
