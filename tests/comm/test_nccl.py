"""The same dispatch over NCCL: several ranks share one GPU and talk through sockets, as if on hosts of their own."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.reference import make_case, reference, run_layer
from tests.distributed import run_distributed
from twohop.comm import Topology

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
ALGORITHMS = ("flat", "hierarchical", "dedup")


def layers_on_this_rank(cases: list[Any], num_experts: int, chunks: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    os.environ["NCCL_HOSTID"] = f"rank-{os.environ['RANK']}"  # NCCL refuses two ranks of one host on one GPU
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    try:
        topology = Topology.discover(ranks_per_node=2, timeout_s=60)
        assert topology.device.type == "cuda"
        results = []
        for case in cases:
            by_name = {name: run_layer(topology, name, case, num_experts, chunks=chunks) for name in ALGORITHMS}
            keys = ("y", "x", "weights", "experts")
            results.append({name: {key: layer[key].cpu() for key in keys} for name, layer in by_name.items()})
        return results
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("chunks", [1, 3])
def test_nccl_equals_the_reference(chunks: int) -> None:
    experts = 8
    cases = [
        make_case(0, [9, 4, 0, 7], 3, experts, 8, torch.float32),
        make_case(1, [5, 5, 5, 5], 2, experts, 8, torch.float64, "drop"),
        make_case(2, [0, 0, 0, 6], 1, experts, 8, torch.float32, "one"),
    ]
    results = run_distributed(layers_on_this_rank, 4, cases, experts, chunks, init=False, timeout=300)
    for i, case in enumerate(cases):
        expected = reference(case, experts)
        for rank in range(4):
            by_name = results[rank][i]
            for key in ("y", "x", "weights", "experts"):
                for name in ALGORITHMS:
                    assert torch.equal(by_name[name][key], by_name["flat"][key]), (name, key, rank)
            for key in ("y", "x", "weights"):
                bound = 300 * torch.finfo(case[0][0].dtype).eps  # sums of some hundred terms of size about 1
                torch.testing.assert_close(by_name["flat"][key], expected[key][rank], rtol=bound, atol=bound)
