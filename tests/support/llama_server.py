"""Serve a GGUF model by llama.cpp's own HTTP server (package xllamacpp).

Run it as `python tests/support/llama_server.py MODEL PORT ALIAS`. It ends when the process that started it ends.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

PARENT_CHECK_SECONDS = 0.5


def serve(model: str, port: int, alias: str) -> None:
    """Serve `model` on 127.0.0.1 under the name `alias` until our parent is gone."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    parent = os.getppid()
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.hostnames = ["127.0.0.1"]
    settings.port = port
    settings.model_alias = {alias}
    settings.n_ctx = 2048
    settings.n_parallel = 4
    settings.cpuparams.n_threads = 1
    settings.warmup = True
    settings.endpoint_metrics = True
    server = xllamacpp.Server(settings)
    print("listening on", server.listening_address, flush=True)
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
