"""Decide which comments a waiting stream gets, and when; clients of server-sent events ignore them.

A comment ends with a single line end. A blank line after it would end an event, and some clients dispatch an empty event then:
openai-python after an `id:` or `retry:`, older versions of openai-go after any comment.
"""

from collections.abc import Iterable

import msgspec
from attrs import define

from multiverse_gateway.core.fairness import Place

APART_SECONDS = 1.0
"""Minimum time between two comments, and how long a request waits before the first one."""
SILENCE_SECONDS = 14.0
"""After how long an unchanged comment is repeated. The gateway looks some tenths of a second late, and promises one in 15 s."""


@define(eq=False)
class Comments:
    """The comments of one stream. `written_at` is the monotonic instant of the latest one, at first that of the request's arrival.

    >>> comments = Comments(0.0)
    >>> [comments.take(b": prefill", at) for at in (0.5, 1.0, 2.0, 15.0)]
    [False, True, False, True]
    """

    written_at: float
    latest: bytes = b""

    @property
    def have_begun(self) -> bool:
        """Whether any comment was written, so that the head of the response is sent."""
        return bool(self.latest)

    def may_take(self, now: float) -> bool:
        """Return whether any comment can be due."""
        return now - self.written_at >= APART_SECONDS

    def take(self, comment: bytes, now: float) -> bool:
        """Return whether a comment is due, and count it as written then: it differs from the latest one, or that is old."""
        if now - self.written_at < (SILENCE_SECONDS if comment == self.latest else APART_SECONDS):
            return False
        self.latest = comment
        self.written_at = now
        return True


def place_comment(place: Place) -> bytes:
    """Return the comment for a request that waits in the queue.

    >>> place_comment(Place(position=3, waiting=7, about_seconds=20))
    b': queue {"position":3,"waiting":7,"about_seconds":20}\\n'
    """
    return _comment(b"queue", {"position": place.position, "waiting": place.waiting, "about_seconds": place.about_seconds})


def prefill_comment(attempt: int) -> bytes:
    """Return the comment for a request whose answer a server has yet to begin; `attempt` is 2 after one failover.

    >>> prefill_comment(1)
    b': prefill {"attempt":1}\\n'
    """
    return _comment(b"prefill", {"attempt": attempt})


def headers_comment(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the comment with the headers that were not known yet when the head was sent.

    >>> headers_comment([(b"x-multiverse-attempts", b"1")])
    b': headers {"x-multiverse-attempts":"1"}\\n'
    """
    return _comment(b"headers", {name.decode("latin-1"): value.decode("latin-1") for name, value in headers})


def _comment(name: bytes, fields: dict[str, object]) -> bytes:
    return b": %b %b\n" % (name, msgspec.json.encode(fields))
