"""A real Kubernetes on this machine, without Docker and without a registry: for tests, the demo and
e2e.

On a machine with Docker, kind or any other cluster does as well: whatever KUBECONFIG names is used
the same way. This is for the machines without, and it starts faster.

    python -m localcluster up                        # 2 nodes; prints where the kubeconfig is
    python -m localcluster up --control-plane-only   # no root, ready in seconds
    python -m localcluster status | kubeconfig | logs COMPONENT | down
    python -m localcluster image build --tag localhost/hotweights-agent:dev CONTEXT
    python -m localcluster load IMAGE.tar ...

From Python, a control plane alone (real validation, admission, watches, garbage collection, RBAC):

    from localcluster import ControlPlane

    with ControlPlane() as cp:
        ... cp.kubeconfig ...                        # a file, as admin
        cp.kubeconfig_for("ns", "account")           # a file, as a service account
        cp.service_account_token("ns", "account", audiences=["hotweights"])
        cp.stop_apiserver(); cp.start_apiserver()

and a whole cluster, new or the one that is up already:

    from localcluster import Cluster, images

    cluster = Cluster.up(nodes=2)                    # or Cluster.attach()
    cluster.load(images.build(Path("."), "localhost/hotweights-agent:dev", dockerfile=Path("...")))
    cluster.nodes[1].kill_kubelet(); cluster.nodes[1].restart()
    cluster.down()

The first use builds the binaries from Go modules (about ten minutes on two cores) into
`$HOTWEIGHTS_CACHE` (default ~/.cache/hotweights). Several clusters can live at once, by `name`.
"""

from localcluster.cluster import Cluster, down
from localcluster.controlplane import ControlPlane
from localcluster.errors import ClusterError

__all__ = ["Cluster", "ClusterError", "ControlPlane", "down"]
