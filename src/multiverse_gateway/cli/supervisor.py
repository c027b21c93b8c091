"""Keep several serving processes alive on one port.

1. A worker that ended is started again, later each time it ends early.
2. Workers that keep ending at once are a fault that restarts do not mend: all stop, and the exit code says so.
3. The parent stops a worker through its standard input: its end means "finish", a byte means "now". So it does if it dies itself.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import anyio
import anyio.abc
import anyio.lowlevel
import attrs
import click

EARLY_SECONDS = 10.0
EARLY_ENDS = 4
FIRST_PAUSE = 0.25
LAST_PAUSE = 5.0
UNUSABLE = 2
"""Exit code of a worker whose settings cannot be used: all others have the same."""


@attrs.frozen
class Ends:
    """How often in a row workers ended soon after their start."""

    early: int = 0

    def after(self, lived: float) -> "Ends":
        """Count one more end, of a worker that lived so many seconds."""
        return Ends(self.early + 1 if lived < EARLY_SECONDS else 0)

    @property
    def is_loop(self) -> bool:
        """Whether restarting makes no sense any more."""
        return self.early >= EARLY_ENDS

    @property
    def pause(self) -> float:
        """Seconds until the next start."""
        return min(LAST_PAUSE, FIRST_PAUSE * 2.0 ** max(0, self.early - 1))


@attrs.define
class _Pool:
    command: Sequence[str]
    now: Callable[[], float]
    running: set[anyio.abc.Process] = attrs.field(factory=set)
    ends: Ends = Ends()
    stopping: bool = False
    exit_code: int = 0

    def is_stopping(self) -> bool:
        """Tell whether workers are to end; the answer changes while anything is awaited."""
        return self.stopping

    async def keep(self, number: int) -> None:
        """Keep one worker alive until all stop."""
        while not self.is_stopping():
            begun = self.now()
            process = await anyio.open_process(self.command, stdin=subprocess.PIPE, stdout=None, stderr=None)
            self.running.add(process)
            if self.is_stopping():
                await self._finish(process)
            code = await process.wait()
            self.running.discard(process)
            if self.is_stopping():
                self.exit_code = self.exit_code or max(0, code)
                return
            self.ends = self.ends.after(self.now() - begun)
            if code == UNUSABLE or self.ends.is_loop:
                click.echo(
                    f"Worker {number} ended with code {code} right after its start, and so will others; the gateway stops.", err=True
                )
                self.exit_code = code if code == UNUSABLE else 1
                await self.stop()
                return
            click.echo(f"Worker {number} ended with code {code}; another one starts.", err=True)
            await anyio.sleep(self.ends.pause)

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
                await self._finish(process)

    async def _finish(self, process: anyio.abc.Process) -> None:
        if process.stdin is not None:
            try:
                await process.stdin.send(b".")
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return


async def supervise(command: Sequence[str], workers: int, *, now: Callable[[], float] = time.monotonic) -> int:
    """Run `workers` processes of the command until a signal stops them, and return the exit code."""
    pool = _Pool(command, now)
    async with anyio.create_task_group() as signals:
        signals.start_soon(_obey, pool)
        await anyio.lowlevel.checkpoint()
        async with anyio.create_task_group() as group:
            for number in range(1, workers + 1):
                group.start_soon(pool.keep, number)
        signals.cancel_scope.cancel()
    return pool.exit_code


async def _obey(pool: _Pool) -> None:
    numbers = [signal.SIGTERM, signal.SIGINT]
    if sys.platform != "win32":
        numbers.append(signal.SIGHUP)
    with anyio.open_signal_receiver(*numbers) as received:
        async for _ in received:
            await pool.stop()
