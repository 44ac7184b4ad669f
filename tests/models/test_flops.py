"""Operations of a model, against those that PyTorch's own counter sees."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from twohop.models import ModelConfig, build_model, init_weights
from twohop.models.config import (
    Activation,
    AttentionConfig,
    EncoderConfig,
    ModelKind,
    MoEConfig,
    Residual,
    RouterConfig,
    VisionConfig,
)
from twohop.models.flops import training_flops

MOE = MoEConfig(experts=[4, 8], router=RouterConfig(top_k=2), shared_ffn_dim=12, residual=Residual.sum)


def config(**changes: Any) -> ModelConfig:
    sizes = {"dim": 16, "num_layers": 4, "num_heads": 2, "ffn_dim": 24, "vocab_size": 11, "moe": MOE}
    return ModelConfig(**(sizes | changes))


def counted(model_config: ModelConfig, *inputs: torch.Tensor) -> float:
    # fp64 experts are multiplied matrix by matrix, and plain attention by bmm: the counter knows these.
    model = build_model(model_config)
    init_weights(model, 0)
    model = model.double()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(*inputs)
        (output.logits.sum() + sum(sum(stats.losses.values()) for stats in output.moe)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "activation": Activation.swiglu, "num_kv_heads": 1, "head_dim": 10},
        {"attention": AttentionConfig(kind="latent", nope_dim=6, rope_dim=4, value_dim=14)},
        {"attention": AttentionConfig(kind="sliding", window=4)},  # masked pairs are counted
        {"moe": MoEConfig(experts=[])},
    ],
)
def test_operations_of_a_decoder(changes: dict[str, Any]) -> None:
    length = 9
    model_config = config(**changes)
    flops = training_flops(model_config, length)
    assert flops is not None
    assert counted(model_config, torch.arange(length)[None]) == length * flops


def test_operations_of_a_vit() -> None:
    model_config = config(kind=ModelKind.vit, vision=VisionConfig(image_size=8, patch_size=2))
    flops = training_flops(model_config, 256)
    assert flops is not None
    # Pixels need no gradient: the embedding of patches has no second matrix product in its backward pass.
    assert counted(model_config, torch.randn(3, 1, 8, 8).double()) == 3 * (flops - 16 * 2 * 4 * 16)


def test_without_a_known_length_there_is_no_answer_and_linear_attention_needs_none() -> None:
    pair = config(kind=ModelKind.encoder_decoder, encoder=EncoderConfig())
    assert training_flops(pair, 256) is None
    for changes in ({}, {"tie_embeddings": False, "num_kv_heads": 1}):
        targets, sources = 9, 5
        model_config = config(
            kind=ModelKind.encoder_decoder,
            encoder=EncoderConfig(num_layers=2, moe=replace(MOE, experts=[4])),
            **changes,
        )
        flops = training_flops(model_config, targets, sources)
        assert flops is not None
        source_BS, length_B = torch.arange(sources)[None], torch.tensor([sources])
        assert counted(model_config, source_BS, length_B, torch.arange(targets)[None]) == pytest.approx(targets * flops)
    linear = config(attention=AttentionConfig(kind="linear"))
    assert training_flops(linear, 8) == training_flops(linear, 4096)
