"""An HTTP/2 client on a raw socket, as rude as a test wants: windows that stay closed, streams that are left, frames without end.

    with H2Client(port, window=0) as client:
        stream = client.ask("GET", "/openapi.json")
        client.read(h2.events.ResponseReceived, stream)
        client.reset(stream)

It blocks, never longer than its timeout. It takes data off the wire without opening windows again: call `allow` for that.
"""

from __future__ import annotations

import socket
import ssl
import struct
from types import TracebackType
from typing import Self

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from support.sockets import set_reset_on_close


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a raw frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


class H2Client:
    """One connection with prior knowledge, or with TLS."""

    def __init__(self, port: int, *, window: int = 65_535, timeout: float = 10.0, tls: ssl.SSLContext | None = None) -> None:
        """Connect; `window` is what each stream may send at first."""
        self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
            self.socket = tls.wrap_socket(self.socket, server_hostname="127.0.0.1")
        self.state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, validate_outbound_headers=False))
        self.state.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.ENABLE_PUSH: 0, h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.state.initiate_connection()
        self.events: list[h2.events.Event] = []
        """All that arrived and was not looked for yet."""
        self.flush()

    def flush(self) -> None:
        """Send what is due."""
        self.socket.sendall(self.state.data_to_send())

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        end: bool = True,
        headers: list[tuple[str, str]] | None = None,
    ) -> int:
        """Send a request and return its stream; a body that does not fit into the window is sent as far as it does."""
        stream = self.state.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "gateway"), *(headers or [])]
        self.state.send_headers(stream, fields, end_stream=end and body is None)
        if body is not None:
            self.send_body(stream, body, end=end)
        self.flush()
        return stream

    def send_body(self, stream: int, body: bytes, *, end: bool = True) -> None:
        """Send as much of a body as the window lets through, and the end after the whole of it."""
        room = min(len(body), self.state.local_flow_control_window(stream))
        for start in range(0, room, 16_384):
            self.state.send_data(stream, body[start : min(room, start + 16_384)])
        if end and room == len(body):
            self.state.end_stream(stream)
        self.flush()

    def allow(self, count: int, stream: int | None = None) -> None:
        """Open a window by so many bytes: of a stream, or of the connection."""
        self.state.increment_flow_control_window(count, stream)
        self.flush()

    def reset(self, stream: int) -> None:
        """Give a stream up."""
        self.state.reset_stream(stream, error_code=h2.errors.ErrorCodes.CANCEL)
        self.flush()

    def read(self, wanted: type[h2.events.Event], stream: int | None = None) -> h2.events.Event | None:
        """Read until there is an event of this kind, and return it; None when the connection ends before it.

        Raises:
            TimeoutError: neither happened in time.
        """
        while True:
            for number, event in enumerate(self.events):
                if isinstance(event, wanted) and stream in (None, getattr(event, "stream_id", None)):
                    del self.events[number]
                    return event
            try:
                data = self.socket.recv(65_536)
            except ConnectionError:
                return None
            if not data:
                return None
            self.events += self.state.receive_data(data)
            self.flush()

    def status(self, stream: int) -> int:
        """Wait for the head of an answer and return its status."""
        event = self.read(h2.events.ResponseReceived, stream)
        assert isinstance(event, h2.events.ResponseReceived), "the connection ended"
        return int(dict(event.headers)[b":status"])

    def body(self, stream: int) -> bytes:
        """Read the whole of an answer's body, opening windows as it comes.

        Raises:
            EOFError: it was not whole.
        """
        body = b""
        while True:
            event = self.read(h2.events.Event, stream)
            if isinstance(event, h2.events.DataReceived):
                body += event.data
                self.state.acknowledge_received_data(event.flow_controlled_length, stream)
                self.flush()
            elif isinstance(event, h2.events.StreamEnded):
                return body
            elif event is None or isinstance(event, h2.events.StreamReset):
                raise EOFError(f"the answer ended after {len(body)} bytes")

    def abort(self) -> None:
        """Leave with RST."""
        set_reset_on_close(self.socket)
        self.socket.close()

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave."""
        self.socket.close()
