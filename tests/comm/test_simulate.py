"""The simulator: what it sends against a real run, queues against a loop, published and hand-computed times."""

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_distributed
from twohop.comm import Topology, TrafficMeter, build_dispatcher
from twohop.comm.cost import Workload
from twohop.comm.network import Link, Network
from twohop.comm.routes import ROUTES
from twohop.comm.shipment import Shipment
from twohop.comm.simulate import _Queue, cost_model, simulate
from twohop.comm.wiring import Wires

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from scaling import bare_s

EXPERTS, K, DIM = 16, 3, 8
FREE = Link(byte_s=0.0)


def routing(rank: int) -> torch.Tensor:
    """[N, K]: ranks have different numbers of tokens, and some assignments are dropped."""
    generator = torch.Generator().manual_seed(rank)
    ids_NK = torch.rand(5 + 3 * rank, EXPERTS, generator=generator).topk(K).indices
    return ids_NK.masked_fill(torch.rand(ids_NK.shape, generator=generator) < 0.2, -1)


WIRES = Wires.uniform(inside="fp32", between="bf16")


def traffic_of_real_run(per_node: int, chunks: int) -> dict[str, Any]:
    """What the meter counts on this rank, forward and backward, for each route."""
    topology, counted = Topology.discover(ranks_per_node=per_node, timeout_s=20), {}
    for route in ROUTES:
        meter = TrafficMeter()
        dispatcher = build_dispatcher(route, topology, EXPERTS, chunks=chunks, meter=meter, wires=WIRES)
        ids_NK = routing(topology.rank)
        x_ND = torch.ones(len(ids_NK), DIM, requires_grad=True)
        weights_NK = torch.ones(ids_NK.shape, requires_grad=True)
        dispatcher.run(x_ND, ids_NK, weights_NK, lambda rows, counts: rows)[0].sum().backward()
        counted[route] = meter.snapshot()
    return counted


@pytest.mark.parametrize(("ranks", "per_node", "chunks"), [(4, 2, 1), (4, 2, 3), (4, 4, 2), (4, 1, 2)])
def test_sends_exactly_what_a_real_run_sends(ranks: int, per_node: int, chunks: int) -> None:
    counted = run_distributed(traffic_of_real_run, ranks, per_node, chunks)
    row = DIM * 4
    work = Workload(0, K, EXPERTS, row, between_row_bytes=row / 2, inside_row_bytes=row)
    ids = [routing(rank).numpy() for rank in range(ranks)]
    for route in ROUTES:
        shipment = Shipment.exact(ids, EXPERTS, (ranks // per_node, per_node), route, chunks)
        sent = simulate(shipment, Network(FREE, FREE), work).sent
        for rank in range(ranks):
            ours = {
                level: {phase: (b[rank], n[rank]) for phase, (b, n) in phases.items() if n[rank]}
                for level, phases in sent.items()
            }
            assert ours == counted[rank][route], (route, rank)


def test_expected_traffic_is_the_mean_of_uniform_routing() -> None:
    nodes, local, tokens, top_k, experts = 4, 2, 400, 4, 32
    work = Workload(tokens, top_k, experts, 1.0, 1.0, 1.0)
    draw = np.random.default_rng(0)
    ids = [draw.random((tokens, experts)).argsort(1)[:, :top_k] for _ in range(nodes * local)]
    for route in ROUTES:
        exact = Shipment.exact(ids, experts, (nodes, local), route, 2)
        expected = Shipment.expected(work, (nodes, local), route, 2)
        for hop in range(len(exact.hops)):
            mean = exact.rows_CSP[hop].sum() / nodes  # of a node, over both chunks
            assert expected.rows_CSP[hop].sum() == pytest.approx(mean, rel=0.02)
            assert expected.assignments_SP[hop].sum() == pytest.approx(exact.assignments_SP[hop].sum() / nodes)
        assert expected.numbers_of_counts == exact.numbers_of_counts


def test_one_node_stands_for_all() -> None:
    """Even traffic of all ranks takes as long as what is expected of one node, and sends as much from each rank."""
    block, experts = (3, 2), 6
    ids = [np.tile(np.arange(experts), 4)[:, None]] * 6
    work = Workload(24, 1, experts, 100.0, 100.0, 100.0)
    network = Network(Link(1e-6, 2e-5, 3e-5, 1e-4), Link(1e-7, 1e-5, 1e-5, 2e-5), nics=1, copied_byte_s=1e-8)
    for route in ("flat", "hierarchical"):
        exact, expected = Shipment.exact(ids, experts, block, route), Shipment.expected(work, block, route)
        whole, one = (simulate(s, network, work) for s in (exact, expected))
        assert one.forward_s == pytest.approx(whole.forward_s, rel=1e-9)
        assert one.backward_s == pytest.approx(whole.backward_s, rel=1e-9)
        for level in ("between nodes", "inside node"):
            sent, messages = whole.total(level)
            assert one.total(level) == (pytest.approx(sent / 3), messages / 3)


def test_queue_serves_in_order_of_arrival() -> None:
    draw = random.Random(0)
    at = [draw.randrange(3) for _ in range(200)]
    ready = [draw.choice([0.0, 1.0, draw.uniform(0, 100)]) for _ in at]
    service = [draw.uniform(0, 1) for _ in at]
    free = [50.0, 0.0, 10.0]
    done = _Queue(np.array(free)).serve(np.array(at), np.array(ready), np.array(service))
    for i in sorted(range(len(at)), key=lambda i: ready[i]):  # one message after the other
        free[at[i]] = max(free[at[i]], ready[i]) + service[i]
        assert done[i] == pytest.approx(free[at[i]])


def test_times_of_one_exchange_by_hand() -> None:
    """4 rows of 1 kB leave each rank in a bare exchange, one of them for itself."""
    work = Workload(4, 1, 4, 1000.0, 1000.0, 1000.0)

    def seconds(network: Network, route: str = "flat", block: tuple[int, int] = (2, 2)) -> float:
        shipment = Shipment.expected(work, block, route)
        return simulate(shipment, network, work, backward=False, agreement=False).forward_s / 2

    byte = Link(byte_s=1e-6)
    assert seconds(Network(byte, FREE), block=(4, 1)) == pytest.approx(3e-3)
    assert seconds(Network(FREE, byte), block=(1, 4)) == pytest.approx(3e-3)
    assert seconds(Network(byte, FREE, nics=2), "hierarchical") == pytest.approx(2e-3)
    assert seconds(Network(byte, FREE, nics=1), "hierarchical") == pytest.approx(4e-3)  # 2 ranks share a card
    assert seconds(Network(FREE, byte), "hierarchical") == pytest.approx(2e-3)
    assert seconds(Network(Link(0.0, latency_s=5e-3), FREE)) == pytest.approx(5e-3)
    assert seconds(Network(Link(0.0, send_s=1e-3), Link(0.0, send_s=1e-3))) == pytest.approx(3e-3)
    assert seconds(Network(Link(0.0, receive_s=1e-3), Link(0.0, receive_s=2e-3))) == pytest.approx(4e-3)
    # 4 rows there and 4 home that are copied, 4 there and 4 home that are weighed and summed at the expert.
    assert 2 * seconds(Network(FREE, FREE, copied_byte_s=1e-6)) == pytest.approx(16e-3)
    assert seconds(Network(FREE, FREE, exchange_s=1e-3)) == pytest.approx(1e-3)
    # 3 messages of each kind by one thread, or 3 beside 3.
    costly = Network(Link(0.0, 1e-3, 2e-3), Link(0.0, 1e-3, 2e-3))
    assert seconds(replace(costly, one_thread=True)) == pytest.approx(9e-3)
    assert seconds(costly) == pytest.approx(7e-3)  # the first message comes after 1 ms


def test_a_plan_is_made_once_and_only_where_ranks_agree() -> None:
    work = Workload(4, 1, 4, 1000.0, 1000.0, 1000.0)
    for route, chunks in (("flat", 1), ("dedup", 4)):
        shipment = Shipment.expected(work, (2, 2), route, chunks)
        network = Network(FREE, FREE, plan_s=1e-3)
        assert simulate(shipment, network, work).forward_s == pytest.approx(1e-3)
        assert simulate(shipment, network, work).backward_s == 0
        assert simulate(shipment, network, work, agreement=False).forward_s == 0


def test_work_beside_hides_behind_the_first_hop() -> None:
    work = Workload(4, 1, 4, 1000.0, 1000.0, 1000.0, experts_s=1e-3)
    shipment = Shipment.expected(work, (4, 1), "flat")
    slow = Network(Link(byte_s=1e-6), FREE)

    def seconds(beside_s: float) -> float:
        return simulate(shipment, slow, work, backward=False, agreement=False, beside_s=beside_s).forward_s

    assert seconds(0.0) == pytest.approx(7e-3)
    assert seconds(3e-3) == pytest.approx(7e-3)
    assert seconds(4e-3) == pytest.approx(8e-3)


GPUS = Network(
    Link(1e-9, 1e-6, 1e-6, 5e-6), Link(1e-10, 1e-6, 1e-6, 2e-6), nics=2, copied_byte_s=1e-12, exchange_s=1e-6
)


@pytest.mark.parametrize("route", list(ROUTES))
@pytest.mark.parametrize("chunks", [1, 4])
def test_worse_hardware_and_more_tokens_never_help(route: str, chunks: int) -> None:
    work = Workload(512, 4, 64, 1024.0, 1024.0, 1024.0)

    def seconds(network: Network, tokens: int = 512) -> float:
        sent = replace(work, tokens=tokens)
        result = simulate(Shipment.expected(sent, (4, 4), route, chunks), network, sent)
        return result.forward_s + result.backward_s

    base = seconds(GPUS)
    assert seconds(GPUS, 1024) > base
    assert seconds(replace(GPUS, nics=1)) >= base >= seconds(replace(GPUS, nics=4))
    for key in ("byte_s", "send_s", "receive_s", "latency_s"):
        for level in ("between", "inside"):
            link = getattr(GPUS, level)
            assert seconds(replace(GPUS, **{level: replace(link, **{key: 3 * getattr(link, key)})})) >= base, key
    assert seconds(replace(GPUS, copied_byte_s=1e-9)) > base
    assert seconds(replace(GPUS, exchange_s=1e-3)) > base


def test_the_cost_model_is_of_the_same_network() -> None:
    """In one chunk nothing overlaps but ports of different levels: the two agree but for that."""
    work = Workload(4096, 8, 64, 4096.0, 4096.0, 4096.0)
    for block, per_node in (((4, 4), 4), ((1, 4), 4), ((8, 1), 1), ((4, 2), 4)):
        model = cost_model(GPUS, block, per_node)
        for route in ("hierarchical", "dedup"):
            shipment = Shipment.expected(work, block, route, 1, per_node)
            simulated = simulate(shipment, GPUS, work, backward=False).forward_s
            predicted = model.predict(work, [("node", block[0]), ("local", block[1])], route, 1)
            assert predicted == pytest.approx(simulated, rel=0.1), (block, route)


def two_level_gain(ranks: int, mib: int) -> float:
    """Time of a flat all-to-all in which each rank sends so many MiB ÷ that of a two-level one, as it is published."""
    return bare_s(ranks, mib, "flat") / bare_s(ranks, mib, "hierarchical")


def test_published_crossover_of_two_level_all_to_all() -> None:
    """Slower below about 256 GPUs, faster above, about 4 times as fast at 2,048; small sizes gain early."""
    gains = {ranks: two_level_gain(ranks, 32) for ranks in (16, 32, 64, 128, 256, 512, 1024, 2048)}
    assert all(gain < 1 for ranks, gain in gains.items() if ranks < 256)
    assert all(gain > 1 for ranks, gain in gains.items() if ranks > 256)
    assert gains[2048] == pytest.approx(4.25, rel=0.1)
    assert two_level_gain(64, 1) > 1
    assert two_level_gain(512, 256) < 1


def test_sixteen_thousand_ranks() -> None:
    assert two_level_gain(16384, 32) > two_level_gain(4096, 32) > 1
