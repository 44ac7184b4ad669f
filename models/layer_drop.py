"""Layer drop: a block is left out of some training steps, so that the model learns to do without it.

The rate rises linearly over the blocks up to `model.layer_drop` at the last (Huang 2016, stochastic depth); a block is
left out whole, and nothing is scaled (Fan 2019, LayerDrop).
"""

import hashlib

import torch

from twohop.models.base import MoEModel
from twohop.models.transformer import Transformer


def drop_layers(model: MoEModel, seed: int, step: int) -> None:
    """Decide which blocks the training passes of this step leave out; evaluation uses all of them.

    The draw depends on the seed and the step alone: the ranks of an MoE layer work on different micro-batches, but
    must leave it out together, and a number of ranks must not change the training.
    """
    if not isinstance(model, Transformer) or not model.config.layer_drop:
        return
    digest = hashlib.sha256(f"{seed}/layers/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    draws = torch.rand(len(model.blocks), generator=generator).tolist()
    for number, (block, draw) in enumerate(zip(model.blocks, draws, strict=True), start=1):
        block.left_out = draw < model.config.layer_drop * number / len(model.blocks)
