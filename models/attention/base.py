"""What all kinds of attention share, and the projections to heads that most of them do.

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, G key/value heads, A head width;
X all heads beside each other.
"""

from torch import Tensor, nn

from twohop.models.attention.cache import Cache
from twohop.models.config import ModelConfig, QKNorm


class AttentionBase(nn.Module):
    """One layer of attention, of any kind."""

    separates_documents = True  # whether `forward` keeps the `documents` of a sequence apart

    def take_losses(self) -> dict[str, Tensor]:
        """Scalars that the last forward pass adds to the training loss, by name, already multiplied by their weights.

        They can be taken once. They are made in the forward pass since an engine may have only then the parameters.
        """
        return {}

    def new_cache(self, max_len: int) -> Cache:
        """An empty cache for `max_len` positions, as `forward` takes it."""
        raise NotImplementedError


class HeadAttention(AttentionBase):
    """Projections of queries, keys and values to heads, and of the heads back.

    With fewer key/value heads than heads it is GQA (Ainslie 2023), with one MQA (Shazeer 2019).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.key_dim
        width, kv_width = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.wq = nn.Linear(config.dim, width, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(width, config.dim, bias=False)
        self.qk_norm = config.attention.qk_norm
        if self.qk_norm is not QKNorm.none:
            per_head = self.qk_norm is QKNorm.head
            self.q_norm = nn.RMSNorm(self.head_dim if per_head else width, config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim if per_head else kv_width, config.norm_eps)

    def queries(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] → [B, H, T, A], normed and not rotated."""
        q_BTX = self.wq(x_BTD)
        if self.qk_norm is QKNorm.full:
            q_BTX = self.q_norm(q_BTX)
        q_BHTA = self._heads(q_BTX)
        return self.q_norm(q_BHTA) if self.qk_norm is QKNorm.head else q_BHTA

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] → [B, G, S, A] twice; keys normed and not rotated."""
        k_BSX = self.wk(x_BSD)
        if self.qk_norm is QKNorm.full:
            k_BSX = self.k_norm(k_BSX)
        k_BGSA = self._heads(k_BSX)
        return self.k_norm(k_BGSA) if self.qk_norm is QKNorm.head else k_BGSA, self._heads(self.wv(x_BSD))

    def output(self, y_BHTA: Tensor) -> Tensor:
        """[B, H, T, A] → [B, T, D]."""
        return self.wo(y_BHTA.transpose(1, 2).flatten(2))

    def _heads(self, x_BTX: Tensor) -> Tensor:
        return x_BTX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
