"""Where a run's time goes outside its steps: until the first one, for evaluations, checkpoints and the report.

    python scripts/bench/startup.py --json startup.json                           # starts, and a short run: two minutes
    python scripts/bench/startup.py --rounds 1 --steps 300 --every 100            # the quickstart to its end

Everything is seen from outside: a run by what appears in its folder. The limit of a start, `import torch` in as many
processes at once, is timed in turn with it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

POLL_S = 0.005  # between two looks into a run folder
PATIENCE_S = 900.0
DEFAULT_STEPS, DEFAULT_EVERY = 300, 100  # of the quickstart, to which shares of a shorter run are scaled
SHARES = ("evaluation", "checkpoint", "sample", "report")


def main(args: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure, print, and write the medians as JSON: {"commands" | "run": {what: seconds}, "shares": {what: part}}."""
    options = _options(args)
    commands: dict[str, list[float]] = {}
    runs: dict[str, list[float]] = {}
    with TemporaryDirectory(prefix="twohop-startup-") as folder:
        cache = Path(folder, "cache")
        first = Path(folder, "first")
        empty = watch_run([*_train(options, first, cache), "train.steps=1"], first)
        for number in range(options.rounds):
            for name, measure in _commands(options.nproc).items():
                commands.setdefault(name, []).append(measure())
            run_dir = Path(folder, str(number))
            for name, seconds in watch_run(_train(options, run_dir, cache), run_dir).items():
                runs.setdefault(name, []).append(seconds)
    result = {"commands": _medians(commands), "run": _medians(runs)}
    result["run"]["first step begins, data not prepared"] = empty["first step begins"]
    result["shares"] = shares(result["run"])
    _print(result, options.nproc)
    if options.json is not None:
        options.json.write_text(json.dumps({**result, "options": vars(options) | {"json": None}}, indent=2) + "\n")
    return result


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nproc", type=int, default=4, help="worker processes of a run")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=6, help="steps between evaluations, and between checkpoints")
    parser.add_argument("--json", type=Path, help="where to write the medians")
    parser.add_argument("overrides", nargs="*", help="of twohop train; by default the quickstart")
    return parser.parse_args(args)


def _commands(nproc: int) -> dict[str, Callable[[], float]]:
    """What is timed from start to end, by name."""
    python = [sys.executable, "-c"]
    return {
        "an empty interpreter": lambda: seconds_of([[*python, "pass"]]),
        "twohop --help": lambda: seconds_of([[*_twohop(), "--help"]]),
        "twohop train --cfg job": lambda: seconds_of([[*_twohop(), "train", "--cfg", "job"]]),
        "twohop train --help": lambda: seconds_of([[*_twohop(), "train", "--help"]]),
        "import torch": lambda: seconds_of([[*python, "import torch"]]),
        f"import torch, {nproc} at once": lambda: seconds_of([[*python, "import torch"]] * nproc),
    }


def _twohop() -> list[str]:
    """The installed program, or the module where it is not installed beside this interpreter."""
    program = Path(sys.executable).with_name("twohop")
    return [str(program)] if program.exists() else [sys.executable, "-m", "twohop.trainer"]


def seconds_of(commands: Sequence[Sequence[str]]) -> float:
    """Wall-clock seconds until all commands, started at once, have ended well."""
    began = time.perf_counter()
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    codes = [process.wait(timeout=PATIENCE_S) for process in started]
    seconds = time.perf_counter() - began
    if any(codes):
        raise SystemExit(f"{' '.join(commands[0])} ended with exit codes {codes}")
    return seconds


def _train(options: argparse.Namespace, run_dir: Path, cache: Path) -> list[str]:
    every = [f"train.steps={options.steps}", f"eval.every={options.every}", f"checkpoint.every={options.every}"]
    place = [f"run.dir={run_dir}", f"data.cache_dir={cache}"]
    run = options.overrides or ["experiment=quickstart"]
    return [*_twohop(), "train", *run, f"launch.nproc={options.nproc}", *every, *place]


def watch_run(command: Sequence[str], run_dir: Path) -> dict[str, float]:
    """Seconds of the parts of one run: {part: seconds}, of repeated ones their median.

    A run writes a record after each step, an evaluation's after it, renames a checkpoint when it is whole, and ends
    with a sample, summary.json and report.html.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen: dict[str, float] = {}  # what has appeared -> when
    records: list[dict] = []
    folder = RunFolder(run_dir)
    try:
        while process.poll() is None:
            if time.perf_counter() - began > PATIENCE_S:
                raise SystemExit(f"{' '.join(command)} has not ended after {PATIENCE_S:g} s")
            folder.look(seen, records, time.perf_counter() - began)
            time.sleep(POLL_S)
    finally:
        process.kill()
        process.wait()
    whole = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    folder.look(seen, records, whole)
    return _parts(seen, records, whole)


class RunFolder:
    """Tells what is new in a folder; reads each line of its metrics once, to take nothing from the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0  # in metrics.jsonl

    def look(self, seen: dict[str, float], records: list[dict], now: float) -> None:
        """Note what is new since the last look."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size > self._position:
            with metrics.open("rb") as file:
                file.seek(self._position)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]  # without a line that is still being written
            self._position += len(whole)
            for line in whole.splitlines():
                records.append(json.loads(line))
                seen[f"{records[-1]['kind']} {records[-1]['step']}"] = now
        for name in ("config.yaml", "summary.json", "report.html"):
            if name not in seen and (self.path / name).exists():
                seen[name] = now
        for checkpoint in self.path.glob("checkpoints/step-*"):
            seen.setdefault(f"checkpoint {int(checkpoint.name.removeprefix('step-'))}", now)


def _parts(seen: dict[str, float], records: list[dict], whole: float) -> dict[str, float]:
    steps = {record["step"]: record["step_s"] for record in records if record["kind"] == "train"}
    evaluated = [record["step"] for record in records if record["kind"] == "eval"]
    last = max(steps)
    return {
        "configuration is composed and checked": seen["config.yaml"],
        "first step begins": seen["train 1"] - steps[1],
        "first step": steps[1],
        "later step": statistics.median(list(steps.values())[1:] or steps.values()),
        "evaluation": statistics.median(seen[f"eval {step}"] - seen[f"train {step}"] for step in evaluated),
        "checkpoint": statistics.median(seen[f"checkpoint {step}"] - seen[f"eval {step}"] for step in evaluated),
        "sample": seen["summary.json"] - seen[f"checkpoint {last}"],
        "report": seen["report.html"] - seen["summary.json"],
        "leaving": whole - seen["report.html"],
        "whole run": whole,
    }


def shares(run: dict[str, float], steps: int = DEFAULT_STEPS, every: int = DEFAULT_EVERY) -> dict[str, float]:
    """The part of a run of so many steps, evaluated and saved every so many, that goes to what is no step."""
    times = dict.fromkeys(SHARES, 1) | dict.fromkeys(("evaluation", "checkpoint"), steps // every)
    seconds = {name: times[name] * run[name] for name in SHARES}
    start = run["first step begins"] + run["first step"] - run["later step"]
    whole = start + steps * run["later step"] + sum(seconds.values()) + run["leaving"]
    return {name: part / whole for name, part in {"start": start, **seconds}.items()}


def _medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def _print(result: dict[str, dict[str, float]], nproc: int) -> None:
    for name, seconds in (result["commands"] | result["run"]).items():
        print(f"{name:<40}{seconds:8.2f} s")
    beyond = result["run"]["first step begins"] - result["commands"][f"import torch, {nproc} at once"]
    print(f"{'a start beyond importing torch':<40}{beyond:8.2f} s   goal: below 10")
    for name, part in result["shares"].items():
        print(f"share of {DEFAULT_STEPS} steps: {name:<16}{part:8.2%}")
    together = sum(result["shares"][name] for name in SHARES)
    print(f"{'evaluation, checkpoint, sample, report':<40}{together:8.2%}   goal: below 5")


if __name__ == "__main__":
    main()
