"""The journey of `test_first_steps.py`: it needs a network in which the usual ports of the engines are free."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser.conftest import PHONE, Watched, cookies_of_an_operator
from browser.test_every_page import check
from multiverse_gateway.core.addresses import LOCALHOST_MEANS
from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess, LlamaServer
from support.sockets import wait_until

SIOCSIFFLAGS, IFF_UP, IFF_LOOPBACK = 0x8914, 0x1, 0x8
FIRST = {"ALLOW_PRIVATE_NETWORKS": None, "RATE_LIMIT_PER_MINUTE": None}
"""The settings of a first start, but for the admin key."""


@pytest.fixture(scope="module", autouse=True)
def loopback() -> None:
    """Bring up the loopback interface of the network, as `ip link set lo up` does."""
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP | IFF_LOOPBACK))


def test_the_journey(chromium: Any, browse_at: Callable[..., Watched], tmp_path: Path) -> None:
    """Ollama, LM Studio without a model and a real llama.cpp are found; two are offered and used; opening the gateway closes them."""
    with (
        GatewayProcess(FIRST, cwd=tmp_path) as gateway,
        Backend("ollama", behaviours.good(), models=["llama3.2:3b", "qwen3:4b"], port=11434) as ollama,
        Backend("lmstudio", models=[], port=1234),
        LlamaServer("tiny", port=8080) as llama,
    ):
        ollama.owned_by = "library"
        assert "for others       nothing yet: only this computer can reach it" in gateway.log_text()
        cookies = cookies_of_an_operator(chromium, gateway.url, gateway.admin_key)
        watched = browse_at(gateway.url, cookies)
        page = watched.page
        phone = browse_at(gateway.url, cookies, viewport=PHONE, has_touch=True)
        for path in ("/dashboard", "/register"):
            phone.open(path)
            check(phone, f"first-steps-{path[1:]}-phone")

        watched.open("/dashboard")
        page.get_by_role("heading", name="LM Studio runs on this computer, but has no model yet").wait_for()
        page.get_by_text("Only this computer can reach the gateway.").click()
        page.get_by_text("multiverse-gateway run --host 0.0.0.0 --allow-private-networks true").wait_for()
        page.get_by_role("tab", name="Ollama").press("ArrowRight")
        page.get_by_role("tabpanel", name="LM Studio").get_by_text("lms server start --port 1234").wait_for()

        found = page.get_by_role("region", name="Found Ollama on this computer, 2 models")
        found.get_by_label("Model").select_option("qwen3:4b")
        found.get_by_role("button", name="Offer this model").press("Enter")
        page.get_by_role("heading", name="qwen3:4b is registered").wait_for()
        assert gateway.chat("qwen3:4b").status_code == 200

        watched.open("/register")
        page.get_by_role("heading", name="Found Ollama on this computer, 1 model").wait_for()
        page.get_by_role("region", name="Found llama.cpp on this computer, 1 model").get_by_role("button").click()
        page.get_by_role("heading", name="tiny is registered").wait_for()
        assert gateway.chat("tiny").status_code == 200

        watched.open("/register")
        page.locator("#endpoint_url").fill("localhost:11434")
        page.get_by_text(LOCALHOST_MEANS).wait_for()
        assert page.locator("#endpoint_url[aria-invalid]").count() == 0
        refused = gateway.admin("POST", "/register", {"model_name": "llama3.2:3b", "endpoint_url": llama.url})
        assert refused.status_code == 400, refused.text

    proxied = {**FIRST, "TRUSTED_PROXIES": "127.0.0.1/32", "HEALTH_CHECK_INTERVAL_SECONDS": "1"}
    with GatewayProcess(proxied, cwd=tmp_path, port=gateway.port) as opened, Backend("ollama", models=["qwen3:4b"], port=11434) as ollama:
        wait_until(lambda: "ALLOW_PRIVATE_NETWORKS=127.0.0.1/32" in opened.admin("GET", "/servers").text, within=10)
        assert ollama.connections == 0
