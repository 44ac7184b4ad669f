"""Commands on a run that exists: `run=DIR` names its folder, and its config.yaml is what overrides are laid over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from twohop.trainer.app import run_app
from twohop.trainer.clusters.nodes import find_nodes
from twohop.trainer.config import ClusterConfig, Config, DistillConfig, InitConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.launching.launch import preloading, start, world_size
from twohop.trainer.run_folder import read_config

WITHOUT_RUN = ("-h", "--help", "--hydra-help", "--version")


def run_stored(
    command: str,
    args: list[str],
    worker: str,
    schema: type[Config] = Config,
    check: Callable[[Any], None] | None = None,
) -> int:
    """Run `worker` on a stored run's configuration; return the exit code.

    Args:
        command: also the primary configuration, configs/<command>.yaml, which includes `stored_run`.
        args: with `run=DIR` among Hydra's arguments.
        worker: `"module:function"`, called on every rank as `worker(config, run_dir)`.
        schema: `Config`, or a subclass with keys of this command.
        check: refuses impossible values of these keys with a ConfigError.
    """
    helping = any(arg in WITHOUT_RUN for arg in args)
    run_dir, overrides = (Path(), args) if helping else take_run(command, args)
    stored = {} if helping else read_config(run_dir)
    engine = stored.get("engine")
    if isinstance(engine, DictConfig) and any(arg.startswith(("engine=", "engine.name=")) for arg in overrides):
        # All but the precision are options of the engine by which it was trained.
        stored["engine"] = OmegaConf.masked_copy(engine, "precision")
    ConfigStore.instance().store(name="stored_run", node=stored, provider="twohop")

    def task(config: Config, sweep_dir: Path | None) -> float | None:
        config.init = InitConfig()  # its weights are in the checkpoint
        config.distill = DistillConfig()  # a teacher teaches in training alone, and may be gone by now
        config.cluster = ClusterConfig()  # where it was trained is no matter here
        config.train.compile = config.engine.fp8_experts = False  # neither is used outside of training
        nodes = find_nodes(config)
        with preloading(worker, config.launch):
            from twohop.trainer.validate.groups import validate  # needs torch, which `--help` does not

            if check is not None:
                check(config)
            validate(config, world_size(config.launch, nodes), training=False)
            return start(worker, config, run_dir, nodes).get("valid_loss")

    return run_app(command, schema, overrides, task)


def take_run(command: str, args: list[str]) -> tuple[Path, list[str]]:
    """The folder of `run=DIR`, and the other arguments.

    Raises:
        ConfigError: no folder is named, or it does not exist.
    """
    named = [arg.removeprefix("run=") for arg in args if arg.startswith("run=")]
    if len(named) != 1 or not named[0]:
        raise ConfigError(f"twohop {command} needs one run folder: twohop {command} run=DIR")
    run_dir = Path(named[0]).expanduser()
    if not run_dir.is_dir():
        raise ConfigError(f"run={named[0]}: no such folder; name one that `twohop train` has made")
    return run_dir, [arg for arg in args if not arg.startswith("run=")]
