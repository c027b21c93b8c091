"""What the first lines of `run` say about other computers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from multiverse_gateway.cli.serving import Serving, reach_lines
from multiverse_gateway.dialing import Network
from multiverse_gateway.settings import Settings

TLS = (Path("chain.pem"), Path("key.pem"))


@pytest.mark.parametrize(
    ("listener", "hosts", "tls", "expected"),
    [
        ("127.0.0.1", ("10.1.2.3",), None, "nothing yet: only this computer can reach it; --host 0.0.0.0 opens it to your network"),
        ("0.0.0.0", ("10.1.2.3", "fd00::7"), None, "base_url=http://10.1.2.3:8000/v1"),
        ("0.0.0.0", ("10.1.2.3",), TLS, "base_url=https://10.1.2.3:8000/v1"),
        ("::", ("fd00::7",), None, "base_url=http://[fd00::7]:8000/v1"),
        ("192.168.1.20", ("10.1.2.3",), None, "base_url=http://192.168.1.20:8000/v1"),
        ("0.0.0.0", (), None, None),
    ],
)
def test_they_name_an_address_that_others_can_use(
    listener: str, hosts: tuple[str, ...], tls: tuple[Path, Path] | None, expected: str | None
) -> None:
    """Or how to open the gateway; in a container, whose address nobody can use, they say nothing."""
    settings = Settings()
    network = Network(settings)
    network.listen_on(listener)
    network.network_hosts = hosts
    with socket.socket() as sock:
        lines = reach_lines(Serving(settings, sock, tls=tls), network)
    assert lines == ([] if expected is None else [("for others", expected)])


def test_behind_a_proxy_they_say_nothing() -> None:
    network = Network(Settings(trusted_proxies=("127.0.0.1/32",)))
    network.listen_on("127.0.0.1")
    with socket.socket() as sock:
        assert reach_lines(Serving(Settings(), sock), network) == []
