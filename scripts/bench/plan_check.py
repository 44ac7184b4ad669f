#!/usr/bin/env python3
"""How well the simulator predicts dispatches on clusters that it has not seen.

    scripts/bench/plan_check.py --json build/plan_check.json

Times `twohop bench dispatch` on emulated clusters (scripts/netlab: root, iproute2). What the links of each cluster
carry is taken from the probe that the bench starts with, as `comm=auto` does. All other costs are fitted to the
settings of FIT; those of HELD_OUT, with other numbers of tokens, other K and another rate, are then predicted. The goal
is a median error of 10 % and none above 25 %. The machine must be idle: what is fitted is the processor time of
messages, and the script says what load it saw.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from twohop.comm.cost import Workload
from twohop.comm.network import Link, Network
from twohop.comm.shipment import Shipment
from twohop.comm.simulate import simulate

NETLAB = Path(__file__).parents[1] / "netlab"
DIM, EXPERTS = 512, 64


class Setting(NamedTuple):
    """A cluster, and what `twohop bench dispatch` times on it."""

    nodes: int
    ranks: int  # of each node
    rate_mbit: int
    tokens: tuple[int, ...]
    top_k: tuple[int, ...]


CHUNKS = (1, 4)
FIT = (
    Setting(2, 2, 100, (64, 512), (1, 8)),
    Setting(2, 2, 500, (64, 512), (1, 8)),
    Setting(2, 4, 200, (64, 512), (2,)),
    Setting(4, 1, 500, (64, 512), (1, 4)),
    Setting(4, 2, 100, (64, 512), (1, 4)),
)
HELD_OUT = (
    Setting(2, 2, 200, (256,), (2, 4)),
    Setting(2, 4, 100, (128, 256), (1, 4)),
    Setting(4, 2, 200, (256,), (2, 8)),
)
# What is fitted: seconds, or seconds for each byte; where the search begins.
FITTED = {
    "between.send_s": 1e-4, "between.receive_s": 1e-4, "between.latency_s": 1e-3,
    "inside.byte_s": 1e-9, "inside.send_s": 1e-4, "inside.receive_s": 1e-4, "inside.latency_s": 1e-4,
    "copied_byte_s": 1e-9, "exchange_s": 1e-3, "plan_s": 1e-3,
}  # fmt: skip
WAITS = ("between.latency_s", "inside.latency_s")  # all other costs are work of a processor


def main() -> int:
    """Measure, fit, predict; print a table of errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all times, measured and predicted, there")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each place (default: 5)")
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    seen, unseen = ([p for s in settings for p in measure(s, options.repeats)] for settings in (FIT, HELD_OUT))
    load.append(os.getloadavg()[0])
    print("measured; the fit takes a minute", file=sys.stderr)
    values = fit(seen)
    print(f"load average before and after: {load[0]:.1f}, {load[1]:.1f}")
    print(", ".join(f"{name} {value:.3g}" for name, value in zip(FITTED, values, strict=True)))
    for place in (*seen, *unseen):
        place["simulated_s"] = predict(place, values)
    print("| | places | median error | largest |\n|---|---|---|---|")
    for name, places in (("fitted", seen), ("held out", unseen)):
        print(row(name, places))
        for cluster, group in groupby(places, key=itemgetter("nodes", "ranks", "rate")):
            print(row("{} nodes of {} ranks, {} Mbit/s".format(*cluster), [*group]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"load": load, "fitted": dict(zip(FITTED, values, strict=True)), "seen": seen, "unseen": unseen}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def row(name: str, places: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""
    errors = [abs(place["simulated_s"] / place["measured_s"] - 1) for place in places]
    return f"| {name} | {len(places)} | {statistics.median(errors):.1%} | {max(errors):.1%} |"


def measure(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """What `twohop bench dispatch` measured, with the cluster that it was on, and what its probe saw of the links."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        cluster = [f"--nodes={setting.nodes}", f"--ranks-per-node={setting.ranks}", f"--rate={setting.rate_mbit}mbit"]
        grid = [f"tokens={[*setting.tokens]}", f"top_k={[*setting.top_k]}", f"chunks={[*CHUNKS]}", f"dim=[{DIM}]"]
        bench = ["twohop", "bench", "dispatch", *(item.replace(" ", "") for item in grid), f"experts={EXPERTS}"]
        command = [sys.executable, NETLAB, *cluster, "--", *bench, f"repeats={repeats}", f"json={out}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads(out.read_text())
    probed_s = found["model"]["levels"]["node"]["byte_s"] / setting.ranks  # the ranks of a node share its link
    cluster_of = {"nodes": setting.nodes, "ranks": setting.ranks, "rate": setting.rate_mbit, "link_byte_s": probed_s}
    return [timing | cluster_of for timing in found["timings"]]


def fit(places: Sequence[dict[str, Any]]) -> list[float]:
    """The values of FITTED, all positive, with the least squared relative error."""

    def errors(logarithms: np.ndarray) -> list[float]:
        values = [float(value) for value in np.exp(logarithms)]
        return [float(np.log(predict(place, values) / place["measured_s"])) for place in places]

    start = np.log(list(FITTED.values()))
    # Soft at 10 %: a place that another program disturbed shall not bend the others.
    found = least_squares(
        errors, start, loss="soft_l1", f_scale=0.1, bounds=(start - 12, start + 6), diff_step=1e-3, max_nfev=40
    )
    return [float(value) for value in np.exp(found.x)]


def predict(place: dict[str, Any], values: Sequence[float]) -> float:
    """Simulated seconds of a place."""
    size = 4.0 * place["dim"]
    work = Workload(place["tokens"], place["top_k"], EXPERTS, size, size, size)
    block = (place["nodes"], place["ranks"])
    shipment = Shipment.expected(work, block, place["algorithm"], place["chunks"])
    return simulate(shipment, network(place, values), work, backward=False).forward_s


def network(place: dict[str, Any], values: Sequence[float]) -> Network:
    """One link of each node, as it was probed but not above its nominal rate, and what is fitted.

    Fitted costs are those of a processor of its own; here all ranks of all nodes share those of one machine.
    """
    shared = max(1.0, place["nodes"] * place["ranks"] / len(os.sched_getaffinity(0)))
    byte_s = max(place["link_byte_s"], 8e-6 / place["rate"])
    parts: dict[str, dict[str, float]] = {"between": {"byte_s": byte_s}, "inside": {}, "": {}}
    for name, value in zip(FITTED, values, strict=True):
        level, _, key = name.rpartition(".")
        parts[level][key] = value if name in WAITS else shared * value
    return Network(Link(**parts["between"]), Link(**parts["inside"]), one_thread=True, **parts[""])  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
