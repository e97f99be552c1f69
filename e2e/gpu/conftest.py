"""A real vLLM on a real GPU. Everything here is skipped, and says so, where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from e2e.engine.conftest import pytest_terminal_summary, start

__all__ = ["pytest_terminal_summary", "start"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without = pytest.mark.skip(reason="no NVIDIA GPU: nvidia-smi is not there")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(300))
            if shutil.which("nvidia-smi") is None:
                item.add_marker(without)
