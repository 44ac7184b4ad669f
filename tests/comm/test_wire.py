"""Wire formats: their error, their size, and that each hop and direction uses its own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.comm.reference import make_case, run_layer
from tests.distributed import run_distributed
from twohop.comm import HopWires, Topology, Wires, build_dispatcher
from twohop.comm.wire import FORMATS
from twohop.comm.wiring import Direction

LOSSY = [name for name in FORMATS if name != "fp32"]


def rows_strategy() -> st.SearchStrategy[torch.Tensor]:
    def make(seed: int, rows: int, d: int, scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, d, generator=generator) * 10**scale

    widths = st.sampled_from([1, 3, 64, 127, 128, 129, 300])
    return st.builds(make, st.integers(0, 10**6), st.integers(0, 9), widths, st.floats(-6, 6))


def blocks_of(rows_RD: torch.Tensor, columns: int) -> list[torch.Tensor]:
    return list(rows_RD.split(columns, dim=1))


@given(rows_strategy())
def test_error_is_within_the_stated_bound(rows_RD: torch.Tensor) -> None:
    for name in LOSSY:
        wire = FORMATS[name]
        decoded_RD = wire.decode(wire.encode(rows_RD), torch.float32)
        assert decoded_RD.shape == rows_RD.shape
        columns = {"fp8_128": 128, "bf16": 1}.get(name, max(1, rows_RD.shape[1]))
        for before, after in zip(blocks_of(rows_RD, columns), blocks_of(decoded_RD, columns), strict=True):
            largest_R1 = before.abs().amax(1, keepdim=True) if len(before) else before
            # The scale itself is rounded to fp32, once when dividing and once when multiplying.
            assert ((after - before).abs() <= (wire.error + 4 * torch.finfo(torch.float32).eps) * largest_R1).all()


@pytest.mark.parametrize("name", ["fp8", "fp8_128"])
def test_fp8_keeps_small_numbers_to_its_relative_precision(name: str) -> None:
    """Above the underflow of e4m3, 2**-6 / 448 of the largest number, the error is relative to each number."""
    rows_RD = torch.logspace(0, -4, 128)[None] * 3
    decoded_RD = FORMATS[name].decode(FORMATS[name].encode(rows_RD), torch.float32)
    normal = rows_RD > rows_RD.max() * 2**-6 / 448
    relative = ((decoded_RD - rows_RD) / rows_RD).abs()[normal]
    assert relative.max() <= 2**-4 * 1.001
    assert relative.max() > 2**-6  # it is fp8, not something finer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fp32_sends_rows_as_they_are(dtype: torch.dtype) -> None:
    rows_RD = torch.randn(3, 5).to(dtype)
    assert FORMATS["fp32"].encode(rows_RD) is rows_RD
    assert torch.equal(FORMATS["fp32"].decode(rows_RD, dtype), rows_RD)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_come_back_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    rows_RD = torch.zeros(2, 200, dtype=dtype)
    decoded_RD = FORMATS[name].decode(FORMATS[name].encode(rows_RD), dtype)
    assert torch.equal(decoded_RD, rows_RD)  # zeros stay zeros, without a division by the scale 0
    assert decoded_RD.dtype == dtype


def test_bytes_of_a_row() -> None:
    sizes = {name: wire.row_bytes(512, torch.float32) for name, wire in FORMATS.items()}
    assert sizes == {"fp32": 2048, "bf16": 1024, "fp8": 516, "fp8_128": 528, "int8": 516}


def layer_on_this_rank(case: list[Any], wires: Wires | None, name: str) -> dict[str, Any]:
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    return run_layer(topology, name, case, 4, wires=wires)


PHASES = {
    Direction.dispatch: "dispatch",
    Direction.combine: "combine",
    Direction.dispatch_backward: "dispatch backward",
    Direction.combine_backward: "combine backward",
}


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("hop", ["between", "inside"])
def test_each_hop_and_direction_has_its_own_format(direction: Direction, hop: str) -> None:
    case = make_case(3, [16, 12, 8, 4], 2, 4, 256, torch.float32)
    plain = run_distributed(layer_on_this_rank, 4, case, None, "dedup")
    wires = Wires(**{direction.name: HopWires(**{hop: "int8"})})
    coded = run_distributed(layer_on_this_rank, 4, case, wires, "dedup")
    for rank in range(4):
        for level, phases in plain[rank]["traffic"].items():
            for phase, (sent_bytes, messages) in phases.items():
                is_coded = phase == PHASES[direction] and level.startswith(hop)
                expected = sent_bytes // 1024 * 260 if is_coded else sent_bytes
                assert coded[rank]["traffic"][level][phase] == (expected, messages)


def test_lossy_layer_stays_close() -> None:
    """Tokens and sums cross a node once each: relative errors of a format add up over the hops of a direction."""
    case = make_case(4, [16, 12, 8, 4], 2, 4, 64, torch.float32)
    plain = run_distributed(layer_on_this_rank, 4, case, None, "dedup")
    for name in ("bf16", "fp8", "int8"):
        coded = run_distributed(layer_on_this_rank, 4, case, Wires.uniform("bf16", name), "dedup")
        for rank in range(4):
            error = (coded[rank]["y"] - plain[rank]["y"]).norm() / plain[rank]["y"].norm()
            # tanh and a matrix of norm about 2 (random, D x D) carry the dispatch's error on; combine adds its own.
            assert 0 < error <= 3 * (FORMATS[name].error + FORMATS["bf16"].error)


def test_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown wire format combine\.between='fp4': use one of fp32, bf16"):
        build_dispatcher("dedup", Topology.one_process(), 4, wires=Wires(combine=HopWires(between="fp4")))
