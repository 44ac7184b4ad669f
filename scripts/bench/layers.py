"""Whole MoE layers, with gating and real experts: a dense reference, ours, and DeepSpeed's `MoE`.

All of a comparison have the same router, the same experts and the same tokens, and drop nothing.
Shapes: N tokens of a rank, K experts for each token, D width, F hidden width of an expert, U width of its first
matrix (F, or 2F for SwiGLU), E experts (of the layer, or of this rank).
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import Forward
from torch import nn

from twohop.comm import Topology, build_dispatcher
from twohop.models.config import Activation, ModelConfig, MoEConfig, RouterConfig
from twohop.models.feed_forward import activate, up_width
from twohop.models.moe import MoELayer
from twohop.models.shadows import Shadows


class Sizes(NamedTuple):
    """Of a layer."""

    dim: int
    ffn_dim: int
    num_experts: int
    k: int
    activation: Activation = Activation.gelu
    capacity_factor: float | None = None  # of the layers that have one; data are such that it drops nothing


class Weights(NamedTuple):
    """Of the whole layer, the same on every rank."""

    router_ED: torch.Tensor
    up_EUD: torch.Tensor
    down_EDF: torch.Tensor

    @classmethod
    def make(cls, sizes: Sizes) -> "Weights":
        e, d, f = sizes.num_experts, sizes.dim, sizes.ffn_dim
        generator = torch.Generator().manual_seed(11)
        shapes = (e, d), (e, up_width(f, sizes.activation), d), (e, d, f)
        return cls(*(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes))

    def local(self, topology: Topology) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices of this rank's experts."""
        return tuple(whole.chunk(topology.ep_size)[topology.ep_rank] for whole in (self.up_EUD, self.down_EDF))


class Layer:
    """A layer as a function of the tokens [N, D], and its module."""

    def __init__(self, module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.module, self._forward = module, forward

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self._forward(x_ND)


def dense_layer(weights: Weights, sizes: Sizes, renormalize: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reference: every expert on every token."""

    def forward(x_ND: torch.Tensor) -> torch.Tensor:
        probs_NE = (x_ND @ weights.router_ED.T).softmax(-1)
        mixed_NE = torch.zeros_like(probs_NE).scatter(1, probs_NE.topk(sizes.k).indices, 1.0) * probs_NE
        if renormalize:
            mixed_NE = mixed_NE / mixed_NE.sum(-1, keepdim=True)
        y_ND = torch.zeros_like(x_ND)
        for e, (up_UD, down_DF) in enumerate(zip(weights.up_EUD, weights.down_EDF, strict=True)):
            y_ND = y_ND + mixed_NE[:, e : e + 1] * (activate(x_ND @ up_UD.T, sizes.activation) @ down_DF.T)
        return y_ND

    return forward


def our_layer(
    topology: Topology,
    weights: Weights,
    sizes: Sizes,
    dispatcher: str = "flat",
    chunks: int = 1,
) -> Layer:
    carrier = build_dispatcher(dispatcher, topology, sizes.num_experts, chunks=chunks)
    moe = MoEConfig(router=RouterConfig(top_k=sizes.k, renormalize=True), capacity_factor=sizes.capacity_factor)
    config = ModelConfig(dim=sizes.dim, ffn_dim=sizes.ffn_dim, activation=sizes.activation, moe=moe)
    layer = MoELayer(config, carrier)
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.router_ED)
        for parameter, local in zip((layer.experts.up, layer.experts.down), weights.local(topology), strict=True):
            parameter.copy_(local)
    return Layer(layer, lambda x_ND: layer(x_ND.unsqueeze(0))[0].squeeze(0))


def layer_with_shadow(topology: Topology, weights: Weights, sizes: Sizes) -> Layer:
    """Ours, with a shadow of expert 0 on every rank. Raises NotImplementedError where one rank has all experts."""
    if topology.ep_size == 1:
        raise NotImplementedError("one rank has all experts")
    layer = our_layer(topology, weights, sizes)
    layer.module.shadows = Shadows((0,), layer.module.dispatcher)
    return layer


def deepspeed_layer(topology: Topology, weights: Weights, sizes: Sizes) -> Layer:
    """DeepSpeed's MoE with all copies kept. Raises ImportError where it is not installed. Collective."""
    if sizes.activation is not Activation.gelu:
        raise ValueError("its experts are any module: GELU stands for all here")
    start_deepspeed()
    from deepspeed.moe.layer import MoE

    up, down = (nn.Linear(*shape, bias=False) for shape in ((sizes.dim, sizes.ffn_dim), (sizes.ffn_dim, sizes.dim)))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        layer = MoE(
            hidden_size=sizes.dim,
            expert=nn.Sequential(up, nn.GELU(), down),
            num_experts=sizes.num_experts,
            ep_size=topology.ep_size,
            k=sizes.k,
            capacity_factor=sizes.capacity_factor or 1.0,
            drop_tokens=sizes.capacity_factor is not None,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(weights.router_ED)
        experts = layer.deepspeed_moe.experts.deepspeed_experts
        for network, up_FD, down_DF in zip(experts, *weights.local(topology), strict=True):
            network[0].weight.copy_(up_FD)
            network[2].weight.copy_(down_DF)
    return Layer(layer, lambda x_ND: layer(x_ND)[0])


def start_deepspeed() -> None:
    """Join it to the process group. Raises ImportError where it is not installed."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for a minute
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def by_tokens(layer: Callable[[torch.Tensor], torch.Tensor]) -> Forward:
    """A layer that routes by itself, as the other rows of the benchmark are called."""
    return lambda x_ND, ids_NK, weights_NK: layer(x_ND)


def output_and_gradient(
    layer: Callable[[torch.Tensor], torch.Tensor], x_ND: torch.Tensor, grad_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer makes of the tokens, and the gradient of its input."""
    x_ND = x_ND.clone().requires_grad_()
    y_ND = layer(x_ND)
    (grad_ND,) = torch.autograd.grad(y_ND, x_ND, grad_ND)
    return y_ND.detach(), grad_ND
