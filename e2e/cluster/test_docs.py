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
    assert block.script.strip(), f"{block} says nothing to type"
    if not block.shown:
        typed(block.script, reader)
    for command, shown in block.shown:
        printed = typed(command, reader)
        if shown:
            assert docs.outline(shown), f"nothing of what {block} shows can be compared"
            assert docs.outline(printed) == docs.outline(shown), (
                f"{command} prints something else than the document shows"
            )
