"""The forms that register and change a server: what a browser sends, turned into what the admin API takes, with advice on the way."""

import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any

import attrs

from multiverse_gateway.api.request_reading import names_cap, parse_change, parse_registration, parse_test
from multiverse_gateway.api.request_types import Registration
from multiverse_gateway.core.addresses import LOCALHOST_MEANS, EndpointError, names_this_computer, parse_endpoint
from multiverse_gateway.core.errors import BadRequest, GatewayError, InvalidField
from multiverse_gateway.core.pasting import pasted
from multiverse_gateway.core.servers import Server
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.pages.words import sentence
from multiverse_gateway.registration import refuse_address

Form = Mapping[str, str]

NUMBERS = ("max_tokens", "context_length", "max_concurrency", "weight")
NO_LIMIT = ("none", "no limit")
"""Texts for an unlimited number of concurrent requests; if the field is empty, the server's engine decides."""
FIELDS: Mapping[str, str] = {
    "model_name": "Model name",
    "endpoint_url": "Address",
    "api_key": "API key of the server",
    "student_id": "Owner",
    "description": "Description",
    "context_length": "Context length",
    "max_tokens": "Max output tokens",
    "max_concurrency": "Max concurrent requests",
    "weight": "Weight",
    "streaming": "Supports streaming",
}
"""The labels of the form's fields."""

_PLACES = {
    "max_tokens": "capabilities",
    "context_length": "capabilities",
    "streaming": "capabilities",
    "student_id": "metadata",
    "description": "metadata",
}


# Bodies


def _value(form: Form, name: str) -> Any:
    text = form.get(name, "").strip()
    if not text or (name == "max_concurrency" and text.casefold() in NO_LIMIT):
        return None
    if name == "endpoint_url":
        return pasted(text)
    if name in NUMBERS:
        digits = text.replace(",", "").replace("_", "")
        return int(digits) if re.fullmatch(r"[0-9]{1,12}", digits) else text
    return text


def body_of_form(form: Form) -> dict[str, Any]:
    """Return the body of a registration; what was left empty is left out."""
    body: dict[str, Any] = {}
    for name in FIELDS:
        if name != "streaming" and not form.get(name, "").strip():
            continue
        value = (form.get(name) == "on") if name == "streaming" else _value(form, name)
        place = _PLACES.get(name)
        (body.setdefault(place, {}) if place else body)[name] = value
    return body


def registration_of(form: Form) -> tuple[Registration, bool]:
    """Read the form that registers a server; return the registration, and whether it says how many requests the server gets at once.

    Raises:
        BadRequest: A field cannot be used; `param` names it.
    """
    body = body_of_form(form)
    return parse_registration(body), names_cap(body)


def trial_of(form: Form) -> Registration:
    """Read the form that tests a server.

    Raises:
        BadRequest: A field cannot be used; `param` names it.
    """
    return parse_test({**body_of_form(form), "endpoint_url": _value(form, "endpoint_url")})


def field_of(error: GatewayError) -> str | None:
    """Return the form's field that an error is about."""
    name = (error.param or "").rpartition(".")[2]
    return name if name in FIELDS else None


def message_of(error: GatewayError) -> str:
    """Return what is wrong, with the form's label of the field instead of the API's name."""
    name = field_of(error)
    return sentence(error.naming(FIELDS[name]) if name is not None and isinstance(error, InvalidField) else error.message)


def values_of(server: Server) -> dict[str, str]:
    """Return what the form that changes a server holds at first; never its key."""
    facts = {
        "model_name": server.model_name,
        "endpoint_url": server.endpoint_url,
        "student_id": server.metadata.student_id,
        "description": server.metadata.description,
        "max_tokens": server.capabilities.max_tokens,
        "context_length": server.capabilities.context_length,
        "max_concurrency": server.max_concurrency,
        "weight": server.weight,
        "streaming": "on" if server.capabilities.streaming else "",
    }
    return {name: "" if value is None else str(value) for name, value in facts.items()}


def changed_fields(form: Form, server: Server) -> list[str]:
    """Return the fields in which a form differs from the server; an empty key means that the stored one stays."""
    before = values_of(server)
    names = [name for name, value in before.items() if form.get(name, "").strip() != value]
    if form.get("api_key", "").strip() or (form.get("remove_key") == "on" and server.api_key is not None):
        names.append("api_key")
    return names


def change_body(form: Form, names: Sequence[str]) -> dict[str, Any]:
    """Return the partial body that changes these fields."""
    body: dict[str, Any] = {}
    for name in names:
        value = (form.get(name) == "on") if name == "streaming" else _value(form, name)
        place = _PLACES.get(name)
        (body.setdefault(place, {}) if place else body)[name] = value
    return body


# Advice while somebody types


@attrs.frozen(kw_only=True)
class FieldNote:
    """What stands below a field; `state` is good, warn, bad, or empty for nothing to say."""

    field: str
    state: str = ""
    message: str = ""


def check_field(form: Form, name: str) -> FieldNote:
    """Return the page's answer about one field: valid, or why it is not."""
    value = form.get(name, "").strip()
    if name == "streaming" or (not value and name not in ("model_name", "endpoint_url")):
        return FieldNote(field=name)
    if not value:
        return FieldNote(field=name, state="bad", message="Required.")
    try:
        parse_change(change_body(form, [name]))
    except BadRequest as error:
        return FieldNote(field=name, state="bad", message=message_of(error))
    return FieldNote(field=name, state="good", message="")


_KINDS = (
    (
        r"\.ngrok(-free)?\.(app|dev|io)$",
        "an ngrok tunnel. Unless its address is reserved, it changes at every start; edit the server then",
    ),
    (r"\.trycloudflare\.com$", "a quick Cloudflare tunnel. Its address changes at every start; edit the server then"),
    (r"\.(ts\.net|loca\.lt|pinggy\.link|serveo\.net)$", "a tunnel"),
)


def recognize(gateway: Gateway, text: str) -> FieldNote:
    """Return how the page reads the pasted address of a server."""
    name, address = "endpoint_url", pasted(text)
    if not address:
        return FieldNote(field=name)
    try:
        endpoint = parse_endpoint(address)
    except EndpointError as error:
        return FieldNote(field=name, state="bad", message=sentence(str(error)))
    read_as = "" if endpoint.url == text.strip().rstrip("/") else f" It will be saved as {endpoint.url}."
    try:
        refuse_address(gateway, endpoint.url)
    except BadRequest as error:
        if names_this_computer(endpoint.host):
            return FieldNote(field=name, state="warn", message=f"{LOCALHOST_MEANS} This gateway does not connect to its own computer.")
        return FieldNote(field=name, state="bad", message=message_of(error))
    if names_this_computer(endpoint.host):
        return FieldNote(field=name, state="warn", message=f"{LOCALHOST_MEANS}{read_as}")
    return FieldNote(field=name, state="good", message=f"This is {_kind(endpoint.host)}.{read_as}")


def _kind(host: str) -> str:
    for pattern, message in _KINDS:
        if re.search(pattern, host):
            return message
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return f"the host {host}"
    return "a public address" if address.is_global else "a computer in the local network"
