"""A dense model and what is upcycled from it, in one process and on ranks."""

import torch

from twohop.comm import Topology, build_dispatcher
from twohop.models import ModelConfig, MoEConfig, MoEModel, build_model, init_weights
from twohop.models.config import Activation
from twohop.models.upcycle import upcycle


def config(moe: MoEConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=50, max_seq_len=32, dim=32, num_layers=4, num_heads=4, ffn_dim=48, init_std=0.2,
        activation=Activation.swiglu, moe=moe,
    )  # fmt: skip


def ids() -> torch.Tensor:
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


def dense_model() -> MoEModel:
    model = build_model(config(MoEConfig()))
    init_weights(model, seed=0)
    return model


def upcycled(moe: MoEConfig, ep_size: int | None = None) -> MoEModel:
    make = None
    if ep_size is not None:
        topology = Topology.discover(ranks_per_node=2, ep_size=ep_size)
        make = lambda i, experts: build_dispatcher("dedup", topology, experts)  # noqa: E731
    model = build_model(config(moe), make)
    init_weights(model, seed=1)
    upcycle(model, dense_model())
    return model


def upcycled_logits(moe: MoEConfig) -> torch.Tensor:
    with torch.no_grad():
        return upcycled(moe, ep_size=4)(ids()).logits
