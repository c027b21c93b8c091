"""Read the fields of a form (RFC 7578) that decide how a request is routed.

1. A form that two parsers could read differently is rejected: one with an odd boundary, with a field twice, with text before or after it,
   with an encoding, or with parameters that need decoding.
2. A form may be hostile. The cost grows with the number of its parts, of which there may be `MAX_FORM_PARTS`, and with the size of their
   heads; files are only searched for the boundary.
"""

from __future__ import annotations

import re

from multiverse_gateway.core.envelope import EnvelopeError

MAX_FORM_PARTS = 256
"""Most fields and files in one form."""

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*({_TOKEN})=(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))[ \t]*')
_HEADER = re.compile(rf"({_TOKEN}):[ \t]*([^\r\n\0]*)")
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_FIELDS = frozenset({"model", "stream"})
_TRUTH = {"true": True, "1": True, "false": False, "0": False, "": False}
_MAX_PART_HEAD = 8192


def is_form(content_type: str) -> bool:
    """Return whether a body of this type is read as a form; every other body is read as JSON, and servers must be told so.

    >>> is_form("Multipart/form-data; boundary=x"), is_form("application/x-www-form-urlencoded")
    (True, False)
    """
    return content_type[:10].lower() == "multipart/"


def text_of(body: bytes, form: dict[str, slice], name: str) -> str | None:
    """Return the text of a field, given where the form has its fields; `None` if it does not have this one.

    Raises:
        EnvelopeError: It is not UTF-8.
    """
    try:
        return body[form[name]].decode() if name in form else None
    except UnicodeDecodeError:
        raise EnvelopeError(f"The field {name} is not UTF-8; encode it as UTF-8", name) from None


def truth_of(text: str | None) -> bool | str | None:
    """Return the boolean that a text stands for; a text that stands for none is returned as it is."""
    return None if text is None else _TRUTH.get(text.lower(), text)


def read_form(content_type: str, body: bytes) -> dict[str, slice]:
    """Return where a form has the values of its fields `model` and `stream`, as far as it has them.

    Raises:
        EnvelopeError: The form is malformed, or could be read in more than one way.
    """
    delimiter = b"\r\n--" + _boundary(content_type)
    fields: dict[str, slice] = {}
    if not body.startswith((delimiter, delimiter[2:])):
        raise EnvelopeError("The form does not begin with its boundary; send multipart/form-data as clients build it")
    at = len(delimiter) if body.startswith(delimiter) else len(delimiter) - 2
    for _ in range(MAX_FORM_PARTS):
        if body.startswith(b"--", at):
            if body[at + 2 :].strip():
                raise EnvelopeError("The form continues after its closing boundary; send one form only")
            return fields
        head_end = body.find(b"\r\n\r\n", at, at + _MAX_PART_HEAD)
        end = body.find(delimiter, head_end + 4)
        if not body.startswith(b"\r\n", at) or head_end < 0 or end < 0:
            raise EnvelopeError("The form is cut off or malformed; send multipart/form-data as clients build it")
        name = _part_name(body[at + 2 : head_end])
        if name in fields:
            raise EnvelopeError(f"The form names {name} twice; send it once", name)
        if name in _FIELDS:
            fields[name] = slice(head_end + 4, end)
        at = end + len(delimiter)
    raise EnvelopeError(f"The form has too many parts; send at most {MAX_FORM_PARTS - 1}")


def _boundary(content_type: str) -> bytes:
    kind, parameters = _parameters(content_type)
    boundary = parameters.get("boundary", "")
    if kind != "multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise EnvelopeError("The Content-Type cannot be read; send multipart/form-data with its boundary, or application/json")
    if parameters.get("charset", "utf-8").lower() != "utf-8":
        raise EnvelopeError("The form is not UTF-8; encode it as UTF-8")
    return boundary.encode()


def _part_name(head: bytes) -> str:
    try:
        headers = [_header(line) for line in head.decode().split("\r\n")]
    except UnicodeDecodeError:
        raise EnvelopeError("A part of the form has a head that is not UTF-8; encode it as UTF-8") from None
    dispositions = [value for key, value in headers if key == "content-disposition"]
    encodings = {value.lower() for key, value in headers if key == "content-transfer-encoding"}
    if len(dispositions) != 1 or encodings - {"7bit", "8bit", "binary"}:
        raise EnvelopeError("A part of the form has no plain Content-Disposition; send multipart/form-data as clients build it")
    kind, parameters = _parameters(dispositions[0])
    name = parameters.get("name", "")
    if kind != "form-data" or not name or "\\" in name or "name*" in parameters:
        raise EnvelopeError("A part of the form has no plain name; send multipart/form-data as clients build it")
    if name in _FIELDS and not parameters.keys().isdisjoint({"filename", "filename*"}):
        raise EnvelopeError(f"The field {name} is sent as a file; send it as plain text", name)
    return name


def _header(line: str) -> tuple[str, str]:
    match = _HEADER.fullmatch(line)
    if match is None:
        raise EnvelopeError("A part of the form has a malformed head; send multipart/form-data as clients build it")
    return match[1].lower(), match[2].rstrip(" \t")


def _parameters(value: str) -> tuple[str, dict[str, str]]:
    """Split a header value into its first word and its parameters, names in lower case; no parameters if one is malformed."""
    kind, semicolon, _ = value.partition(";")
    parameters: dict[str, str] = {}
    at = len(kind) if semicolon else len(value)
    while at < len(value):
        match = _PARAMETER.match(value, at)
        if match is None or match[1].lower() in parameters:
            return kind, {}
        parameters[match[1].lower()] = match[3] if match[2] is None else match[2]
        at = match.end()
    return kind.strip().lower(), parameters
