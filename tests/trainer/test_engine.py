"""Engines against one process with plain autograd and torch's own AdamW, in fp64: norm, clipping and weights.

Every engine is held to the same tests. DeepSpeed reduces and updates in fp32 only, hence its wider tolerance.
"""

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.tiny import ENGINES, tiny_config, write_corpus
from twohop.comm import Topology, build_dispatcher
from twohop.models import Transformer, build_model, expert_parameters, init_weights
from twohop.trainer.config import Config, Precision
from twohop.trainer.engines import ENGINES as REGISTERED
from twohop.trainer.engines import Engine, build_engine
from twohop.trainer.engines import ddp as ddp_module
from twohop.trainer.world import rank, world_size

MICRO_BATCHES = 4
STEPS = 3
ALL_TO_EXPERT_0 = "all to expert 0"
LAYOUTS = [
    (1, [1, 1], "0.05", "learned"),
    (2, [2, 2], "inf", "learned"),
    (4, [1, 1], "0.05", "learned"),
    (4, [2, 4], "0.05", "learned"),
    (4, [4, 1], "1000", "learned"),  # larger than the norm: nothing is clipped
    (4, [4, 2], "0.05", ALL_TO_EXPERT_0),  # most ranks' experts get no token and no gradient
]
# Each stage of ZeRO clips with EP sizes that differ; other layouts are in the end-to-end tests.
OF_ZERO = {"zero-0": (3,), "zero-1": (2, 5), "zero-2": (0, 4, 5)}
CASES = [(engine, *LAYOUTS[i]) for engine in sorted(ENGINES) for i in OF_ZERO.get(engine, range(len(LAYOUTS)))]


def batch(step: int, index: int) -> Tensor:
    """ids [2, 17] of one micro-batch."""
    return torch.randint(32, (2, 17), generator=torch.Generator().manual_seed(100 * step + index))


def loss_of(model: Transformer, ids_BT1: Tensor) -> Tensor:
    output = model(ids_BT1[:, :-1])
    cross_entropy = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), ids_BT1[:, 1:].flatten())
    return (cross_entropy + sum(loss for stats in output.moe for loss in stats.losses.values())) / MICRO_BATCHES


def prepare(model: Transformer, routing: str, dtype: torch.dtype = torch.float64) -> None:
    init_weights(model, 1)
    model.to(dtype)
    if routing == ALL_TO_EXPERT_0:  # zero logits: top-k takes the first experts, and all others get no token
        for _, layer in model.moe_layers():
            torch.nn.init.zeros_(layer.router.gate.weight)


def reference(
    directory: Path, clip_norm: str, routing: str, *more: str, bf16: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms and last weights of one process: in fp64, or by autocast over fp32."""
    config = tiny_config(directory, *overrides(clip_norm), *more)
    model = build_model(config.model)
    prepare(model, routing, torch.float32 if bf16 else torch.float64)
    experts = expert_parameters(model)
    groups = [
        {
            "params": [parameter],
            "lr": config.optim.lr * (config.optim.expert_lr_scale if name in experts else 1),
            "weight_decay": 0.0 if parameter.dim() == 1 else config.optim.weight_decay,
        }
        for name, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=config.optim.eps, foreach=False)
    norms = []
    for step in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for index in range(MICRO_BATCHES):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model, batch(step, index))
            loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float(clip_norm))))
        optimizer.step()
    return norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def overrides(clip_norm: str) -> list[str]:
    # Jitter draws from a generator that one process and four use differently; the end-to-end tests have it.
    return [
        "model.vocab_size=32",
        "model.moe.router.jitter=0",
        f"optim.clip_norm={clip_norm if clip_norm != 'inf' else 'null'}",
        "optim.eps=1e-3",  # so that an update depends on the size of the gradient, which plain Adam forgets
    ]


def trained(
    directory: Path, engine_name: str, ep_sizes: list[int], clip_norm: str, routing: str, *more: str
) -> tuple[list[float], Engine]:
    """Gradient norms of some steps, and the engine after them."""
    config = tiny_config(directory, *ENGINES[engine_name], *overrides(clip_norm), *more)
    topology = Topology.discover()
    topologies = [topology.with_ep(ep_size) for ep_size in ep_sizes]
    model = build_model(config.model, lambda i, experts: build_dispatcher("dedup", topologies[i], experts))
    is_fp32 = engine_name in OF_ZERO or config.engine.precision is Precision.bf16
    prepare(model, routing, torch.float32 if is_fp32 else torch.float64)
    with patch.object(ddp_module, "BUCKET_BYTES", 4096):  # several buckets for each group
        engine = build_engine(model, config)
    norms = []
    for step in range(STEPS):
        for index in range(rank(), MICRO_BATCHES, world_size()):
            with engine.autocast():
                loss = loss_of(engine.model, batch(step, index))
            engine.backward(loss, index + world_size() >= MICRO_BATCHES)
        norms.append(engine.step(1.0))
    return norms, engine


def train(*args: Any) -> tuple:
    """Gradient norms and last weights, those of experts with the number of the first."""
    norms, engine = trained(*args)
    experts = expert_parameters(engine.model)
    firsts = {name: layer.dispatcher.first_expert for name, layer in experts.items()}
    weights = {name: (firsts.get(name), whole(p.detach())) for name, p in engine.model.named_parameters()}
    return norms, weights


def moments(directory: Path, engine_name: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What a checkpoint would hold of the optimizer, and how many bytes of it this rank keeps in memory."""
    _, engine = trained(directory, engine_name, [2, 4], "0.05", "learned")
    state = {name: tensor.detach() for name, tensor in engine.optimizer_state().items()}
    shares = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    kept = {name: share.untyped_storage().nbytes() for name, share in shares.items()}
    return {name: whole(tensor) for name, tensor in state.items()}, kept


def lopsided(directory: Path, engine_name: str) -> float:
    """The gradient norm of a step in which rank 1 has a gradient of the embedding alone, and that is 0."""
    config = tiny_config(directory, *ENGINES[engine_name], *overrides("inf"))
    topology = Topology.discover().with_ep(1)
    model = build_model(config.model, lambda i, experts: build_dispatcher("dedup", topology, experts))
    prepare(model, "learned", torch.float32)
    engine = build_engine(model, config)
    loss = loss_of(engine.model, batch(0, 0))
    if rank() == 1:
        loss = 0 * next(engine.model.parameters()).sum()
    engine.backward(loss, True)
    return engine.step(1.0)


def whole(parameter: Tensor) -> Tensor:
    """What a rank works with: FSDP keeps shares. Collective."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def test_all_engines_are_tested() -> None:
    config = [override for overrides in ENGINES.values() for override in overrides]
    assert {f"engine.name={name}" for name in REGISTERED} == {text for text in config if text.startswith("engine.name")}


@pytest.mark.parametrize(("engine", "nproc", "ep_sizes", "clip_norm", "routing"), CASES)
def test_norm_clipping_and_weights_are_those_of_one_process(
    tmp_path: Path, engine: str, nproc: int, ep_sizes: list[int], clip_norm: str, routing: str
) -> None:
    write_corpus(tmp_path)
    expected_norms, expected = reference(tmp_path, clip_norm, routing)
    # In fp32 (24 bits) a gradient is a sum over some 100 products at some 10 depths, off by 2^-24 · 10 · √100 < 1e-5 of
    # its size; an update moves a weight by lr · g / (|g| + eps) < 3e-3, and rounds a weight of about 1 three times.
    rel, rtol, atol = (1e-5, 1e-6, 2e-7) if engine in OF_ZERO else (1e-10, 1e-9, 1e-12)
    for norms, weights in run_distributed(train, nproc, tmp_path, engine, ep_sizes, clip_norm, routing):
        assert norms == pytest.approx(expected_norms, rel=rel)
        for name, (first_expert, ours) in weights.items():
            theirs = expected[name]
            if first_expert is not None:
                theirs = theirs[first_expert : first_expert + len(ours)]
            torch.testing.assert_close(
                ours.double(), theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tmp_path: Path, engine: str) -> None:
    config = tiny_config(tmp_path, *ENGINES[engine], *overrides("inf"))
    model = build_model(config.model)
    init_weights(model, 0)
    built = build_engine(model, config)
    before = [whole(parameter).clone() for parameter in built.model.parameters()]
    built.backward(loss_of(built.model, batch(0, 0)) * float("inf"), True)
    assert not torch.isfinite(torch.tensor(built.step(1.0)))
    assert all(torch.equal(a, whole(b)) for a, b in zip(before, built.model.parameters(), strict=True))

    # Nothing of it is left in the next one, which has a learning rate of 0.
    built.backward(loss_of(built.model, batch(0, 0)), True)
    assert built.step(0.0) == pytest.approx(norm_in_one_process(config), rel=1e-5)
    assert all(torch.equal(a, whole(b)) for a, b in zip(before, built.model.parameters(), strict=True))


def norm_in_one_process(config: Config, seed: int = 0) -> float:
    model = build_model(config.model)
    init_weights(model, seed)
    loss_of(model, batch(0, 0)).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


@pytest.mark.parametrize("engine", ["ddp", "zero-0", "zero-1"])
def test_a_rank_may_have_no_gradient_where_others_have_one(tmp_path: Path, engine: str) -> None:
    """As of a router whose plan it follows again."""
    write_corpus(tmp_path)
    expected = norm_in_one_process(tiny_config(tmp_path, *overrides("inf")), seed=1)
    assert run_distributed(lopsided, 2, tmp_path, engine) == pytest.approx([expected] * 2, rel=1e-5)


def test_moments_are_the_same_whoever_holds_them(tmp_path: Path) -> None:
    """Of experts, too, in the order of their numbers. ZeRO keeps a fourth of these and no view of more."""
    write_corpus(tmp_path)
    (expected, _), *_ = run_distributed(moments, 4, tmp_path, "ddp")
    for engine in ("fsdp", "zero-2"):
        for found, kept in run_distributed(moments, 4, tmp_path, engine):
            assert found.keys() == expected.keys()
            for name, theirs in expected.items():
                ours = found[name].double()
                assert ours.shape == theirs.shape
                if engine == "zero-2" and ".experts." in name and ours.dim():
                    assert kept[name] == found[name].nbytes / 4
                # A gradient in fp32 is off by 1e-5 of its size, as above, and its square by twice that.
                assert torch.linalg.vector_norm(ours - theirs) <= 1e-4 * torch.linalg.vector_norm(theirs.double()), name


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_bf16_is_autocast_over_fp32_parameters(tmp_path: Path, engine: str) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        config = tiny_config(tmp_path, *ENGINES[engine], f"engine.precision={precision}", *overrides("1.0"))
        model = build_model(config.model)
        init_weights(model, 0)
        built = build_engine(model, config)
        with built.autocast():
            logits = built.model(batch(0, 0)[:, :-1]).logits
            loss = loss_of(built.model, batch(0, 0))
        built.backward(loss, True)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in built.model.parameters() if p.grad is not None)
        assert logits.dtype is (torch.bfloat16 if precision == "bf16" else torch.float32)
        losses[precision] = loss.item()
    # bf16 keeps 8 bits: a relative error of 2^-9 for each rounding, some dozens of them in a row
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero-1", "zero-2"])
def test_bf16_stays_near_full_precision_over_steps(tmp_path: Path, engine: str) -> None:
    """And a small learning rate moves the weights as it should: they, and sums of their gradients, are fp32."""
    more = ("optim.lr=2e-4", "engine.precision=bf16")
    write_corpus(tmp_path)
    start = build_model(tiny_config(tmp_path, *overrides("0.05")).model)
    prepare(start, "learned")
    exact_norms, exact = reference(tmp_path, "0.05", "learned", *more)
    rounded_norms, _ = reference(tmp_path, "0.05", "learned", *more, bf16=True)
    # Some 50 roundings in a row, each by 2^-9 at most, either way: 2^-9 · √50 < 2^-6. An update divides one average of
    # gradients by the root of another, which is off by as much, and a parameter may have twice the mean error.
    for norms, weights in run_distributed(train, 2, tmp_path, engine, [1, 1], "0.05", "learned", *more):
        assert norms == pytest.approx(exact_norms, rel=2**-6)
        assert norms != pytest.approx(exact_norms, rel=1e-5)
        if engine != "fsdp":  # it rounds a micro-batch's gradients to bf16, in which the weights are gathered
            assert norms[0] == pytest.approx(rounded_norms[0], rel=1e-5)
        for name, (_, ours) in weights.items():
            way = exact[name] - start.get_parameter(name)
            off = torch.linalg.vector_norm(ours.double() - exact[name])
            assert off <= 2**-4 * torch.linalg.vector_norm(way), name


def fsdp_in_bf16(directory: Path) -> tuple[set[torch.dtype], set[torch.dtype], bool]:
    """dtypes of a router's and of a dense network's weights in a pass; whether summed gradients are bf16 numbers."""
    config = tiny_config(directory, *ENGINES["fsdp"], "engine.precision=bf16", *overrides("inf"))
    topology = Topology.discover().with_ep(1)
    model = build_model(config.model, lambda i, experts: build_dispatcher("dedup", topology, experts))
    prepare(model, "learned", torch.float32)
    engine = build_engine(model, config)
    seen: tuple[set[torch.dtype], set[torch.dtype]] = set(), set()
    for _, layer in engine.model.moe_layers():
        for module, dtypes in zip((layer.router, layer.shared), seen, strict=True):
            assert module is not None
            note = lambda module, _, dtypes=dtypes: dtypes.update(p.dtype for p in module.parameters())  # noqa: E731
            module.register_forward_pre_hook(note)
    with engine.autocast(), warnings.catch_warnings(record=True) as told:
        loss = loss_of(engine.model, batch(0, rank()))
    assert told == []  # a user would read it on each rank
    engine.backward(loss, True)
    sums = [p.grad.to_local() for name, p in engine.model.named_parameters() if ".router." not in name]
    return *seen, all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in sums)


def test_fsdp_gathers_routers_and_adds_up_gradients_in_fp32(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    expected = {torch.float32}, {torch.bfloat16}, False
    assert run_distributed(fsdp_in_bf16, 2, tmp_path) == [expected] * 2
