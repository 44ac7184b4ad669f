"""Muon against torch's own, matrix by matrix, against Newton–Schulz in fp64, and across ranks and interruptions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import run_distributed
from tests.tiny import tiny_config, write_corpus
from tests.trainer.checkpoints.test_checkpoint import load_and_step, save_after_two_steps
from tests.trainer.test_engine import batch, loss_of
from twohop.comm import Topology, build_dispatcher
from twohop.models import MoEModel, build_model, expert_parameters, init_weights
from twohop.trainer.engines import build_engine
from twohop.trainer.errors import ConfigError
from twohop.trainer.optimizers.muon import MuonWithAdamW, hidden_matrices
from twohop.trainer.optimizers.optim import build_optimizer, set_learning_rate
from twohop.trainer.validate.groups import validate
from twohop.trainer.world import rank, world_size

OVERRIDES = ["optim.name=muon", "model.vocab_size=32", "model.moe.router.jitter=0", "optim.momentum=0.9"]


def make(directory: Path) -> MoEModel:
    model = build_model(tiny_config(directory, *OVERRIDES).model)
    init_weights(model, 0)
    return model


def test_matrices_are_what_lies_between_embedding_and_head(tmp_path: Path) -> None:
    model = make(tmp_path)
    names = hidden_matrices(model)
    for name, parameter in model.named_parameters():
        expected = name.startswith("blocks.") and parameter.dim() > 1 and ".router." not in name and ".mix." not in name
        assert (name in names) == expected, name
    assert any(".experts." in name for name in names)


def test_every_matrix_is_updated_as_by_torch_alone_and_the_rest_by_adamw(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *OVERRIDES, "optim.weight_decay=0.1")
    ours, theirs = make(tmp_path), make(tmp_path)
    optimizer = build_optimizer(ours, config.optim)
    experts, matrices = expert_parameters(theirs), hidden_matrices(theirs)
    pairs: list[tuple[nn.Parameter, Tensor, torch.optim.Optimizer]] = []
    for name, parameter in theirs.named_parameters():
        lr = config.optim.lr * (config.optim.expert_lr_scale if name in experts else 1) / 2
        if name not in matrices:
            decay = 0.1 if parameter.dim() > 1 else 0.0
            adamw = torch.optim.AdamW([parameter], lr=lr, betas=(0.9, 0.95), weight_decay=decay, foreach=False)
            pairs.append((parameter, parameter, adamw))
            continue
        for matrix in parameter.detach() if parameter.dim() == 3 else [parameter.detach()]:
            own = nn.Parameter(matrix)
            muon = torch.optim.Muon([own], lr=lr, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            pairs.append((own, parameter, muon))
    for step in range(3):
        loss_of(theirs, batch(step, 0)).backward()
        # The same gradients for both: their own would tell of the last bit of an update by AdamW.
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert other.grad is not None
            mine.grad = other.grad.clone()
        for own, parameter, _ in pairs:
            if own is not parameter:
                assert parameter.grad is not None
                offset = own.storage_offset() - parameter.storage_offset()
                own.grad = parameter.grad.flatten()[offset : offset + own.numel()].view_as(own)
        for _, _, one in pairs:
            one.step()
        set_learning_rate(optimizer, 0.5)
        optimizer.step()
        for name, parameter in ours.named_parameters():
            # Fused and single AdamW round differently: 2^-24 for each of some ten operations.
            tolerance = 0.0 if name in matrices else 1e-6
            expected = theirs.get_parameter(name)
            torch.testing.assert_close(parameter, expected, rtol=tolerance, atol=tolerance, msg=name)
        for model in (ours, theirs):
            model.zero_grad()
        optimizer.zero_grad()
    assert isinstance(optimizer, MuonWithAdamW)
    assert all(view.grad is None for views in optimizer.views.values() for view in views)


def newton_schulz(x: Tensor) -> Tensor:
    """Five iterations of x ← a x + b (x xᵀ) x + c (x xᵀ)² x in fp64 (Jordan 2024)."""
    x = x.double() / x.double().norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def test_an_update_is_the_orthogonalised_momentum(tmp_path: Path) -> None:
    model = make(tmp_path)
    optimizer = build_optimizer(model, tiny_config(tmp_path, *OVERRIDES, "optim.weight_decay=0", "optim.lr=1").optim)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.manual_seed(0)
    for name in sorted(hidden_matrices(model)):
        # Singular values of 1 to 2: small ones would be drowned in the noise of torch's bf16 iterations.
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        left, values, right = torch.linalg.svd(torch.randn_like(gradient), full_matrices=False)
        gradient.copy_(left * torch.linspace(1, 2, values.shape[-1]) @ right)
    gradients = {name: model.get_parameter(name).grad for name in hidden_matrices(model)}
    optimizer.step()
    for name, gradient in gradients.items():
        assert gradient is not None
        scale = 0.5 if ".experts." in name else 1.0  # of the learning rate
        change = (model.get_parameter(name) - before[name]).detach() / scale
        shape = (-1, *change.shape[-2:])
        for change_OI, gradient_OI in zip(change.view(shape), gradient.view(shape), strict=True):
            # The first momentum, also Nesterov's, is the gradient times a number, which the iteration forgets.
            expected_OI = -0.2 * max(change_OI.shape) ** 0.5 * newton_schulz(gradient_OI)
            # 5 iterations with 3 products each, rounded to 8 bits, and hardly amplified where values are not small.
            assert (change_OI - expected_OI).norm() < 15 * 2**-9 * expected_OI.norm(), name


def train(directory: Path, ep_sizes: list[int]) -> tuple[list[float], dict[str, tuple[int | None, Tensor]]]:
    config = tiny_config(directory, *OVERRIDES, "optim.clip_norm=0.05")
    topology = Topology.discover()
    model = build_model(config.model, lambda i, n: build_dispatcher("dedup", topology.with_ep(ep_sizes[i]), n))
    init_weights(model, 1)
    engine = build_engine(model.double(), config)
    norms = []
    for step in range(2):
        for index in range(rank(), 4, world_size()):
            engine.backward(loss_of(engine.model, batch(step, index)), index + world_size() >= 4)
        norms.append(engine.step(1.0))
    experts = expert_parameters(model)
    firsts = {name: layer.dispatcher.first_expert for name, layer in experts.items()}
    return norms, {name: (firsts.get(name), p.detach()) for name, p in engine.model.named_parameters()}


def test_ranks_that_share_the_experts_update_them_as_one_process(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    ((expected_norms, expected),) = run_distributed(train, 1, tmp_path, [1, 1])
    for norms, weights in run_distributed(train, 2, tmp_path, [2, 1]):
        # The sum of gradients is that of one process but for its last fp64 bits, which can turn a number of Muon's
        # bf16 arithmetic to its neighbour: 2^-8 of an entry of the update, lr · 0.2 · sqrt(32) · 1.
        assert norms == pytest.approx(expected_norms, rel=1e-3)
        for name, (first, ours) in weights.items():
            theirs = expected[name][1]
            if first is not None:
                theirs = theirs[first : first + len(ours)]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * 3e-3 * 0.2 * 32**0.5 * 2**-8, msg=name)


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    overrides = ["optim.name=muon", "comm.ep_size=2"]
    saved, expected = run_distributed(save_after_two_steps, 2, tmp_path, overrides, init=False)[0]
    momenta = [tensor for name, tensor in saved.items() if name.endswith("experts.up.momentum_buffer")]
    assert all(tensor.dim() == 3 and tensor.any() for tensor in momenta)
    assert momenta
    for _, _, loaded, record in run_distributed(load_and_step, 2, tmp_path, overrides, init=False):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        assert (record["loss"], record["grad_norm"]) == (expected["loss"], expected["grad_norm"])


def test_shares_of_matrices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine=fsdp leaves each rank a part"):
        validate(tiny_config(tmp_path, "optim.name=muon", "engine.name=fsdp"), 1)
    with pytest.raises(ValueError, match=r"optim\.momentum=0\.9 has no use with optim\.name=adamw"):
        tiny_config(tmp_path, "optim.momentum=0.9")
