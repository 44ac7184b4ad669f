"""A plain, slow dispatch in one process, and the functions that every rank runs in the tests of dispatch."""

from typing import Any

import torch

from twohop.comm import Topology, TrafficMeter, build_dispatcher


def expert(rows_RD: torch.Tensor, w_DD: torch.Tensor) -> torch.Tensor:
    """A nonlinear expert of one matrix."""
    return torch.tanh(rows_RD @ w_DD)


def all_experts(rows_RD: torch.Tensor, counts: list[int], w_EDD: torch.Tensor) -> torch.Tensor:
    """Every local expert on its rows."""
    return torch.cat([expert(rows, w) for rows, w in zip(rows_RD.split(counts), w_EDD.unbind(0), strict=True)])


def make_case(
    seed: int, tokens: list[int], k: int, num_experts: int, d: int, dtype: torch.dtype, routing: str = "uniform"
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each rank (tokens_ND, ids_NK, weights_NK, grad_ND); `routing` is uniform, one, drop or skewed."""
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    for n in tokens:
        scores_NE = torch.rand(n, num_experts, generator=generator)
        if routing == "skewed":
            scores_NE[:, : max(1, num_experts // 4)] += 0.5
        ids_NK = scores_NE.topk(k).indices
        if routing == "one":
            ids_NK = torch.arange(k).expand(n, k).clone()
        if routing == "drop":
            ids_NK[torch.rand(n, k, generator=generator) < 0.5] = -1
        weights_NK = torch.rand(n, k, generator=generator, dtype=torch.float64)
        x_ND, grad_ND = (torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        weights_NK = weights_NK.to(torch.float64 if dtype == torch.float64 else torch.float32)
        ranks.append((x_ND, ids_NK, weights_NK, grad_ND))
    return ranks


def expert_weights(num_experts: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """[E, D, D]."""
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(num_experts, d, d, generator=generator, dtype=torch.float64) / d**0.5).to(dtype)


def reference(
    case: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]], num_experts: int
) -> dict[str, Any]:
    """Outputs and all gradients by a dense sum over experts, without any dispatch."""
    dtype, d = case[0][0].dtype, case[0][0].shape[1]
    w_EDD = expert_weights(num_experts, d, dtype).requires_grad_()
    outputs, grads_x, grads_weights = [], [], []
    leaves = [(x.clone().requires_grad_(), w.clone().requires_grad_()) for x, _, w, _ in case]
    loss = torch.zeros((), dtype=dtype)
    for (x_ND, weights_NK), (_, ids_NK, _, grad_ND) in zip(leaves, case, strict=True):
        y_ND = torch.zeros_like(x_ND)
        for e in range(num_experts):
            weight_N1 = torch.where(ids_NK == e, weights_NK, 0).sum(1, keepdim=True)
            y_ND = y_ND + (weight_N1 * expert(x_ND, w_EDD[e])).to(dtype)
        outputs.append(y_ND.detach())
        loss = loss + (y_ND * grad_ND).sum()
    loss.backward()
    for x_ND, weights_NK in leaves:
        grads_x.append(torch.zeros_like(x_ND) if x_ND.grad is None else x_ND.grad)
        grads_weights.append(torch.zeros_like(weights_NK) if weights_NK.grad is None else weights_NK.grad)
    return {"y": outputs, "x": grads_x, "weights": grads_weights, "experts": w_EDD.grad}


def run_layer(
    topology: Topology,
    name: str,
    case: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    num_experts: int,
    **options: Any,
) -> dict[str, Any]:
    """One MoE layer on this rank: outputs, gradients, and what was sent."""
    meter = TrafficMeter()
    dispatcher = build_dispatcher(name, topology, num_experts, label="layer 0", meter=meter, **options)
    x_ND, ids_NK, weights_NK, grad_ND = (t.to(topology.device, copy=True) for t in case[topology.rank])
    x_ND.requires_grad_()
    weights_NK.requires_grad_()
    local = slice(dispatcher.first_expert, dispatcher.first_expert + dispatcher.num_local_experts)
    w_EDD = (
        expert_weights(num_experts, x_ND.shape[1], x_ND.dtype)[local].to(topology.device, copy=True).requires_grad_()
    )
    if options.get("chunks", 1) > 1:
        y_ND, _ = dispatcher.run(x_ND, ids_NK, weights_NK, lambda rows, counts: all_experts(rows, counts, w_EDD))
        y_ND.backward(grad_ND)
        return {"y": y_ND.detach(), "x": x_ND.grad, "weights": weights_NK.grad, "experts": w_EDD.grad}
    dispatched = dispatcher.dispatch(x_ND, ids_NK, weights_NK)
    rows_RD = all_experts(dispatched.rows, dispatched.counts, w_EDD)
    y_ND = dispatcher.combine(rows_RD, dispatched)
    y_ND.backward(grad_ND)
    return {
        "y": y_ND.detach(),
        "x": x_ND.grad,
        "weights": weights_NK.grad,
        "experts": w_EDD.grad,
        "traffic": meter.snapshot(),
        "counts": dispatched.counts,
        "rows": dispatched.rows.detach(),
    }
