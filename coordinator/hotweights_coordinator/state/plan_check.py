"""Plans and manifests that arrive are checked beside the server, so that it goes on answering
meanwhile.

A big one is a second of work that Python does under its lock; a process of its own does it, given
the bytes on standard input, and what it writes is one line of JSON and, after a plan, the manifest
that is in it. A small one is not worth a process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from hotweights_common.reasons import Reason
from hotweights_coordinator.state.state import ManifestRef, PlanRef
from hotweights_coordinator.wire.messages import CallRefused
from hotweights_planner import manifest as manifests
from hotweights_planner import plan as plans
from hotweights_planner.errors import Refused

SMALL_NBYTES = 128 << 10  # checked in less time than it takes to start a process
CHECK_SECONDS = 120.0  # the largest plans take seconds; then the process is killed


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """A plan that is what it says, with its manifest's canonical bytes."""

    plan: PlanRef
    manifest: bytes


async def received(pieces: Sequence[memoryview]) -> bytes:
    """The pieces as one. Many bytes are copied by way of a file, because reading and writing files
    lets the server's thread go on.
    """
    if sum(map(len, pieces)) <= SMALL_NBYTES:
        return b"".join(pieces)
    return await asyncio.to_thread(_copied, pieces)


def _copied(pieces: Sequence[memoryview]) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.writelines(pieces)
        file.seek(0)
        return file.read()


async def plan(content: bytes) -> CheckedPlan:
    """What the plan says of itself, and its manifest. Raises `CallRefused` where it is none."""
    if len(content) <= SMALL_NBYTES:
        return await asyncio.to_thread(_plan, content)
    line, rest = await _beside("plan", content)
    return CheckedPlan(PlanRef(**line), rest)


async def manifest(content: bytes) -> ManifestRef:
    """What the manifest says of itself. Raises `CallRefused` where it is none."""
    if len(content) <= SMALL_NBYTES:
        return await asyncio.to_thread(_manifest, content)
    line, _ = await _beside("manifest", content)
    return ManifestRef(**line)


def _plan(content: bytes) -> CheckedPlan:
    try:
        found = plans.parse(content, "the submitted plan")
    except Refused as error:
        raise CallRefused(error.reason, str(error)) from error
    ref = PlanRef(
        found.digest,
        found.version,
        found.manifest.digest,
        found.source,
        found.model_id,
        len(content),
    )
    return CheckedPlan(ref, found.manifest.canonical)


def _manifest(content: bytes) -> ManifestRef:
    try:
        found = manifests.parse(content, "the submitted manifest")
    except Refused as error:
        raise CallRefused(error.reason, str(error)) from error
    return ManifestRef(found.digest, found.version)


async def _beside(kind: str, content: bytes) -> tuple[dict[str, Any], bytes]:
    # the loop would feed a pipe bit by bit
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as made:
        await asyncio.to_thread(given.write, content)
        await asyncio.to_thread(given.seek, 0)
        code, complained = await _run(kind, given, made)
        await asyncio.to_thread(made.seek, 0)
        written = await asyncio.to_thread(made.readline)
        rest = await asyncio.to_thread(made.read)
    if code or not written:
        # the last line of a traceback says what was wrong
        last = complained.decode(errors="replace").strip().rpartition("\n")[2][-300:]
        raise CallRefused(
            Reason.BAD_REQUEST, f"checking the {kind} failed: {last or f'exit code {code}'}"
        )
    line: dict[str, Any] = json.loads(written)
    if "refused" in line:
        raise CallRefused(line["refused"], line["message"])
    return line, rest


async def _run(kind: str, given: IO[bytes], made: IO[bytes]) -> tuple[int | None, bytes]:
    command = (sys.executable, "-m", "hotweights_coordinator.state.plan_check", kind)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=given, stdout=made, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            _, complained = await process.communicate()
    except TimeoutError:
        raise CallRefused(
            Reason.BAD_REQUEST, f"checking the {kind} took longer than {CHECK_SECONDS:g} s"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, complained


def main() -> None:
    """The process beside, which lets the server go first."""
    os.nice(10)  # heartbeats are answered first
    # it would look again and again for cycles in a million objects that have none, and the process
    # ends anyway
    gc.disable()
    content = sys.stdin.buffer.read()
    rest = b""
    try:
        if sys.argv[1] == "plan":
            checked = _plan(content)
            line, rest = asdict(checked.plan), checked.manifest
        else:
            line = asdict(_manifest(content))
    except CallRefused as error:
        line = {"refused": error.reason, "message": str(error)}
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n" + rest)


if __name__ == "__main__":
    main()
