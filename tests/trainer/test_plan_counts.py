"""`twohop plan`: bytes that engines hold and operations of passes, against real ones; the peak is in tests/scripts."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_distributed
from tests.tiny import tiny_config, write_corpus
from twohop.comm import Topology, build_dispatcher
from twohop.models import ModelConfig, MoEConfig, build_model, grouped, init_weights
from twohop.models.config import EncoderConfig, ModelKind, Residual, RouterConfig, VisionConfig
from twohop.trainer.config import Precision, Recompute
from twohop.trainer.engines import build_engine
from twohop.trainer.optimizers.optim import materialize_state
from twohop.trainer.plan.holding import WIDTHS, Holder
from twohop.trainer.plan.passes import passes
from twohop.trainer.plan.shape import model_shape
from twohop.trainer.transforms.recompute import recompute_activations

SMALL = ModelConfig(
    vocab_size=64, max_seq_len=64, dim=32, num_layers=4, num_heads=2, ffn_dim=48,
    moe=MoEConfig(experts=[4, 8], residual=Residual.sum, router=RouterConfig(top_k=2)),
)  # fmt: skip


def local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def bytes_of_engine(directory: Path, engine_name: str, optimizer: str, ep_sizes: list[int]) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and the optimizer's state on this rank."""
    names = (f"engine.name={engine_name}", f"optim.name={optimizer}")
    config = tiny_config(directory, *names, "model.vocab_size=30")
    topology = Topology.discover(ranks_per_node=2)
    layouts = [topology.with_ep(ep_size) for ep_size in ep_sizes]
    model = build_model(config.model, lambda i, experts: build_dispatcher("dedup", layouts[i], experts))
    init_weights(model, 0)
    engine = build_engine(model, config)
    ids_BT = torch.arange(32).view(2, 16) % 30
    engine.backward(engine.model(ids_BT).logits.square().mean(), True)
    parameters = list(engine.model.parameters())
    gradients = sum(local_bytes(p.grad if p.grad is not None else p) for p in parameters)
    materialize_state(engine.optimizer)
    state = [value for values in engine.optimizer.state.values() for value in values.values()]
    return sum(map(local_bytes, parameters)), gradients, sum(map(local_bytes, state))


@pytest.mark.parametrize(("engine", "optimizer"), [("ddp", "adamw"), ("ddp", "muon"), ("fsdp", "adamw")])
def test_bytes_of_parameters_gradients_and_moments_are_those_of_the_engine(
    tmp_path: Path, engine: str, optimizer: str
) -> None:
    write_corpus(tmp_path)
    model = tiny_config(tmp_path, "model.vocab_size=30").model
    shape = model_shape(model, 16, None)
    for ep_sizes in ([2, 4], [1, 2]):
        held = run_distributed(bytes_of_engine, 4, tmp_path, engine, optimizer, ep_sizes)
        holder = Holder(shape, engine, tuple(ep_sizes), 4, Precision.fp32, optimizer)
        expected = (holder.weights, WIDTHS[Precision.fp32][1] * holder.shared, holder.moments)
        assert held[0] == expected, ep_sizes  # rank 0 has the largest share
        assert all(a <= b for rank in held for a, b in zip(rank, held[0], strict=True))


AGAIN = (Recompute.networks, Recompute.full)  # attention and experts are computed again


def operations_of_a_pass(mode: Recompute) -> float:
    """Of one sequence, forward and backward, counted by torch while a real model computes."""
    model = build_model(SMALL)
    init_weights(model, 0)
    recompute_activations(model.train(), mode)
    ids_BT = torch.arange(64).view(1, 64) % SMALL.vocab_size
    # Matrix by matrix, since torch does not count grouped products; it does not count attention on a CPU either.
    with patch.object(grouped, "_grouped_mm_is_defined", lambda *_: False), FlopCounterMode(display=False) as counter:
        model(ids_BT).logits.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", Recompute)
def test_operations_are_those_of_a_real_pass(mode: Recompute) -> None:
    counted = passes(SMALL, 64, None, Precision.fp32, mode)
    rows = 64 * 2
    attention = 2 * 2 * SMALL.num_layers * 64 * 64 * SMALL.dim * (2 if mode in AGAIN else 1)
    assert counted.operations + sum(counted.expert_operations) - attention == operations_of_a_pass(mode)
    up_and_down = 2 * 2 * rows * SMALL.dim * SMALL.ffn_dim
    assert counted.expert_operations == (up_and_down * (3 if mode in AGAIN else 2),) * 2
    travels = 2 if mode is Recompute.full else 1
    assert counted.dispatched == (travels, travels)
    assert counted.combined == (1, 1)


PAIR = replace(
    SMALL, kind=ModelKind.encoder_decoder, moe=replace(SMALL.moe, residual=Residual.none),
    encoder=EncoderConfig(num_layers=3, moe=MoEConfig(experts=[4], every=3, router=RouterConfig(top_k=1))),
)  # fmt: skip
IMAGES = ModelConfig(
    kind=ModelKind.vit, vocab_size=10, dim=32, num_layers=2, num_heads=2, ffn_dim=48, vision=VisionConfig(),
    moe=MoEConfig(experts=[4], router=RouterConfig(name="noisy", top_k=2)),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["pair", "images"])
def test_operations_of_pairs_and_images_are_those_of_a_real_pass(kind: str) -> None:
    """And both what a formula says, in which attention takes part."""
    sources, targets = 24, 16
    if kind == "pair":
        config, lengths = PAIR, (targets, sources)
        inputs = (torch.zeros(1, sources, dtype=torch.int64), torch.tensor([sources]), torch.arange(targets)[None])
        pairs = 3 * sources**2 + 4 * (targets**2 + targets * sources)
        rows = (1 * sources, 2 * targets, 2 * targets)  # the encoder's router has K 1
    else:
        config, lengths, inputs = IMAGES, (16, None), (torch.zeros(1, 1, 8, 8),)
        pairs, rows = 2 * 16**2, (2 * 16,)
    counted = passes(config, *lengths, Precision.fp32, Recompute.none)
    model = build_model(config)
    init_weights(model, 0)
    with patch.object(grouped, "_grouped_mm_is_defined", lambda *_: False), FlopCounterMode(display=False) as counter:
        model.train()(*inputs).logits.square().sum().backward()
    assert counted.expert_operations == tuple(4 * 2 * n * config.dim * config.ffn_dim for n in rows)
    attention, real = 2 * 2 * pairs * config.dim, counter.get_total_flops()
    assert counted.operations - attention + sum(counted.expert_operations) == real
    of_pixels = 2 * 16 * 4 * config.dim if kind == "images" else 0  # which need no gradients
    assert model_shape(config, *lengths).sequence_flops == real + 3 * attention + of_pixels
