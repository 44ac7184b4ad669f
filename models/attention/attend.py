"""Softmax attention under a mask: FlexAttention on CUDA, PyTorch's SDPA with the same mask elsewhere.

Shapes: B sequences, T queries, S keys, H heads, G key/value heads, A head width.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from twohop.models.attention.documents import Documents
from twohop.models.attention.masks import MaskMod, causal

FLEX_HEAD_DIM = 16  # narrower heads than this do not fill a tile of FlexAttention's kernels


def attend(
    q_BHTA: Tensor,
    k_BGSA: Tensor,
    v_BGSA: Tensor,
    mask: MaskMod | None,
    first_query: int = 0,
    first_key: int = 0,
    key_mask_BS: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """softmax(q k / sqrt(A)) v over the keys that `mask`, `key_mask_BS` and `documents` let through: [B, H, T, A].

    Queries stand at the positions from `first_query` on, keys from `first_key` on. A query that sees no key gets 0.
    `documents` are those of whole sequences, without a cache.
    """
    num_queries, num_keys = q_BHTA.shape[2], k_BGSA.shape[2]
    whole = key_mask_BS is None and first_query == first_key and num_queries == num_keys
    if documents is not None:
        assert whole
        if q_BHTA.is_cuda and q_BHTA.shape[-1] >= FLEX_HEAD_DIM:
            blocks = documents.once(mask, lambda within: document_blocks(within, q_BHTA))
            return flex_kernel()(q_BHTA, k_BGSA, v_BGSA, block_mask=blocks, enable_gqa=True)
        seen = documents.once(mask, lambda within: dense_mask(within, q_BHTA, num_keys, 0, 0, each_sequence=True))
        return F.scaled_dot_product_attention(q_BHTA, k_BGSA, v_BGSA, attn_mask=seen, enable_gqa=True)
    if whole and mask is causal:
        return F.scaled_dot_product_attention(q_BHTA, k_BGSA, v_BGSA, is_causal=True, enable_gqa=True)
    if whole and mask is not None and q_BHTA.is_cuda and q_BHTA.shape[-1] >= FLEX_HEAD_DIM:
        return attend_flex(q_BHTA, k_BGSA, v_BGSA, mask)
    seen = None
    if mask is not None:
        seen = dense_mask(mask, q_BHTA, num_keys, first_query, first_key)
    if key_mask_BS is not None:
        seen = key_mask_BS[:, None, None] if seen is None else seen & key_mask_BS[:, None, None]
    return F.scaled_dot_product_attention(q_BHTA, k_BGSA, v_BGSA, attn_mask=seen, enable_gqa=True)


def dense_mask(
    mask: MaskMod, q_BHTA: Tensor, num_keys: int, first_query: int, first_key: int, each_sequence: bool = False
) -> Tensor:
    """The mask as bool [1, H, T, S], with 1 for H if it does not look at heads; B for the 1 if `each_sequence`."""
    device, (num_heads, num_queries) = q_BHTA.device, q_BHTA.shape[1:3]
    b = torch.arange(len(q_BHTA) if each_sequence else 1, device=device).view(-1, 1, 1, 1)
    h = torch.arange(num_heads, device=device).view(1, -1, 1, 1)
    q = torch.arange(first_query, first_query + num_queries, device=device).view(1, 1, -1, 1)
    k = torch.arange(first_key, first_key + num_keys, device=device).view(1, 1, 1, -1)
    return mask(b, h, q, k)


def attend_flex(q_BHTA: Tensor, k_BGSA: Tensor, v_BGSA: Tensor, mask: MaskMod) -> Tensor:
    """`attend` for a whole sequence, without the work for blocks of keys that nobody sees (Dong 2024)."""
    num_heads, num_queries = q_BHTA.shape[1:3]
    blocks = _block_mask(mask, num_heads, num_queries, q_BHTA.device)
    return flex_kernel()(q_BHTA, k_BGSA, v_BGSA, block_mask=blocks, enable_gqa=True)


@lru_cache(maxsize=128)  # every layer asks for its own in every step
def _block_mask(mask: MaskMod, num_heads: int, length: int, device: torch.device) -> Any:
    return create_block_mask(mask, None, num_heads, length, length, device=device)


def document_blocks(mask: MaskMod, q_BHTA: Tensor) -> Any:
    """FlexAttention's form of a mask of this batch alone."""
    batch, num_heads, length = q_BHTA.shape[:3]
    looks_at_heads = dense_mask(mask, q_BHTA[:, :, :1], 1, 0, 0, each_sequence=True).shape[1] > 1
    return create_block_mask(mask, batch, num_heads if looks_at_heads else None, length, length, device=q_BHTA.device)


@lru_cache(maxsize=1)
def flex_kernel() -> Callable[..., Any]:
    """FlexAttention, compiled: uncompiled, it computes every score."""
    return torch.compile(flex_attention)
