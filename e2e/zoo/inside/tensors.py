"""Switches a model without an engine around it, and names every tensor in which it then differs
from a cold load; for `e2e.zoo.tensors`.

The model is built by vLLM's own loader and switched by the rank's own `Versions`. Compared is all
that a module holds, whoever made it: parameters, buffers, tensors in attributes, in closures (packed
weights) and in objects (kernels).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

os.environ["VLLM_PLUGINS"] = ""

import torch
from vllm._custom_ops import CPUDNNLGEMMHandler, onednn_mm
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader

from e2e.zoo.inside.serve import inspect_models_here, serve
from hotweights.adapters.vllm.rank.shadow import leftovers
from hotweights.adapters.vllm.rank.shadow.skeleton import INTERNAL
from hotweights.adapters.vllm.rank.versions import Rejection, Versions
from hotweights.adapters.vllm.rank.ways import Wish

MAX_PAUSE_SECONDS = 3600.0  # nobody waits here
NAMED = 5  # tensors that differ; the others are counted


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    config = _config(asked["models"]["v0"])
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
        initialize_model_parallel(1, 1)
    live = _load(config)
    # each with a configuration of its own: a model's layers are listed in it
    cold = {name: _load(_config(folder)) for name, folder in asked["models"].items()}
    versions = Versions(live, config, torch.device("cpu"), 1.0)
    switches: list[dict[str, Any]] = []
    told = {"switches": switches, "apart": len(differing(cold["v0"], cold["v1"]))}
    serves = "v0"
    if different := differing(live, cold[serves]):
        return {"error": f"two cold loads differ in {_some(different)}"}
    for name, wished in asked["steps"]:
        for wish in (wished, "Auto"):
            switches.append(_switch(versions, asked["images"][name], name, wish))
            serves = serves if switches[-1]["result"] == "refused" else name
            if different := differing(live, cold[serves]):
                switches[-1] |= {"result": "failed", "message": f"differs in {_some(different)}"}
                return told
            if serves == name:
                break
    return told


def _config(folder: str) -> Any:
    arguments = EngineArgs(model=folder, dtype="float32", enforce_eager=True, max_model_len=128)
    return arguments.create_engine_config()


def _load(config: Any) -> torch.nn.Module:
    loader = get_model_loader(config.load_config)
    with set_current_vllm_config(config):
        return loader.load_model(vllm_config=config, model_config=config.model_config)


def _switch(versions: Versions, image: Mapping[str, Any], name: str, wish: str) -> dict[str, Any]:
    switch = {"version": name, "wished": wish, "result": "equal"}
    fds = [os.open(path, os.O_RDONLY) for path in image["fds"]]
    digest = image["digest"]
    try:
        _, way = versions.take(digest, fds, Wish(wish, MAX_PAUSE_SECONDS), lambda: False)
    except Rejection as error:
        return switch | {"result": "refused", "message": f"{error.reason}: {error}"}
    finally:
        for fd in fds:
            os.close(fd)
    versions.check(digest)
    versions.install(digest)
    versions.settle()
    return switch | {"way": way}


def differing(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """The tensors that are not equal in both, bit for bit but for the kind of a NaN."""
    mine, theirs = dict(_tensors(one)), dict(_tensors(other))
    return sorted(
        name
        for name in mine.keys() | theirs.keys()
        if name not in mine or name not in theirs or not _equal(mine[name], theirs[name])
    )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta != other.is_meta:
        return False
    if one.is_meta:
        return True
    if one.layout != torch.strided:  # packed by a library: it compares as numbers
        one, other = one.to_dense(), other.to_dense()
    return bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        held = {**module._parameters, **module._buffers}
        held |= {key: value for key, value in module.__dict__.items() if key not in INTERNAL}
        for key, value in held.items():
            yield from _inside(value, f"{prefix}.{key}")


def _inside(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an attribute, by names that say where in it they are; each object once."""
    left, seen = [(name, value)], set()
    while left:
        at, item = left.pop()
        if isinstance(item, torch.Tensor):
            yield at, item.detach()
        elif isinstance(item, CPUDNNLGEMMHandler):
            # its weights lie behind a pointer: what it makes of the identity are they
            yield at, onednn_mm(item, torch.eye(item.k), None)
        # modules are looked at themselves, and classes are nobody's
        elif id(item) not in seen and not isinstance(item, torch.nn.Module | type | ModuleType):
            seen.add(id(item))
            left += [(f"{at}/{n}", part) for n, part in enumerate(leftovers.parts(item))]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


inspect_models_here()
serve(answer)
