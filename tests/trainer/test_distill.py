"""Distillation: the loss against plain references, hints, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.end_to_end import runs
from tests.tiny import tiny_config
from twohop.models import ModelConfig, MoEConfig, RouterConfig, build_model, init_weights
from twohop.trainer.config import DistillConfig
from twohop.trainer.data import IGNORED, Batch
from twohop.trainer.distill import Teacher, divergence_sum
from twohop.trainer.errors import ConfigError
from twohop.trainer.loop import train_step
from twohop.trainer.setup import set_up
from twohop.trainer.validate.groups import validate


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS = torch.tensor([[1, 2, IGNORED, 0, 6], [IGNORED, 3, 3, 3, 1]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_the_sum_of_p_log_p_over_q(temperature: float) -> None:
    teacher, student = logits(0), logits(1)
    expected = torch.zeros((), dtype=torch.float64)
    for b, t in (TARGETS != IGNORED).nonzero().tolist():
        p, q = (x[b, t] / temperature for x in (teacher, student))
        p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
        expected += sum(p[v] * (p[v] / q[v]).log() for v in range(7))
    assert divergence_sum(teacher, student, TARGETS, temperature) == pytest.approx(float(expected), rel=1e-12)


def test_gradient_reaches_the_student_alone_and_vanishes_where_both_agree() -> None:
    teacher, student = logits(0).requires_grad_(), logits(0).requires_grad_()
    divergence_sum(teacher, student, TARGETS, 2.0).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15
    divergence_sum(teacher, student + logits(1), TARGETS, 2.0).backward()
    assert (student.grad.abs().sum(-1) > 0).equal(TARGETS != IGNORED)


def model(dim: int, layers: int, seed: int, jitter: float = 0.0) -> nn.Module:
    moe = MoEConfig([2], router=RouterConfig(jitter=jitter))
    config = ModelConfig(vocab_size=11, dim=dim, num_layers=layers, num_heads=2, ffn_dim=16, max_seq_len=8, moe=moe)
    made = build_model(config)
    init_weights(made, seed)
    return made.double()


@pytest.mark.parametrize("dim", [8, 12])
def test_hint_is_the_squared_distance_of_two_states(dim: int) -> None:
    teacher, student = model(8, 4, 0, jitter=0.5), model(dim, 2, 1)  # noise that a teacher must not have
    config = DistillConfig(
        teacher="there", weight=2.0, temperature=3.0, until=0.5, hint_blocks=[3, 1], hint_weight=0.25
    )
    lesson = Teacher(config, teacher, student)
    if dim != 8:
        init_weights(student, 2)
        student.double()
        assert student.hint.weight.std() > 0.01
    assert hasattr(student, "hint") == (dim != 8)
    batch = Batch({"ids_BT": torch.randint(11, (2, 5))}, TARGETS)
    student.train()
    output = student(**batch.inputs)
    losses = lesson.losses(batch, output.logits, progress=0.4)

    states: dict[str, Tensor] = {}
    teacher.blocks[2].register_forward_hook(lambda block, given, made: states.update(taught=made[0]))
    student.blocks[0].register_forward_hook(lambda block, given, made: states.update(learned=made[0]))
    taught = teacher.eval()(**batch.inputs).logits
    student(**batch.inputs)
    learned = states["learned"] if dim == 8 else states["learned"] @ student.hint.weight.T
    distance = sum(
        ((learned[b, t] - states["taught"][b, t]) ** 2).mean() for b, t in (TARGETS != IGNORED).nonzero().tolist()
    )
    torch.testing.assert_close(losses["hint_loss"], 0.25 * distance, rtol=1e-12, atol=0)
    expected = 2.0 * 3.0**2 * divergence_sum(taught, output.logits, TARGETS, 3.0)
    torch.testing.assert_close(losses["distill_loss"], expected, rtol=1e-12, atol=0)
    sum(losses.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.blocks[0].attention.wq.weight.grad.abs().sum() > 0
    if dim != 8:
        assert student.hint.weight.grad.abs().sum() > 0


def test_teacher_leaves_after_its_part_of_the_steps() -> None:
    teacher, student = model(8, 2, 0), model(8, 2, 1)
    lesson = Teacher(DistillConfig(teacher="there", until=0.5), teacher, student)
    batch = Batch({"ids_BT": torch.randint(11, (2, 5))}, TARGETS)
    out = student(**batch.inputs).logits
    assert lesson.losses(batch, out, progress=0.49)["distill_loss"] > 0
    teacher.forward = None  # from here on it is not even asked
    assert lesson.losses(batch, out, progress=0.5) == {"distill_loss": 0}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and a trained teacher in `teacher`."""
    directory = tmp_path_factory.mktemp("distill")
    runs.train_run(directory, [f"run.dir={directory / 'teacher'}", "train.steps=4"])
    return directory


def test_a_run_distils_and_its_record_shows_the_parts(taught: Path) -> None:
    student = (f"distill.teacher={taught / 'teacher'}", "model.num_layers=2", "model.moe.experts=[4]")
    run = runs.start(taught, *student, "distill.hint_blocks=[4,2]", "train.steps=3")
    records = [train_step(run, step) for step in range(3)]
    assert [record["distill_loss"] > 0 for record in records] == [True, True, False]
    assert [record["hint_loss"] > 0 for record in records] == [True, True, False]
    assert records[1]["distill_loss"] < records[0]["distill_loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.teacher=nowhere"], r"distill\.teacher=nowhere: no run with a checkpoint"),
        (["distill.teacher={teacher}", "distill.hint_blocks=[5,1]"], r"hint_blocks=\[5, 1\]: the teacher has 4 blocks"),
        (["distill.teacher={teacher}", "distill.hint_blocks=[1,6]"], r"hint_blocks=\[1, 6\]: the student has 4 blocks"),
    ],
)
def test_what_cannot_teach_is_refused_before_the_start(taught: Path, overrides: list[str], message: str) -> None:
    config = tiny_config(taught, *(text.format(teacher=taught / "teacher") for text in overrides))
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)


def test_a_teacher_of_other_data_is_refused(taught: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, f"distill.teacher={taught / 'teacher'}", "data.valid_fraction=0.2")
    with pytest.raises(ConfigError, match="was trained on other data"):
        set_up(config, tmp_path, torch.device("cpu"))
