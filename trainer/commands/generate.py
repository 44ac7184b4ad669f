"""`twohop generate run=DIR generate.prompt='def '`: text from a run's newest checkpoint."""

import re

from twohop.trainer.stored import run_stored

WORKER = "twohop.trainer.launching.workers:generate"
PROMPT = "generate.prompt="


def main(args: list[str]) -> int:
    """Sample from a run's model; return the exit code."""
    return run_stored("generate", [_quote_prompt(arg) for arg in args], WORKER)


def _quote_prompt(arg: str) -> str:
    """A prompt is text as it stands: quoted for Hydra, which would cut spaces, refuse parentheses and fill in ${…}."""
    if not arg.startswith(PROMPT):
        return arg
    # Both grammars escape with a backslash, and take backslashes for themselves only before what they escape.
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", arg.removeprefix(PROMPT))
    quoted = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + (m[2] and r"\""), literal)
    return f'{PROMPT}"{quoted}"'
