"""`twohop bench dispatch`: time every way to carry tokens, and how well the cost model chooses among them."""

from pathlib import Path

from twohop.comm.routes import ROUTES
from twohop.trainer.app import run_app
from twohop.trainer.cli import suggest
from twohop.trainer.config import BenchConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.launching.launch import start

WORKER = "twohop.trainer.bench:bench_dispatch"
WITHOUT_TARGET = ("-h", "--help", "--hydra-help", "--version")


def main(args: list[str]) -> int:
    """Run the benchmark `dispatch`; return the exit code."""
    if not args or (args[0] != "dispatch" and args[0] not in WITHOUT_TARGET):
        raise ConfigError("twohop bench needs to know what to time: twohop bench dispatch [key=value ...]")
    return run_app("bench", BenchConfig, args[1:] if args[0] == "dispatch" else args, bench)


def bench(config: BenchConfig, sweep_dir: Path | None) -> float | None:
    """Time the grid and return the median regret."""
    for name in config.algorithms:
        if name not in ROUTES:
            raise ConfigError(f"algorithms contains {name!r}{suggest(name, list(ROUTES))}; use {', '.join(ROUTES)}")
    return start(WORKER, config, None).get("median_regret")
