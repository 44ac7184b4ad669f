"""Parameter groups: what decays, what learns at the experts' rate, and state that exists before the first step."""

from pathlib import Path

import torch

from tests.tiny import tiny_config
from twohop.models import Transformer, build_model, expert_parameters, init_weights
from twohop.trainer.optimizers.optim import build_optimizer, materialize_state, set_learning_rate


def make(directory: Path, *overrides: str) -> tuple[Transformer, torch.optim.Optimizer]:
    config = tiny_config(directory, "model.vocab_size=32", "optim.weight_decay=0.25", "optim.lr=0.02", *overrides)
    model = build_model(config.model)
    init_weights(model, 0)
    return model, build_optimizer(model, config.optim)


def test_every_parameter_is_in_the_group_it_belongs_to(tmp_path: Path) -> None:
    model, optimizer = make(tmp_path)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups) == len(list(model.parameters()))
    experts = expert_parameters(model)
    assert experts
    for name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        assert group["lr"] == (0.01 if name in experts else 0.02), name
        is_vector = "norm" in name or name.endswith(".bias")
        assert group["weight_decay"] == (0.0 if is_vector else 0.25), name
    assert any(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_experts_are_judged_by_the_shape_of_one(tmp_path: Path) -> None:
    model, _ = make(tmp_path)
    (_, layer), *_ = model.moe_layers()
    bias = torch.nn.Parameter(torch.zeros(4, 16))  # a vector for each of four experts
    layer.experts.bias = bias
    (group,) = (
        group
        for group in build_optimizer(model, tiny_config(tmp_path).optim).param_groups
        if any(parameter is bias for parameter in group["params"])
    )
    assert group["weight_decay"] == 0


def test_the_learning_rate_scales_every_group(tmp_path: Path) -> None:
    _, optimizer = make(tmp_path)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.005, 0.0025}


def test_materialising_creates_the_state_and_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = make(tmp_path)
    before = [parameter.clone() for parameter in model.parameters()]
    materialize_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter in model.parameters():
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
        assert not optimizer.state[parameter]["exp_avg"].any()
    optimizer.state[next(model.parameters())]["exp_avg"].fill_(7)
    materialize_state(optimizer)  # what exists is kept
    assert optimizer.state[next(model.parameters())]["exp_avg"].mean() == 7


def test_fused_and_foreach_are_the_same_optimizer(tmp_path: Path) -> None:
    weights = []
    for fused in ("true", "false"):
        model, optimizer = make(tmp_path, f"optim.fused={fused}", "optim.eps=1e-3")
        assert all(group["fused"] is (fused == "true") for group in optimizer.param_groups)
        for step in range(3):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        weights.append(list(model.parameters()))
    # The same formula, with some ten roundings of 2^-24 in another order; updates are 0.02 at most.
    for fused_one, foreach_one in zip(*weights, strict=True):
        torch.testing.assert_close(fused_one, foreach_one, rtol=1e-6, atol=1e-7)
