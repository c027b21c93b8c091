"""The log says whose key a request came with, by the key's id: at both doors, however the request ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from e2e.deployment import Deployment
from support import behaviours
from support.backends import Backend
from support.processes import DOORS
from support.raw_client import RawClient
from support.sockets import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

Deploy = Callable[..., Deployment]


def finished(deployment: Deployment, **query: str) -> list[dict[str, Any]]:
    """Return the records of the requests for the deployment's model that have ended, newest first."""
    records = deployment.client.get("/admin/logs", params={"text": "request finished", **query}).json()
    return [record for record in records if record.get("model") == deployment.model]


def test_the_log_names_the_key_by_its_id(deploy: Deploy) -> None:
    """A plain request, a stream, one that failed and one that was canceled; never the key or its name."""
    deployment = deploy(Backend("patient", behaviours.when_streamed(behaviours.stall_stream(2), behaviours.status(400))))
    made = deployment.client.post("/admin/keys", json={"name": f"Jürgen of {deployment.model}"}).json()
    bearer = {"x-api-key": "", "authorization": f"Bearer {made['key']}"}
    assert deployment.client.post("/v1/chat/completions", json=deployment.body(), headers=bearer).status_code == 400
    with RawClient(deployment.gateway.port) as client:
        headers = [("authorization", f"Bearer {made['key']}")]
        client.request("POST", "/v1/chat/completions", json=deployment.body(stream=True), headers=headers)
        client.read_event()
        client.abort()
    wait_until(lambda: len(finished(deployment)) == 2, what="the canceled request was not logged")
    assert [(record["status"], record["client"]) for record in finished(deployment, client=made["id"])] == [
        (499, made["id"]),
        (400, made["id"]),
    ]
    assert not finished(deployment, client="another")
    text = deployment.client.get("/admin/logs", params={"limit": "2000", "client": made["id"]}).text
    assert made["key"] not in text
    assert "Jürgen" not in text


def test_a_request_without_a_key_has_no_client(deploy: Deploy) -> None:
    """Neither has one with a key that the gateway does not know, on an open gateway."""
    deployment = deploy(Backend("good"))
    for headers in ({"x-api-key": ""}, {"x-api-key": "", "authorization": "Bearer sk-of-another-service"}):
        assert deployment.client.post("/v1/chat/completions", json=deployment.body(), headers=headers).status_code == 200
    records = finished(deployment)
    assert len(records) == 2
    assert all("client" not in record for record in records)
