"""Knowledge distillation: a trained run teaches a smaller model (Mixture-of-Students, Rajbhandari 2022).

The loss of the student is CE + aux + β · T² · KL(teacher ‖ student), the softmaxes of both at temperature T (Hinton
2015); in the staged form the teacher leaves after a part of the steps. A hint is the squared distance of the student's
state after one of its blocks from the teacher's after one of its own (Romero 2015, FitNets).

The teacher works on the ranks of the student: its experts are spread over the same world, by dispatchers of their own.
Shapes: B sequences, T positions, N targets, V classes, S and D widths of student and teacher.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from twohop.models import ModelConfig, MoEModel
from twohop.models.config import ModelKind
from twohop.trainer.config import Config, DistillConfig
from twohop.trainer.data import IGNORED, Batch
from twohop.trainer.errors import ConfigError
from twohop.trainer.run_folder import has_checkpoint, read_config


def teacher_config(config: Config) -> Config:
    """The configuration of the run `distill.teacher`.

    Raises:
        ConfigError: there is no such run, or it cannot teach the model of `config`.
    """
    named = config.distill.teacher
    run_dir = Path(named or "").expanduser()
    if not has_checkpoint(run_dir):
        raise ConfigError(f"distill.teacher={named}: no run with a checkpoint; name a folder of `twohop train`")
    merged = OmegaConf.merge(OmegaConf.structured(Config), read_config(run_dir))
    teacher = OmegaConf.to_object(merged)
    assert isinstance(teacher, Config)
    _check(config.distill, teacher.model, config.model)
    return teacher


def _check(distill: DistillConfig, teacher: ModelConfig, student: ModelConfig) -> None:
    kind = student.kind.value
    if teacher.kind is not student.kind:
        raise ConfigError(
            f"distill.teacher={distill.teacher} is of model.kind={teacher.kind.value}, but the student of {kind}: "
            "use a teacher of the same kind"
        )
    if distill.hint_blocks and student.kind is not ModelKind.decoder:
        raise ConfigError(f"distill.hint_blocks={distill.hint_blocks} has no use with model.kind={kind}: leave it out")
    for block, model, who in zip(distill.hint_blocks, (teacher, student), ("teacher", "student"), strict=False):
        if block > model.num_layers:
            raise ConfigError(
                f"distill.hint_blocks={distill.hint_blocks}: the {who} has {model.num_layers} blocks, not {block}"
            )


@dataclass
class Hint:
    """Where a hint is taken, and the states seen there in the last forward passes."""

    teacher_block: nn.Module
    student_block: nn.Module
    projection: nn.Linear | None  # from the student's width to the teacher's; None: they are equal

    def __post_init__(self) -> None:
        self.taught_BTD = self.learned_BTD = torch.empty(0)
        self.teacher_block.register_forward_hook(self._keep_taught)
        # Inside the student's forward pass, so that an engine that shards the projection has it at hand.
        self.student_block.register_forward_hook(self._keep_learned)

    def _keep_taught(self, block: nn.Module, given: Any, made: tuple) -> None:
        self.taught_BTD = made[0]

    def _keep_learned(self, block: nn.Module, given: Any, made: tuple) -> None:
        if block.training:
            self.learned_BTD = made[0] if self.projection is None else self.projection(made[0])

    def distance(self, targets_BT: Tensor) -> Tensor:
        """Mean square over the width, summed over the positions that have a target; lets go of the states."""
        pair = (self.learned_BTD, self.taught_BTD)
        self.taught_BTD = self.learned_BTD = torch.empty(0)
        learned_BTD, taught_BTD = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in pair)
        return ((learned_BTD - taught_BTD).square().mean(-1) * (targets_BT != IGNORED)).sum()


class Teacher:
    """A trained model in evaluation mode, and what a student loses against it."""

    def __init__(self, config: DistillConfig, model: MoEModel, student: MoEModel) -> None:
        """With hints between different widths, the student gets a parameter: make the engine afterwards."""
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.hint: Hint | None = None
        if config.hint_blocks:
            taught, learns = config.hint_blocks
            projection = None
            if student.config.dim != model.config.dim:
                device = next(student.parameters()).device
                projection = nn.Linear(student.config.dim, model.config.dim, bias=False, device=device)
                student.add_module("hint", projection)
            blocks = (model.get_submodule(f"blocks.{taught - 1}"), student.get_submodule(f"blocks.{learns - 1}"))
            self.hint = Hint(*blocks, projection)

    def losses(self, batch: Batch, logits: Tensor, progress: float) -> dict[str, Tensor]:
        """`distill_loss`, and `hint_loss` with hints: sums over the targets, with their weights; 0 once it has left.

        Every rank of the world must call this equally often and with the same progress (steps done ÷ steps).
        """
        config = self.config
        if progress >= config.until:
            zero = logits.new_zeros(())
            return {"distill_loss": zero} | ({"hint_loss": zero} if self.hint else {})
        with torch.no_grad():
            taught = self.model(**batch.inputs).logits
        divergence = divergence_sum(taught, logits, batch.targets, config.temperature)
        losses = {"distill_loss": config.weight * config.temperature**2 * divergence}
        if self.hint is not None:
            losses["hint_loss"] = config.hint_weight * self.hint.distance(batch.targets)
        return losses


def divergence_sum(teacher: Tensor, student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Σ over targets of KL(teacher ‖ student) in nats, of logits [*targets.shape, V] ÷ temperature; IGNORED ones are 0.

    In fp32 (fp64 for fp64 logits); the gradient reaches the student alone.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p_NV, log_q_NV = (
        (logits.flatten(0, -2).to(dtype) / temperature).log_softmax(-1) for logits in (teacher.detach(), student)
    )
    divergence_N = F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)
    return (divergence_N * (targets.flatten() != IGNORED)).sum()
