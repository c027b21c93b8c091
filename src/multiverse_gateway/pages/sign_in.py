"""Decide who may see a page or change something, and serve the form for signing in."""

import logging
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import parse_qsl, urlencode

import attrs
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from multiverse_gateway.admin_key import is_known, key_digest
from multiverse_gateway.core.errors import BadRequest, GatewayError
from multiverse_gateway.entry.headers import path_of
from multiverse_gateway.entry.identity import is_secure, presented_keys, verified
from multiverse_gateway.entry.quotas import LocalWindow
from multiverse_gateway.entry.request_bodies import ClientGone, read_body
from multiverse_gateway.pages.compression import compressed
from multiverse_gateway.pages.masking import masked
from multiverse_gateway.pages.rendering import Handler, Renderer, Visit
from multiverse_gateway.pages.server_form import Form, message_of
from multiverse_gateway.pages.sessions import SAFE_METHODS, form_cookie, form_token, is_own_form
from multiverse_gateway.web.middleware import ADDRESS

MAX_SIGN_INS = 10
MAX_FIELDS = 1000

_CHALLENGE = 'Bearer realm="Multiverse Gateway"'
"""What RFC 9110 asks for with a 401. Browsers show no window of their own for it, as they would for `Basic`."""
_TOO_OLD = "This page has expired"
_log = logging.getLogger("multiverse_gateway.ui")


@attrs.frozen
class WrongKey:
    """Why the admin key that was typed into a form is not accepted: in words, with the status to answer with.

    `wait` is the number of seconds after which another attempt is possible, 0 for at once.
    """

    status: int
    message: str
    wait: int = 0


class SignIn:
    """Sign-in: operators use a session or the admin key; visitors see public pages without either."""

    def __init__(self, renderer: Renderer, admin_digests: Callable[[], Collection[bytes]]) -> None:
        self._renderer = renderer
        self._sessions = renderer.sessions
        self._admin_digests = admin_digests
        self._sign_ins = LocalWindow(MAX_SIGN_INS)

    def routes(self) -> list[Route]:
        """Return the routes for signing in and out."""
        return [
            Route("/login", self._login, methods=["GET", "POST"], name="ui:login"),
            Route("/logout", self.operators(self._logout), methods=["POST"], name="ui:logout"),
            Route("/session", self.operators(self._session_token), name="ui:session"),
            Route("/session/stay", self.operators(self._stay), methods=["POST"], name="ui:stay"),
        ]

    def operators(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint for operators only."""
        return self._protected(handler, visitors=False)

    def visitors_if_public(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint for operators and, if the dashboard is public, for visitors."""
        return self._protected(handler, visitors=self._renderer.gateway.settings.public_dashboard)

    def visitors(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint for operators and visitors."""
        return self._protected(handler, visitors=True)

    def _protected(self, handler: Handler, *, visitors: bool) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            headers = request.scope["headers"]
            session = await self._sessions.seek(headers)
            visit = Visit(request, session, is_operator=session is not None)
            try:
                has_key = session is None and self._has_key(request)
                visit.is_operator = visit.is_operator or has_key
                if not visit.is_operator and not visitors:
                    return self.ask_to_sign_in(visit)
                if request.method not in SAFE_METHODS:
                    visit.form = await self.read_form(request)
                    sent = request.headers.get("x-csrf-token") or visit.form.get("csrf", "")
                    if not has_key and (session is None or not self._sessions.may_change(session, headers, sent)):
                        return self._renderer.problem(visit, 403, _TOO_OLD, "Nothing was changed. Reload the page and try again.")
                return await compressed(await handler(visit), request.headers)
            except ClientGone:
                raise
            except GatewayError as error:
                return self._renderer.refuse(visit, error)
            except Exception:  # noqa: BLE001  a page says so in words; the log has the rest
                return self._renderer.problem(visit, 500, *self._renderer.failed(visit))

        return serve

    def _has_key(self, request: Request) -> bool:
        """Return whether a request carries the admin key; a wrong one counts as on `/admin`."""
        headers = request.scope["headers"]
        if verified(headers, self._admin_digests()) is not None:
            return True
        if presented_keys(headers):
            self._renderer.rules.count_wrong_admin_key(request.scope.get(ADDRESS, "unknown"))
            _log.warning("key refused", extra={"fields": {"address": request.scope.get(ADDRESS)}})
        return False

    async def read_form(self, request: Request) -> Form:
        """Read the fields of a form that was sent.

        Raises:
            GatewayError: The form is too large, too slow, or cannot be read.
        """
        settings = self._renderer.gateway.settings
        body = await read_body(
            request.receive, settings.max_admin_body_bytes, settings.client_body_timeout_seconds, headers=request.scope["headers"]
        )
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
        except ValueError:
            raise BadRequest("The form cannot be read; reload the page and try again") from None
        return dict(pairs)

    def ask_to_sign_in(self, visit: Visit) -> Response:
        """Lead a browser to the form to sign in; tell a program, or a script of a page, that a key is needed."""
        request = visit.request
        if visit.is_fragment or "text/html" not in request.headers.get("accept", ""):
            login = self._renderer.url(request, "login")
            message = f"This page is for operators. Sign in at {login} in a browser, or send the admin key in the header X-API-Key.\n"
            return Response(message, 401, {"cache-control": "no-store", "www-authenticate": _CHALLENGE}, media_type="text/plain")
        wanted = path_of(request.scope)
        if request.scope["query_string"]:
            wanted += f"?{request.scope['query_string'].decode('latin-1')}"
        query = urlencode({"next": wanted}) if request.method == "GET" and wanted not in ("/", "/dashboard") else ""
        return self._renderer.redirect(request, "login", query)

    async def _login(self, request: Request) -> Response:
        headers = request.scope["headers"]
        visit = Visit(request, await self._sessions.seek(headers))
        visit.is_operator = visit.session is not None
        if request.method == "POST":
            return await self._sign_in(visit)
        token = request.query_params.get("token")
        if token is not None and request.method == "GET" and "prefetch" not in request.headers.get("sec-purpose", ""):
            if await self._sessions.use_link(token):
                return await self._signed_in(visit, "")
            return self._login_page(visit, 403, "This sign-in link has expired or was already used. Sign in with the admin key.")
        if visit.session is not None:
            return self._renderer.redirect(request, "dashboard")
        return self._login_page(visit)

    async def _sign_in(self, visit: Visit) -> Response:
        request = visit.request
        try:
            form = await self.read_form(request)
        except GatewayError as error:
            return self._login_page(visit, error.status, message_of(error))
        visit.form = form
        if not is_own_form(request.scope["headers"], form.get("form_token", ""), self._sessions.origins):
            return self._login_page(visit, 403, f"{_TOO_OLD}. Send the key again.")
        wrong = self.judge_key(request, form.get("key", ""))
        if wrong is not None:
            return self._login_page(visit, wrong.status, wrong.message, wait=wrong.wait)
        return await self._signed_in(visit, form.get("next", ""))

    def judge_key(self, request: Request, key: str) -> WrongKey | None:
        """Return why a key that was typed into a form is not accepted, or `None` for the admin key.

        Each call counts as an attempt of its address, so that keys cannot be guessed; call it once per form.
        """
        address = request.scope.get(ADDRESS, "unknown")
        quota = self._sign_ins.hit(address, self._renderer.gateway.now())
        if not quota.allowed:
            wait = quota.wait_seconds
            return WrongKey(429, f"Too many attempts from your address. Try again in {wait} s.", wait)
        if not is_known(key_digest(key.strip()), self._admin_digests()):
            _log.warning("sign-in refused", extra={"fields": {"address": address}})
            return WrongKey(403, "Wrong key. Look for the admin key in the gateway's first start-up message.")
        return None

    def _login_page(self, visit: Visit, status: int = 200, problem: str = "", *, wait: int = 0) -> Response:
        request = visit.request
        nonce, token = form_token(request.scope["headers"])
        wanted = visit.form.get("next") or request.query_params.get("next", "")
        response = self._renderer.page(
            attrs.evolve(visit, is_operator=False, session=None),
            "login.html",
            status=status,
            problem=problem,
            form_token=token,
            next=_own_path(wanted),
            wait=wait,
        )
        if wait:
            response.headers["retry-after"] = str(wait)
        secure = is_secure(request.scope, self._renderer.rules.trusted)
        response.headers.append("set-cookie", form_cookie(nonce, secure=secure))
        return response

    async def _signed_in(self, visit: Visit, wanted: str) -> Response:
        request = visit.request
        secure = is_secure(request.scope, self._renderer.rules.trusted)
        if visit.session is not None:
            await self._sessions.close(visit.session)
        token = await self._sessions.open(secure=secure)
        _log.info("signed in", extra={"fields": {"address": request.scope.get(ADDRESS)}})
        path = _own_path(wanted)
        url = str(request.scope.get("root_path", "")).rstrip("/") + path if path else self._renderer.url(request, "dashboard")
        response = RedirectResponse(url, 303, {"cache-control": "no-store"})
        response.headers.append("set-cookie", self._sessions.cookie(token, secure=secure))
        return response

    async def _logout(self, visit: Visit) -> Response:
        request = visit.request
        if visit.session is not None:
            await self._sessions.close(visit.session)
        response = self._renderer.redirect(request, "login")
        response.headers.append("set-cookie", self._sessions.end_cookie(secure=is_secure(request.scope, self._renderer.rules.trusted)))
        response.headers["clear-site-data"] = '"cache"'
        return response

    async def _session_token(self, visit: Visit) -> Response:
        """Give our own scripts the token of a session that began in another tab; other origins cannot read the answer."""
        token, left = ("", 0) if visit.session is None else (masked(visit.session.token), self._sessions.seconds_left(visit.session))
        return JSONResponse({"token": token, "seconds_left": left}, headers={"cache-control": "no-store"})

    async def _stay(self, visit: Visit) -> Response:
        """Let the session last its full time again."""
        request = visit.request
        if visit.session is None:
            return self._renderer.problem(visit, 400, "There is no session", "A request with the admin key needs none.")
        token = await self._sessions.extend(visit.session, request.scope["headers"])
        if token is None:
            return self.ask_to_sign_in(visit)
        response = await self._session_token(visit)
        secure = is_secure(request.scope, self._renderer.rules.trusted)
        response.headers.append("set-cookie", self._sessions.cookie(token, secure=secure))
        return response


def _own_path(text: str) -> str:
    """Return a path of ours to go to after signing in, or nothing: no other host, no control characters.

    >>> _own_path("/logs?level=ERROR"), _own_path("//evil.example"), _own_path("https://evil.example"), _own_path("/\\\\evil.example")
    ('/logs?level=ERROR', '', '', '')
    """
    is_ours = text.startswith("/") and text[1:2] not in ("/", "\\") and text.isprintable() and text.isascii() and "\\" not in text
    return text if is_ours and len(text) < 1000 and not text.startswith("/login") else ""
