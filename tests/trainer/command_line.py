"""A command line as a user types it; see `started` in conftest.py for what it would run."""

import shlex

from twohop.trainer import cli


def run(line: str, capfd) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    try:
        code = cli.run(shlex.split(line))
    except SystemExit as stop:  # Hydra leaves this way after --help
        code = stop.code or 0
    out, err = capfd.readouterr()
    return code, out, err
