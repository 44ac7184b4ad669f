"""Faults to inject into a small job, what every rank then does, and how its answer is judged.

The job: MoE layers with a residual connection, some steps forward and backward. One rank, the culprit, misbehaves in
a given layer and phase of the second step. `python -m tests.comm.faults SECONDS`, under torchrun's variables, runs it
without a fault, step after step with that deadline, until one comes from outside.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from twohop.comm import CommError, HopWires, Topology, Wires, announce_failure, build_all_to_all, build_dispatcher
from twohop.comm.dispatcher import TokenDispatcher
from twohop.comm.exchange import Channel

LAYERS, N, D, K = 3, 6, 8, 2
FAULTY_STEP = 1
SLACK_S = 8.0  # what a busy machine may add to the deadline and the roll call
PHASES = ("counts", "metadata", "dispatch", "combine", "combine backward", "metadata backward", "dispatch backward")

# The culprit is lost: it dies or stops in the middle of a phase, just before or just after its sends are under way.
LOST = ("killed before", "killed within", "stopped before", "stopped within")
# The culprit goes on, or ends with an exception of its own; it calls the others' attention or they must find out.
ASTRAY = (
    "skips a layer",
    "skips a combine",
    "skips a backward",
    "detaches a layer",
    "leaves",
    "fails in an expert",
    "fails in an expert's backward",
    "returns too few rows",
    "other width",
    "other top-k",
    "other dtype",
    "other weights",
    "other chunks",
    "other algorithm",
    "other wire",
    "no gradient",
    "not finite",
    "unknown expert",
)
BARE = ("wrong splits", "other rows", "other collective")  # of the bare all-to-all


@dataclass(frozen=True)
class Fault:
    kind: str
    world: int
    culprit: int
    ranks_per_node: int = 2
    algorithm: str = "dedup"
    chunks: int = 1
    layer: int = 1
    phase: str = "dispatch"
    timeout_s: float = 5.0


def run_fault(fault: Fault) -> list[dict[str, Any]]:
    """What each rank answers; None for a lost culprit. A rank that hangs or dies of itself raises here."""
    lost = (fault.culprit,) if fault.kind in LOST else ()
    job = collectives if fault.kind in BARE else layers
    return run_distributed(answer, fault.world, job, fault, timeout=60 + 2 * fault.timeout_s, lost=lost)


def answer(job: Callable[[Topology, Fault], None], fault: Fault) -> dict[str, Any]:
    """Run the job on this rank; the exception that ended it, if any, and the seconds since the faulty step began."""
    topology = Topology.discover(fault.ranks_per_node, timeout_s=fault.timeout_s)
    started = time.monotonic()
    try:
        job(topology, fault)
        error = None
    except Exception as caught:
        error = caught
    dist.destroy_process_group()  # no barrier with ranks that are no more
    seconds = time.monotonic() - started
    return {"type": _kind_of(error), "message": str(error), "seconds": seconds}


def _kind_of(error: Exception | None) -> str:
    return "CommError" if isinstance(error, CommError) else type(error).__name__


def layers(topology: Topology, fault: Fault) -> None:
    """Three steps of the job, the second with the fault."""
    dispatchers = build_layers(topology, fault)
    step(topology, dispatchers, fault, guilty=False)
    guilty = topology.rank == fault.culprit
    if guilty:
        misbehave_in_transport(fault)
        if fault.kind.startswith("other "):
            dispatchers[fault.layer] = build_layers(topology, other_settings(fault))[fault.layer]
    step(topology, dispatchers, fault, guilty)
    if guilty and fault.kind == "leaves":
        return
    step(topology, dispatchers, fault, guilty=False)


def build_layers(topology: Topology, fault: Fault, wires: Wires | None = None) -> list[TokenDispatcher]:
    if fault.kind == "other wire" and fault.phase == "changed":
        wires = Wires(combine=HopWires("bf16", "bf16"))
    return [
        build_dispatcher(
            fault.algorithm, topology, 2 * topology.world_size, chunks=fault.chunks, wires=wires, label=f"layer {i}"
        )
        for i in range(LAYERS)
    ]


def other_settings(fault: Fault) -> Fault:
    if fault.kind == "other chunks":
        return replace(fault, chunks=fault.chunks + 1)
    if fault.kind == "other algorithm":
        return replace(fault, algorithm="flat" if fault.algorithm != "flat" else "dedup")
    return replace(fault, phase="changed") if fault.kind == "other wire" else fault


def step(topology: Topology, dispatchers: list[TokenDispatcher], fault: Fault, guilty: bool) -> None:
    kind = fault.kind if guilty else ""
    x_ND = torch.randn(N, D, requires_grad=True)
    with announce_failure(topology, "step"), torch.set_grad_enabled(kind != "no gradient"):
        y_ND = x_ND
        for i, dispatcher in enumerate(dispatchers):
            y_ND = layer(y_ND, dispatcher, kind if i == fault.layer else "")
    if kind not in ("skips a backward", "leaves", "no gradient"):
        with announce_failure(topology, "step, backward"):
            y_ND.square().sum().backward()


def layer(x_ND: torch.Tensor, dispatcher: TokenDispatcher, kind: str) -> torch.Tensor:
    """x + MoE(x), or what the culprit makes of it."""
    experts_of_all, k = dispatcher.num_experts, 1 if kind == "other top-k" else K
    ids_NK = torch.rand(N, experts_of_all).topk(k).indices
    # Weights depend on the tokens, as a router's do.
    weights_NK = x_ND[:, :k].sigmoid()
    if kind in ("skips a layer", "leaves"):
        return x_ND
    if kind == "skips a combine":
        dispatcher.dispatch(x_ND, ids_NK, weights_NK)
        return x_ND
    tokens = {
        "other width": lambda: torch.cat([x_ND, x_ND], dim=1),
        "other dtype": x_ND.double,
        "detaches a layer": x_ND.detach,
        "not finite": lambda: x_ND.masked_fill(torch.arange(N)[:, None] == 3, float("nan")),
    }.get(kind, lambda: x_ND)()
    if kind == "other weights":
        weights_NK = weights_NK.double()
    if kind == "unknown expert":
        ids_NK[2, 1] = experts_of_all

    def experts(rows_RD: torch.Tensor, counts: list[int]) -> torch.Tensor:
        if kind == "fails in an expert":
            raise ArithmeticError("broken expert")
        if kind == "returns too few rows":
            return rows_RD[:-1].tanh()
        out_RD = rows_RD.tanh()
        if kind == "fails in an expert's backward":
            out_RD.register_hook(_broken)
        return out_RD

    y_ND, _ = dispatcher.run(tokens, ids_NK, weights_NK, experts)
    return x_ND + y_ND


def _broken(grad: torch.Tensor) -> None:
    raise ArithmeticError("broken backward")


def misbehave_in_transport(fault: Fault) -> None:
    """Kill or stop this process when it comes to the fault's layer and phase."""
    if fault.kind not in LOST:
        return
    number = signal.SIGKILL if fault.kind.startswith("killed") else signal.SIGSTOP
    start = Channel.start

    def start_and_go(channel: Channel, *args: Any, **options: Any) -> Any:
        hit = channel.label == f"layer {fault.layer}" and args[3] == fault.phase
        if hit and fault.kind.endswith("before"):
            os.kill(os.getpid(), number)
        pending = start(channel, *args, **options)
        if hit:
            os.kill(os.getpid(), number)
        return pending

    Channel.start = start_and_go  # type: ignore[method-assign]


def collectives(topology: Topology, fault: Fault) -> None:
    """The bare all-to-all, right and then wrong."""
    name = "flat" if fault.algorithm == "flat" else "two_level"
    all_to_all = build_all_to_all(name, topology, label=f"layer {fault.layer}")
    counts = torch.full((topology.world_size,), 2)
    rows = torch.ones(2 * topology.world_size, D)
    all_to_all(rows, counts)
    if topology.rank == fault.culprit:
        if fault.kind == "wrong splits":
            counts[0] += 1
        if fault.kind == "other rows":
            rows = rows.double() if fault.chunks > 1 else rows[:, :-1]
        if fault.kind == "other collective":
            layer(rows[:N], build_layers(topology, fault)[fault.layer], "")
    all_to_all(rows, counts)


def accused(message: str) -> list[set[int]]:
    """The ranks that a message speaks of, mention by mention, without its own and the list of all that took part."""
    _, _, text = message.partition(": ")
    text = re.sub(r"the exchange among ranks \[[\d, ]*\] failed", "", text)
    mentions = re.findall(r"ranks? (\d+|\[[\d, ]*\])", text)
    return [set(map(int, re.findall(r"\d+", mention))) for mention in mentions]


def judge(fault: Fault, answers: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the survivors' answers; nothing if each raised in time and named the culprit."""
    problems = []
    for rank, given in enumerate(answers):
        if rank == fault.culprit:
            if given is not None and fault.kind != "leaves" and given["type"] == "NoneType":
                problems.append(f"rank {rank}, the culprit, went on")
            continue
        message = given["message"]
        if given["type"] != "CommError":
            problems.append(f"rank {rank} raised {given['type']}: {message}")
        elif not re.match(rf"rank {rank}, layer \d, ({'|'.join(PHASES)}|all-to-all): ", message):
            problems.append(f"rank {rank} names no layer and phase of its own: {message}")
        elif not any(fault.culprit in ranks for ranks in accused(message)):
            problems.append(f"rank {rank} does not name rank {fault.culprit}: {message}")
        if given["seconds"] > fault.timeout_s + max(2.5, fault.timeout_s / 10) + SLACK_S:
            problems.append(f"rank {rank} took {given['seconds']:.1f} s")
    return [f"{problem} ({asdict(fault)})" for problem in problems]


def main(timeout_s: float) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    topology = Topology.discover(timeout_s=timeout_s)
    healthy = Fault("none", topology.world_size, culprit=-1)
    dispatchers = build_layers(topology, healthy)
    while True:
        step(topology, dispatchers, healthy, guilty=False)
        print("stepped", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
