"""python scripts/bench/memory.py

What activation checkpointing saves and costs: peak memory of a training pass (forward and backward) beside what stands
anyway (weights and gradients), and the floating-point operations of its matrix products, for each mode of
`train.recompute`. One process, on the CPU, in one call; both are counted, neither depends on the machine.
"""

import argparse
from pathlib import Path

import torch
from common import write_json
from rich.console import Console
from rich.table import Table
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from twohop.models import MoEModel, build_model, init_weights
from twohop.models.config import ModelConfig, MoEConfig, Residual, RouterConfig
from twohop.trainer.config import Recompute
from twohop.trainer.objective import cross_entropy_sum
from twohop.trainer.transforms.recompute import recompute_activations


def main() -> None:
    args = parse_arguments()
    table = Table("train.recompute", "peak activations ÷ none", "operations ÷ none")
    results = {}
    for mode in Recompute:
        peak = peak_bytes(prepared(args, mode), batch(args))
        operations = count_operations(prepared(args, mode), batch(args))
        results[mode.value] = {"peak_bytes": peak, "operations": operations}
        whole = results["none"]
        ratios = peak / whole["peak_bytes"], operations / whole["operations"]
        table.add_row(mode.value, *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=110).print(table)
    if args.json is not None:
        write_json(args.json, {"settings": {key: str(value) for key, value in vars(args).items()}, "modes": results})


def prepared(args: argparse.Namespace, mode: Recompute) -> MoEModel:
    """A fresh PR-MoE, whose gradients exist."""
    moe = MoEConfig(experts=[args.experts], residual=Residual.sum, router=RouterConfig(top_k=args.k))
    config = ModelConfig(
        vocab_size=256, dim=args.dim, num_layers=args.layers, num_heads=8, ffn_dim=4 * args.dim, moe=moe
    )
    model = build_model(config)
    init_weights(model, 0)
    recompute_activations(model, mode)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model.train()


def batch(args: argparse.Namespace) -> torch.Tensor:
    return torch.randint(256, (args.sequences, args.length + 1), generator=torch.Generator().manual_seed(0))


def forward_backward(model: MoEModel, ids_BT: torch.Tensor) -> None:
    output = model(ids_BT[:, :-1])
    losses = [loss for stats in output.moe for loss in stats.losses.values()]
    torch.stack([cross_entropy_sum(output.logits, ids_BT[:, 1:]), *losses]).sum().backward()


def peak_bytes(model: MoEModel, ids_BT: torch.Tensor) -> int:
    """The most that is alive at once, less weights and gradients."""
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        forward_backward(model, ids_BT)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    standing = sum(2 * parameter.nbytes for parameter in model.parameters())
    return int(snapshot["Total"]) - standing


def count_operations(model: MoEModel, ids_BT: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        forward_backward(model, ids_BT)
    return counter.get_total_flops()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"dim": 256, "layers": 6, "experts": 8, "k": 2, "sequences": 4, "length": 256}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
