"""What the installation says about this agent: read once, at the start, from the environment and
one YAML file.

The environment carries what differs from node to node (Kubernetes fills it in), the file what the
whole installation shares. A key that nobody knows is an error, because a misspelt limit that
silently does not hold is worse than an agent that does not start. The checks are written here and
not taken from pydantic, because each refusal names the key as it stands in the file and what may
stand there, and turning a library's errors into such sentences took as many lines.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from hotweights_common.errors import HotweightsError


class SettingsError(HotweightsError):
    """The settings cannot be used; the message names the key and what it takes."""


@dataclass(frozen=True, slots=True)
class RootSettings:
    """A folder that sources may lie in."""

    path: Path
    """The folder, as the agent sees it. ``file://`` URIs below it are allowed."""
    name: str = ""
    """Its name in the chart; only for people."""
    claim: str = ""
    """The PersistentVolumeClaim that is mounted there: ``pvc://claim/…`` is allowed then, instead
    of ``file://``.
    """
    namespaces: tuple[str, ...] = ()
    """Namespaces whose objects may name it; ``*`` is all of them. Empty: nobody's."""


@dataclass(frozen=True, slots=True)
class StagingSettings:
    """How versions come onto the node."""

    trust_manifests: bool = False
    """Where several namespaces have sources, a new version's source is read whole once, to see that
    the weights are those of the manifest beside them. Believed unread instead: whoever can write
    into a root then gets every version on the nodes whose manifest they have.
    """
    reserve_bytes: int = 256 * 2**20
    """Memory that stays free for the agent itself; a version that would eat into it is refused
    before its first byte.
    """
    at_once: int = 1
    """How many versions are staged at the same time; each takes memory from its first byte on. One
    that gets no byte does not count; what pods wait for at boot counts for itself.
    """
    patience_seconds: float = 20.0
    """How long a parent that does not know a version yet is asked again before anybody goes past
    it.
    """
    donors_at_once: int = 8
    """From how many donors stripes of one version are pulled at the same time."""
    origin_workers: int = 0
    """Threads that read a source, at most 16: each has a buffer of 8 MiB in the reserve. 0: as many
    as the processors that this agent may keep busy make sensible.
    """
    bandwidth_bytes_per_second: int = 0
    """What staging may take of the node's network: as much in, from sources and peers together, and
    as much out, to peers over each transport. 0: all of it. MPI broadcasts do not heed it.
    """
    source_stall_seconds: float = 120.0
    """How long one call of a source may take; later it is left behind, and others are asked."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How long engines may take, in seconds."""

    hello_seconds: float = 10.0
    """From connecting to the hello; later the connection ends."""
    prepare_seconds: float = 600.0
    """To build the next version beside the one that is served; later that try has failed, and what
    is served goes on being served and shown.
    """
    reconnect_seconds: float = 10.0
    """After the agent's start: how long living engines may take to come back before their pods are
    marked.
    """


@dataclass(frozen=True, slots=True)
class KubeSettings:
    """How the API server is spoken to."""

    request_seconds: float = 15.0
    """For one request."""
    away_seconds: float = 3.0
    """How long the API server may be silent until the disk's memory stands in for it."""
    resync_seconds: float = 30.0
    """How often every pod's status is compared again, whatever the watches say."""
    namespaces: tuple[str, ...] = ()
    """Where this node's pods are looked for; empty: in all."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All of it. Whatever has no default must be set; the chart writes the rest."""

    node: str
    """The node's name (NODE_NAME)."""
    namespace: str = "hotweights-system"
    """The installation's namespace (POD_NAMESPACE): where the NodeWeights are."""
    address: str = "0.0.0.0"
    """The address that peers connect to (POD_IP)."""
    peer_port: int = 7600
    """The port for peers; 0: any."""
    ucx_port: int = 0
    """The port for peers over UCX, beside the other; 0: UCX is not used. Its data has ports of its
    own, which nobody guards.
    """
    mpi: bool = False
    """Whether this node joins MPI broadcasts. Their ports are nobody's in particular, and who leads
    one names the program that the others' ranks run: so all agents must be trusted alike.
    """
    metrics_port: int = 8080
    """The port of /metrics, /healthz and /readyz; 0: any."""
    memory_bytes: int = 0
    """What versions may take together (HOTWEIGHTS_MEMORY_BYTES); 0: what the node and its control
    groups leave.
    """
    run_folder: Path = Path("/run/hotweights")
    """Shared with the pods: the socket and the plugin."""
    state_folder: Path = Path("/var/lib/hotweights")
    """On the node's disk: what pods were to serve, and manifests."""
    keeper_socket: str = ""
    """Of the process that holds what is staged while the agent's own is gone (`local/keeper.py`);
    empty: nobody does, and a restart stages anew.
    """
    plugin_folder: Path = Path("/opt/hotweights/plugin")
    """The plugin as it was built into the agent's image: one folder for each version. Not there:
    nothing is installed.
    """
    peer_token_file: Path = Path("/var/run/secrets/hotweights/peer-token")
    """The token (audience hotweights-peer) by which other agents know this one."""
    log_level: str = "info"
    """debug, info, warning or error (HOTWEIGHTS_LOG_LEVEL)."""
    roots: tuple[RootSettings, ...] = ()
    """Where sources may lie."""
    staging: StagingSettings = field(default_factory=StagingSettings)
    """How versions come onto the node."""
    engines: EngineSettings = field(default_factory=EngineSettings)
    """How long engines may take."""
    kube: KubeSettings = field(default_factory=KubeSettings)
    """How the API server is spoken to."""

    @property
    def prove_sources(self) -> bool:
        """Whether a manifest is no proof that its weights are there: there is a tenant from whom
        another one's are to be kept.
        """
        tenants = {namespace for root in self.roots for namespace in root.namespaces}
        return not self.staging.trust_manifests and (len(tenants) > 1 or "*" in tenants)

    @property
    def ports(self) -> dict[str, int]:
        """For peers, by the transport's scheme; 0: it is not used (TCP: any port)."""
        return {"tcp": self.peer_port, "ucx": self.ucx_port}


FROM_ENVIRONMENT = {
    "NODE_NAME": "node",
    "POD_NAMESPACE": "namespace",
    "POD_IP": "address",
    "HOTWEIGHTS_MEMORY_BYTES": "memory_bytes",
    "HOTWEIGHTS_LOG_LEVEL": "log_level",
    "HOTWEIGHTS_RUN_FOLDER": "run_folder",
    "HOTWEIGHTS_STATE_FOLDER": "state_folder",
    "HOTWEIGHTS_KEEPER_SOCKET": "keeper_socket",
    "HOTWEIGHTS_PLUGIN_FOLDER": "plugin_folder",
    "HOTWEIGHTS_PEER_TOKEN_FILE": "peer_token_file",
    "HOTWEIGHTS_PEER_PORT": "peer_port",
    "HOTWEIGHTS_METRICS_PORT": "metrics_port",
}
CONFIG_VARIABLE = "HOTWEIGHTS_CONFIG"
MIN_BANDWIDTH = 8 << 20
"""Bytes per second: a few pullers with two streams each, above the floor of `ClientLimits`."""


def read(environment: Mapping[str, str], config: Path | None = None) -> Settings:
    """The settings; what the environment says goes before the file. Raises `SettingsError`."""
    path = config or (
        Path(environment[CONFIG_VARIABLE]) if environment.get(CONFIG_VARIABLE) else None
    )
    body: dict[str, Any] = _load(path) if path is not None else {}
    body |= {
        key: environment[name] for name, key in FROM_ENVIRONMENT.items() if environment.get(name)
    }
    if not body.get("node"):
        raise SettingsError("no node name: set NODE_NAME (in a pod, from the field spec.nodeName)")
    settings: Settings = _build(Settings, body, "")
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise SettingsError(
            f"log_level: {settings.log_level!r} is not debug, info, warning or error"
        )
    bandwidth = settings.staging.bandwidth_bytes_per_second
    if 0 < bandwidth < MIN_BANDWIDTH:
        raise SettingsError(
            f"staging.bandwidth_bytes_per_second: {bandwidth} is so little that peers would take "
            f"this node for dead; give at least {MIN_BANDWIDTH}, or 0 for no limit"
        )
    return settings


def _load(path: Path) -> dict[str, Any]:
    try:
        body = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML or JSON: {error}") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise SettingsError(f"{path}: the file is a mapping of settings, such as `roots: []`")
    return {str(key): value for key, value in body.items()}


def _build(cls: Any, body: Any, where: str) -> Any:
    """A dataclass out of a mapping, with every key known and every value of its type."""
    if not isinstance(body, Mapping):
        raise SettingsError(f"{where or 'settings'}: is a mapping, not {body!r}")
    types = typing.get_type_hints(cls)
    unknown = sorted(set(map(str, body)) - set(types))
    if unknown:
        raise SettingsError(
            f"{where}{unknown[0]}: no such setting; there are {', '.join(sorted(types))}"
        )
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in body and _required(f)]
    if missing:
        raise SettingsError(f"{where}{missing[0]}: is missing")
    return cls(**{key: _value(types[key], value, f"{where}{key}") for key, value in body.items()})


def _required(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{where}.")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise SettingsError(f"{where}: is a list, not {value!r}")
        return tuple(
            _value(typing.get_args(kind)[0], one, f"{where}[{i}]") for i, one in enumerate(value)
        )
    # a field of another type is a mistake of ours, not of whoever wrote the file
    if isinstance(kind, UnionType) or kind not in (bool, int, float, str, Path):
        raise SettingsError(f"{where}: {kind} cannot be set")
    if kind is bool:
        if not isinstance(value, bool):
            raise SettingsError(f"{where}: is true or false, not {value!r}")
        return value
    # a bool is an int to Python; ``true`` for a number is a mistake
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SettingsError(f"{where}: takes a {kind.__name__.lower()}, not {value!r}")
    try:
        made = kind(value)
    except ValueError as error:
        raise SettingsError(f"{where}: takes a {kind.__name__.lower()}, not {value!r}") from error
    # all numbers are sizes, ports and times
    if isinstance(made, int | float) and made < 0:
        raise SettingsError(f"{where}: is not negative")
    return made
