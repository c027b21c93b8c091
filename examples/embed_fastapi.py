"""The gateway below /ai of a FastAPI application, without its pages: hypercorn embed_fastapi:app"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from multiverse_gateway import create_app, lifespan, load_settings

gateway = create_app(load_settings(env=os.environ, cwd=Path.cwd(), overrides={"ui": False}))


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[None]:
    async with lifespan(gateway):  # the lifespan of a mounted application does not run by itself
        yield


app = FastAPI(lifespan=running)
app.mount("/ai", gateway)


@app.get("/")
async def home() -> dict[str, list[str]]:
    return {"models": list(gateway.state.gateway.model_names())}
