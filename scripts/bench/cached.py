"""sudo scripts/netlab --nodes 2 --ranks-per-node 2 --rate 1gbit -- python scripts/bench/cached.py

What a cached plan saves of an MoE layer: forward, and forward and backward, routed live and with the plan of an
earlier epoch, which needs no router, no counts and no assignments. Everything is measured in turn, in one call, on the
same tokens; outputs are compared. Collective; rank 0 prints and writes.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from common import DIM, NUM_EXPERTS, Case, Data, in_turn, join_cluster, machine, medians, time_once, write_json
from rich.console import Console
from rich.table import Table

from twohop.comm import Topology, TrafficMeter, build_dispatcher
from twohop.models.config import AssignmentCacheConfig, ModelConfig, MoEConfig, RouterConfig
from twohop.models.moe import MoELayer
from twohop.models.routers import TokenInfo

SAMPLES = TokenInfo(1, sample_B=torch.tensor([0]))


def main() -> None:
    args = parse_arguments()
    topology = join_cluster(args.ranks_per_node)
    console = Console(quiet=topology.rank != 0, width=110)
    table = Table("case", "way", "live: forward / + backward, ms", "cached, ms", "saved")
    results = []
    for case in map(Case.parse, args.cases):
        data = Data.make(case, topology.rank)
        for name in ("flat", "dedup"):
            layer = settled_layer(name, topology, case.k, args.ffn_dim, data)
            measures = {key: partial(measure, layer, data, key == "cached") for key in ("live", "cached")}
            in_turn(measures, 2)  # opens connections, touches memory
            seconds = {key: medians(times) for key, times in in_turn(measures, args.rounds, args.budget_s).items()}
            result = {"tokens": case.tokens, "k": case.k, "way": name, "plan_bytes": plan_bytes(layer), **seconds}
            results.append(result)
            live, cached = (" / ".join(f"{1e3 * s:.1f}" for s in seconds[key]) for key in ("live", "cached"))
            saved = (
                f"{100 * (1 - ours / theirs):.0f} %"
                for ours, theirs in zip(seconds["cached"], seconds["live"], strict=True)
            )
            table.add_row(f"{case.tokens} tokens, K={case.k}", name, live, cached, " / ".join(saved))
    console.print(table)
    per_assignment = [r["plan_bytes"] / (r["tokens"] * r["k"]) for r in results]
    console.print(f"a plan takes {min(per_assignment):.0f} to {max(per_assignment):.0f} bytes for each assignment")
    if args.json and topology.rank == 0:
        write_json(args.json, {"machine": machine(), "ffn_dim": args.ffn_dim, "rounds": args.rounds, "cases": results})
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a cached plan saves of an MoE layer.")
    parser.add_argument("--cases", nargs="+", default=["128:2", "512:2", "512:8"], help="TOKENS:K")
    parser.add_argument("--ffn-dim", type=int, default=128, help="hidden width of an expert")
    parser.add_argument("--ranks-per-node", type=int, help="emulates nodes on one host")
    parser.add_argument("--rounds", type=int, default=15, help="times are medians (default: 15)")
    parser.add_argument("--budget-s", type=float, default=20, help="for each case and way")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser.parse_args()


def settled_layer(name: str, topology: Topology, k: int, ffn_dim: int, data: Data) -> MoELayer:
    """A layer whose cache holds the plan of this batch. Collective."""
    cache = AssignmentCacheConfig(enabled=True, trigger=0.05, check_every=10**9)
    moe = MoEConfig(router=RouterConfig(top_k=k, renormalize=True), cache=cache)
    dispatcher = build_dispatcher(name, topology, NUM_EXPERTS, meter=TrafficMeter())
    layer = MoELayer(ModelConfig(dim=DIM, ffn_dim=ffn_dim, moe=moe), dispatcher)
    for number, parameter in enumerate(layer.parameters()):
        generator = torch.Generator().manual_seed(number)
        torch.nn.init.normal_(parameter, std=DIM**-0.5, generator=generator)
    for _ in range(3):  # seen, repeated, planned
        _, stats = layer(data.x_ND[None], SAMPLES)
        layer.after_step(stats, 1)
    return layer


def measure(layer: MoELayer, data: Data, cached: bool) -> tuple[float, ...]:
    """Seconds of the forward pass and of forward and backward. Collective."""
    kept, layer.cache = layer.cache, layer.cache if cached else None

    def forward(x_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        y_BND, stats = layer(x_ND[None], SAMPLES)
        assert bool(stats.replayed) == cached
        return y_BND[0] + 0 * weights_NK.sum()  # it routes by itself

    seconds = time_once(forward, data)
    layer.cache = kept
    return seconds


def plan_bytes(layer: MoELayer) -> int:
    """Memory of the one plan that the cache holds."""
    assert layer.cache is not None
    ((planned, _),) = layer.cache._plans.values()
    tensors = [planned.plan.weight_n]
    for chunk in planned.plan.chunks:
        for spread in (*(move.spread for move in chunk.moves), chunk.to_experts):
            tensors += [spread.gather_C, *(part for bag in spread.bags for part in (bag.children_C, bag.offsets))]
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    main()
