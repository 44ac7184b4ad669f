"""A manifest for Kubeflow: a TrainJob of its Trainer, or a PyTorchJob of the training operator that came before.

Both give a container on each node what torchrun wants to know in PET_ variables, so the command in it is torchrun.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import yaml

from twohop.trainer.config import Config, KubernetesConfig, ManifestKind

MANAGER = "twohop/submit"  # owner of the patches of a runtime
KILL_S = 30  # between the end of the workers' time to save a checkpoint and that of their container


def manifest(config: Config, args: Sequence[str]) -> str:
    """The manifest, as YAML, that runs `twohop train` with `args` on the nodes of `config.cluster`.

    The run folder is named by the job, and lies in the volume, unless `args` name one.
    """
    kubernetes = config.cluster.kubernetes
    assert kubernetes is not None
    make = {ManifestKind.TrainJob: _train_job, ManifestKind.PyTorchJob: _pytorch_job}[kubernetes.kind]
    api, spec = make(config, kubernetes, _container(config, kubernetes, args))
    metadata = {"name": config.cluster.job, "namespace": kubernetes.namespace}
    whole = {"apiVersion": api, "kind": kubernetes.kind.value, "metadata": metadata, "spec": spec}
    return str(yaml.safe_dump(whole, sort_keys=False, width=120))


def _container(config: Config, kubernetes: KubernetesConfig, args: Sequence[str]) -> dict[str, Any]:
    command = ["torchrun", "-m", "twohop.trainer", "train", *args]
    if config.resume is None:
        if config.run.dir is None:
            command.append(f"run.dir={kubernetes.mount}/runs/{config.run.name}/{config.cluster.job}")
        command.append("resume=auto")
    shutdown = {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(math.ceil(config.launch.grace_s))}
    threads = {"name": "OMP_NUM_THREADS", "value": str(config.launch.omp_threads)}
    return {"image": kubernetes.image, "command": command, "env": [shutdown, threads]}


def _train_job(config: Config, kubernetes: KubernetesConfig, container: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    trainer = {
        **container,
        "numNodes": config.cluster.nodes,
        "numProcPerNode": config.launch.nproc,
        "resourcesPerNode": _resources(config, kubernetes),
    }
    pods = {**_pod(config, kubernetes), "containers": [{"name": "node", "volumeMounts": _mounts(kubernetes)}]}
    jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pods}}}}]
    patch = {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}
    return "trainer.kubeflow.org/v1alpha1", {
        "runtimeRef": {"name": kubernetes.runtime},
        "trainer": trainer,
        "runtimePatches": [patch],
    }


def _pytorch_job(config: Config, kubernetes: KubernetesConfig, container: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    whole = {
        "name": "pytorch",  # the operator looks for this name
        **container,
        "resources": _resources(config, kubernetes),
        "volumeMounts": _mounts(kubernetes),
    }
    pods = {**_pod(config, kubernetes), "containers": [whole]}
    counts = {"Master": 1, "Worker": config.cluster.nodes - 1}
    return "kubeflow.org/v1", {
        "nprocPerNode": str(config.launch.nproc),
        "runPolicy": {"backoffLimit": kubernetes.restarts, "cleanPodPolicy": "None"},
        "pytorchReplicaSpecs": {
            role: {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": deepcopy(pods)}}
            for role, count in counts.items()
            if count
        },
    }


def _resources(config: Config, kubernetes: KubernetesConfig) -> dict[str, Any]:
    """Requests and limits alike, so that no other pod takes from the node what has been promised."""
    wanted = {
        "cpu": kubernetes.cpus,
        "memory": None if kubernetes.memory_gb is None else f"{kubernetes.memory_gb}Gi",
        "nvidia.com/gpu": config.cluster.gpus_per_node,
    }
    given = {name: str(amount) for name, amount in wanted.items() if amount is not None}
    return {"requests": given, "limits": dict(given)}


def _pod(config: Config, kubernetes: KubernetesConfig) -> dict[str, Any]:
    return {
        "terminationGracePeriodSeconds": math.ceil(config.launch.grace_s) + KILL_S,
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": kubernetes.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL and loaders need more than the default of 64 MiB
        ],
    }


def _mounts(kubernetes: KubernetesConfig) -> list[dict[str, str]]:
    return [{"name": "data", "mountPath": kubernetes.mount}, {"name": "shm", "mountPath": "/dev/shm"}]
