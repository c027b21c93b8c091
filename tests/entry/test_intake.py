"""The intake of both doors."""

import pytest

from multiverse_gateway import GatewayError
from multiverse_gateway.entry.intake import IncomingRequest, Intake, check_target
from multiverse_gateway.relay.heads import RequestHead
from support.gateways import access_rules_of, stage


@pytest.mark.parametrize(
    ("path", "query", "content_type"),
    [
        ("/v1/chat/completions\r\nx-evil: 1", b"", b"application/json"),
        ("/v1/chat completions", b"", b"application/json"),
        ("/v1/ünicode", b"", b"application/json"),
        ("/v1/chat/completions?a=1", b"", b"application/json"),
        ("/v1/../admin/servers", b"", b"application/json"),
        ("/v1/./chat", b"", b"application/json"),
        ("/v1//chat", b"", b"application/json"),
        ("/v1/" + "x" * 509, b"", b"application/json"),
        ("/v1/chat/completions", b"a=1\r\nx-evil: 1", b"application/json"),
        ("/v1/chat/completions", b"a b", b"application/json"),
        ("/v1/chat/completions", b"", b"application/json\r\nx-evil: 1"),
        ("/v1/chat/completions", b"", b"application/\xffjson"),
    ],
)
def test_nothing_but_plain_words_gets_into_the_head_for_a_server(path: str, query: bytes, content_type: bytes) -> None:
    """X04, X15: a decoded path, a query or a content type cannot bring line breaks, blanks or steps upwards."""
    with pytest.raises(GatewayError) as refusal:
        check_target(path, query, content_type)
    assert refusal.value.status in (400, 404)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/audio/speech", "/v1/x-y_z.1~2/a:b", "/v1/responses/resp_bGl0ZWxsbQ+=="])
def test_usual_targets_pass(path: str) -> None:
    """Any path of the API, with a query and a multipart type."""
    check_target(path, b"api-version=2026-01-01&a=%20", b'multipart/form-data; boundary="a b"')


@pytest.mark.parametrize(("length", "is_full", "code"), [(b"1000", True, "overloaded"), (b"99999", False, "request_too_large")])
async def test_what_the_gateway_has_no_room_for_uses_up_nobodys_quota(length: bytes, is_full: bool, code: str) -> None:
    """Neither of the minute nor of the day: who tries again, as they are told, finds it as it was."""
    async with stage(max_body_bytes=2048, body_budget_bytes=4096) as at:
        made = (await at.client.post("/admin/keys", json={"name": "alice", "rate_limit": 1, "daily_limit": 1})).json()
        intake = Intake(at.gateway, access_rules_of(at.gateway))

        def visit(length: bytes) -> IncomingRequest:
            fields = [(b"authorization", f"Bearer {made['key']}".encode()), (b"content-length", length)]
            return intake.request(RequestHead("POST", "/v1/chat/completions", b"", fields), int(length), "127.0.0.1")

        at.gateway.admission.shedding = is_full
        for _ in range(3):
            with pytest.raises(GatewayError) as refusal:
                intake.admit(visit(length))
            assert refusal.value.code == code
        at.gateway.admission.shedding = False
        let_in = visit(b"1000")
        intake.admit(let_in)
        assert (b"x-ratelimit-remaining-requests", b"0") in let_in.headers


async def test_a_body_that_finds_no_room_uses_up_nobodys_quota() -> None:
    """Its length was not known when the request was counted, or others came meanwhile."""
    async with stage(max_body_bytes=2048, body_budget_bytes=4096) as at:
        made = (await at.client.post("/admin/keys", json={"name": "alice", "rate_limit": 1, "daily_limit": 1})).json()
        intake = Intake(at.gateway, access_rules_of(at.gateway))
        head = RequestHead("POST", "/v1/chat/completions", b"", [(b"authorization", f"Bearer {made['key']}".encode())])
        for _ in range(3):
            visit = intake.request(head, 0, "127.0.0.1")
            intake.admit(visit)
            assert (b"x-ratelimit-remaining-requests", b"0") in visit.headers
            at.gateway.admission.bodies.held += 4096
            with pytest.raises(GatewayError) as refusal:
                intake.hold(visit, 100)
            assert refusal.value.code == "overloaded"
            assert (b"x-ratelimit-remaining-requests", b"1") in visit.headers
            at.gateway.admission.bodies.held -= 4096
            intake.release_body(visit)
        (record,) = (await at.client.get("/admin/keys")).json()
        assert record["used_today"] == 0


async def test_of_a_header_that_comes_twice_the_first_counts() -> None:
    """As it does with most servers; what is read and what is sent on are the same."""
    async with stage() as at:
        intake = Intake(at.gateway, access_rules_of(at.gateway))
        fields = [(b"content-type", b"application/json"), (b"content-type", b"multipart/form-data; boundary=x")]
        visit = intake.request(RequestHead("POST", "/v1/chat/completions", b"", fields), 0, "127.0.0.1")
        assert visit.facts.content_type == b"application/json"
