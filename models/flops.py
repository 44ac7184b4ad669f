"""Arithmetic that a model needs, for the utilisation of accelerators; counts what is asked for, not what is executed.

So nothing that is computed twice (activation checkpointing), padded or masked counts: model FLOPs utilisation in the
sense of Chowdhery 2022, PaLM, appendix B.
"""

from torch import nn

from twohop.models.base import MoEModel
from twohop.models.build import build_model
from twohop.models.config import ModelConfig, ModelKind
from twohop.models.routers.base import Gate


def training_flops(config: ModelConfig, seq_len: int, source_len: int | None = None) -> float | None:
    """Floating-point operations, forward and backward, for one target: a token of text, or an image.

    Six for each weight of a matrix that a token meets, with K experts of a layer and without the table of embeddings;
    and for attention 12 · T · H · A for each layer, as in PaLM's formula, which counts pairs that a mask leaves out.
    Attention without softmax has no such term. What an encoder-decoder does for a source is shared by its targets;
    None where the length of sources is not given.

    Args:
        config: with model.vocab_size filled in.
        seq_len: positions that attend to each other; of images, their patches count instead.
        source_len: positions of a source; of an encoder-decoder alone.
    """
    if config.kind is ModelKind.encoder_decoder:
        return None if source_len is None else _of_pair(config, seq_len, source_len)
    weights = sum(_weights(build_model(config, device="meta")).values())
    head = config.dim * (config.vocab_size or 0)
    positions = seq_len if config.vision is None else config.vision.num_patches
    attention = config.num_layers * 2 * positions * _pair_width(config)
    if config.vision is not None:  # the head meets an image, and not each of its patches
        return 3.0 * (positions * (2 * (weights - head) + attention) + 2 * head)
    if config.tie_embeddings:
        weights += head
    return 3.0 * (2 * weights + attention)


def _of_pair(config: ModelConfig, target_len: int, source_len: int) -> float:
    """See `training_flops`. Cross-attention makes its keys and values of the source."""
    at_source, at_target, share = 0, 0, source_len / target_len
    for name, weights in _weights(build_model(config, device="meta")).items():
        if name.startswith("encoder.") or name.endswith(("cross_attention.wk", "cross_attention.wv")):
            at_source += weights
        else:
            at_target += weights
    if config.tie_embeddings:
        at_target += config.dim * (config.vocab_size or 0)
    width, cross_width = _pair_width(config), config.num_heads * 2 * config.key_dim
    pairs = config.num_layers * (target_len * width + source_len * cross_width)
    pairs_at_source = config.encoder_stack.num_layers * source_len * width
    return 6.0 * (at_target + pairs + share * (at_source + pairs_at_source))


def _weights(model: MoEModel) -> dict[str, int]:
    """Those of each matrix, and of the experts of each layer, that a token meets, by the module's name."""
    weights = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear | Gate)}
    for name, layer in model.moe_layers():
        expert = sum(parameter.numel() for parameter in layer.experts.parameters()) // layer.dispatcher.num_experts
        weights[f"{name}.experts"] = expert * layer.config.router.top_k
    return weights


def _pair_width(config: ModelConfig) -> int:
    """Multiplications that a pair of positions costs, over all heads: scores, and the sum of values."""
    options = config.attention
    if options.kind == "linear":
        return 0
    if options.kind == "latent":
        return config.num_heads * ((options.nope_dim or 0) + (options.rope_dim or 0) + (options.value_dim or 0))
    return config.num_heads * 2 * config.key_dim
