"""From a dense model to one with experts that computes the same at first (Komatsuzaki 2023, Sparse Upcycling).

Shapes: E experts of the layer, K experts for each token, N tokens, D model width.
"""

import torch
from torch import Tensor

from twohop.models.base import MoEModel
from twohop.models.config import ModelConfig, Residual
from twohop.models.init import assign
from twohop.models.moe import MoELayer
from twohop.models.routers import TokenInfo, build_router

PROBES = 64  # random tokens that show what a router's weights add up to


def check_upcycling(config: ModelConfig) -> None:
    """Raise a ValueError for settings under which a model of copied experts cannot compute what the dense one does."""
    moe = config.moe
    if not config.experts_by_layer:
        raise ValueError("model.moe.experts=[]: say how many experts the layers get, as in model.moe.experts=[8]")
    if moe.ffn_dim not in (None, config.ffn_dim):
        raise ValueError(
            f"model.moe.ffn_dim={moe.ffn_dim}: a copy of the dense MLP has the hidden width {config.ffn_dim}; use null"
        )
    for key in ("capacity_factor", "capacity_bound", "eval_capacity_factor"):
        if getattr(moe, key) is not None:
            raise ValueError(
                f"model.moe.{key}={getattr(moe, key)}: a dropped token would miss its MLP; begin with {key}=null"
            )
    for num_experts in set(config.experts_by_layer):
        _check_weights(config, num_experts)


@torch.no_grad()
def upcycle(model: MoEModel, dense: MoEModel) -> None:
    """Fill an initialised `model` from a dense one of the same blocks: each expert becomes a copy of the block's MLP.

    Routers keep their random weights. A shared expert, and the MLP of a `sum` residual, start with an output of 0;
    the MLP of a `learned` residual is another copy. So the logits are the dense model's up to rounding, for what
    `check_upcycling` lets through. Needs no other rank; every rank calls it for its own experts.
    """
    source = dense.state_dict()
    layers = dict(model.moe_layers())
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in layers):
            assign(tensor, source[name])
    for name, layer in layers.items():
        mlp = name.removesuffix("moe") + "mlp"
        _copy(layer, source[f"{mlp}.up.weight"], source[f"{mlp}.down.weight"])


def _copy(layer: MoELayer, up: Tensor, down: Tensor) -> None:
    for name, matrix in (("up", up), ("down", down)):
        experts = layer.experts.get_parameter(name)
        assign(experts, matrix.expand(experts.shape))
    if layer.shared is not None:
        layer.shared.down.weight.zero_()
    if layer.residual is not None:
        assign(layer.residual.mlp.up.weight, up)
        assign(layer.residual.mlp.down.weight, down)
        if layer.config.residual is Residual.sum:
            layer.residual.mlp.down.weight.zero_()


@torch.no_grad()
def _check_weights(config: ModelConfig, num_experts: int) -> None:
    """What all experts agree on is multiplied by the sum of a token's weights, which must therefore be 1."""
    generator = torch.Generator().manual_seed(0)
    settings, vocab_size = config.moe.router, config.vocab_size or PROBES
    router = build_router(settings, config.dim, num_experts, vocab_size, config.num_tasks).eval()
    for parameter in router.parameters():
        parameter.normal_(0, 0.1, generator=generator)
    router.init_buffers(generator)
    x_ND = torch.randn(PROBES, config.dim, generator=generator)
    token_BT = torch.randint(vocab_size, (1, PROBES), generator=generator)
    zero_B = torch.zeros(1, dtype=torch.int64)
    routing = router(x_ND, TokenInfo(1, token_BT=token_BT, task_B=zero_B, sample_B=zero_B))
    sums_N = (routing.weights_NK * (routing.ids_NK >= 0)).sum(-1)
    if (sums_N - 1).abs().max() > 1e-4:
        raise ValueError(
            f"model.moe.router.name={settings.name}: the weights of a token add up to "
            f"{sums_N.min():.3f} … {sums_N.max():.3f} and not to 1, so the first loss would not be the dense model's: "
            "use softmax_topk with model.moe.router.renormalize=true, or topk_softmax"
        )
