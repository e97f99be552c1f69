"""Whether a version fits is said with the tensor's name, and never stricter than a cold load."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from hotweights.adapters.vllm.rank.fit import dry_load
from hotweights.adapters.vllm.rank.fit.dry_load import Spec, Trace
from hotweights.adapters.vllm.rank.table import ITEM_BYTES

BOOT = {
    "embed": Spec("F32", (8, 4)),
    "q": Spec("F32", (4, 4)),
    "k": Spec("F32", (2, 4)),
    "inv_freq": Spec("F32", (2,)),
}
BOOT_TRACE = Trace(copied={"embed": {"embed": 32}, "q": {"qkv": 16}, "k": {"qkv": 8}})
EXPECTED = BOOT_TRACE.by_parameter()


def specs(**changes: Spec | None) -> dict[str, Spec]:
    merged = {**BOOT, **changes}
    return {name: spec for name, spec in merged.items() if spec is not None}


def test_the_same_checkpoint_fits() -> None:
    assert dry_load.check_specs(BOOT, BOOT, BOOT_TRACE) is None
    assert dry_load.check_trace(BOOT, BOOT, BOOT_TRACE, EXPECTED) is None


def test_another_float_type_fits_because_a_cold_load_converts() -> None:
    assert dry_load.check_specs(specs(q=Spec("BF16", (4, 4))), BOOT, BOOT_TRACE) is None


def test_another_kind_of_number_does_not() -> None:
    misfit = dry_load.check_specs(specs(q=Spec("I32", (4, 4))), BOOT, BOOT_TRACE)
    assert misfit is not None
    assert (misfit.reason, misfit.message) == ("DtypeMismatch", "q is I32; the model runs with F32")


def test_another_shape_does_not() -> None:
    misfit = dry_load.check_specs(specs(q=Spec("F32", (8, 4))), BOOT, BOOT_TRACE)
    assert misfit is not None
    assert misfit.reason == "ShapeMismatch"
    assert misfit.message.startswith("q has shape [8, 4]")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize(("rows", "boot_rows"), [(32128, 32000), (32000, 32128)])
def test_a_vocabulary_with_another_padding_is_told_as_such(
    name: str, rows: int, boot_rows: int
) -> None:
    boot = {name: Spec("BF16", (boot_rows, 64))}
    misfit = dry_load.check_specs({name: Spec("BF16", (rows, 64))}, boot, None)
    assert misfit is not None
    assert misfit.reason == "ShapeMismatch"
    assert f"{rows} rows and not {boot_rows}; export it without padding" in misfit.message


def test_a_loader_that_says_nothing_leaves_the_tensor_s_shape_to_read() -> None:
    """As vLLM's embeddings do, where no checkpoint of the boot is there to compare."""
    name = "model.embed_tokens.weight"
    trace = Trace(failed=name, error="AssertionError: ")
    misfit = dry_load.check_trace({name: Spec("BF16", (32128, 64))}, {}, trace, {})
    assert misfit is not None
    assert (misfit.reason, misfit.message) == (
        "LoadFailed",
        f"the model's loader refused {name} [32128, 64]: AssertionError: ",
    )


def test_what_the_loaders_ignored_at_boot_may_look_as_it_likes() -> None:
    assert dry_load.check_specs(specs(inv_freq=Spec("I64", (9,))), BOOT, BOOT_TRACE) is None


def test_a_missing_tensor_is_named() -> None:
    trace = Trace(copied={"embed": {"embed": 32}, "q": {"qkv": 16}})
    misfit = dry_load.check_trace(specs(k=None), BOOT, trace, EXPECTED)
    assert misfit is not None
    assert misfit.reason == "MissingTensor"
    assert misfit.message.startswith("k is missing")


def test_what_no_parameter_needs_may_be_missing() -> None:
    assert dry_load.check_trace(specs(inv_freq=None), BOOT, BOOT_TRACE, EXPECTED) is None


def test_an_unknown_tensor_is_named_by_the_loader_that_refused_it() -> None:
    trace = Trace(copied=BOOT_TRACE.copied, failed="extra", error="ValueError: no such module")
    misfit = dry_load.check_trace(specs(extra=Spec("F32", (1,))), BOOT, trace, EXPECTED)
    assert misfit is not None
    assert misfit.reason == "UnknownTensor"
    assert "extra" in misfit.message


def test_a_known_tensor_that_the_loader_refuses_is_a_failed_load() -> None:
    misfit = dry_load.check_trace(BOOT, BOOT, Trace(failed="q", error="boom"), EXPECTED)
    assert misfit is not None
    assert misfit.reason == "LoadFailed"


def test_without_loaders_the_names_have_to_be_the_same() -> None:
    assert dry_load.check_names(BOOT, BOOT) is None
    missing, unknown = (
        dry_load.check_names(specs(q=None), BOOT),
        dry_load.check_names(specs(x=Spec("F32", ())), BOOT),
    )
    assert missing is not None
    assert unknown is not None
    assert (missing.reason, unknown.reason) == ("MissingTensor", "UnknownTensor")


def safetensors(path: Path, **tensors: Spec) -> None:
    """A file of that many bytes, with holes instead of numbers."""
    header, end = {}, 0
    for name, spec in tensors.items():
        nbytes = ITEM_BYTES[spec.dtype] * dry_load.numel(spec)
        offsets = [end, end := end + nbytes]
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
    data = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    os.truncate(path, 8 + len(data) + end)


def test_a_checkpoint_is_read_by_its_headers(tmp_path: Path) -> None:
    safetensors(tmp_path / "model-1.safetensors", q=BOOT["q"])
    safetensors(tmp_path / "model-2.safetensors", k=BOOT["k"])
    (tmp_path / "._model-2.safetensors").write_bytes(b"what a Mac leaves")
    assert dry_load.read_checkpoint(tmp_path) == {"q": BOOT["q"], "k": BOOT["k"]}


def test_the_measure_is_the_layout_that_vllm_boots_from(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", q=BOOT["q"])
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"q": "model.safetensors"}})
    )
    safetensors(tmp_path / "consolidated.safetensors", other=BOOT["k"])
    assert dry_load.read_checkpoint(tmp_path, "auto") == {"other": BOOT["k"]}
    assert dry_load.read_checkpoint(tmp_path, "mistral") == {"other": BOOT["k"]}
    assert dry_load.read_checkpoint(tmp_path, "safetensors") == {"q": BOOT["q"]}


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    safetensors(tmp_path / "a.safetensors", q=BOOT["q"])
    safetensors(tmp_path / "b.safetensors", k=BOOT["k"])
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"q": "a.safetensors"}})
    )
    assert dry_load.read_checkpoint(tmp_path) == {"q": BOOT["q"]}


def test_a_folder_of_something_else_is_no_measure(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert dry_load.read_checkpoint(tmp_path) == {}
    assert dry_load.read_checkpoint(tmp_path / "nowhere") == {}
