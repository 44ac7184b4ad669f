"""`twohop plan`: times by hand, choices, and the command; what it counts is in test_plan_counts.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.test_plan_counts import PAIR, SMALL
from twohop.comm.network import Link, Network
from twohop.trainer import cli
from twohop.trainer.config import Precision, Recompute
from twohop.trainer.config.plan import HardwareConfig, PlanConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.plan.hardware import GIB, GPUS
from twohop.trainer.plan.holding import Holder
from twohop.trainer.plan.search import candidates, replay, search
from twohop.trainer.plan.shape import ModelShape, model_shape
from twohop.trainer.plan.stand_in import stand_ins
from twohop.trainer.plan.steptime import MUON_ITERATIONS, Timer, gather_s, muon_flops


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
    config = PlanConfig(model=SMALL, cluster=HardwareConfig(), rank_load=3)
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
        (
            lambda: PlanConfig(model=SMALL, rank_load=[2, float("nan")]),
            r"rank_load=\[2\.0, nan\]: the busiest rank has",
        ),
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
    assert cli.run(["plan", *SMALL_CLUSTER, "rank_load=1.5", "model.moe.capacity_factor=null"]) == 0
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
        (["rank_load=1.5"], "rank_load=[1.5] has no use with model.moe.capacity_factor=1.0: no rank gets more than"),
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
