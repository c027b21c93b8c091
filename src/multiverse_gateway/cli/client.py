"""The admin API of a running gateway, as the commands call it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import click
import httpx2

from multiverse_gateway._version import __version__
from multiverse_gateway.cli.common import host_for_url, printable, settings_here, trimmed
from multiverse_gateway.core.errors import AdminKeyRequired

TIMEOUT = 60.0


class GatewayRefusal(click.ClickException):
    """A gateway answered with an error; `code` is that of the error, `None` for an answer that is not a gateway's."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


@attrs.frozen
class GatewayClient:
    """Call one gateway; whatever goes wrong ends the command with a message that says what to do."""

    url: str
    admin_key: str | None = attrs.field(repr=False)
    client_key: str | None = attrs.field(default=None, repr=False)

    def admin(self, method: str, path: str, *, json: object = None, params: dict[str, Any] | None = None) -> Any:
        """Call the admin API and return the JSON of its answer.

        Raises:
            ClickException: There is no key, no gateway, or the answer is an error.
        """
        if not self.admin_key:
            raise click.ClickException(
                "the admin key is missing: set ADMIN_API_KEY to the key that the gateway printed at its first start, or use --admin-key"
            )
        return self.call(method, f"/admin{path}", headers={"x-api-key": self.admin_key}, json=json, params=params)

    def call(self, method: str, path: str, **more: Any) -> Any:
        """Call any path and return the JSON of its answer.

        Raises:
            ClickException: as for `admin`.
        """
        headers = {"user-agent": f"multiverse-gateway-cli/{__version__}", **more.pop("headers", {})}
        try:
            answer = httpx2.request(method, self.url + path, headers=headers, timeout=TIMEOUT, **more)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise click.ClickException(
                f"no gateway answers at {self.url} ({printable(error) or type(error).__name__}); "
                "start it with `multiverse-gateway run`, or give another URL with --gateway"
            ) from None
        return self._read(answer)

    def _read(self, answer: httpx2.Response) -> Any:
        try:
            value = answer.json()
        except ValueError:
            value = None
        if answer.is_success and value is not None:
            return value
        error = value.get("error") if isinstance(value, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        if answer.status_code == 403 and code in (None, AdminKeyRequired.code):
            raise GatewayRefusal("the gateway rejects the admin key: set ADMIN_API_KEY to the right one, or use --admin-key", code)
        message = error.get("message") if isinstance(error, dict) else None
        if message is None:
            message = f"what answers at {self.url} is not a gateway, or is another version; give the gateway's root URL with --gateway"
        said = "" if f"(status {answer.status_code})" in message else f" (the gateway answered with status {answer.status_code})"
        raise GatewayRefusal(f"{printable(message)}{said}", code)


def state_of_key(record: Mapping[str, Any]) -> str:
    """Return the state of a client key, which gateways of older versions do not report."""
    over = "revoked" if record["revoked_at"] else "expired"
    return str(record.get("state") or ("active" if record["works"] else over))


def is_in_use(record: Mapping[str, Any]) -> bool:
    """Return whether a client key is active or blocked, so that its name is taken."""
    return state_of_key(record) in ("active", "blocked")


def gateway_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that find a gateway."""
    for option in (
        click.option("--admin-key", envvar="ADMIN_API_KEY", help="The gateway's admin key; prefer the variable ADMIN_API_KEY."),
        click.option(
            "--gateway",
            "gateway_url",
            metavar="URL",
            help="Root URL of the gateway; the default is the gateway configured in this directory.",
        ),
    ):
        command = option(command)
    return command


def client_for(gateway_url: str | None, admin_key: str | None) -> GatewayClient:
    """Return a client of the gateway named, or of the one that the settings here describe."""
    gateway_url, admin_key = trimmed(gateway_url), trimmed(admin_key)
    if gateway_url and (admin_key or "MULTIVERSE_ADMIN_API_KEY" not in os.environ) and not Path(".env").exists():
        return GatewayClient(_root(gateway_url), admin_key)
    settings = settings_here()
    url = gateway_url or f"http://{host_for_url(settings.host)}:{settings.port}"
    client_key = settings.client_api_keys[0] if settings.client_api_keys else None
    return GatewayClient(_root(url), admin_key or settings.admin_api_key, client_key)


def _root(url: str) -> str:
    if "://" not in url:
        url = f"http://{url}"
    return url.rstrip("/").removesuffix("/v1")
