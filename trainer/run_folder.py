"""The run folder: config.yaml, metrics.jsonl, summary.json, checkpoints/, report.html, the tracker's files."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from twohop.trainer.config import Config
from twohop.trainer.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"


def open_run(config: Config) -> Path:
    """Decide the folder of a run, make it if it is new, and set `config.resume` to the folder it continues, or null.

    One process of the run calls this. A new folder gets its config.yaml here, a continued one after its checkpoint
    has been loaded (`write_config`): a run that turns out to be of another model must not lose its own.

    Raises:
        CheckpointError: `resume` names no run with a checkpoint.
        ConfigError: `run.dir` holds a run already and `resume` does not say to continue it; or it cannot be written.
    """
    if config.resume == "auto":
        run_dir = _newest(config)
        if run_dir is None:
            print(f"resume=auto: no checkpoint in {_home(config)}, so this run starts fresh", flush=True)
    elif config.resume is not None:
        run_dir = Path(config.resume)
        if not has_checkpoint(run_dir):
            raise CheckpointError(f"resume={config.resume}: {_lack(run_dir)}; name a run folder, or use resume=auto")
    else:
        run_dir = None

    if run_dir is not None:
        config.resume = str(run_dir)
        return run_dir
    config.resume = None
    try:
        run_dir = _make(config)
        write_config(run_dir, config)
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be written ({error.strerror}); choose another run.root or run.dir"
        ) from None
    return run_dir


def write_config(run_dir: Path, config: Config) -> None:
    """Write run_dir/config.yaml: everything that decided the run, so that other commands need only the folder."""
    (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_config(run_dir: Path) -> DictConfig:
    """The configuration of a run, as plain values that the typed schema has yet to judge.

    Raises:
        ConfigError: the folder is no run folder, or its config.yaml is damaged.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"run={run_dir}: {_lack(run_dir)}; name a folder that `twohop train` has made")
    try:
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: damaged ({str(error).splitlines()[0]}); restore it or train again") from None
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: damaged (no keys and values); restore it or train again")
    return config


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a checkpoint has been written there; a hidden folder is one that was never finished."""
    return any(True for _ in _visible_folders(run_dir / CHECKPOINTS))


def _home(config: Config) -> Path:
    return Path(config.run.root, config.run.name) if config.run.dir is None else Path(config.run.dir)


def _newest(config: Config) -> Path | None:
    candidates = [_home(config)] if config.run.dir is not None else sorted(_visible_folders(_home(config)))
    return next((run_dir for run_dir in reversed(candidates) if has_checkpoint(run_dir)), None)


def _make(config: Config) -> Path:
    """A new folder root/name/time, or `run.dir`."""
    if config.run.dir is not None:
        run_dir = Path(config.run.dir)
        if has_checkpoint(run_dir):
            raise ConfigError(
                f"run.dir={run_dir} holds a run already: add resume=auto to continue it, or choose another"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        return run_dir
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        run_dir = _home(config) / (now if attempt == 1 else f"{now}_{attempt}")
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            continue
    raise ConfigError(f"run.root={config.run.root}: no free name for a run folder at {now}; set run.dir")


def _visible_folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _lack(run_dir: Path) -> str:
    if not run_dir.is_dir():
        return "no such folder"
    return "it holds no config.yaml" if not (run_dir / CONFIG_FILE).is_file() else "it holds no checkpoint"
