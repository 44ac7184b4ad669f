"""`twohop report run=DIR`: write report.html of a run, also while it is training."""

from twohop.trainer.errors import ConfigError
from twohop.trainer.stored import take_run


def main(args: list[str]) -> int:
    """Write the report and print its path; return the exit code."""
    if {"-h", "--help"} & set(args):
        print("usage: twohop report run=DIR\n\nwrites DIR/report.html: loss, time by phase, expert load, bytes of hops")
        return 0
    from twohop.trainer.reports.report import write_report  # needs matplotlib, which `--help` does not

    run_dir, rest = take_run("report", args)
    if rest:
        raise ConfigError(f"{rest[0]}: twohop report takes run=DIR and nothing else")
    print(write_report(run_dir))
    return 0
