"""Where a run's workers are started, and what a batch system is asked for."""

import re
from dataclasses import dataclass, field
from enum import Enum

from twohop.trainer.config.checks import require, require_at_least


class ClusterKind(Enum):
    """`local`: this machine; `torchrun`: several, each given the command; `slurm`, `kubernetes`: what is submitted."""

    local = "local"
    torchrun = "torchrun"
    slurm = "slurm"
    kubernetes = "kubernetes"


class ManifestKind(Enum):
    """`TrainJob`: of Kubeflow Trainer 2; `PyTorchJob`: of the training operator before it."""

    TrainJob = "TrainJob"
    PyTorchJob = "PyTorchJob"


@dataclass
class SlurmConfig:
    """What a job asks of SLURM; null leaves it to the cluster's defaults."""

    minutes: int = 60  # time limit of a job; what is not done by then goes on after a requeue
    requeues: int = 10  # how often a job that has reached its time limit goes on
    signal_s: int = 120  # SIGUSR1 comes this long before the time limit: the time to write a checkpoint
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus: int = 1  # of each node, for all of its workers; cluster=slurm: one for each
    memory_gb: int | None = None  # of each node
    setup: list[str] = field(default_factory=list)  # shell commands before the run, such as module load

    def __post_init__(self) -> None:
        require_at_least(1, "cluster.slurm", self, "minutes", "cpus")
        require_at_least(0, "cluster.slurm", self, "requeues", "signal_s")
        require(
            self.memory_gb is None or self.memory_gb >= 1,
            f"cluster.slurm.memory_gb={self.memory_gb}: use 1 or more, or null",
        )
        require(
            self.signal_s < 60 * self.minutes,
            f"cluster.slurm.signal_s={self.signal_s} is no shorter than cluster.slurm.minutes={self.minutes}: lower it",
        )
        for key in ("partition", "account", "qos", "constraint"):
            value = getattr(self, key)
            require(
                value is None or re.fullmatch(r"\S+", value) is not None,
                f"cluster.slurm.{key}={value!r}: use a name without spaces, or null",
            )


@dataclass
class KubernetesConfig:
    """What a job asks of Kubernetes and Kubeflow."""

    kind: ManifestKind = ManifestKind.TrainJob
    image: str | None = None  # made with the repository's Dockerfile
    namespace: str = "default"
    runtime: str = "torch-distributed"  # TrainJob: the (Cluster)TrainingRuntime that it is based on
    claim: str | None = None  # PersistentVolumeClaim (ReadWriteMany) with data and runs
    mount: str = "/data"  # where it appears in the containers
    cpus: int | None = None  # of each node
    memory_gb: int | None = None  # of each node
    restarts: int = 10  # PyTorchJob: how often a failed job goes on

    def __post_init__(self) -> None:
        for key in ("cpus", "memory_gb"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"cluster.kubernetes.{key}={value}: use 1 or more, or null")
        require_at_least(0, "cluster.kubernetes", self, "restarts")
        require(self.mount.startswith("/"), f"cluster.kubernetes.mount={self.mount}: use an absolute path")
        for key, user in (("runtime", ManifestKind.TrainJob), ("restarts", ManifestKind.PyTorchJob)):
            value = getattr(self, key)
            require(
                self.kind is user or value == getattr(type(self), key),
                f"cluster.kubernetes.{key}={value} has no use with kind={self.kind.value}: "
                f"add cluster.kubernetes.kind={user.value}, or leave it out",
            )


@dataclass
class ClusterConfig:
    """Where workers are started: `launch.nproc` of them on each of `nodes`."""

    name: ClusterKind = ClusterKind.local
    nodes: int = 1
    job: str = "twohop"  # slurm, kubernetes: its name
    gpus_per_node: int | None = None  # slurm, kubernetes: asked for on each node; null: none
    rdzv_endpoint: str | None = None  # torchrun: host:port where nodes meet; the host is one of them
    slurm: SlurmConfig | None = None
    kubernetes: KubernetesConfig | None = None

    def __post_init__(self) -> None:
        require_at_least(1, "cluster", self, "nodes")
        name = self.name.value
        several = [kind.value for kind in ClusterKind if kind is not ClusterKind.local]
        require(
            self.name is not ClusterKind.local or self.nodes == 1,
            f"cluster.nodes={self.nodes} has no use with cluster=local: add one of cluster={', '.join(several)}",
        )
        require(
            self.gpus_per_node is None or self.gpus_per_node >= 1,
            f"cluster.gpus_per_node={self.gpus_per_node}: use 1 or more, or null",
        )
        require(
            re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", self.job) is not None,
            f"cluster.job={self.job}: use at most 42 small letters, digits and dashes, beginning with a letter",
        )
        for key in ("job", "gpus_per_node"):
            value = getattr(self, key)
            require(
                self.name in (ClusterKind.slurm, ClusterKind.kubernetes) or value == getattr(type(self), key),
                f"cluster.{key}={value} has no use with cluster={name}: leave it out",
            )
        for kind in (ClusterKind.slurm, ClusterKind.kubernetes):
            require(
                (getattr(self, kind.value) is None) == (self.name is not kind),
                f"cluster.{kind.value} does not belong to cluster={name}: choose by cluster={kind.value}",
            )
        if self.name is not ClusterKind.torchrun:
            require(
                self.rdzv_endpoint is None,
                f"cluster.rdzv_endpoint={self.rdzv_endpoint} has no use with cluster={name}: add cluster=torchrun",
            )
            return
        require(
            re.fullmatch(r"\S+:\d+", self.rdzv_endpoint or "") is not None,
            f"cluster.rdzv_endpoint={self.rdzv_endpoint}: cluster=torchrun needs the host:port of one of the nodes, "
            "such as node0:29500, the same on all",
        )
