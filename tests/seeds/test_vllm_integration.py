"""`vllm_integration.md`, block by block, and what `deployment.md` says of vLLM; torch and vLLM come
from the environment of ``make e2e``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from localvllm import build

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
Find = Callable[[str, str], str]
COORDINATOR = "hotweights coord-serve --endpoint tcp://127.0.0.1:5555"
MATCH = "Applied weights match expected: True"

MODULE = """
import torch
model_module = torch.nn.Module()
for name, shape in {**{f"layers.{n}.weight": (512, 1024) for n in range(6)}, "head.weight": (1024, 1024), "new.bias": (16,)}.items():
    at = model_module
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(at, parent):
            at.add_module(parent, torch.nn.Module())
        at = getattr(at, parent)
    at.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))
"""
COMPARE = """
from safetensors.torch import load_file
expected = load_file("ckpt_b/model.safetensors")
found = dict(model_module.named_parameters())
assert expected.keys() == found.keys()
assert all(torch.equal(expected[name], found[name]) for name in expected)
print("every tensor is that of ckpt_b")
"""


@pytest.fixture
def torch_house(house: Any) -> Iterator[Any]:
    """The user's environment with the torch and the vLLM that were installed for ``make e2e``."""
    build.ensure()
    python = build.python()
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    theirs = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
    ours = next((house.folder / ".venv" / "lib").glob("python3.*")) / "site-packages"
    (ours / "vllm_environment.pth").write_text(theirs + "\n")
    yield house
    (ours / "vllm_environment.pth").unlink()


def test_smoke_with_a_coordinator(torch_house: Any, block: Find) -> None:
    torch_house.run(block("Start the HA coordinator", COORDINATOR).strip() + " &")
    assert MATCH in torch_house.run(block("Run the smoke demo", "--use-coord"))


def test_smoke_alone(torch_house: Any, block: Find) -> None:
    assert MATCH in torch_house.run(block("Local mode", "vllm_smoke_demo.py"))


def test_the_extension_in_a_worker(torch_house: Any, block: Find) -> None:
    torch_house.run(COORDINATOR + " &")
    torch_house.run(block("Create Manifests & Plan", "hotweights publish"))
    text = MODULE + block("Inside a vLLM worker", "HotweightsWorkerExtension") + COMPARE
    assert "every tensor is that of ckpt_b" in python(torch_house, text)


def test_the_extension_with_every_argument(torch_house: Any, block: Find) -> None:
    torch_house.run(COORDINATOR + " &")
    torch_house.run(block("Create Manifests & Plan", "hotweights publish"))
    text = (
        MODULE + block("vLLM Integration", "ext.bind_module") + "\next.apply_update()\n" + COMPARE
    )
    assert "every tensor is that of ckpt_b" in python(torch_house, text)


def test_autobind(torch_house: Any, block: Find) -> None:
    """That engines constructed afterwards follow is shown by
    ``e2e/engine/test_seed_adapters.py``.
    """
    installed = "\nimport sys\nprint('vllm' in sys.modules)\n"
    assert "True" in python(
        torch_house, block("polls the coordinator", "install_autobind") + installed
    )


def test_autobind_with_a_name_map(torch_house: Any, block: Find) -> None:
    installed = "\nimport sys\nprint('vllm' in sys.modules)\n"
    assert "True" in python(torch_house, block("vLLM Integration", "name_map_fn") + installed)


def python(house: Any, text: str) -> str:
    script = Path(house.folder / "script.py")
    script.write_text(text)
    return str(house.run("python script.py"))
