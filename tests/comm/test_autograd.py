"""Dispatch under autograd's other users: numerical gradients, checkpointing, inference mode, torch.compile."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from tests.comm.reference import all_experts, expert_weights, make_case
from tests.distributed import run_distributed
from twohop.comm import TokenDispatcher, Topology, TrafficMeter, build_dispatcher

EXPERTS, D = 8, 6


def layer(dispatcher: TokenDispatcher, x_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> Any:
    """One layer of tanh experts."""
    local = slice(dispatcher.first_expert, dispatcher.first_expert + dispatcher.num_local_experts)
    w_EDD = expert_weights(EXPERTS, D, x_ND.dtype)[local]
    y_ND, _ = dispatcher.run(x_ND, ids_NK, weights_NK, lambda rows, counts: all_experts(rows, counts, w_EDD))
    return y_ND


def slopes_on_this_rank(case: list[Any], name: str, chunks: int) -> tuple[float, float]:
    """Derivative of a scalar of all ranks along a random direction of all ranks, by differences and by autograd."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    dispatcher = build_dispatcher(name, topology, EXPERTS, chunks=chunks)
    x_ND, ids_NK, weights_NK, grad_ND = case[topology.rank]
    generator = torch.Generator().manual_seed(topology.rank)
    dx_ND, dw_NK = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (x_ND, weights_NK))

    def value(step: float) -> torch.Tensor:
        return (layer(dispatcher, x_ND + step * dx_ND, ids_NK, weights_NK + step * dw_NK) * grad_ND).sum()

    step = 1e-6
    by_differences = (value(step) - value(-step)) / (2 * step)
    leaves = x_ND.clone().requires_grad_(), weights_NK.clone().requires_grad_()
    (layer(dispatcher, leaves[0], ids_NK, leaves[1]) * grad_ND).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    both = torch.stack([by_differences, (leaves[0].grad * dx_ND).sum() + (leaves[1].grad * dw_NK).sum()])
    dist.all_reduce(both)
    return both[0].item(), both[1].item()


@pytest.mark.parametrize(("name", "chunks"), [("flat", 1), ("hierarchical", 3), ("dedup", 1), ("dedup", 4)])
def test_gradient_is_the_slope(name: str, chunks: int) -> None:
    case = make_case(11, [7, 0, 5, 9], 3, EXPERTS, D, torch.float64, "drop")
    for by_differences, by_autograd in run_distributed(slopes_on_this_rank, 4, case, name, chunks):
        # Central differences err by step² times a third derivative of about 1e2, and by rounding / step.
        assert by_autograd == pytest.approx(by_differences, rel=1e-7, abs=1e-7)


def checkpointed_on_this_rank(case: list[Any]) -> dict[str, Any]:
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    meter = TrafficMeter()
    dispatcher = build_dispatcher("dedup", topology, EXPERTS, chunks=2, meter=meter)
    x_ND, ids_NK, weights_NK, grad_ND = case[topology.rank]
    results = {}
    for name in ("plain", "checkpointed"):
        meter.reset()
        leaf_ND = x_ND.clone().requires_grad_()
        weights = weights_NK.clone().requires_grad_()
        if name == "plain":
            y_ND = layer(dispatcher, leaf_ND, ids_NK, weights)
        else:
            y_ND = checkpoint(layer, dispatcher, leaf_ND, ids_NK, weights, use_reentrant=False)
        y_ND.backward(grad_ND)
        results[name] = (y_ND.detach(), leaf_ND.grad, weights.grad, meter.snapshot())
    return results


def test_checkpointed_layer_takes_the_same_way_again() -> None:
    """The routing is an input and so is kept; the exchanges of the forward run once more."""
    case = make_case(12, [7, 2, 5, 9], 3, EXPERTS, D, torch.float32)
    for results in run_distributed(checkpointed_on_this_rank, 4, case):
        plain, again = results["plain"], results["checkpointed"]
        for before, after in zip(plain[:3], again[:3], strict=True):
            assert torch.equal(before, after)
        for level, phases in plain[3].items():
            sent_bytes, messages = phases["dispatch"]
            assert again[3][level]["dispatch"] == (2 * sent_bytes, 2 * messages)
            assert again[3][level]["dispatch backward"] == phases["dispatch backward"]


def modes_on_this_rank(case: list[Any]) -> list[torch.Tensor]:
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    dispatcher = build_dispatcher("dedup", topology, EXPERTS, chunks=2)
    x_ND, ids_NK, weights_NK, _ = case[topology.rank]
    outputs = [layer(dispatcher, x_ND, ids_NK, weights_NK)]
    with torch.inference_mode():
        outputs.append(layer(dispatcher, x_ND, ids_NK, weights_NK).clone())
    compiled = torch.compile(
        lambda x: layer(dispatcher, x * 2, ids_NK, weights_NK) * 2, backend="eager"
    )  # eager: what is tested is what Dynamo makes of the exchanges, not the code that it generates
    leaf_ND = (x_ND / 2).requires_grad_()
    y_ND = compiled(leaf_ND)
    y_ND.sum().backward()
    assert leaf_ND.grad is not None
    return [output.detach() for output in (*outputs, y_ND / 2)]


def test_inference_mode_and_compiled_code_give_the_same() -> None:
    case = make_case(13, [7, 2, 0, 9], 3, EXPERTS, D, torch.float32)
    for plain, inference, compiled in run_distributed(modes_on_this_rank, 4, case):
        assert torch.equal(plain, inference)
        assert torch.equal(plain, compiled)
