"""DeepSpeed's configuration, derived from ours. Imports neither torch nor DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from twohop.trainer.config import Config

DEEPSPEED_CONFIG_FILE = "ds_config.json"  # in the run folder
BUCKET_ELEMENTS = 8 << 20  # numbers that travel in one message: 32 MiB of fp32, as with the engine ddp


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets with engine=deepspeed on `world_size` ranks."""
    train, stage = config.train, config.engine.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {
            "reduce_scatter": True,  # with MoE layers nothing else is tested, DeepSpeed says
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "compute_grad_norm": False,  # the engine computes the norm, in fp64
        }
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // (train.micro_batch * world_size),
        # The loss comes divided by the targets of the global batch. The mean would divide experts by the number of all
        # ranks, although only those with a copy are summed.
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,  # the engine clips by its norm: without ZeRO, DeepSpeed's is wrong for experts
        "communication_data_type": "fp32",
        "bf16": {"enabled": False},  # engine.precision=bf16 is autocast over fp32 parameters, as with other engines
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def write_deepspeed_config(run_dir: Path, config: Config, world_size: int) -> None:
    """Write run_dir/ds_config.json, if the engine is DeepSpeed."""
    if config.engine.name == "deepspeed":
        text = json.dumps(deepspeed_config(config, world_size), indent=2)
        (run_dir / DEEPSPEED_CONFIG_FILE).write_text(text + "\n")
