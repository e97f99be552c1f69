"""The folder names promise something to newcomers; these tests keep the promise."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_FOLDERS = (
    "agent",
    "common",
    "coordinator",
    "crds",
    "kube",
    "operator",
    "planner",
    "storage",
    "transports",
)


@pytest.mark.parametrize("folder", TOP_FOLDERS)
def test_a_top_folder_is_no_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py would shadow a module or hide a package"
    )


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_standard_library_keeps_its_operator() -> None:
    """From the repository's root, where the folder of the same name lies on the path."""
    code = "import operator, sys; sys.exit(not hasattr(operator, 'eq'))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


def test_ci_runs_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in ("make demo", "make test", "make e2e"):
        assert command in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()
