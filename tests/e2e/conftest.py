"""One impatient gateway for all tests that do not hurt it, and two real model servers."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import cache, partial
from pathlib import Path

import httpx2
import pytest

from e2e.deployment import IMPATIENT, Deployment, deployed, operator
from support.certificates import write_certificate
from support.processes import Door, GatewayProcess, LlamaServer, door_setting
from support.require import require


class TlsGateway(GatewayProcess):
    """A gateway that serves HTTPS under a certificate of its own."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Prepare."""
        super().__init__(IMPATIENT, args=["--certfile", str(certificate), "--keyfile", str(key)])
        self.trust = ssl.create_default_context(cafile=str(certificate))

    @property
    def url(self) -> str:
        """The root URL."""
        return super().url.replace("http://", "https://")

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            return httpx2.get(self.url + self.ready_path, timeout=2.0, trust_env=False, verify=self.trust).status_code == 200
        except httpx2.HTTPError:
            return False


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 and its key."""
    return write_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def gateways() -> Iterator[Callable[[Door], GatewayProcess]]:
    """Return the gateways that tests share, one behind each door; none is ever stopped, and each test uses a model of its own."""
    with ExitStack() as running:

        @cache
        def gateway(door: Door) -> GatewayProcess:
            return running.enter_context(GatewayProcess({**IMPATIENT, **door_setting(door)}))

        yield gateway


@pytest.fixture(scope="module")
def door(request: pytest.FixtureRequest) -> Door:
    """Return the door by which HTTP/1.1 is served: the usual one, unless a module runs by each of `DOORS`."""
    chosen: Door = getattr(request, "param", "direct")
    return chosen


@pytest.fixture(scope="module")
def gateway(gateways: Callable[[Door], GatewayProcess], door: Door) -> GatewayProcess:
    """Return the shared gateway of this door."""
    return gateways(door)


@pytest.fixture(scope="module")
def operating(gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    """Return a client of the shared gateway that has the admin key."""
    with operator(gateway) as made:
        yield made


@pytest.fixture
def deploy(gateway: GatewayProcess, operating: httpx2.Client) -> Iterator[Callable[..., Deployment]]:
    """Return a function that registers backends for a new model at the shared gateway."""
    with ExitStack() as open_deployments:
        enter: Callable[..., AbstractContextManager[Deployment]] = partial(deployed, gateway, operating)
        yield lambda *backends, **fields: open_deployments.enter_context(enter(*backends, **fields))


@pytest.fixture(scope="module")
def shared_deployment(gateway: GatewayProcess, operating: httpx2.Client) -> Iterator[Callable[..., Deployment]]:
    """Return the same for a whole module."""
    with ExitStack() as open_deployments:
        enter: Callable[..., AbstractContextManager[Deployment]] = partial(deployed, gateway, operating)
        yield lambda *backends, **fields: open_deployments.enter_context(enter(*backends, **fields))


@pytest.fixture(scope="session")
def needs_llama() -> None:
    """Leave out what needs a real model server where there is none."""
    for module in ("xllamacpp", "gguf", "numpy"):
        require(module, "a real llama.cpp server")


@pytest.fixture(scope="session")
def llamas(needs_llama: None) -> Iterator[tuple[LlamaServer, LlamaServer]]:
    """Return two real model servers that no test may hurt."""
    with LlamaServer("tiny") as one, LlamaServer("tiny") as two:
        yield one, two
