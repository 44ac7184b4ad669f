"""What `gpu.py` measures: layers with the same weights and routing, and the copies and sums of ours by themselves.

Shapes: N tokens, K experts for each token, R = N·K rows at the experts, D width, F hidden width, U = 2F, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from layers import Layer, Sizes, Weights, dense_layer, our_layer, output_and_gradient
from peers import mixtral_block
from torch import Tensor, nn

from twohop.comm import Topology
from twohop.comm.tree import Spread
from twohop.models.feed_forward import activate
from twohop.models.routers import TokenInfo
from twohop.trainer.errors import ConfigError
from twohop.trainer.transforms.fp8 import use_fp8_experts

CHECKED = 512  # tokens that are compared with the reference, in fp32
# Relative to the norm. bf16 rounds to 2^-9 at each of some ten places; e4m3 to 2^-4 at each product's two factors.
BF16_ERROR, FP8_ERROR = 2**-6, 2**-3


class Data(NamedTuple):
    """Tokens in bf16, the gradient of what a layer makes of them, and its weights in fp32, rounded to bf16."""

    x_ND: Tensor
    grad_ND: Tensor
    weights: Weights

    @classmethod
    def make(cls, sizes: Sizes, tokens: int, device: str) -> "Data":
        """The first E columns of a token are its logits, distinct and exact in bf16: all layers route alike."""
        generator = torch.Generator(device).manual_seed(0)
        d, f, e = sizes.dim, sizes.ffn_dim, sizes.num_experts
        x_ND, grad_ND = (torch.randn(tokens, d, device=device, generator=generator) for _ in range(2))
        x_ND[:, :e] = torch.rand(tokens, e, device=device, generator=generator).argsort(1) / 16
        up_EUD, down_EDF = (
            torch.randn(shape, device=device, generator=generator).div_(shape[-1] ** 0.5).bfloat16().float()
            for shape in ((e, 2 * f, d), (e, d, f))
        )
        return cls(x_ND.bfloat16(), grad_ND.bfloat16(), Weights(torch.eye(e, d, device=device), up_EUD, down_EDF))


class Textbook(nn.Module):
    """Sort the copies by expert, a matmul for each expert, and add up."""

    def __init__(self, weights: Weights, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.gate, self.up, self.down = (nn.Parameter(weight.clone()) for weight in weights)

    def forward(self, x_ND: Tensor) -> Tensor:
        weight_NK, id_NK = (x_ND @ self.gate.T).float().softmax(-1).topk(self.sizes.k)
        weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        order_R = id_NK.flatten().argsort(stable=True)
        token_R = order_R // self.sizes.k
        counts = id_NK.flatten().bincount(minlength=self.sizes.num_experts).tolist()
        experts = zip(x_ND[token_R].split(counts), self.up.unbind(0), self.down.unbind(0), strict=True)
        rows_RD = torch.cat([activate(rows @ up.T, self.sizes.activation) @ down.T for rows, up, down in experts])
        weighted_RD = rows_RD * weight_NK.flatten()[order_R].unsqueeze(1).to(rows_RD.dtype)
        return torch.zeros_like(x_ND).index_add(0, token_R, weighted_RD)


def ours(data: Data, sizes: Sizes) -> Layer:
    return our_layer(Topology.one_process(), data.weights, sizes)


def ours_in_fp8(data: Data, sizes: Sizes) -> Layer:
    layer = ours(data, sizes)
    use_fp8_experts(layer.module)  # type: ignore[arg-type]
    return layer


def textbook(data: Data, sizes: Sizes) -> Layer:
    layer = Textbook(data.weights, sizes)
    return Layer(layer, layer)


def transformers(data: Data, sizes: Sizes) -> Layer:
    block = mixtral_block(data.weights, sizes, "grouped_mm")
    return Layer(block, lambda x_ND: block(x_ND.unsqueeze(0)).squeeze(0))


class Side(NamedTuple):
    """A layer of the comparison."""

    build: Callable[[Data, Sizes], Layer]
    error: float = BF16_ERROR


SIDES = {
    "twohop": Side(ours),
    "transformers, grouped_mm": Side(transformers),
    "textbook": Side(textbook),
    "twohop, fp8 experts": Side(ours_in_fp8, FP8_ERROR),
}


def checked_layers(data: Data, sizes: Sizes) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers, in bf16, that give what the reference gives; and why others are skipped. AssertionError if wrong."""
    x_ND, grad_ND = data.x_ND[:CHECKED], data.grad_ND[:CHECKED]
    expected = output_and_gradient(dense_layer(data.weights, sizes), x_ND.float(), grad_ND.float())
    layers, skipped = {}, {}
    for name, side in SIDES.items():
        try:
            with torch.device(x_ND.device):
                layer = side.build(data, sizes)
        except (ImportError, ConfigError) as error:
            skipped[name] = str(error)
            continue
        layer.module.bfloat16()
        for what, actual, wanted in zip(
            ("output", "gradient"), output_and_gradient(layer, x_ND, grad_ND), expected, strict=True
        ):
            error = ((actual.float() - wanted).norm() / wanted.norm()).item()
            assert error < side.error, f"{name}: {what} off by {error:.3%} of its norm, {side.error:.3%} allowed"
        layers[name] = layer
    return layers, skipped


class Moves:
    """The copies and sums between tokens and experts of one layer, those of torch beside."""

    def __init__(self, layer: Layer, data: Data) -> None:
        self.x_ND, (n, self.d) = data.x_ND, data.x_ND.shape
        planned, _ = layer.module.plan(self.x_ND, TokenInfo(1))
        (chunk,) = planned.plan.chunks
        self.spread: Spread = chunk.to_experts
        (self.bag,) = self.spread.bags
        self.place_NK = self.bag.children_C.view(n, -1)
        self.weight_R = planned.plan.weight_n.detach()
        self.rows_RD = self.spread.down(self.x_ND)

    def ours(self) -> dict[str, tuple[Callable[[], object], int]]:
        """Each with the bytes that it must read and write."""
        n, r, row = len(self.x_ND), len(self.rows_RD), 2 * self.d
        backward = self.spread.weighted_down
        return {
            "spread": (lambda: self.spread.down(self.x_ND), (n + r) * row),
            "sum": (lambda: self.spread.up(self.rows_RD), (n + r) * row),
            "weighted sum": (lambda: self.spread.up(self.rows_RD, self.weight_R), (n + r) * row),
            "its backward": (lambda: backward(self.x_ND, self.rows_RD, self.weight_R), (n + 2 * r) * row),
        }

    def torchs(self) -> dict[str, tuple[Callable[[], object], int]]:
        """Two of the same with torch's own functions."""
        ours = self.ours()
        return {
            "torch: index_select": (self.copies, ours["spread"][1]),
            "torch: index_add in fp32": (self.added, ours["weighted sum"][1]),
        }

    def copies(self) -> Tensor:
        return self.x_ND.index_select(0, self.spread.gather_C)

    def added(self) -> Tensor:
        weight_R1 = torch.empty_like(self.weight_R).index_copy_(0, self.bag.children_C, self.weight_R).unsqueeze(1)
        total_ND = torch.zeros_like(self.x_ND, dtype=torch.float32)
        return total_ND.index_add_(0, self.spread.gather_C, self.rows_RD * weight_R1).to(self.x_ND.dtype)

    def check(self) -> None:
        """To the bit: copies, and sums in fp32 of one product after the other."""
        assert torch.equal(self.rows_RD, self.copies()), "spread: other copies than index_select makes"
        for name, weight_NK in (("sum", None), ("weighted sum", self.weight_R.view_as(self.place_NK))):
            total_ND = torch.zeros_like(self.x_ND, dtype=torch.float32)
            for k, place_N in enumerate(self.place_NK.unbind(1)):
                row_ND = self.rows_RD[place_N].float()
                total_ND += row_ND if weight_NK is None else row_ND * weight_NK[:, k : k + 1]
            weight_R = None if weight_NK is None else self.weight_R
            same = torch.equal(self.spread.up(self.rows_RD, weight_R, torch.float32), total_ND)
            assert same, f"{name}: other bits than one addition after the other"
