"""Harden hypercorn 0.18: close the gaps that it leaves on connections from the outside.

1. A head has to be complete in the time of `HardenedConfig` after the connection was made, or after its first byte on a kept one.
2. A connection speaks what it spoke from its first byte: no upgrade to h2c or to a WebSocket. No header is folded.
3. Nothing outlives its stream, and nothing outlives its connection: not the application's task, not what it sent, not what it has not
   received. Hypercorn's own HTTP/2 keeps all three when a client resets a stream or leaves.
4. An answer is held in small pieces only: the application waits until the client has taken them, and a client that takes too little for
   `HardenedConfig.write_timeout` seconds loses its stream (HTTP/2) or its connection.
5. A request's body is held in small pieces only: the client waits until the application has taken them.
6. A connection that the client closed is closed immediately: hypercorn would wait for the end of its keep-alive time first.

`shared` has what both versions of HTTP need, `http1` hardens hypercorn's HTTP/1.1, `http2` replaces its HTTP/2.
"""

import hypercorn.asyncio.run
import hypercorn.protocol

from multiverse_gateway.cli.hypercorn_hardening.http1 import HardenedH11
from multiverse_gateway.cli.hypercorn_hardening.http2 import HardenedH2
from multiverse_gateway.cli.hypercorn_hardening.shared import HardenedConfig, HardenedServer

__all__ = ["HardenedConfig", "harden_hypercorn"]


def harden_hypercorn() -> None:
    """Make hypercorn use the hardened protocols in this process; it has no setting for that."""
    vars(hypercorn.protocol).update(H11Protocol=HardenedH11, H2Protocol=HardenedH2)
    vars(hypercorn.asyncio.run).update(TCPServer=HardenedServer)
