"""Other systems' MoE layers, with the weights that ours has. A peer is one function, and one line in `PEERS`.

Shapes: N tokens of a rank, K experts for each token, R rows at this rank's experts, P ranks, D width, F hidden width,
E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from layers import Layer, Sizes, Weights, deepspeed_layer, start_deepspeed
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from twohop.comm import Topology
from twohop.models.config import Activation
from twohop.models.feed_forward import activate


class Textbook(nn.Module):
    """Forty lines: sort the copies by expert, exchange counts and rows, a matmul for each expert, and back."""

    def __init__(self, topology: Topology, weights: Weights, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.ranks = sizes, topology.ep_size
        self.gate = nn.Parameter(weights.router_ED.clone())
        self.up, self.down = (nn.Parameter(local.clone()) for local in weights.local(topology))

    def forward(self, x_ND: Tensor) -> Tensor:
        weight_NK, id_NK = (x_ND @ self.gate.T).softmax(-1).topk(self.sizes.k)
        weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        order_n = id_NK.flatten().argsort(stable=True)
        send_PE = id_NK.flatten().bincount(minlength=self.sizes.num_experts).view(self.ranks, -1)
        recv_PE = torch.empty_like(send_PE)
        dist.all_to_all_single(recv_PE, send_PE)
        send, recv = send_PE.sum(1).tolist(), recv_PE.sum(1).tolist()

        copies = x_ND[order_n // self.sizes.k]
        rows = all_to_all_single_autograd(copies, recv, send, dist.group.WORLD)
        local = torch.arange(recv_PE.shape[1]).repeat(self.ranks).repeat_interleave(recv_PE.flatten())
        by_expert = local.argsort(stable=True)
        rows = self.experts(rows[by_expert], recv_PE.sum(0).tolist())
        rows = torch.empty_like(rows).index_copy(0, by_expert, rows)
        copies = all_to_all_single_autograd(rows, send, recv, dist.group.WORLD)
        copies = copies * weight_NK.flatten()[order_n].unsqueeze(1)
        return torch.zeros_like(x_ND).index_add(0, order_n // self.sizes.k, copies)

    def experts(self, rows_RD: Tensor, counts_E: list[int]) -> Tensor:
        parts = zip(rows_RD.split(counts_E), self.up.unbind(0), self.down.unbind(0), strict=True)
        return torch.cat([activate(part @ up.T, self.sizes.activation) @ down.T for part, up, down in parts])


def textbook(topology: Topology, weights: Weights, sizes: Sizes) -> Layer:
    layer = Textbook(topology, weights, sizes)
    return Layer(layer, layer)


def mixtral_config(sizes: Sizes, **options: Any) -> Any:
    """transformers' configuration of a model with one such layer."""
    from transformers import MixtralConfig

    return MixtralConfig(
        hidden_size=sizes.dim,
        intermediate_size=sizes.ffn_dim,
        num_local_experts=sizes.num_experts,
        num_experts_per_tok=sizes.k,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
        **options,
    )


def mixtral_block(weights: Weights, sizes: Sizes, experts: str) -> nn.Module:
    """transformers' block with all experts in one process; `experts` names its implementation."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = mixtral_config(sizes, experts_implementation=experts)
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(weights.up_EUD)
        block.experts.down_proj.copy_(weights.down_EDF)
    return block


def mixtral(experts: str) -> Callable[[Topology, Weights, Sizes], Layer]:
    def build(topology: Topology, weights: Weights, sizes: Sizes) -> Layer:
        if topology.ep_size > 1:
            raise NotImplementedError("has no expert parallelism without tensor parallelism")
        block = mixtral_block(weights, sizes, experts)
        return Layer(block, lambda x_ND: block(x_ND.unsqueeze(0)).squeeze(0))

    return build


def autoep(topology: Topology, weights: Weights, sizes: Sizes) -> Layer:
    """DeepSpeed's AutoEP, which takes transformers' blocks and shards their experts. Collective."""
    start_deepspeed()
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM(mixtral_config(sizes, vocab_size=8))
    model.model.layers[0].mlp = mixtral_block(weights, sizes, "eager")
    settings = AutoEPConfig(enabled=True, autoep_size=topology.ep_size, preset_model="mixtral", load_balance_coeff=None)
    (spec,) = AutoEP(model, settings).ep_parser()
    layer = AutoEPMoELayer(spec, model.model.layers[0].mlp, topology.ep_size, topology.ep_rank, settings)
    layer.set_deepspeed_parallelism()

    def forward(x_ND: Tensor) -> Tensor:
        output = layer(x_ND.unsqueeze(0))
        return (output[0] if isinstance(output, tuple) else output).squeeze(0)

    return Layer(layer, forward)


def torchtitan(topology: Topology, weights: Weights, sizes: Sizes) -> Layer:
    """torchtitan's MoE; its experts, which compute in bf16 alone, are made to compute in fp32. Collective."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    class Experts(GroupedExperts):
        def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
            offs = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
            gate_RF, up_RF = (self._grouped_mm(A=x_RD, B_t=w.mT, offs=offs) for w in (self.w1_EFD, self.w3_EFD))
            return self._grouped_mm(A=F.silu(gate_RF) * up_RF, B_t=self.w2_EDF.mT, offs=offs)

    set_spmd_backend("default")  # plain tensors
    e, local = sizes.num_experts, sizes.num_experts // topology.ep_size
    experts = GroupedExperts.Config(dim=sizes.dim, hidden_dim=sizes.ffn_dim, num_experts=local)
    config = MoE.Config(
        num_experts=e,
        routed_experts=RoutedExperts.Config(
            inner_experts=experts, token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=e, top_k=sizes.k)
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=e,
            gate=Linear.Config(in_features=sizes.dim, out_features=e, bias=False),
            top_k=sizes.k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    )
    layer = config.build()
    layer.routed_experts.inner_experts = Experts(experts)
    mesh = dist.device_mesh.init_device_mesh("cpu", (topology.ep_size,), mesh_dim_names=("ep",))
    layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh if topology.ep_size > 1 else None)
    up_EUD, down_EDF = weights.local(topology)
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.router_ED)
        grouped = layer.routed_experts.inner_experts
        for parameter, value in zip(
            (grouped.w1_EFD, grouped.w3_EFD, grouped.w2_EDF), (*up_EUD.chunk(2, 1), down_EDF), strict=True
        ):
            parameter.copy_(value)
    layer.tokens_per_expert_E.zero_()
    return Layer(layer, lambda x_ND: layer(x_ND.unsqueeze(0)).squeeze(0))


class Peer(NamedTuple):
    """How a layer is built, collectively, and with which experts."""

    build: Callable[[Topology, Weights, Sizes], Layer]
    activation: Activation
    renormalizes_one: bool = True  # whether a single expert's weight is 1, and not its probability


PEERS = {
    "textbook": Peer(textbook, Activation.gelu),
    "deepspeed MoE": Peer(deepspeed_layer, Activation.gelu, renormalizes_one=False),
    "textbook, SwiGLU": Peer(textbook, Activation.swiglu),
    "deepspeed AutoEP": Peer(autoep, Activation.swiglu),
    "torchtitan, fp32": Peer(torchtitan, Activation.swiglu),
    "transformers, grouped_mm": Peer(mixtral("grouped_mm"), Activation.swiglu),
    "transformers, eager": Peer(mixtral("eager"), Activation.swiglu),
}
