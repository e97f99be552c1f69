"""New weights for a model that lives in this process: `HotweightsWorkerExtension`.

    from hotweights.adapters.vllm_extension import HotweightsWorkerExtension

    extension = HotweightsWorkerExtension(endpoint="tcp://127.0.0.1:5555")
    extension.bind_module(model)
    extension.apply_update()

Either it fetches a version itself (`apply_update`, from the coordinator's plan or from one that it
is given), or somebody streams one in: `begin_update`, `request_buffer` and `finalize_shard` for
every tensor, `precommit`, `commit`. Both ways end alike: every name, shape and dtype is checked
against the model first, the copy is in place and all or nothing, and what was copied is read back
and compared. What runs the model in another thread holds ``extension.lock`` while it does; nothing
else stops it here (`install_autobind` pauses a whole engine).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotweights.adapters.inprocess import names
from hotweights.adapters.inprocess.errors import NotApplied, Torn
from hotweights.adapters.inprocess.names import NameMap
from hotweights_common.reasons import Reason
from hotweights_coordinator.wire.address import DEFAULT_ENDPOINT

if TYPE_CHECKING:
    import torch

    from hotweights.adapters.inprocess.buffers import Buffers
    from hotweights.adapters.inprocess.peer_sources import PeerSources, PlanStaging
    from hotweights.adapters.inprocess.torch_model import TorchModel
    from hotweights.adapters.inprocess.version import Version
    from hotweights.adapters.inprocess.vllm_model import VllmModel
    from hotweights_coordinator.client.worker_session import WorkerSession
    from hotweights_planner.manifest import Manifest
    from hotweights_planner.plan import Plan

__all__ = ["Applied", "HotweightsWorkerExtension", "NotApplied", "Torn"]
logger = logging.getLogger("hotweights.extension")
APPLY_SECONDS = 600.0  # as long as `begin --wait` and `replicate` wait for other workers
_said: set[str] = set()


@dataclass(frozen=True, slots=True)
class Applied:
    """What the model holds now. ``changed`` is False if it held it before."""

    version: str
    digest: str
    token: int
    """The coordinator's; 0: there was none."""
    nbytes: int
    """Bytes of the version."""
    seconds: float
    """That the switch took, without fetching and preparing."""
    changed: bool = True


class HotweightsWorkerExtension:
    """One model and what is put into it. One update at a time; every method may be called from any
    thread.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        name_map: NameMap = None,
        use_mpi: bool = False,
        pinned: bool = True,
        verify: bool = True,
        device: str = "cuda",
        roots: Iterable[str | os.PathLike[str]] | None = None,
        worker_id: str | None = None,
        token: str | None = None,
    ) -> None:
        """``name_map``: the model's names by the version's (a dict, or a function of the plan).
        ``verify=False`` takes streamed shards without a hash; everything that is fetched is
        verified in any case, and everything that is copied is read back. ``pinned`` and
        ``device="cuda"`` are for hosts with CUDA and mean nothing elsewhere. ``roots``: folders
        that sources may lie in.
        """
        self._endpoint = endpoint
        self._name_map = name_map
        self._verify = verify
        self._roots = roots
        self._worker_id = worker_id
        self._token = token
        self._pinned = _with_cuda(device) and pinned
        if use_mpi:
            _say_once(
                "use_mpi: this model fetches for itself; broadcast among ranks is `hotweights "
                "replicate --mpi`"
            )
        self.lock = threading.RLock()
        """Held while the model changes, and only then: not while a version is fetched or a commit
        is waited for.
        """
        self._calls = threading.RLock()
        self._model: TorchModel | VllmModel | None = None
        self._staging: PlanStaging | None = None
        self._begun: str = ""
        self._buffers: Buffers | None = None
        self._called: dict[str, str] = {}
        self._ready: Version | None = None
        self.applied: Applied | None = None
        """The last version that was put into the model."""

    # --- the model -----------------------------------------------------------------------------

    def bind_module(self, module: torch.nn.Module, vllm_config: Any = None) -> None:
        """The model to update. One of vLLM's needs its ``vllm_config`` (a worker has it as
        ``self.vllm_config``). Raises `NotApplied` for a model, or a vLLM, that cannot be updated so.
        """
        from hotweights.adapters.inprocess.torch_model import TorchModel

        with self._calls:
            self.abort_update()
            config = vllm_config if vllm_config is not None else _config_of(module)
            if config is None:
                self._model = TorchModel(module)
            else:
                from hotweights.adapters.vllm import plugin

                problem = plugin.unsupported()
                if problem:  # before that module, whose imports this vLLM may not have
                    raise NotApplied(Reason.UNSUPPORTED, problem)
                from hotweights.adapters.inprocess.vllm_model import VllmModel

                self._model = VllmModel(module, config)
            self.applied = None

    # --- streamed in ---------------------------------------------------------------------------

    def begin_update(self, version: str, manifest: Manifest | Mapping[str, Any] | bytes) -> None:
        """Open an attempt. ``manifest`` is a published one, or at least says ``{"tensors":
        [{"name", "dtype", "shape"}, …]}``.
        """
        from hotweights.adapters.inprocess.buffers import Buffers, specs_of

        with self._calls:
            self._bound()
            if self._begun:
                raise NotApplied(
                    Reason.BUSY, f"{self._begun} has begun; commit it, or call abort_update"
                )
            whole, body = _manifest(manifest)
            specs = specs_of(body)
            self._called = names.renamed(
                self._name_map,
                dict,
                [{"name": n, "dtype": s.dtype, "shape": s.shape} for n, s in specs.items()],
            )
            self._buffers = Buffers(specs, whole, pinned=self._pinned, verify=self._verify)
            self._begun, self._ready = version, None

    def request_buffer(self, tensor: str, shard_rank: int, nbytes: int) -> torch.Tensor:
        """Memory for a tensor's bytes, or for one shard of them (in order, from 0): a ``uint8``
        tensor to write into.
        """
        with self._calls:
            self._ready = None
            return self._open_buffers().request(tensor, shard_rank, nbytes)

    def finalize_shard(self, tensor: str, shard_rank: int, hash_: str | None = None) -> None:
        """It is filled and must have this hash: ``blake3:…`` or ``sha256:…``. From here on nobody
        may write to it.
        """
        with self._calls:
            self._open_buffers().finalize(tensor, shard_rank, hash_)

    def precommit(self) -> None:
        """Is everything there, and does it fit the model? Raises `NotApplied`, which names the
        tensor; the attempt stays open.
        """
        from hotweights.adapters.inprocess.version import Version

        with self._calls:
            buffers, called = self._open_buffers(), self._called
            specs = {called[name]: spec for name, spec in buffers.specs.items()}
            tensors = ((called[name], tensor) for name, tensor in buffers.tensors())
            version = Version(f"streamed:{self._begun}", self._begun, specs, tensors)
            self._take(version)
            self._ready = version

    def commit(self, version: str) -> Applied:
        """Put it into the model: all of it, read back and compared, or nothing. Raises
        `NotApplied`; `Torn` when the model must not be used any more. Takes `lock` for the copy.
        """
        with self._calls:
            if not self._begun or version != self._begun:
                raise NotApplied(
                    Reason.NOT_BEGUN,
                    f"{version} has not begun ({self._begun or 'nothing'} has); call begin_update",
                )
            if self._ready is None:
                raise NotApplied(
                    Reason.NOT_PRECOMMITTED,
                    f"{version} was not prechecked, or changed since; call precommit",
                )
            ready = self._ready
            self._ready = None  # a switch that fails has used it up: precommit again
            applied = self._switch(ready, 0)
            self._close_attempt()
            return applied

    def abort_update(self) -> None:
        """Let go of an attempt that has begun, if any; the model stays as it is."""
        with self._calls:
            if self._model is not None:
                self._model.discard()
            self._close_attempt()

    # --- fetched -------------------------------------------------------------------------------

    def apply_update(
        self,
        plan: Plan | Mapping[str, Any] | bytes | None = None,
        timeout_seconds: float = APPLY_SECONDS,
        wait_for_commit: bool = False,
    ) -> Applied:
        """Bring the model to the coordinator's version: that of the open attempt, or of the last
        commit.

        While an attempt is open this worker takes part in it: it says when it is ready, waits for
        the commit, and says when it has applied it, or why it could not. Where it is the only
        worker, nobody else has anything to be ready with, and it commits by itself, unless it is to
        ``wait_for_commit``. With ``plan`` there is no coordinator: that plan is fetched and
        applied.
        """
        with self._calls:
            self._bound()
            if self._begun:
                raise NotApplied(
                    Reason.BUSY,
                    f"{self._begun} is being streamed in; commit it, or call abort_update",
                )
            if plan is not None:
                return self._apply_plan(plan, timeout_seconds)
            return self._apply_assigned(timeout_seconds, wait_for_commit)

    def close(self) -> None:
        """Give the memory of the last version back; the model keeps its weights."""
        with self._calls:
            self.abort_update()
            if self._staging is not None:
                self._staging.close()
                self._staging = None

    def _apply_plan(self, plan: Plan | Mapping[str, Any] | bytes, seconds: float) -> Applied:
        version = self._stages().bring(_plan(plan), seconds)
        self._take(version)
        return self._switch(version, 0)

    def _apply_assigned(self, seconds: float, patient: bool) -> Applied:
        from hotweights_coordinator.client.client import Client
        from hotweights_coordinator.client.worker_session import (
            OPEN,
            WorkerSession,
            default_worker_id,
        )

        until = time.monotonic() + seconds
        self._worker_id = self._worker_id or default_worker_id("extension")
        with (
            Client(self._endpoint, self._token) as client,
            WorkerSession(client, self._worker_id) as session,
        ):
            found = session.assignment
            open_ = found.get("state") in OPEN
            goal = found if open_ else found.get("current")
            if not goal:
                text = "the coordinator has no version: submit a plan and begin it"
                raise NotApplied(
                    Reason.NOTHING_TO_APPLY,
                    f"{text} (`hotweights coord-submit-plan`, `hotweights begin`)",
                )
            token = int(goal["token"])
            if self.applied is not None and self.applied.digest == goal["digest"]:
                if open_:
                    self._await_commit(session, goal, until, patient)
                return self._again(session, self.applied, token)
            try:
                body = (
                    # 60 s: a plan may have hundreds of MB
                    client.call("get_plan", digest=goal["plan_digest"], timeout_seconds=60.0).binary
                    or b""
                )
                version = self._stages().bring(
                    _plan(body), max(1.0, until - time.monotonic()), _whence(found, self._token)
                )
                self._take(version)
                if open_:
                    self._await_commit(session, goal, until, patient)
                applied = self._switch(version, token)
            # whatever it was, the coordinator has to hear that this worker is not ready
            except Exception as error:
                session.failed(
                    getattr(error, "reason", Reason.APPLY_FAILED),
                    f"{type(error).__name__}: {error}",
                    token,
                )
                self._bound().discard()
                raise
            session.applied(applied.version, applied.digest, token)
            return applied

    def _again(self, session: WorkerSession, held: Applied, token: int) -> Applied:
        """Say that the model holds this version already, and remember under which token."""
        session.applied(held.version, held.digest, token)
        self.applied = Applied(held.version, held.digest, token, held.nbytes, 0.0, changed=False)
        return self.applied

    @staticmethod
    def _await_commit(
        session: WorkerSession, goal: Mapping[str, Any], until: float, patient: bool
    ) -> None:
        token = int(goal["token"])
        session.precommit(token)
        if not patient:
            session.commit_if_alone(str(goal["version"]), token)
        left = max(0.0, until - time.monotonic())
        decided = session.decided(token, left)
        if decided is None:
            why = f" ({session.error})" if session.error else ""
            text = f"attempt {token} was neither committed nor aborted within {left:.0f} s{why}"
            raise NotApplied(Reason.DECISION_TIMEOUT, f"{text}; see `hotweights coord-status`")
        if not decided:
            text = f"attempt {token} was aborted or replaced; the model keeps what it had"
            raise NotApplied(Reason.ABORTED, f"{text} (`hotweights coord-status` says why)")

    # --- both ----------------------------------------------------------------------------------

    def _take(self, version: Version) -> None:
        model = self._bound()
        model.check(version)
        model.prepare(version)

    def _switch(self, version: Version, token: int) -> Applied:
        began = time.monotonic()
        with self.lock:
            nbytes = self._bound().switch()
        self.applied = Applied(
            version.table.version, version.digest, token, nbytes, time.monotonic() - began
        )
        logger.info(
            "Applied %s: %d bytes in %.3f s", self.applied.version, nbytes, self.applied.seconds
        )
        return self.applied

    def _bound(self) -> TorchModel | VllmModel:
        if self._model is None:
            raise NotApplied(Reason.NO_MODULE, "there is no model yet; call bind_module first")
        return self._model

    def _open_buffers(self) -> Buffers:
        if self._buffers is None:
            raise NotApplied(Reason.NOT_BEGUN, "no update has begun; call begin_update first")
        return self._buffers

    def _close_attempt(self) -> None:
        self._begun, self._buffers, self._ready = "", None, None

    def _stages(self) -> PlanStaging:
        if self._staging is None:
            from hotweights.adapters.inprocess import peer_sources

            self._staging = peer_sources.PlanStaging(
                peer_sources.allowed_roots(self._roots), self._name_map
            )
        return self._staging


def _with_cuda(device: str) -> bool:
    """Whether there is CUDA to work for; said once where it was asked for in vain."""
    import torch

    if not device.startswith("cuda"):
        return False
    if not torch.cuda.is_available():
        _say_once(
            "there is no CUDA here: staging in plain memory, and the model's own devices are "
            "written to"
        )
        return False
    return True


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning("%s", text)


def _config_of(module: torch.nn.Module) -> Any:
    """The configuration of a model of vLLM's; None for any other module."""
    if not type(module).__module__.startswith("vllm."):
        return None
    config = getattr(module, "vllm_config", None)
    if config is None:
        raise NotApplied(
            Reason.NO_CONFIG,
            f"{type(module).__name__} is a model of vLLM's: bind_module(model, worker.vllm_config)",
        )
    return config


def _manifest(
    given: Manifest | Mapping[str, Any] | bytes,
) -> tuple[Manifest | None, Mapping[str, Any]]:
    """The manifest, where it is one with chunks, and its object."""
    from hotweights_planner.manifest import FORMAT, Manifest, parse

    if isinstance(given, Manifest):
        return given, json.loads(given.canonical)
    body = json.loads(given) if isinstance(given, bytes) else dict(given)
    if not isinstance(body.get("tensors"), list | tuple):
        raise NotApplied(Reason.BAD_MANIFEST, "the manifest has no list of tensors")
    if body.get("format") != FORMAT:
        return None, body
    body.pop("source", None)  # where its folder is, beside what identifies it
    canonical = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    return parse(canonical, "the manifest"), body


def _plan(given: Plan | Mapping[str, Any] | bytes) -> Plan:
    from hotweights_planner import plan as plans

    if isinstance(given, plans.Plan):
        return given
    return plans.parse(given if isinstance(given, bytes) else json.dumps(given).encode())


def _whence(found: Mapping[str, Any], token: str | None) -> PeerSources:
    """The workers that the coordinator names for the open attempt."""
    from hotweights.adapters.inprocess.peer_sources import PeerSources
    from hotweights.worker.assignments import Assignment
    from hotweights.worker.auth import PeerSecret, peer_secret
    from hotweights_coordinator.wire.auth import TOKEN_VARIABLE

    answer = Assignment.parse(found)
    members = (*answer.parents, *answer.fallbacks) if answer.attempt else ()
    endpoints = [one for member in members for one in member.endpoints if one.startswith("tcp://")]
    secret = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
    return PeerSources(endpoints, PeerSecret(peer_secret(secret)).token)
