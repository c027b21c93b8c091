"""Keep several serving processes alive on one port.

1. A worker that ended is started again, later each time it ends early.
2. Workers that keep ending at once are a fault that restarts do not mend: all stop, and the exit code says so. While others have been
   serving for longer, restarts are tried again and again: what keeps a new worker from starting does not end those.
3. The parent stops a worker through its standard input: "." or its end means "finish", "!" means "now", and "r" that others serve
   already. It ends with the parent, too.
4. SIGUSR2 replaces all workers: new ones start from whatever is installed by then, and the old ones finish when all new ones serve.
   When one of the new ones does not come to serve, they are ended, and the old ones go on.
5. Once a worker has served there is a database. A later worker joins those that use it, and makes no new one if it is gone.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import BinaryIO

import anyio
import anyio.abc
import anyio.lowlevel
import attrs
import click

EARLY_SECONDS = 10.0
MAX_EARLY_EXITS = 4
FIRST_PAUSE = 0.25
LAST_PAUSE = 5.0
READY_SECONDS = 60.0
"""How long new workers may take until they serve."""
UNUSABLE = 2
"""Exit code of a worker whose settings cannot be used: all others have the same."""


@attrs.frozen
class EarlyExits:
    """The number of workers in a row that exited soon after their start."""

    in_a_row: int = 0

    def after(self, lived: float) -> "EarlyExits":
        """Count the exit of a worker that ran for `lived` seconds."""
        return EarlyExits(self.in_a_row + 1 if lived < EARLY_SECONDS else 0)

    @property
    def is_loop(self) -> bool:
        """Whether workers keep exiting early, so that restarting makes no sense."""
        return self.in_a_row >= MAX_EARLY_EXITS

    @property
    def pause(self) -> float:
        """Seconds until the next start."""
        return min(LAST_PAUSE, FIRST_PAUSE * 2.0 ** max(0, self.in_a_row - 1))


@attrs.define(eq=False)
class _Worker:
    """A process, and the end of a pipe on which it says that it serves."""

    process: anyio.abc.Process
    ready: BinaryIO

    async def serves(self) -> bool:
        """Wait until it serves; false when it ended before."""
        await anyio.wait_readable(self.ready)
        return self.ready.read(1) != b""


@attrs.define(eq=False)
class _Crew:
    """Workers that are kept alive together, until others take over."""

    running: dict[anyio.abc.Process, float] = attrs.field(factory=dict)
    """The processes, with the instants at which they began."""
    relieved: bool = False

    def lasts(self, now: float) -> bool:
        """Return whether one of them has been running for longer than workers that end early."""
        return any(now - begun >= EARLY_SECONDS for begun in self.running.values())


@attrs.define
class _Pool:
    command: Sequence[str]
    workers: int
    now: Callable[[], float]
    tasks: anyio.abc.TaskGroup
    crew: _Crew = attrs.field(factory=_Crew)
    early_exits: EarlyExits = EarlyExits()
    running: set[anyio.abc.Process] = attrs.field(factory=set)
    has_served: bool = False
    replacing: bool = False
    stopping: bool = False
    exit_code: int = 0

    def begin(self) -> None:
        """Start the first workers, and keep them alive."""
        for number in range(1, self.workers + 1):
            self.tasks.start_soon(self._keep, number, self.crew)

    def _is_over(self, crew: _Crew) -> bool:
        """Return whether workers are to end; the answer changes while anything is awaited."""
        return self.stopping or crew.relieved

    async def _keep(self, number: int, crew: _Crew, worker: _Worker | None = None) -> None:
        """Keep one worker alive until all stop, or others take over."""
        while not self._is_over(crew):
            begun = self.now()
            code = await self._run(crew, worker)
            worker = None
            if self.stopping:
                self.exit_code = self.exit_code or max(0, code)
            if self._is_over(crew):
                return
            self.early_exits = self.early_exits.after(self.now() - begun)
            if code == UNUSABLE or (self.early_exits.is_loop and not crew.lasts(self.now())):
                click.echo(
                    f"Worker {number} ended with code {code} right after its start, and others would do the same; the gateway stops.",
                    err=True,
                )
                self.exit_code = code if code == UNUSABLE else 1
                await self.stop()
                return
            click.echo(f"Worker {number} ended with code {code}; another one starts.", err=True)
            await anyio.sleep(self.early_exits.pause)

    async def _run(self, crew: _Crew, worker: _Worker | None) -> int:
        """Wait for the end of a worker, of a new one by default, and return its code."""
        try:
            if worker is None:
                worker = await self._start(crew)
                self.tasks.start_soon(self._note_ready, worker)
        except OSError as error:
            click.echo(f"A worker cannot be started: {error.strerror}.", err=True)
            return 1
        return await worker.process.wait()

    async def _note_ready(self, worker: _Worker) -> None:
        """Wait until a worker serves, or has ended."""
        if await worker.serves():
            self.has_served = True
        worker.ready.close()

    async def _start(self, crew: _Crew) -> _Worker:
        ready, ready_fd = os.pipe()
        try:
            command = [*self.command, *(["--join"] if self.has_served else []), "--ready-fd", str(ready_fd)]
            process = await anyio.open_process(command, stdin=subprocess.PIPE, stdout=None, stderr=None, pass_fds=[ready_fd])
        except OSError:
            os.close(ready)
            raise
        finally:
            os.close(ready_fd)
        self.running.add(process)
        crew.running[process] = self.now()
        self.tasks.start_soon(self._forget, process, crew)
        if self._is_over(crew):
            await self._send(process, b".")
        return _Worker(process, os.fdopen(ready, "rb", buffering=0))

    async def _forget(self, process: anyio.abc.Process, crew: _Crew) -> None:
        await process.wait()
        self.running.discard(process)
        crew.running.pop(process, None)

    async def replace(self) -> None:
        """Start new workers, and stop the old ones once all of the new ones serve."""
        if self.stopping or self.replacing:
            return
        self.replacing = True
        old, new = self.crew, _Crew()
        started: list[_Worker] = []
        serving = False
        with anyio.move_on_after(READY_SECONDS), suppress(OSError):  # no process can be made, as when Python itself is being renewed
            for _ in range(self.workers):
                started.append(await self._start(new))
            serving = all([await worker.serves() for worker in started])
        if serving:
            self.crew = new
            click.echo("The new workers are serving; the old ones finish their requests.", err=True)
        else:
            click.echo("The new workers did not start, so the old ones continue.", err=True)
        await self._relieve(old if serving else new)
        for number, worker in enumerate(started, start=1):
            worker.ready.close()
            self.tasks.start_soon(self._keep, number, new, worker)
        self.replacing = False

    async def _relieve(self, crew: _Crew) -> None:
        crew.relieved = True
        for process in list(crew.running):
            await self._send(process, b"r")

    async def stop(self) -> None:
        """Let all workers finish; when they are finishing, end them now."""
        at_once, self.stopping = self.stopping, True
        for process in list(self.running):
            if at_once and process.stdin is not None:
                try:
                    await process.stdin.send(b"!")
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    process.kill()
            elif not at_once:
                await self._send(process, b".")

    async def _send(self, process: anyio.abc.Process, command: bytes) -> None:
        if process.stdin is not None:
            try:
                await process.stdin.send(command)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return


async def supervise(command: Sequence[str], workers: int, *, now: Callable[[], float] = time.monotonic) -> int:
    """Run `workers` processes of the command until a signal stops them, and return the exit code.

    The command gets the option `--ready-fd NUMBER`: a descriptor to write a byte to when the process serves; and, when a worker has served
    before, the option `--join`.
    """
    async with anyio.create_task_group() as signals:
        async with anyio.create_task_group() as tasks:
            pool = _Pool(command, workers, now, tasks)
            await signals.start(_obey, pool)
            pool.begin()
        signals.cancel_scope.cancel()
    return pool.exit_code


async def _obey(pool: _Pool, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    numbers = [signal.SIGTERM, signal.SIGINT]
    if sys.platform != "win32":
        numbers += [signal.SIGHUP, signal.SIGUSR2]
    with anyio.open_signal_receiver(*numbers) as received:
        task_status.started()
        async for number in received:
            if sys.platform != "win32" and number == signal.SIGUSR2:
                pool.tasks.start_soon(pool.replace)
            else:
                await pool.stop()
