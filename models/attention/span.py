"""Softmax attention whose heads learn how far they look back (Sukhbaatar 2019, Adaptive Attention Span).

Shapes: B sequences, T queries, S keys, H heads, G key/value heads, A head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.models.attention.documents import Documents
from twohop.models.attention.masks import Pattern
from twohop.models.attention.softmax import Attention
from twohop.models.config import ModelConfig


class SpanAttention(Attention):
    """Each head weighs a key at distance x by clamp((ramp + z - x) / ramp, 0, 1) before its softmax is normalised.

    The span z = window · span, with span in [0, 1], is learned; it starts at 0, as in the paper's code.
    """

    def __init__(self, config: ModelConfig) -> None:
        options = config.attention
        assert options.window is not None
        super().__init__(config, Pattern(None, options.window - 1))
        self.window, self.ramp, self.span_loss = options.window, options.ramp or 1, options.span_loss or 0.0
        self.span = nn.Parameter(torch.empty(config.num_heads))
        self._loss: Tensor | None = None

    def attend(
        self,
        q_BHTA: Tensor,
        k_BGSA: Tensor,
        v_BGSA: Tensor,
        first_query: int,
        first_key: int,
        key_mask_BS: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """See `Attention`."""
        device, num_queries, num_keys = q_BHTA.device, q_BHTA.shape[2], k_BGSA.shape[2]
        q_T1 = torch.arange(first_query, first_query + num_queries, device=device)[:, None]
        distance_TS = q_T1 - torch.arange(first_key, first_key + num_keys, device=device)
        self._loss = self.span_loss * self.window * self.span.clamp(0, 1).mean()
        # Outside [0, 1] the forward pass clamps, and the gradient passes nevertheless: a span can come back.
        span_H = self.span + (self.span.clamp(0, 1) - self.span).detach()
        weight_HTS = (1 + (self.window * span_H[:, None, None] - distance_TS) / self.ramp).clamp(0, 1)
        seen_HTS = (distance_TS >= 0) & (distance_TS < self.window) & (weight_HTS > 0)
        if key_mask_BS is not None:
            seen_HTS = seen_HTS & key_mask_BS[:, None, None]
        if documents is not None:
            seen_HTS = seen_HTS & (documents.number_BT[:, None, :, None] == documents.number_BT[:, None, None])
        # m · exp(s) is exp(s + log m). The inner `where` keeps log 0, whose gradient is NaN, out of the graph.
        log_weight = torch.where(seen_HTS, weight_HTS, 1).log().masked_fill(~seen_HTS, -torch.inf)
        if log_weight.dim() == 3:
            log_weight = log_weight[None]
        return F.scaled_dot_product_attention(
            q_BHTA, k_BGSA, v_BGSA, attn_mask=log_weight.to(q_BHTA.dtype), enable_gqa=True
        )

    def take_losses(self) -> dict[str, Tensor]:
        """The l1 loss: `span_loss` times the mean span of the heads, in positions."""
        loss, self._loss = self._loss, None
        return {} if loss is None else {"span": loss}
