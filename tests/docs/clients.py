"""Run the snippets of docs/how-to/use-a-model.md that are marked with a client, each in an environment of its own.

    python tests/docs/clients.py [--write]

Two real llama.cpp servers stand behind the gateway. Clients that have a program for it also read a stream that waits with comments.
`--write` puts the table of results into the documentation. Exit code 1: one failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import attrs

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.busy import check_program
from support.processes import GatewayProcess, LlamaServer, environment
from support.snippets import GATEWAY, MODEL, ROOT, Snippet, placed, snippets

PAGE = ROOT / "docs" / "how-to" / "use-a-model.md"
RESULTS = ROOT / "docs" / "how-to" / "clients.txt"
SECONDS = 300.0
PROGRAMS = ROOT / "tests" / "e2e" / "programs"
WAITING = {
    "openai==3.*": "waiting_openai.py",
    "openai==2.54.*": "waiting_openai.py",
    "openai==0.28.*": "waiting_openai_028.py",
    "npm openai": "waiting_openai.mjs",
    "langchain-openai": "waiting_langchain.py",
    "anthropic": "waiting_anthropic.py",
}
"""The programs that read a stream with comments, by package."""


@attrs.frozen
class Client:
    """A package and what it is to run."""

    package: str
    snippets: tuple[Snippet, ...]

    @property
    def name(self) -> str:
        """The package without its version."""
        return self.package.removeprefix("npm ").partition("=")[0]


def clients() -> list[Client]:
    """Return the packages that the page names, in its order."""
    found: dict[str, list[Snippet]] = {}
    for snippet in snippets(PAGE):
        if snippet.mark == "client":
            for package in snippet.words.split(","):
                found.setdefault(package.strip(), []).append(snippet)
    return [Client(package, tuple(those)) for package, those in found.items()]


def prepare(client: Client, home: Path) -> tuple[dict[str, str], str]:
    """Install the client; return the environment to run in, and the version that it has."""
    env = environment({"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config")})
    for name in [name for name in env if name.startswith(("OPENAI_", "PYTHON", "ANTHROPIC_"))]:
        del env[name]
    if client.package.startswith("npm "):
        run(["npm", "install", "--silent", "--no-fund", "--no-audit", client.name], home, env)
        found = run(["npm", "ls", "--parseable", "--long", client.name], home, env)
        return env, found.strip().rpartition("@")[2]
    run([sys.executable, "-m", "uv", "venv", "--quiet", "--seed", "venv"], home, env)
    run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", "venv/bin/python", client.package], home, env)
    env["PATH"] = f"{home / 'venv' / 'bin'}:{env['PATH']}"
    about = run(["venv/bin/python", "-m", "pip", "show", client.name], home, env)
    return env, about.partition("Version: ")[2].split()[0]


def run(command: list[str], home: Path, env: dict[str, str]) -> str:
    """Run a command; what it said goes into the error when it fails."""
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def read_comments(client: Client, gateway: GatewayProcess, home: Path, env: dict[str, str]) -> str:
    """Let a client read streams that wait with comments, if it has a program for that; return what came of it."""
    if client.package not in WAITING:
        return ""
    program = home / WAITING[client.package]
    program.write_text((PROGRAMS / program.name).read_text())  # beside the modules of npm
    runner = shutil.which("node" if program.suffix == ".mjs" else "python", path=env["PATH"])
    for kind in ([], ["async"], ["responses"]) if program.name == "waiting_openai.py" else ([],):
        try:
            check_program(gateway, "-".join(["waiting", home.name, *kind]), [str(runner), str(program), *kind], cwd=home, env=env)
        except AssertionError as error:
            raise RuntimeError(f"{client.package} does not read a stream with comments: {error}") from error
    return ", comments"


def use(client: Client, gateway: GatewayProcess) -> tuple[str, str]:
    """Install and run a client; return its version, and what came of it."""
    with tempfile.TemporaryDirectory(prefix="client-") as directory:
        home = Path(directory)
        env, version = prepare(client, home)
        for number, snippet in enumerate(client.snippets):
            text = placed(snippet.text, {GATEWAY: gateway.url})
            ending, program = {"python": ("py", "python"), "javascript": ("mjs", "node"), "bash": ("sh", "bash")}[snippet.language]
            file = home / f"snippet-{number}.{ending}"
            file.write_text(f"set -euo pipefail\n{text}" if ending == "sh" else text)
            said = run([program, str(file)], home, env)
            if not said.strip():
                raise RuntimeError(f"{snippet} printed nothing")
        count = len(client.snippets)
        return version, f"{count} of {count} snippets{read_comments(client, gateway, home, env)}"


def main() -> int:
    """Run all; return the exit code."""
    rows, failed = [], 0
    with LlamaServer(MODEL) as one, LlamaServer(MODEL) as two, GatewayProcess() as gateway:
        for llama in (one, two):
            gateway.register(MODEL, llama.url)
        for client in clients():
            began = time.monotonic()
            try:
                version, result = use(client, gateway)
            except RuntimeError as error:
                version, result = "", "failed"
                failed += 1
                print(error, file=sys.stderr)
            rows.append(f"| {client.package.partition('=')[0]} | {version} | {result} |")
            print(f"{rows[-1]}  {time.monotonic() - began:.1f} s", flush=True)
    if "--write" in sys.argv and not failed:
        table = ["| client | version | worked |", "|---|---|---|", *rows]
        RESULTS.write_text("\n".join(table) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.pop("VIRTUAL_ENV", None)
    sys.exit(main())
