"""A Hydra application for each command: compose the groups over the typed schema, validate, call the task.

Hydra's own errors of several lines become one `ConfigError` with a suggestion. Hydra writes no files of its own
except a sweep's folder; with --multirun, a job that fails is told about at the end and does not end the sweep.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twohop.trainer.cli import complain, suggest
from twohop.trainer.errors import ConfigError, UserError, WorkerError
from twohop.trainer.launching.launch import joins_outer_launcher
from twohop.trainer.sweep import SweepFolder, handing_on_stops, is_lost_job, print_jobs, record_job

# (configuration, folder of this job of a sweep or None) -> the value that a sweeper may optimise
Task = Callable[[Any, Path | None], float | None]


def run_app(command: str, schema: type, args: list[str], task: Task) -> int:
    """Run `task` on the configuration that `configs/<command>.yaml` and `args` make; return the exit code.

    Args:
        command: also the name of the primary configuration.
        schema: dataclass of the whole configuration; the task gets an instance of it.
        args: Hydra's arguments: overrides, --multirun, --cfg job, --help, …
        task: what to do with it.

    Raises:
        UserError: of the composition, or of the task when it is a single job.
    """
    if any(arg.startswith("--experimental-rerun") for arg in args):
        raise ConfigError(
            "--experimental-rerun would unpickle a file, which can run any code: use config.yaml of a run"
        )
    if joins_outer_launcher() and {"-m", "--multirun"} & set(args):
        raise ConfigError("--multirun under torchrun would make every rank its own sweep: run it without torchrun")
    refusals: list[Exception] = []  # of a single job; taken past Hydra, which would announce it in words of its own

    def job(composed: DictConfig) -> float | None:
        settings = HydraConfig.get()
        if settings.mode is not RunMode.MULTIRUN:
            return _shielded(lambda: task(to_config(composed, schema), None), refusals.append)
        folder, overrides = Path(settings.runtime.output_dir), list(settings.overrides.task)
        print(f"\nsweep: job {settings.job.num}  {' '.join(overrides)}", flush=True)
        errors: list[Exception] = []
        with handing_on_stops():
            value = _shielded(lambda: task(to_config(composed, schema), folder), errors.append)
        for error in errors:
            complain(error)
        record_job(folder, settings.job.num, overrides, value, errors[0] if errors else None)
        return value

    SweepFolder.latest = None
    ConfigStore.instance().store(name="schema", node=schema, provider="twohop")
    _call_hydra(command, args, job, schema)
    if refusals:
        raise refusals[0]
    return 0 if SweepFolder.latest is None else print_jobs(SweepFolder.latest)


def _shielded(job: Callable[[], float | None], fail: Callable[[Exception], None]) -> float | None:
    """A job's value; or None, which Optuna takes for a trial that failed, after `fail` got the error that ended it."""
    try:
        return job()
    except (UserError, WorkerError) as error:
        fail(error)
        return None


def _call_hydra(command: str, args: list[str], job: Callable[[DictConfig], Any], schema: type) -> None:
    application = hydra.main(version_base="1.3", config_path="pkg://twohop.configs", config_name=command)(job)
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"twohop {command}", *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors instead of printing them and leaving
    try:
        application()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, schema)) from None
    except AssertionError as error:
        if "Unexpected type for root: NoneType" not in str(error):
            raise
        raise ConfigError(_explain_null(args, schema)) from None  # OmegaConf has no better word for it
    except Exception as error:
        if not is_lost_job(error):
            raise
        raise WorkerError(f"a job of the sweep ended without an answer: {str(error).splitlines()[0]}") from None
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def to_config(composed: DictConfig, schema: type) -> Any:
    """The composed configuration as its dataclass, interpolations resolved.

    Raises:
        ConfigError: a key that nothing reads, or a value that its dataclass refuses.
    """
    for key in set(_keys(composed)) - set(_keys(OmegaConf.structured(schema))):
        raise ConfigError(f"unknown key {key!r}{_suggest_key(key, schema)}; `--cfg job` lists all")
    try:
        return OmegaConf.to_object(composed)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def explain(error: Exception, schema: type) -> str:
    """One line for what Hydra and OmegaConf say in several, with the known key that was probably meant."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if found := re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in", text):
        key = found.group(1) or found.group(2)
        return f"unknown key {key!r}{_suggest_key(key, schema)}; `--cfg job` lists all"
    if found := re.search(r"Could not find '([^']+)'", text):
        group, _, option = found.group(1).rpartition("/")
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        listed = f"; use one of {', '.join(options)}" if options else ""
        return f"{group}={option}: no such option{suggest(option, options)}{listed}"
    if isinstance(error, OverrideParseException):
        key, is_pair, value = error.override.partition("=")
        cure = f"""; a text with signs in it needs quotes twice: '{key}="{value}"'""" if is_pair else ""
        return f"{error.override}: not of the form key=value ({str(error).splitlines()[0]}){cure}"
    lines = [line.strip() for line in text.splitlines()]
    wanted = [
        line for line in lines if line and not re.match(r"full_key:|object_type=|reference_type=|See https", line)
    ]
    return ": ".join(wanted)


def _explain_null(args: Iterable[str], schema: type) -> str:
    """One line for an override of a key in a group that is null."""
    tree = OmegaConf.structured(schema)
    for arg in args:
        for group in (key for key in _keys(tree) if OmegaConf.select(tree, key) is None):
            if arg.startswith(f"{group}."):
                return f"{arg}: {group} is null here, so nothing in it can be changed: choose a preset that sets it"
    raise AssertionError(args)


def _suggest_key(key: str, schema: type) -> str:
    """The known key that looks most like `key`; a last part that is right, in the wrong place, counts more."""
    known = list(_keys(OmegaConf.structured(schema)))
    same_end = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return f", did you mean {same_end[0]!r}?" if same_end else suggest(key, known)


def _keys(node: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in node:
        yield f"{prefix}{key!s}"
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            if child._is_none():  # a group that may be null: what it could hold
                child = OmegaConf.structured(child._metadata.ref_type)
            yield from _keys(child, f"{prefix}{key!s}.")
