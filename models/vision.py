"""The vision Transformer: a ViT (Dosovitskiy 2020), and with MoE layers a V-MoE (Riquelme 2021).

Blocks are those of the other models (RMSNorm, no biases), without a causal mask and without RoPE: positions are
learned. An image is represented by the mean of its patches' states, so there is no class token.

The tokens that meet in an MoE layer, and whose number decides its experts' capacity, are all patches of the images of
a micro-batch, image by image.

Shapes: B images, C channels, H height, W width, T patches, P numbers of a patch, D model width, V classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.comm import TokenDispatcher
from twohop.models.base import ModelOutput, MoEModel
from twohop.models.config import ModelConfig
from twohop.models.routers import TokenInfo
from twohop.models.transformer import Block


class VisionTransformer(MoEModel):
    """Images to the logits of their classes. Make it with `build_model`; `dispatchers` has one for each MoE layer."""

    def __init__(self, config: ModelConfig, dispatchers: Sequence[TokenDispatcher]) -> None:
        super().__init__(config)
        if config.vocab_size is None or config.vision is None:
            raise ValueError("model.vocab_size or model.vision is null: set the number of classes and the images' size")
        self.vision = config.vision
        remaining = iter(dispatchers)
        self.embed = nn.Linear(self.vision.channels * self.vision.patch_size**2, config.dim, bias=False)
        self.position = nn.Parameter(torch.empty(self.vision.num_patches, config.dim))
        self.blocks = nn.ModuleList(
            Block(config, next(remaining) if num_experts else None, layer, causal=False)
            for layer, num_experts in enumerate(config.experts_by_block)
        )
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, images_BCHW: Tensor, sample_B: Tensor | None = None) -> ModelOutput:
        """Floats [B, C, H, W] → `ModelOutput` with logits [B, V].

        `sample_B` numbers the images in their data set, for routers that remember. With expert parallelism every rank
        of each layer's EP group must call this. Raises ValueError for images of another size than `model.vision` says.
        """
        wanted = (self.vision.channels, self.vision.image_size, self.vision.image_size)
        if images_BCHW.shape[1:] != wanted:
            raise ValueError(f"images of shape {tuple(images_BCHW.shape[1:])}, where model.vision says {wanted}")
        # A patch is a column of unfold's output: its pixels, channel by channel. Patches stand row by row.
        size = self.vision.patch_size
        patches_BTP = F.unfold(images_BCHW, size, stride=size).mT
        x_BTD = self.embed(patches_BTP) + self.position
        about = TokenInfo(len(images_BCHW), sample_B=sample_B)
        moe = []
        for block in self.blocks:
            x_BTD, stats = block(x_BTD, None, about)
            if stats is not None:
                moe.append(stats)
        return ModelOutput(self.head(self.norm(x_BTD).mean(1)), tuple(moe))
