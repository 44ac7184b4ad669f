"""Which keys a query sees: small functions of positions, and what they compose.

A mask_mod has FlexAttention's form, (sequence, head, query position, key position) → bool. Ours work elementwise on
index tensors that broadcast, so that one function serves a GPU kernel, a dense mask and a test. They do not say that
attention is causal: `build_attention` adds that.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import or_masks

from twohop.models.config import ModelConfig

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Pattern(NamedTuple):
    """Who sees whom."""

    mask: MaskMod | None  # None: all see all
    reach: int | None = None  # how far back a query sees at most, which bounds the cache of generation; None: any way


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """No key after the query."""
    return k <= q


def sliding(window: int, dilation: int) -> MaskMod:
    """`window` keys that end at the query, `dilation` apart; as many after it (Beltagy 2020, Longformer)."""

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = (q - k).abs()
        return (distance < window * dilation) & (distance % dilation == 0)

    return mask


def last(stride: int) -> MaskMod:
    """The query and `stride` positions beside it: the local part of the strided pattern (Child 2019)."""
    return lambda b, h, q, k: (q - k).abs() <= stride


def column(stride: int) -> MaskMod:
    """Every position at a multiple of `stride` from the query: the far part of the strided pattern (Child 2019)."""
    return lambda b, h, q, k: (q - k) % stride == 0


def same_block(stride: int) -> MaskMod:
    """The query's own block: the local part of the fixed pattern (Child 2019)."""
    return lambda b, h, q, k: q // stride == k // stride


def summaries(stride: int, count: int) -> MaskMod:
    """The last `count` positions of every block: the far part of the fixed pattern (Child 2019)."""
    return lambda b, h, q, k: k % stride >= stride - count


def by_head(even: MaskMod, odd: MaskMod) -> MaskMod:
    """One pattern for even heads, another for odd ones."""
    return lambda b, h, q, k: torch.where(h % 2 == 0, even(b, h, q, k), odd(b, h, q, k))


def global_tokens(count: int) -> MaskMod:
    """The first `count` positions see all and are seen by all (Longformer, ETC, BigBird-ITC)."""
    return lambda b, h, q, k: (q < count) | (k < count)


def random_blocks(draws: int, block: int, window: int, first: int, layer: int, ahead_to: int | None) -> MaskMod:
    """Blocks of keys that a block of queries sees, drawn once for each (layer, head, block of queries) (BigBird).

    The candidates are the blocks from position `first` to the window, or to position `ahead_to` if queries look ahead.
    They are cut into `draws` equal parts, and one block is drawn from each: so all are different, and fewer only where
    there are fewer candidates. A hash draws: it needs no table, gives the same graph on every device, and, in a causal
    model, for every length of the sequence.
    """
    first_block = -(-first // block)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query_block, key_block = q // block, k // block
        end = (query_block * block - window + 1) // block if ahead_to is None else query_block * 0 + ahead_to // block
        candidates = (end - first_block).clamp(min=0)
        seen = key_block < 0
        for draw in range(draws):
            start, stop = candidates * draw // draws, candidates * (draw + 1) // draws
            chosen = first_block + start + _hash(layer, draw, h, query_block) % (stop - start).clamp(min=1)
            seen = seen | ((key_block == chosen) & (start < stop))
        return seen

    return mask


def _hash(layer: int, draw: int, h: Tensor, block: Tensor) -> Tensor:
    """A number below 46337, the largest prime whose square fits into the 32-bit indices of a GPU kernel."""
    x = h * 0 + layer * 7877 + draw * 3571
    for value in (h, block):
        x = (x + (value + 1) * 9973) % 46337
        for _ in range(2):  # squares break up the regularity of linear steps
            x = (x * x + 12289) % 46337
    return x


def _sliding(config: ModelConfig, causal: bool, layer: int) -> Pattern:
    options = config.attention
    window, dilation = options.window or 1, options.dilation or 1
    return Pattern(sliding(window, dilation), (window - 1) * dilation)


def _sparse(config: ModelConfig, causal: bool, layer: int) -> Pattern:
    options = config.attention
    stride = options.stride or 1
    if options.kind == "strided":
        near, far = last(stride), column(stride)
    else:
        near, far = same_block(stride), summaries(stride, options.summary or 1)
    return Pattern(by_head(near, far) if options.split_heads else or_masks(near, far))


def _bigbird(config: ModelConfig, causal: bool, layer: int) -> Pattern:
    options = config.attention
    window, dilation, first = options.window or 1, options.dilation or 1, options.global_tokens or 0
    parts = [sliding(window, dilation)]
    if first:
        parts.append(global_tokens(first))
    if options.random_blocks:
        ahead_to = None if causal else config.max_seq_len
        parts.append(random_blocks(options.random_blocks, options.block or 1, window, first, layer, ahead_to))
    return Pattern(or_masks(*parts))


# How each kind that is a mask makes its pattern from (model, whether it is causal, number of the block).
PATTERNS: dict[str, Callable[[ModelConfig, bool, int], Pattern]] = {
    "full": lambda config, causal, layer: Pattern(None),
    "sliding": _sliding,
    "strided": _sparse,
    "fixed": _sparse,
    "bigbird": _bigbird,
}
