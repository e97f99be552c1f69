"""What goes over the wire, and which of our exceptions each answer becomes. The server is a few
lines of aiohttp.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from hotweights_kube import (
    NODE_WEIGHTS,
    PODS,
    Api,
    errors,
    review,
)
from hotweights_kube.client import Selection


class Server:
    """Remembers requests and answers what it was told to."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.status, self.delay_seconds = 200, 0.0
        self.body: dict[str, Any] = {}
        self.headers: dict[str, str] = {}
        self.pages: list[dict[str, Any]] = []
        self.text = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        headers = {key: request.headers.get(key, "") for key in ("Content-Type", "Authorization")}
        self.requests.append(
            (request.method, request.path_qs, headers, json.loads(text) if text else None)
        )
        await asyncio.sleep(self.delay_seconds)
        if self.text:
            return web.Response(text=self.text, status=self.status)
        body = self.pages.pop(0) if self.pages else self.body
        return web.json_response(body, status=self.status, headers=self.headers)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    yield Server()


@pytest_asyncio.fixture
async def api(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Api]:
    """With time to spare: server and client wait for the processor together."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    async with await Api.connect(timeout_seconds=30) as api:
        yield api
    await runner.cleanup()


async def test_apply_says_who_and_carries_the_version_it_was_decided_on(
    api: Api, server: Server
) -> None:
    body = {"metadata": {"name": "n1", "namespace": "sys", "resourceVersion": "7"}, "spec": {}}
    await api.apply(NODE_WEIGHTS, body, manager="hotweights-rollout-1")
    method, path, headers, sent = server.requests[0]
    assert method == "PATCH"
    assert (
        path
        == "/apis/hotweights.dev/v1alpha1/namespaces/sys/nodeweights/n1?fieldManager=hotweights-rollout-1&force=true"
    )
    assert headers == {
        "Content-Type": "application/apply-patch+yaml",
        "Authorization": "Bearer secret",
    }
    assert sent["kind"] == "NodeWeights"
    assert sent["metadata"]["resourceVersion"] == "7"


async def test_a_status_patch_is_fenced_by_the_resource_version(api: Api, server: Server) -> None:
    await api.merge_patch(
        PODS,
        "p",
        {"status": {"phase": None}},
        namespace="d",
        subresource="status",
        resource_version="5",
    )
    _, path, headers, sent = server.requests[0]
    assert path.startswith("/api/v1/namespaces/d/pods/p/status?")
    assert headers["Content-Type"] == "application/merge-patch+json"
    assert sent == {"status": {"phase": None}, "metadata": {"resourceVersion": "5"}}


async def test_a_json_patch_is_a_list_of_operations(api: Api, server: Server) -> None:
    operations = [{"op": "add", "path": "/metadata/labels/x", "value": "y"}]
    await api.json_patch(PODS, "p", operations, namespace="d", subresource="status")
    assert server.requests[0][2]["Content-Type"] == "application/json-patch+json"
    assert server.requests[0][3] == operations


async def test_a_list_is_read_page_by_page(api: Api, server: Server) -> None:
    server.pages = [
        {
            "items": [{"metadata": {"name": "a"}}],
            "metadata": {"continue": "next", "resourceVersion": "5"},
        },
        {"items": [{"metadata": {"name": "b"}}], "metadata": {"resourceVersion": "5"}},
    ]
    listing = await api.list(PODS, Selection("d", label_selector="a=b"))
    assert [(item["kind"], item["metadata"]["name"]) for item in listing.items] == [
        ("Pod", "a"),
        ("Pod", "b"),
    ]
    assert listing.resource_version == "5"
    assert "labelSelector=a%3Db" in server.requests[1][1]
    assert "continue=next" in server.requests[1][1]


@pytest.mark.parametrize(
    ("status", "body", "kind", "hint"),
    [
        (404, {"message": "gone"}, errors.NotFound, "install the CRDs"),
        (409, {"message": "changed", "reason": "Conflict"}, errors.Conflict, "decide again"),
        (409, {"message": "is there", "reason": "AlreadyExists"}, errors.AlreadyExists, "is there"),
        (401, {"message": "Unauthorized"}, errors.Forbidden, "renew"),
        (403, {"message": "forbidden"}, errors.Forbidden, "RBAC"),
        (422, {"message": "spec.version: write this"}, errors.Invalid, "write this"),
        (410, {"message": "old"}, errors.Expired, "List again"),
        (429, {"message": "slow down"}, errors.Unavailable, "tried again"),
        (503, {}, errors.Unavailable, "HTTP 503"),
    ],
)
async def test_each_answer_has_its_exception(
    api: Api,
    server: Server,
    status: int,
    body: dict[str, Any],
    kind: type[errors.KubeError],
    hint: str,
) -> None:
    server.status, server.body, server.headers = status, body, {"Retry-After": "3"}
    with pytest.raises(kind, match=hint) as caught:
        await api.get(PODS, "p", "d")
    assert "/api/v1/namespaces/d/pods/p" in str(caught.value)
    if isinstance(caught.value, errors.Unavailable):
        assert caught.value.retry_after_seconds == 3


async def test_the_next_page_is_asked_for_when_the_first_was_dealt_with(
    api: Api, server: Server
) -> None:
    server.pages = [
        {
            "items": [{"metadata": {"name": "a"}}],
            "metadata": {"continue": "next", "resourceVersion": "5"},
        },
        {"items": None, "metadata": {"resourceVersion": "5"}},
    ]
    asked = [
        (
            len(server.requests),
            [item["metadata"]["name"] for item in page.items],
            page.resource_version,
        )
        async for page in api.pages(PODS, page_size=1)
    ]
    assert asked == [(1, ["a"], "5"), (2, [], "5")]
    assert "limit=1" in server.requests[0][1]


async def test_something_else_than_json_is_unavailable(api: Api, server: Server) -> None:
    server.text = "<html>a proxy</html>"
    with pytest.raises(errors.Unavailable, match="something else than JSON"):
        await api.get(PODS, "p", "d")


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("3", 3, 3),
        ("0.5", 0.5, 0.5),
        ("-1", 0, 0),
        ("86400", 60, 60),
        (50.0, 20, 50),  # a date so many seconds from now, of which some may pass meanwhile
        (-20.0, 0, 0),
        (1e6, 60, 60),
    ],
)
def test_how_long_to_wait_is_read_however_it_is_said_and_bounded(
    value: str | float, least: float, most: float
) -> None:
    value = value if isinstance(value, str) else in_seconds(value)
    wait = errors.wait_seconds(errors.from_response("GET /", 429, b"{}", {"Retry-After": value}))
    assert wait is not None
    assert least <= wait <= most


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "Fri, 99 Nov 2026 10:00:00 GMT"])
def test_no_wait_is_read_from_nonsense(value: str) -> None:
    assert (
        errors.wait_seconds(errors.from_response("GET /", 503, b"{}", {"Retry-After": value}))
        is None
    )


def test_a_status_says_how_long_to_wait_where_there_are_no_headers() -> None:
    said = json.dumps({"message": "slow down", "details": {"retryAfterSeconds": 7}}).encode()
    assert errors.wait_seconds(errors.from_response("watch pods", 429, said, {})) == 7
    assert errors.wait_seconds(errors.from_response("watch pods", 409, said, {})) is None


async def test_no_answer_in_time_is_unavailable(api: Api, server: Server) -> None:
    server.delay_seconds = 5.0
    async with await Api.connect(timeout_seconds=1.5) as hasty:
        with pytest.raises(errors.Unavailable, match="no answer"):
            await hasty.get(PODS, "p", "d")


async def test_a_pod_bound_token_names_its_pod_and_node(api: Api, server: Server) -> None:
    extra = {
        "authentication.kubernetes.io/pod-name": ["p"],
        "authentication.kubernetes.io/pod-uid": ["u"],
        "authentication.kubernetes.io/node-name": ["n"],
    }
    user = {"username": "system:serviceaccount:ns:sa", "extra": extra}
    server.body = {
        "status": {"authenticated": True, "audiences": ["hotweights-agent"], "user": user}
    }
    identity = await review(api, "t", ["hotweights-agent"])
    assert (identity.namespace, identity.service_account) == ("ns", "sa")
    assert (identity.pod_name, identity.pod_uid, identity.node_name) == ("p", "u", "n")
    assert server.requests[0][3]["spec"] == {"token": "t", "audiences": ["hotweights-agent"]}


@pytest.mark.parametrize(
    "status",
    [
        {"authenticated": False, "error": "expired"},
        {"authenticated": True, "user": {"username": "a"}},
        {"authenticated": True, "audiences": ["other"], "user": {"username": "a"}},
    ],
)
async def test_any_other_token_is_refused(api: Api, server: Server, status: dict[str, Any]) -> None:
    server.body = {"status": status}
    with pytest.raises(errors.TokenRefused):
        await review(api, "t", ["hotweights-agent"])


async def test_without_any_configuration_it_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(errors.NotConfigured, match="set KUBECONFIG"):
        await Api.connect()
