"""A whole cluster on this machine: a control plane, and nodes that are namespaces.

`up` either finds the cluster complete and running, or clears away whatever is left of it and makes
it anew: a half-made cluster is never repaired, because making one takes less time than
understanding one. What is left is found by what the kernel and the records say is ours (slot,
cgroup, recorded processes, named namespaces), never by guessing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from localcluster import binaries, images, paths
from localcluster.controlplane import ControlPlane, Endpoints
from localcluster.credentials import MAX_NODES
from localcluster.errors import ClusterError
from localcluster.host import cgroups, mounts, network, preflight, slots
from localcluster.host.processes import Daemons
from localcluster.host.slots import Slot
from localcluster.node import Node
from localcluster.progress import say, step

_LOCK_TIMEOUT_SECONDS = 900.0
# On a machine of its own a node's pods weigh 1024 for every core against all of the system
# together. Here they would weigh, all in one
# group, as much as one process of this machine, and come after the control plane and whoever asks
# them: of 24 commits under load the
# longest pause was 305 ms, of 12 with this 83 ms. With twice as much the control plane starves, and
# a rollout takes twice as long.
_SHARES_PER_NODE = 2048


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a later command must know about a cluster; written when it is complete."""

    nodes: int
    apiserver_arguments: tuple[str, ...]
    controller_manager_arguments: tuple[str, ...]

    def control_plane(self, state: Path, endpoints: Endpoints | None = None) -> ControlPlane:
        """The control plane in this folder; its endpoints are given once and then remembered
        there.
        """
        return ControlPlane(
            state,
            endpoints=endpoints,
            scheduler=True,
            apiserver_arguments=self.apiserver_arguments,
            controller_manager_arguments=self.controller_manager_arguments,
        )


class Cluster:
    """A running cluster. Get one with `Cluster.up(...)` or `Cluster.attach(...)`."""

    def __init__(
        self,
        name: str,
        control_plane: ControlPlane,
        slot: Slot,
        nodes: int,
        most_restart_seconds: int | None = None,
    ) -> None:
        self.name = name
        self.control_plane = control_plane
        self.slot = slot
        self.nodes = [
            Node(control_plane, slot, index, nodes, most_restart_seconds) for index in range(nodes)
        ]

    @classmethod
    def up(
        cls,
        name: str = paths.DEFAULT_NAME,
        *,
        nodes: int = 2,
        state: Path | None = None,
        apiserver_arguments: Sequence[str] = (),
        controller_manager_arguments: Sequence[str] = (),
        most_restart_seconds: int | None = None,
    ) -> Cluster:
        """Bring up a cluster and wait until every node is ready; one that is up already is given
        back as it is. ``most_restart_seconds``: as `nodeconfig.kubelet`.
        """
        state = state_folder(name, state)
        if not 1 <= nodes <= MAX_NODES:
            raise ClusterError(f"A cluster has 1 to {MAX_NODES} nodes, not {nodes}.")
        preflight.cluster()
        binaries.ensure([*binaries.CONTROL_PLANE, *binaries.NODE])
        pause = images.pause()
        with _exclusive(name):
            if (state / "cluster.json").exists():
                found = cls.attach(name, state=state)
                if found.complete():
                    if len(found.nodes) != nodes:
                        raise ClusterError(
                            f"Cluster {name!r} is up with {len(found.nodes)} nodes; take it down "
                            "first."
                        )
                    return found
                say(f"cluster {name} is not whole any more: making it anew")
            _clear(name, state)
            slot = slots.claim(name, state)
            remembered = Remembered(
                nodes, tuple(apiserver_arguments), tuple(controller_manager_arguments)
            )
            control_plane = remembered.control_plane(state, slot.endpoints())
            cluster = cls(name, control_plane, slot, nodes, most_restart_seconds)
            cluster._make(pause)
            paths.write_atomically(state / "cluster.json", json.dumps(asdict(remembered)))
        return cluster

    @classmethod
    def attach(cls, name: str = paths.DEFAULT_NAME, *, state: Path | None = None) -> Cluster:
        """The cluster of this name that an earlier command brought up."""
        state = state_folder(name, state)
        slot = slots.held(name)
        if slot is None or not (state / "cluster.json").exists():
            raise ClusterError(
                f"There is no cluster {name!r}. Bring it up: python -m localcluster up --name "
                f"{name}"
            )
        remembered = Remembered(**json.loads((state / "cluster.json").read_text()))
        return cls(name, remembered.control_plane(state), slot, remembered.nodes)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    @property
    def state(self) -> Path:
        """The folder with the cluster's files and logs."""
        return self.control_plane.state

    @property
    def kubeconfig(self) -> Path:
        """The admin's."""
        return self.control_plane.kubeconfig

    def complete(self) -> bool:
        """Whether every daemon runs."""
        alive = self.control_plane.daemons.alive
        expected = [
            *self.control_plane.programs,
            *(name for node in self.nodes for name in node.daemon_names),
        ]
        return all(alive(name) for name in expected) and all(node.ready() for node in self.nodes)

    def load(self, *archives: Path, nodes: Iterable[Node] | None = None) -> None:
        """Import image archives into all nodes, or into these."""
        for archive in archives:
            with step(f"loading {archive.name}"):
                _at_once(
                    functools.partial(Node.load, archive=archive),
                    self.nodes if nodes is None else nodes,
                )

    def down(self) -> None:
        """Take everything away."""
        down(self.name, state=self.state)

    def _make(self, pause: Path) -> None:
        with step("making the nodes' network"):
            network.start_forwarding()
            network.create_bridge(self.slot)
            for index, node in enumerate(self.nodes):
                network.create_node(
                    self.slot, node.addresses, [other.addresses for other in self.nodes[:index]]
                )
        self.control_plane.start()
        with step(f"starting {len(self.nodes)} nodes"):
            cgroups.create(cgroups.name_of(self.name))
            cgroups.weigh(cgroups.name_of(self.name), _SHARES_PER_NODE * len(self.nodes))
            _at_once(Node.start, self.nodes)
            _at_once(lambda node: node.load(pause), self.nodes)
            _at_once(Node.start_kubelet, self.nodes)
            _at_once(Node.wait_ready, self.nodes)


def state_folder(name: str, state: Path | None = None) -> Path:
    """Where a cluster's files are: where it was told, else in the cache under its name."""
    return (state or paths.clusters() / paths.valid_name(name)).resolve()


def down(name: str = paths.DEFAULT_NAME, *, state: Path | None = None) -> None:
    """Take away whatever there is of a cluster: running, half-made, or left by a killed run."""
    with _exclusive(name):
        _clear(name, state_folder(name, state))


def _clear(name: str, state: Path) -> None:
    with step(f"clearing away cluster {name}"):
        Daemons(state).stop_all()
        slot = slots.held(name)
        if slot is not None:
            cgroup = cgroups.name_of(name)
            cgroups.kill(cgroup)
            mounts.remove(name)
            network.remove(slot, [slot.node(index) for index in range(MAX_NODES)])
            cgroups.remove(cgroup)
            if slots.only(slot):
                network.stop_forwarding()
                mounts.remove_made()
            slots.release(slot)
        paths.discard(state)


def _exclusive(name: str) -> AbstractContextManager[None]:
    return paths.locked(
        paths.clusters() / f".{name}.lock", f"cluster {name}", _LOCK_TIMEOUT_SECONDS
    )


def _at_once(action: Callable[[Node], None], nodes: Iterable[Node]) -> None:
    """Do the same to every node at once; the first error is raised when all have come to an end."""
    with ThreadPoolExecutor(max_workers=MAX_NODES) as pool:
        for outcome in [pool.submit(action, node) for node in nodes]:
            outcome.result()
