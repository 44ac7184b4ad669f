"""The clock of phases, with a time that stands still unless it is told to go on."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.distributed import run_distributed
from twohop.comm import Topology, build_dispatcher, clock
from twohop.comm.clock import COMBINE, DISPATCH, EXPERTS, EXPOSED, OTHER, PhaseClock, raised_in


class Time:
    """Seconds that pass only in `pass_by`."""

    def __init__(self) -> None:
        self.now = 100.0

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: time.now, monotonic=lambda: time.now))
    return time


def test_a_phase_has_the_time_that_no_inner_one_takes(time: Time) -> None:
    watch = PhaseClock()
    with watch.phase("outside"):
        time.pass_by(1000)  # not counted
    with watch.running("step 1"):
        time.pass_by(1)
        with watch.phase("a"):
            time.pass_by(2)
            with watch.phase("b"):
                time.pass_by(4)
                with watch.phase("a"):
                    time.pass_by(8)
            time.pass_by(16)
        time.pass_by(32)
        assert watch.lap() == {OTHER: 33, "a": 26, "b": 4}
        time.pass_by(64)  # counts in the next lap
    time.pass_by(1000)  # not counted
    with watch.running("step 2"):
        with watch.phase("b"):
            time.pass_by(128)
            assert watch.lap() == {OTHER: 64, "b": 128}
            time.pass_by(256)
        assert watch.lap() == {"b": 256, OTHER: 0}
    assert watch.lap() == {OTHER: 0}
    assert watch.lap() == {}
    assert watch.running_for() == (None, 0)
    with watch.running("step 3"):
        time.pass_by(7)
        assert watch.running_for() == ("step 3", 7)


def test_where_a_rank_is_and_where_an_exception_was_raised() -> None:
    watch = PhaseClock()
    assert watch.where() == ""
    with watch.running("step 3"), watch.phase("forward"), watch.phase("dispatch", "MoE layer 1"):
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(watch.where()))
        thread.start()
        thread.join()
        assert seen == ["step 3: forward > dispatch (MoE layer 1)"]
        with pytest.raises(OSError, match="gone") as caught, watch.phase("inner"), watch.phase("innermost"):
            raise OSError("gone")
        assert raised_in(caught.value) == "step 3: forward > dispatch (MoE layer 1) > inner > innermost"
        assert watch.where() == seen[0]
    assert watch.where() == raised_in(ValueError()) == ""


def test_a_profiler_sees_each_phase_with_its_detail() -> None:
    watch = PhaseClock()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with watch.phase("dispatch", "MoE layer 1"):
            torch.ones(2).add_(1)
        with watch.phase("forward"):
            pass
    names = [event.name for event in profiler.events()]
    assert names.index("dispatch") < names.index("aten::ones") < names.index("forward")


def phases_of_one_layer(chunks: int) -> tuple[list[str], list[str], set[str]]:
    """What is entered, in order, in the forward and the backward pass of a layer, and with which details."""
    watch = PhaseClock()
    topology = Topology.discover(ranks_per_node=1, timeout_s=20)
    dispatcher = build_dispatcher("dedup", topology, 4, label="layer", chunks=chunks, clock=watch)
    entered: list[tuple[str, str]] = []
    enter = watch._enter

    def spy(name: str, detail: str) -> None:
        entered.append((name, detail))
        enter(name, detail)

    watch._enter = spy  # type: ignore[method-assign]
    x_ND = torch.randn(6, 4, requires_grad=True)
    weights_NK = torch.rand(6, 2, requires_grad=True)
    y_ND, _ = dispatcher.run(x_ND, torch.tensor([[0, 3]] * 6), weights_NK, lambda rows, counts: rows)
    forward = len(entered)
    y_ND.sum().backward()
    assert watch._open == []
    return [n for n, _ in entered[:forward]], [n for n, _ in entered[forward:]], {d for _, d in entered}


def test_a_dispatcher_marks_its_phases_and_waits_forward_and_backward() -> None:
    """One hop: the plan waits for counts and assignments; then dispatch, experts, combine of each chunk."""
    for forward, backward, details in run_distributed(phases_of_one_layer, 2, 1):
        plan = [DISPATCH, EXPOSED, EXPOSED]
        assert forward == [*plan, DISPATCH, DISPATCH, EXPOSED, EXPERTS, COMBINE, COMBINE, EXPOSED]
        assert backward == [EXPOSED] * 3  # rows of combine, weights, rows of dispatch
        assert details == {"layer"} | {
            f"layer, {phase}"
            for phase in (
                "counts", "metadata", "dispatch", "combine",
                "combine backward", "metadata backward", "dispatch backward",
            )
        }  # fmt: skip
    for forward, _, _ in run_distributed(phases_of_one_layer, 2, 3):
        assert [forward.count(name) for name in (EXPERTS, COMBINE, DISPATCH)] == [3, 6, 1 + 6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="events on a stream need a GPU")
def test_on_cuda_a_phase_has_the_time_of_the_stream() -> None:
    watch = PhaseClock(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    with watch.running("step 1"):
        with watch.phase("short"):
            a @ a
        with watch.phase("long"):
            for _ in range(40):
                a @ a
        seconds = watch.lap()
    assert seconds["long"] > 10 * seconds["short"] > 0
