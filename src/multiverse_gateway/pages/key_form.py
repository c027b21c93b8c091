"""The forms that make and change client keys: what a browser sends, turned into what the admin API takes."""

from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

from multiverse_gateway.api.key_records import KeyRecord
from multiverse_gateway.api.request_reading import KeyChanges, parse_key_change, parse_new_key
from multiverse_gateway.core.errors import BadRequest, GatewayError, InvalidField
from multiverse_gateway.core.key_names import names_of
from multiverse_gateway.core.servers import KeyTerms, is_among
from multiverse_gateway.pages.server_form import Form
from multiverse_gateway.pages.words import sentence

MAX_NAMES = 500
MAX_DAYS = 36_500
LIMITS = ("rate_limit", "daily_limit", "max_at_once")
LABELS: Mapping[str, str] = {
    "name": "Name",
    "names": "Names",
    "days": "Expires after (days)",
    "expires_at": "Expires on",
    "rate_limit": "Requests per minute",
    "daily_limit": "Requests per day",
    "max_at_once": "Max concurrent requests",
    "bulk": "Bulk",
    "models": "Models",
}
"""The fields of the forms and what people call them."""
MODEL = "model:"
"""What the names of the check boxes of models begin with."""


def message_of(error: GatewayError) -> str:
    """Return what is wrong, with the form's label of the field instead of the API's name."""
    name = (error.param or "").partition("[")[0]
    return sentence(error.naming(LABELS[name]) if name in LABELS and isinstance(error, InvalidField) else error.message)


def names_in(form: Form) -> tuple[str, ...]:
    """Return the names that a form holds, one per line.

    Raises:
        BadRequest: There is none, there are too many, or a line is not a name; the message says which.
    """
    found = names_of(form.get("names", "").split("\n"))
    if found.problems:
        shown = "; ".join(f"line {number}: {problem}" for number, problem in found.problems[:5])
        more = f"; and {len(found.problems) - 5} more lines" if len(found.problems) > 5 else ""
        only = len(found.problems) == 1 and not found.names
        raise BadRequest(sentence(found.problems[0][1]) if only else f"No key was made. {sentence(shown + more)}", param="names")
    if not found.names:
        raise BadRequest("Enter a name, or several names, one per line", param="names")
    if len(found.names) > MAX_NAMES:
        raise BadRequest(f"These are {len(found.names):,} names; at most {MAX_NAMES} keys can be created at a time", param="names")
    return found.names


def new_terms(form: Form, wall: float) -> KeyTerms:
    """Return the terms of the keys that a form asks for.

    Raises:
        BadRequest: A field cannot be used.
    """
    body = _limits_of(form)
    days = _number(form, "days")
    if days is not None:
        if not 1 <= days <= MAX_DAYS:
            raise BadRequest(f"{LABELS['days']} must be a whole number from 1 to {MAX_DAYS:,}", param="days")
        body["expires_at"] = (datetime.fromtimestamp(wall, UTC) + timedelta(days=days)).isoformat()
    return parse_new_key({"name": "any", **body})[1]


def changes_in(form: Form, record: KeyRecord) -> tuple[KeyChanges, list[str]]:
    """Return how a form changes a key, and the labels of the fields that change.

    Raises:
        BadRequest: A field cannot be used.
    """
    body: dict[str, Any] = {"name": form.get("name", ""), **_limits_of(form)}
    day = form.get("expires_on", "").strip()
    if day != (record.expires_at or "")[:10]:
        body["expires_at"] = _end_of_day(day) if day else None
    if not body["name"].strip():
        raise InvalidField("name", " must not be empty")
    before = values_of(record)
    named = [name for name in body if name == "expires_at" or body[name] != before[name]]
    return parse_key_change({name: body[name] for name in named}), [LABELS[name].lower() for name in named]


def values_of(record: KeyRecord) -> dict[str, Any]:
    """Return what the form that changes a key holds at first, by the names of the API."""
    return {name: getattr(record, name) for name in ("name", *LIMITS, "bulk", "models")}


def _limits_of(form: Form) -> dict[str, Any]:
    body: dict[str, Any] = {name: _number(form, name) for name in LIMITS}
    body["bulk"] = bool(form.get("bulk"))
    body["models"] = models_in(form)
    if form.get("which") == "some" and not body["models"]:
        raise BadRequest("Choose at least one model, or allow all models", param="models")
    return body


def models_in(form: Form) -> list[str]:
    """Return the models that are chosen in a form: none of them if all are allowed."""
    if form.get("which") != "some":
        return []
    chosen = [name.removeprefix(MODEL) for name in form if name.startswith(MODEL)]
    return [*chosen, *(name for name in map(str.strip, form.get("more_models", "").split(",")) if name)]


def pick_list(known: Collection[str], chosen: Collection[str]) -> tuple[list[tuple[str, bool]], str]:
    """Return the models to choose from with whether each is chosen, and the chosen ones that are not among them, as a text.

    >>> pick_list(["large", "tiny"], ["tiny:latest", "later"])
    ([('large', False), ('tiny', True)], 'later')
    """
    others = [name for name in chosen if not is_among(name, known)]
    return [(name, is_among(name, chosen)) for name in known], ", ".join(others)


def _end_of_day(day: str) -> str:
    try:
        return f"{date.fromisoformat(day).isoformat()}T23:59:59+00:00"
    except ValueError:
        raise InvalidField("expires_at", " must be a date, such as 2026-05-01") from None


def _number(form: Form, name: str) -> int | None:
    text = form.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest(f"{LABELS[name]} must be a whole number", param=name)
    return int(text)
