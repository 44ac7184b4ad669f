"""`twohop evaluate run=DIR`: validation loss and perplexity of a run's newest checkpoint."""

from twohop.trainer.stored import run_stored

WORKER = "twohop.trainer.launching.workers:evaluate"


def main(args: list[str]) -> int:
    """Evaluate a run with the processes it was trained with, unless overrides say otherwise; return the exit code."""
    return run_stored("evaluate", args, WORKER)
