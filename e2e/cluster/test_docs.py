"""What the documents tell their readers to type works, as it stands, on a cluster with the samples
on it.

What cannot be run here is marked in the document; pytest's header lists it with its reasons
(conftest).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.harness import docs
from e2e.harness.docs import ROOT, Block
from e2e.harness.environment import NAMESPACE, Environment
from e2e.harness.kubectl import run

BLOCK_SECONDS = 660


@pytest.fixture
def reader(environment: Environment, tmp_path: Path) -> dict[str, str]:
    """The shell of somebody who read the documents so far: our programs, and a kubeconfig whose
    namespace is the samples'.
    """
    kubeconfig = tmp_path / "kubeconfig"
    shutil.copy(environment.kubectl.kubeconfig, kubeconfig)
    programs = (
        environment.kubectl.binary.parent,
        environment.helm.parent,
        Path(sys.executable).parent,
    )
    run(
        environment.kubectl.binary, "--kubeconfig", kubeconfig,
        "config", "set-context", "--current", f"--namespace={NAMESPACE}",
    )  # fmt: skip
    return {
        "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
        "KUBECONFIG": str(kubeconfig),
    }


def typed(script: str, reader: dict[str, str]) -> str:
    """What a shell prints that is given this; it fails with the first command that does."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**os.environ, **reader},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BLOCK_SECONDS,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", docs.runnable(), ids=str)
def test_what_the_documents_say_works(block: Block, reader: dict[str, str]) -> None:
    if not block.shown:
        typed(block.script, reader)
    for command, shown in block.shown:
        printed = typed(command, reader)
        assert header(printed) == header(shown) or not shown, (
            f"{command} prints another header than the document shows"
        )


def header(text: str) -> list[str]:
    """The columns that kubectl prints; of anything else nothing, for names and ages differ."""
    first = next(iter(text.splitlines()), "").split()
    return first if first and all(word.isupper() for word in first) else []
