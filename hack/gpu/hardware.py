"""What this machine's GPU and memory can do, as one JSON object; each figure is a floor of ours.

    python hack/gpu/hardware.py [--json FILE]

Rates are in GB/s (10^9), the best of three. What does not work is told as ``error`` in its place,
and ends it with 1.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GIB = 1 << 30
SHARED_NBYTES = 64 << 20
ALL_SEALS = 0xF  # SEAL, SHRINK, GROW, WRITE: as the agent seals what it hands over
READ_ONLY = 0x08  # CU_MEMHOSTREGISTER_READ_ONLY; without it, sealed memory is refused
POPULATE_READ = 22  # madvise(2)
# containers' namespaces; the last is a pod beside another
NAMESPACES = {
    "same": (),
    "ipc": ("--ipc",),
    "mount": ("--mount",),
    "pid and mount": ("--pid", "--mount", "--fork", "--mount-proc"),
    "pid, mount, ipc and net": ("--pid", "--mount", "--ipc", "--net", "--fork", "--mount-proc"),
}


class Driver:
    """libcuda with device 0's context, every call checked. No torch: a child shall start fast."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self.cuInit(0)
        context = ctypes.c_void_p()
        self.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        self.cuCtxSetCurrent(context)

    def __getattr__(self, name: str) -> Callable[..., None]:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise RuntimeError(str(error)) from error

        def call(*arguments: Any) -> None:
            code = function(*arguments)
            if code:
                text = ctypes.c_char_p()
                self._library.cuGetErrorName(code, ctypes.byref(text))
                raise RuntimeError(f"{name}: {(text.value or b'').decode()} ({code})")

        return call

    def mapped(self, block: ctypes.c_uint64) -> ctypes.c_uint64:
        """An address for a block of the virtual memory API, to read and to write."""
        address, size = ctypes.c_uint64(), ctypes.c_size_t(SHARED_NBYTES)
        nothing = ctypes.c_uint64(0)
        self.cuMemAddressReserve(ctypes.byref(address), size, ctypes.c_size_t(0), nothing, nothing)
        self.cuMemMap(address, size, ctypes.c_size_t(0), block, nothing)
        access = (ctypes.c_int * 3)(1, 0, 3)  # a device, the first, for reading and writing
        self.cuMemSetAccess(address, size, ctypes.byref(access), ctypes.c_size_t(1))
        return address

    def last_byte(self, address: ctypes.c_uint64) -> int:
        """Of shared memory."""
        byte = ctypes.c_ubyte()
        at = ctypes.c_uint64(address.value + SHARED_NBYTES - 1)
        self.cuMemcpyDtoH_v2(ctypes.byref(byte), at, ctypes.c_size_t(1))
        return byte.value


def machine() -> dict[str, Any]:
    """Names and sizes."""
    query = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    import torch

    kernel = os.uname().release
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return {
        "gpu": smi, "cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory_gib),
        "kernel": kernel, "torch": torch.__version__, "nvidia_fs": _loaded("nvidia_fs"),
    }  # fmt: skip


def _loaded(module: str) -> bool:
    return module in Path("/proc/modules").read_text()


def copies(nbytes: int = 2 * GIB) -> dict[str, float]:
    """The two rates of every pause: over the link, and within the card."""
    import torch

    one, two = (torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return {
        "host_to_device": _rate(lambda: one.copy_(host, non_blocking=True), nbytes),
        "device_to_host": _rate(lambda: host.copy_(one, non_blocking=True), nbytes),
        "device_to_device": _rate(lambda: two.copy_(one), nbytes),
    }


def sealed(nbytes: int = 8 * GIB) -> dict[str, Any]:
    """What the agent hands over: how fast it is mapped, registered and copied from."""
    import torch

    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    fd = os.memfd_create("gpu", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    piece = os.urandom(1 << 20) * 64
    result: dict[str, Any] = {"bytes": nbytes}
    with ThreadPoolExecutor(8) as pool:
        offsets = range(0, nbytes, len(piece))
        fill = _seconds(lambda: list(pool.map(lambda at: os.pwrite(fd, piece, at), offsets)))
    result["fill_by_8_threads"] = nbytes / fill / 1e9
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
    memory = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ)
    result["populate_seconds"] = _seconds(lambda: memory.madvise(POPULATE_READ))
    source = torch.frombuffer(memory, dtype=torch.uint8)
    result["pageable"] = _rate(lambda: target.copy_(source), nbytes)
    for threads in (1, 4, 8):
        result[f"staged_by_{threads}_threads"] = _staged(source, target, threads)
    driver, address = Driver(), ctypes.c_void_p(source.data_ptr())
    result["register_seconds"] = _seconds(
        lambda: driver.cuMemHostRegister_v2(address, ctypes.c_size_t(nbytes), READ_ONLY)
    )
    result["registered"] = _rate(lambda: target.copy_(source, non_blocking=True), nbytes)
    result["same"] = bool((target[-GIB:].cpu() == source[-GIB:]).all())
    result["unregister_seconds"] = _seconds(lambda: driver.cuMemHostUnregister(address))
    return result


def _staged(source: Any, target: Any, threads: int, piece: int = 4 << 20) -> float:
    """Through two page-locked buffers of each thread, by turns."""
    import torch

    nbytes = source.numel()
    torch.set_num_threads(1)

    def copy(number: int) -> None:
        torch.cuda.set_device(0)
        buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        sent = [torch.cuda.Event() for _ in range(2)]
        with torch.cuda.stream(torch.cuda.Stream()) as stream:
            del stream
            for turn, at in enumerate(range(number * piece, nbytes, threads * piece)):
                buffer, event = buffers[turn % 2], sent[turn % 2]
                event.synchronize()
                buffer.copy_(source[at : at + piece])
                target[at : at + piece].copy_(buffer, non_blocking=True)
                event.record()
            torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(threads) as pool:
        return _rate(lambda: list(pool.map(copy, range(threads))), nbytes)


def vmm() -> dict[str, str]:
    """Device memory by descriptor, in a process of other namespaces."""
    driver = Driver()
    # CUmemAllocationProp: pinned, a POSIX descriptor, on device 0
    properties = (ctypes.c_int * 8)(1, 1, 1, 0)
    block, fd = ctypes.c_uint64(), ctypes.c_int(-1)
    size = ctypes.c_size_t(SHARED_NBYTES)
    driver.cuMemCreate(ctypes.byref(block), size, ctypes.byref(properties), ctypes.c_uint64(0))
    driver.cuMemsetD8_v2(driver.mapped(block), ctypes.c_ubyte(77), size)
    driver.cuCtxSynchronize()
    driver.cuMemExportToShareableHandle(ctypes.byref(fd), block, 1, ctypes.c_uint64(0))
    return _children("vmm", str(fd.value), keep=(fd.value,))


def vmm_child(fd: str) -> int:
    driver, block = Driver(), ctypes.c_uint64()
    driver.cuMemImportFromShareableHandle(ctypes.byref(block), ctypes.c_void_p(int(fd)), 1)
    return driver.last_byte(driver.mapped(block))


def ipc() -> dict[str, str]:
    """Device memory by the older handle of 64 bytes, in a process of other namespaces."""
    driver = Driver()
    address, size = ctypes.c_uint64(), ctypes.c_size_t(SHARED_NBYTES)
    handle = _Handle()
    driver.cuMemAlloc_v2(ctypes.byref(address), size)
    driver.cuMemsetD8_v2(address, ctypes.c_ubyte(77), size)
    driver.cuCtxSynchronize()
    driver.cuIpcGetMemHandle(ctypes.byref(handle), address)
    return _children("ipc", bytes(handle.bytes).hex())


def ipc_child(handle: str) -> int:
    driver, address = Driver(), ctypes.c_uint64()
    driver.cuIpcOpenMemHandle_v2(
        ctypes.byref(address), _Handle((ctypes.c_ubyte * 64)(*bytes.fromhex(handle))), 1
    )
    return driver.last_byte(address)


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 64),)


def _children(kind: str, argument: str, keep: tuple[int, ...] = ()) -> dict[str, str]:
    """What a process of each set of namespaces reads: 77, or its last words."""
    found = {}
    for name, flags in NAMESPACES.items():
        command = ["unshare", *flags] if flags else []
        command += [sys.executable, __file__, "--child", kind, argument]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=30, pass_fds=keep
        )
        words = (done.stdout or done.stderr).strip().splitlines()
        found[name] = words[-1] if words else f"exit {done.returncode}"
    return found


def direct(nbytes: int = GIB) -> dict[str, Any]:
    """File to device by kvikio; without nvidia-fs it goes through the host, in silence."""
    import cupy
    import kvikio
    import kvikio.defaults

    path = "/tmp/hotweights-gpu.bin"
    data = cupy.arange(nbytes, dtype=cupy.uint8)
    with kvikio.CuFile(path, "w") as file:
        file.write(data)
    back = cupy.zeros_like(data)

    def read() -> None:
        with kvikio.CuFile(path, "r") as file:
            file.read(back)

    rate = nbytes / min(_seconds(read) for _ in range(3)) / 1e9
    Path(path).unlink()
    compat = bool(kvikio.defaults.is_compat_mode_preferred())
    return {"read": rate, "through_the_host": compat, "same": bool((data == back).all())}


def _rate(work: Callable[[], Any], nbytes: int) -> float:
    import torch

    def whole() -> None:
        work()
        torch.cuda.synchronize()

    return nbytes / min(_seconds(whole) for _ in range(3)) / 1e9


def _seconds(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        print({"vmm": vmm_child, "ipc": ipc_child}[sys.argv[2]](sys.argv[3]))
        return 0
    found: dict[str, Any] = {}
    for ask in (machine, copies, sealed, vmm, ipc, direct):
        try:
            found[ask.__name__] = ask()
        # any of these is an answer: what a driver or a sandbox refuses, what is not installed
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            found[ask.__name__] = {"error": f"{type(error).__name__}: {error}"}
    text = json.dumps(found, indent=1)
    print(text)
    if sys.argv[1:2] == ["--json"]:
        Path(sys.argv[2]).write_text(text)
    broken = [name for name, figures in found.items() if "error" in figures]
    print("all answered" if not broken else f"without an answer: {', '.join(broken)}")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
