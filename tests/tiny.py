"""A model, a corpus and a configuration so small that a training run takes seconds."""

import json
import random
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from twohop.trainer.config import Config

# Everything that could depend on the world: two MoE layers of different size, capacity and drops, router losses and
# noise, a shared expert, a residual branch, expert learning rates, clipping that is always active.
MODEL: dict[str, Any] = {
    "name": "tiny",
    "max_seq_len": 32,
    "dim": 16,
    "num_layers": 4,
    "num_heads": 2,
    "ffn_dim": 32,
    "moe": {
        "experts": [4, 8],
        "shared_ffn_dim": 16,
        "residual": "learned",
        "capacity_factor": 1.25,
        "router": {"top_k": 2, "jitter": 0.01, "z_loss": 1e-3},
    },
}
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "comm": {"ranks_per_node": None, "timeout_s": 30.0, "init_timeout_s": 60.0},
    "data": {"source": "text", "valid_fraction": 0.1},
    "optim": {"lr": 3e-3, "clip_norm": 0.5, "expert_lr_scale": 0.5},
    "schedule": {"warmup_steps": 5},
    "train": {"steps": 20, "seq_len": 16, "global_batch": 8, "micro_batch": 2},
    "eval": {"every": 0, "batches": 2},
    "generate": {"max_new_tokens": 4},
    "checkpoint": {"every": 0},
}

# What every engine is asked for; "zero-N" is DeepSpeed's stage N.
ENGINES: dict[str, tuple[str, ...]] = {
    "ddp": ("engine.name=ddp",),
    "fsdp": ("engine.name=fsdp",),
    **{f"zero-{stage}": ("engine.name=deepspeed", f"engine.zero_stage={stage}") for stage in (0, 1, 2)},
}


def write_corpus(directory: Path) -> Path:
    """A text with some structure to learn, the same everywhere."""
    words = ["expert", "token", "router", "node", "rank", "hop", "the", "a", "of", "sends", "learns"]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=8)) + "." for _ in range(400)]
    path = directory / "corpus.txt"
    path.write_text("\n".join(lines))
    return path


def tiny_settings(directory: Path) -> dict[str, Any]:
    """SETTINGS with all paths inside `directory`, whose corpus is written unless it is there."""
    corpus = directory / "corpus.txt"
    files = [str(corpus if corpus.exists() else write_corpus(directory))]
    data = SETTINGS["data"] | {"files": files, "cache_dir": str(directory / "cache")}
    return SETTINGS | {"data": data, "run": {"dir": str(directory / "run")}}


def tiny_config(directory: Path, *overrides: str) -> Config:
    """The tiny run in `directory`, with overrides such as "train.steps=3" laid over it."""
    merged = OmegaConf.merge(
        OmegaConf.structured(Config), tiny_settings(directory), OmegaConf.from_dotlist(list(overrides))
    )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def tiny_overrides(directory: Path) -> list[str]:
    """The same run as arguments of `twohop train`."""
    return ["model=dense", *_dotted("", tiny_settings(directory))]


def _dotted(prefix: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in _dotted(f"{prefix}.{key}" if prefix else key, inner)]
    return [f"{prefix}={json.dumps(value)}"]
