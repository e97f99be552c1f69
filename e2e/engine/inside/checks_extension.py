"""`HotweightsWorkerExtension` on plain torch modules: what fits is copied whole, what does not is
refused by name and changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hotweights.adapters.inprocess import torch_model
from hotweights.adapters.inprocess.torch_model import same_bytes
from hotweights.adapters.vllm.rank.table import TORCH_NAMES
from hotweights.adapters.vllm_extension import HotweightsWorkerExtension, NotApplied, Torn
from hotweights_planner import plan as plans
from hotweights_planner.manifest import CHUNK_NBYTES, Manifest
from hotweights_storage.errors import ChecksumMismatch, TransferError
from hotweights_storage.resolve import publish
from hotweights_storage.sources.file import open_folder

Tensors = dict[str, torch.Tensor]
NAMES = {
    getattr(torch, torch_name): name
    for name, torch_name in TORCH_NAMES.items()
    if hasattr(torch, torch_name)
}


def write(folder: Path, tensors: Tensors, version: str = "v1") -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    with open_folder(folder) as source:
        return publish(source, "demo", version)


def plan_of(folder: Path, manifest: Manifest, base: Manifest | None = None) -> plans.Plan:
    return plans.build(manifest, base, folder.resolve().as_uri())


def bound(module: torch.nn.Module, **values: Any) -> HotweightsWorkerExtension:
    extension = HotweightsWorkerExtension(**{"device": "cpu", "roots": ["/"], **values})
    extension.bind_module(module)
    return extension


def snapshot(module: torch.nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert same_bytes(tensor, second[name]), name


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def stream(
    extension: HotweightsWorkerExtension, tensors: Tensors, shards: int = 1, version: str = "v1"
) -> None:
    """What a trainer does: it fills a buffer for every shard and says what is in it."""
    listed = [
        {"name": n, "dtype": NAMES[t.dtype], "shape": list(t.shape)} for n, t in tensors.items()
    ]
    extension.begin_update(version, {"tensors": listed})
    for name, tensor in tensors.items():
        data = raw(tensor)
        step = max(1, -(-len(data) // shards))
        for rank, start in enumerate(range(0, len(data), step)):
            part = data[start : start + step]
            extension.request_buffer(name, rank, len(part)).copy_(
                torch.frombuffer(bytearray(part), dtype=torch.uint8)
            )
            extension.finalize_shard(name, rank, f"blake3:{blake3(part).hexdigest()}")


class Odd(torch.nn.Module):  # type: ignore[misc]
    """Everything that a copy can get wrong: many dtypes, no dimension, holes, ties, buffers, a
    table that nobody saves.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = torch.nn.BatchNorm1d(5)
        self.scalar = torch.nn.Parameter(torch.randn(()))
        self.bf16 = torch.nn.Parameter(torch.randn(7, 3).to(torch.bfloat16))
        self.turned = torch.nn.Parameter(torch.randn(6, 4).t())
        self.embed = torch.nn.Embedding(11, 4)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("eight", torch.randn(9, 4).to(torch.float8_e4m3fn))
        self.register_buffer("mask", torch.randint(0, 2, (5,)).bool())
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("holes", torch.randn(4, 10)[:, ::3])
        self.register_buffer("rotary", torch.randn(3), persistent=False)

    def version(self) -> Tensors:
        return {name: tensor for name, tensor in snapshot(self).items() if name != "head.weight"}


def test_everything_is_taken_over_byte_for_byte(tmp_path: Path) -> None:
    module, new = Odd(0), Odd(1)
    new.scalar.data.fill_(float("nan"))
    table, holes = module.rotary.clone(), module.holes.stride()
    manifest = write(tmp_path, new.version())
    applied = bound(module).apply_update(plan_of(tmp_path, manifest))
    assert (applied.version, applied.digest, applied.changed) == ("v1", manifest.digest, True)
    assert_same(snapshot(module), snapshot(new))
    assert module.head.weight is module.embed.weight
    assert module.turned.stride() == (1, 4)
    assert module.holes.stride() == holes
    assert torch.equal(module.rotary, table)


def test_a_tie_may_come_under_both_names_with_one_value(tmp_path: Path) -> None:
    module, new = Odd(0), Odd(1)
    both = {**new.version(), "head.weight": new.embed.weight}
    bound(module).apply_update(plan_of(tmp_path / "a", write(tmp_path / "a", both)))
    assert_same(snapshot(module), snapshot(new))
    before = snapshot(module)
    both["head.weight"] = torch.zeros_like(new.embed.weight)
    with pytest.raises(
        NotApplied, match=r"head\.weight and embed\.weight are one tensor"
    ) as caught:
        bound(module).apply_update(plan_of(tmp_path / "b", write(tmp_path / "b", both)))
    assert caught.value.reason == "TiedTensorsDiffer"
    assert_same(snapshot(module), before)


def changed(tensors: Tensors, **values: torch.Tensor | None) -> Tensors:
    result = {**tensors, **{name.replace("__", "."): value for name, value in values.items()}}
    return {name: tensor for name, tensor in result.items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "reason", "named"),
    [
        ({"extra": torch.zeros(2)}, "UnknownTensor", "extra is not in the module"),
        ({"rotary": torch.zeros(3)}, "UnknownTensor", "rotary is not in the module"),
        ({"norm__running_mean": None}, "MissingTensor", "norm.running_mean is missing"),
        ({"embed__weight": None}, "MissingTensor", "embed.weight is missing"),
        (
            {"bf16": torch.zeros(3, 7, dtype=torch.bfloat16)},
            "ShapeMismatch",
            r"bf16 has shape \[3, 7\]",
        ),
        ({"scalar": torch.zeros(1)}, "ShapeMismatch", r"scalar has shape \[1\]"),
        ({"bf16": torch.zeros(7, 3)}, "DtypeMismatch", "bf16 is F32"),
        ({"eight": torch.zeros(9, 4, dtype=torch.uint8)}, "DtypeMismatch", "eight is U8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: Any, reason: str, named: str
) -> None:
    module = Odd(0)
    before, version = snapshot(module), changed(Odd(1).version(), **change)
    extension = bound(module)
    with pytest.raises(NotApplied, match=named) as caught:
        extension.apply_update(plan_of(tmp_path, write(tmp_path, version)))
    assert caught.value.reason == reason
    assert_same(snapshot(module), before)
    stream(extension, version)
    with pytest.raises(NotApplied, match=named):
        extension.precommit()
    assert_same(snapshot(module), before)


def test_only_what_changed_is_fetched_again(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    extension = bound(module)
    first = snapshot(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)))
    one = write(tmp_path / "one", first)
    extension.apply_update(plan_of(tmp_path / "one", one))
    second = {**first, "1.bias": torch.ones(64)}
    two = write(tmp_path / "two", second, "v2")
    weights = tmp_path / "two" / "model.safetensors"
    offset = next(t.offset for t in two.tensors if t.name == "0.weight")
    with weights.open("r+b") as file:  # broken where nothing has to be read
        file.seek(offset)
        file.write(b"\xff" * 64)
    extension.apply_update(plan_of(tmp_path / "two", two, one))
    assert_same(snapshot(module), second)


def test_broken_bytes_are_never_applied(tmp_path: Path) -> None:
    module = torch.nn.Linear(8, 8)
    before = snapshot(module)
    manifest = write(tmp_path, snapshot(torch.nn.Linear(8, 8)))
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(TransferError, match=r"model\.safetensors"):
        bound(module).apply_update(plan_of(tmp_path, manifest))
    assert_same(snapshot(module), before)
    assert issubclass(ChecksumMismatch, TransferError)


def test_a_source_outside_the_roots_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write(tmp_path / "out", snapshot(torch.nn.Linear(2, 2)))
    plan = plan_of(tmp_path / "out", manifest)
    for roots in ([tmp_path / "in"], None):
        with pytest.raises(NotApplied, match="HOTWEIGHTS_ROOTS") as caught:
            bound(torch.nn.Linear(2, 2), roots=roots).apply_update(plan)
        assert caught.value.reason == "SourceNotAllowed"
    monkeypatch.setenv("HOTWEIGHTS_ROOTS", f"/nowhere:{tmp_path}")
    assert bound(torch.nn.Linear(2, 2), roots=None).apply_update(plan).changed


@pytest.mark.parametrize("as_dict", [True, False])
def test_names_are_mapped_for_moved_and_unmoved_tensors(tmp_path: Path, as_dict: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    first = {name.replace(".", "/"): tensor for name, tensor in snapshot(module).items()}
    second = {**first, "1/bias": torch.ones(3)}
    one, two = write(tmp_path / "one", first), write(tmp_path / "two", second, "v2")

    def slashes(plan: dict[str, Any]) -> dict[str, str]:
        return {
            it["key"]: it["tensor"].replace("/", ".") for b in plan["buckets"] for it in b["items"]
        }

    table = {name: name.replace("/", ".") for name in first}
    extension = bound(module, name_map=table if as_dict else slashes)
    extension.apply_update(plan_of(tmp_path / "two", two, one))
    assert_same(
        snapshot(module), {name.replace("/", "."): tensor for name, tensor in second.items()}
    )


def test_a_name_map_that_joins_two_tensors_is_refused(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 3)
    plan = plan_of(tmp_path, write(tmp_path, snapshot(module)))
    with pytest.raises(NotApplied, match="both called weight"):
        bound(module, name_map={"bias": "weight"}).apply_update(plan)


# --- streamed in -------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_streamed_version_is_checked_and_committed(shards: int) -> None:
    module, new = Odd(0), Odd(1)
    extension = bound(module)
    stream(extension, new.version(), shards)
    extension.precommit()
    assert extension.commit("v1").version == "v1"
    assert_same(snapshot(module), snapshot(new))


def test_a_published_manifest_is_a_manifest_to_stream_by(tmp_path: Path) -> None:
    module, new = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    manifest = write(tmp_path, snapshot(new))
    extension = bound(module)
    extension.begin_update("v1", manifest.canonical)
    for tensor in manifest.tensors:
        extension.request_buffer(tensor.name, 0, tensor.nbytes).zero_()
        extension.finalize_shard(tensor.name, 0)
    with pytest.raises(NotApplied, match="chunk 0 is not the manifest's"):
        extension.precommit()
    for name, value in snapshot(new).items():
        extension.request_buffer(name, 0, value.nbytes).copy_(value.reshape(-1).view(torch.uint8))
        extension.finalize_shard(name, 0)
    extension.precommit()
    extension.commit("v1")
    assert_same(snapshot(module), snapshot(new))


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda e: e.request_buffer("nothing", 0, 4), "UnknownTensor"),
        (lambda e: e.request_buffer("bias", 0, 13), "BadShard"),
        (lambda e: e.request_buffer("bias", -1, 4), "BadShard"),
        (lambda e: (e.request_buffer("bias", 0, 8), e.request_buffer("bias", 1, 8)), "BadShard"),
        (lambda e: e.finalize_shard("bias", 0, "blake3:00"), "NoBuffer"),
        (
            lambda e: (e.request_buffer("bias", 0, 12), e.finalize_shard("bias", 0, "blake3:00")),
            "ChecksumMismatch",
        ),
        (
            lambda e: (e.request_buffer("bias", 0, 12), e.finalize_shard("bias", 0, "crc:00")),
            "BadHash",
        ),
        (lambda e: (e.request_buffer("bias", 0, 12), e.finalize_shard("bias", 0)), "NoHash"),
        (lambda e: e.precommit(), "Incomplete"),
        (lambda e: (e.request_buffer("bias", 0, 12), e.precommit()), "Incomplete"),
        (lambda e: e.commit("v1"), "NotPrecommitted"),
        (lambda e: e.commit("v2"), "NotBegun"),
        (lambda e: e.begin_update("v2", {"tensors": []}), "Busy"),
        (lambda e: e.apply_update(b"{}"), "Busy"),
    ],
)
def test_an_attempt_has_an_order(
    act: Callable[[HotweightsWorkerExtension], Any], reason: str
) -> None:
    module = torch.nn.Linear(3, 3)
    before, extension = snapshot(module), bound(module)
    listed = [
        {"name": "weight", "dtype": "F32", "shape": [3, 3]},
        {"name": "bias", "dtype": "F32", "shape": [3]},
    ]
    extension.begin_update("v1", {"tensors": listed})
    with pytest.raises(NotApplied) as caught:
        act(extension)
    assert caught.value.reason == reason
    assert_same(snapshot(module), before)


def test_sha256_is_a_hash_too_and_a_buffer_that_is_asked_again_is_open_again() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    extension = bound(module)
    extension.begin_update("v1", {"tensors": [{"name": "weight", "dtype": "F32", "shape": [1, 1]}]})
    buffer = extension.request_buffer("weight", 0, 4)
    buffer.copy_(torch.tensor([2.0]).view(torch.uint8))
    extension.finalize_shard("weight", 0, f"sha256:{hashlib.sha256(raw(buffer)).hexdigest()}")
    extension.precommit()
    assert extension.request_buffer("weight", 0, 4) is buffer
    with pytest.raises(NotApplied, match="not prechecked, or changed since"):
        extension.commit("v1")
    with pytest.raises(NotApplied, match="was not finalized"):
        extension.precommit()
    extension.abort_update()
    with pytest.raises(NotApplied, match="begin_update first"):
        extension.precommit()


def test_without_a_module_nothing_begins() -> None:
    with pytest.raises(NotApplied, match="bind_module"):
        HotweightsWorkerExtension(device="cpu").apply_update()
    with pytest.raises(NotApplied, match="no parameters"):
        bound(torch.nn.ReLU())


# --- the switch --------------------------------------------------------------------------------


class Flaky(torch.Tensor):  # type: ignore[misc]
    """A tensor whose next copies fail, or write something else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and faults:
            fault = faults.pop(0)
            if fault == "raise":
                raise RuntimeError("the device is lost")
            if fault == "lie":
                return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


faults: list[str] = []


def flaky_module() -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[1].weight = torch.nn.Parameter(module[1].weight.detach().as_subclass(Flaky))
    return module


@pytest.mark.parametrize(("fault", "reason"), [("raise", "CopyFailed"), ("lie", "ReadBackDiffers")])
def test_a_copy_that_breaks_or_lies_puts_everything_back(
    tmp_path: Path, fault: str, reason: str
) -> None:
    module = flaky_module()
    before = snapshot(module)
    new = snapshot(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
    plan = plan_of(tmp_path, write(tmp_path, new))
    extension = bound(module)
    faults[:] = [fault]
    with pytest.raises(NotApplied, match=r"1\.weight") as caught:
        extension.apply_update(plan)
    assert caught.value.reason == reason
    assert_same(snapshot(module), before)
    assert extension.applied is None
    extension.apply_update(plan)
    assert_same(snapshot(module), new)


def test_a_way_back_that_breaks_too_says_that_the_model_is_torn(tmp_path: Path) -> None:
    module = flaky_module()
    plan = plan_of(
        tmp_path,
        write(
            tmp_path, snapshot(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
        ),
    )
    extension = bound(module)
    faults[:] = ["raise", "raise"]
    with pytest.raises(Torn, match="load the model anew"):
        extension.apply_update(plan)
    faults.clear()


def test_overlapping_tensors_are_noticed_when_they_are_read_back(tmp_path: Path) -> None:
    memory = torch.zeros(6)
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[2:])
    plan = plan_of(tmp_path, write(tmp_path, {"a": torch.ones(4), "b": torch.full((4,), 2.0)}))
    with pytest.raises(NotApplied, match="a was copied, but reads otherwise"):
        bound(module).apply_update(plan)
    assert torch.equal(memory, torch.zeros(6))


@pytest.mark.parametrize(
    ("target", "named"),
    [(torch.empty(2, 2, device="meta"), "meta"), (torch.zeros(1, 2).expand(2, 2), "expanded")],
)
def test_what_has_no_memory_of_its_own_is_refused(
    tmp_path: Path, target: torch.Tensor, named: str
) -> None:
    module = torch.nn.Module()
    module.register_buffer("table", target)
    with pytest.raises(NotApplied, match=named):
        bound(module).apply_update(plan_of(tmp_path, write(tmp_path, {"table": torch.ones(2, 2)})))


def test_large_tensors_of_several_chunks(tmp_path: Path) -> None:
    module, new = torch.nn.Linear(1024, 2100, bias=False), torch.nn.Linear(1024, 2100, bias=False)
    manifest = write(tmp_path, snapshot(new))
    assert manifest.tensors[0].nbytes > 2 * CHUNK_NBYTES
    bound(module).apply_update(plan_of(tmp_path, manifest))
    assert_same(snapshot(module), snapshot(new))


# two numbers of F4 are one item of torch, so its shapes are not the version's
KINDS = sorted(set(NAMES.values()) - {"F4"})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_any_module_takes_any_bytes_that_fit(
    kinds: list[str], shapes: list[list[int]], seed: int
) -> None:
    torch.manual_seed(seed)
    module, version = torch.nn.Module(), {}
    for number, (kind, shape) in enumerate(zip(kinds, shapes, strict=False)):
        dtype = torch_model.torch_dtype(kind)
        item = torch.empty((), dtype=dtype).element_size()
        count = item * max(0, torch.Size(shape).numel())
        data = torch.randint(0, 2 if kind == "BOOL" else 256, (count,), dtype=torch.uint8)
        version[f"t{number}"] = data.view(dtype).view(shape)
        zeros = torch.zeros(count, dtype=torch.uint8)  # not every type can be converted to
        module.register_buffer(f"t{number}", zeros.view(dtype).view(shape))
    extension = bound(module)
    stream(extension, version)
    extension.precommit()
    extension.commit("v1")
    assert_same(snapshot(module), version)
