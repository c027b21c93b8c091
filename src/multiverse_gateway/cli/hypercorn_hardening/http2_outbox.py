"""Bytes that wait to be sent on one HTTP/2 stream until the windows of the client let them through."""

import asyncio
from collections import deque

from multiverse_gateway.cli.hypercorn_hardening.shared import HELD_BYTES

LEAST_BYTES = 4096
"""Bytes that a client must take of a stream within the write timeout, unless fewer are offered."""


class StreamOutbox:
    """The bytes to be sent on one stream: views of what the application sent, at most `HELD_BYTES`."""

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()
        self._size = 0
        self._is_complete = False
        self._changed = asyncio.Event()
        self._taken = 0
        self._since = 0.0
        self.is_closed = False

    def __len__(self) -> int:
        return self._size

    @property
    def is_over(self) -> bool:
        """Return whether all bytes were taken and no more will follow."""
        return self._is_complete and not self._size

    async def add(self, data: memoryview) -> int:
        """Wait for room, add as much of `data` as fits, and return how much that was; 0 if the stream has ended."""
        while self._size >= HELD_BYTES and not self.is_closed:
            await self._wait()
        if self.is_closed:
            return 0
        if not self._size:
            self._begin_to_count()
        piece = data[: HELD_BYTES - self._size]
        self._pieces.append(piece)
        self._size += len(piece)
        return len(piece)

    def complete(self) -> None:
        """Note that no more bytes will follow."""
        self._is_complete = True

    async def ended(self) -> None:
        """Wait for the end of the stream."""
        while not self.is_closed:
            await self._wait()

    def take(self, count: int) -> bytes:
        """Return up to `count` bytes that are to be sent now."""
        taken = bytearray()
        while self._pieces and len(taken) < count:
            piece = self._pieces.popleft()
            missing = count - len(taken)
            taken += piece[:missing]
            if len(piece) > missing:
                self._pieces.appendleft(piece[missing:])
        if taken:
            self._size -= len(taken)
            self._taken += len(taken)
            self._changed.set()
        if self._taken >= LEAST_BYTES:
            self._begin_to_count()
        return bytes(taken)

    def close(self) -> None:
        """Drop the bytes and release every sender that waits: the stream has ended."""
        self.is_closed = True
        self._pieces.clear()
        self._size = 0
        self._changed.set()

    def is_stalled(self, now: float, patience: float) -> bool:
        """Return whether the client has taken too little for `patience` seconds."""
        return self._size > 0 and now - self._since >= patience

    def postpone(self, seconds: float) -> None:
        """Do not count the time in which the process was stopped."""
        self._since += seconds

    def _begin_to_count(self) -> None:
        self._taken = 0
        self._since = asyncio.get_running_loop().time()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()
