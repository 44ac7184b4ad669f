"""Models of transformers: read them, and write ours so that `AutoModelForCausalLM` reads them.

A new family is one file and one line in `FAMILIES`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from twohop.models.config import ModelConfig, ModelKind, Residual
from twohop.models.interop.deepseek_v3 import DeepseekV3
from twohop.models.interop.family import Family, read_config, write_config
from twohop.models.interop.files import CONFIG_FILE, TensorFolder
from twohop.models.interop.hf_config import InteropError
from twohop.models.interop.llama import Llama
from twohop.models.interop.mixtral import Mixtral
from twohop.models.interop.olmoe import Olmoe
from twohop.models.interop.qwen3 import Qwen3, Qwen3Moe

__all__ = ["FAMILIES", "Family", "InteropError", "TensorFolder", "differences", "fit_family", "read_folder"]

FAMILIES: dict[str, Family] = {
    "mixtral": Mixtral(),
    "qwen3_moe": Qwen3Moe(),
    "olmoe": Olmoe(),
    "deepseek_v3": DeepseekV3(),
    "llama": Llama(),
    "qwen3": Qwen3(),
}
# Keys of `ModelConfig` that change neither weights nor logits: how to begin, how to train, and what to call it.
_FREE = {"name", "max_seq_len", "init_std", "layer_drop"}
_FREE_MOE = {"allow_non_causal", "batch_priority", "cache", "capacity_bound", "capacity_factor", "capacity_margin"}
_FREE_MOE |= {"capacity_policy", "capacity_rounding", "eval_capacity_factor", "min_capacity"}
_FREE_ROUTER = {"bias_rate", "iterations", "jitter", "load_balance_over", "noise"}  # and every loss


def read_folder(directory: Path) -> tuple[Family, ModelConfig]:
    """The family and configuration of a folder that `save_pretrained` has written.

    Raises:
        InteropError: no or a damaged config.json, a family that is not known here, or a key that cannot be followed.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise InteropError(f"{directory} holds no {CONFIG_FILE}: name a folder that save_pretrained has written")
    try:
        values = json.loads(path.read_text())
        model_type = values["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise InteropError(f"{path}: not the configuration of a model ({error!r}): get it anew") from None
    if model_type not in FAMILIES:
        raise InteropError(f"{path}: model_type={model_type} is not known here, only {', '.join(FAMILIES)}")
    return FAMILIES[model_type], read_config(FAMILIES[model_type], values, str(path))


def fit_family(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that computes just what a model of `config` computes, and its config.json.

    Raises:
        InteropError: transformers has no such class; names what would have to be different for the nearest one.
    """
    if config.moe.eval_capacity_factor is not None and config.experts_by_layer:
        raise InteropError(
            f"model.moe.eval_capacity_factor={config.moe.eval_capacity_factor}: the classes of transformers drop no "
            "tokens, so logits would differ; add model.moe.eval_capacity_factor=null"
        )
    attempts = []
    for family in (family for family in FAMILIES.values() if family.sparse == bool(config.experts_by_layer)):
        written = write_config(family, config)
        different = differences(config, read_config(family, written, CONFIG_FILE))
        if not different:
            return family, written
        attempts.append((len(different), family, different))
    _, nearest, different = min(attempts, key=lambda attempt: attempt[0])
    wanted = "; ".join(f"{key}={ours}, not {theirs}" for key, (ours, theirs) in different.items())
    raise InteropError(
        f"transformers has no class for {_describe(config)}; "
        f"the nearest, {nearest.architecture}, does not have {wanted}"
    )


def differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """{key: (our value, their value)} of every key that decides weights or logits and differs."""
    a, b = _deciding(ours), _deciding(theirs)
    return {key: (_plain(a[key]), _plain(b[key])) for key in a if key in b and a[key] != b[key]}


def _deciding(config: ModelConfig) -> dict[str, Any]:
    """What decides weights and logits, said in one way where there are several."""
    plain = asdict(config)
    moe = plain.pop("moe")
    router = moe.pop("router")
    plain |= {"num_kv_heads": config.kv_heads, "head_dim": config.key_dim}
    if all(config.experts_by_block):  # no block is dense
        del plain["ffn_dim"]
    known = {f"model.{key}": value for key, value in _flat(plain) if key not in _FREE}
    known["model.moe.experts"] = config.experts_by_block
    if not config.experts_by_layer:
        return known
    if router["name"] == "topk_softmax":  # the same weights by another way
        router |= {"name": "softmax_topk", "renormalize": True}
    moe |= {"ffn_dim": config.moe.ffn_dim or config.ffn_dim}
    placed = {"experts", "every", "last"}  # all in the experts of every block
    known |= {f"model.moe.{key}": value for key, value in moe.items() if key not in _FREE_MOE | placed}
    deciding = {key: value for key, value in router.items() if key not in _FREE_ROUTER and not key.endswith("_loss")}
    return known | {f"model.moe.router.{key}": value for key, value in deciding.items()}


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", innermost) for inner, innermost in _flat(value))
        else:
            yield key, value


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _describe(config: ModelConfig) -> str:
    if config.kind is not ModelKind.decoder:
        return f"this model of kind {config.kind.value}"
    pyramid = len(set(config.experts_by_layer)) > 1
    if config.experts_by_layer and (config.moe.residual is not Residual.none or pyramid):
        return "a PR-MoE model"
    return "this model"
