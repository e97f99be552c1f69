"""Packs what a machine with a GPU, torch and no network lacks to run vLLM and these tests.

The machine is taken to have CPython 3.12, torch 2.11 for CUDA 13, transformers and cupy. vLLM 0.32
asks for torch 2.13 by its metadata; every symbol that its libraries want is in 2.11, which was
looked up and then seen to run (H200).
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from gpu import thin
from localvllm import build, releases

# of vLLM's closure, what such a machine has not and what is imported on the way to an answer
VLLM_NEEDS = """
apache-tvm-ffi cachetools cbor2 compressed-tensors fastapi httpx2 ijson jmespath jsonschema
jsonschema-specifications llguidance loguru mistral-common model-hosting-container-standards msgspec
openai partial-json-parser prometheus-fastapi-instrumentator pybase64 pycountry pydantic
pydantic-core pydantic-extra-types python-multipart pyzmq referencing rpds-py sniffio sse-starlette
starlette typing-inspection uvicorn watchfiles xgrammar
"""
ALSO = (
    *("openai-harmony==0.0.8", "kvikio-cu13==26.10.0", "libkvikio-cu13==26.10.0"),
    "rapids-logger==0.3.0",
)
TESTS_NEED = """
annotated-types attrs blake3 execnet hypothesis iniconfig orjson pluggy prometheus-client pytest
pytest-asyncio pytest-timeout pytest-xdist pyyaml rich sortedcontainers typer
"""
LEFT_OUT = (
    "*/_vllm_fa2_C.abi3.so",  # FlashAttention 3 serves Hopper
    "vllm/vllm-rs",  # a front end that is not the default
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    *("vllm/_qutlass_C*", "vllm/_flashmla*", "vllm/_flashkda*", "vllm/_deepselect*"),
    *("*/static/swagger-ui*", "*/__pycache__/*", "*.pyi", "*/tests/*", "tvm_ffi/include/*"),
)
# newest first: pip takes only exactly what it is told
GLIBC = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17", "2_12", "2_5")
BIG_NBYTES = 20 << 20  # files above this are parts of their own, packed and unpacked side by side


def pack(destination: Path) -> int:
    """Write the parts into a fresh ``destination``, which is complete or not there; gives their
    bytes. About three minutes on two cores. Raises CalledProcessError when a wheel cannot be had.
    """
    shutil.rmtree(destination, ignore_errors=True)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        wheels, site, packed = (Path(scratch, name) for name in ("wheels", "site", "packed"))
        packed.mkdir()
        _fetch(requirements(), wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            _unzip(wheel, site)
        for library in site.glob("vllm/**/*.abi3.so"):
            print(f"{library.name}: {thin.thin(library) >> 20} MiB of other GPUs' code blanked")
        with ProcessPoolExecutor() as pool:
            jobs = [
                pool.submit(_compress, packed / f"{name}.tar.xz", site, files)
                for name, files in parts(site).items()
            ]
            nbytes = sum(job.result() for job in jobs)
        packed.rename(destination)
    return nbytes


def requirements() -> list[str]:
    """Pins: vLLM's needs as its CPU build has them here, the tests' as this environment has."""
    pinned = dict(
        line.split("==") for line in releases.requirements(releases.NEWEST).split() if "==" in line
    )
    needs = [f"{name}=={pinned[name]}" for name in VLLM_NEEDS.split()]
    tests = [f"{name}=={importlib.metadata.version(name)}" for name in TESTS_NEED.split()]
    return [f"vllm=={build.VLLM_VERSION}", *needs, *ALSO, *tests]


def parts(site: Path) -> dict[str, list[str]]:
    """The files of each part, by the part's name."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for path in site.rglob("*") if path.is_file()):
        name = str(path.relative_to(site))
        small = "vllm" if name.startswith("vllm") else "packages"
        part = path.name.split(".")[0] if path.stat().st_size > BIG_NBYTES else small
        found.setdefault(part, []).append(name)
    return found


def _fetch(wanted: Iterable[str], folder: Path) -> None:
    platforms = [f"manylinux_{glibc}_x86_64" for glibc in GLIBC]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in platforms:
        command += ["--platform", platform]
    subprocess.run([*command, "--dest", str(folder), *wanted], check=True)


def _unzip(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT):
                archive.extract(name, site)


def _compress(target: Path, site: Path, files: list[str]) -> int:
    # the large dictionary pays: kernels for many head sizes resemble each other far apart
    with (
        lzma.open(target, "wb", preset=9 | lzma.PRESET_EXTREME) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for name in files:
            archive.add(site / name, name, recursive=False)
    return target.stat().st_size
