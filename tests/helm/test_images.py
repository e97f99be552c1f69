"""The Dockerfiles follow the tree and the chart. (The e2e builds and runs them.)"""

from __future__ import annotations

import re
import tomllib

import yaml

from e2e.harness import environment
from hotweights.adapters.vllm import PLUGIN_VERSION
from tests.helm.conftest import CHART, ROOT

DOCKERFILE = (ROOT / "images" / "Dockerfile").read_text()


def test_every_package_of_the_wheel_is_copied() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    folders = {path.partition("/")[0] for path in build["targets"]["wheel"]["packages"]}
    assert {
        folder for folder in folders if f"\nCOPY {folder} {folder}\n" not in DOCKERFILE
    } == set()


def test_what_an_image_brings_is_something_that_can_be_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (default,) = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert '".[${EXTRAS}]"' in DOCKERFILE.partition("ARG EXTRAS")[2]
    for chosen in (default, environment.EXTRAS):
        assert {"operator", "agent"} <= set(chosen.split(",")) <= extras.keys()


def test_python_never_looks_into_the_working_folder() -> None:
    """A folder named operator/ there must not shadow the standard library's module."""
    assert "PYTHONSAFEPATH=1" in DOCKERFILE.rpartition("FROM")[2]


def test_what_pip_was_told_stays_out_of_the_layers() -> None:
    final = DOCKERFILE.rpartition("FROM")[2]
    assert "pip" not in final
    assert "ARG" not in final


def test_the_operator_is_nobody_and_has_a_name_all_the_same() -> None:
    """No passwd knows the user, and kopf dies where nothing says its name."""
    final = DOCKERFILE.rpartition("FROM")[2]
    assert "\nUSER 65532:65532\n" in final
    assert " USER=" in final


def test_the_plugin_has_the_version_that_injection_names() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == PLUGIN_VERSION
