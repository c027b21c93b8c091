"""The engines of Firefox and Safari, driven by what each of them speaks itself: no driver from elsewhere is needed.

Both run a script in the page and hand back what it returns; that is all the journey asks for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx2
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Ping, Request, TextMessage

from support.processes import Child
from support.require import leave_out, require_program
from support.sockets import free_port, wait_until

START_SECONDS = 60.0
ANSWER_SECONDS = 60.0


class Engine(Protocol):
    """A browser with one window."""

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        ...

    def run(self, script: str) -> Any:
        """Run the body of a function in the page and return what it returns."""
        ...


def until(engine: Engine, script: str, within: float = 60.0) -> Any:
    """Run a script on a page that has loaded until it returns something true, and return that."""
    ends = time.monotonic() + within
    while True:
        found = engine.run(f"if (document.readyState !== 'complete' || !window.htmx) return false; {script}")
        if found:
            return found
        assert time.monotonic() < ends, f"not within {within:g} s: {script}\n{engine.run('return document.body.innerText')}"
        time.sleep(0.05)


# Firefox: WebDriver BiDi over a WebSocket


class Firefox:
    """A Firefox that listens for WebDriver BiDi on a port."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS)
        self._ws = WSConnection(ConnectionType.CLIENT)
        self._number = 0
        self._send(Request(host=f"127.0.0.1:{port}", target="/session"))
        while not isinstance(self._next(), AcceptConnection):
            pass
        self._call("session.new", {"capabilities": {}})
        self._context = self._call("browsingContext.getTree", {})["contexts"][0]["context"]
        self.troubles: list[str] = []
        self._call("session.subscribe", {"events": ["log.entryAdded"]})

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self._call("browsingContext.navigate", {"context": self._context, "url": url, "wait": "complete"})

    def run(self, script: str) -> Any:
        """Run the body of a function in the page and return what it returns."""
        expression = f"JSON.stringify((() => {{ {script} }})() ?? null)"
        found = self._call("script.evaluate", {"expression": expression, "target": {"context": self._context}, "awaitPromise": False})
        assert found["type"] == "success", found
        return json.loads(found["result"]["value"])

    def close(self) -> None:
        """Leave."""
        with self._socket, contextlib.suppress(OSError):
            self._call("browser.close", {})

    def _call(self, method: str, parameters: Mapping[str, Any]) -> Any:
        self._number += 1
        self._send(TextMessage(data=json.dumps({"id": self._number, "method": method, "params": parameters})))
        text = ""
        while True:
            event = self._next()
            if not isinstance(event, TextMessage):
                continue
            text += event.data
            if not event.message_finished:
                continue
            answer, text = json.loads(text), ""
            if answer.get("method") == "log.entryAdded" and answer["params"]["level"] == "error":
                self.troubles.append(str(answer["params"]["text"]))
            if answer.get("id") == self._number:
                assert answer["type"] == "success", answer
                return answer["result"]

    def _next(self) -> Any:
        while True:
            for event in self._ws.events():
                if isinstance(event, Ping):
                    self._send(event.response())
                    continue
                return event
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("Firefox closed the connection")
            self._ws.receive_data(data)

    def _send(self, event: Any) -> None:
        self._socket.sendall(self._ws.send(event))


@contextmanager
def firefox(directory: Path) -> Iterator[Firefox]:
    """Run Debian's Firefox in a new profile."""
    path = require_program("firefox-esr", "the journey in Firefox")
    port = free_port()
    profile = directory / "profile"
    profile.mkdir()
    command = [path, "--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", str(port), "about:blank"]
    child = Child(command, log=directory / "firefox.log", env={**os.environ, "HOME": str(directory), "MOZ_DISABLE_CONTENT_SANDBOX": "1"})
    child.launch()
    try:
        wait_until(lambda: "BiDi listening" in child.log_text(), within=START_SECONDS, what=child.log_tail())
        with contextlib.closing(Firefox(port)) as engine:
            yield engine
    finally:
        child.kill()


# Safari's engine: WebKitGTK, by the WebDriver protocol, on an X server without a screen


class WebKit:
    """A WebKitGTK browser behind its WebDriver."""

    def __init__(self, port: int, browser: str) -> None:
        self._http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_SECONDS, trust_env=False)
        options = {"binary": browser, "args": ["--automation"]}
        made = self._post("/session", {"capabilities": {"alwaysMatch": {"webkitgtk:browserOptions": options}}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self._post(f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run the body of a function in the page and return what it returns."""
        return self._post(f"{self._session}/execute/sync", {"script": script, "args": []})

    def close(self) -> None:
        """Leave."""
        self._http.delete(self._session)
        self._http.close()

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        answer = self._http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]


@contextmanager
def webkit(directory: Path) -> Iterator[WebKit]:
    """Run Debian's WebKitGTK."""
    driver = require_program("WebKitWebDriver", "the journey in WebKit")
    browser = next(iter(sorted(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"), reverse=True)), None)
    if browser is None:
        leave_out("program MiniBrowser of webkit2gtk-driver is missing: the journey in WebKit")
    port = free_port()
    with screen(directory) as display:
        env = {**os.environ, "DISPLAY": display, "HOME": str(directory), "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1"}
        child = Child([driver, f"--port={port}"], log=directory / "webkit.log", env=env)
        child.launch()
        try:
            wait_until(lambda: is_listening(port), within=START_SECONDS)
            with contextlib.closing(WebKit(port, str(browser))) as engine:
                yield engine
        finally:
            child.kill()


def is_listening(port: int) -> bool:
    """Return whether a request waits."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def screen(directory: Path) -> Iterator[str]:
    """Run an X server that shows nothing, and return its display."""
    path = require_program("Xvfb", "a browser that wants a screen")
    read, write = os.pipe()
    child = subprocess.Popen(
        [path, "-displayfd", str(write), "-screen", "0", "1280x900x24", "-nolisten", "tcp"],
        pass_fds=[write],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    try:
        with os.fdopen(read) as said:
            number = said.readline().strip()
        assert number, "Xvfb did not start"
        yield f":{number}"
    finally:
        child.terminate()
        child.wait(10)
