"""Style sheets, scripts and pictures of the pages: read once, served under a path that changes with them, so browsers keep them."""

import gzip
import hashlib
import re
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path

import attrs
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from multiverse_gateway.core.encodings import accepts_gzip

STATIC = Path(__file__).parent / "static"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".json": "application/json", ".LICENSE": "text/plain"}


_COMMENT = re.compile(rb"^[ \t]*(?://.*|/\*\*.*\*/)\n|^[ \t]+", re.MULTILINE)
"""What of our scripts does not travel, because it is a tenth of them: lines with nothing but a comment, and what indents a line."""


@attrs.frozen(eq=False)
class Asset:
    """A file as it is sent."""

    content: bytes
    media_type: str

    @cached_property
    def packed(self) -> bytes:
        """The content as gzip; packed when it is asked for first."""
        return gzip.compress(self.content, 9, mtime=0)


@attrs.frozen
class Assets:
    """All files, and the digest of them that stands in their URLs."""

    files: Mapping[str, Asset]
    digest: str


@cache
def load_assets(directory: Path = STATIC) -> Assets:
    """Read all static files of the pages into memory."""
    whole = hashlib.sha256()
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.suffix not in _TYPES or not path.is_file():
            continue
        name, content = path.relative_to(directory).as_posix(), path.read_bytes()
        whole.update(name.encode() + b"\0" + content)
        files[name] = Asset(_COMMENT.sub(b"", content) if name.startswith("js/") else content, _TYPES[path.suffix])
    return Assets(files, whole.hexdigest()[:16])


async def serve_asset(request: Request) -> Response:
    """Answer with a file; only under the right digest may a browser keep it for long.

    Raises:
        HTTPException: There is no such file.
    """
    assets = load_assets()
    asset = assets.files.get(request.path_params["path"])
    if asset is None:
        raise HTTPException(404)
    is_current = request.path_params["digest"] == assets.digest
    headers = {"cache-control": "public, max-age=31536000, immutable" if is_current else "no-cache", "vary": "accept-encoding"}
    content = asset.content
    if accepts_gzip(request.headers.get("accept-encoding", "")):
        content = asset.packed
        headers["content-encoding"] = "gzip"
    return Response(content, headers=headers, media_type=asset.media_type)
