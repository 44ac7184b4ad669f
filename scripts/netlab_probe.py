"""scripts/netlab --ranks-per-node 4 --rate 200mbit -- python scripts/netlab_probe.py --rate 200mbit

How true the emulated cluster is: exchanges of several sizes over gloo, the rate that they reached (÷ nominal) and
the bytes that the links carried for them (÷ payload: the protocol's overhead). Results are in docs/netlab.md.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from netlab_cluster import parse_rate, read_traffic


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an emulated cluster with exchanges over gloo.")
    parser.add_argument("--rate", required=True, help="the links' nominal rate, as given to netlab")
    parser.add_argument("--kib", type=int, nargs="+", default=[64, 256, 1024, 4096], help="sent by a node each time")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    for kib in args.kib:
        for exchange in (all_to_all, receives_first):
            seconds, sent_bytes = measure(exchange, kib * 1024, args.repeats)
            reached = kib * 1024 * 8 / seconds / parse_rate(args.rate)
            overhead = sent_bytes / (kib * 1024)
            if dist.get_rank() == 0:
                print(f"{kib:>6} KiB {exchange.__name__:<15}{seconds * 1e3:>9.2f} ms", end=" ")
                print(f"{reached:>7.1%} of the rate, {overhead:.4f} x payload on the link", flush=True)
    dist.destroy_process_group()


def all_to_all(sent_WB: torch.Tensor, received_WB: torch.Tensor) -> None:
    dist.all_to_all_single(received_WB, sent_WB)


def receives_first(sent_WB: torch.Tensor, received_WB: torch.Tensor) -> None:
    """Same rows; but a rank's "ready to receive" does not wait behind its own payload on the same connection."""
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    work = [dist.irecv(received_WB[rank], rank) for rank in others] + [
        dist.isend(sent_WB[rank], rank) for rank in others
    ]
    for request in work:
        request.wait()


def measure(exchange: Callable, node_payload: int, repeats: int) -> tuple[float, float]:
    """Median seconds of an exchange in which each node sends `node_payload` bytes to other nodes, and the bytes
    that this rank's node sent for it, barriers included. Every rank must call this.
    """
    world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    if world == local:
        raise SystemExit("netlab_probe: one node sends nothing over its link: start it on two nodes or more")
    sent_WB = torch.zeros(world, node_payload // (local * (world - local)), dtype=torch.uint8)
    received_WB = torch.empty_like(sent_WB)
    exchange(sent_WB, received_WB)  # opens the connections
    dist.barrier()
    times, before = [], read_traffic()
    for _ in range(repeats):
        dist.barrier()
        span = torch.zeros(2, dtype=torch.float64)
        span[0] = -time.monotonic()
        exchange(sent_WB, received_WB)
        span[1] = time.monotonic()
        dist.all_reduce(span, dist.ReduceOp.MAX)  # from the first rank's start to the last one's end, on one clock
        times.append(span.sum().item())
    return sorted(times)[repeats // 2], (read_traffic().sent_bytes - before.sent_bytes) / repeats


if __name__ == "__main__":
    main()
