"""Command lines about run folders: made, found again, read with other options, damaged."""

import pytest
from omegaconf import OmegaConf

from tests.trainer.command_line import run
from twohop.trainer.config import Precision

pytestmark = pytest.mark.usefixtures("in_empty_folder")


def test_run_folder_holds_the_configuration_and_nothing_of_hydra(started, capfd, tmp_path):
    run("train train.steps=5 run.name=first", capfd)
    run_dir = started[0][1]
    assert run_dir.parent.resolve() == tmp_path / "runs" / "first"
    assert OmegaConf.load(run_dir / "config.yaml").train.steps == 5
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    run("train run.name=first", capfd)
    assert started[1][1] != run_dir


def test_resume_finds_the_newest_run_with_a_checkpoint(started, capfd, tmp_path):
    def make(name, *folders):
        for folder in ("", *folders):
            (tmp_path / "runs" / "pr_moe" / name / folder).mkdir(parents=True, exist_ok=True)

    code, out, _ = run("train resume=auto", capfd)
    assert code == 0
    assert "no checkpoint in runs/pr_moe, so this run starts fresh" in out
    assert started[-1][0].resume is None

    make("2020-01-01", "checkpoints/step-1")
    make("2020-01-02", "checkpoints/step-1")
    make("2020-01-03", "checkpoints/.unfinished-step-1")
    run("train resume=auto", capfd)
    config, run_dir = started[-1]
    assert run_dir.name == "2020-01-02"
    assert config.resume == str(run_dir)
    assert not (run_dir / "config.yaml").exists()  # written when the checkpoint has proved to be of this model
    run("train resume=runs/pr_moe/2020-01-01", capfd)
    assert started[-1][1].name == "2020-01-01"

    code, _, err = run("train run.dir=runs/pr_moe/2020-01-02", capfd)
    assert code == 2
    assert "holds a run already: add resume=auto" in err
    run("train run.dir=runs/pr_moe/2020-01-02 resume=auto", capfd)
    assert started[-1][1].name == "2020-01-02"


def test_stored_run_is_read_again_with_overrides_on_top(started, capfd):
    run("train model=dense model.dim=64 comm=flat train.steps=5 run.dir=mine comm.ep_size=1", capfd)
    assert run("evaluate run=mine eval.batches=3 comm=dedup", capfd)[0] == 0
    config, run_dir = started[-1]
    assert str(run_dir) == "mine"
    assert (config.model.dim, config.train.steps, config.eval.batches) == (64, 5, 3)
    assert (config.comm.dispatcher, config.comm.ep_size) == ("dedup", [1])
    assert run("generate run=mine 'generate.prompt= if (a, b): '", capfd)[0] == 0
    assert started[-1][0].generate.prompt == " if (a, b): "
    assert started[-1][0].model.dim == 64


@pytest.mark.parametrize("other", ["engine=ddp", "engine.name=ddp", "engine=fsdp", "engine=deepspeed"])
def test_stored_run_is_read_by_another_engine_without_the_options_of_its_own(other, started, capfd):
    run("train engine=deepspeed engine.zero_stage=2 engine.precision=bf16 run.dir=mine", capfd)
    assert run("evaluate run=mine", capfd)[0] == 0
    assert started[-1][0].engine.zero_stage == 2
    for command in ("evaluate", "generate"):
        assert run(f"{command} run=mine {other}", capfd) == (0, "", "")
        engine = started[-1][0].engine
        assert engine.name == other.partition("=")[2]
        assert engine.precision is Precision.bf16
        assert engine.zero_stage == (1 if engine.name == "deepspeed" else None)


def test_damaged_stored_configuration_is_one_clear_error(started, capfd, tmp_path):
    for text, message in (
        ("a: [", "damaged"),
        ("- 1", "no keys and values"),
        ("trian: {steps: 1}", "unknown key 'trian'"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        code, _, err = run("evaluate run=.", capfd)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


def test_stored_configuration_cannot_run_code(started, capfd, tmp_path):
    (tmp_path / "config.yaml").write_text("run: !!python/object/apply:os.mkdir [made]\n")
    code, _, err = run("generate run=.", capfd)
    assert code == 2
    assert "damaged" in err
    assert not (tmp_path / "made").exists()
