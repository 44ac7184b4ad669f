"""The sides of train.py. All are workers of `launching.launch`, which gives them the same allocator and threads.

A side trains `config.train.steps` steps from the weights of `config.seed` on the batches of `config.data`, with the
same optimizer and learning rates, and returns the loss of each step and when steps ended (rank 0's).

Shapes: B sequences, T positions, D width.
"""

import contextlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from step_floor import MatmulFloor
from torch import Tensor, nn

from twohop.models.feed_forward import FeedForward
from twohop.models.moe import MoELayer
from twohop.trainer.config import Config, ExportConfig, OptimConfig, TrackerConfig
from twohop.trainer.data.loader import Step
from twohop.trainer.exporters.hf import export_hf
from twohop.trainer.initial import start_weights
from twohop.trainer.launching import workers
from twohop.trainer.monitoring.resources import peak_memory
from twohop.trainer.optimizers.schedule import lr_factor
from twohop.trainer.setup import Run, set_up
from twohop.trainer.trackers import TRACKERS
from twohop.trainer.world import gather_objects, join_world, leave_world, sum_over_world

OPTIONS = "side.json"  # in a side's folder: which one it is, and what it is told beyond the configuration


class Stopwatch:
    """Notes when steps end and what their losses were; the first ones must be as the side's options expect them."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.expected: list[tuple[float, float]] = list(zip(options["expected"], options["tolerances"], strict=False))
        self.losses: list[float] = []
        self.ends: list[float] = []

    def lap(self, loss: float) -> None:
        """The end of a step. Raises an AssertionError if this side computes something else than the first one did."""
        step = len(self.losses)
        if step < len(self.expected):
            wanted, tolerance = self.expected[step]
            assert math.isclose(loss, wanted, rel_tol=tolerance), f"step {step + 1}: loss {loss}, not {wanted}"
        self.losses.append(loss)
        self.ends.append(time.perf_counter())

    def log(self, step: int, values: dict[str, float]) -> None:
        """As a tracker of a run, which hears of a step when the loop has done everything for it."""
        if "train/loss" in values:
            # The loss of the targets and the routers' one, as the others report it.
            self.lap(values["train/loss"] + values["train/aux_loss"])

    def finish(self, summary: dict[str, Any]) -> None:
        """See `twohop.trainer.trackers.Tracker`."""
        _stopwatches.append(self)

    def result(self) -> dict[str, Any]:
        return {"losses": self.losses, "ends": self.ends}


_stopwatches: list[Stopwatch] = []  # of runs of this process that have ended


def start(config: TrackerConfig, run_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> Stopwatch:
    """See `twohop.trainer.trackers`."""
    return Stopwatch(read_options(run_dir))


def read_options(directory: Path) -> dict[str, Any]:
    return json.loads((directory / OPTIONS).read_text())


def run(config: Config, directory: Path) -> dict[str, Any]:
    """The worker. Every rank calls it; rank 0's result counts."""
    with contextlib.redirect_stdout(io.StringIO()):  # all of them print as they go
        result = SIDES[read_options(directory)["side"]](config, directory)
    return {**result, "memory": peak_memory(torch.device("cpu"))}


# -- the sides -------------------------------------------------------------------------------------------------------


def ours(config: Config, directory: Path) -> dict[str, Any]:
    """The worker of `twohop train`, whole; a tracker notes when its loop ends a step."""
    TRACKERS["stopwatch"] = __name__
    config.tracker.name = "stopwatch"
    workers.train(config, directory)
    return _stopwatches[-1].result() if _stopwatches else {}


def transformers_loop(config: Config, directory: Path) -> dict[str, Any]:
    """The exported model as a class of transformers, in the loop that its users write."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    options = read_options(directory)
    with opened(config, directory) as run:
        export_hf(run, ExportConfig(out=str(directory / "hf")))
        model = AutoModelForCausalLM.from_pretrained(
            directory / "hf", dtype=torch.float32, experts_implementation=options["experts"]
        ).train()
        optimizer = adamw(decay_groups(model.named_parameters(), config.optim), config.optim)
        watch = Stopwatch(options)
        for number in range(config.train.steps):
            data = run.loader.step(number)
            loss = torch.zeros(())
            for micro in data.micro_batches:
                batch = micro.load()
                logits_BTV = model(input_ids=batch.inputs["ids_BT"], use_cache=False).logits
                part = F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets.flatten(), reduction="sum")
                part = part / data.targets
                part.backward()
                loss += part.detach()
            if config.optim.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            set_lr(optimizer, config, number)
            optimizer.step()
            optimizer.zero_grad()
            watch.lap(loss.item())
    return watch.result()


def deepspeed_engine(config: Config, directory: Path) -> dict[str, Any]:
    """Our Transformer with DeepSpeed's MoE layers in place of ours, trained by DeepSpeed's engine."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with opened(config, directory) as run:
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for a minute
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        layers = use_deepspeed_layers(run)
        groups = decay_groups(run.model.named_parameters(), config.optim)
        engine, optimizer, *_ = deepspeed.initialize(
            model=run.model,
            optimizer=adamw(split_params_into_different_moe_groups_for_optimizer(groups), config.optim),
            config={
                "train_batch_size": config.train.global_batch,
                "train_micro_batch_size_per_gpu": config.train.micro_batch,
                "gradient_clipping": config.optim.clip_norm or 0.0,
                "zero_optimization": {"stage": 0},  # nothing to share out that would not have to come back
            },
            dist_init_required=False,
        )
        watch = Stopwatch(read_options(directory))
        for number in range(config.train.steps):
            step: Step = run.loader.step(number)
            loss = torch.zeros((), dtype=torch.float64)
            for micro in step.micro_batches:
                batch = micro.load()
                logits_BTV = engine(**batch.inputs).logits
                part = F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets.flatten())
                aux = sum(layer.take_loss() for layer in layers)
                engine.backward(part + aux)
                loss += (part + aux).detach() * micro.targets / step.targets
                set_lr(optimizer, config, number)
                engine.step()
            sum_over_world(loss, "loss")
            watch.lap(loss.item())
    return watch.result()


def matmul_floor(config: Config, directory: Path) -> dict[str, Any]:
    """The dense matmuls of a step alone: the seconds of each repeat, of the slowest rank."""
    options, device = read_options(directory), join_world(config.comm)
    step = MatmulFloor(set_up(config, directory, device).config, options["kept"])
    seconds = []
    for _ in range(options["repeats"] + 1):
        gather_objects(None)
        begin = time.perf_counter()
        step.run()
        seconds.append(max(gather_objects(time.perf_counter() - begin)))
    leave_world()
    return {"seconds": seconds[1:]}  # the first one touches its memory for the first time


# -- what they share -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(config: Config, directory: Path) -> Iterator[Run]:
    """A run at its start: data, and a model with the weights of the seed."""
    device = join_world(config.comm)
    run = set_up(config, directory, device)
    start_weights(run)
    run.model.train()
    yield run
    gather_objects(None)
    leave_world()


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=config.fused)


def decay_groups(named: Any, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices decay, norms do not. No side has biases."""
    parameters = [parameter for _, parameter in named]
    matrices, others = ([p for p in parameters if (p.dim() > 1) is wanted] for wanted in (True, False))
    return [
        {"params": matrices, "weight_decay": config.weight_decay, "name": "matrices"},
        {"params": others, "weight_decay": 0.0, "name": "others"},
    ]


def set_lr(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = config.optim.lr * lr_factor(step, config.train.steps, config.schedule)


def use_deepspeed_layers(run: Run) -> list["DeepSpeedLayer"]:
    """Replace every MoE layer of the model. Every rank must call this."""
    layers = []
    for block in run.model.blocks:
        if block.is_moe:
            block.moe = DeepSpeedLayer(run.config, block.moe)
            layers.append(block.moe)
    return layers


class DeepSpeedLayer(nn.Module):
    """`deepspeed.moe.layer.MoE` with the weights of an `MoELayer`, in its place."""

    def __init__(self, config: Config, layer: MoELayer) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        moe, dispatcher = config.model.moe, layer.dispatcher
        width = moe.ffn_dim or config.model.ffn_dim
        self.moe = MoE(
            hidden_size=config.model.dim,
            expert=FeedForward(config.model.dim, width, config.model.activation),
            num_experts=dispatcher.num_experts,
            ep_size=dispatcher.topology.ep_size,
            k=moe.router.top_k,
            capacity_factor=moe.capacity_factor or 1.0,
            min_capacity=moe.min_capacity,
            drop_tokens=moe.capacity_factor is not None,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.residual = layer.residual
        self.loss_weight = moe.router.load_balance_loss
        self._loss = torch.zeros(())
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(layer.router.gate.weight)
            for e, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
                expert.up.weight.copy_(layer.experts.up[e])
                expert.down.weight.copy_(layer.experts.down[e])

    def forward(self, x_BTD: Tensor, about: Any) -> tuple[Tensor, None]:
        """As `MoELayer`, but for the statistics."""
        y_BTD, loss, _ = self.moe(x_BTD)
        self._loss = loss * self.loss_weight
        if self.residual is not None:
            y_BTD = self.residual(x_BTD, y_BTD, self.residual.mlp(x_BTD))
        return y_BTD, None

    def take_loss(self) -> Tensor:
        """The router's loss of the last pass."""
        return self._loss


SIDES: dict[str, Callable[[Config, Path], dict[str, Any]]] = {
    "ours": ours,
    "transformers": transformers_loop,
    "deepspeed": deepspeed_engine,
    "floor": matmul_floor,
}
