"""S1: a registered server, and a page of another site, try to run a script as the operator who is signed in; in a real Chromium."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import attrs
import pytest

from browser.conftest import cookies_of_an_operator
from support import behaviours
from support.backends import Backend, Behaviour, Exchange
from support.processes import GatewayProcess
from support.sockets import serving

pytestmark = pytest.mark.e2e

RAN = "the script of a stranger ran"
SCRIPT = f"console.log('{RAN}'); fetch('/admin/export?include_keys=true')"
MARKUP = f'<html xmlns="http://www.w3.org/1999/xhtml"><body><script>{SCRIPT}</script></body></html>'
SVG = f'<svg xmlns="http://www.w3.org/2000/svg"><script>{SCRIPT}</script></svg>'
XSLT = f'<?xml version="1.0"?><?xml-stylesheet type="text/xsl" href="data:text/xsl,x"?>{MARKUP}'
PARTS = f"--x\r\ncontent-type: text/html\r\n\r\n{MARKUP}\r\n--x--\r\n"
MHTML = f'MIME-Version: 1.0\r\ncontent-type: multipart/related; boundary="x"\r\n\r\n{PARTS}'
PDF = f"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS({SCRIPT})>>>>endobj\ntrailer<</Root 1 0 R>>"
KEY = "sk-of-the-hostile-server"

TYPES: list[tuple[str | None, str]] = [
    ("image/svg+xml", SVG),
    ("IMAGE/SVG+XML", SVG),
    ("  image/svg+xml", SVG),
    ("image/svg+xml ; charset=utf-8", SVG),
    ("text/html", MARKUP),
    ("audio/x+xml", MARKUP),
    ("application/xml", MARKUP),
    ("text/xml;charset=x", XSLT),
    ("text/html;charset=x", MARKUP),
    ("text/javascript", SCRIPT),
    ("application/rss+xml", MARKUP),
    ("application/xhtml+xml", MARKUP),
    ("application/pdf", PDF),
    ("multipart/related; boundary=x", PARTS),
    ("message/rfc822", MHTML),
    ("multipart/x-mixed-replace; boundary=x", PARTS),
    ('text/plain; a="text/html"; <b>', MARKUP),
    ("text/plain, text/html", MARKUP),
    ("text/plain", MARKUP),
    ("*/*", MARKUP),
    ("text/*", MARKUP),
    ("unknown/unknown", MARKUP),
    ("html", MARKUP),
    ("", MARKUP),
    (None, MARKUP),
    (None, SVG),
    (None, PDF),
]
"""What the server calls its answer, and the answer; with each of them browsers have run scripts, or guessed that there are some."""

SUBMIT = """([action, enctype, forms]) => {
    for (const [target, fields] of forms) {
        const form = document.createElement("form");
        Object.assign(form, {method: "post", action, enctype, target});
        for (const [name, value] of fields) {
            const field = document.createElement("input");
            Object.assign(field, {name, value});
            form.append(field);
        }
        document.body.append(form);
        if (target !== "_self") {
            const frame = document.createElement("iframe");
            frame.name = target;
            document.body.append(frame);
        }
        setTimeout(() => form.submit());
    }
}"""
BLANK = "<!doctype html><title>Blank</title><body>"


@attrs.define(eq=False)
class Victim:
    """The browser of an operator who is signed in, and what happened in it."""

    page: Any
    gateway: str
    hostile: Backend
    model: str
    scripts: int = 0
    exports: int = 0

    def watch(self) -> None:
        """Count scripts that ran, wherever, and exports that were asked for."""

        def said(message: Any) -> None:
            self.scripts += RAN in message.text

        def asked(request: Any) -> None:
            self.exports += urlsplit(request.url).path.startswith("/admin/")

        self.page.context.on("console", said)
        self.page.context.on("request", asked)

    def submit(self, path: str, enctype: str = "text/plain", *, case: int = 0) -> Any:
        """Submit a form to the gateway from the page that is shown, and return the answer once the document that it is has been loaded."""
        with self.page.expect_response(lambda answer: urlsplit(answer.url).path == path) as expected:
            self.page.evaluate(SUBMIT, [self.gateway + path, enctype, [["_self", self.fields(enctype, case)]]])
        answer = expected.value
        if not is_saved(answer):
            self.page.wait_for_url(self.gateway + path, wait_until="load")
        return answer

    def submit_all(self, path: str, cases: Sequence[int]) -> list[Any]:
        """Submit a form for each case, each into a frame, and return the answers once all documents among them have been loaded."""
        answers: list[Any] = []

        def is_last(answer: Any) -> bool:
            if urlsplit(answer.url).path == path:
                answers.append(answer)
            return len(answers) == len(cases)

        forms = [[f"frame-{case}", self.fields("text/plain", case)] for case in cases]
        with self.page.expect_event("response", is_last):
            self.page.evaluate(SUBMIT, [self.gateway + path, "text/plain", forms])
        for answer in answers:
            if not is_saved(answer):
                answer.frame.wait_for_url(answer.url, wait_until="load")
        return answers

    def fields(self, enctype: str, case: int) -> list[list[str]]:
        """Return the fields of a form that asks the hostile server for a case."""
        if enctype != "text/plain":
            return [["model", self.model], ["input", str(case)]]
        begin, end = json.dumps({"model": self.model, "input": case, "messages": "VALUE"}).split("VALUE")
        return [[begin, end]]  # written as name=value, it is JSON


def is_saved(answer: Any) -> bool:
    """Return whether the browser saves an answer instead of showing it."""
    return bool(answer.headers["content-type"] == "application/octet-stream")


def told(status: int) -> Behaviour:
    """Return the behavior of a server that answers as the type of the case that the request names."""

    async def act(exchange: Exchange) -> None:
        case = exchange.request.asked("input")
        content_type, body = TYPES[case if isinstance(case, int) else 0]
        await exchange.answer(status, body.encode(), content_type=content_type)

    return act


@pytest.fixture(scope="module")
def hostile(gateway: GatewayProcess) -> Iterator[Backend]:
    """Register a server whose owner is up to no good, with a key that is worth stealing."""
    with Backend("hostile", models=["hostile"]) as backend:
        server_id = gateway.register("hostile", backend.url, api_key=KEY)
        yield backend
        gateway.admin("DELETE", f"/register/{server_id}")


Visit = Callable[..., Victim]


@pytest.fixture(scope="module")
def signed_in_at(chromium: Any, gateway: GatewayProcess) -> Callable[[str], Any]:
    """Return a function that signs in at a name of the gateway, once for all tests, and returns the cookies."""
    return cache(lambda root: cookies_of_an_operator(chromium, root, gateway.admin_key))


@pytest.fixture
def visit(chromium: Any, gateway: GatewayProcess, hostile: Backend, signed_in_at: Callable[[str], Any]) -> Iterator[Visit]:
    """Return a function that opens the browser of an operator at an address; at the end nothing may have run or been exported."""
    victims: list[Victim] = []

    def new(url: str, *, at: str = "127.0.0.1") -> Victim:
        root = gateway.url.replace("127.0.0.1", at)
        context = chromium.new_context(storage_state=signed_in_at(root), accept_downloads=False)
        for address in (f"{root}/blank", "http://evil.example/", "http://127.0.0.1:9/", "http://sister.gateway.test/"):
            context.route(address, lambda route: route.fulfill(body=BLANK, content_type="text/html"))
        victim = Victim(context.new_page(), root, hostile, "hostile")
        victims.append(victim)
        victim.page.goto(url.replace("GATEWAY", root))
        victim.watch()
        return victim

    yield new
    for victim in victims:
        victim.page.context.close()
        assert (victim.scripts, victim.exports) == (0, 0)


@pytest.mark.parametrize("content_type", ["image/svg+xml", "text/html", "application/xhtml+xml", "application/xml", None])
def test_the_attack_works_where_nothing_is_done_about_it(chromium: Any, content_type: str | None) -> None:
    """The answers do run their script when a browser gets them from the server itself: so the tests below would notice."""
    body = dict(TYPES)[content_type] if content_type else MARKUP
    with Backend("hostile", behaviours.answer(400, body.encode(), content_type=content_type)) as backend:
        victim = Victim(chromium.new_page(), backend.url, backend, "hostile")
        victim.watch()
        victim.page.goto(f"{backend.url}/v1/audio/speech")
        assert victim.scripts == 1
        victim.page.close()


@pytest.mark.parametrize(
    ("status", "path"),
    [
        (200, "/v1/audio/speech"),
        (400, "/v1/audio/speech"),
        (400, "/v1/chat/completions"),
        (422, "/v1/images/generations"),
        (200, "/v1/some/thing"),
    ],
)
def test_no_answer_of_a_server_is_a_document_of_the_gateway(visit: Visit, hostile: Backend, status: int, path: str) -> None:
    """Even if a form of our own origin asked for it: whatever its type, status and path, no script in it runs."""
    hostile.behave = told(status)
    victim = visit("GATEWAY/blank")
    cases = [case for case, (kind, _) in enumerate(TYPES) if status != 200 or "html" not in (kind or "")]  # a good answer is no page
    before = hostile.hits
    answers = victim.submit_all(path, cases)
    assert hostile.hits == before + len(cases), "the server was asked"
    assert {answer.status for answer in answers} == {status}
    assert {answer.headers["content-security-policy"] for answer in answers} == {"sandbox; default-src 'none'"}


@pytest.mark.parametrize(
    ("status", "content_type"),
    [(200, "image/svg+xml"), (200, "text/html"), (400, "application/xhtml+xml"), (404, None), (500, "text/html")],
)
def test_nor_does_one_run_that_is_the_whole_page(visit: Visit, hostile: Backend, status: int, content_type: str | None) -> None:
    """A good answer, a wrong one, not found, broken: relayed or in our own words."""
    hostile.behave = told(status)
    victim = visit("GATEWAY/blank")
    answer = victim.submit(f"/v1/whole/{status}/{content_type is None}", case=[kind for kind, _ in TYPES].index(content_type))
    assert answer.status in (status, 502, 504)


@pytest.mark.parametrize(
    ("at", "page"),
    [
        ("127.0.0.1", "http://evil.example/"),
        ("127.0.0.1", "http://127.0.0.1:9/"),
        ("gateway.test", "http://evil.example/"),
        ("gateway.test", "http://sister.gateway.test/"),
    ],
)
def test_a_form_of_another_site_does_not_even_reach_the_server(visit: Visit, hostile: Backend, at: str, page: str) -> None:
    """Whether the browser says so itself (HTTPS, localhost) or names the page's origin only (HTTP)."""
    victim = visit(page, at=at)
    hostile.behave = told(200)
    before = hostile.hits
    for enctype in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        victim.page.goto(page)
        answer = victim.submit("/v1/audio/speech", enctype)
        assert (answer.status, answer.json()["error"]["code"]) == (403, "foreign_form")
    assert hostile.hits == before


SEND = """async ([url, model]) => {
    const body = JSON.stringify({model, input: 0, messages: []});
    const bodies = [body, new Blob([body]), new Blob([body], {type: "application/json"}), new URLSearchParams({model}), new FormData()];
    for (const sent of bodies) {
        const options = {method: "POST", mode: "no-cors", credentials: "include", body: sent};
        await fetch(url, options).catch(() => null);
        await fetch(url, {...options, headers: {"content-type": "application/json"}}).catch(() => null);
    }
}"""


def test_nor_does_what_a_script_of_another_site_sends(visit: Visit, hostile: Backend) -> None:
    """Without asking first, it can send text, forms and bodies without a type; what it calls JSON is sent as text, or not at all."""
    with Backend("site", behaviours.answer(200, BLANK.encode(), content_type="text/html")) as site:
        victim = visit(f"{site.url}/")
        hostile.behave = told(200)
        before = hostile.hits
        statuses: list[int] = []
        victim.page.on("response", lambda answer: statuses.append(answer.status))
        victim.page.evaluate(SEND, [f"{victim.gateway}/v1/audio/speech", victim.model])
        assert hostile.hits == before
        assert set(statuses) == {403}


def test_the_session_shows_no_key_even_to_a_script_of_our_own_origin(visit: Visit) -> None:
    """Should a script run there after all, what it can fetch holds no key of a server."""
    victim = visit("GATEWAY/blank")
    fetched = victim.page.evaluate(
        """async () => {
            const paths = ["/admin/export?include_keys=true", "/admin/export", "/admin/servers", "/admin/logs", "/admin/keys", "/settings"];
            const answers = await Promise.all(paths.map((path) => fetch(path)));
            return Promise.all(answers.map(async (answer) => [answer.status, await answer.text()]));
        }"""
    )
    assert [status for status, _ in fetched] == [403, 200, 200, 200, 200, 200]
    assert all(KEY not in text for _, text in fetched)
    victim.exports = 0


ASK = """async ([url, model, headers]) => {
    try {
        const answer = await fetch(url, {method: "POST", headers, body: JSON.stringify({model, messages: []})});
        return [answer.status, answer.headers.get("x-gateway-server-id"), answer.headers.get("x-should-retry")];
    } catch {
        return null;
    }
}"""


@pytest.mark.parametrize(("settings", "leave"), [({}, False), ({"ENABLE_CORS": "true"}, True)])
def test_a_page_of_another_origin_uses_the_api_only_with_leave(chromium: Any, settings: dict[str, str], leave: bool) -> None:
    """51: one setting lets every page in, by either spelling of the base URL and with any header; it reads the gateway's headers, too."""
    backend, site = Backend("well", models=["tiny"]), Backend("site", behaviours.answer(200, BLANK.encode(), content_type="text/html"))
    with GatewayProcess(settings) as gateway, serving(backend, site):
        server_id = gateway.register("tiny", backend.url)
        context = chromium.new_context()
        page = context.new_page()
        page.goto(f"{site.url}/")
        headers = {"content-type": "application/json", "authorization": "Bearer none", "x-stainless-os": "Linux"}
        for base in (f"{gateway.url}/v1", gateway.url):
            for model, found in (("tiny", [200, server_id, None]), ("nobody-has-this", [404, None, "false"])):
                answer = page.evaluate(ASK, [f"{base}/chat/completions", model, headers])
                assert answer == (found if leave else None)
        assert backend.hits == 2 * leave
        context.close()


def test_an_operator_exports_with_the_admin_key(
    chromium: Any, gateway: GatewayProcess, hostile: Backend, signed_in_at: Callable[[str], Any]
) -> None:
    """The page Settings asks for it again; a wrong one is refused in words, the right one brings the file."""
    context = chromium.new_context(storage_state=signed_in_at(gateway.url))
    page = context.new_page()
    page.goto(f"{gateway.url}/settings")
    page.get_by_label("Admin key again").fill("a-wrong-key-of-sixteen")
    page.get_by_role("button", name="Export with keys").click()
    page.get_by_text("Wrong key.").wait_for()
    page.get_by_label("Admin key again").fill(gateway.admin_key)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export with keys").click()
    assert download.value.suggested_filename == "multiverse-servers.json"
    exported = json.loads(download.value.path().read_text())
    assert KEY in [server.get("api_key") for server in exported["servers"]]
    context.close()
