"""From a dense model to one with experts that computes the same at first (Komatsuzaki 2022, Sparse Upcycling).

Shapes: E experts of the layer, K experts for each token, N tokens, D model width.
"""

import torch
from torch import nn

from twohop.models.base import MoEModel
from twohop.models.config import ModelConfig, Residual
from twohop.models.moe import MoELayer
from twohop.models.routers import TokenInfo

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
    for key in ("capacity_factor", "eval_capacity_factor"):
        if getattr(moe, key) is not None:
            raise ValueError(
                f"model.moe.{key}={getattr(moe, key)}: a dropped token would miss its MLP; begin with {key}=null"
            )


@torch.no_grad()
def upcycle(model: MoEModel, dense: MoEModel) -> None:
    """Fill an initialised `model` from a dense one of the same blocks: each expert becomes a copy of the block's MLP.

    Routers keep their random weights. A shared expert, and the MLP of a `sum` residual, start with an output of 0;
    the MLP of a `learned` residual is another copy. So the logits are the dense model's up to rounding. Needs no
    other rank; every rank calls it for its own experts.

    Raises:
        ValueError: a router's weights for a token do not add up to 1, so that the models would differ.
    """
    source = dense.state_dict()
    layers = dict(model.moe_layers())
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in layers):
            tensor.copy_(source[name])
    for name, layer in layers.items():
        mlp = name.removesuffix("moe") + "mlp"
        layer.experts.up.copy_(source[f"{mlp}.up.weight"])
        layer.experts.down.copy_(source[f"{mlp}.down.weight"])
        if layer.shared is not None:
            layer.shared.down.weight.zero_()
        if layer.residual is not None:
            copy_mlp(layer.residual.mlp, source, mlp)
            if layer.config.residual is Residual.sum:
                layer.residual.mlp.down.weight.zero_()
        _check_weights(layer, model.config)


def copy_mlp(mlp: nn.Module, source: dict[str, torch.Tensor], name: str) -> None:
    """Copy the parameters `name`.* of `source` into `mlp`."""
    for part, tensor in mlp.state_dict().items():
        tensor.copy_(source[f"{name}.{part}"])


def _check_weights(layer: MoELayer, config: ModelConfig) -> None:
    """What all experts agree on is multiplied by the sum of a token's weights, which must therefore be 1."""
    router = layer.router
    device, generator = layer.experts.up.device, torch.Generator().manual_seed(0)
    x_ND = torch.randn(PROBES, config.dim, generator=generator).to(device)
    token_BT = torch.randint(config.vocab_size or 1, (1, PROBES), generator=generator).to(device)
    zero_B = torch.zeros(1, dtype=torch.int64, device=device)
    routing = router.eval()(x_ND, TokenInfo(1, token_BT=token_BT, task_B=zero_B, sample_B=zero_B))
    router.train(layer.training)
    sums_N = (routing.weights_NK * (routing.ids_NK >= 0)).sum(-1)
    if (sums_N - 1).abs().max() > 1e-4:
        raise ValueError(
            f"model.moe.router.name={layer.config.router.name}: the weights of a token add up to "
            f"{sums_N.min():.3f} … {sums_N.max():.3f} and not to 1, so the first loss would not be the dense model's: "
            "use softmax_topk with model.moe.router.renormalize=true, or topk_softmax"
        )
