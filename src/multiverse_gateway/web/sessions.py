"""Who is signed in to the pages: sessions, the forms that change something, and the sign-in link of the first start.

1. A session lives in memory; the browser holds only its token, and of the token only the hash is kept.
2. A token from a browser is never adopted: signing in always makes a new one.
3. Whatever changes something needs both an origin of our own and a token that no other site can read.
"""

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

import attrs

from multiverse_gateway.web.security import Headers

SESSION_SECONDS = 12 * 3600.0
LINK_SECONDS = 15 * 60.0
MAX_SESSIONS = 1000
MAX_NOTES = 5
TOKEN_HEADER = b"x-csrf-token"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_PLAIN = "mvg_session"
_FORM = "mvg_form"


@attrs.define(eq=False)
class Session:
    """One browser that signed in. `token` goes into forms and scripts of our pages; `ends_at` is monotonic; `secure`: over TLS."""

    token: str = attrs.field(repr=False)
    ends_at: float
    secure: bool = False
    notes: list[tuple[str, str]] = attrs.field(factory=list)
    """What the next page tells: kind (success, error, warning, info) and words."""

    def note(self, kind: str, words: str) -> None:
        """Let the next page say something."""
        self.notes = [*self.notes, (kind, words)][-MAX_NOTES:]

    def take_notes(self) -> list[tuple[str, str]]:
        """Return what the page has to say, once."""
        notes, self.notes = self.notes, []
        return notes


def cookie_name(name: str, *, secure: bool) -> str:
    """Return a cookie's name: over TLS with the prefix that keeps other hosts and plain HTTP from setting it."""
    return f"__Host-{name}" if secure else name


def cookies(headers: Headers) -> Mapping[str, str]:
    """Return the cookies of a request; what cannot be read counts for nothing."""
    jar: SimpleCookie = SimpleCookie()
    for name, value in headers:
        if name == b"cookie":
            try:
                jar.load(value.decode("latin-1"))
            except CookieError:
                continue
    return {name: morsel.value for name, morsel in jar.items()}


def set_cookie(name: str, value: str, *, secure: bool, max_age: int) -> str:
    """Return the header that sets a cookie which scripts cannot read and other sites' forms do not send."""
    ending = "; Secure" if secure else ""
    return f"{cookie_name(name, secure=secure)}={value}; HttpOnly; Max-Age={max_age}; Path=/; SameSite=Lax{ending}"


def is_own_origin(headers: Headers) -> bool:
    """Tell whether a request comes from a page of ours, by what browsers say and pages cannot forge.

    `Sec-Fetch-Site` decides where it is sent (HTTPS and localhost), else `Origin` must name the host that was asked.
    """
    found = dict(headers)
    site = found.get(b"sec-fetch-site")
    if site is not None:
        return site == b"same-origin"
    origin, host = found.get(b"origin", b""), found.get(b"host", b"")
    return bool(host) and urlsplit(origin.decode("latin-1")).netloc.lower() == host.decode("latin-1").lower()


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


@attrs.define(eq=False)
class Sessions:
    """All sessions of this process, at most `MAX_SESSIONS`: the one that was opened first goes first."""

    now: Callable[[], float]
    _sessions: OrderedDict[bytes, Session] = attrs.field(factory=OrderedDict, init=False)
    _links: dict[bytes, float] = attrs.field(factory=dict, init=False)
    _secret: bytes = attrs.field(factory=lambda: secrets.token_bytes(32), init=False, repr=False)

    def __len__(self) -> int:
        return len(self._sessions)

    # Sessions

    def open(self, *, secure: bool = False) -> tuple[str, Session]:
        """Begin a session and return the token for its cookie."""
        self._forget_ended()
        token = secrets.token_urlsafe(32)
        session = Session(secrets.token_urlsafe(32), self.now() + SESSION_SECONDS, secure)
        self._sessions[_hash(token)] = session
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return token, session

    def find(self, headers: Headers) -> Session | None:
        """Return the session that a request belongs to, if it still lasts."""
        for token, secure in self._tokens(headers):
            session = self._sessions.get(_hash(token))
            if session is not None and session.secure is secure and session.ends_at > self.now():
                return session
        return None

    def close(self, headers: Headers) -> None:
        """End the session that a request belongs to."""
        for token, _ in self._tokens(headers):
            self._sessions.pop(_hash(token), None)

    def lasts(self, session: Session) -> bool:
        """Tell whether a session is neither ended nor over."""
        return session.ends_at > self.now() and any(other is session for other in self._sessions.values())

    def _tokens(self, headers: Headers) -> Iterator[tuple[str, bool]]:
        """Find what could be a session's token, and whether its cookie could only be set over TLS."""
        found = cookies(headers)
        for secure in (True, False):
            name = cookie_name(_PLAIN, secure=secure)
            if name in found:
                yield found[name], secure

    def _forget_ended(self) -> None:
        for digest in [digest for digest, session in self._sessions.items() if session.ends_at <= self.now()]:
            del self._sessions[digest]

    def cookie(self, token: str, *, secure: bool) -> str:
        """Return the header that hands a session to its browser."""
        return set_cookie(_PLAIN, token, secure=secure, max_age=int(SESSION_SECONDS))

    def end_cookie(self, *, secure: bool) -> str:
        """Return the header that takes it away."""
        return set_cookie(_PLAIN, "", secure=secure, max_age=0)

    # Changing something

    def stands_for_key(self, method: str, headers: Headers) -> bool:
        """Tell whether a request of our own scripts carries a session, and for unsafe methods what proves that it is theirs."""
        session = self.find(headers)
        if session is None:
            return False
        sent = dict(headers).get(TOKEN_HEADER, b"").decode("latin-1")
        return method in SAFE_METHODS or self.may_change(session, headers, sent)

    def may_change(self, session: Session, headers: Headers, token: str) -> bool:
        """Tell whether an unsafe request is one of our own pages'."""
        return is_own_origin(headers) and hmac.compare_digest(session.token.encode(), token.encode())

    # The form to sign in with, which nobody has a session for yet

    def form_token(self, headers: Headers) -> tuple[str, str]:
        """Return a secret for a cookie, the one that is there if any, and the token that belongs to it in the form."""
        found = cookies(headers)
        nonce = found.get(cookie_name(_FORM, secure=True)) or found.get(_FORM) or secrets.token_urlsafe(24)
        return nonce, self._sign(nonce)

    def form_cookie(self, nonce: str, *, secure: bool) -> str:
        """Return the header that sets the form's secret."""
        return set_cookie(_FORM, nonce, secure=secure, max_age=int(SESSION_SECONDS))

    def is_own_form(self, headers: Headers, token: str) -> bool:
        """Tell whether the sign-in form came from our own page in the same browser."""
        found = cookies(headers)
        nonces = [found[name] for name in (cookie_name(_FORM, secure=True), _FORM) if name in found]
        return is_own_origin(headers) and any(hmac.compare_digest(self._sign(nonce).encode(), token.encode()) for nonce in nonces)

    def _sign(self, nonce: str) -> str:
        return hmac.new(self._secret, nonce.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()

    # The link of the first start

    def create_link(self) -> str:
        """Return a token that signs in once, within a quarter of an hour."""
        token = secrets.token_urlsafe(32)
        self._links[_hash(token)] = self.now() + LINK_SECONDS
        return token

    def use_link(self, token: str) -> bool:
        """Take a link's token; true the first time only."""
        return self._links.pop(_hash(token), 0.0) > self.now()
