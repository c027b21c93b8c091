"""Who is signed in to the pages: sessions, the forms that change something, and the sign-in link of the first start.

1. A session stands in the store, so that every process knows it; the browser holds only its token, and of the token only the hash is kept.
2. A token from a browser is never adopted: signing in always makes a new one.
3. Whatever changes something needs both an origin of our own and a token that no other site can read.
4. While the store cannot be written, who signs in is known to this process only, and who signs out is out here at once.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress

import attrs
from itsdangerous import BadData, URLSafeSerializer

from multiverse_gateway.admin_key import key_digest
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.core.origins import OriginPolicy
from multiverse_gateway.entry.identity import Headers
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.pages.masking import unmasked
from multiverse_gateway.settings.policies import origin_policy

SESSION_SECONDS = 12 * 3600.0
LINK_SECONDS = 15 * 60.0
NOTE_SECONDS = 60
TOKEN_HEADER = b"x-csrf-token"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_SESSION = "mvg_session"
_FORM = "mvg_form"
_NONCE = re.compile(r"[A-Za-z0-9_-]{32}")
_NOTE = "mvg_note"
_LINK = "link"
_ONCE = "once"
_log = logging.getLogger("multiverse_gateway.ui")


@attrs.frozen
class Session:
    """One browser that signed in. `token` goes into forms and scripts of our pages; `digest` is what the store knows of it."""

    digest: str
    token: str = attrs.field(repr=False)

    def note(self, kind: str, message: str) -> str:
        """Return the header that lets the next page say something: kind (success, error, warning, info) and words."""
        return set_cookie(_NOTE, self._notes.dumps([kind, message]), secure=False, max_age=NOTE_SECONDS)

    def noted(self, headers: Headers) -> tuple[str, str] | None:
        """Return what the page has to say, if a page of this session noted anything; `end_note` takes it away."""
        for value in cookie_values(headers, _NOTE):
            with suppress(BadData):
                kind, message = self._notes.loads(value)
                return kind, message
        return None

    @property
    def _notes(self) -> URLSafeSerializer:
        return URLSafeSerializer(self.token, salt=_NOTE, signer_kwargs={"digest_method": hashlib.sha256})


def end_note() -> str:
    """Return the header that takes away what was noted for a page."""
    return set_cookie(_NOTE, "", secure=False, max_age=0)


def cookie_name(name: str, *, secure: bool) -> str:
    """Return a cookie's name: over TLS with the prefix that keeps other hosts and plain HTTP from setting it."""
    return f"__Host-{name}" if secure else name


def cookie_values(headers: Headers, name: str) -> Iterator[str]:
    """Find the values of a cookie, in the order of the request; cookies of other applications are skipped, whatever they look like.

    Other applications on the host, or on its domain, may set cookies that no parser reads, and cookies of our names. So none of them may
    hide ours: who looks for a cookie tries each value.

    >>> list(cookie_values([(b"cookie", b'prefs={"a":1}; mvg=x; =; mvg=y')], "mvg"))
    ['x', 'y']
    """
    wanted = name.encode()
    for header, text in headers:
        if header == b"cookie":
            for pair in text.split(b";"):
                raw_name, _, value = pair.partition(b"=")
                if raw_name.strip(b" \t") == wanted:
                    yield value.strip(b" \t").decode("latin-1")


def set_cookie(name: str, value: str, *, secure: bool, max_age: int) -> str:
    """Return the header that sets a cookie which scripts cannot read and other sites' forms do not send."""
    ending = "; Secure" if secure else ""
    return f"{cookie_name(name, secure=secure)}={value}; HttpOnly; Max-Age={max_age}; Path=/; SameSite=Lax{ending}"


def _hash(purpose: str, token: str) -> str:
    """Return what is kept of a token; another purpose makes another value of it."""
    return key_digest(f"{purpose}\0{token}").hex()


@attrs.define(eq=False)
class Sessions:
    """The sessions of a gateway."""

    gateway: Gateway = attrs.field(repr=False)
    origins: OriginPolicy = attrs.field(init=False, repr=False)
    _here: dict[str, float] = attrs.field(factory=dict, init=False)
    """What the store could not be told: sessions, and until when they last; 0 for those that were closed."""

    @origins.default
    def _of_settings(self) -> OriginPolicy:
        return origin_policy(self.gateway.settings)

    # Sessions

    async def open(self, *, secure: bool = False) -> str:
        """Begin a session and return the token for its cookie."""
        token = secrets.token_urlsafe(32)
        await self._keep(_hash(cookie_name(_SESSION, secure=secure), token), SESSION_SECONDS)
        return token

    async def _keep(self, digest: str, seconds: float) -> None:
        now = self.gateway.wall()
        self._here = {
            name: until for name, until in self._here.items() if until > now or name in self.gateway.registrations.registry.sessions
        }
        try:
            await self.gateway.store.open_session(digest, now + seconds)
            await self.gateway.refresh()
        except StorageUnavailable:
            self._here[digest] = now + seconds
            _log.warning("a session could not be saved; it counts in this process only")

    def find(self, headers: Headers) -> Session | None:
        """Return the session that a request belongs to, if it still lasts."""
        for name, token in _tokens(headers):
            session = Session(_hash(name, token), _hash("csrf", token))
            if self.lasts(session):
                return session
        return None

    async def seek(self, headers: Headers) -> Session | None:
        """Do the same; another process may have opened it a moment ago."""
        session = self.find(headers)
        if session is None and any(_tokens(headers)):
            with suppress(StorageUnavailable):
                await self.gateway.refresh()
            session = self.find(headers)
        return session

    def lasts(self, session: Session) -> bool:
        """Return whether a session is neither ended nor over."""
        return self._until(session.digest) > self.gateway.wall()

    def _until(self, digest: str) -> float:
        here = self._here.get(digest)
        return self.gateway.registrations.registry.sessions.get(digest, 0.0) if here is None else here

    def seconds_left(self, session: Session) -> int:
        """Return for how many seconds a session still lasts."""
        return max(0, int(self._until(session.digest) - self.gateway.wall()))

    async def extend(self, session: Session, headers: Headers) -> str | None:
        """Let a session last its full time again, in every process, and return the token of its cookie, which stays the same.

        Return `None` for a session that has ended, perhaps in another process a moment ago.
        """
        with suppress(StorageUnavailable):
            await self.gateway.refresh()
        if not self.lasts(session):
            return None
        token = next(token for name, token in _tokens(headers) if _hash(name, token) == session.digest)
        await self._keep(session.digest, SESSION_SECONDS)
        return token

    async def close(self, session: Session) -> None:
        """End a session, in every process."""
        await self._end(session.digest)

    async def _end(self, digest: str) -> bool:
        """Return whether this call was what ended it."""
        if self._until(digest) <= self.gateway.wall():
            return False
        try:
            was_kept = await self.gateway.store.close_session(digest)
            await self.gateway.refresh()
        except StorageUnavailable:
            self._here[digest] = 0.0
            _log.warning("the end of a session could not be saved; it is ended in this process only")
            return True
        return self._here.pop(digest, 0.0) > 0 or was_kept

    def cookie(self, token: str, *, secure: bool) -> str:
        """Return the header that hands a session to its browser."""
        return set_cookie(_SESSION, token, secure=secure, max_age=int(SESSION_SECONDS))

    def end_cookie(self, *, secure: bool) -> str:
        """Return the header that takes it away."""
        return set_cookie(_SESSION, "", secure=secure, max_age=0)

    # Changing something

    def stands_for_key(self, method: str, headers: Headers) -> bool:
        """Return whether a request of our own scripts carries a session, and for unsafe methods what proves that it is theirs."""
        session = self.find(headers)
        if session is None:
            return False
        sent = dict(headers).get(TOKEN_HEADER, b"").decode("latin-1")
        return method in SAFE_METHODS or self.may_change(session, headers, sent)

    def may_change(self, session: Session, headers: Headers, token: str) -> bool:
        """Return whether an unsafe request is one of our own pages'."""
        return self.origins.is_own_page(dict(reversed(headers))) and hmac.compare_digest(session.token.encode(), unmasked(token).encode())

    # The link of the first start

    async def create_link(self) -> str:
        """Return a token that signs in once, within a quarter of an hour."""
        token, digest = new_link()
        await self._keep(digest, LINK_SECONDS)
        return token

    async def use_link(self, token: str) -> bool:
        """Take a link's token; true the first time only. Another process may have made it a moment ago."""
        return await self._use(_hash(_LINK, token))

    # What may be used once

    async def keep_once(self, token: str, seconds: float) -> None:
        """Let a token be used once, in whatever process, within so many seconds."""
        await self._keep(_hash(_ONCE, token), seconds)

    async def use_once(self, token: str) -> bool:
        """Use a token of `keep_once`; true the first time only."""
        return await self._use(_hash(_ONCE, token))

    async def _use(self, digest: str) -> bool:
        if self._until(digest) <= self.gateway.wall():
            with suppress(StorageUnavailable):
                await self.gateway.refresh()
        return await self._end(digest)


def new_link() -> tuple[str, str]:
    """Return the token of a new sign-in link, and its hash, under which a store keeps it like a session, for `LINK_SECONDS`."""
    token = secrets.token_urlsafe(32)
    return token, _hash(_LINK, token)


def _tokens(headers: Headers) -> Iterator[tuple[str, str]]:
    """Find what could be a session's token, and the name of its cookie: only over TLS the one with the prefix can be set."""
    for secure in (True, False):
        name = cookie_name(_SESSION, secure=secure)
        for token in cookie_values(headers, name):
            yield name, token


# The form to sign in with, which nobody has a session for yet


def form_token(headers: Headers) -> tuple[str, str]:
    """Return a secret for a cookie, the one that is there if any, and the token that belongs to it in the form."""
    nonce = next(_nonces(headers), None) or secrets.token_urlsafe(24)
    return nonce, _hash(_FORM, nonce)


def _nonces(headers: Headers) -> Iterator[str]:
    """Find the form's secrets: only what we could have made, since it goes into a header again."""
    for secure in (True, False):
        for nonce in cookie_values(headers, cookie_name(_FORM, secure=secure)):
            if _NONCE.fullmatch(nonce):
                yield nonce


def form_cookie(nonce: str, *, secure: bool) -> str:
    """Return the header that sets the form's secret."""
    return set_cookie(_FORM, nonce, secure=secure, max_age=int(SESSION_SECONDS))


def is_own_form(headers: Headers, token: str, origins: OriginPolicy) -> bool:
    """Return whether the sign-in form came from our own page in the same browser."""
    if not origins.is_own_page(dict(reversed(headers))):
        return False
    return any(hmac.compare_digest(_hash(_FORM, nonce).encode(), token.encode()) for nonce in _nonces(headers))
