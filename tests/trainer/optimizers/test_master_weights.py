"""bf16 parameters behind fp32 masters: what is rounded, what is not, and that a resumed run has the same bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.tiny import tiny_config, write_corpus
from tests.trainer.checkpoints.test_checkpoint import load_and_step, save_after_two_steps
from tests.trainer.test_engine import batch, loss_of
from twohop.models import build_model, init_weights
from twohop.trainer.engines import build_engine
from twohop.trainer.engines.ddp import DdpEngine
from twohop.trainer.errors import ConfigError
from twohop.trainer.optimizers.optim import build_optimizer
from twohop.trainer.validate.groups import validate

OVERRIDES = ["model.vocab_size=32", "model.moe.router.jitter=0", "optim.clip_norm=null"]


def make(directory: Path, precision: str, *overrides: str) -> DdpEngine:
    config = tiny_config(directory, f"engine.precision={precision}", *OVERRIDES, *overrides)
    model = build_model(config.model)
    init_weights(model, 0)
    engine = build_engine(model, config)
    assert isinstance(engine, DdpEngine)
    return engine


def backward(engine: DdpEngine, step: int) -> Tensor:
    with engine.autocast():
        loss = loss_of(engine.model, batch(step, 0))
    engine.backward(loss, True)
    return loss.detach()


def test_all_but_routers_are_bf16_and_the_model_is_its_rounded_masters(tmp_path: Path) -> None:
    engine = make(tmp_path, "bf16_params")
    fresh = {name: weight.clone() for name, weight in make(tmp_path, "fp32").weights.items()}
    assert all(torch.equal(weight, fresh[name]) for name, weight in engine.weights.items())
    for step in range(3):
        backward(engine, step)
        for name, parameter in engine.model.named_parameters():
            wanted = torch.float32 if ".router." in name else torch.bfloat16
            assert parameter.dtype is wanted, name
            assert parameter.grad is None or parameter.grad.dtype is wanted, name
        engine.step(1.0)
        for name, parameter in engine.model.named_parameters():
            assert parameter.grad is None
            assert torch.equal(parameter, engine.weights[name].to(parameter.dtype)), name
    states = [*engine.model_state().values(), *engine.optimizer_state().values()]
    assert {tensor.dtype for tensor in states if tensor.is_floating_point()} == {torch.float32}


def test_masters_are_what_adamw_makes_of_the_bf16_gradients(tmp_path: Path) -> None:
    engine = make(tmp_path, "bf16_params")
    plain = make(tmp_path, "fp32").model  # holds the weights of a plain fp32 optimizer
    optimizer = build_optimizer(plain, tiny_config(tmp_path, *OVERRIDES).optim)
    for step in range(3):
        backward(engine, step)
        for ours, theirs in zip(engine.model.parameters(), plain.parameters(), strict=True):
            theirs.grad = torch.zeros_like(theirs) if ours.grad is None else ours.grad.float()
        engine.step(1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        optimizer.step()
        for name, weight in engine.weights.items():
            assert torch.equal(weight, plain.get_parameter(name)), name


def test_updates_too_small_for_bf16_add_up(tmp_path: Path) -> None:
    # A norm's weights are 1, whose neighbours in bf16 are 2^-8 and 2^-7 away; AdamW takes steps of the learning rate.
    engine = make(tmp_path, "bf16_params", "optim.lr=6e-4")
    seen = []
    for _ in range(8):
        backward(engine, 0)
        engine.step(1.0)
        seen.append(engine.model.get_parameter("norm.weight").detach().clone())
    assert torch.equal(seen[0], torch.ones_like(seen[0]))
    assert not torch.equal(seen[-1], seen[0])


def test_the_loss_is_that_of_fp32_within_bf16(tmp_path: Path) -> None:
    losses = [backward(make(tmp_path, precision), 0).item() for precision in ("fp32", "bf16_params")]
    # bf16 keeps 8 bits: a relative error of 2^-9 for each rounding, some dozens of them in a row
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, optimizer: str) -> None:
    write_corpus(tmp_path)
    overrides = ["engine.precision=bf16_params", f"optim.name={optimizer}", "comm.ep_size=[2,1]"]
    saved, expected = run_distributed(save_after_two_steps, 2, tmp_path, overrides, init=False)[0]
    for _, _, loaded, record in run_distributed(load_and_step, 2, tmp_path, overrides, init=False):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        assert (record["loss"], record["grad_norm"]) == (expected["loss"], expected["grad_norm"])


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_with_masters_of_their_own_refuse(tmp_path: Path, engine: str) -> None:
    with pytest.raises(ConfigError, match=f"engine={engine} shares out fp32 weights by itself: use engine.precision=b"):
        validate(tiny_config(tmp_path, "engine.precision=bf16_params", f"engine.name={engine}"), 1)
