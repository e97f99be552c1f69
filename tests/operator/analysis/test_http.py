"""Values by HTTP from real servers, and where no measurement may go."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from hotweights_crds.analysis import HttpGet, PrometheusQuery
from hotweights_operator.runtime.measure import client as client_
from hotweights_operator.runtime.measure import http as by_http
from hotweights_operator.runtime.measure import prometheus
from hotweights_operator.runtime.measure.addresses import networks
from hotweights_operator.runtime.measure.client import JsonClient, NoResult
from hotweights_operator.settings import REFUSED_NETWORKS
from tests.operator.analysis.servers import http, server


@pytest_asyncio.fixture
async def client() -> AsyncIterator[JsonClient]:
    """One that may go to this host, unlike an operator's."""
    made = JsonClient(networks(["169.254.0.0/16"]))
    yield made
    await made.close()


@pytest_asyncio.fixture
async def guarded() -> AsyncIterator[JsonClient]:
    made = JsonClient(networks(REFUSED_NETWORKS))
    yield made
    await made.close()


BODY = b'{"data": {"items": [{"p99": 1.5}, {"ok": true}], "state": "fine", "none": null, "big": 1e999}}'

FOUND: dict[str, float | str | bool | None] = {
    "data.items.0.p99": 1.5,
    "data.items.1.ok": True,
    "data.state": "fine",
    "data.none": None,
    "data.items.7.p99": None,
    "data.items.p99": None,
    "nothing": None,
    "data.state.0": None,
    "data.big": float("inf"),
}


@pytest.mark.parametrize("path", FOUND)
async def test_a_value_at_a_path(client: JsonClient, path: str) -> None:
    async with server(http(BODY)) as url:
        reading = await by_http.measure(client, HttpGet(url=url, json_path=path))
    assert reading.value == FOUND[path]
    assert type(reading.value) is type(FOUND[path])
    assert bool(reading.text) == (FOUND[path] is None)


async def test_a_bare_value_needs_no_path(client: JsonClient) -> None:
    async with server(http(b"0.25")) as url:
        assert (await by_http.measure(client, HttpGet(url=url))).value == 0.25


ANSWERS: dict[str, tuple[bytes, str]] = {
    "an object": (http(b'{"a": 1}'), "is an object: write a jsonPath"),
    "no JSON": (http(b"<html>"), "no JSON: b'<html>'"),
    "too deep": (http(b"[" * 200_000), "no JSON"),
    "a number beyond all measure": (http(b"1" + b"0" * 400), "beyond all measure"),
    "not found": (http(b"{}", "404 Not Found"), "status 404"),
    "an error page": (http(b"<html>", "502 Bad Gateway"), "status 502"),
    "a redirect": (
        http(b"{}", "302 Found", "Location: http://169.254.169.254/"),
        "status 302, and redirects are not followed",
    ),
    "cut off": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "not enough data"),
    "no HTTP": (b"\x16\x03\x01", "http://127.0.0.1"),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_what_is_no_value_says_why(client: JsonClient, name: str) -> None:
    answer, hint = ANSWERS[name]
    async with server(answer) as url:
        with pytest.raises(NoResult) as caught:
            await by_http.measure(client, HttpGet(url=url))
    assert hint in str(caught.value).lower() or hint in str(caught.value)


async def test_an_answer_is_read_so_far_and_no_further(
    client: JsonClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_, "MAX_BYTES", 1000)
    async with server(http(b" " * 100_000 + b"1")) as url:
        with pytest.raises(NoResult, match="larger than 1000 bytes"):
            await by_http.measure(client, HttpGet(url=url))


async def test_a_compressed_answer_is_not_unpacked(client: JsonClient) -> None:
    async with server(http(b"\x1f\x8b\x08bomb", "200 OK", "Content-Encoding: gzip")) as url:
        with pytest.raises(NoResult, match="no JSON"):
            await by_http.measure(client, HttpGet(url=url))


async def test_silence_has_an_end(client: JsonClient) -> None:
    async with server(b"") as url:
        with pytest.raises(NoResult, match="no answer within 1 s"):
            await by_http.measure(client, HttpGet(url=url, timeout_seconds=1))


async def test_nobody_there(client: JsonClient) -> None:
    async with server(b"") as url:
        pass
    with pytest.raises(NoResult, match="Cannot connect"):
        await by_http.measure(client, HttpGet(url=url))


async def test_it_sends_no_credentials_and_keeps_no_cookies(client: JsonClient) -> None:
    seen: list[bytes] = []
    async with server(http(b"1", "200 OK", "Set-Cookie: a=b"), seen) as url:
        for _ in range(2):
            await by_http.measure(client, HttpGet(url=url))
    assert all(b"cookie" not in one.lower() and b"authorization" not in one.lower() for one in seen)
    assert all(one.startswith(b"GET / HTTP/1.1") for one in seen)


# -- where it may not go ------------------------------------------------------------------------

REFUSED = {
    "http://169.254.169.254/latest/meta-data": "169.254.0.0/16",
    "http://[::ffff:169.254.169.254]/": "169.254.0.0/16",
    "http://[fe80::1]/": "fe80::/10",
    "http://[fd00:ec2::254]/": "fd00:ec2::/32",
    "http://100.100.100.200/": "100.100.100.200/32",
    "http://127.0.0.1:8080/metrics": "127.0.0.0/8",
    "http://[::1]:8080/metrics": "::1/128",
    "http://0.0.0.0:8080/metrics": "0.0.0.0/8",
    # names, and what a resolver takes for an address
    "http://localhost:8080/metrics": "refusedNetworks",
    "http://0x7f.1:8080/": "127.0.0.0/8",
}


@pytest.mark.parametrize("url", REFUSED)
async def test_what_is_near_to_everybody_is_refused(guarded: JsonClient, url: str) -> None:
    with pytest.raises(NoResult, match="where no measurement may go") as caught:
        await by_http.measure(guarded, HttpGet(url=url))
    assert REFUSED[url] in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://", "http://a b/", "http://[::1", "ftp://a", "http://a:99999/", "http://2852039166/"],
)
async def test_what_is_no_url_is_no_result(guarded: JsonClient, url: str) -> None:
    with pytest.raises(NoResult):
        await by_http.measure(guarded, HttpGet(url=url))


# -- what a Prometheus may answer ---------------------------------------------------------------


def success(kind: str, result: Any) -> bytes:
    return http(
        json.dumps({"status": "success", "data": {"resultType": kind, "result": result}}).encode()
    )


NOT_ONE: dict[str, tuple[bytes, str]] = {
    "several series": (
        success("vector", [{"metric": {}, "value": [1, "1"]}] * 3),
        "gives 3 series: reduce it to one",
    ),
    "a matrix": (success("matrix", []), "gives a matrix: write one that gives a scalar"),
    "an error of the query": (
        http(b'{"status": "error", "errorType": "bad_data", "error": "parse error"}', "400 Bad"),
        "status 400: parse error",
    ),
    "something else": (http(b'{"a": 1}'), "no answer of a Prometheus"),
    "a list": (http(b"[]"), "no answer of a Prometheus"),
    "half of it": (http(b'{"status": "success", "data": {"resultType": "vector"}}'), "KeyError"),
    "a value that is none": (success("vector", [{"value": [1, "x"]}]), "ValueError"),
}


@pytest.mark.parametrize("name", NOT_ONE)
async def test_what_is_no_number_says_what_to_write(client: JsonClient, name: str) -> None:
    answer, hint = NOT_ONE[name]
    async with server(answer) as url:
        with pytest.raises(NoResult) as caught:
            await prometheus.measure(client, PrometheusQuery(address=url, query="up"))
    assert hint in str(caught.value)


async def test_a_long_query_arrives_whole(client: JsonClient) -> None:
    seen: list[bytes] = []
    query = " + ".join(f"vector({n})" for n in range(400))[:4096]
    async with server(success("scalar", [1, "1"]), seen) as url:
        await prometheus.measure(client, PrometheusQuery(address=f"{url}/prom/", query=query))
    assert seen[0].startswith(b"POST /prom/api/v1/query HTTP/1.1")
    assert query.replace(" + ", "+%2B+").replace("(", "%28").replace(")", "%29").encode() in seen[0]
