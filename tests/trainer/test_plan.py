"""`twohop plan`: what engines hold, times by hand, choices, and the command; the peak is in tests/scripts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_distributed
from tests.tiny import tiny_config, write_corpus
from twohop.comm import Topology, build_dispatcher
from twohop.comm.network import Link, Network
from twohop.models import ModelConfig, MoEConfig, build_model, grouped, init_weights
from twohop.models.config import EncoderConfig, ModelKind, Residual, RouterConfig, VisionConfig
from twohop.trainer import cli
from twohop.trainer.config import Precision, Recompute
from twohop.trainer.config.plan import HardwareConfig, PlanConfig
from twohop.trainer.engines import build_engine
from twohop.trainer.errors import ConfigError
from twohop.trainer.optimizers.optim import materialize_state
from twohop.trainer.plan.hardware import GIB, GPUS
from twohop.trainer.plan.holding import WIDTHS, Holder
from twohop.trainer.plan.passes import passes
from twohop.trainer.plan.search import candidates, replay, search
from twohop.trainer.plan.shape import ModelShape, model_shape
from twohop.trainer.plan.stand_in import stand_ins
from twohop.trainer.plan.steptime import MUON_ITERATIONS, Timer, gather_s, muon_flops
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


def test_each_side_of_a_pair_carries_its_own_tokens() -> None:
    """Bytes by hand: half of the ranks that hold one of a token's experts are on the other node."""
    config = PlanConfig(
        model=PAIR, cluster=HardwareConfig(nodes=2, gpus_per_node=2), global_batch=8, micro_batches=[2], seq_len=16,
        source_len=24, ep_size=4, dispatchers=["flat"], chunks=[1], wires=["fp32"], engines=["ddp"],
    )  # fmt: skip
    pair = model_shape(PAIR, *config.lengths)
    assert [(layer.side, layer.tokens, layer.top_k) for layer in pair.layers] == [
        ("encoder", 24, 1),
        ("decoder", 16, 2),
        ("decoder", 16, 2),
    ]
    assert {parameter.block for parameter in pair.parameters.values()} == {-1, *range(7)}
    assert pair.parameters["encoder.2.moe.experts.down"].block == 2
    assert pair.parameters["decoder.0.attention.wq.weight"].block == 3
    timer = Timer(config, pair)
    best = search(timer).best
    holders = (1, 2, 4 * (1 - 15 / 28))  # the last layer has 2 experts on each rank: C(6, 2) of C(8, 2) pairs miss it
    for simulated, layer, ranks in zip(replay(timer, best), pair.layers, holders, strict=True):
        sent, messages = simulated.sent["between nodes"]["dispatch"]
        assert sent == pytest.approx([2 * layer.tokens * ranks / 2 * 4 * PAIR.dim] * 2)  # of both ranks of a node
        assert messages == [2, 2]
    rows = 2 * (24 * 1 + 16 * 2 + 16 * 2)
    assert best.experts_s == pytest.approx(3 * rows * 4 * PAIR.dim * PAIR.ffn_dim / timer.flops)
    assert best.memory.plans == 80 * rows


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return model_shape(SMALL, 64, None)


RAN: dict[Any, Any] = {}  # passes of SMALL, which no cluster changes


def timer_of(shape: ModelShape, cluster: dict[str, Any], **keys: Any) -> Timer:
    timer = Timer(PlanConfig(model=SMALL, cluster=HardwareConfig(**cluster), **keys), shape)
    timer._passes = RAN
    return timer


def test_shape_counts_all_parameters_once(shape: ModelShape) -> None:
    experts = sum(layer.num_experts * layer.expert_size for layer in shape.layers)
    assert shape.total == shape.dense_size + experts
    dense = [parameter for parameter in shape.parameters.values() if parameter.layer < 0]
    assert {parameter.block for parameter in dense} == {-1, 0, 1, 2, 3}
    assert {parameter.branch for parameter in dense} == {"", "router", "residual.mlp"}
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
    everything = [c for mode in Recompute for c in candidates(timer_of(shape, cluster, global_batch=16), mode)]
    peaks = sorted(c.memory.peak for c in everything)
    limit = peaks[len(peaks) // 20]  # so little that even the slowest mode is looked at
    reserve = timer_of(shape, cluster).gpu.memory_gib - limit / GIB
    found = search(timer_of(shape, cluster | {"reserve_gib": reserve}, global_batch=16))
    fitting = [c for c in everything if c.memory.peak <= limit * (1 + 1e-9)]
    assert found.best.step_s == min(c.step_s for c in fitting)
    chosen = [c for others in found.others.values() for c in others.values()]
    assert None in chosen
    assert all(c.memory.peak <= limit * (1 + 1e-9) for c in (found.best, *chosen) if c is not None)
    with pytest.raises(ConfigError, match=r"nothing fits into the 0\.0 GiB of cluster\.gpu=h200: the least is"):
        search(timer_of(shape, cluster | {"reserve_gib": 139.8}, global_batch=16))


def test_recomputation_is_chosen_where_memory_is_short_and_only_there(shape: ModelShape) -> None:
    cluster = {"nodes": 2, "gpus_per_node": 2}
    given: dict[str, Any] = {"global_batch": 16, "engines": ["ddp"], "micro_batches": [4], "ep_size": 2}
    timer = timer_of(shape, cluster, **given)
    ways = [next(candidates(timer, mode)) for mode in Recompute]
    times, peaks = [way.step_s for way in ways], [way.memory.peak for way in ways]
    assert times[0] == times[1] < times[2] < times[3]  # selective repeats no product
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
    assert list(search(timer).others["recompute"]) == ["none"]
    narrow = cluster | {"reserve_gib": timer.gpu.memory_gib - peaks[2] * 1.01 / GIB}
    found = search(timer_of(shape, narrow, **given))
    assert found.best.recompute is Recompute.networks
    assert found.others["recompute"]["none"] is None
    only_none = timer_of(shape, narrow, recompute=[Recompute.none], **given)
    with pytest.raises(ConfigError, match="nothing fits"):
        search(only_none)


def test_recomputation_repeats_products_and_full_carries_rows_again(shape: ModelShape) -> None:
    timer = timer_of(shape, {"nodes": 2, "gpus_per_node": 2}, global_batch=16, dispatchers=["flat"], chunks=[1])
    none, networks, full = (
        timer.ways(0, 4, 4, mode)[0] for mode in (Recompute.none, Recompute.networks, Recompute.full)
    )
    assert none.forward_s == networks.forward_s == full.forward_s
    assert networks.experts_s == full.experts_s == pytest.approx(4 / 3 * none.experts_s)
    dispatch = none.forward_s - none.work.experts_s  # and combine, in one chunk
    assert networks.backward_s - none.backward_s == pytest.approx(none.work.experts_s)
    assert full.backward_s - networks.backward_s == pytest.approx(dispatch / 2)


def test_all_wait_for_the_busiest_rank_and_it_needs_most_memory(shape: ModelShape) -> None:
    """Loads 1.5 and 3 of layers with EP 2: no rank of two can get more than twice the mean."""
    given: dict[str, Any] = {
        "global_batch": 16,
        "engines": ["ddp"],
        "micro_batches": [4],
        "recompute": [Recompute.none],
    }

    def best(ep_size: int, rank_load: Any) -> Any:
        cluster = {"nodes": 1, "gpus_per_node": 4}
        return search(timer_of(shape, cluster, ep_size=ep_size, rank_load=rank_load, **given)).best

    even, busy, busier = (best(2, load) for load in (None, [1.5, 3], 2))
    assert [way.work.experts_s for way in busy.ways] == [
        f * way.work.experts_s for f, way in zip((1.5, 2), even.ways, strict=True)
    ]
    assert busier.experts_s == pytest.approx(2 * even.experts_s)
    assert busier.step_s > busy.step_s > even.step_s
    assert busier.memory.peak > busy.memory.peak > even.memory.peak
    assert busier.memory.weights == even.memory.weights
    alone = best(1, 3)  # each rank has all experts: nobody else's rows come
    assert alone.memory == best(1, None).memory
    assert alone.step_s == best(1, None).step_s


@pytest.mark.parametrize(("factor", "bound"), [(None, 2.0), (0.5, 1.0), (1.25, 1.25)])
def test_capacity_bounds_what_a_busy_rank_gets(factor: float | None, bound: float) -> None:
    model = replace(SMALL, moe=replace(SMALL.moe, capacity_factor=factor))
    config = PlanConfig(model=model, cluster=HardwareConfig(), rank_load=3)
    timer = Timer(config, model_shape(model, 64, None))
    assert (timer.load(0, 2), timer.load(1, 1)) == (bound, 1.0)
    ways = stand_ins(model, [bound, 0.25])
    planned = [way.plan(torch.empty(8, 2), torch.empty(8, 2), torch.ones(8, 2)) for way in ways]
    sent = 8 if factor == 0.5 else 16
    assert [(plan.sent, plan.rows) for plan in planned] == [(sent, sent * bound), (sent, sent / 4)]


def test_muon_multiplies_and_keeps_one_moment(shape: ModelShape) -> None:
    short, long = 8, 24
    matrix = torch.zeros(long, short)
    with FlopCounterMode(display=False) as counter:
        _zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), MUON_ITERATIONS, 1e-7)
    assert muon_flops(long, short) == muon_flops(short, long) == counter.get_total_flops()
    timers = {
        name: timer_of(shape, {"gpus_per_node": 2}, global_batch=16, optimizer=name) for name in ("adamw", "muon")
    }
    found = {name: search(timer) for name, timer in timers.items()}
    assert set(found["muon"].others["engine"]) == {"ddp", "zero0"}
    assert found["muon"].refused == dict.fromkeys(("fsdp", "zero1", "zero2"), "optimizer=muon")
    holders = {name: Holder(shape, "ddp", (1, 1), 2, Precision.fp32, name) for name in timers}
    matrices = sum(holders["muon"].local(p) for p in shape.parameters.values() if p.is_matrix)
    counts = sum(p.is_matrix for p in shape.parameters.values())
    assert holders["adamw"].moments - holders["muon"].moments == 4 * matrices + 4 * counts
    multiplied = sum(
        holders["muon"].local(p) / p.size * muon_flops(*p.shape) for p in shape.parameters.values() if p.is_matrix
    )
    gpu = timers["muon"].gpu
    moved = 2 * 4 * matrices / gpu.memory_bytes_s  # a moment less is read and written
    more_s = timers["muon"].update_s(holders["muon"]) - timers["adamw"].update_s(holders["adamw"])
    assert more_s == pytest.approx(multiplied / (0.5 * gpu.bf16_flops) - moved)


def test_fp8_experts_take_half_the_time(shape: ModelShape) -> None:
    bf16, fp8 = (
        search(timer_of(shape, {"gpus_per_node": 1}, global_batch=16, fp8_experts=fp8)).best for fp8 in (False, True)
    )
    assert fp8.experts_s == pytest.approx(bf16.experts_s * GPUS["h200"].bf16_flops / 1979e12)
    assert fp8.dense_s == bf16.dense_s


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
        (lambda: PlanConfig(model=SMALL, rank_load=[1, 2, 4]), r"rank_load=\[1, 2, 4\] lists 3 layers"),
        (lambda: PlanConfig(rank_load="much"), r"rank_load=much: use null, a number from 1 up, or a list"),
        (lambda: PlanConfig(rank_load=0.5), r"rank_load=\[0\.5\]: the busiest rank has the mean or more: use"),
        (lambda: PlanConfig(global_batch=0), r"global_batch=0"),
        (lambda: PlanConfig(recompute=[]), r"recompute=\[\]"),
        (lambda: PlanConfig(fp8_experts=True, precision=Precision.fp32), r"fp8_experts=true has bf16 results"),
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
    assert "; uniform routing; ranks in step" in printed
    written = json.loads((tmp_path / "new" / "plan.json").read_text())
    parts = ("dense_s", "experts_s", "dispatch_s", "gradients_s", "update_s")
    assert sum(written["best"][part] for part in parts) == pytest.approx(written["step_s"])
    assert 0 < written["mfu"] < 0.5
    assert written["simulated_dispatch_s"] == pytest.approx(written["best"]["dispatch_s"], rel=0.5)
    assert cli.run(["plan", *SMALL_CLUSTER, "rank_load=1.5"]) == 0
    assert "the busiest rank's experts get 1.5 times the mean, and all wait for them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.gpu=h2000"], "cluster.gpu=h2000: unknown, did you mean 'h200'?"),
        (["engines=[zero3]"], "engines=zero3: unknown"),
        (["dispatchers=[dedupe]"], "dispatchers=dedupe: unknown, did you mean 'dedup'?"),
        (["wires=[fp4]"], "wires=fp4: unknown"),
        (["optimizer=moun"], "optimizer=moun: unknown, did you mean 'muon'?"),
        (["fp8_experts=true", "cluster.gpu=a100"], "fp8_experts=true: cluster.gpu=a100 has no fp8 products"),
        (["optimizer=muon", "engines=[fsdp,zero1]"], "optimizer=muon goes with none of engines=['fsdp', 'zero1']"),
        (["global_batch=6"], "global_batch=6 is no multiple of 4 ranks"),
        (["ep_size=3"], "ep_size=3 does not divide both the 4 ranks and the 4 experts"),
        (["cost_file=nowhere.json"], "cost_file: cost file nowhere.json cannot be read"),
        (["source_len=8"], "source_len=8 has no use with model.kind=decoder: leave it out"),
        (["model=vmoe", "seq_len=null"], "vocab_size=null: set it to the number of the images' classes"),
        (["model=vmoe", "vocab_size=10"], "seq_len=64 has no use with model.kind=vit: leave it out"),
        (["model=task_moe"], "model.num_tasks=null: the task router needs it"),
        (["model=task_moe", "source_len=65"], "source_len=65: use 1 to model.max_seq_len=64, or null"),
        (
            ["model.moe.router.name=task", "model.num_tasks=3"],
            "router.name=task: this model or its data knows no tasks",
        ),
        (["model.moe.cache.enabled=true"], "model.moe.cache.enabled=true: what is kept of samples cannot be planned"),
        (["model.moe.expert_bits=8"], "model.moe.expert_bits=8: such experts are not trained"),
    ],
)
def test_wrong_input_is_one_line(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    rest = [arg for arg in SMALL_CLUSTER if arg.split("=")[0] not in {o.split("=")[0] for o in overrides}]
    assert cli.run(["plan", *rest, *overrides]) == 2
    assert message in capsys.readouterr().err
