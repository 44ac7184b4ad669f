"""Experts with shadows: the same function and gradients, but nobody's rows travel to them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_distributed
from twohop.comm import CommError, Topology, TrafficMeter, build_dispatcher
from twohop.comm.exchange import Channel
from twohop.comm.shadow import fetch
from twohop.models import ModelConfig, MoEConfig
from twohop.models.config import RouterConfig
from twohop.models.moe import MoELayer
from twohop.models.shadows import Shadows

DIM, EXPERTS, TOKENS = 16, 8, 24
SLOTS = (1, 2, 7)  # on ranks 0, 1 and 3 of 4; none on rank 2


def gradients_with(slots: tuple[int, ...], dispatcher: str, chunks: int, capacity: float | None) -> dict[str, Any]:
    """What a layer makes of this rank's tokens, all gradients, and the rows that were sent. In fp64."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=30)
    meter = TrafficMeter()
    moe = MoEConfig(experts=[EXPERTS], router=RouterConfig(top_k=3), capacity_factor=capacity)
    carrier = build_dispatcher(dispatcher, topology, EXPERTS, chunks=chunks, meter=meter)
    layer = MoELayer(ModelConfig(dim=DIM, ffn_dim=24, moe=moe), carrier).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in (layer.router.gate.weight, *layer.experts.parameters()):
        is_shared = parameter is layer.router.gate.weight
        whole = parameter.shape if is_shared else (EXPERTS, *parameter.shape[1:])
        value = torch.randn(whole, generator=generator, dtype=torch.float64) / 4
        parameter.data.copy_(value if is_shared else value.chunk(4)[topology.ep_rank])
    if slots:
        layer.shadows = Shadows(slots, carrier, meter)
    tokens = torch.Generator().manual_seed(topology.rank)
    x_1TD = torch.randn(1, TOKENS, DIM, generator=tokens, dtype=torch.float64).requires_grad_()
    y_1TD, stats = layer(x_1TD)
    (y_1TD.square().sum() + sum(stats.losses.values())).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {
        "values": {"y": y_1TD.detach(), "x": x_1TD.grad, **grads},
        "load": stats.load_E,
        "rows": sum(meter.bytes_sent(level, "dispatch") for level in ("inside node", "between nodes")) // (8 * DIM),
        "shadows": {phase: sum(meter.bytes_sent(level, phase) for level in ("inside node", "between nodes"))
                    for phase in ("shadows", "shadows backward")},
        "away": _away(layer, x_1TD, slots),
    }  # fmt: skip


def _away(layer: MoELayer, x_1TD: Tensor, slots: tuple[int, ...]) -> tuple[int, int]:
    """Rows that a flat dispatch sends, one for each rank of a token's experts: of all, and of all but `slots`."""
    scores_TE = layer.router.gate(x_1TD[0].detach().to(layer.router.gate.weight.dtype))
    own, of_rank = layer.dispatcher.topology.ep_rank, layer.dispatcher.num_local_experts
    chosen_TK = scores_TE.topk(3).indices.tolist()
    without = [[e for e in chosen if e not in slots] for chosen in chosen_TK]
    return tuple(sum(len({e // of_rank for e in row} - {own}) for row in rows) for rows in (chosen_TK, without))


@pytest.mark.parametrize(
    ("dispatcher", "chunks", "capacity"), [("flat", 1, None), ("dedup", 2, None), ("dedup", 1, 1.0)]
)
def test_shadows_change_the_order_of_sums_alone(dispatcher: str, chunks: int, capacity: float | None) -> None:
    plain, shadowed = (run_distributed(gradients_with, 4, slots, dispatcher, chunks, capacity) for slots in ((), SLOTS))
    for a, b in zip(plain, shadowed, strict=True):
        assert torch.equal(a["load"], b["load"])
        for name, wanted in a["values"].items():
            # fp64, sums of fewer than 100 numbers of the size of 1
            torch.testing.assert_close(b["values"][name], wanted, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: n + m)
        if capacity is None and dispatcher == "flat":
            assert (a["rows"], b["rows"]) == b["away"]
        # A ring: 2 · 3 / 4 of the weights of three experts, two matrices of 16 × 24 numbers, there and back.
        weights = 3 * 2 * 16 * 24 * 8 * 2 * 3 // 4
        assert b["shadows"] == {"shadows": weights, "shadows backward": weights}
        assert a["shadows"] == {"shadows": 0, "shadows backward": 0}


def gradient_of_bf16_rows() -> tuple[Any, Any]:
    """Rows 1 and 2 of three on each of four ranks, and what each rank's row 1 gets of all ranks' gradients."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=30)
    channel = Channel.make(topology, topology.ep_group, "layer 0", None, "shadows")
    weight = (torch.arange(6).view(3, 2) + 8 * dist.get_rank()).bfloat16().requires_grad_()
    (rows,) = fetch([weight], [1, 11], channel)
    (rows * (256 if dist.get_rank() == 0 else 1)).sum().backward()
    assert rows.dtype is weight.grad.dtype is torch.bfloat16
    return rows.tolist(), weight.grad.tolist()


def test_gradients_of_bf16_rows_are_added_up_in_fp32() -> None:
    (rows, first), *others, (_, last) = run_distributed(gradient_of_bf16_rows, 4)
    assert rows == [[2, 3], [28, 29]]
    assert first == [[0, 0], [260, 260], [0, 0]]  # 259, rounded once; in bf16, 256 + 1 is 256
    assert [gradient for _, gradient in others] == [[[0, 0]] * 3] * 2
    assert last == [[0, 0], [0, 0], [260, 260]]


def fetch_without_rank_1() -> str | None:
    topology = Topology.discover(ranks_per_node=2, timeout_s=3)
    channel = Channel.make(topology, topology.ep_group, "layer 3", None, "shadows")
    if dist.get_rank() == 1:
        return None
    with pytest.raises(CommError) as raised:
        fetch([torch.zeros(2, 3)], [0, 1], channel)
    return str(raised.value)


def test_who_does_not_fetch_is_named() -> None:
    message = run_distributed(fetch_without_rank_1, 2, keep=False)[0]
    assert message is not None
    assert message.startswith("rank 0, layer 3, shadows: the exchange among ranks [0, 1] failed.")
    assert "rank 1" in message
