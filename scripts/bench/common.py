"""What the benchmarks share: cases, data that any rank can make again, the dense reference, the clock, results.

Shapes: N tokens of a rank, K experts per token, D width, E experts, R rows at this rank's experts, M nodes.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from twohop.comm import Topology

sys.path.append(str(Path(__file__).parents[1]))
from netlab_cluster import NetlabError, parse_rate

NUM_EXPERTS, DIM = 64, 512
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (x_ND, ids_NK, weights_NK) -> y_ND


@dataclass(frozen=True)
class Case:
    """One point of the sweep; every rank has `tokens` tokens."""

    tokens: int
    k: int
    skew: float = 1.0  # share of the hottest expert ÷ mean share

    @classmethod
    def parse(cls, text: str) -> "Case":
        """`TOKENS:K` or `TOKENS:K:SKEW`."""
        tokens, k, *skew = text.split(":")
        case = cls(int(tokens), int(k), float(*skew) if skew else 1.0)
        if case.tokens < 1 or not 1 <= case.k < NUM_EXPERTS or not 0 <= case.skew * case.k <= NUM_EXPERTS:
            raise ValueError(f"{text}: {NUM_EXPERTS} experts allow K below {NUM_EXPERTS}, SKEW up to {NUM_EXPERTS} / K")
        return case

    def ids(self, rank: int) -> torch.Tensor:
        """[N, K]: expert 0 is chosen with `skew` times the mean probability, the others alike."""
        generator = torch.Generator().manual_seed(1000 + rank)
        scores_NE = torch.rand(self.tokens, NUM_EXPERTS, generator=generator)
        hot_N = torch.rand(self.tokens, generator=generator) < self.skew * self.k / NUM_EXPERTS
        scores_NE[:, 0] = torch.where(hot_N, 2.0, -1.0)
        return scores_NE.topk(self.k).indices


class Data(NamedTuple):
    """A rank's part of a case."""

    x_ND: torch.Tensor
    ids_NK: torch.Tensor
    weights_NK: torch.Tensor
    grad_ND: torch.Tensor

    @classmethod
    def make(cls, case: Case, rank: int) -> "Data":
        generator = torch.Generator().manual_seed(rank)
        x_ND, grad_ND = (torch.randn(case.tokens, DIM, generator=generator) for _ in range(2))
        weights_NK = torch.rand(case.tokens, case.k, generator=generator).softmax(-1)
        return cls(x_ND, case.ids(rank), weights_NK, grad_ND)


def scales() -> torch.Tensor:
    """[E, D]: expert e multiplies by its own row, so that a copy at the wrong expert shows, at hardly any cost."""
    return torch.rand(NUM_EXPERTS, DIM, generator=torch.Generator().manual_seed(7)) + 0.5


def dense_reference(data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and gradients of input and weights, without any dispatch."""
    x_ND, ids_NK, weights_NK, grad_ND = data
    mixed_NE = torch.zeros(len(x_ND), NUM_EXPERTS).scatter_(1, ids_NK, weights_NK)
    scale_ND = mixed_NE @ scales()
    grad_weights_NE = (grad_ND * x_ND) @ scales().T
    return x_ND * scale_ND, grad_ND * scale_ND, grad_weights_NE.gather(1, ids_NK)


def bytes_leaving_node(case: Case, topology: Topology) -> int:
    """Payload of the busiest node in a forward pass if a token crosses once for each distinct node, both ways."""
    m, per_node = topology.num_nodes, topology.ranks_per_node
    rows_MM = torch.zeros(m, m, dtype=torch.long)  # [source, destination]
    for rank in range(topology.world_size):
        nodes_NK = case.ids(rank) * m // NUM_EXPERTS
        reached_NM = torch.zeros(case.tokens, m, dtype=torch.long).scatter_(1, nodes_NK, 1)
        rows_MM[rank // per_node] += reached_NM.sum(0)
    rows_MM.fill_diagonal_(0)
    return int((rows_MM + rows_MM.T).sum(1).max()) * DIM * 4


def time_once(forward: Forward, data: Data, expected: Sequence[torch.Tensor] = ()) -> tuple[float, ...]:
    """Seconds of the forward pass and of forward and backward, of the slowest rank. Every rank must call this.

    Raises an AssertionError, once the clock has stopped, unless output, gradient of the input and gradient of the
    weights are those `expected`, as far as these are given, to fp32 sums in another order.
    """
    x_ND, weights_NK = (t.clone().requires_grad_() for t in (data.x_ND, data.weights_NK))
    dist.barrier()
    start = time.perf_counter()
    y_ND = forward(x_ND, data.ids_NK, weights_NK)
    after_forward = time.perf_counter()
    y_ND.backward(data.grad_ND)
    seconds = slowest(after_forward - start, time.perf_counter() - start)
    for actual, wanted in zip((y_ND.detach(), x_ND.grad, weights_NK.grad), expected, strict=False):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    return seconds


def slowest(*seconds: float) -> tuple[float, ...]:
    """The largest of each over all ranks. Every rank must call this."""
    spans = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(spans, dist.ReduceOp.MAX)
    return tuple(spans.tolist())


def in_turn(
    measures: Mapping[str, Callable[[], tuple[float, ...]]], rounds: int, budget_s: float = float("inf")
) -> dict[str, list[tuple[float, ...]]]:
    """The times of up to `rounds` rounds, in each of which every measure has its turn, within `budget_s` seconds.

    In turn, so that a busy minute of the machine hits all alike. At least one round is made. Collective.
    """
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in measures}
    start = time.perf_counter()
    for done in range(1, rounds + 1):
        for name, measure in measures.items():
            times[name].append(measure())
        (spent,) = slowest(time.perf_counter() - start)
        if spent * (done + 1) / done > budget_s:
            break
    return times


def medians(times: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Of each column over the rounds."""
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def join_cluster(ranks_per_node: int | None) -> Topology:
    """Start torch.distributed and find the nodes. Exits with a message unless there are several of several ranks."""
    if "RANK" not in os.environ:
        raise SystemExit("start this under torchrun or scripts/netlab, for instance with 2 nodes of 4 ranks")
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    topology = Topology.discover(ranks_per_node, timeout_s=300)
    if min(topology.levels) < 2:
        dist.destroy_process_group()
        raise SystemExit(f"{topology.levels} (nodes, ranks per node): at least 2 of both are needed; on one host, "
                         "torchrun --nproc-per-node 8 and --ranks-per-node 4 make two")  # fmt: skip
    return topology


def rate_argument(text: str) -> int:
    """For argparse: bits per second of e.g. 200mbit."""
    try:
        return parse_rate(text)
    except NetlabError as error:
        raise ValueError(str(error)) from error


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    load = os.getloadavg()
    return {
        "cpu_count": os.cpu_count(),
        "load_average": [round(x, 2) for x in load],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": dist.get_backend() if dist.is_initialized() else None,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n")
