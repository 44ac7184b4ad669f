"""The command line as a user meets it: help, composed configurations, errors and exit codes, sweeps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.trainer.command_line import run
from twohop.trainer import cli
from twohop.trainer.commands import generate, train
from twohop.trainer.commands.generate import _quote_prompt

pytestmark = pytest.mark.usefixtures("in_empty_folder")
COMMANDS = ("train", "evaluate", "generate", "prepare", "report")


def printed_without(modules: set[str], code: str) -> str:
    """What a fresh interpreter prints that runs `code`, after which it must have imported none of `modules`."""
    program = (
        f"import sys\n{code}\nslow = {modules!r} & set(sys.modules)\nsys.exit(f'imported {{slow}}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"]])
def test_a_reader_that_leaves_early_ends_the_command_in_silence(args):
    """The first one meets the closed pipe when its buffer is flushed, the second may while it prints."""
    ours, theirs = os.pipe()
    os.close(ours)
    program = f"from twohop.trainer import cli\ncli.main({args!r})"
    done = subprocess.run([sys.executable, "-c", program], stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_broken_pipe_to_somebody_else_is_an_error(monkeypatch):
    def lose_a_worker(args):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "run", lose_a_worker)
    with pytest.raises(BrokenPipeError):
        cli.main()


def test_help_needs_neither_torch_nor_hydra():
    code = "import twohop.trainer.cli as cli\nassert cli.run(['--help']) == 0"
    printed = printed_without({"torch", "hydra", "omegaconf", "numpy", "rich"}, code)
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", printed, re.MULTILINE)


def test_a_configuration_is_composed_without_what_only_a_run_needs():
    code = (
        "from importlib import import_module\n"
        "from twohop.trainer import cli\n"
        "for command in cli.COMMANDS:\n"
        "    import_module(f'twohop.trainer.commands.{command}')\n"
        "cli.run(['train', '--cfg', 'job'])"
    )
    assert "moe:" in printed_without({"torch", "numpy", "matplotlib", "rich", "tokenizers"}, code)


def test_every_command_has_help(capfd):
    for command in COMMANDS:
        code, out, err = run(f"{command} --help", capfd)
        assert (code, err) == (0, "")
        assert f"twohop {command}" in out
    _, out, _ = run("train --help", capfd)
    for group in (
        "comm: auto, dedup, flat, hierarchical",
        "data: digits, hf, mixture, multitask, stdlib, text, tokens",
        "experiment: mos, quickstart, router_search, task_moe, vmoe_digits",
        "pr_moe",
    ):
        assert group in out


def test_useful_overrides_of_the_help_text_are_real(started, capfd):
    """Each line by itself, on a number of ranks and with the data that its option has a use for."""
    _, out, _ = run("train --help", capfd)
    section = out.split("== useful overrides ==")[1].split("twohop train --cfg")[0]
    lines = [line.split("  ")[0] for line in section.strip().splitlines()]
    Path("book.txt").write_text("It was a dark and stormy night.\n" * 100)
    assert len(lines) > 12
    for line in lines:
        text = line.replace("=DIR", "=runs").replace("=NAME", "=name").replace("=FOLDER", "=.")
        data = "data=hf data.files=book.txt" if text.startswith("data.hf") else ""
        code, _, err = run(f"train launch.nproc=4 {data} {text}", capfd)
        assert (code, err) == (0, ""), line
    assert len(started) == len(lines)


def test_composed_configuration_is_shown(capfd):
    code, out, _ = run("train model=dense comm=flat train.steps=7 comm.ep_size=1 --cfg job", capfd)
    shown = OmegaConf.create(out)
    assert code == 0
    assert (shown.model.name, shown.comm.dispatcher, shown.train.steps, shown.comm.ep_size) == ("dense", "flat", 7, 1)


@pytest.mark.parametrize("option", ["flat", "hierarchical", "dedup"])
def test_comm_group_chooses_the_dispatcher(option, started, capfd):
    run(f"train comm={option}", capfd)
    assert started[0][0].comm.dispatcher == option


def test_data_and_tracker_groups(started, capfd):
    run("train data=text data.files=book.txt tracker=wandb", capfd)
    config = started[0][0]
    assert (config.data.source, config.data.files, config.tracker.name) == ("text", ["book.txt"], "wandb")
    run("train data=tokens data.files=[folder] tracker=none", capfd)
    assert (started[1][0].data.source, started[1][0].data.files) == ("tokens", ["folder"])


def test_quickstart_is_four_processes_as_two_nodes(started, capfd):
    code, _, _ = run("train experiment=quickstart", capfd)
    config = started[0][0]
    assert code == 0
    assert (config.launch.nproc, config.comm.ranks_per_node, config.model.name) == (4, 2, "pr_moe")
    assert (config.comm.dispatcher, config.data.source) == ("dedup", "stdlib")


def test_every_model_of_the_group_passes_validation(started, capfd):
    _, out, _ = run("train --help", capfd)
    models = re.search(r"^model: (.*)$", out, re.MULTILINE).group(1).split(", ")
    for model in models:
        data = {"vmoe": "data=digits", "task_moe": "data=multitask train.seq_len=16"}.get(model, "train.seq_len=16")
        code, _, err = run(f"train model={model} {data}", capfd)
        assert (code, err) == (0, "")
    assert len(started) == len(models)


def test_digits_are_a_small_vmoe_on_two_processes(started, capfd):
    assert run("train experiment=vmoe_digits model.vision.patch_size=4", capfd)[0] == 0
    config = started[0][0]
    assert (config.launch.nproc, config.model.kind.value, config.data.source) == (2, "vit", "digits")
    assert config.model.vision.num_patches == 4


def test_experts_of_each_layer_in_one_line(started, capfd):
    for written in ("[4]*2+[8]", "pyramid(4, 8, last=1)", "[4, 4, 8]"):
        assert run(f"""train 'model.moe.experts="{written}"'""", capfd)[0] == 0
    assert [config.model.moe.experts for config, _ in started] == [[4, 4, 8]] * 3
    for once in ("[4]*2+[8]", "pyramid(4,8,last=1)"):
        code, _, err = run(f"train 'model.moe.experts={once}'", capfd)
        assert code == 2
        assert f"""quotes twice: 'model.moe.experts="{once}"'\n""" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "no command 'trian', did you mean 'train'?"),
        ("train train.stepz=3", "unknown key 'train.stepz', did you mean 'train.steps'?"),
        ("train seq_len=3", "unknown key 'seq_len', did you mean 'train.seq_len'?"),
        ("train modle=moe", "unknown key 'modle', did you mean 'model'?"),
        ("train +train.stepz=3", "unknown key 'train.stepz', did you mean 'train.steps'?"),
        ("train model=moee", "model=moee: no such option, did you mean 'moe'?"),
        ("train train.steps=many", "train.steps=many: Value 'many' of type 'str' could not be converted to Integer"),
        (
            "train engine.precision=fp8",
            "engine.precision=fp8: Invalid value 'fp8', expected one of [fp32, bf16, bf16_par",
        ),
        ("train train.steps", "train.steps: not of the form key=value"),
        ("train 'model.dim=[1'", "model.dim=[1: not of the form key=value"),
        ("train 'run.name=${nowhere}'", "Interpolation key 'nowhere' not found"),
        ("train train.steps=0", "train.steps=0: use 1 or more"),
        ("train model.moe.router.top_k=100", "model.moe.router.top_k=100 is more than the 4 experts"),
        ("train launch.nproc=4 comm.ep_size=3", "comm.ep_size=3 does not divide the 4 ranks"),
        ("train comm.ranks_per_node=2", "comm.ranks_per_node=2 does not divide the 1 ranks"),
        ("train model.moe.experts=[6] comm.ep_size=4 launch.nproc=4", "6 experts of a layer"),
        ("train train.seq_len=1000", "train.seq_len=1000 is longer than model.max_seq_len=256"),
        ("train resume=nowhere", "resume=nowhere: no such folder"),
        ("train resume=.", "resume=.: it holds no config.yaml"),
        ("train model.vision.patch_size=4", "model.vision is null here, so nothing in it can be changed"),
        ("train model=vmoe data=digits model.vision.size=4", "unknown key 'model.vision.size'"),
        ("train model=vmoe data=digits attention=linear", "model.attention.kind=linear looks back only"),
        ("train model=vmoe", "model.kind=vit cannot learn from data.source=stdlib: add data=digits"),
        ("evaluate", "twohop evaluate needs one run folder: twohop evaluate run=DIR"),
        ("generate run=nowhere", "run=nowhere: no such folder"),
        ("evaluate run=.", "it holds no config.yaml"),
        ("report run=. x=1", "x=1: twohop report takes run=DIR and nothing else"),
        ("report run=.", "no training step to report"),
        ("prepare train.steps=1", "unknown key 'train.steps'"),
        ("prepare data=text", "data.files is not set"),
        ("train --experimental-rerun=job.pickle", "--experimental-rerun would unpickle a file"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(line, message, started, capfd):
    code, out, err = run(line, capfd)
    assert code == 2
    assert err.startswith("twohop: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""
    assert started == []
    assert not os.path.exists("runs")


def test_taken_port_is_told_before_anything_starts(started, capfd):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run(f"train launch.port={port}", capfd)
    assert (code, started) == (2, [])
    assert f"launch.port={port} cannot be used" in err
    assert run(f"train launch.port={port}", capfd)[0] == 0


@pytest.mark.parametrize(
    "prompt",
    [
        "def ",
        ' say "hi"',
        "a\\",
        'a\\"b',
        "x=[1, {2: 3}]",
        "${oc.env:HOME}",
        "\\${a}",
        "#!$%",
        "'quoted' or not",
        "é\n\t",
    ],
)
def test_prompt_arrives_as_it_was_typed(prompt, started, capfd):
    run("train run.dir=mine", capfd)
    code, _, err = run(f"generate run=mine {shlex.quote('generate.prompt=' + prompt)}", capfd)
    assert (code, err) == (0, "")
    assert started[-1][0].generate.prompt == prompt


def test_only_prompts_are_quoted():
    assert _quote_prompt("generate.seed=1") == "generate.seed=1"
    assert _quote_prompt("generate.prompt=a,b") == 'generate.prompt="a,b"'
    assert generate.PROMPT == "generate.prompt="


def test_prepare_writes_token_files(capfd, tmp_path):
    (tmp_path / "book.txt").write_text("To be, or not to be. " * 400)
    code, out, err = run("prepare data=text data.files=book.txt out=tokens", capfd)
    assert (code, err) == (0, "")
    assert "data=tokens data.files=tokens" in out
    assert (tmp_path / "tokens").is_dir()


def test_sweep_goes_on_after_a_failed_job_and_says_so(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(train, "WORKER", "tests.trainer.launching.launch_workers:refuse_dense")
    code, out, err = run("train --multirun model=dense,moe_topk seed=3 hydra.sweep.dir=sweep", capfd)
    assert code == 1
    assert err == "twohop: error: no dense models today\n"
    assert "sweep: 2 jobs, 1 failed" in out
    assert re.search(r"0  model=dense  FAILED: no dense models today", out)
    assert re.search(r"1  model=moe_topk  1\.0000  .*sweep/1", out)
    assert (tmp_path / "sweep/1/trained").read_text() == "moe_topk"
    assert OmegaConf.load(tmp_path / "sweep/0/config.yaml").model.name == "dense"
    assert OmegaConf.load(tmp_path / "sweep/1/config.yaml").model.name == "moe_topk"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]


def test_sweep_whose_jobs_all_succeed_exits_with_0(started, capfd):
    code, out, err = run("train --multirun model=moe,pr_moe comm=flat,dedup tracker=wandb", capfd)
    assert (code, err) == (0, "")
    assert "sweep: 4 jobs, 0 failed" in out
    assert [(config.model.name, config.comm.dispatcher) for config, _ in started] == [
        ("moe", "flat"),
        ("moe", "dedup"),
        ("pr_moe", "flat"),
        ("pr_moe", "dedup"),
    ]
    assert len({run_dir for _, run_dir in started}) == 4
    # A group of W&B is named by the sweep's folder.
    assert {config.tracker.group for config, _ in started} == {started[0][1].parent.name}


def test_jobs_of_a_sweep_cannot_share_a_folder(started, capfd):
    code, _, err = run("train --multirun model=moe,dense run.dir=one", capfd)
    assert code == 1
    assert err.count("run.dir=one: the jobs of a sweep cannot share a folder") == 2
    assert started == []


def test_outer_launcher_gives_the_world_and_the_folder_is_left_to_rank_0(started, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, _ = run("train comm.ep_size=4", capfd)
    assert code == 0
    assert started[0][1] is None
    assert list(tmp_path.iterdir()) == []
    code, _, err = run("train comm.ep_size=3", capfd)
    assert (code, err) == (2, "")  # rank 0 speaks for all
    monkeypatch.setenv("RANK", "0")
    assert "4 ranks" in run("train comm.ep_size=3", capfd)[2]
    assert "run it without torchrun" in run("train --multirun seed=1,2", capfd)[2]


def test_module_defaults_to_train():
    module = [sys.executable, "-m", "twohop.trainer"]
    done = subprocess.run([*module, "train.stepz=1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "did you mean 'train.steps'?" in done.stderr
    done = subprocess.run([*module, "evaluate"], capture_output=True, text=True, timeout=60)
    assert "twohop evaluate run=DIR" in done.stderr
