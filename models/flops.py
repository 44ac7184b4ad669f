"""Arithmetic that a model needs, for the utilisation of accelerators; counts what is asked for, not what is executed.

So nothing that is computed twice (activation checkpointing), padded or masked counts: model FLOPs utilisation in the
sense of Chowdhery 2022, PaLM, appendix B.
"""

from torch import nn

from twohop.models.build import build_model
from twohop.models.config import ModelConfig, ModelKind
from twohop.models.routers.base import Gate


def training_flops(config: ModelConfig, seq_len: int) -> float | None:
    """Floating-point operations, forward and backward, for one target: a token of text, or an image.

    Six for each weight of a matrix that a token meets, with K experts of a layer and without the table of embeddings;
    and for attention 12 · T · H · A for each layer, as in PaLM's formula, which counts pairs that a mask leaves out.
    Attention without softmax has no such term. None for an encoder-decoder, whose sources vary in length.

    Args:
        config: with model.vocab_size filled in.
        seq_len: positions that attend to each other; of images, their patches count instead.
    """
    if config.kind is ModelKind.encoder_decoder:
        return None
    model = build_model(config, device="meta")
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear | Gate)]
    weights = sum(matrix.weight.numel() for matrix in matrices)
    for _, layer in model.moe_layers():
        expert = sum(parameter.numel() for parameter in layer.experts.parameters()) // layer.dispatcher.num_experts
        weights += expert * layer.config.router.top_k
    head = config.dim * (config.vocab_size or 0)
    positions = seq_len if config.vision is None else config.vision.num_patches
    attention = config.num_layers * 2 * positions * _pair_width(config)
    if config.vision is not None:  # the head meets an image, and not each of its patches
        return 3.0 * (positions * (2 * (weights - head) + attention) + 2 * head)
    if config.tie_embeddings:
        weights += head
    return 3.0 * (2 * weights + attention)


def _pair_width(config: ModelConfig) -> int:
    """Multiplications that a pair of positions costs, over all heads: scores, and the sum of values."""
    options = config.attention
    if options.kind == "linear":
        return 0
    if options.kind == "latent":
        return config.num_heads * ((options.nope_dim or 0) + (options.rope_dim or 0) + (options.value_dim or 0))
    return config.num_heads * 2 * config.key_dim
