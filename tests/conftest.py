"""What may run beside what, where two tests run at a time."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

SEEDS = "tests/seeds/"
SLOWEST = (
    SEEDS,
    "tests/operator/",
    "tests/agent/kube/test_on_apiserver.py",
    "tests/coordinator/test_redis_ha.py",
)

# Other work on the machine must not fail a test: by default hypothesis has an example end within
# 0.2 s.
settings.register_profile("hotweights", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hotweights")


class _ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests stay in one process. So do those with the ports that a document names."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return SEEDS if path.startswith(SEEDS) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    # files with many tests first, which here are the quick ones
    config.option.loadscopereorder = False
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that nothing waits for it alone at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOWEST))


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    """What a test changes for the whole process would fail another one, and only in the order of
    that day.
    """
    before = (logging.root.manager.disable, Path.cwd())
    yield
    assert (logging.root.manager.disable, Path.cwd()) == before


def pytest_configure() -> None:
    """A shell has what it runs in the background ignore Ctrl-C, and what tests start and interrupt
    would inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
