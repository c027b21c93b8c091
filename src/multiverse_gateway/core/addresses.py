"""Which texts name a server, and which addresses may be dialed.

A name is judged twice: its text once, when it is registered (`parse_endpoint`), and every address it resolves to again at
each connect (`refusal_of_any`), because the answer of a resolver changes. The caller then dials the very address judged.

1. An IPv4 address is open unless it lies in an IANA special-purpose range.
2. An IPv6 address is closed unless it lies in 2000::/3, less the parts of it that tunnel or document.
3. A setting may open private ranges and loopback. Nothing opens the rest.
4. While only this computer can reach the gateway, one server may also dial the one loopback address and port that the operator opened for
   it (`with_opening`). This opens neither other ports nor other servers, and no host name, because a name can lead elsewhere tomorrow.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Self

from attrs import evolve, field, frozen

from multiverse_gateway.core.paths import CALLS

MAX_URL_LENGTH = 2048
"""Longest accepted URL, in characters."""

_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_AUTHORITY = re.compile(r"(?:\[(?P<six>[^\[\]]*)\]|(?P<name>[^\[\]:]*))(?::(?P<port>.*))?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PREFIX = re.compile(r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)*")
_HIDDEN = re.compile(r"/\.{1,2}(?:/|$)|%(?:[01][0-9A-F]|2[0EF5]|5C|7F)", re.IGNORECASE)
_DEVIATING = "\u00df\u03c2\u200c\u200d"
"""Letters which IDNA 2003 and 2008 turn into different names (UTS 46, section 7)."""


class EndpointError(ValueError):
    """A text that cannot be the URL of a server: why, and what to write instead."""


@frozen
class Endpoint:
    """Name the place of a server's API; the paths of requests, `/v1/...`, are appended to it.

    `host` is ASCII, IDNA-encoded and in lower case, an IPv6 address without brackets; `prefix` is "" or begins with "/".
    `is_opened` says that the operator opened this loopback address and port for the server that is dialed; no URL can say that.
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""
    is_opened: bool = field(default=False, repr=False)

    @property
    def tls(self) -> bool:
        """Return whether the connection is encrypted."""
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """Write the `Host` header (RFC 9110, 7.2): a default port is left out, an IPv6 address stands in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Write the one canonical text of this endpoint, without a "/" at the end.

        >>> parse_endpoint("HTTP://GPU-7.Uni.Example:80/v1/").url
        'http://gpu-7.uni.example'
        """
        return f"{self.scheme}://{self.authority}{self.prefix}"


def parse_endpoint(text: str) -> Endpoint:
    """Read the URL of a server as a person writes it.

    White space around it and a final "/", "/v1" or "/v1/" are dropped, any other path is kept as prefix.
    `parse_endpoint(endpoint.url) == endpoint` always holds.

    >>> parse_endpoint("https://[2001:DB8::1]:8443/api/v1")
    Endpoint(scheme='https', host='2001:db8::1', port=8443, prefix='/api')

    Raises:
        EndpointError: It is not http or https, carries a user, query or fragment, its port is privileged, or its host is
            written in a form that two programs could read as two different hosts.
    """
    text = text.strip()
    if not text:
        raise EndpointError("The URL is empty; write the server's address, such as http://host:8000")
    if len(text) > MAX_URL_LENGTH:
        raise EndpointError(f"The URL is too long; write at most {MAX_URL_LENGTH} characters")
    if " " in text or not text.isprintable():
        raise EndpointError("The URL contains white space or an invisible character; remove it")
    if "\\" in text:
        raise EndpointError('The URL contains a backslash; write "/" instead')
    match = _SCHEME.match(text)
    if match is None:
        if text.lower().startswith(("http:", "https:")):
            raise EndpointError('Write "//" after the scheme, such as http://host:8000')
        raise EndpointError("The URL has no scheme; put http:// or https:// in front of it, such as http://host:8000")
    scheme = match[1].lower()
    if scheme not in _PORTS:
        raise EndpointError(f"The scheme {scheme} cannot be used; write an http:// or https:// URL")
    if "?" in text or "#" in text:
        raise EndpointError('The URL has a query or fragment; remove the "?" or "#" and everything after it')
    authority, slash, path = text[match.end() :].partition("/")
    if "@" in authority:
        raise EndpointError('The URL contains a user name or password; remove everything up to the "@", and register the key as api_key')
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise EndpointError("The host cannot be read; write http://host:port, an IPv6 address in brackets: http://[2001:db8::1]:8000")
    host = _host(parts["name"]) if parts["six"] is None else _ipv6(parts["six"])
    return Endpoint(scheme, host, _port(parts["port"], scheme), _prefix(slash + path))


_CALLS = (
    *sorted(CALLS, key=len, reverse=True),
    "/v1/models",
    "/chat/completions",
    "/completions",
    "/responses",
    "/messages",
    "/api/chat",
    "/api/generate",
    "/api/tags",
    "/api/embed",
)
"""Ends of URLs that people copy from examples; a path such as `/embeddings` may as well be that of a whole server behind a proxy."""


def parse_root(text: str) -> Endpoint:
    """Read the URL of a server's root, as registering asks for it: one that ends in the path of a call is rejected.

    >>> parse_root("http://host:8000/models/v1").url
    'http://host:8000/models'

    Raises:
        EndpointError: As for `parse_endpoint`, or the URL is that of a call.
    """
    endpoint = parse_endpoint(text)
    prefix = endpoint.prefix.rstrip("/")
    call = next((call for call in _CALLS if prefix.endswith(call)), None)
    if call is not None:
        root = evolve(endpoint, prefix=_prefix(prefix.removesuffix(call)))
        raise EndpointError(f"The URL ends in the path of a call; write the server's root, {root.url}")
    return endpoint


LOCAL_HOST = "127.0.0.1"
"""The only host that the operator can open for a server."""


def with_opening(endpoint: Endpoint, opened_address: str | None) -> Endpoint:
    """Return the endpoint, marked as opened if it is exactly the address and port that the operator opened for its server.

    >>> with_opening(parse_endpoint("http://127.0.0.1:11434"), "127.0.0.1:11434").is_opened
    True
    >>> with_opening(parse_endpoint("http://localhost:11434"), "127.0.0.1:11434").is_opened
    False
    """
    if opened_address is None or endpoint.host != LOCAL_HOST or opened_address != f"{LOCAL_HOST}:{endpoint.port}":
        return endpoint
    return evolve(endpoint, is_opened=True)


def _port(text: str | None, scheme: str) -> int:
    if text is None:
        return _PORTS[scheme]
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise EndpointError("The port is not a number from 1 to 65535; write it plainly, such as http://host:8000")
    port = int(text)
    if port < 1024 and port not in _PORTS.values():
        raise EndpointError(f"Port {port} cannot be used; let the server listen on port 80, 443, or 1024 to 65535")
    return port


def _prefix(path: str) -> str:
    while path.endswith(("/", "/v1")) and not path.endswith("//"):
        path = path.removesuffix("/").removesuffix("/v1")
    if not _PREFIX.fullmatch(path):
        raise EndpointError('The path contains "//" or a character that no URL may contain; write a simple path such as /api')
    if _HIDDEN.search(path):
        raise EndpointError('The path contains ".", ".." or an encoded separator; write the path that the server uses')
    return path


def _ipv6(text: str) -> str:
    if "%" in text:
        raise EndpointError("The IPv6 address has a zone; write an address without one, or a host name")
    try:
        address = IPv6Address(text)
    except ValueError:
        raise EndpointError("The address in brackets is not an IPv6 address; write it as in http://[2001:db8::1]:8000") from None
    if address.ipv4_mapped is not None:
        raise EndpointError(f"The IPv6 address contains an IPv4 address; write {address.ipv4_mapped} instead")
    return str(address)


def _host(text: str) -> str:
    if not text:
        raise EndpointError("The URL has no host; write the server's name or address, such as http://host:8000")
    host = (text if text.isascii() else _idna(text)).lower()
    labels = host.split(".")
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise EndpointError('The host is not a valid name; use letters, digits and "-", separated by single dots, without a dot at the end')
    if _NUMERIC.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise EndpointError("The host ends in a number but is not an IPv4 address; write four decimals, such as 192.0.2.7") from None
    return host


def _idna(text: str) -> str:
    name = text.lower()
    if (
        unicodedata.normalize("NFKC", name) != name
        or any(char in _DEVIATING for char in name)
        or any(unicodedata.category(char)[0] not in "LM" for char in name if not char.isascii())
    ):
        raise EndpointError('The host contains look-alike characters; write its plain or its "xn--" form')
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError:
        raise EndpointError('The host is not a valid international name; write its "xn--" form') from None


class AddressRefusal(StrEnum):
    """Why an address must not be dialed. The value is what people read; programs compare members."""

    PRIVATE = "private address"
    LOOPBACK = "loopback"
    LINK_LOCAL = "link-local"
    METADATA = "metadata address"
    UNSPECIFIED = "unspecified"
    RESERVED = "reserved"
    MULTICAST = "multicast"
    BROADCAST = "broadcast"
    V4_MAPPED = "v4-mapped address"
    SCOPED = "scoped address"
    NOT_AN_ADDRESS = "not an address"
    NO_ADDRESS = "no address"
    OWN_LISTENER = "own listener"
    CLOSED_AGAIN = "loopback that was open only while no other computer could reach the gateway"

    @property
    def is_openable(self) -> bool:
        """Return whether `ALLOW_PRIVATE_NETWORKS` can allow such an address; metadata services, for one, stay closed."""
        return self in _OPENABLE


_PRIVATE, _LOOPBACK = AddressRefusal.PRIVATE, AddressRefusal.LOOPBACK
_LINK_LOCAL, _METADATA, _RESERVED = AddressRefusal.LINK_LOCAL, AddressRefusal.METADATA, AddressRefusal.RESERVED
_OPENABLE = frozenset({_PRIVATE, _LOOPBACK, AddressRefusal.CLOSED_AGAIN})

_IPV4: tuple[tuple[str, AddressRefusal | None], ...] = (
    ("0.0.0.0/0", None),
    ("0.0.0.0/8", AddressRefusal.UNSPECIFIED),
    ("10.0.0.0/8", _PRIVATE),
    ("100.64.0.0/10", _PRIVATE),
    ("100.100.100.200/32", _METADATA),
    ("127.0.0.0/8", _LOOPBACK),
    ("168.63.129.16/32", _METADATA),
    ("169.254.0.0/16", _LINK_LOCAL),
    ("169.254.169.254/32", _METADATA),
    ("172.16.0.0/12", _PRIVATE),
    ("192.0.0.0/24", _RESERVED),
    ("192.0.0.192/32", _METADATA),
    ("192.0.2.0/24", _RESERVED),
    ("192.31.196.0/24", _RESERVED),
    ("192.52.193.0/24", _RESERVED),
    ("192.88.99.0/24", _RESERVED),
    ("192.168.0.0/16", _PRIVATE),
    ("192.175.48.0/24", _RESERVED),
    ("198.18.0.0/15", _RESERVED),
    ("198.51.100.0/24", _RESERVED),
    ("203.0.113.0/24", _RESERVED),
    ("224.0.0.0/4", AddressRefusal.MULTICAST),
    ("240.0.0.0/4", _RESERVED),
    ("255.255.255.255/32", AddressRefusal.BROADCAST),
)
_IPV6: tuple[tuple[str, AddressRefusal | None], ...] = (
    ("::/0", _RESERVED),
    ("::/128", AddressRefusal.UNSPECIFIED),
    ("::1/128", _LOOPBACK),
    ("::ffff:0:0/96", AddressRefusal.V4_MAPPED),
    ("2000::/3", None),
    ("2001::/23", _RESERVED),
    ("2001:db8::/32", _RESERVED),
    ("2002::/16", _RESERVED),
    ("3fff::/20", _RESERVED),
    ("fc00::/7", _PRIVATE),
    ("fd00:42::42/128", _METADATA),
    ("fd00:ec2::23/128", _METADATA),
    ("fd00:ec2::254/128", _METADATA),
    ("fd20:ce::254/128", _METADATA),
    ("fe80::/10", _LINK_LOCAL),
    ("ff00::/8", AddressRefusal.MULTICAST),
)
"""The most specific network decides: the last one in the table that contains an address."""


def _ranges(table: tuple[tuple[str, AddressRefusal | None], ...]) -> tuple[list[int], list[AddressRefusal | None]]:
    """Flatten nested networks into the first number of each range and its reason, for bisection."""
    networks = [(ip_network(text), reason) for text, reason in table]
    bounds = [(int(network[0]), int(network[-1]), reason) for network, reason in networks]
    starts = sorted({first for first, _, _ in bounds} | {last + 1 for _, last, _ in bounds})[:-1]
    return starts, [[reason for first, last, reason in bounds if first <= start <= last][-1] for start in starts]


_STARTS4, _REASONS4 = _ranges(_IPV4)
_STARTS6, _REASONS6 = _ranges(_IPV6)
_OPENABLE_NETWORKS = tuple(ip_network(text) for text, reason in _IPV4 + _IPV6 if reason in _OPENABLE)


@frozen
class AddressPolicy:
    """State which addresses may be dialed beyond the public ones, and which are the gateway itself.

    `allow_private` opens every private range and loopback, `networks` only what lies in them. `own` holds the address and
    port of each listener; one on "0.0.0.0" or "::" stands for loopback and for every address named in `own`. `honors_openings` says
    that only this computer can reach the gateway, so that a server may dial what the operator opened for it.

    Raises:
        ValueError: `own` names a host where an address belongs.
    """

    allow_private: bool = False
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    own: frozenset[tuple[str, int]] = field(default=frozenset())
    honors_openings: bool = False

    @own.validator
    def _own_are_addresses(self, _: object, own: frozenset[tuple[str, int]]) -> None:
        for host, _port in own:
            ip_address(host)

    @classmethod
    def parse(cls, text: str, *, own: frozenset[tuple[str, int]] = frozenset(), honors_openings: bool = False) -> Self:
        """Read the setting `ALLOW_PRIVATE_NETWORKS`: "", "false", "true" or networks with commas between them.

        >>> AddressPolicy.parse("10.0.0.0/8, fd00::/8").networks
        (IPv4Network('10.0.0.0/8'), IPv6Network('fd00::/8'))

        Raises:
            ValueError: An item is not a network, or contains addresses that no setting can open.
        """
        word = text.strip().lower()
        if word in ("", "false", "true"):
            return cls(allow_private=word == "true", own=own, honors_openings=honors_openings)
        networks = tuple(_network(item.strip()) for item in word.split(","))
        return cls(networks=networks, own=own, honors_openings=honors_openings)


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        network = ip_network(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a network ({error}); write true, false or networks such as 10.0.0.0/8,fd00::/8") from None
    if not any(network[0] in private and network[-1] in private for private in _OPENABLE_NETWORKS):
        raise ValueError(f"{text} cannot be opened; write true, or networks inside {', '.join(map(str, _OPENABLE_NETWORKS))}")
    return network


LOCALHOST_MEANS = "localhost means the gateway's computer, not yours. Use your computer's address or a tunnel."
"""What a person reads who writes an address that leads every computer to itself."""


def names_this_computer(host: str) -> bool:
    """Return whether the host of an endpoint leads every computer to itself: a loopback address, "localhost" or 0.0.0.0.

    >>> [names_this_computer(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "gpu.localhost", "gpu.example")]
    [True, True, True, True, True, False]
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host in _OWN_NAMES or host.endswith(".localhost")  # RFC 6761, 6.3
    return address.is_loopback or address.is_unspecified


_OWN_NAMES = frozenset({"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"})


def explained(refusal: AddressRefusal) -> str:
    """Return a refusal with the setting that would allow the address, if one would.

    >>> explained(AddressRefusal.PRIVATE), explained(AddressRefusal.METADATA)
    ('private address, which needs ALLOW_PRIVATE_NETWORKS', 'metadata address')
    """
    return f"{refusal}, which needs ALLOW_PRIVATE_NETWORKS" if refusal.is_openable else str(refusal)


def refusal(address: str, port: int, policy: AddressPolicy, *, is_opened: bool = False) -> AddressRefusal | None:
    """Return why this address must not be dialed, or None if it may be.

    Called at every connect with what the resolver answered; `is_opened` is that of the endpoint. Source: IANA special-purpose address
    registries.

    >>> refusal("127.0.0.1", 8000, AddressPolicy())
    <AddressRefusal.LOOPBACK: 'loopback'>
    >>> refusal("127.0.0.1", 8000, AddressPolicy(allow_private=True)) is None
    True
    """
    if "%" in address:
        return AddressRefusal.SCOPED
    try:
        ip = IPv6Address(address) if ":" in address else IPv4Address(address)
    except ValueError:
        return AddressRefusal.NOT_AN_ADDRESS
    if policy.own and _is_own(ip, port, policy.own):
        return AddressRefusal.OWN_LISTENER
    if isinstance(ip, IPv4Address):
        reason = _REASONS4[bisect_right(_STARTS4, int(ip)) - 1]
    else:
        reason = _REASONS6[bisect_right(_STARTS6, int(ip)) - 1]
    if reason in _OPENABLE and (policy.allow_private or any(ip in network for network in policy.networks)):
        return None
    if is_opened and address == LOCAL_HOST:
        return None if policy.honors_openings else AddressRefusal.CLOSED_AGAIN
    return reason


def refusal_of_any(addresses: Sequence[str], port: int, policy: AddressPolicy, *, is_opened: bool = False) -> AddressRefusal | None:
    """Return the first refusal among all answers of a resolver: one bad answer condemns the name.

    >>> refusal_of_any(["93.184.215.14", "10.0.0.1"], 443, AddressPolicy())
    <AddressRefusal.PRIVATE: 'private address'>
    """
    if not addresses:
        return AddressRefusal.NO_ADDRESS
    for address in addresses:
        reason = refusal(address, port, policy, is_opened=is_opened)
        if reason is not None:
            return reason
    return None


def _is_own(ip: IPv4Address | IPv6Address, port: int, own: frozenset[tuple[str, int]]) -> bool:
    listening = {ip_address(host) for host, at in own if at == port}
    if ip in listening:
        return True
    everywhere = any(address.is_unspecified for address in listening)
    return everywhere and (ip.is_loopback or ip in {ip_address(host) for host, _ in own})
