"""Notice that this process was stopped (SIGSTOP, suspend): timers then fire late, and neither clients nor servers are to blame.

What the sockets hold after a pause has not been read yet, so code that meets one moves its deadlines instead of timing anything out.
"""

from typing import Final

LATE_SECONDS: Final = 0.5
"""How late a timer of a process that runs never fires."""


def stopped_seconds(due: float, now: float) -> float:
    """Return for how many seconds the process was stopped when something was due; 0 if it came on time. Instants are monotonic.

    >>> stopped_seconds(10.0, 10.25), stopped_seconds(10.0, 13.0)
    (0.0, 3.0)
    """
    late = now - due
    return late if late > LATE_SECONDS else 0.0
