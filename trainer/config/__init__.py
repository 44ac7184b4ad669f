"""The whole configuration as typed, validated dataclasses; the YAML groups in configs/ fill them.

Hydra composes the YAML over these schemas, `OmegaConf.to_object` turns the result into real objects, and
every `__post_init__` then refuses an impossible value with a `ValueError` that names key, value and cure.
Imports no torch, so that `--help` answers at once.
"""

from twohop.trainer.config.cluster import ClusterConfig, ClusterKind, KubernetesConfig, ManifestKind, SlurmConfig
from twohop.trainer.config.comm import CommConfig
from twohop.trainer.config.commands import BenchConfig, Config, ExportConfig, PrepareConfig, SubmitConfig, TensorType
from twohop.trainer.config.data import (
    CorpusConfig,
    DataConfig,
    DataOrder,
    HFConfig,
    MultitaskConfig,
    TokenizerConfig,
    TokenizerKind,
)
from twohop.trainer.config.defaults import default_of
from twohop.trainer.config.placement import PlacementConfig
from twohop.trainer.config.running import (
    CheckpointConfig,
    EvalConfig,
    GenerateConfig,
    LaunchConfig,
    RunConfig,
)
from twohop.trainer.config.seeing import MetricsConfig, ProfileConfig, TrackerConfig
from twohop.trainer.config.training import (
    DecayShape,
    DistillConfig,
    EngineConfig,
    InitConfig,
    OptimConfig,
    Precision,
    Recompute,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "BenchConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ClusterKind",
    "CommConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "DataOrder",
    "DecayShape",
    "DistillConfig",
    "EngineConfig",
    "EvalConfig",
    "ExportConfig",
    "GenerateConfig",
    "HFConfig",
    "InitConfig",
    "KubernetesConfig",
    "LaunchConfig",
    "ManifestKind",
    "MetricsConfig",
    "MultitaskConfig",
    "OptimConfig",
    "PlacementConfig",
    "Precision",
    "PrepareConfig",
    "ProfileConfig",
    "Recompute",
    "RunConfig",
    "ScheduleConfig",
    "SlurmConfig",
    "SubmitConfig",
    "TensorType",
    "TokenizerConfig",
    "TokenizerKind",
    "TrackerConfig",
    "TrainConfig",
    "default_of",
]
