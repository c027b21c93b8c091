"""Every error that the gateway answers with.

    GatewayError
    ├── BadRequest                400  invalid_request_error
    │   ├── InvalidField
    │   │   └── AddressForbidden
    │   ├── InvalidJSON                invalid_json
    │   ├── StreamingUnsupported       streaming_unsupported
    │   ├── ModelNotOffered            model_not_offered
    │   ├── ContextLengthExceeded      context_length_exceeded
    │   ├── AlreadyRegistered
    │   └── KeyNameTaken               key_name_taken
    ├── InvalidClientKey          401  invalid_api_key
    ├── KeyBlocked                403  key_blocked
    ├── AdminKeyRequired          403  permission_error
    ├── ModelForbidden            403  model_not_allowed
    ├── ForeignForm               403  foreign_form
    ├── NotFound                  404  invalid_request_error
    │   ├── ModelNotFound              model_not_found
    │   ├── ServerNotFound             server_not_found
    │   ├── KeyNotFound                key_not_found
    │   ├── ResponseNotFound           response_not_found
    │   └── UnknownURL                 unknown_url
    ├── MethodNotAllowed          405
    ├── RequestTimeout            408  request_timeout
    ├── RequestTooLarge           413  request_too_large
    ├── CompressedRequest         415  unsupported_content_encoding
    ├── RateLimited               429  rate_limit_exceeded
    │   ├── DailyLimitReached          daily_limit_exceeded
    │   ├── TooManyAtOnce              too_many_at_once
    │   └── BackendBusy                upstream_busy
    ├── InternalError             500  internal_error
    ├── UpstreamFailed            502  upstream_error
    │   ├── UpstreamAuthFailed         upstream_auth_failed
    │   ├── UpstreamBadResponse        upstream_bad_response
    │   └── AnswerTooLarge             answer_too_large
    ├── Unavailable               503  service_unavailable_error
    │   ├── NoHealthyServer            no_healthy_server
    │   ├── Overloaded                 overloaded
    │   ├── StorageUnavailable         storage_unavailable
    │   │   └── StorageRefused         storage_unavailable
    │   ├── ProbeRefused               probe_failed
    │   ├── BackendOverloaded     529  upstream_overloaded
    │   └── ShuttingDown               gateway_shutting_down
    ├── UpstreamTimeout           504  upstream_timeout
    └── LoopDetected              508  loop_detected

The bodies follow https://platform.openai.com/docs/guides/error-codes: `{"error": {"message", "type", "param", "code"}}`. Those of
`/v1/messages` and the calls below it follow https://docs.anthropic.com/en/api/errors:
`{"type": "error", "error": {"type", "message"}, "request_id"}`.
"""

import json
import math
from collections.abc import Sequence
from typing import ClassVar

from multiverse_gateway.core.paths import is_below

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
MESSAGES_PATH = "/v1/messages"


def anthropic_type(status: int) -> str:
    """Return the `type` that Anthropic's API gives to errors of a status.

    >>> anthropic_type(404), anthropic_type(405), anthropic_type(502)
    ('not_found_error', 'invalid_request_error', 'api_error')
    """
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def is_anthropic(path: str) -> bool:
    """Return whether the call at a path belongs to Anthropic's API: its clients read errors of Anthropic's form only.

    >>> is_anthropic("/v1/messages/count_tokens"), is_anthropic("/v1/models")
    (True, False)
    """
    return is_below(path, MESSAGES_PATH)


class GatewayError(Exception):
    """An error response, written for the person who reads it.

    `message` says what to do next and holds nothing internal. `retry_after` is in seconds. Instances are also used as values: the
    exchange hands them out without raising them.

    >>> GatewayError("Try again.").body()
    b'{"error": {"message": "Try again.", "type": "server_error", "param": null, "code": "internal_error"}}'
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = "internal_error"
    final: ClassVar[bool] = False
    """Clients must not retry: the gateway has tried everything that a retry could try."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code

    def body(self, path: str = "", request_id: str | None = None) -> bytes:
        """Return the JSON body of the answer to a call, in the form that clients of the call's path read."""
        if is_anthropic(path):
            inner = {"type": anthropic_type(self.status), "message": self.message}
            return json.dumps({"type": "error", "error": inner, "request_id": request_id}).encode()
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that belong to this error, besides content type and length."""
        headers = []
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after))))
        if self.final:
            headers.append((b"x-should-retry", b"false"))
        return headers


class BadRequest(GatewayError):
    """The request cannot be understood; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None


class InvalidField(BadRequest):
    """One field of the request cannot be used; `problem` continues a sentence that begins with the field's name.

    >>> error = InvalidField("max_tokens", " must be a whole number")
    >>> error.message, error.naming("Max output tokens")
    ('max_tokens must be a whole number', 'Max output tokens must be a whole number')
    """

    def __init__(self, field: str, problem: str = " cannot be used") -> None:
        super().__init__(f"{field}{problem}", param=field)
        self.problem = problem

    def naming(self, label: str) -> str:
        """Return the message with another name for the field, such as the label that a form shows."""
        return f"{label}{self.problem}"


class AddressForbidden(InvalidField):
    """The address policy forbids the address in a field; `reason` is the kind of address, `hint` what the writer may have confused."""

    def __init__(self, reason: str, *, field: str = "endpoint_url", is_openable: bool = False, hint: str = "") -> None:
        remedy = ", or ask the operator to open private networks (ALLOW_PRIVATE_NETWORKS)" if is_openable else ""
        self.explanation = f"({reason}). Write a public address or that of a tunnel{remedy}"
        if hint:
            self.explanation += f". {hint.removesuffix('.')}"
        super().__init__(field, f" names an address that this gateway does not connect to {self.explanation}")

    def naming(self, label: str) -> str:
        """Return the message for a person who has just written the address."""
        return f"This gateway does not connect to this address {self.explanation}"


class ModelNotOffered(BadRequest):
    """A server to be registered has no such model; `close_names` are those that it lists and the caller may have meant."""

    code = "model_not_offered"
    close_names: Sequence[str] = ()


class InvalidJSON(BadRequest):
    """The body is not JSON, or not a JSON object."""

    code = "invalid_json"


class StreamingUnsupported(BadRequest):
    """Every server of the model is registered with `streaming: false`."""

    code = "streaming_unsupported"


class AlreadyRegistered(BadRequest):
    """Another server of the registry has this model and URL."""

    def __init__(self, server_id: str) -> None:
        super().__init__(f"This model and URL are already registered, as {server_id}; change or remove that one", param="endpoint_url")


class KeyNameTaken(BadRequest):
    """Another client key that is neither revoked nor expired has this name."""

    code = "key_name_taken"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is already a key named {name}; choose another name, or renew or revoke that key", param="name")


class InvalidClientKey(GatewayError):
    """A client key is required and this one is missing or wrong."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    final = True

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the error's headers and the challenge that RFC 9110 asks for."""
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class KeyBlocked(GatewayError):
    """The operator has blocked this client key."""

    status = 403
    type = "permission_error"
    code = "key_blocked"
    final = True

    def __init__(self, message: str = "The operator of this gateway has blocked your API key; ask the operator to unblock it.") -> None:
        super().__init__(message)


class AdminKeyRequired(GatewayError):
    """The admin key is missing or wrong."""

    status = 403
    type = "permission_error"
    code = "insufficient_permissions"
    final = True


class ModelForbidden(GatewayError):
    """The client's key does not allow this model."""

    status = 403
    type = "permission_error"
    code = "model_not_allowed"
    final = True


class ForeignForm(GatewayError):
    """A web page of another site sent the request, as a form that browsers send without asking."""

    status = 403
    type = "permission_error"
    code = "foreign_form"
    final = True


class NotFound(GatewayError):
    """What the request names does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No server is registered for this model."""

    code = "model_not_found"
    final = True


class ServerNotFound(NotFound):
    """There is no server with this id, or it was removed."""

    code = "server_not_found"


class KeyNotFound(NotFound):
    """There is no client key with this id."""

    code = "key_not_found"


class ResponseNotFound(NotFound):
    """The stored response is unknown, is another caller's, or is on a server that is gone."""

    code = "response_not_found"
    final = True


class UnknownURL(NotFound):
    """The gateway does not serve this path."""

    code = "unknown_url"
    final = True


class MethodNotAllowed(GatewayError):
    """The path exists, but not with this method; `allowed` lists its methods, separated by commas."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    final = True

    def __init__(self, message: str, allowed: str | None = None) -> None:
        super().__init__(message)
        self.allowed = allowed

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the error's headers and the methods that are allowed (RFC 9110, 15.5.6)."""
        allow = [] if self.allowed is None else [(b"allow", self.allowed.encode())]
        return [*super().headers(), *allow]


class RequestTimeout(GatewayError):
    """The client's body did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class RequestTooLarge(GatewayError):
    """The body is larger than the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    final = True


class CompressedRequest(GatewayError):
    """The body is compressed, and the gateway reads plain bodies only."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"
    final = True

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the error's headers and the coding that is accepted (RFC 9110, 15.5.16)."""
        return [*super().headers(), (b"accept-encoding", b"identity")]


class RateLimited(GatewayError):
    """The caller's own quota is used up; `problem` is the message without its `remedy`, which asks the caller to wait.

    >>> error = RateLimited("Too many tries", remedy="; wait 5 seconds")
    >>> error.problem, error.message
    ('Too many tries', 'Too many tries; wait 5 seconds')
    """

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(
        self, problem: str, *, remedy: str = "", param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(problem + remedy, param=param, code=code, retry_after=retry_after)
        self.problem = problem


class DailyLimitReached(RateLimited):
    """The key has used up its requests for today; retrying does not help before the next day."""

    code = "daily_limit_exceeded"
    final = True


class TooManyAtOnce(RateLimited):
    """The caller's own limit on requests that run and wait together is reached, and another one would have to wait."""

    code = "too_many_at_once"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the error's headers, and the wait in milliseconds."""
        return [*super().headers(), (b"retry-after-ms", b"%d" % max(1, math.ceil(1000 * (self.retry_after or 0))))]


class BackendBusy(RateLimited):
    """Every server of the model asked for a pause."""

    code = "upstream_busy"


class InternalError(GatewayError):
    """A fault of the gateway itself."""


class UpstreamFailed(GatewayError):
    """No server gave a response that can be used."""

    status = 502
    code = "upstream_error"
    final = True


class UpstreamAuthFailed(UpstreamFailed):
    """The server refused the key that is stored for it; the client's own key is fine."""

    code = "upstream_auth_failed"


class UpstreamBadResponse(UpstreamFailed):
    """The server's answer is not a usable answer to this request."""

    code = "upstream_bad_response"


class AnswerTooLarge(UpstreamFailed):
    """The answer exceeds a limit of the gateway, and another server's answer would exceed it, too."""

    code = "answer_too_large"


class Unavailable(GatewayError):
    """The service cannot answer right now."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"


class NoHealthyServer(Unavailable):
    """The model is registered, but none of its servers can be used now."""

    code = "no_healthy_server"


class Overloaded(Unavailable):
    """The gateway, or every server of the model, is at its concurrency limit.

    `queue_length` is how many other requests wait for the model, if its queue refuses this one.

    >>> Overloaded("Try again in 5 s.", retry_after=5.0, queue_length=7).headers()
    [(b'retry-after', b'5'), (b'x-multiverse-queue-length', b'7')]
    """

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float | None = None, queue_length: int | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.queue_length = queue_length

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the error's headers, and the length of the queue that refuses the request."""
        length = [] if self.queue_length is None else [(b"x-multiverse-queue-length", b"%d" % self.queue_length)]
        return [*super().headers(), *length]


class StorageUnavailable(Unavailable):
    """The registry cannot be written now; inference continues."""

    code = "storage_unavailable"


class StorageRefused(StorageUnavailable):
    """The store rejects this call, and would reject it again: the store is broken, or cannot hold these values."""


class ProbeRefused(Unavailable):
    """The server to be registered or changed did not pass its probe."""

    code = "probe_failed"
    failed_step: str | None = None  # a `protocols.ProbeStep`, if the probe failed


class BackendOverloaded(Unavailable):
    """Every server of the model asked for a pause, the last one with status 529."""

    status = 529
    code = "upstream_overloaded"


class ShuttingDown(Unavailable):
    """The gateway is being stopped."""

    code = "gateway_shutting_down"


class UpstreamTimeout(GatewayError):
    """All attempts failed, or the deadline passed."""

    status = 504
    code = "upstream_timeout"
    final = True


class LoopDetected(GatewayError):
    """The request has come through a gateway before."""

    status = 508
    code = "loop_detected"
    final = True
