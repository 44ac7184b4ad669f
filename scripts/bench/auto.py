#!/usr/bin/env python3
"""How well `comm=auto` chooses, over emulated clusters of several shapes and rates.

    scripts/bench/auto.py --json build/auto.json

Runs `scripts/netlab … -- twohop bench dispatch` for each cluster: the cost model is probed there, then every way
(algorithm x chunks) is timed in turn at every size. Regret is the time of the way that the model chose over the
time of the fastest one, minus 1. Needs root and iproute2, and about a quarter of an hour on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NETLAB = Path(__file__).parents[1] / "netlab"
# (nodes, ranks on each, rate of a link)
CLUSTERS = ((2, 4, "100mbit"), (2, 4, "500mbit"), (4, 2, "200mbit"), (2, 2, "1gbit"))
GRID = ("tokens=[32,128,512]", "top_k=[1,2,4,8]", "dim=[512]", "experts=64", "chunks=[1,2,4,8]")


def main() -> int:
    """Measure all clusters, print a table of regrets, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything that was measured there")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each place (default: 3)")
    options = parser.parse_args()
    results = [measure(*cluster, options.repeats) for cluster in CLUSTERS]

    print("| nodes x ranks | rate | places | median regret | 95th percentile | largest | prediction error |")
    print("|---|---|---|---|---|---|---|")
    for (nodes, ranks, rate), result in zip(CLUSTERS, results, strict=True):
        print(row(f"{nodes} x {ranks}", rate, [result]))
    print(row("all", "", results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"clusters": CLUSTERS, "grid": GRID, "results": results}, indent=1) + "\n")
    return 0


def measure(nodes: int, ranks: int, rate: str, repeats: int) -> dict[str, Any]:
    """What `twohop bench dispatch` wrote on one cluster."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        cluster = [f"--nodes={nodes}", f"--ranks-per-node={ranks}", f"--rate={rate}"]
        bench = ["twohop", "bench", "dispatch", *GRID, f"repeats={repeats}", f"json={out}"]
        subprocess.run([NETLAB, *cluster, "--", *bench], check=True, stdout=sys.stderr)
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def row(name: str, rate: str, results: list[dict[str, Any]]) -> str:
    """One line of the table, over the places of some clusters."""
    regrets = sorted(regret for result in results for regret in result["regrets"])
    errors = [abs(t["predicted_s"] / t["measured_s"] - 1) for result in results for t in result["timings"]]
    high = statistics.quantiles(regrets, n=20, method="inclusive")[-1]
    return (
        f"| {name} | {rate} | {len(regrets)} | {statistics.median(regrets):.1%} | "
        f"{high:.1%} | {regrets[-1]:.1%} | {statistics.median(errors):.0%} |"
    )


if __name__ == "__main__":
    sys.exit(main())
