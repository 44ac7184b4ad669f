"""torchrun --nproc-per-node 2 scripts/bench/task_extract.py --json build/task_extract.json

One task cut out of a task-level MoE against the whole model: parameters, and tokens per second of greedy decoding with
a cache (Kudugunta 2021). The whole model's experts are spread over all ranks, and every rank decodes a batch of all
tasks mixed; then every rank decodes as many sequences with the model of one task. Weights are random, since times do
not depend on them; the logits of both are compared first. Everything is measured in turn, in one call: the median over
rounds for each size of batch, and the peak over sizes, as the paper has it. Collective; rank 0 prints and writes.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import in_turn, machine, medians, slowest, write_json

from twohop.comm import Topology, build_dispatcher
from twohop.models import EncoderDecoder, ModelConfig, MoEConfig, RouterConfig, build_model, init_weights
from twohop.models.build import parameter_counts
from twohop.models.config import EncoderConfig, ModelKind
from twohop.models.extract import extract_task

VOCAB, TASKS = 256, 8


def main() -> None:
    """Compare, print, write."""
    args = parse_arguments()
    dist.init_process_group("gloo")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    topology = Topology.discover(timeout_s=300)
    config = make_config(args)
    whole, part = build_both(config, topology)
    compare_logits(whole, part, topology.rank, args.length)
    measures: dict[str, Callable[[], tuple[float, ...]]] = {}
    for batch in args.batches:
        source_BS = torch.randint(VOCAB, (batch, args.length), generator=torch.Generator().manual_seed(topology.rank))
        tasks_B = (torch.arange(batch) + topology.rank) % TASKS
        measures[f"whole {batch}"] = lambda source=source_BS, tasks=tasks_B: decode(whole, source, tasks, args.length)
        measures[f"part {batch}"] = lambda source=source_BS: decode(part, source, None, args.length)
    times = {name: medians(rounds)[0] for name, rounds in in_turn(measures, args.rounds).items()}
    if topology.rank == 0:
        report(args, topology, whole.config, part.config, times)
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Sizes of the model and of the batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3, help="of each side; all have experts")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--length", type=int, default=16, help="tokens of a source, and of what is decoded")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="sequences of a rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser.parse_args()


def make_config(args: argparse.Namespace) -> ModelConfig:
    """Two experts of a layer for each task, in both stacks."""
    moe = MoEConfig(experts=args.experts, every=1, router=RouterConfig(name="task", top_k=2))
    return ModelConfig(
        kind=ModelKind.encoder_decoder,
        vocab_size=VOCAB,
        num_tasks=TASKS,
        max_seq_len=args.length,
        dim=args.dim,
        num_layers=args.layers,
        ffn_dim=4 * args.dim,
        moe=moe,
        encoder=EncoderConfig(num_layers=args.layers, moe=moe),
    )


def build_both(config: ModelConfig, topology: Topology) -> tuple[EncoderDecoder, EncoderDecoder]:
    """The whole model with its experts over all ranks, and one task of it, another on each rank."""
    alone = build_model(config)
    init_weights(alone, 0)
    part = extract_task(config, alone.state_dict().__getitem__, topology.rank % TASKS)
    del alone
    everywhere = topology.with_ep(topology.world_size)
    whole = build_model(config, lambda layer, experts: build_dispatcher("dedup", everywhere, experts))
    init_weights(whole, 0)
    assert isinstance(whole, EncoderDecoder)
    return whole.eval(), part


@torch.no_grad()
def compare_logits(whole: EncoderDecoder, part: EncoderDecoder, rank: int, length: int) -> None:
    """Raises an AssertionError unless both say the same of this rank's task."""
    ids_BT, lengths_B = torch.randint(VOCAB, (4, length)), torch.full((4,), length)
    expected = whole(ids_BT, lengths_B, ids_BT, task_B=torch.full((4,), rank % TASKS)).logits
    torch.testing.assert_close(part(ids_BT, lengths_B, ids_BT).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def decode(
    model: EncoderDecoder, source_BS: torch.Tensor, task_B: torch.Tensor | None, steps: int
) -> tuple[float, ...]:
    """Seconds for encoding the sources and decoding `steps` tokens of each, of the slowest rank. Collective."""
    dist.barrier()
    started = time.perf_counter()
    source = model.encode(source_BS, torch.full((len(source_BS),), source_BS.shape[1]), task_B)
    cache = model.new_cache(source_BS.shape[1], steps)
    ids_B1 = source_BS[:, :1]
    for _ in range(steps):
        ids_B1 = model.decode(ids_B1, source, cache).logits.argmax(-1)
    return slowest(time.perf_counter() - started)


def report(
    args: argparse.Namespace, topology: Topology, whole: ModelConfig, part: ModelConfig, times: dict[str, float]
) -> None:
    """The table, and the file of --json."""
    sizes = {"whole": parameter_counts(whole).total, "part": parameter_counts(part).total}
    ratio = sizes["whole"] / sizes["part"]
    print(f"parameters: whole {sizes['whole']:,}, one task {sizes['part']:,}, {ratio:.2f} times fewer")
    tokens = {name: topology.world_size * int(name.split()[1]) * args.length / s for name, s in times.items()}
    print("| sequences of a rank | whole model, tokens/s | one task, tokens/s | ratio |\n|---|---|---|---|")
    for batch in args.batches:
        a, b = tokens[f"whole {batch}"], tokens[f"part {batch}"]
        print(f"| {batch} | {a:,.0f} | {b:,.0f} | {b / a:.2f} |")
    peaks = {kind: max(v for name, v in tokens.items() if name.startswith(kind)) for kind in sizes}
    print(f"| peak | {peaks['whole']:,.0f} | {peaks['part']:,.0f} | {peaks['part'] / peaks['whole']:.2f} |")
    result: dict[str, Any] = {"machine": machine(), "ranks": topology.world_size, "parameters": sizes}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, result | {"settings": settings, "tokens_per_s": tokens, "peak": peaks})


if __name__ == "__main__":
    main()
