"""New weights for a tiny ``nn.Linear``, by the same road that a vLLM worker's model takes; neither
CUDA nor vLLM is needed.

    python examples/vllm_smoke_demo.py
    python examples/vllm_smoke_demo.py --use-coord --endpoint tcp://127.0.0.1:5555     (after
    `hotweights coord-serve`)

Two checkpoints are written, hashed and compared, and a plan leads from one to the other. The module
holds the first and is brought to the second. What it prints is a comparison of tensors; the exit
code is 1 where it does not come out, or anything goes wrong on the way.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path

import torch

from hotweights.adapters.vllm_extension import Applied, HotweightsWorkerExtension
from hotweights_common.errors import HotweightsError
from hotweights_coordinator.client.client import Client
from hotweights_planner import plan as plans
from hotweights_planner.manifest import Manifest
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"


def write_checkpoint(folder: Path, module: torch.nn.Module) -> None:
    """A float32 safetensors file: the length of a header, the header, the bytes."""
    folder.mkdir()
    header: dict[str, object] = {}
    data = b""
    for name, tensor in module.state_dict().items():
        content = bytes(tensor.contiguous().view(torch.uint8).numpy())
        header[name] = {
            "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(content)],
        }  # fmt: skip
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def published(folder: Path, version: str) -> tuple[Manifest, str]:
    """What `hotweights publish` writes down about a folder, and where the folder is."""
    with open_folder(folder) as source:
        return publish(source, "smoke-demo", version), source.uri


def apply_through_coordinator(
    extension: HotweightsWorkerExtension, plan: plans.Plan, endpoint: str
) -> Applied:
    """What `hotweights coord-submit-plan` and `hotweights begin` do; then this process takes part
    as a worker.
    """
    with Client(endpoint) as coordinator:
        coordinator.call("submit_plan", binary=plan.canonical)
        coordinator.call("begin", version=plan.version, digest=plan.digest, commit_when_ready=True)
    return extension.apply_update(timeout_seconds=60.0)


def run(use_coord: bool, endpoint: str) -> bool:
    """Whether the module holds the new weights."""
    torch.manual_seed(0)
    module, expected = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    with tempfile.TemporaryDirectory(prefix="hotweights-demo-") as name:
        folder = Path(name)
        write_checkpoint(folder / "v0", module)
        write_checkpoint(folder / "v1", expected)
        base, _ = published(folder / "v0", "v0")
        following, source = published(folder / "v1", "v1")
        plan = plans.build(following, base, source)
        print(
            f"Plan: {plan.base_version} -> {plan.version}, {plan.total_nbytes} bytes in "
            f"{len(plan.buckets)} bucket(s)"
        )
        extension = HotweightsWorkerExtension(endpoint=endpoint, roots=[folder])
        extension.bind_module(module)
        applied = (
            apply_through_coordinator(extension, plan, endpoint)
            if use_coord
            else extension.apply_update(plan)
        )
        print(f"Applied: {applied.version} ({applied.digest[:19]}), {applied.nbytes} bytes")
        extension.close()
    same = all(
        torch.equal(tensor, expected.state_dict()[key])
        for key, tensor in module.state_dict().items()
    )
    print(f"Applied weights match expected: {same}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--use-coord", action="store_true", help="take the plan from a coordinator")
    parser.add_argument(
        "--endpoint", default=DEFAULT_ENDPOINT, help="where it is (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        return 0 if run(arguments.use_coord, arguments.endpoint) else 1
    except HotweightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
