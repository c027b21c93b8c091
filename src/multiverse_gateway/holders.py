"""Names for the holders of leases, from which processes on the same machine can see that a holder has died, so that they need not wait.

1. A name is `TOKEN@PLACE/PID/START`. The token makes it unique. To renew a lease, a process compares the whole name.
2. The place stands for the running kernel, the namespaces of process ids and of time, and the host name. A process id names one process
   only if all of them are ours. Anywhere else, a holder is never taken for dead, and its lease simply expires.
3. The start of the process, in ticks of the kernel, distinguishes it from a later one with the same id.
4. On a system that does not provide these facts (any but Linux), a name is the token alone, and nothing is known about its process.
"""

import os
import secrets
import socket
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

_PROC = Path("/proc")


def new_holder() -> str:
    """Return a name for this process as the holder of leases; each call returns another one."""
    token = secrets.token_hex(8)
    place, start = _place(), _start_of(os.getpid())
    return token if place is None or start is None else f"{token}@{place}/{os.getpid()}/{start}"


def is_gone(holder: str) -> bool:
    """Return whether a holder is a process of this machine that has ended; false whenever that is not certain.

    >>> is_gone(new_holder()), is_gone("a name without a process"), is_gone("token@another machine/1/2")
    (False, False, False)
    """
    place, _, rest = holder.partition("@")[2].partition("/")
    pid, _, start = rest.partition("/")
    if not place or place != _place() or not (pid.isascii() and pid.isdigit() and start):
        return False
    try:
        os.kill(int(pid), 0)  # not affected by `hidepid`, under which the processes of other users are missing below /proc
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is another user's, or no process id at all
        return False
    started = _start_of(int(pid))
    return started is not None and started != start


@lru_cache(maxsize=1)
def _place() -> str | None:
    """Return what all processes that share process ids have in common; `None` if the system does not provide it."""
    try:
        parts = [
            (_PROC / "sys/kernel/random/boot_id").read_text(),
            os.readlink(_PROC / "self/ns/pid"),
            os.readlink(_PROC / "self/ns/time") if (_PROC / "self/ns/time").exists() else "",
            socket.gethostname(),
        ]
    except OSError:
        return None
    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _start_of(pid: int) -> str | None:
    """Return when a process started, in ticks, or "ended" for a zombie; `None` if the system does not provide it."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return "ended" if fields[0] in "ZXx" else fields[19]
    except (OSError, IndexError):
        return None
