"""Every error as JSON in OpenAI's form, on `/v1/messages` in Anthropic's, with the request id and nothing internal."""

import logging

import attrs

from multiverse_gateway.core.envelope import EnvelopeError
from multiverse_gateway.core.errors import BadRequest, GatewayError, InternalError, RequestTimeout, RequestTooLarge

MISTAKE = "The gateway failed because of a bug; send its operator the x-request-id of this answer"

_log = logging.getLogger("multiverse_gateway.api")


class BadFraming(BadRequest):
    """The request could be read as two different ones; its connection cannot be used any further."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="bad_framing")


_CLOSING: tuple[type[GatewayError], ...] = (RequestTooLarge, RequestTimeout, BadFraming)


@attrs.frozen
class Refusal:
    """The answer to a request that ends in an error, whichever door sends it; after one that `closes`, its connection is of no use."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    closes: bool


def refusal_of(
    error: Exception, method: str, path: str, *, request_id: str | None, extra: list[tuple[bytes, bytes]] | None = None
) -> Refusal:
    """Make the answer for an error; `extra` are headers on top of its own.

    A mistake of ours is logged with its traceback and the id, which is all that the client learns.
    """
    if isinstance(error, GatewayError):
        response_error = error
    elif isinstance(error, EnvelopeError):
        response_error = BadRequest(error.message, param=error.param, code=error.code)
    else:
        fields = {"request_id": request_id, "method": method, "path": path}
        _log.error("request failed", exc_info=error, extra={"fields": fields})
        response_error = InternalError(MISTAKE)
    headers = [(b"content-type", b"application/json"), *response_error.headers(), *(extra or [])]
    if response_error.final and path.startswith("/v1/"):
        headers.append((b"x-multiverse-attempts", b"0"))
    return Refusal(response_error.status, headers, response_error.body(path, request_id), isinstance(response_error, _CLOSING))
