"""What every router gets and returns, and the parts that routers share.

Shapes: B sequences, T positions, N = B·T tokens of the micro-batch, D model width,
E experts of the layer, K experts for each token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.models.config import BalanceOver, RouterConfig
from twohop.models.routers.losses import Scores, weighted_losses


class Routing(NamedTuple):
    """A router's decision for one micro-batch, before any capacity.

    A named tuple, so that PyTorch's utilities (FSDP, checkpointing, compile) see the tensors inside.
    """

    ids_NK: Tensor  # int64, chosen experts in order of preference; -1: no expert in this place
    weights_NK: Tensor  # fp32 (fp64 if the tokens are), factors of the experts' outputs
    losses: dict[str, Tensor]  # scalars, each already multiplied by its weight
    load_E: Tensor  # int64, how many of this micro-batch's assignments chose each expert


class TokenInfo(NamedTuple):
    """What a router may know of a micro-batch beside the tokens' states; None where the model has no such thing."""

    num_sequences: int  # B; the N tokens stand sequence by sequence
    token_BT: Tensor | None = None  # int64 ids in the vocabulary
    task_B: Tensor | None = None  # int64, the task of each sequence
    sample_B: Tensor | None = None  # int64 on the host, the number of each sequence in the data set
    length_B: Tensor | None = None  # int64, tokens of each sequence, N in all: padding is left out; None: all alike
    sentence_BD: Tensor | None = None  # what speaks for a sequence whose later tokens are not known; None: its tokens

    def samples(self) -> tuple[int, ...]:
        """The numbers of the sequences. Raises ValueError if the data does not number them."""
        if self.sample_B is None:
            raise ValueError(
                "model.moe.cache.enabled=true: the data does not number its samples: give sample_B, or disable it"
            )
        return tuple(self.sample_B.tolist())

    def for_each_token(self, value_B: Tensor, num_tokens: int) -> Tensor:
        """[B, …] → [N, …]: of each token, the value of its sequence."""
        lengths = num_tokens // self.num_sequences if self.length_B is None else self.length_B
        return value_B.repeat_interleave(lengths, 0, output_size=num_tokens)

    def mean(self, x_NX: Tensor) -> Tensor:
        """[N, …] → [B, …]: the mean over each sequence's tokens."""
        if self.length_B is None:
            return x_NX.unflatten(0, (self.num_sequences, -1)).mean(1)
        sequence_N = self.for_each_token(torch.arange(self.num_sequences, device=x_NX.device), len(x_NX))
        total_BX = x_NX.new_zeros(self.num_sequences, *x_NX.shape[1:]).index_add(0, sequence_N, x_NX)
        return total_BX / self.length_B.view(-1, *[1] * (x_NX.dim() - 1))


class Router(nn.Module):
    """From tokens to `Routing`. A subclass is one file, and one line in `ROUTERS`.

    `build_router` refuses whatever is set in `RouterConfig` beyond `name`, `top_k` and a class's `options`.
    """

    looks_ahead = ""  # why, in training, a token's route depends on later tokens; empty: it does not
    options: frozenset[str] = frozenset()  # the fields of `RouterConfig` that this router has
    sizes: tuple[str, ...] = ()  # what its constructor takes beside: "vocab_size", "num_tasks"

    def __init__(self, config: RouterConfig, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        # For load_balance_over=global_batch: adds an int64 tensor up over all ranks, in place; set by who knows them.
        self.sum_over_ranks: Callable[[Tensor], None] | None = None
        self._load_so_far: Tensor | None = None  # of the global batch, over the micro-batches seen

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Route the tokens [N, D] of a micro-batch."""
        raise NotImplementedError

    def init_buffers(self, generator: torch.Generator) -> None:
        """Give the buffers their first values, drawn from a CPU generator that is the same on all ranks."""

    def after_step(self, load_E: Tensor) -> None:
        """Learn, after an optimizer step, how many assignments of the global batch chose each expert: fp64 [E]."""
        self._load_so_far = None

    def routing(
        self, about: TokenInfo, ids_NK: Tensor, weights_NK: Tensor, logits_NE: Tensor, probs_NE: Tensor, **noise: Any
    ) -> Routing:
        """The decision with its losses, those of `losses.LOSSES` that are among `options`.

        With load_balance_over=global_batch this is a collective of the world while training, once a micro-batch.
        """
        load_E = count_assignments(ids_NK, self.num_experts)
        counted_E = self._count_globally(load_E) if self._counts_globally else load_E
        scores = Scores(logits_NE, probs_NE, ids_NK, counted_E, about, **noise)
        return Routing(ids_NK, weights_NK, weighted_losses(self.config, self.options, scores), load_E)

    @property
    def _counts_globally(self) -> bool:
        config = self.config
        wanted = config.load_balance_over is BalanceOver.global_batch and config.load_balance_loss > 0
        return wanted and "load_balance_over" in self.options and self.training

    def _count_globally(self, load_E: Tensor) -> Tensor:
        """Assignments of all ranks' micro-batches up to this one, since the last step."""
        load_E = load_E.clone()
        if self.sum_over_ranks is not None:
            self.sum_over_ranks(load_E)
        self._load_so_far = load_E if self._load_so_far is None else self._load_so_far + load_E
        return self._load_so_far


class Gate(nn.Module):
    """The linear map from a token to its router logits, always in fp32 (fp64 for fp64 tokens).

    `jitter` multiplies each input by U(1 - jitter, 1 + jitter) while training (Fedus 2021, Switch Transformer).
    """

    def __init__(self, dim: int, num_experts: int, jitter: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.jitter = jitter

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] → [N, E]."""
        x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        if self.training and self.jitter > 0:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.jitter, 1 + self.jitter)
        # A bf16 logit has 8 bits: near ties would flip the choice of an expert, so autocast stays out of here.
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND, self.weight.to(x_ND.dtype))


def count_assignments(ids_NK: Tensor, num_experts: int) -> Tensor:
    """Number of assignments of every expert, int64 [E]; places with id -1 are not counted. No host sync."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_NK.device)
    flat = ids_NK.flatten() + 1
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[1:]
