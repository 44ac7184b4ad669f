"""`twohop generate run=DIR generate.prompt='def '`: text from a run's newest checkpoint."""

import re

from twohop.trainer.stored import run_stored

WORKER = "twohop.trainer.workers:generate"
PROMPT = "generate.prompt="


def main(args: list[str]) -> int:
    """Sample from a run's model; return the exit code."""
    return run_stored("generate", [_quote_prompt(arg) for arg in args], WORKER)


def _quote_prompt(arg: str) -> str:
    """A prompt is text as it stands: quoted for Hydra's grammar, which would cut spaces and refuse parentheses."""
    prompt = arg.removeprefix(PROMPT)
    if prompt == arg or prompt[:1] in ('"', "'"):
        return arg
    escaped = re.sub(r'(\\*)(")', r"\1\1\\\2", prompt)  # a quote is escaped, and backslashes before it are doubled
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f'{PROMPT}"{escaped}{escaped[len(escaped) - trailing :]}"'
