"""Attention without softmax, whose past is a state of fixed size: linear attention, and retention.

Positions are computed in chunks: each parallel inside, and the state carried from one to the next. One chunk of the
whole sequence is the papers' parallel form, chunks of one position are their recurrent form; all give the same.

Shapes: B sequences, T positions, C positions of a chunk, D model width, H heads, A head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.models.attention.base import HeadAttention
from twohop.models.attention.documents import Documents
from twohop.models.attention.rope import Rope, rotate
from twohop.models.config import ModelConfig


class LinearState:
    """What one layer keeps of the past: Σ decay^distance · k vᵀ, and Σ k for the normaliser."""

    def __init__(self) -> None:
        self.length = 0
        self.kv_BHAA: Tensor | None = None
        self.k_BHA: Tensor | None = None


class LinearAttention(HeadAttention):
    """Linear attention (Katharopoulos 2020), or with `decay` multi-scale retention (Sun 2023, RetNet).

    Without decay φ(q)·φ(k) with φ = elu + 1 stands for exp(q·k), and a normaliser makes the weights add up to 1; RoPE
    rotates φ(q) and φ(k) above the line only, as RoFormer has it, so that the normaliser stays positive. With decay,
    head h weighs distance n by (1 - 2^(-5 - h))^n, each head's output is normed, and a SiLU gate of the input
    multiplies it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.decay, self.chunk = config.attention.decay, config.attention.chunk or 1
        self.eps = config.norm_eps
        self.num_heads = config.num_heads
        if self.decay:
            self.wg = nn.Linear(config.dim, config.num_heads * self.head_dim, bias=False)

    separates_documents = False  # the state passes from one to the next

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None = None,
        cache: LinearState | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D]. With a cache, x holds the positions after those that its state has seen."""
        if documents is not None:
            raise ValueError(
                "model.attention.kind=linear sees across documents: data.document_mask=true needs another kind"
            )
        state = cache or LinearState()
        q, (k, v) = self.queries(x_BTD), self.keys_values(x_BTD)
        k, v = (x.repeat_interleave(self.num_heads // x.shape[1], 1) for x in (k, v))
        # Sums over a whole sequence want more than bf16's 8 bits.
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            y_BHTA = self._mix(q.to(dtype), k.to(dtype), v.to(dtype), rope, state).to(v.dtype)
        state.length += x_BTD.shape[1]
        if self.decay:
            y_BHTA = y_BHTA * F.silu(self._heads(self.wg(x_BTD)))
        return self.output(y_BHTA)

    def _mix(self, q_BHTA: Tensor, k_BHTA: Tensor, v_BHTA: Tensor, rope: Rope | None, state: LinearState) -> Tensor:
        """[B, H, T, A] for all positions; moves the state past them."""
        if self.decay:
            y = self._by_chunks(rotate(q_BHTA, rope), rotate(k_BHTA, rope) * self.head_dim**-0.5, v_BHTA, state)
            return F.rms_norm(y, (self.head_dim,), eps=self.eps)
        q, k = F.elu(q_BHTA) + 1, F.elu(k_BHTA) + 1
        k_sum = k.cumsum(2) if state.k_BHA is None else k.cumsum(2) + state.k_BHA[:, :, None]
        state.k_BHA = k_sum[:, :, -1]
        return self._by_chunks(rotate(q, rope), rotate(k, rope), v_BHTA, state) / (q * k_sum).sum(-1, keepdim=True)

    def _by_chunks(self, q_BHTA: Tensor, k_BHTA: Tensor, v_BHTA: Tensor, state: LinearState) -> Tensor:
        """Σ over m ≤ n of decay^(n - m) (q_n · k_m) v_m for every n: [B, H, T, A]."""
        parts = zip(*(x.split(self.chunk, 2) for x in (q_BHTA, k_BHTA, v_BHTA)), strict=True)
        return torch.cat([self._chunk(q, k, v, state) for q, k, v in parts], 2)

    def _chunk(self, q_BHCA: Tensor, k_BHCA: Tensor, v_BHCA: Tensor, state: LinearState) -> Tensor:
        """The positions of one chunk among themselves, and what the state adds; moves the state past them."""
        size = q_BHCA.shape[2]
        n_C = torch.arange(size, device=q_BHCA.device, dtype=q_BHCA.dtype)
        log_H11 = self._log_decay(q_BHCA)[:, None, None]
        # No exponent is positive: nothing overflows, however long the sequence.
        decay_HCC = (log_H11 * (n_C[:, None] - n_C).clamp(min=0)).exp().tril()
        y_BHCA = (q_BHCA @ k_BHCA.mT * decay_HCC) @ v_BHCA
        to_end_HC1 = (log_H11 * (size - 1 - n_C)[:, None]).exp()
        kv_BHAA = (k_BHCA * to_end_HC1).mT @ v_BHCA
        if state.kv_BHAA is not None:
            y_BHCA = y_BHCA + (q_BHCA * (log_H11 * (n_C + 1)[:, None]).exp()) @ state.kv_BHAA
            kv_BHAA = kv_BHAA + (log_H11 * size).exp() * state.kv_BHAA
        state.kv_BHAA = kv_BHAA
        return y_BHCA

    def _log_decay(self, like: Tensor) -> Tensor:
        """log(1 - 2^(-5 - h)) for every head h, or 0: [H]."""
        h = torch.arange(self.num_heads, device=like.device, dtype=like.dtype)
        return torch.log1p(-torch.exp2(-5 - h)) if self.decay else h * 0

    def new_cache(self, max_len: int) -> LinearState:
        """See `AttentionBase`. Its size does not depend on `max_len`."""
        return LinearState()
