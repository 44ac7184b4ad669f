"""`twohop prepare data=text data.files=book.txt out=DIR`: write memory-mapped token files for `data=tokens`."""

from pathlib import Path

from twohop.trainer.app import run_app
from twohop.trainer.config import PrepareConfig


def main(args: list[str]) -> int:
    """Tokenise a corpus; return the exit code."""
    return run_app("prepare", PrepareConfig, args, write_tokens)


def write_tokens(config: PrepareConfig, sweep_dir: Path | None) -> None:
    """Write the token files and say how to train from them."""
    from twohop.trainer.data import prepare  # needs torch, which `--help` does not
    from twohop.trainer.validate.data import check_data

    check_data(config.data)
    folder = prepare(config.data, None if config.out is None else Path(config.out).expanduser())
    print(f"{folder}: train from it with data=tokens data.files={folder}")
