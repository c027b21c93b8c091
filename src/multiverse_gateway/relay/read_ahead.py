"""What a client sends before its turn: the next request while the last one is answered, or a body that has not been admitted yet."""


class ReadAhead:
    """Bytes that wait, in the order in which they arrived; the connection decides how many are too many.

    >>> ahead = ReadAhead()
    >>> ahead.add(b"POST ")
    >>> ahead.add(b"/v1")
    >>> ahead.size, ahead.take(), ahead.size
    (8, b'POST /v1', 0)
    """

    __slots__ = ("pieces", "size")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size = 0
        """Bytes since the last `take`, those that were dropped too."""

    def add(self, data: bytes) -> None:
        """Keep bytes until their turn comes."""
        self.pieces.append(data)
        self.size += len(data)

    def drop(self) -> None:
        """Forget the bytes, but not how many there were."""
        self.pieces.clear()

    def take(self) -> bytes:
        """Return everything that waits, and begin again with nothing."""
        data = b"".join(self.pieces)
        self.pieces.clear()
        self.size = 0
        return data
