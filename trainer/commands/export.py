"""`twohop export run=DIR out=DIR`: a run's model in another form; `format` says which."""

from twohop.trainer.config import ExportConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.stored import run_stored
from twohop.trainer.validate.names import check_name

WORKER = "twohop.trainer.launching.workers:export"


def main(args: list[str]) -> int:
    """Export a run with the processes it was trained with, unless overrides say otherwise; return the exit code."""
    return run_stored("export", args, WORKER, ExportConfig, check)


def check(config: ExportConfig) -> None:
    """Raise a ConfigError for a form that there is not, or for no place to write to."""
    from twohop.trainer.exporters import EXPORTERS

    check_name("format", config.format, EXPORTERS)
    if config.out is None:
        raise ConfigError("twohop export needs a folder to write: twohop export run=DIR out=DIR")
