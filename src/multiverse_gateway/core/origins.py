"""Which web pages may send a request: decided by what browsers say about the page, which no page can forge.

A browser sends a form of any site to any address, without asking first, together with what it knows of the user: cookies that count for
the same site, and a place in the user's network. It asks first (CORS) before it sends anything that no form could send. So requests of
other sites have to be told apart only where their content type is one of a form. Browsers send `Sec-Fetch-Site` to HTTPS and localhost,
and `Origin` with every `POST`; programs send neither.
"""

import re
from collections.abc import Iterable, Mapping

from attrs import frozen

ANY = "*"
_FORM_TYPES = frozenset({b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data"})
"""The content types that a page of any site may send; without one, too."""
_FOREIGN = frozenset({b"cross-site", b"same-site"})
_OWN = frozenset({b"same-origin", b"none"})
_ORIGIN = re.compile(r"(https?)://([^\s/?#@\\]+)")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def normalize_origin(text: str) -> str | None:
    """Return an origin as browsers write it, or `None` for a text that is not an origin: `null`, another scheme, anything unreadable.

    >>> normalize_origin("HTTPS://Class.example:443"), normalize_origin("http://["), normalize_origin("null")
    ('https://class.example', 'http://[', None)
    """
    match = _ORIGIN.fullmatch(text.strip().lower())
    return None if match is None else f"{match[1]}://{match[2].removesuffix(_DEFAULT_PORTS[match[1]])}"


@frozen
class OriginPolicy:
    """The origins that are the gateway's own besides the one that a request names as its host, and those that CORS allows.

    Its methods take headers by their names in lower case.
    """

    public: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()
    """`ANY` stands for all."""

    @classmethod
    def parse(cls, public: Iterable[str], allowed: Iterable[str]) -> "OriginPolicy":
        """Make a policy of origins as people write them; texts that are not origins are left out."""
        return cls(_normalized(public), _normalized(allowed))

    @property
    def allows_any(self) -> bool:
        """Whether pages of every site may use the inference API."""
        return ANY in self.allowed

    def allows(self, origin: bytes) -> bool:
        """Return whether CORS lets a page of an origin use the inference API."""
        if not self.allowed or self.allows_any:
            return bool(self.allowed)
        return normalize_origin(origin.decode("latin-1")) in self.allowed

    def is_own_page(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether a request comes from a page of the gateway; a request that says nothing about it does not."""
        site = headers.get(b"sec-fetch-site")
        if site is not None:
            return site == b"same-origin"
        return self._is_own(headers.get(b"origin", b""), headers)

    def is_foreign_form(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether a `POST` could be a form that a page of another site sent without being allowed to.

        Costs one comparison for JSON. Programs pass, since they send neither `Sec-Fetch-Site` nor `Origin`.
        """
        content_type = headers.get(b"content-type", b"")
        if content_type == b"application/json" or content_type.partition(b";")[0].strip().lower() not in _FORM_TYPES:
            return False
        origin = headers.get(b"origin")
        if origin is not None and self.allows(origin):
            return False
        site = headers.get(b"sec-fetch-site", b"").strip().lower()
        if site in _FOREIGN:
            return True
        return site not in _OWN and origin is not None and not self._is_own(origin, headers)

    def _is_own(self, origin: bytes, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether an origin is ours; a proxy may have taken off TLS, so its scheme need not be that of our own connection."""
        normalized = normalize_origin(origin.decode("latin-1"))
        if normalized is None or normalized in self.public:
            return normalized is not None
        scheme = normalized.partition(":")[0]
        return normalized == normalize_origin(f"{scheme}://{headers.get(b'host', b'').decode('latin-1')}")


def _normalized(origins: Iterable[str]) -> frozenset[str]:
    normalized = (ANY if origin == ANY else normalize_origin(origin.rstrip("/")) for origin in origins)
    return frozenset(origin for origin in normalized if origin is not None)
