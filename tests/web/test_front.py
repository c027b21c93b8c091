"""The front of both doors."""

import pytest

from multiverse_gateway import GatewayError
from multiverse_gateway.web.front import check_target


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


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/audio/speech", "/v1/x-y_z.1~2/a:b"])
def test_usual_targets_pass(path: str) -> None:
    """Any path of the API, with a query and a multipart type."""
    check_target(path, b"api-version=2026-01-01&a=%20", b'multipart/form-data; boundary="a b"')
