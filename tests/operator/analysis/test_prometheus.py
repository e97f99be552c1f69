"""Values from a real Prometheus: what a query gives, what NaN and nothing are, and what is wrong."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import pytest_asyncio

from e2e.harness.prometheus import Prometheus, prometheus
from hotweights_crds.analysis import Metric, PrometheusQuery
from hotweights_operator.decide.analysis import judge
from hotweights_operator.model.measurements import Reading
from hotweights_operator.runtime.measure import prometheus as by_prometheus
from hotweights_operator.runtime.measure.client import JsonClient, NoResult

pytestmark = pytest.mark.timeout(240, func_only=True)

PAGE = b"""# TYPE requests gauge
requests{hotweights_dev_version="v1",outcome="ok"} 990
requests{hotweights_dev_version="v1",outcome="error"} 10
requests{hotweights_dev_version="v2",outcome="ok"} 93
requests{hotweights_dev_version="v2",outcome="error"} 7
requests{hotweights_dev_version="v3",outcome="ok"} 0
requests{hotweights_dev_version="v3",outcome="error"} 0
# TYPE latency gauge
latency NaN
"""


class Exporter(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        # a Prometheus that is stopped waits for no answer
        with contextlib.suppress(ConnectionError):
            self.wfile.write(PAGE)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the page."""
    exporter = ThreadingHTTPServer(("127.0.0.1", 0), Exporter)
    thread = threading.Thread(target=exporter.serve_forever)
    thread.start()
    folder: Path = tmp_path_factory.mktemp("prometheus")
    try:
        with prometheus(folder, [f"127.0.0.1:{exporter.server_port}"]) as found:
            found.until_scraped(1)
            assert found.unanswered([("requests", "requests")]) == []
            yield found
    finally:
        exporter.shutdown()
        exporter.server_close()
        thread.join()


@pytest_asyncio.fixture
async def client() -> AsyncIterator[JsonClient]:
    made = JsonClient(())
    yield made
    await made.close()


async def measured(client: JsonClient, scraped: Prometheus, query: str) -> Reading:
    wanted = PrometheusQuery(address=scraped.url, query=query, timeout_seconds=60)
    return await by_prometheus.measure(client, wanted)


def share(version: str) -> str:
    """Of the version's requests those that failed."""
    of = f'requests{{hotweights_dev_version="{version}"'
    return f'sum({of},outcome="error"}}) / sum({of}}})'


async def test_a_share_of_errors_by_version(client: JsonClient, scraped: Prometheus) -> None:
    stable = await measured(client, scraped, share("v1"))
    canary = await measured(client, scraped, share("v2"))
    assert (stable.value, canary.value) == (0.01, 0.07)
    ratio = await measured(client, scraped, f"({share('v2')}) / ({share('v1')})")
    assert isinstance(ratio.value, float)
    assert math.isclose(ratio.value, 7.0)


NO_DATA = {
    "a version without requests": (share("v3"), "NaN"),
    "a version that nobody serves": (share("v4"), "finds no series"),
    "a gauge that is NaN": ("latency", "NaN"),
    "a metric that there is none of": ("nothing_at_all", "finds no series"),
    "absent in a comparison": ("requests > 10000", "finds no series"),
}


@pytest.mark.parametrize("name", NO_DATA)
async def test_no_data_is_what_the_metric_says_it_is(
    client: JsonClient, scraped: Prometheus, name: str
) -> None:
    query, said = NO_DATA[name]
    reading = await measured(client, scraped, query)
    metric = {"name": "m", "http": {"url": "http://a"}, "successCondition": "result < 0.05"}
    found = {
        what: judge.assess(Metric.from_dict({**metric, "onNoData": what}), reading)
        for what in ("Error", "Success", "Inconclusive")
    }
    assert [verdict for verdict, _, _ in found.values()] == ["Error", "Successful", "Inconclusive"]
    assert said in " ".join(found["Error"][1:])


VALUES = {
    "scalar(sum(requests))": 1100.0,
    "vector(1) / 0": math.inf,
    "1 == bool 1": 1.0,
    "count(requests) or vector(0)": 6.0,
}


@pytest.mark.parametrize("query", VALUES)
async def test_one_value(client: JsonClient, scraped: Prometheus, query: str) -> None:
    assert (await measured(client, scraped, query)).value == VALUES[query]


WRONG = {
    "requests": "the query gives 6 series: reduce it to one, by sum() for example",
    "requests[1m]": "the query gives a matrix",
    "sum(requests": "status 400: invalid parameter",
    '"text"': "the query gives a string",
}


@pytest.mark.parametrize("query", WRONG)
async def test_what_is_wrong_with_a_query(
    client: JsonClient, scraped: Prometheus, query: str
) -> None:
    with pytest.raises(NoResult) as caught:
        await measured(client, scraped, query)
    assert WRONG[query] in str(caught.value)
