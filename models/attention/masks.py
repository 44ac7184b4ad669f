"""Which keys a query sees: small functions of positions, and attention under them.

A mask_mod has FlexAttention's form, (sequence, head, query position, key position) → bool. Ours work elementwise on
index tensors that broadcast, so that one function serves a GPU kernel, a dense mask and a test.

Shapes: B sequences, T queries, S keys, H heads, G key/value heads, A head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """No key after the query."""
    return k <= q


def dense_mask(
    mask: MaskMod,
    num_heads: int,
    num_queries: int,
    num_keys: int,
    first_query: int,
    first_key: int,
    device: torch.device,
) -> Tensor:
    """The mask as bool [1, H or 1, T, S]; heads of length 1 if the mask does not look at them."""
    b = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    h = torch.arange(num_heads, device=device).view(1, -1, 1, 1)
    q = torch.arange(first_query, first_query + num_queries, device=device).view(1, 1, -1, 1)
    k = torch.arange(first_key, first_key + num_keys, device=device).view(1, 1, 1, -1)
    return mask(b, h, q, k)


def attend(
    q_BHTA: Tensor,
    k_BGSA: Tensor,
    v_BGSA: Tensor,
    mask: MaskMod | None,
    first_query: int = 0,
    first_key: int = 0,
    key_mask_BS: Tensor | None = None,
) -> Tensor:
    """softmax(q k / sqrt(A)) v over the keys that `mask` and `key_mask_BS` let through: [B, H, T, A].

    Queries stand at the positions from `first_query` on, keys from `first_key` on. A query that sees no key gets 0.
    """
    num_heads, num_queries, num_keys = q_BHTA.shape[1], q_BHTA.shape[2], k_BGSA.shape[2]
    is_causal = mask is causal and key_mask_BS is None and first_query == first_key and num_queries == num_keys
    seen = None
    if mask is not None and not is_causal:
        seen = dense_mask(mask, num_heads, num_queries, num_keys, first_query, first_key, q_BHTA.device)
    if key_mask_BS is not None:
        padding = key_mask_BS[:, None, None, :]
        seen = padding if seen is None else seen & padding
    return F.scaled_dot_product_attention(q_BHTA, k_BGSA, v_BGSA, attn_mask=seen, is_causal=is_causal, enable_gqa=True)
