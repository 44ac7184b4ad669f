"""Workers for the tests of the launcher; the launched processes import them by name."""

import os
import signal
import time
from pathlib import Path

from twohop.trainer.config import Config
from twohop.trainer.errors import DataError


def answer(config: Config, run_dir: Path) -> dict:
    """What a worker sees, and a sum that needs all of them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    seen = {name: os.environ[name] for name in (*names, "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")}

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {"steps": config.train.steps, "run_dir": str(run_dir), "sum_of_ranks": total.item(), **seen}


def own_pid(config: Config, run_dir: Path) -> dict:
    return {"pid": os.getpid()}


def refuse_on_rank_1(config: Config, run_dir: Path) -> dict:
    """Rank 1 refuses its input; rank 0 loses its peer in a collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise DataError("data.files=['gone.txt']: no such file")
    dist.barrier()
    return {}


def break_on_rank_1(config: Config, run_dir: Path) -> dict:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ZeroDivisionError("the first cause")
    dist.barrier()
    return {}


def kill_rank_1(config: Config, run_dir: Path) -> dict:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return {}


def wait_to_be_stopped(config: Config, run_dir: Path) -> dict:
    Path(run_dir, f"pid-{os.getpid()}").touch()
    time.sleep(60)
    return {}


def refuse_dense(config: Config, run_dir: Path) -> dict:
    """A job of a sweep that fails for one of its models."""
    if config.model.name == "dense":
        raise DataError("no dense models today")
    Path(run_dir, "trained").write_text(config.model.name)
    return {"valid_loss": 1.0}
