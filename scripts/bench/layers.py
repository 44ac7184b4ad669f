"""A whole MoE layer, DeepSpeed's and ours: the same router, the same experts, the same tokens, nothing dropped.

Unlike the other rows of the benchmark these include gating and real experts: two matrices, GELU between them.
Shapes: N tokens of a rank, D width, F hidden width of an expert, E experts (of the layer, or of this rank).
"""

import contextlib
import io
import logging
import os
from typing import NamedTuple

import torch
from common import DIM, NUM_EXPERTS, Data, Forward
from torch import nn

from twohop.comm import Topology, TrafficMeter, build_dispatcher
from twohop.models.config import ModelConfig, MoEConfig, RouterConfig
from twohop.models.moe import MoELayer


class Weights(NamedTuple):
    """Of the whole layer, the same on every rank."""

    router_ED: torch.Tensor
    up_EFD: torch.Tensor
    down_EDF: torch.Tensor

    @classmethod
    def make(cls, ffn_dim: int) -> "Weights":
        generator = torch.Generator().manual_seed(11)
        shapes = (NUM_EXPERTS, DIM), (NUM_EXPERTS, ffn_dim, DIM), (NUM_EXPERTS, DIM, ffn_dim)
        return cls(*(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes))


def dense_layer(weights: Weights, k: int) -> Forward:
    """The reference: every expert on every token."""

    def forward(x_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        probs_NE = (x_ND @ weights.router_ED.T).softmax(-1)
        kept_NE = torch.zeros_like(probs_NE).scatter(1, probs_NE.topk(k).indices, 1.0) * probs_NE
        mixed_NE = kept_NE / kept_NE.sum(-1, keepdim=True)
        y_ND = torch.zeros_like(x_ND)
        for e, (up_FD, down_DF) in enumerate(zip(weights.up_EFD, weights.down_EDF, strict=True)):
            y_ND = y_ND + mixed_NE[:, e : e + 1] * (nn.functional.gelu(x_ND @ up_FD.T) @ down_DF.T)
        return y_ND

    return forward


def our_layer(name: str, chunks: int, topology: Topology, weights: Weights, k: int, meter: TrafficMeter) -> Forward:
    dispatcher = build_dispatcher(name, topology, NUM_EXPERTS, chunks=chunks, meter=meter)
    moe = MoEConfig(router=RouterConfig(top_k=k, renormalize=True))
    layer = MoELayer(ModelConfig(dim=DIM, ffn_dim=weights.up_EFD.shape[1], moe=moe), dispatcher)
    local = slice(dispatcher.first_expert, dispatcher.first_expert + dispatcher.num_local_experts)
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.router_ED)
        layer.experts.up.copy_(weights.up_EFD[local])
        layer.experts.down.copy_(weights.down_EDF[local])
    return lambda x_ND, ids_NK, weights_NK: layer(x_ND.unsqueeze(0))[0].squeeze(0)  # it routes by itself


def deepspeed_layer(topology: Topology, weights: Weights, k: int) -> Forward:
    """DeepSpeed's MoE with all copies kept. Raises ImportError where it is not installed. Collective."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        import deepspeed
        from deepspeed.moe.layer import MoE

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for a minute
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        ffn_dim = weights.up_EFD.shape[1]
        expert = nn.Sequential(nn.Linear(DIM, ffn_dim, bias=False), nn.GELU(), nn.Linear(ffn_dim, DIM, bias=False))
        layer = MoE(
            hidden_size=DIM,
            expert=expert,
            num_experts=NUM_EXPERTS,
            ep_size=topology.ep_size,
            k=k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        layer.set_deepspeed_parallelism()
    first = topology.ep_rank * layer.num_local_experts
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(weights.router_ED)
        for e, network in enumerate(layer.deepspeed_moe.experts.deepspeed_experts, start=first):
            network[0].weight.copy_(weights.up_EFD[e])
            network[2].weight.copy_(weights.down_EDF[e])
    return lambda x_ND, ids_NK, weights_NK: layer(x_ND)[0]


def output_and_gradient(layer: Forward, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer makes of the tokens, and the gradient of its input."""
    x_ND = data.x_ND.clone().requires_grad_()
    y_ND = layer(x_ND, data.ids_NK, data.weights_NK)
    (grad_ND,) = torch.autograd.grad(y_ND, x_ND, data.grad_ND)
    return y_ND.detach(), grad_ND
