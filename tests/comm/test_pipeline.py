"""In which order stages of chunks run, forward and backward."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.comm.reference import make_case
from tests.distributed import run_distributed
from twohop.comm import Topology, TrafficMeter, build_dispatcher, pipeline
from twohop.comm.exchange import Channel, Pending
from twohop.comm.schedule import schedule
from twohop.comm.wiring import Direction

EXPERTS, D = 8, 4
HOPS_AND_CHUNKS = [(hops, chunks) for hops in range(4) for chunks in range(1, 9)]


@pytest.mark.parametrize(("hops", "chunks"), HOPS_AND_CHUNKS)
def test_every_stage_of_every_chunk_runs_once_and_in_order(hops: int, chunks: int) -> None:
    turns = schedule(hops, chunks)
    assert sorted(turns) == [(stage, chunk) for stage in range(2 * hops + 1) for chunk in range(chunks)]
    for chunk in range(chunks):
        stages = [turn.stage for turn in turns if turn.chunk == chunk]
        assert stages == sorted(stages)
    for stage in range(2 * hops + 1):  # a queue in front of each network: chunks never overtake each other
        assert [turn.chunk for turn in turns if turn.stage == stage] == list(range(chunks))


@pytest.mark.parametrize(("hops", "chunks"), [(h, c) for h, c in HOPS_AND_CHUNKS if h and c > 1])
def test_another_chunk_has_its_turn_while_an_exchange_is_under_way(hops: int, chunks: int) -> None:
    turns = schedule(hops, chunks)
    assert [turn.chunk for turn in turns[:chunks]] == list(range(chunks))  # all first exchanges at once
    assert all(turn.stage == 0 for turn in turns[:chunks])
    assert all(turn.stage == 2 * hops for turn in turns[-chunks:])  # and the last ones are waited for at the end
    inner = turns[chunks:-chunks]
    assert all(one.chunk != following.chunk for one, following in pairwise(inner))


def events_on_this_rank(case: list[Any], name: str, chunks: int) -> dict[str, Any]:
    """What starts and is waited for, in the order of this rank's main thread."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    meter = TrafficMeter()
    dispatcher = build_dispatcher(name, topology, EXPERTS, chunks=chunks, meter=meter)
    events: list[str] = []
    start, wait = Channel.start, Pending.wait

    def noted_start(self: Channel, rows: torch.Tensor, send: Any, recv: Any, phase: str, room: Any = None) -> Pending:
        events.append(f"start {phase}")
        return start(self, rows, send, recv, phase, room)

    def noted_wait(self: Pending) -> torch.Tensor:
        events.append(f"wait {self.phase}")
        return wait(self)

    def experts(rows_RD: torch.Tensor, counts: list[int]) -> torch.Tensor:
        events.append("experts")
        expert_rows_RD = rows_RD * 2
        expert_rows_RD.register_hook(lambda _: events.append("experts backward"))  # before it
        return expert_rows_RD

    x_ND, ids_NK, weights_NK, grad_ND = case[topology.rank]
    x_ND, weights_NK = x_ND.requires_grad_(), weights_NK.requires_grad_()
    Channel.start, Pending.wait = noted_start, noted_wait  # type: ignore[method-assign]
    try:
        y_ND, beside = dispatcher.run(x_ND, ids_NK, weights_NK, experts, lambda: events.append("beside") or "done")
        forward, events[:] = list(events), []
        (y_ND * grad_ND).sum().backward()
    finally:
        Channel.start, Pending.wait = start, wait  # type: ignore[method-assign]
    counted = {level: phases["counts"][1] for level, phases in meter.snapshot().items() if "counts" in phases}
    return {"forward": forward, "backward": events, "beside": beside, "counts": counted}


@pytest.mark.parametrize("name", ["flat", "hierarchical", "dedup"])
def test_order_of_events(name: str) -> None:
    case = make_case(3, [9, 4, 8, 6], 2, EXPERTS, D, torch.float32)
    one, four = (run_distributed(events_on_this_rank, 4, case, name, chunks) for chunks in (1, 4))
    hops = 1 if name == "flat" else 2
    for rank in range(4):
        assert one[rank]["counts"] == four[rank]["counts"]  # messages: one exchange plans all chunks
        for result, chunks in ((one[rank], 1), (four[rank], 4)):
            forward, backward = result["forward"], result["backward"]
            assert result["beside"] == "done"
            assert forward.count("experts") == chunks
            # Beside the first hop: after all its exchanges have started, before any is waited for.
            at = forward.index("beside")
            assert [e for e in forward[:at] if "counts" not in e and "metadata" not in e] == ["start dispatch"] * chunks
            for phase in ("dispatch", "combine"):
                assert forward.count(f"start {phase}") == forward.count(f"wait {phase}") == hops * chunks
                assert backward.count(f"start {phase} backward") == hops * chunks
                assert backward.count(f"wait {phase} backward") == hops * chunks
            # Backward too starts all its first exchanges before a wait, and waits for its last ones at the end.
            moves = [e for e in backward if "metadata" not in e]
            assert moves[:chunks] == ["start combine backward"] * chunks
            assert moves[-chunks:] == ["wait dispatch backward"] * chunks
            # Gradients of weights set out before the last experts, those of the first chunk; the last wait is theirs.
            experts_of_first = max(i for i, e in enumerate(backward) if e == "experts backward")
            assert backward.index("start metadata backward") < experts_of_first
            assert backward[-1] == "wait metadata backward"


def held_on_this_rank(case: list[Any], name: str) -> dict[str, list[int]]:
    """How many of the tensors that hops have brought, or sent home, are alive when the next thing is made of them."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    dispatcher = build_dispatcher(name, topology, EXPERTS)
    brought: list[StorageWeakRef] = []
    sent_home: list[StorageWeakRef] = []
    start, wait, up = pipeline._Transfer.start, pipeline._Transfer.wait, pipeline._up
    alive: dict[str, list[int]] = {"experts": [], "sums": []}

    def noted_start(self: Any, rows: torch.Tensor, backward: bool) -> None:
        if self.direction is Direction.combine:
            sent_home.append(StorageWeakRef(rows.untyped_storage()))
        start(self, rows, backward)

    def noted_wait(self: Any) -> torch.Tensor:
        rows = wait(self)
        if self.direction is Direction.dispatch:
            brought.append(StorageWeakRef(rows.untyped_storage()))
        return rows

    def noted_up(rows: torch.Tensor, spread: Any) -> torch.Tensor:
        alive["sums"].append(sum(not ref.expired() for ref in sent_home))
        return up(rows, spread)

    def experts(rows_RD: torch.Tensor, counts: list[int]) -> torch.Tensor:
        alive["experts"].append(sum(not ref.expired() for ref in brought))
        return rows_RD * 2

    x_ND, ids_NK, weights_NK, _ = case[topology.rank]
    pipeline._Transfer.start, pipeline._Transfer.wait = noted_start, noted_wait  # type: ignore[method-assign]
    pipeline._up = noted_up
    try:
        dispatcher.run(x_ND.requires_grad_(), ids_NK, weights_NK.requires_grad_(), experts)
    finally:
        pipeline._Transfer.start, pipeline._Transfer.wait, pipeline._up = start, wait, up  # type: ignore[method-assign]
    return alive


def test_rows_are_gone_as_soon_as_others_are_made_of_them() -> None:
    """Those that dedup's two hops bring, and those that they take home."""
    for alive in run_distributed(
        held_on_this_rank, 4, make_case(3, [9, 4, 8, 6], 2, EXPERTS, D, torch.float32), "dedup"
    ):
        assert alive == {"experts": [0], "sums": [0, 0]}
