#!/usr/bin/env python3
"""What narrow wire formats between nodes do to the loss: the quickstart, once for each format, same seed.

    scripts/bench/wire_quality.py --json build/wire.json

Trains `experiment=quickstart` (300 steps, 4 processes as 2 nodes x 2 ranks) with wire=fp32, bf16 and fp8, prints a
table of validation loss and bytes between nodes, and ends with exit code 1 if a loss is off by more than 0.5 %.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FORMATS = ("fp32", "bf16", "fp8")
LIMIT = 0.005  # of the loss with fp32


def main() -> int:
    """Train once for each format and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the summaries of the runs there")
    parser.add_argument("overrides", nargs="*", help="for all runs, e.g. seed=1 train.steps=20")
    options = parser.parse_args()
    summaries = {name: train(name, options.overrides) for name in FORMATS}

    exact = summaries["fp32"]["valid_loss"]
    print("| wire | validation loss | difference | bytes between nodes |\n|---|---|---|---|")
    for name, summary in summaries.items():
        difference = summary["valid_loss"] / exact - 1
        crossed, _ = summary["traffic"]["between nodes"]
        print(f"| {name} | {summary['valid_loss']:.4f} | {difference:+.2%} | {crossed / 1e6:,.0f} MB |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(summaries, indent=1) + "\n")
    return int(any(abs(summary["valid_loss"] / exact - 1) > LIMIT for summary in summaries.values()))


def train(wire: str, overrides: list[str]) -> dict[str, Any]:
    """The summary of one run."""
    with TemporaryDirectory() as folder:
        command = ["twohop", "train", "experiment=quickstart", f"wire={wire}", f"run.dir={folder}", *overrides]
        subprocess.run(command, check=True, stdout=sys.stderr)
        summary: dict[str, Any] = json.loads((Path(folder) / "summary.json").read_text())
        return summary


if __name__ == "__main__":
    sys.exit(main())
