"""The matmul floor of a training step: its dense matmuls, forward and backward, and nothing else.

Shapes: see the arguments; a linear map is [rows, inputs] by [outputs, inputs], attention [heads, positions, head_dim].
"""

import math
from collections.abc import Callable

import torch

from twohop.models.config import ModelConfig, Residual
from twohop.models.feed_forward import up_width
from twohop.trainer.config import Config
from twohop.trainer.world import world_size

Pass = Callable[[], None]


class MatmulFloor:
    """The share of one rank in the matmuls of a step, each with operands of its own.

    Experts get the same number of rows each, together the part `kept` of all assignments. Attention multiplies half of
    the keys, which is what a kernel that knows of causality needs at least.
    """

    def __init__(self, config: Config, kept: float) -> None:
        """`config` is that of a run, with the model's vocabulary."""
        self.config = config
        self.micro_batches = config.train.global_batch // config.train.micro_batch // world_size()
        self.passes = list(self._passes(kept))

    def run(self) -> None:
        """The step."""
        for _ in range(self.micro_batches):
            for one in self.passes:
                one()

    def _passes(self, kept: float) -> list[Pass]:
        model, batch, positions = self.config.model, self.config.train.micro_batch, self.config.train.seq_len
        assert model.vocab_size is not None
        tokens = batch * positions
        width, kv_width = model.num_heads * model.key_dim, model.kv_heads * model.key_dim
        passes = [linear(tokens, model.dim, model.vocab_size)]
        for experts in model.experts_by_block:
            passes += [linear(tokens, model.dim, out) for out in (width, kv_width, kv_width)]
            passes += [attention(batch * model.num_heads, positions, model.key_dim), linear(tokens, width, model.dim)]
            if experts:
                passes.append(linear(tokens, model.dim, experts))
                ep_size = math.gcd(experts, world_size())
                rows = round(tokens * model.moe.router.top_k * kept * ep_size / experts)
                for _ in range(experts // ep_size):
                    passes += network(rows, model, model.moe.ffn_dim or model.ffn_dim)
            if not experts or model.moe.residual is not Residual.none:
                passes += network(tokens, model, model.ffn_dim)
        return passes


def network(rows: int, model: ModelConfig, ffn_dim: int) -> list[Pass]:
    """A feed-forward network: two matrices for GELU, and the size of three for SwiGLU."""
    up = up_width(ffn_dim, model.activation)
    return [linear(rows, model.dim, up), linear(rows, ffn_dim, model.dim)]


def linear(rows: int, inputs: int, outputs: int) -> Pass:
    """y = x Wᵀ, and the gradients of x and W."""
    x, grad_x = torch.randn(rows, inputs), torch.empty(rows, inputs)
    weight, grad_weight = torch.randn(outputs, inputs), torch.empty(outputs, inputs)
    y, grad_y = torch.empty(rows, outputs), torch.randn(rows, outputs)

    def run() -> None:
        torch.mm(x, weight.T, out=y)
        torch.mm(grad_y, weight, out=grad_x)
        torch.mm(grad_y.T, x, out=grad_weight)

    return run


def attention(heads: int, positions: int, head_dim: int) -> Pass:
    """The scores and the sum of values of all sequences and heads, and their gradients, over half of the keys."""
    keys = max(1, positions // 2)
    q, out = torch.randn(heads, positions, head_dim), torch.empty(heads, positions, head_dim)
    k, v, grad_k = (torch.randn(heads, keys, head_dim) for _ in range(3))
    scores, grad_scores = torch.empty(heads, positions, keys), torch.empty(heads, positions, keys)

    def run() -> None:
        torch.bmm(q, k.mT, out=scores)
        torch.bmm(scores, v, out=out)
        torch.bmm(scores.mT, q, out=grad_k)  # of the values
        torch.bmm(q, v.mT, out=grad_scores)
        torch.bmm(grad_scores, k, out=out)  # of the queries
        torch.bmm(grad_scores.mT, q, out=grad_k)

    return run
