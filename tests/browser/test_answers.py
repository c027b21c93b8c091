"""Answers in the playground: Markdown that a person can read, and hostile Markdown that stays harmless."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from browser.conftest import DESKTOP, PHONE, SETTINGS, Watched, cookies_of_an_operator
from browser.test_every_page import check
from support import answers, behaviours
from support.backends import Backend
from support.processes import GatewayProcess
from support.sockets import serving, wait_until

pytestmark = pytest.mark.e2e

MODEL = "writer"
WIDE = " | ".join(f"a rather wide column {number}" for number in range(8))
ANSWER = f"""### Steps

Use **bold**, `inline code` and a [link](https://example.org/page). The area is $a_1*b$ and \\(x_1*x_2\\).

1. First
2. Second
   - inside

$$
\\sum_{{i=1}}^n x_i \\\\
- y
$$

| {WIDE} |
|:-:|{"--|" * 7}
| {" | ".join(["value"] * 8)} |

> A quotation.

```python
def a_function_with_a_long_name(first_argument, second_argument, third_argument):  # a comment that needs room
    return "text" if first_argument > 12 else None
```

# Next

| a | b |
|---|---|
| 1 | 2 |

```python
pass
```

The end."""

PAYLOADS = (
    # HTML and event handlers
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><svg/onload=window.hacked=1>',
    "<svg><script>window.hacked=1</script></svg>",
    "<svg><animate onbegin=window.hacked=1 attributeName=x dur=1s>",
    '<svg><use href="data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImhhY2tlZD0xIj4="/></svg>',
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<iframe src=javascript:parent.hacked=1></iframe>",
    "<body onload=window.hacked=1><details open ontoggle=window.hacked=1>",
    "<input autofocus onfocus=window.hacked=1><video><source onerror=window.hacked=1></video>",
    "<style>@import 'https://evil.example/style.css';</style><link rel=stylesheet href=https://evil.example/a.css>",
    "<base href=https://evil.example/><meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<object data=https://evil.example/a.swf></object><embed src=https://evil.example/a.swf>",
    "<form action=https://evil.example/><button>Go</button></form><a id=talk name=hacked>clobbers</a>",
    "<b style=\"background:url('https://evil.example/a.png')\">styled</b>",
    # Markup that browsers change when they read it twice
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.hacked=1&gt;">',
    '<noscript><p title="</noscript><img src=x onerror=window.hacked=1>">',
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=window.hacked=1>",
    '<svg></p><style><a id="</style><img src=1 onerror=window.hacked=1>">',
    "<template><script>window.hacked=1</script></template><plaintext><xmp><!--><img src=x onerror=window.hacked=1>-->",
    "<![CDATA[><img src=x onerror=window.hacked=1>]]> <?php window.hacked=1 ?> <!doctype html>",
    # Links
    "[click](javascript:window.hacked=1)",
    "[click](JaVaScRiPt:window.hacked=1)",
    "[click](java\tscript:window.hacked=1) [click](<java\nscript:window.hacked=1>)",
    "[click](&#106;avascript:window.hacked=1) [click](javascript&colon;window.hacked=1)",
    "[click](\x01javascript:window.hacked=1) [click](%6aavascript:window.hacked=1)",
    "[click](data:text/html;base64,PHNjcmlwdD5vcGVuZXIuaGFja2VkPTE8L3NjcmlwdD4=)",
    "[click](vbscript:window.hacked=1) [click](file:///etc/passwd) [click](blob:https://evil.example/1)",
    "[click](//evil.example/) [click](/logout) [click](#talk) [click](https:evil.example)",
    "<javascript:window.hacked=1> <data:text/html,x>",
    '[click](https://example.org/" onmouseover=window.hacked=1 ")',
    "[click](https://example.org/ \"' onclick=window.hacked=1 x='\")",
    "[click][evil]\n\n[evil]: javascript:window.hacked=1 'title'",
    # Pictures
    "![picture](https://evil.example/beacon.png)",
    "![picture](http://evil.example/beacon.svg 'title')",
    '![picture"onerror="window.hacked=1](https://evil.example/a.png)',
    "![picture](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImhhY2tlZD0xIj4=)",
    "[![picture](https://evil.example/a.png)](javascript:window.hacked=1)",
    # Code, tables and formulas
    "```html\n<img src=x onerror=window.hacked=1><script>window.hacked=1</script>\n```",
    '```"><img/src=x/onerror=window.hacked=1>\ncode\n```',
    "```../../../evil\ncode\n```\n\n```__proto__\ncode\n```\n\n```constructor\ncode\n```",
    "`<img src=x onerror=window.hacked=1>`",
    "| <img src=x onerror=window.hacked=1> | b |\n|:-:|--|\n| <svg onload=window.hacked=1> | x |",
    "$<img src=x onerror=window.hacked=1>$ \\(<svg onload=window.hacked=1>\\)\n\n$$\n<script>window.hacked=1</script>\n$$",
    "# <img src=x onerror=window.hacked=1>",
    "{{7*7}} ${window.hacked=1} <%= 1 %>",
)
SAFE = """() => {
  const talk = document.getElementById("talk");
  const found = [];
  const known = new Set(("A ASIDE BLOCKQUOTE BR BUTTON CODE DEL DETAILS DIV EM H2 H3 H4 H5 H6 HR LI OL P PRE S SPAN STRONG SUMMARY TABLE "
    + "TBODY TD TH THEAD TR UL").split(" "));
  for (const node of talk.querySelectorAll("*")) {
    if (!known.has(node.tagName)) found.push(node.outerHTML);
    for (const { name, value } of node.attributes) {
      if (name.startsWith("on") || name === "style" || name === "src" || name === "srcset") found.push(node.outerHTML);
    }
  }
  for (const link of talk.querySelectorAll(".prose a")) {
    const isWeb = /^(https?:\\/\\/|mailto:)/.test(link.getAttribute("href") ?? "");
    if (!isWeb || !link.relList.contains("noopener") || link.target !== "_blank") found.push(link.outerHTML);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def room() -> Iterator[tuple[GatewayProcess, Backend]]:
    """Return a gateway with a model whose server says what a test wants."""
    backend = Backend("pat", models=[MODEL])
    with GatewayProcess(SETTINGS) as gateway, serving(backend):
        gateway.register(MODEL, backend.url)
        yield gateway, backend


@pytest.fixture(scope="module")
def cookies(chromium: Any, room: tuple[GatewayProcess, Backend]) -> Any:
    """Return the cookies of an operator."""
    return cookies_of_an_operator(chromium, room[0].url, room[0].admin_key)


@pytest.fixture
def playground(browse_at: Callable[..., Watched], room: tuple[GatewayProcess, Backend], cookies: Any) -> Callable[..., Watched]:
    """Return a function that opens the playground in a window of its own."""

    def new(**options: Any) -> Watched:
        watched = browse_at(room[0].url, cookies, **options)
        watched.open(f"/playground?model={MODEL}")
        return watched

    return new


def told(text: str, *, size: int = 0, **delta: Any) -> behaviours.Behaviour:
    """Stream a text, in pieces of this many characters; more parts of the first delta come before it."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)] if size else [text]
    events = [answers.chat_event("pat", MODEL, {"role": "assistant", **delta})] if delta else []
    events += [answers.chat_event("pat", MODEL, {"content": piece}) for piece in pieces]
    return behaviours.stream([*events, answers.chat_event("pat", MODEL, {}, finish="stop"), answers.DONE])


def ask(watched: Watched, text: str = "Hello") -> Any:
    """Send a message and return the box of its answer once it is complete."""
    page = watched.page
    number = page.locator(".message-box.assistant").count()
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()
    box = page.locator(".message-box.assistant").nth(number)
    box.locator(".measures").get_by_text("in all").wait_for()
    return box


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_an_answer_in_markdown(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend], viewport: dict[str, int]) -> None:
    """Headings, lists, tables, code and formulas are readable; wide ones scroll inside themselves, and the page never does."""
    room[1].behave = told(ANSWER, size=7)
    watched = playground(viewport=viewport)
    prose = ask(watched).locator(".prose")
    prose.locator(".code .hljs-keyword").first.wait_for()
    assert prose.locator("h3").all_text_contents() == ["Steps", "Next"]
    assert prose.locator("strong").all_text_contents() == ["bold"]
    assert prose.locator("ol > li").count() == 2
    assert prose.locator("ol ul > li").all_text_contents() == ["inside"]
    assert prose.locator(".formula").all_text_contents() == ["$a_1*b$", "\\(x_1*x_2\\)", "$$\n\\sum_{i=1}^n x_i \\\\\n- y\n$$"]
    assert prose.locator("th").count() == 10
    link = prose.get_by_role("link", name="link")
    assert (link.get_attribute("href"), link.get_attribute("rel")) == ("https://example.org/page", "noopener noreferrer nofollow")
    wide = "(box) => [box.scrollWidth > box.clientWidth, box.getBoundingClientRect().right <= innerWidth]"
    assert prose.locator(".scroller").first.evaluate(wide) == [True, True]
    assert prose.locator("pre").first.evaluate(wide)[1]
    assert watched.page.locator("#talk").evaluate("(talk) => talk.scrollWidth <= talk.clientWidth")
    check(watched, f"answer-{'phone' if viewport is PHONE else 'desktop'}")


def test_code_and_the_answer_are_copied_as_written(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend]) -> None:
    """The block's button copies its code, the answer's button its Markdown."""
    room[1].behave = told(ANSWER)
    watched = playground(permissions=["clipboard-read", "clipboard-write"])
    box = ask(watched)
    box.get_by_role("button", name="Copy python code").first.click()
    box.get_by_text("Copied").wait_for()
    copied = "() => navigator.clipboard.readText()"
    assert watched.page.evaluate(copied) == ANSWER.split("```python\n")[1].split("```")[0]
    box.get_by_role("button", name="Copy the answer").click()
    wait_until(lambda: watched.page.evaluate(copied) == ANSWER)


def test_a_growing_answer_changes_only_its_last_block(playground: Callable[..., Watched]) -> None:
    """What has been read, selected or scrolled stays: blocks before the last one keep their nodes."""
    watched = playground()
    kept = watched.page.evaluate(
        """async (text) => {
          const { writer } = await import(new URL("./markdown.js", document.querySelector("script[src*=playground]").src));
          const place = document.createElement("div");
          let renderings = 0;
          const page = writer(place, () => { renderings += 1; });
          page.end(text);
          const before = [...place.children];
          for (let at = 1; at < 400; at += 1) page.write(`${text}\\n\\nmore ${"words ".repeat(at)}`);
          page.end(`${text}\\n\\nmore *words*`);
          const after = [...place.children];
          const isKept = before.every((node, at) => node === after[at]);
          return [isKept, after.length - before.length, place.lastElementChild.textContent, renderings];
        }""",
        ANSWER,
    )
    assert kept == [True, 1, "more words", 2]


def test_hostile_answers_run_nothing_and_load_nothing(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend]) -> None:
    """Each payload alone, then all of them cut into pieces of one character."""
    watched = playground()
    page = watched.page
    for payload in PAYLOADS:
        room[1].behave = told(payload)
        ask(watched)
        assert page.evaluate(SAFE) == [], payload
        page.get_by_role("button", name="New chat").click()
    room[1].behave = told("\n\n".join(PAYLOADS), size=1)
    ask(watched)
    assert page.evaluate(SAFE) == []
    assert page.evaluate("() => window.hacked") is None
    assert len(page.context.pages) == 1


@pytest.mark.parametrize("error", [{"message": "Too long a prompt."}, {"message": [{"text": "Too long a prompt."}]}, "Too long a prompt."])
def test_the_words_of_an_error_are_shown(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend], error: Any) -> None:
    """Before and within a stream, in whatever shape they come: a sentence of our own only stands in for missing ones."""
    watched = playground()
    body = answers.packed({"error": error})
    begun = answers.chat_event("pat", MODEL, {"content": "So"})
    for behave in (behaviours.answer(400, body), behaviours.stream([begun, b"data: %s\n\n" % body, answers.DONE])):
        room[1].behave = behave
        trouble = ask(watched).locator(".trouble").text_content() or ""
        assert trouble.startswith("Too long a prompt.")
    watched.troubles[:] = [trouble for trouble in watched.troubles if "status of 400" not in trouble]


def test_hostile_text_elsewhere_stays_text(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend]) -> None:
    """In errors before and within a stream, in the name of a model, in what a person writes, and in a role."""
    backend = room[1]
    watched = playground()
    page = watched.page
    for payload in PAYLOADS:
        error = answers.packed({"error": {"message": payload, "type": "invalid_request_error", "param": None, "code": None}})
        backend.behave = behaviours.answer(400, error)
        box = ask(watched, payload)
        assert page.evaluate(SAFE) == [], payload
        assert box.locator(".text > *").count() == 0
        page.get_by_role("button", name="New chat").click()
        page.get_by_label("Your message").fill("")
    everything = " ".join(PAYLOADS)
    begun = answers.chat_event("pat", MODEL, {"role": everything, "content": "So"})
    backend.behave = behaviours.stream([begun, b"data: %s\n\n" % json.dumps({"error": {"message": everything}}).encode(), answers.DONE])
    ask(watched)
    assert page.evaluate(SAFE) == []
    page.evaluate(
        """(name) => {
          const option = document.getElementById("model-1").cloneNode();
          option.id = "hostile";
          option.dataset.name = option.textContent = name;
          document.getElementById("models").append(option);
        }""",
        everything,
    )
    page.get_by_label("Model", exact=True).click()
    page.locator("#hostile").click()
    page.get_by_label("Your message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    page.locator(".message-box.failed").last.get_by_text("status 4").wait_for()
    assert page.evaluate(SAFE) == []
    assert page.evaluate("() => window.hacked") is None
    watched.troubles[:] = [trouble for trouble in watched.troubles if "status of 4" not in trouble]  # the errors of this test


def box_of(watched: Watched, number: int = 0) -> Any:
    """Return the box of an answer."""
    return watched.page.locator(".message-box.assistant").nth(number)


REASONED = {
    "reasoning_content": told("The answer.", reasoning_content="First *this*."),
    "reasoning": told("The answer.", reasoning="First *this*."),
    "parts": told("The answer.", reasoning_content=[{"type": "text", "text": "First *this*."}]),
    "tags": told("\n<think>\nFirst *this*.\n</think>\n\nThe answer.", size=1),
    "thinking": told("<thinking>First *this*.</thinking>The answer.", size=3),
    "no opening tag": told("First *this*.\n</think>\n\nThe answer.", size=4),
}


@pytest.mark.parametrize("kind", REASONED)
def test_reasoning_is_folded(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend], kind: str) -> None:
    """Whether it has a field of its own or stands between tags; it is no part of the answer that is copied or sent again."""
    room[1].behave = REASONED[kind]
    watched = playground(permissions=["clipboard-read", "clipboard-write"])
    box = ask(watched)
    assert box.locator(".text").text_content() == "The answer."
    fold = box.locator("details.thoughts")
    assert re.fullmatch(r"Thought for \d+ s|Reasoning", fold.locator("summary").text_content() or "")
    assert not fold.locator(".prose").is_visible()
    fold.locator("summary").press("Enter")
    assert fold.locator(".prose").text_content() == "First this."
    assert fold.locator("em").is_visible()
    box.get_by_role("button", name="Copy the answer").click()
    wait_until(lambda: watched.page.evaluate("() => navigator.clipboard.readText()") == "The answer.")
    ask(watched, "And then?")
    said = [message["content"] for message in room[1].requests[-1].json["messages"]]
    assert said == ["Hello", "The answer.", "And then?"]
    check(watched, "answer-reasoning")


def test_tags_that_are_part_of_an_answer_stay(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend]) -> None:
    """In code, or in the middle of a sentence; and an answer may begin with what only looks like a tag."""
    watched = playground()
    for text in ("```\n<think>\nx\n</think>\n```", "Models write <think> and </think>.", "<thin> ice", "<think"):
        room[1].behave = told(text, size=2)
        box = ask(watched)
        assert box.locator("details.thoughts").count() == 0
        assert "".join((box.locator(".text").text_content() or "").split()) == "".join(text.replace("```", "").split()) + "Copy" * (
            "```" in text
        )


def test_an_answer_that_only_reasons(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend]) -> None:
    """A limit of tokens ends it before the answer: the reasoning can be read, and the page says that no answer came."""
    room[1].behave = told("<think>On and on")
    watched = playground()
    box = ask(watched)
    assert box.locator(".text").text_content() == "The answer is empty."
    assert box.locator("details.thoughts .prose").text_content() == "On and on"


def texts(watched: Watched) -> list[str]:
    """Return the texts of all messages."""
    found: list[str] = watched.page.locator(".message-box .text").all_text_contents()
    return found


def test_reload_back_and_another_page_lose_nothing(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend]) -> None:
    """Neither the conversation with its figures and reasoning, nor the draft, nor the settings; a new chat removes the conversation."""
    room[1].behave = told("**Bold**.", reasoning="Hm.")
    watched = playground()
    page = watched.page
    ask(watched, "First")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Your message").fill("a draft")
    for leave in (page.reload, lambda: (watched.open("/models"), page.go_back()), lambda: watched.open("/models")):
        leave()
        if "/playground" not in page.url:
            page.get_by_role("link", name="Playground", exact=True).click()
        page.locator("#talk .message-box").first.wait_for()
        assert texts(watched) == ["First", "Bold."]
        assert box_of(watched).locator("strong").text_content() == "Bold"
        assert box_of(watched).locator("details.thoughts .prose").text_content() == "Hm."
        box_of(watched).get_by_text("in all").wait_for()
        assert box_of(watched).locator(".measures a").get_attribute("href").startswith("/server/")
        assert page.get_by_label("Your message").input_value() == "a draft"
        assert page.get_by_label("System message").input_value() == "Be brief."
    ask(watched, "Second")
    assert [message["content"] for message in room[1].requests[-1].json["messages"]] == ["Be brief.", "First", "**Bold**.", "Second"]
    page.get_by_role("button", name="New chat").click()
    page.reload()
    page.get_by_text("Start a conversation.").wait_for()


def test_signing_out_removes_the_conversation(
    browse_at: Callable[..., Watched], chromium: Any, room: tuple[GatewayProcess, Backend]
) -> None:
    """The next person at this computer does not see it."""
    gateway, backend = room
    backend.behave = told("Well.")
    watched = browse_at(gateway.url, cookies_of_an_operator(chromium, gateway.url, gateway.admin_key))
    watched.open(f"/playground?model={MODEL}")
    ask(watched)
    page = watched.page
    page.reload()
    assert texts(watched) == ["Hello", "Well."]
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/login")
    assert page.evaluate("() => Object.keys(sessionStorage).filter((name) => name.startsWith('mvg'))") == []


def test_leaving_in_the_middle_of_an_answer_keeps_what_came(
    playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend]
) -> None:
    """The part that came is there after a reload, and the answer can be asked for again."""
    events = [answers.chat_event("pat", MODEL, {"content": "Half of it"})]
    room[1].behave = behaviours.stream(events, end="stall")
    watched = playground()
    page = watched.page
    page.get_by_label("Your message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    box_of(watched).get_by_text("Half of it").wait_for()
    page.reload()
    assert texts(watched) == ["Hello", "Half of it"]
    room[1].behave = told("All of it.")
    page.get_by_role("button", name="Try again").click()
    box_of(watched).get_by_text("All of it.").wait_for()
    assert texts(watched) == ["Hello", "All of it."]


def test_stop_regenerate_edit_and_retry(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend]) -> None:
    """By keyboard, too; what is asked again replaces what was there, and a question without an answer is not sent with the next one."""
    backend = room[1]
    watched = playground()
    page = watched.page
    backend.behave = behaviours.stream([answers.chat_event("pat", MODEL, {"content": "Half"})], end="stall")
    page.get_by_label("Your message").fill("One")
    page.get_by_role("button", name="Send").click()
    box_of(watched).get_by_text("Half").wait_for()
    page.get_by_role("button", name="Stop").click()
    box_of(watched).get_by_text("stopped", exact=True).wait_for()
    backend.behave = told("Whole.")
    page.get_by_role("button", name="Try again").press("Enter")
    box_of(watched).get_by_text("Whole.").wait_for()
    backend.behave = told("Other.")
    page.get_by_role("button", name="Regenerate the answer").press("Enter")
    box_of(watched).get_by_text("Other.").wait_for()
    ask(watched, "Two")
    page.get_by_role("button", name="Edit this message").first.press("Enter")
    page.get_by_text("The messages below are removed.").wait_for()
    check(watched, "playground-edit")
    area = page.get_by_role("textbox", name="Edit this message")
    area.press("Escape")
    assert texts(watched) == ["One", "Other.", "Two", "Other."]
    page.get_by_role("button", name="Edit this message").first.click()
    assert area.input_value() == "One"
    area.fill("Three")
    area.press("Enter")
    wait_until(lambda: texts(watched) == ["Three", "Other."])
    backend.behave = behaviours.status(400, message="Not like this.")
    ask(watched, "Four")
    failed = page.locator(".message-box.failed")
    assert failed.locator(".trouble").text_content() == "Not like this. (status 400)"
    backend.behave = told("Well.")
    ask(watched, "Five")
    sent = [message["content"] for message in backend.requests[-1].json["messages"]]
    assert sent == ["Three", "Other.", "Five"]
    failed.get_by_role("button", name="Try again").click()
    wait_until(lambda: texts(watched) == ["Three", "Other.", "Four", "Well."])
    watched.troubles[:] = [trouble for trouble in watched.troubles if "status of 400" not in trouble]


NAMES = ("alpha:8b", "alpha:70b", "beta-coder", "org/very-long.model_name-of-somebody-who-likes-to-be-exact@2025-01-31+instruct-q4_K_M")


@pytest.fixture
def many(room: tuple[GatewayProcess, Backend]) -> Iterator[None]:
    """Offer more models."""
    gateway, backend = room
    ids = [gateway.register(name, backend.url) for name in NAMES]
    yield
    for server_id in ids:
        gateway.admin("DELETE", f"/register/{server_id}")


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_menu_of_models_is_searched(
    playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend], viewport: dict[str, int]
) -> None:
    """By keyboard and pointer; what is typed and not chosen changes nothing."""
    room[1].behave = told("Well.")
    watched = playground(viewport=viewport)
    page = watched.page
    field, options = page.get_by_label("Model", exact=True), page.locator("#models [role=option]:visible")
    assert field.input_value() == MODEL
    field.click()
    assert sorted(options.all_text_contents()) == sorted([*NAMES, MODEL])
    assert page.locator("#models [aria-selected=true]").text_content() == MODEL
    check(watched, f"playground-models-{'phone' if viewport is PHONE else 'desktop'}")
    field.press_sequentially("alpha 8")
    assert options.all_text_contents() == ["alpha:8b"]
    field.press("Enter")
    assert field.input_value() == "alpha:8b"
    assert field.get_attribute("aria-expanded") == "false"
    field.press("ArrowDown")
    field.press("ArrowDown")
    marked = page.locator(f"#{field.get_attribute('aria-activedescendant')}")
    assert marked.text_content() == "beta-coder"
    field.press("Escape")
    assert field.input_value() == "alpha:8b"
    field.fill("nothing of the kind")
    page.get_by_role("option", name="No model with this name").wait_for()
    field.press("Enter")
    assert field.input_value() == "alpha:8b"
    field.fill("beta")
    field.press("Tab")
    assert field.input_value() == "alpha:8b"
    field.click()
    page.get_by_role("option", name="beta-coder").click()
    ask(watched)
    assert room[1].requests[-1].json["model"] == "beta-coder"
    page.reload()
    assert field.input_value() == "beta-coder"
    watched.open("/playground?model=alpha:70b")
    assert field.input_value() == "alpha:70b"
    assert texts(watched) == ["Hello", "Well."]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_code_of_a_request(playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend], viewport: dict[str, int]) -> None:
    """In a dialog: the last message alone, or the whole conversation without what failed."""
    room[1].behave = told("Well.")
    watched = playground(viewport=viewport)
    page = watched.page
    code = page.get_by_label("Python code", exact=True)

    def view() -> str:
        page.get_by_role("button", name="View code").click()
        text: str = code.text_content()
        return text

    assert '"content": "Hello"' in view()
    page.keyboard.press("Escape")
    ask(watched, "First")
    ask(watched, "Second")
    text = view()
    assert '"content": "Second"' in text
    assert "First" not in text
    page.get_by_text("Include the whole conversation").click()
    assert all(f'"content": "{words}"' in (code.text_content() or "") for words in ("First", "Well.", "Second"))
    check(watched, f"playground-code-{'phone' if viewport is PHONE else 'desktop'}")
    page.get_by_role("tab", name="curl").click()
    assert f"{room[0].url}/v1/chat/completions" in (page.get_by_label("curl code", exact=True).text_content() or "")
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    assert not page.get_by_role("dialog").is_visible()
    page.get_by_label("Your message").fill("A draft")
    assert '"content": "A draft"' in view()


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_two_models_side_by_side(
    playground: Callable[..., Watched], room: tuple[GatewayProcess, Backend], viewport: dict[str, int]
) -> None:
    """Both get the question at the same time, and each goes on from its own answers; they are stopped and asked again together."""
    backend = room[1]
    watched = playground(viewport=viewport)
    page = watched.page

    async def named(exchange: Any) -> None:
        await told(f"I am *{exchange.model}*.")(exchange)

    backend.behave = named
    ask(watched, "First")
    other = page.get_by_label("Compare with", exact=True)
    other.fill("beta")
    other.press("Enter")
    ask(watched, "Second")
    box_of(watched, 2).get_by_text("in all").wait_for()
    assert texts(watched) == ["First", "I am writer.", "Second", "I am writer.", "I am beta-coder."]
    ask(watched, "Third")
    box_of(watched, 4).get_by_text("in all").wait_for()
    said = {request.json["model"]: [message["content"] for message in request.json["messages"]] for request in backend.requests[-2:]}
    common = ["First", "I am *writer*.", "Second"]
    assert said == {"writer": [*common, "I am *writer*.", "Third"], "beta-coder": [*common, "I am *beta-coder*.", "Third"]}
    check(watched, f"playground-pair-{'phone' if viewport is PHONE else 'desktop'}")
    page.reload()
    assert texts(watched)[-2:] == ["I am writer.", "I am beta-coder."]
    assert other.input_value() == "beta-coder"
    backend.behave = behaviours.stall()
    before = backend.hits
    box_of(watched, 4).get_by_role("button", name="Regenerate the answer").click()
    wait_until(lambda: backend.hits == before + 2)
    page.get_by_role("button", name="Stop").click()
    for number in (3, 4):
        box_of(watched, number).get_by_text("Stopped before the first token.").wait_for()
    backend.behave = named
    other.click()
    page.get_by_role("option", name="No comparison").click()
    box_of(watched, 4).get_by_role("button", name="Try again").click()
    box_of(watched, 3).get_by_text("in all").wait_for()
    assert texts(watched)[-2:] == ["Third", "I am writer."]
