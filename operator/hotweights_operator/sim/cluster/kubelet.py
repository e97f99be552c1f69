"""The kubelets: containers that start, end and start again, and pods that become Ready a little
after they could be.

A kubelet hears of the readiness gate by a watch of its own and writes Ready by a write of its own,
so its word comes up to two seconds after the agent's, for each pod always by the same lag. It
writes times by its node's clock, which may be wrong, and in whole seconds. A container that ends is
started again at once, then after ever longer waits (shorter ones than the real ones).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from hotweights_operator.model.objects import Pod
from hotweights_operator.sim.cluster.api import Api
from hotweights_operator.sim.cluster.engine import Engine

BACK_OFF_SECONDS = (0.0, 3.0, 6.0, 12.0)  # real ones: 10 s, doubled up to 5 min
GOOD_RUN_SECONDS = 600.0  # after which the next restart does not wait
_MAX_LAG_SECONDS = 2.0
_LAGS = (0.0, 0.2, 0.6, 1.0, 1.5, _MAX_LAG_SECONDS)


@dataclass(slots=True)
class Container:
    """What a kubelet remembers of one pod."""

    lag: timedelta
    started_at: datetime
    restarts: int = 0
    crashes: int = 0  # one after the other: they make the back-off
    again_at: datetime | None = None  # when it is started again; None: it runs
    gone_at: datetime | None = None  # when a terminating pod is gone
    gate_at: datetime | None = None  # since when the gate is True, in truth
    label_at: datetime | None = None  # and the digest's label as it is
    ready_at: datetime | None = None  # since when it is Ready, in truth
    seen_gate: bool = False
    # what it will hear of the gate, and when
    news: deque[tuple[datetime, bool]] = field(default_factory=deque)


@dataclass(slots=True)
class Kubelets:
    """The kubelets of all nodes, and the pods' containers."""

    api: Api
    draw: random.Random
    now: datetime
    containers: dict[str, Container] = field(default_factory=dict)  # by pod UID
    # by pod UID; none while a container waits
    engines: dict[str, Engine] = field(default_factory=dict)
    clocks: dict[str, timedelta] = field(default_factory=dict)  # node → how far its clock is off

    def clock(self, node: str) -> datetime:
        """What a node takes for the time."""
        off = self.clocks.get(node)
        return self.now + off if off else self.now

    def shown(self, node: str) -> datetime:
        """The same as Kubernetes shows it, in whole seconds."""
        return self.clock(node).replace(microsecond=0)

    def pods(self) -> list[Pod]:
        """All pods that the API server has, terminating ones too."""
        return [pod for _, pod in self.api.objects["pod"].values()]

    def in_service(self, uid: str) -> bool:
        """Whether a Service sends requests to this pod and gets answers."""
        pod, engine = self.api.get("pod", uid), self.engines.get(uid)
        return (
            pod is not None
            and pod.ready
            and pod.live
            and engine is not None
            and engine.phase == "Serving"
        )

    # -- what happens to pods -------------------------------------------------------------------

    def start_pod(self, pod: Pod) -> None:
        """A new pod: its engine starts to load."""
        lag = timedelta(seconds=self.draw.choice(_LAGS))
        self.containers[pod.uid] = Container(lag, self.now)
        self.engines[pod.uid] = self._process(0)
        self.api.put("pod", pod.uid, replace(pod, engine_started_at=self.shown(pod.node)))

    def end_container(self, uid: str, *, oom: bool = False) -> None:
        """The engine's process dies; the kubelet starts another, at once if it is the first time
        for long.
        """
        container, pod = self.containers.get(uid), self.api.get("pod", uid)
        if container is None or pod is None or container.again_at is not None:
            return
        del self.engines[uid]
        seconds = (self.now - container.started_at).total_seconds()
        container.crashes = 1 if seconds >= GOOD_RUN_SECONDS else container.crashes + 1
        wait = BACK_OFF_SECONDS[min(container.crashes, len(BACK_OFF_SECONDS)) - 1]
        if wait:
            self.api.counts["back-off of a container"] += 1
        container.again_at, container.ready_at = self.now + timedelta(seconds=wait), None
        since = self.shown(pod.node) if pod.ready else pod.ready_since
        fate = {"last_run_seconds": float(int(seconds)), "oom_killed": oom}
        self.api.put(
            "pod", uid, replace(pod, ready=False, ready_since=since, engine_started_at=None, **fate)
        )
        if not wait:
            self._start_again(uid, container)

    def terminate(self, uid: str) -> None:
        """A pod is deleted: it serves on until its container is stopped, and is gone then."""
        container, pod = self.containers.get(uid), self.api.get("pod", uid)
        if container is not None and pod is not None and not pod.terminating:
            container.gone_at = self.now + timedelta(seconds=self.draw.choice((0, 1, 5, 12)))
            self.api.put("pod", uid, replace(pod, terminating=True))

    def remove_pod(self, uid: str) -> None:
        """A pod is gone, with its container and its engine."""
        self.engines.pop(uid, None)
        self.containers.pop(uid, None)
        self.api.delete("pod", uid)

    def mark(self, uid: str, gate: bool, label: str, key: str) -> None:
        """An agent's write: the gate and the digest's label at once."""
        pod: Pod | None = self.api.get("pod", uid)
        if pod is None or (pod.gate, pod.digest_label) == (gate, label):
            return
        labels = {name: value for name, value in pod.labels.items() if name != key}
        if label:
            labels[key] = label
        since, container = pod.gate_since, self.containers[uid]
        if pod.digest_label != label:
            container.label_at = self.now
        if pod.gate != gate:
            since = self.shown(pod.node)
            container.gate_at = self.now if gate else None
            earliest = container.news[-1][0] if container.news else self.now
            container.news.append((max(earliest, self.now + container.lag), gate))
        self.api.put("pod", uid, replace(pod, gate=gate, gate_since=since, labels=labels))

    # -- time passes ----------------------------------------------------------------------------

    def step(self) -> None:
        """Do what is due by now: end, start again, or make Ready."""
        for uid, container in list(self.containers.items()):
            if container.gone_at is not None and self.now >= container.gone_at:
                self.remove_pod(uid)
            elif container.again_at is not None:
                if self.now >= container.again_at:
                    self._start_again(uid, container)
            else:
                self._sync(uid, container)

    def _start_again(self, uid: str, container: Container) -> None:
        pod: Pod = self.api.get("pod", uid)
        container.again_at, container.started_at = None, self.now
        container.restarts += 1
        self.engines[uid] = self._process(container.restarts)
        shown = self.shown(pod.node)
        self.api.put(
            "pod",
            uid,
            replace(pod, was_ready=True, engine_started_at=shown, restarts=container.restarts),
        )

    def _sync(self, uid: str, container: Container) -> None:
        """Ready is the gate, as far as it was heard of, and an open port."""
        self._show(uid, container)
        while container.news and container.news[0][0] <= self.now:
            if (
                len(container.news) > 1
                and container.news[1][0] <= self.now
                and self.draw.random() < 0.5
            ):
                container.news.popleft()  # it was too short to be seen
            container.seen_gate = container.news.popleft()[1]
            self._show(uid, container)

    def _show(self, uid: str, container: Container) -> None:
        pod, engine = self.api.get("pod", uid), self.engines.get(uid)
        ready = container.seen_gate and engine is not None and engine.is_open
        if pod.ready != ready:
            container.ready_at = self.now if ready else None
            since = self.shown(pod.node)
            self.api.put(
                "pod",
                uid,
                replace(pod, ready=ready, was_ready=pod.was_ready or ready, ready_since=since),
            )

    def _process(self, life: int) -> Engine:
        return Engine(life, self.now + timedelta(seconds=self.draw.randint(3, 8)))
