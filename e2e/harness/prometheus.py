"""A real Prometheus for a test: it scrapes what it is told, and answers queries."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.ports import free_ports

PATIENCE_SECONDS = 180.0


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[Any]:
        """The instant vector that an expression gives now."""
        return list(self._get("query", query=expression)["result"])

    def until_scraped(self, count: int) -> None:
        """Until so many targets are up, or it says which are not."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            targets = self._get("targets", state="active")["activeTargets"]
            if sum(target["health"] == "up" for target in targets) >= count:
                return
            if time.monotonic() > until:
                raise TimeoutError(
                    f"not all targets answer: {[(t['scrapeUrl'], t['lastError']) for t in targets]}"
                )
            time.sleep(0.3)

    def unanswered(self, asked: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of ``asked`` (title, expression) that give nothing, however long one waits."""
        until, silent = time.monotonic() + PATIENCE_SECONDS, list(asked)
        while silent and time.monotonic() < until:
            silent = [
                (title, expression) for title, expression in silent if not self.query(expression)
            ]
            time.sleep(0.5)
        return silent

    def _get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(
            f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=60
        ) as answer:
            return json.load(answer)["data"]


@contextmanager
def prometheus(folder: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """One that scrapes ``host:port`` targets every second."""
    program = shutil.which("prometheus")
    if program is None:
        raise FileNotFoundError("prometheus is missing: install the Debian package prometheus")
    config = folder / "prometheus.yaml"
    job = {
        "job_name": "hotweights",
        "scrape_interval": "1s",
        "static_configs": [{"targets": list(targets)}],
    }
    config.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    address = f"127.0.0.1:{free_ports()[0]}"
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _until_ready(f"http://{address}", process, folder / "prometheus.log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(60)


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(
                    f"prometheus does not start: {log.read_text()[-500:]}"
                ) from error
            time.sleep(0.2)


def panels(dashboard: Path, row: str) -> list[tuple[str, str]]:
    """(title, expression) of every target in the panels under one row of a Grafana dashboard."""
    found: list[tuple[str, str]] = []
    current = ""
    for panel in json.loads(dashboard.read_text())["panels"]:
        if panel["type"] == "row":
            current = panel["title"]
        elif current == row:
            found += [(panel["title"], target["expr"]) for target in panel["targets"]]
    if not found:
        raise LookupError(f"{dashboard} has no panels under {row!r}")
    return found
