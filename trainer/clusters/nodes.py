"""The nodes that start a run's workers together, each its own share of them."""

import os
import socket
from dataclasses import dataclass

from twohop.trainer.clusters.step import LOOPBACK, Step
from twohop.trainer.config import ClusterConfig, ClusterKind, Config
from twohop.trainer.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """How many nodes there are and where they meet; by default this machine alone."""

    count: int = 1
    endpoint: str | None = None  # host:port; None: nobody to meet
    is_host: bool | None = None  # whether the endpoint is here; None: its name tells
    run_id: str = "twohop"
    patience_s: float = 300.0  # for nodes that have yet to come

    @property
    def own_address(self) -> str:
        """The address by which the others find this node: the one that leads to the endpoint."""
        if self.endpoint is None:
            return LOOPBACK
        host, _, port = self.endpoint.rpartition(":")
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing: the kernel only chooses a way
                return str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(
                f"the nodes' meeting point {self.endpoint} cannot be reached from {socket.gethostname()} "
                f"({error.strerror}): name a node that all others can resolve"
            ) from None


def find_nodes(config: Config) -> Nodes:
    """The nodes of the SLURM step that this process is a task of, or those that `cluster` names.

    Under an outer launcher, which has started the ranks already, they are of no importance.

    Raises:
        ConfigError: `cluster` says that somebody else starts the run, and nobody has.
    """
    cluster, patience_s = config.cluster, config.comm.init_timeout_s
    if "RANK" in os.environ:
        return Nodes()
    step = Step.of(os.environ)
    if step is not None:
        count = len(step.tasks)
        if cluster.name is not ClusterKind.local and cluster.nodes != count:
            raise ConfigError(f"cluster.nodes={cluster.nodes}, but this SLURM step has {count}: make them equal")
        if count == 1:
            return Nodes()
        port = config.launch.port or step.port
        return Nodes(count, f"{step.first_host}:{port}", step.node == 0, f"slurm-{step.port}", patience_s)
    if cluster.name is ClusterKind.torchrun:
        return Nodes(cluster.nodes, cluster.rdzv_endpoint, patience_s=patience_s)
    if cluster.name is not ClusterKind.local:
        raise ConfigError(
            f"cluster={cluster.name.value}: `twohop train` trains where it stands, and this is no job of such a "
            f"cluster; hand one in with `twohop submit cluster={cluster.name.value} …`"
        )
    return Nodes()


def check_cluster(cluster: ClusterConfig, workers: int) -> None:
    """Raise a ConfigError unless a batch system can be told all it needs for `workers` on each node."""
    kubernetes = cluster.kubernetes
    for key, use in (("image", "what to run"), ("claim", "a volume that outlives the containers, for checkpoints")):
        if kubernetes is not None and getattr(kubernetes, key) is None:
            raise ConfigError(f"cluster.kubernetes.{key} is not set: Kubernetes needs {use}")
    if cluster.gpus_per_node is not None and cluster.gpus_per_node < workers:
        raise ConfigError(
            f"cluster.gpus_per_node={cluster.gpus_per_node} is less than launch.nproc={workers}: "
            "a worker needs a GPU of its own"
        )
