"""Measure what the gateway costs, beside nginx and whatever else is installed, in interleaved rounds on one machine.

    nox -s bench                                     all figures, five rounds (about half an hour)
    nox -s bench -- --quick                          one short round
    nox -s bench -- --only nginx,gateway --tests plain,stream --rounds 5

Gateways run on the first core, load and model server on the last one. The figure to trust is the processor time (user and system) of
a gateway's process tree per request or chunk, as a ratio to nginx in the same run: throughput and latency wander with whatever else
the machine does. Needs Linux; nginx and wrk (Debian packages of those names), h2load (nghttp2-client) for HTTP/2.

Other gateways are measured too where they are found: haproxy on the path, and vllm-router, sglang-router and litellm in virtual
environments of these names below ~/.cache/multiverse-bench (or $BENCH_PEERS), made for example by

    python -m venv ~/.cache/multiverse-bench/vllm-router && ~/.cache/multiverse-bench/vllm-router/bin/pip install vllm-router
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from benchmarks.speed import candidates, machine, report
from benchmarks.speed.candidates import Candidate, pinned

from support.processes import GatewayProcess
from support.sockets import free_port

ROOT = Path(__file__).resolve().parents[2]
LUA = Path(__file__).with_name("post.lua")
PLAIN_CLIENTS = 64
STREAMS = 100
IDLE_STREAMS, STALLED_STREAMS = 1000, 200
SUCCEEDED = re.compile(r"(\d+) succeeded")
Result = dict[str, object]


@attrs.frozen(kw_only=True)
class Bench:
    """How long to measure, and where the load comes from."""

    seconds: float
    core: int | None
    directory: Path

    def run(self, command: list[str], *, env: dict[str, str] | None = None) -> str:
        line = [*pinned(self.core), *command]
        result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(env or {})}, timeout=300)
        if result.returncode:
            raise RuntimeError(f"{command[0]} failed: {(result.stdout + result.stderr)[-500:]}")
        return result.stdout

    def body(self, size: int, **fields: object) -> Path:
        """Write a request of about so many bytes."""
        data = {"model": "model", **fields, "messages": [{"role": "user", "content": ""}]}
        data["messages"] = [{"role": "user", "content": ('lorem ipsum "dolor" é ' * (size // 20 + 1))[: max(0, size - 400)]}]
        path = self.directory / f"body-{size}-{len(fields)}.json"
        path.write_text(json.dumps(data))
        return path

    def wrk(self, candidate: Candidate, body: Path, clients: int) -> Result:
        url = f"http://127.0.0.1:{candidate.port}/v1/chat/completions"
        command = ["wrk", "-t1", f"-c{clients}", f"-d{self.seconds:g}s", "--timeout", "20s", "-s", str(LUA), url]
        said = self.run(command, env={"BENCH_BODY": str(body), "BENCH_HEADERS": "\n".join(candidate.headers)})
        return dict(json.loads(said.splitlines()[-1]))

    def load(self, what: str, candidate: Candidate, *arguments: str) -> Result:
        headers = [argument for line in candidate.headers for argument in ("--header", line)]
        said = self.run([sys.executable, "-m", "benchmarks.speed.load", what, "--port", str(candidate.port), *arguments, *headers])
        return dict(json.loads(said.splitlines()[-1]))

    def h2load(self, candidate: Candidate, body: Path, *arguments: str) -> int:
        """Return how many requests were answered well."""
        url = f"http://127.0.0.1:{candidate.port}/v1/chat/completions"
        said = self.run(["h2load", "-d", str(body), "-H", "content-type: application/json", *arguments, url])
        found = SUCCEEDED.search(said)
        return int(found[1]) if found else 0


# The tests: each measures one candidate once


def plain(bench: Bench, candidate: Candidate) -> Result:
    body = bench.body(1000)
    if not candidate.http2:
        return bench.wrk(candidate, body, PLAIN_CLIENTS)
    began = time.monotonic()
    done = bench.h2load(candidate, body, "-c", str(PLAIN_CLIENTS), "-m1", "-D", f"{bench.seconds:g}")
    return {"done": done, "seconds": time.monotonic() - began}


def stream(bench: Bench, candidate: Candidate) -> Result:
    if not candidate.http2:
        arguments = ("--model", "model-20ms", "--clients", str(STREAMS), "--seconds", str(bench.seconds))
        return bench.load("streams", candidate, *arguments)
    body = bench.body(1000, model="model-20ms", stream=True)
    count = STREAMS * max(1, round(bench.seconds / 1.3))
    done = bench.h2load(candidate, body, "-c", str(STREAMS), "-m1", "-n", str(count))
    return {"done": 64 * done, "streams": done, "errors": count - done}


def latency(bench: Bench, candidate: Candidate) -> Result:
    return bench.load("open", candidate, "--model", "model", "--rate", "100", "--seconds", str(bench.seconds))


def prompt_100k(bench: Bench, candidate: Candidate) -> Result:
    return bench.wrk(candidate, bench.body(100 * 1024), 16)


def prompt_5m(bench: Bench, candidate: Candidate) -> Result:
    return bench.wrk(candidate, bench.body(5 << 20), 4)


HELD = {"stalled": ("model-flood", STALLED_STREAMS), "idle": ("model-idle", IDLE_STREAMS)}
"""Kinds of streams whose memory is measured: the model that sends them, and how many there are."""


def memory(bench: Bench, candidate: Candidate, kind: str) -> Result:
    """Measure a fresh process at rest, and for each stream of a kind; bytes."""
    assert candidate.pid is not None
    model, count = HELD[kind]
    rest = settled_memory(candidate.pid)
    with held(bench, candidate, model, count, stalled=kind == "stalled"):
        return {"rest": rest, kind: (settled_memory(candidate.pid) - rest) / count}


def memory_of_each(bench: Bench, names: list[str], count: int, gateway_core: int | None) -> dict[str, list[Result]]:
    """Measure each candidate's memory in processes that did nothing before: what was freed is used again."""
    starts = candidates.available(gateway_core)
    results: dict[str, list[Result]] = {}
    port = free_port()
    with backend_on(port, bench.core):
        for name in [name for name in names if name != "direct" and not name.endswith("-h2")] * min(count, 3):
            for kind in HELD:
                with starts[name](port) as candidate:
                    result = memory(bench, candidate, kind)
                results.setdefault(name, []).append(result)
                print(f"memory {name} {result}", file=sys.stderr, flush=True)
    return results


def settled_memory(pid: int) -> int:
    """Return the memory of a process tree when it has not changed for three seconds, or after a minute."""
    before, calm = machine.memory_bytes(pid), 0
    for _ in range(120):
        time.sleep(0.5)
        now = machine.memory_bytes(pid)
        calm = calm + 1 if abs(now - before) <= before / 200 else 0
        if calm == 6:
            break
        before = now
    return before


@contextlib.contextmanager
def held(bench: Bench, candidate: Candidate, model: str, count: int, *, stalled: bool) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.speed.load", "hold", "--port", str(candidate.port), "--model", model]
    headers = [argument for line in candidate.headers for argument in ("--header", line)]
    command += ["--clients", str(count), *headers, *(["--stalled"] if stalled else [])]
    process = subprocess.Popen([*pinned(bench.core), *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "held\n":
            raise RuntimeError("the streams did not begin")
        yield
    finally:
        process.kill()
        process.communicate()


Test = Callable[[Bench, Candidate], Result]
TESTS: dict[str, Test] = {
    "plain": plain,
    "stream": stream,
    "latency": latency,
    "100k": prompt_100k,
    "5m": prompt_5m,
}
ONLY_HTTP1 = frozenset({"latency", "100k", "5m"})
"""Tests whose load speaks HTTP/1.1 only."""
ALONE = ("memory", "start")
"""Tests that need fresh processes, and come last."""


def start_up(core: int | None, rounds: int) -> dict[str, list[Result]]:
    """Measure our own start: until the first request is answered, of a server that was registered before, and `--help`."""
    results: list[Result] = []
    port = free_port()
    with backend_on(port, None), GatewayProcess({}, prefix=pinned(core)) as gateway:
        gateway.register("model", f"http://127.0.0.1:{port}")
        for _ in range(rounds + 1):  # the first one also writes the byte code
            gateway.stop()
            began = time.monotonic()
            gateway.launch()
            while not answers(gateway):
                time.sleep(0.005)
            first = time.monotonic() - began
            began = time.monotonic()
            subprocess.run([*pinned(core), sys.executable, "-m", "multiverse_gateway", "--help"], stdout=subprocess.DEVNULL, check=True)
            results.append({"first_request": first, "help": time.monotonic() - began})
    return {"gateway": results[1:]}


def answers(gateway: GatewayProcess) -> bool:
    try:
        return gateway.chat("model").status_code == 200
    except Exception:  # noqa: BLE001  not yet
        return False


@contextlib.contextmanager
def backend_on(port: int, core: int | None) -> Iterator[None]:
    process = candidates.start_backend(port, core)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(bench: Bench, test: str, candidate: Candidate) -> Result:
    """Run one test, and note the processor time per unit of work."""
    settle(candidate)
    before = machine.cpu_seconds(candidate.pid) if candidate.pid is not None else 0.0
    result = TESTS[test](bench, candidate)
    if candidate.pid is not None and result.get("done"):
        spent = machine.cpu_seconds(candidate.pid) - before
        result["cpu_us"] = round(spent * 1e6 / float(str(result["done"])), 2)
    result["load"] = os.getloadavg()[0]
    return result


def settle(candidate: Candidate) -> None:
    """Wait until a candidate has finished what it was asked before."""
    for _ in range(50):
        if candidate.pid is None:
            return
        before = machine.cpu_seconds(candidate.pid)
        time.sleep(0.3)
        if machine.cpu_seconds(candidate.pid) - before <= 0.02:
            return


def rounds(bench: Bench, names: list[str], tests: list[str], count: int, gateway_core: int | None) -> report.Results:
    """Measure all candidates by all tests, in turn, the order turned round each time."""
    results: report.Results = {}
    starts = candidates.available(gateway_core)
    port = free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend_on(port, bench.core))
        running = {}
        for name in names:
            print(f"starting {name}", file=sys.stderr, flush=True)
            running[name] = stack.enter_context(starts[name](port))
        quick = attrs.evolve(bench, seconds=1.0)
        for candidate in running.values():
            plain(quick, candidate)  # warm
        for number in range(count):
            for test in tests:
                for name in names if number % 2 == 0 else reversed(names):
                    candidate = running[name]
                    if candidate.http2 and test in ONLY_HTTP1:
                        continue
                    result = measure(bench, test, candidate)
                    results.setdefault(test, {}).setdefault(name, []).append(result)
                    print(f"round {number + 1}: {test} {name} {result}", file=sys.stderr, flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="candidates, with commas between them; all that are installed")
    parser.add_argument("--tests", help=f"of {', '.join([*TESTS, *ALONE])}; all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--quick", action="store_true", help="one round of two seconds each")
    parser.add_argument("--json", type=Path, help="also write everything measured into this file")
    given = parser.parse_args()
    if sys.platform != "linux" or shutil.which("wrk") is None:
        parser.error("this needs Linux and wrk (apt-get install nginx-light wrk nghttp2-client)")
    cores = sorted(os.sched_getaffinity(0))
    gateway_core, load_core = (cores[0], cores[-1]) if len(cores) > 1 and shutil.which("taskset") else (None, None)
    starts = candidates.available(gateway_core)
    if shutil.which("h2load") is None:
        starts = {name: start for name, start in starts.items() if not name.endswith("-h2")}
    names = given.only.split(",") if given.only else list(starts)
    every = [*TESTS, *ALONE]
    tests = given.tests.split(",") if given.tests else every
    unknown = [name for name in names if name not in starts] + [test for test in tests if test not in every]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)} here; candidates: {', '.join(starts)}; tests: {', '.join(every)}")
    count, seconds = (1, 2.0) if given.quick else (given.rounds, given.seconds)
    about = machine.description()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        bench = Bench(seconds=seconds, core=load_core, directory=Path(directory))
        wanted = [test for test in tests if test in TESTS]
        results = rounds(bench, names, wanted, count, gateway_core) if wanted else {}
        if "memory" in tests:
            results["memory"] = memory_of_each(bench, names, count, gateway_core)
        if "start" in tests:
            results["start"] = start_up(gateway_core, count)
    if given.json:
        given.json.write_text(json.dumps({"about": about, "results": results}, indent=1))
    print(report.page(about, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
