"""Rotary positions in config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""

from typing import Any

from twohop.models.config import ModelConfig, RopeScaling, RopeScalingKind
from twohop.models.interop.hf_config import HFConfig, InteropError

# Their name of each of our options, for every kind that has it.
_NAMES = {
    RopeScalingKind.none: {},
    RopeScalingKind.linear: {"factor": "factor"},
    RopeScalingKind.llama3: {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    RopeScalingKind.yarn: {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}


def read_rope(hf: HFConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of `ModelConfig`.

    Raises:
        InteropError: another kind of scaling, or an option that ours does not have.
    """
    old_theta, old_scaling = hf.take("rope_theta", 10_000.0), hf.take("rope_scaling", None)
    given = dict(hf.take("rope_parameters", None) or old_scaling or {})
    theta = given.pop("rope_theta", old_theta)
    names = [given.pop(key, "default") for key in ("rope_type", "type")]
    name = next((name for name in names if name != "default"), "none")
    if name not in RopeScalingKind.__members__:
        known = ", ".join(kind.value for kind in RopeScalingKind if kind is not RopeScalingKind.none)
        raise InteropError(f"{hf.where}: rope_type={name} is not known here, only default, {known}")
    kind = RopeScalingKind[name]
    options = {ours: given.pop(theirs) for ours, theirs in _NAMES[kind].items() if given.get(theirs) is not None}
    if other := {key: value for key, value in given.items() if value is not None}:
        raise InteropError(f"{hf.where}: rope_parameters of rope_type={name} have {other}, which is not known here")
    return {"rope_theta": float(theta), "rope_scaling": RopeScaling(kind, **options)}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The same as keys of config.json, for transformers 5 and before."""
    scaling = config.rope_scaling
    kind = "default" if scaling.kind is RopeScalingKind.none else scaling.kind.value
    options = {theirs: getattr(scaling, ours) for ours, theirs in _NAMES[scaling.kind].items()}
    old = {"rope_theta": config.rope_theta} | ({"rope_scaling": {"rope_type": kind, **options}} if options else {})
    return old | {"rope_parameters": {"rope_type": kind, "rope_theta": config.rope_theta, **options}}
