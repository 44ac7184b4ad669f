"""Llama (Touvron 2023): dense models, to export ours or to upcycle theirs."""

from typing import Any

from twohop.models.config import ModelConfig
from twohop.models.interop.family import Family
from twohop.models.interop.hf_config import HFConfig


class Llama(Family):
    """A dense decoder."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    sparse = False

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """See `Family`."""
        hf.expect("attention_bias", False)
        hf.expect("mlp_bias", False)
        return {}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """See `Family`."""
        return {"attention_bias": False, "mlp_bias": False}
