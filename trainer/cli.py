"""The command line: `twohop <command> [key=value …]`.

    twohop train model=pr_moe comm=dedup launch.nproc=4

Knows the commands' names only, so that `twohop --help` imports neither torch nor Hydra.
"""

import difflib
import os
import select
import sys
from collections.abc import Callable
from importlib import import_module

from twohop.trainer.clusters.step import adopt_step
from twohop.trainer.errors import UserError, WorkerError

COMMANDS = {
    "train": "train a model; starts its own worker processes, or joins torchrun's",
    "submit": "hand a run to SLURM or Kubernetes: cluster=slurm cluster.nodes=2 launch.nproc=8",
    "evaluate": "validation loss, perplexity and accuracy of a run: run=DIR",
    "generate": "text from the model of a run: run=DIR generate.prompt='def '",
    "export": "the model of a run for other programs, such as transformers: run=DIR out=DIR",
    "prepare": "write memory-mapped token files: data=text data.files=book.txt out=DIR",
    "report": "write report.html of a run: run=DIR",
    "plan": "memory, bytes and time of a run on a cluster, and the best choices: plan cluster.nodes=16",
    "bench": "time every way to carry tokens, against the cost model: bench dispatch launch.nproc=4",
}

USAGE = f"""\
twohop trains Mixture-of-Experts models; a token reaches its experts in at most two hops.

usage: twohop <command> [key=value ...]

{chr(10).join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())}

start here:
  twohop train experiment=quickstart                  PR-MoE on real text, 4 processes on this machine
  twohop train --help                                 groups, keys and useful overrides
  twohop train --cfg job                              the composed configuration, without a run
  twohop train --multirun model=moe,pr_moe comm=flat,dedup
  torchrun --nproc-per-node 4 -m twohop.trainer model=pr_moe comm=dedup
"""


def run(args: list[str]) -> int:
    """Run one command line (without the program's name) and return the exit code; errors go to stderr."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    command, *rest = args
    try:
        if command not in COMMANDS:
            raise UserError(f"no command {command!r}{suggest(command, COMMANDS)}; `twohop --help` lists them")
        main: Callable[[list[str]], int] = import_module(f"twohop.trainer.commands.{command}").main
        adopt_step()
        return main(rest)
    except UserError as error:
        # Under torchrun every rank sees the same command line, and under srun every task.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            complain(error)
        return 2
    except WorkerError as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        print("twohop: stopped by SIGINT", file=sys.stderr)
        return 130


def complain(error: Exception) -> None:
    """One line on stderr, after the traceback of the worker that failed, if there is one."""
    if isinstance(error, WorkerError) and error.traceback:
        print(error.traceback.rstrip(), file=sys.stderr)
    print(f"twohop: error: {error}", file=sys.stderr, flush=True)


def suggest(word: str, known: "list[str] | dict[str, str]") -> str:
    """A remark like `, did you mean 'train'?`, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def main(args: list[str] | None = None) -> None:
    """Console script `twohop`; `args` instead of the command line's.

    Ends silently, with code 1, if nobody reads on, as in `twohop train --help | head -1`: see the note on SIGPIPE in
    the documentation of Python's `signal`.
    """
    try:
        try:
            code = run(sys.argv[1:] if args is None else args)
        finally:
            sys.stdout.flush()  # here and not when the interpreter ends, where the error could not be caught
    except BrokenPipeError:
        if not _is_cut_off(sys.stdout.fileno()):  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        code = 1
    sys.exit(code)


def _is_cut_off(file: int) -> bool:
    """Whether nobody will read what is written to `file`."""
    poll = select.poll()
    poll.register(file, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
