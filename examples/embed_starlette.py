"""The gateway below /ai of a Starlette application: hypercorn embed_starlette:app

Settings come from the environment and .env, as for `multiverse-gateway run`.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from multiverse_gateway import create_app, lifespan, load_settings

gateway = create_app(load_settings(env=os.environ, cwd=Path.cwd()))


@asynccontextmanager
async def running(app: Starlette) -> AsyncIterator[None]:
    async with lifespan(gateway):  # the lifespan of a mounted application does not run by itself
        yield


async def home(request: Request) -> PlainTextResponse:
    models = gateway.state.gateway.model_names()
    return PlainTextResponse(f"Models at /ai/v1: {', '.join(models) or 'none yet'}")


app = Starlette(routes=[Route("/", home), Mount("/ai", gateway)], lifespan=running)
