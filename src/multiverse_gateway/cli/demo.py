"""The command `demo`: a gateway and two model servers, of which one dies."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click
import httpx2

from multiverse_gateway.admin_key import new_key
from multiverse_gateway.cli.run import bind
from multiverse_gateway.cli.scripted_server import MODEL
from multiverse_gateway.settings import Settings

START_SECONDS = 30.0
CALL_SECONDS = 30.0
USUAL_PORT = 8000


@click.command("demo")
@click.option("--port", type=click.IntRange(0, 65_535), help="Port of the gateway; the default is 8000, or any free port if 8000 is taken.")
@click.option("--once", is_flag=True, help="Stop after the tour.")
def demo_command(port: int | None, once: bool) -> None:
    """Show the gateway at work: one of two model servers dies, and no client notices.

    Everything runs on this machine in a temporary directory, and is gone when you press Ctrl-C.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    with contextlib.ExitStack() as stack:
        try:
            Tour(stack, _free_port(port)).walk(stay=not once)
        except KeyboardInterrupt:
            click.echo("\nStopping.")
        except (httpx2.HTTPError, OSError) as error:
            raise click.ClickException(f"the demo stopped early: {str(error) or type(error).__name__}") from None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _free_port(wanted: int | None) -> int:
    with contextlib.suppress(OSError), bind("127.0.0.1", USUAL_PORT if wanted is None else wanted) as sock:
        return int(sock.getsockname()[1])
    if wanted is not None:
        raise click.ClickException(f"port {wanted} is taken; choose another one with --port")
    with bind("127.0.0.1", 0) as sock:
        return int(sock.getsockname()[1])


@attrs.define
class Tour:
    """What is shown, step by step."""

    stack: contextlib.ExitStack
    port: int
    key: str = attrs.field(factory=new_key, repr=False)
    servers: dict[str, subprocess.Popen[str]] = attrs.field(factory=dict)
    ids: dict[str, str] = attrs.field(factory=dict)

    @property
    def url(self) -> str:
        """The root URL of the gateway that the tour starts."""
        return f"http://127.0.0.1:{self.port}"

    def walk(self, *, stay: bool) -> None:
        """Go through all steps; with `stay`, wait for Ctrl-C at the end."""
        _step("Start two model servers and a gateway")
        urls = {name: self._start_server(name) for name in ("A", "B")}
        gateway = self._start_gateway()
        _say(f"server A   {urls['A']}", f"server B   {urls['B']}", f"gateway    {self.url}")

        _step(f"Register both servers for the model {MODEL}")
        for name, url in urls.items():
            self.ids[self._register(name, url)] = name
            _say(f"server {name} passed its probe and is registered")

        _step("Send a request")
        self._ask()

        _step("Stream an answer: each word is relayed as it arrives")
        answered = self._ask_streaming()

        _step(f"Server {answered} is killed, then send two more requests")
        self.servers[answered].kill()
        self.servers[answered].wait()
        asked = [self._ask() for _ in range(2)]
        if answered in asked:
            raise click.ClickException(f"server {answered} was killed and yet seemed to answer; please report this")
        _say(f"The client saw no error: server {asked[0]} took over.")

        if stay:
            self._show_how_to_use()
            code = gateway.wait()
            raise click.ClickException(f"the gateway ended with code {code}")
        click.echo("\nThat was the tour. Run `multiverse-gateway demo` without --once to try it yourself.")

    def _start_server(self, name: str) -> str:
        command = [sys.executable, "-m", "multiverse_gateway.cli.scripted_server", name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **_APART)  # noqa: S603  ourselves
        self.stack.callback(_end, process)
        self.servers[name] = process
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line.isdigit():
            raise click.ClickException(f"server {name} did not start")
        return f"http://127.0.0.1:{line}"

    def _start_gateway(self) -> subprocess.Popen[str]:
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="multiverse-demo-", ignore_cleanup_errors=True)))
        names = {field.name.upper() for field in attrs.fields(Settings)}
        env = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("MULTIVERSE_")}
        env |= {
            "MULTIVERSE_ADMIN_API_KEY": self.key,
            "MULTIVERSE_DATABASE_URL": f"sqlite:///{(directory / 'multiverse.db').as_posix()}",
            "MULTIVERSE_ALLOW_PRIVATE_NETWORKS": "true",
            "MULTIVERSE_RATE_LIMIT_PER_MINUTE": "0",
            "MULTIVERSE_SHUTDOWN_GRACE_SECONDS": "1",
        }
        command = [sys.executable, "-m", "multiverse_gateway", "run", "--port", str(self.port), "--stop-at-eof"]
        log = directory / "gateway.log"
        with log.open("w") as output:
            process = subprocess.Popen(  # noqa: S603  ourselves
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, env=env, cwd=directory, **_APART
            )
        self.stack.callback(_end, process)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"the gateway did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        return process

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=2, trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    def _register(self, name: str, url: str) -> str:
        body = {"model_name": MODEL, "endpoint_url": url, "metadata": {"student_id": f"demo-{name.lower()}"}}
        answer = httpx2.post(
            f"{self.url}/admin/register", json=body, headers={"x-api-key": self.key}, timeout=CALL_SECONDS, trust_env=False
        )
        if not answer.is_success:
            raise click.ClickException(f"server {name} was not registered (status {answer.status_code}): {answer.text[:300]}")
        return str(answer.json()["registration_id"])

    def _ask(self) -> str:
        begun = time.monotonic()
        with self._chat(stream=False) as answer:
            answer.read()
            text = answer.json()["choices"][0]["message"]["content"] if answer.is_success else answer.text[:300]
            name = self._answered(answer)
        _say(f"“{text}”", f"answered by server {name} in {1000 * (time.monotonic() - begun):.0f} ms, attempts: {_attempts(answer)}")
        return name

    def _ask_streaming(self) -> str:
        with self._chat(stream=True) as answer:
            if not answer.is_success:
                answer.read()
            name = self._answered(answer)
            click.echo("  “", nl=False)
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    click.echo(json.loads(line[6:])["choices"][0]["delta"].get("content", ""), nl=False)
                    sys.stdout.flush()
        click.echo("”")
        _say(f"answered by server {name}")
        return name

    @contextlib.contextmanager
    def _chat(self, *, stream: bool) -> Iterator[httpx2.Response]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Who are you?"}], "stream": stream}
        with (
            httpx2.Client(timeout=CALL_SECONDS, trust_env=False) as client,
            client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer,
        ):
            yield answer

    def _answered(self, answer: httpx2.Response) -> str:
        name = self.ids.get(answer.headers.get("x-gateway-server-id", ""))
        if not answer.is_success or name is None:
            raise click.ClickException(f"the gateway answered with status {answer.status_code}: {answer.text[:300]}")
        return name

    def _show_how_to_use(self) -> None:
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]})
        _step("Now you")
        click.echo(
            f"""  In a browser:  {self.url}/login
  Admin key:     {self.key}

  With curl:
    curl {self.url}/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{body}'

  With the openai library:
    from openai import OpenAI
    client = OpenAI(base_url="{self.url}/v1", api_key="any")
    answer = client.chat.completions.create(model="{MODEL}", messages=[{{"role": "user", "content": "Hello"}}])
    print(answer.choices[0].message.content)

Press Ctrl-C to stop everything."""
        )


_APART: dict[str, Any] = {} if sys.platform == "win32" else {"process_group": 0}
"""Ctrl-C reaches us only; the children are ended in order."""


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _attempts(answer: httpx2.Response) -> str:
    return str(answer.headers.get("x-multiverse-attempts", "1"))


def _step(title: str) -> None:
    click.echo(f"\n{click.style(title, bold=True)}")


def _say(*lines: str) -> None:
    for line in lines:
        click.echo(f"  {line}")
