"""The folder names promise something to newcomers; these tests keep the promise."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.product import FOLDERS, ROOT

TOP_FOLDERS = tuple(folder for folder in FOLDERS if folder != "hotweights")
MODULES_IN_A_FOLDER = 15
ROOMS = {"agent/hotweights_agent": 12, "operator/hotweights_operator": 8}
"""How many modules and folders somebody who opens one of these meets at once."""


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
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=50)


def test_ci_runs_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in ("make demo", "make test", "make e2e"):
        assert command in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def python_files(*folders: str) -> list[Path]:
    """Every Python file below these folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def product() -> dict[str, Path]:
    """The product's modules, by the name that they are imported by."""
    found: dict[str, Path] = {}
    for top, folder in [*((ROOT / name, name) for name in TOP_FOLDERS), (ROOT, "hotweights")]:
        for path in python_files(folder):
            parts = path.relative_to(top).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_no_folder_has_more_modules_than_somebody_can_take_in() -> None:
    counts = Counter(
        path.parent.relative_to(ROOT)
        for path in python_files(*TOP_FOLDERS, "hotweights", "hack", "e2e", "tests")
        if path.name != "__init__.py"
    )
    assert len(counts) > 70
    assert {str(at): n for at, n in counts.items() if n > MODULES_IN_A_FOLDER} == {}, (
        f"more than {MODULES_IN_A_FOLDER} modules: give some of them a folder of their own"
    )


@pytest.mark.parametrize("folder", ROOMS)
def test_the_first_folder_that_one_opens_has_few_rooms(folder: str) -> None:
    rooms = {
        path.stem
        for path in (ROOT / folder).iterdir()
        if (path.suffix == ".py" and path.stem != "__init__")
        or (path.is_dir() and any(path.glob("*.py")))
    }
    assert len(rooms) <= ROOMS[folder], sorted(rooms)


def imports_at_load(body: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is loaded: not those in functions, nor those for type
    checkers.
    """
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom():
                yield node
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from imports_at_load(node.orelse)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                pass
            case _:
                inner = (getattr(node, name, ()) for name in ("body", "orelse", "finalbody"))
                handlers = (handler.body for handler in getattr(node, "handlers", ()))
                for part in (*inner, *handlers):
                    yield from imports_at_load(part)


def imported(path: Path, modules: Iterable[str]) -> set[str]:
    """Which of these modules a file imports when it is loaded."""
    found: set[str] = set()
    for node in imports_at_load(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path} imports relatively, which this test does not follow"
            parent = node.module or ""
            names = {f"{parent}.{alias.name}" for alias in node.names}
            known = names & set(modules)
            found |= known | ({parent} if known != names else set())
    return found & set(modules)


@pytest.mark.timeout(300)  # it reads the whole product
def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = product()
    graph = {name: imported(path, modules) - {name} for name, path in modules.items()}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"these {len(modules)} modules have a circle: {' <- '.join(error.args[1])}")
    assert len(order) == len(modules) > 300
    assert sum(map(len, graph.values())) > 1000, f"{len(modules)} modules, and hardly an import"
