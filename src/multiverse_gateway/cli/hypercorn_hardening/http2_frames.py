"""The heads of HTTP/2 frames (RFC 9113, 4.1), read before h2 reads them, to refuse what h2 would buffer.

Every frame begins with nine bytes: three for the length of what follows, one for its kind, one for flags, four for the stream. A client's
first frame comes after the 24 bytes of the preface. A head is one HEADERS frame and any number of CONTINUATION frames, the last of which
has the flag END_HEADERS; no other frame may come between them (6.10), so counting their bytes needs no stream.
"""

BLOCK_BYTES = 64 << 10
"""What a head may have in all its frames together, encoded."""
PREFACE_BYTES = 24
FRAME_HEAD_BYTES = 9
HEADERS, CONTINUATION, END_HEADERS = 0x1, 0x9, 0x4


class FrameWatch:
    """Look at the heads of frames before h2 does: it buffers an oversized frame, up to 16 MiB, before it objects to it.

    The same goes for a head in many frames, of which h2 buffers up to 1 MiB.
    """

    def __init__(self, max_frame_size: int) -> None:
        self._max_frame_size = max_frame_size
        self._head = bytearray()
        self._left = PREFACE_BYTES
        self._block = 0

    def accepts(self, data: bytes) -> bool:
        """Take what arrived; return False if a frame or a head in it is too large."""
        at = 0
        while at < len(data):
            if self._left:
                skipped = min(self._left, len(data) - at)
                self._left -= skipped
                at += skipped
                continue
            missing = FRAME_HEAD_BYTES - len(self._head)
            self._head += data[at : at + missing]
            at += missing
            if len(self._head) == FRAME_HEAD_BYTES and not self._begins_well():
                return False
        return True

    def _begins_well(self) -> bool:
        length, kind, flags = int.from_bytes(self._head[:3], "big"), self._head[3], self._head[4]
        self._head.clear()
        self._left = length
        if kind in (HEADERS, CONTINUATION):
            self._block += length
        if kind not in (HEADERS, CONTINUATION) or flags & END_HEADERS:
            self._block = 0
        return length <= self._max_frame_size and self._block <= BLOCK_BYTES
