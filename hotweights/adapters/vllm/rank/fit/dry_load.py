"""Does a version fit the model that runs? Said before anything is touched, with the tensor's name.

A cold load is the judge: what vLLM accepts when it starts is accepted here (a bfloat16 checkpoint
in a float32 engine, a tied ``lm_head`` that is there or not, rotary tables that nobody reads), and
what it would refuse is refused. So the loaders themselves are asked, with tensors that have a shape
and no data (`shadow.trace`). But vLLM's loaders let some errors pass, silently: a missing tensor
leaves memory as it was, a too large one is cut. Against those stands the checkpoint that this
engine booted from: which of its tensors went where, and how many elements each parameter got from
them. This module has the rules; it imports neither torch nor vllm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# safetensors' names; float8 is not among them: it comes with scales, so it is no number to convert
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# embeddings and head, as Llama's, GPT-2's and GPT-NeoX' kin call them
_VOCABULARY = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor without its data, whole as in the checkpoint (no rank's part of it)."""

    dtype: str
    """As safetensors spells it, ``BF16``."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """Why not; ``reason`` is one of the wire's (`frames.Rejected`)."""

    reason: str
    message: str


@dataclass(slots=True)
class Trace:
    """What the model's loaders did with a checkpoint's tensors: elements copied, by tensor and
    parameter.
    """

    copied: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: dict[str, frozenset[str]] = field(default_factory=dict)
    """Of each parameter or buffer that was written: the tensors that what was written came from."""
    steps: dict[str, int] = field(default_factory=dict)
    """Of each of those a number that names all that was done to it, operation by operation."""
    read: set[str] = field(default_factory=set)
    """Tensors whose values a loader looked at."""
    changed: set[str] = field(default_factory=set)
    """Tensors of the checkpoint that a loader wrote into itself."""
    opaque: bool = False
    """It put other tensors or other memory in the place of the model's: nobody saw what came of
    it.
    """
    left: bool = False  # it left plain values in modules
    failed: str | None = None  # the tensor at which a loader raised
    error: str = ""
    unable: bool = False  # a loader needs data and cannot be asked this way: nothing is known

    @property
    def complete(self) -> bool:
        """Whether all that the loaders did to tensors was seen. What one does with a tensor's
        value, such as taking another tensor, is not.
        """
        return self.failed is None and not self.unable and not self.opaque and not self.read

    def by_parameter(self) -> dict[str, int]:
        """Elements that each parameter or buffer got, of all tensors together."""
        totals: dict[str, int] = {}
        for parameters in self.copied.values():
            for parameter, numel in parameters.items():
                totals[parameter] = totals.get(parameter, 0) + numel
        return totals


def check_specs(
    version: Mapping[str, Spec], boot: Mapping[str, Spec], boot_trace: Trace | None
) -> DoesNotFit | None:
    """Tensors that both checkpoints have must agree in shape and in the kind of number."""
    for name, spec in version.items():
        known = boot.get(name)
        if known is None or (boot_trace is not None and not boot_trace.copied.get(name)):
            # a new name is the loaders' question; what they ignored at boot may look as it likes
            continue
        if spec.shape != known.shape:
            return DoesNotFit(
                "ShapeMismatch",
                f"{name} has shape {_shape(spec)}; the model runs with {_shape(known)}"
                + _of_vocabulary(name, spec, known),
            )
        if not _same_kind(spec.dtype, known.dtype):
            return DoesNotFit(
                "DtypeMismatch", f"{name} is {spec.dtype}; the model runs with {known.dtype}"
            )
    return None


def check_trace(
    version: Mapping[str, Spec],
    boot: Mapping[str, Spec],
    trace: Trace,
    expected: Mapping[str, int],
) -> DoesNotFit | None:
    """The loaders took every tensor, and every parameter got as much as it needs (``expected``
    elements).
    """
    if trace.failed is not None:
        return _loader_refused(trace.failed, trace.error, version, boot)
    got = trace.by_parameter()
    short = [parameter for parameter, numel in expected.items() if got.get(parameter, 0) < numel]
    if not short:
        return None
    # a tensor's name helps more than a parameter's: one fused parameter has several tensors
    absent = sorted(boot.keys() - version.keys())
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        return DoesNotFit(
            "MissingTensor", f"{absent[0]}{more} is missing; {short[0]} would keep its old weights"
        )
    return DoesNotFit(
        "MissingTensor",
        f"nothing in the version fills {short[0]} ({len(short)} parameters are incomplete)",
    )


def check_names(version: Mapping[str, Spec], boot: Mapping[str, Spec]) -> DoesNotFit | None:
    """Where the loaders cannot be asked: exactly the names that the engine booted from."""
    for name in version:
        if name not in boot:
            return DoesNotFit(
                "UnknownTensor", f"{name} is not in the checkpoint that this engine booted from"
            )
    for name in boot:
        if name not in version:
            return DoesNotFit("MissingTensor", f"{name} is missing; the engine booted with it")
    return None


def _loader_refused(
    name: str, error: str, version: Mapping[str, Spec], boot: Mapping[str, Spec]
) -> DoesNotFit:
    if boot and name not in boot:
        return DoesNotFit("UnknownTensor", f"{name} is unknown to the model: {error}")
    # with a boot checkpoint `check_specs` has compared shapes already; here only the words are left
    if not boot and name in version and "shape" in error.lower():
        return DoesNotFit("ShapeMismatch", f"{name} {_shape(version[name])}: {error}")
    # vLLM's loaders assert shapes without a word
    shape = f" {_shape(version[name])}" if name in version else ""
    return DoesNotFit("LoadFailed", f"the model's loader refused {name}{shape}: {error}")


def _of_vocabulary(name: str, spec: Spec, known: Spec) -> str:
    """A word more where only the rows of the vocabulary differ: trainers pad them, so that each
    rank of theirs has as many, and some exports keep the padding.
    """
    if not name.endswith(_VOCABULARY) or spec.shape[1:] != known.shape[1:]:
        return ""
    return (
        f": its vocabulary has {spec.shape[0]} rows and not {known.shape[0]}; export it without "
        "padding, or restart the pods with this version if it is to have that many"
    )


def _same_kind(first: str, second: str) -> bool:
    """Loaders convert between floats; between a float and anything else they would silently make
    nonsense.
    """
    return first == second or (first in _FLOATS and second in _FLOATS)


def _shape(spec: Spec) -> str:
    return str(list(spec.shape))


def read_checkpoint(folder: Path, load_format: str = "auto") -> dict[str, Spec]:
    """The tensors of a safetensors folder by their headers alone, as vLLM reads it with that
    ``--load-format``; empty when it is none, or when any of its files cannot be read: half a measure
    would refuse good versions.
    """
    from safetensors import SafetensorError, safe_open  # every vLLM has it

    specs: dict[str, Spec] = {}
    try:
        for file in _files(folder, load_format):
            with safe_open(str(file), "np") as opened:  # maps the file; no tensor is read
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    tensor = opened.get_slice(name)
                    specs[name] = Spec(tensor.get_dtype(), tuple(tensor.get_shape()))
    except (OSError, SafetensorError):
        return {}
    return specs


def _files(folder: Path, load_format: str) -> Iterable[Path]:
    """As vLLM 0.32 chooses them (``_prepare_weights`` in ``model_loader/default_loader.py``): where
    Mistral's own layout lies in the folder, ``auto`` reads that; of either layout its index, where
    there is one, says which files count.
    """
    consolidated = sorted(folder.glob("consolidated*.safetensors"))
    every = sorted(path for path in folder.glob("*.safetensors") if path.name[0] != ".")
    if load_format == "mistral" or (load_format == "auto" and consolidated):
        found, index = consolidated, "consolidated.safetensors.index.json"
    else:
        found, index = every, "model.safetensors.index.json"
    try:
        named = set(json.loads((folder / index).read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return found
    return [folder / name for name in sorted(named)]


def numel(spec: Spec) -> int:
    return math.prod(spec.shape)
