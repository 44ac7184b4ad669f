"""`twohop plan`: memory against real engines, kept tensors against a real pass, times by hand, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.tiny import tiny_config, write_corpus
from twohop.comm import Topology, build_dispatcher
from twohop.comm.network import Link, Network
from twohop.models import ModelConfig, MoEConfig, build_model, init_weights
from twohop.models.config import Activation, Residual, RouterConfig
from twohop.trainer import cli
from twohop.trainer.config import Precision
from twohop.trainer.config.plan import HardwareConfig, PlanConfig
from twohop.trainer.engines import build_engine
from twohop.trainer.errors import ConfigError
from twohop.trainer.optimizers.optim import materialize_state
from twohop.trainer.plan.activations import activation_bytes, kept_bytes
from twohop.trainer.plan.hardware import GIB
from twohop.trainer.plan.memory import memory_of
from twohop.trainer.plan.search import candidates, search
from twohop.trainer.plan.shape import ModelShape, model_shape
from twohop.trainer.plan.steptime import Timer, gather_s

SMALL = ModelConfig(
    vocab_size=64, max_seq_len=64, dim=32, num_layers=4, num_heads=2, ffn_dim=48,
    moe=MoEConfig(experts=[4, 8], residual=Residual.sum, router=RouterConfig(top_k=2)),
)  # fmt: skip


def local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def bytes_of_engine(directory: Path, engine_name: str, ep_sizes: list[int]) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and the optimizer's state on this rank."""
    config = tiny_config(directory, f"engine.name={engine_name}", "model.vocab_size=30")
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


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_bytes_of_parameters_gradients_and_moments_are_those_of_the_engine(tmp_path: Path, engine: str) -> None:
    write_corpus(tmp_path)
    model = tiny_config(tmp_path, "model.vocab_size=30").model
    shape = model_shape(model, 16, Precision.fp32)
    for ep_sizes in ([2, 4], [1, 2]):
        held = run_distributed(bytes_of_engine, 4, tmp_path, engine, ep_sizes)
        memory = memory_of(shape, engine, ep_sizes, 4, 2, 16, Precision.fp32, False, 0.0)
        expected = (memory.weights, memory.gradients, memory.moments)
        assert held[0] == expected, ep_sizes  # rank 0 has the largest share
        assert all(a <= b for rank in held for a, b in zip(rank, held[0], strict=True))


def bytes_kept_by_a_pass(config: ModelConfig, micro_batch: int, seq_len: int, bf16: bool) -> int:
    model = build_model(config)
    init_weights(model, 0)
    ids_BT = torch.arange(micro_batch * seq_len).view(micro_batch, seq_len) % 64
    with kept_bytes(model) as total, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(ids_BT).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids_BT.flatten())
    return total[0]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_activations_are_those_of_a_real_pass(bf16: bool, swiglu: bool) -> None:
    """But for router losses and the plan's indices, which are counted apart."""
    config = SMALL
    if swiglu:
        moe = MoEConfig(experts=[8], shared_ffn_dim=16, router=RouterConfig(top_k=2, renormalize=True))
        config = ModelConfig(**(vars(SMALL) | {"activation": Activation.swiglu, "num_kv_heads": 1, "moe": moe}))
    # Weights in bf16 do not grow with the micro-batch, and the stand-in has one expert of each layer.
    real, planned = (
        measure(config, 8, 64, bf16) - measure(config, 4, 64, bf16)
        for measure in (bytes_kept_by_a_pass, lambda c, b, t, low: activation_bytes(c, t, b, low))
    )
    assert planned == pytest.approx(real, rel=0.05)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return model_shape(SMALL, 64, Precision.bf16)


def timer_of(shape: ModelShape, cluster: dict[str, Any], **keys: Any) -> Timer:
    return Timer(PlanConfig(model=SMALL, cluster=HardwareConfig(**cluster), **keys), shape)


def test_shape_counts_all_parameters_once(shape: ModelShape) -> None:
    experts = sum(layer.num_experts * layer.expert_size for layer in shape.layers)
    assert shape.total == shape.dense_size + experts == sum(shape.block_sizes) + experts
    assert [layer.num_experts for layer in shape.layers] == [4, 8]


def test_gathering_by_hand() -> None:
    network = Network(Link(1e-9), Link(1e-10), nics=2)
    assert gather_s(network, 1e9, (1, 1), 4) == 0
    assert gather_s(network, 1e9, (1, 4), 4) == pytest.approx(0.75 * 0.1)
    assert gather_s(network, 1e9, (2, 1), 4) == pytest.approx(0.5 * 1 * 2)  # 2 ranks of a card, both of them gather
    assert gather_s(network, 1e9, (2, 4), 4) == pytest.approx(0.75 * 0.1 + 0.5 / 4 * 2)


def test_all_candidates_divide_evenly_and_the_best_is_the_fastest_that_fits(shape: ModelShape) -> None:
    timer = timer_of(shape, {"nodes": 2, "gpus_per_node": 2}, global_batch=16)
    everything = list(candidates(timer))
    assert {c.ep_sizes for c in everything} == {(a, b) for a in (1, 2, 4) for b in (1, 2, 4)}
    assert {(c.micro_batch, c.accumulation) for c in everything} == {(1, 4), (2, 2), (4, 1)}
    found = search(timer)
    assert found.best.step_s == min(c.step_s for c in everything)
    for choice, others in found.others.items():
        assert min(c.step_s for c in others.values() if c is not None) == found.best.step_s, choice


def test_what_does_not_fit_is_not_chosen(shape: ModelShape) -> None:
    cluster = {"nodes": 2, "gpus_per_node": 2}
    everything = list(candidates(timer_of(shape, cluster, global_batch=16)))
    peaks = sorted(c.memory.peak for c in everything)
    limit = peaks[len(peaks) // 3]
    reserve = timer_of(shape, cluster).gpu.memory_gib - limit / GIB
    found = search(timer_of(shape, cluster | {"reserve_gib": reserve}, global_batch=16))
    fitting = [c for c in everything if c.memory.peak <= limit * (1 + 1e-9)]
    assert found.best.step_s == min(c.step_s for c in fitting)
    chosen = [c for others in found.others.values() for c in others.values()]
    assert None in chosen
    assert all(c.memory.peak <= limit * (1 + 1e-9) for c in (found.best, *chosen) if c is not None)
    with pytest.raises(ConfigError, match=r"nothing fits into the 0\.0 GiB of cluster\.gpu=h200: the least is"):
        search(timer_of(shape, cluster | {"reserve_gib": 139.8}, global_batch=16))


def test_a_better_cluster_is_never_slower(shape: ModelShape) -> None:
    def step_s(**cluster: Any) -> float:
        return search(timer_of(shape, {"nodes": 2, "gpus_per_node": 4} | cluster, global_batch=32)).best.step_s

    assert step_s(inter_gbps=800) <= step_s() <= step_s(inter_gbps=100)
    assert step_s(gpu="b200") < step_s() < step_s(gpu="a100")
    assert step_s() <= step_s(nics_per_node=1)
    assert step_s() < step_s(efficiency=0.25)
    assert step_s(latency_us=1) <= step_s() <= step_s(message_us=50)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardwareConfig(nodes=0), r"cluster\.nodes=0"),
        (lambda: HardwareConfig(inter_gbps=0), r"cluster\.inter_gbps=0"),
        (lambda: HardwareConfig(nics_per_node=3), r"cluster\.nics_per_node=3: use a divisor"),
        (lambda: HardwareConfig(efficiency=2), r"cluster\.efficiency=2"),
        (lambda: PlanConfig(engines=[]), r"engines=\[\]"),
        (lambda: PlanConfig(chunks=[0]), r"chunks contains 0"),
        (lambda: PlanConfig(seq_len=10**6), r"seq_len=1000000: use 1 to model\.max_seq_len=256"),
        (lambda: PlanConfig(model=SMALL, ep_size=[1, 2, 4]), r"ep_size=\[1, 2, 4\] lists 3 layers"),
        (lambda: PlanConfig(global_batch=0), r"global_batch=0"),
    ],
)
def test_impossible_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


SMALL_CLUSTER = ["model=pr_moe", "cluster.nodes=2", "cluster.gpus_per_node=2", "global_batch=64", "seq_len=64"]


def test_command_prints_and_writes_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", *SMALL_CLUSTER, f"json={tmp_path / 'new' / 'plan.json'}"]) == 0
    printed = capsys.readouterr().out
    for word in ("used by a token", "GiB of a rank", "tokens/s, MFU", "between nodes", "EP of 8 experts", "assumed:"):
        assert word in printed
    written = json.loads((tmp_path / "new" / "plan.json").read_text())
    parts = ("dense_s", "experts_s", "dispatch_s", "gradients_s", "update_s")
    assert sum(written["best"][part] for part in parts) == pytest.approx(written["step_s"])
    assert 0 < written["mfu"] < 0.5
    assert written["simulated_dispatch_s"] == pytest.approx(written["best"]["dispatch_s"], rel=0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.gpu=h2000"], "cluster.gpu=h2000: unknown, did you mean 'h200'?"),
        (["engines=[zero3]"], "engines=zero3: unknown"),
        (["dispatchers=[dedupe]"], "dispatchers=dedupe: unknown, did you mean 'dedup'?"),
        (["wires=[fp4]"], "wires=fp4: unknown"),
        (["global_batch=6"], "global_batch=6 is no multiple of 4 ranks"),
        (["ep_size=3"], "ep_size=3 does not divide both the 4 ranks and the 4 experts"),
        (["cost_file=nowhere.json"], "cost_file: cost file nowhere.json cannot be read"),
        (["model=vmoe"], "model.kind=vit: only decoders can be planned so far"),
    ],
)
def test_wrong_input_is_one_line(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    rest = [arg for arg in SMALL_CLUSTER if arg.split("=")[0] not in {o.split("=")[0] for o in overrides}]
    assert cli.run(["plan", *rest, *overrides]) == 2
    assert message in capsys.readouterr().err
