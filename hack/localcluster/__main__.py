"""The command line: each verb is a few calls into the package. Answers go to stdout, progress to
stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from localcluster import binaries, cluster, images, paths
from localcluster.cluster import Cluster
from localcluster.controlplane import ControlPlane
from localcluster.errors import ClusterError
from localcluster.host import preflight
from localcluster.host.processes import Daemons

_EVERYTHING = (*preflight.NODES, *preflight.IMAGES, *preflight.TESTS)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the status is 1 after an error, whose message says what to do."""
    arguments = _parser().parse_args(words)
    try:
        arguments.run(arguments)
    except ClusterError as error:
        print(f"localcluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "localcluster: stopped halfway. The next `up` or `down` clears away what there is.",
            file=sys.stderr,
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--name", default=paths.DEFAULT_NAME, help="which cluster (default: %(default)s)"
    )
    common.add_argument(
        "--state", type=Path, help="its folder (default: in the cache, under its name)"
    )
    parser = argparse.ArgumentParser(
        prog="python -m localcluster", description="A real Kubernetes on this machine."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    up = verbs.add_parser(
        "up", parents=[common], help="bring a cluster up; one that is up stays as it is"
    )
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--control-plane-only", action="store_true", help="no nodes, no root")
    up.set_defaults(run=_up)

    down = verbs.add_parser("down", parents=[common], help="take away everything of a cluster")
    down.set_defaults(run=lambda arguments: cluster.down(arguments.name, state=arguments.state))

    status = verbs.add_parser(
        "status", parents=[common], help="what runs; fails if something does not"
    )
    status.set_defaults(run=_status)

    kubeconfig = verbs.add_parser(
        "kubeconfig", parents=[common], help="print the path of the admin's kubeconfig"
    )
    kubeconfig.set_defaults(run=_kubeconfig)

    logs = verbs.add_parser("logs", parents=[common], help="print a component's log")
    logs.add_argument(
        "component", nargs="?", help="such as kube-apiserver or node-0-kubelet; none lists them"
    )
    logs.set_defaults(run=_logs)

    load = verbs.add_parser("load", parents=[common], help="import image archives into every node")
    load.add_argument("archive", nargs="+", type=Path)
    load.set_defaults(run=lambda arguments: _attach(arguments).load(*arguments.archive))

    image = verbs.add_parser("image", help="make images").add_subparsers(
        required=True, metavar="WHAT"
    )
    base = image.add_parser("base", help="Debian with Python; prints the archive's path")
    base.set_defaults(run=lambda arguments: print(images.base()))
    build = image.add_parser("build", help="from a Dockerfile; prints the archive's path")
    build.add_argument("context", type=Path)
    build.add_argument("--tag", required=True, help="such as localhost/hotweights-agent:dev")
    build.add_argument("--file", "-f", type=Path, help="the Dockerfile (default: the context's)")
    build.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    build.set_defaults(run=_build)

    ready = verbs.add_parser("preflight", help="install the Debian packages that are missing")
    ready.add_argument(
        "--tests", action="store_true", help="only what the tests without a cluster need"
    )
    ready.set_defaults(
        run=lambda arguments: preflight.install(preflight.TESTS if arguments.tests else _EVERYTHING)
    )

    built = verbs.add_parser(
        "binaries", help="build binaries that are missing (default: all); print their paths"
    )
    built.add_argument("binary", nargs="*", metavar="NAME")
    built.set_defaults(run=_binaries)
    return parser


def _up(arguments: argparse.Namespace) -> None:
    if arguments.control_plane_only:
        state = cluster.state_folder(arguments.name, arguments.state)
        alone = ControlPlane(state, scheduler=True)
        alone.start()
        print(alone.kubeconfig)
    else:
        print(Cluster.up(arguments.name, nodes=arguments.nodes, state=arguments.state).kubeconfig)


def _attach(arguments: argparse.Namespace) -> Cluster:
    return Cluster.attach(arguments.name, state=arguments.state)


def _kubeconfig(arguments: argparse.Namespace) -> None:
    path = cluster.state_folder(arguments.name, arguments.state) / "kubeconfig"
    if not path.exists():
        raise ClusterError(
            f"There is no cluster {arguments.name!r}. Bring it up: python -m localcluster up"
        )
    print(path)


def _status(arguments: argparse.Namespace) -> None:
    daemons = Daemons(cluster.state_folder(arguments.name, arguments.state))
    if not daemons.names():
        raise ClusterError(
            f"Cluster {arguments.name!r} is down. Bring it up: python -m localcluster up"
        )
    for name in daemons.names():
        record = daemons.record(name)
        print(f"{name:<28} {f'process {record.pid}' if record and record.alive() else 'DEAD'}")
    daemons.must_live(*daemons.names())


def _logs(arguments: argparse.Namespace) -> None:
    daemons = Daemons(cluster.state_folder(arguments.name, arguments.state))
    if arguments.component is None:
        print("\n".join(daemons.names()))
        return
    log = daemons.log(arguments.component)
    if not log.exists():
        raise ClusterError(f"There is no {log}; there are: {', '.join(daemons.names()) or 'none'}.")
    with log.open(errors="replace") as lines:
        sys.stdout.writelines(lines)


def _build(arguments: argparse.Namespace) -> None:
    pairs = dict(pair.partition("=")[::2] for pair in arguments.build_arg)
    print(
        images.build(arguments.context, arguments.tag, dockerfile=arguments.file, arguments=pairs)
    )


def _binaries(arguments: argparse.Namespace) -> None:
    print(
        json.dumps(
            {
                name: str(path)
                for name, path in binaries.ensure(arguments.binary or binaries.BINARIES).items()
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
