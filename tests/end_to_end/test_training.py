"""Whole runs: what is left behind, interruptions, sweeps, and input that cannot be trained on."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import tiny_config, tiny_overrides, write_corpus
from twohop.comm import CommError
from twohop.trainer import cli, generate
from twohop.trainer.data import sample_numbers
from twohop.trainer.errors import CheckpointError, ConfigError, UserError
from twohop.trainer.evaluate import Evaluation, evaluate
from twohop.trainer.generate import generate_text
from twohop.trainer.launching import workers
from twohop.trainer.launching.workers import train
from twohop.trainer.loop import train_step
from twohop.trainer.monitoring.metrics import read_metrics, read_summary
from twohop.trainer.world import join_world, leader_first, rank

TWOHOP = str(Path(sys.executable).with_name("twohop"))


def train_steps(directory: Path) -> list[dict[str, Any]]:
    """The training records of a run, without what depends on the clock."""
    clock = ("step_s", "phase_s", "phase_max_s", "targets_per_s", "peak_memory", "mfu")
    records = [record for record in read_metrics(directory) if record["kind"] == "train"]
    return [{key: value for key, value in record.items() if key not in clock} for record in records]


def command(directory: Path, *overrides: str) -> list[str]:
    return [TWOHOP, "train", *tiny_overrides(directory), "launch.nproc=2", *overrides]


# A run and what it leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 steps on 4 ranks, as 2 nodes × 2."""
    directory = tmp_path_factory.mktemp("finished")
    write_corpus(directory)
    overrides = ["train.steps=8", "eval.every=4", "checkpoint.every=4", "comm.ranks_per_node=2"]
    first, *others = run_distributed(runs.train_run, 4, directory, overrides, init=False)
    assert others == [first, first, first]
    assert first == read_summary(directory / "run")
    return directory / "run"


def test_metrics_hold_every_step(finished: Path) -> None:
    steps = train_steps(finished)
    assert [record["step"] for record in steps] == list(range(1, 9))
    for record in steps:
        assert record["targets"] == 8 * 16
        for layer, experts in (("blocks.1.moe", 4), ("blocks.3.moe", 8)):
            assert len(record["moe"][layer]["load"]) == experts
            assert sum(record["moe"][layer]["load"]) == pytest.approx(1)
            assert 0 <= record["moe"][layer]["dropped"] < 1
        assert set(record["traffic"]) == {"between nodes", "inside node"}
    assert any(record["moe"]["blocks.1.moe"]["dropped"] > 0 for record in steps)  # capacity 1.25 overflows
    assert steps[0]["lr"] == pytest.approx(3e-3 / 5)
    evaluations = [record for record in read_metrics(finished) if record["kind"] == "eval"]
    assert [record["step"] for record in evaluations] == [4, 8]
    assert all(record["valid_perplexity"] == pytest.approx(math.exp(record["valid_loss"])) for record in evaluations)


def test_the_summary_counts_the_whole_run(finished: Path) -> None:
    summary, steps = read_summary(finished), train_steps(finished)
    assert summary["targets"] == 8 * 8 * 16
    assert 2 < summary["target_entropy"] < math.log(256)
    assert summary["sample"].startswith("def ")
    for level, (sent_bytes, messages) in summary["traffic"].items():
        assert sent_bytes == sum(pair[0] for record in steps for pair in record["traffic"][level].values()) > 0
        assert messages == sum(pair[1] for record in steps for pair in record["traffic"][level].values()) > 0


def test_the_run_folder_is_complete(finished: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html"} <= set(os.listdir(finished))
    assert sorted(os.listdir(finished / "checkpoints")) == ["step-00000004", "step-00000008"]
    assert "blocks.3.moe" in (finished / "report.html").read_text()


# Loss, evaluation and text


def test_the_loss_is_a_mean_over_all_tokens_plus_the_routers_losses(tmp_path: Path) -> None:
    """By hand, in the words of the definition: the mean over micro-batches of CE and router losses."""
    settings = ["model.moe.router.jitter=0", "optim.clip_norm=null"]
    run = runs.start(tmp_path, *settings)
    micro_batches = [
        run.data.train.batch(sample_numbers(run.config.seed, first, 2, len(run.data.train)))
        for first in (8, 10, 12, 14)  # of step 1
    ]
    entropies, router_losses = [], []
    for batch in micro_batches:
        output = run.model.train()(**batch.inputs)
        entropies.append(F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten()))
        router_losses.append(sum(loss for stats in output.moe for loss in stats.losses.values()))
    entropy, router_loss = sum(entropies) / 4, sum(router_losses) / 4
    gradients = torch.autograd.grad(entropy + router_loss, list(run.model.parameters()))
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))

    record = train_step(run, 1)
    assert record["loss"] == pytest.approx(entropy.item(), rel=1e-6)
    assert record["aux_loss"] == pytest.approx(router_loss.item(), rel=1e-6)
    assert record["aux_loss"] > 0.01
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


WHOLE_SPLIT = ("eval.batches=0", "data.valid_fraction=0.15")


def evaluated(directory: Path, engine: str) -> tuple[Evaluation, str, str]:
    """Also two texts: of a whole copy on each rank, which sends nothing, and of the model as it is."""
    run = runs.start(directory, *WHOLE_SPLIT, engine)
    valid = evaluate(run)
    run.meter.reset()
    alone = generate_text(run, run.config.generate)
    assert not any(messages for phases in run.meter.snapshot().values() for _, messages in phases.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "WHOLE_BYTES", 0)
        together = generate_text(run, run.config.generate)
    assert any(messages for phases in run.meter.snapshot().values() for _, messages in phases.values())
    return valid, alone, together


@pytest.mark.parametrize("engine", ["engine.name=ddp", "engine.name=fsdp"])
def test_evaluation_and_text_are_those_of_one_process(engine: str, tmp_path: Path) -> None:
    """The split has a number of windows that neither micro-batches nor ranks divide."""
    write_corpus(tmp_path)
    run = runs.start(tmp_path, *WHOLE_SPLIT)
    windows = [run.data.valid.window(i) for i in range(len(run.data.valid))]
    micro_batches = math.ceil(len(windows) / run.config.train.micro_batch)
    assert len(windows) % run.config.train.micro_batch
    assert micro_batches % 4
    with torch.no_grad():
        logits = [run.model.eval()(ids[None, :-1]).logits[0] for ids in windows]
    losses = [F.cross_entropy(given, ids[1:]).item() for given, ids in zip(logits, windows, strict=True)]
    right = [(given.argmax(-1) == ids[1:]).double().mean().item() for given, ids in zip(logits, windows, strict=True)]
    expected = pytest.approx((sum(losses) / len(losses), sum(right) / len(right)), rel=1e-6)
    own, own_text = evaluate(run), generate_text(run, run.config.generate)
    assert own[:2] == expected  # loss and accuracy
    assert len(own_text) >= len(run.config.generate.prompt)
    found = run_distributed(evaluated, 4, tmp_path, engine, init=False)
    assert {valid for valid, *_ in found} == {found[0][0]}
    assert found[0][0][:2] == expected
    assert {text for _, *texts in found for text in texts} == {own_text}


def test_a_text_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    run = runs.start(tmp_path, "generate.max_new_tokens=100")
    with pytest.raises(ConfigError, match="max_new_tokens=100"):
        generate_text(run, run.config.generate)


# Interruptions


def wait_for_step(step: int, process: subprocess.Popen, run_dir: Path) -> None:
    deadline = time.monotonic() + 120
    while len(train_steps(run_dir) if (run_dir / "metrics.jsonl").exists() else []) < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_a_worker(process: subprocess.Popen) -> None:
    """Workers are the children of the server that they are forked from."""
    workers = [child for server in psutil.Process(process.pid).children() for child in server.children()]
    assert len(workers) == 2
    workers[1].kill()


def test_a_run_that_was_killed_and_then_stopped_continues_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL to a worker, SIGTERM to the process that the user has started."""
    write_corpus(tmp_path)
    lengths = ["train.steps=40", "checkpoint.every=5"]
    whole = tmp_path / "unbroken"
    run_distributed(runs.train_run, 2, tmp_path, [*lengths, f"run.dir={whole}"], init=False)

    broken = tmp_path / "run"
    process = subprocess.Popen(command(tmp_path, *lengths), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(7, process, broken)
    kill_a_worker(process)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "ended by SIGKILL" in output.splitlines()[-1]
    assert len(train_steps(broken)) < 40

    lengths += ["resume=auto"]
    resumed = subprocess.Popen(command(tmp_path, *lengths), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(16, resumed, broken)
    resumed.send_signal(signal.SIGTERM)
    output, _ = resumed.communicate(timeout=120)
    assert "continuing from step" in output
    last = output.splitlines()[-1]
    stopped = re.fullmatch("twohop: stopped by SIGTERM after step ([0-9]+), which is saved; resume=auto goes on", last)
    assert stopped, output
    assert resumed.returncode == os.EX_TEMPFAIL
    assert len(train_steps(broken)) == int(stopped[1]) < 40
    assert int(max(os.listdir(broken / "checkpoints"))[-8:]) == int(stopped[1])

    run_distributed(runs.train_run, 2, tmp_path, lengths, init=False, timeout=120)
    assert train_steps(broken) == train_steps(whole)
    assert read_summary(broken)["valid_loss"] == read_summary(whole)["valid_loss"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("train.steps=9", "checkpoint.every=3", "schedule.warmup_steps=0")
    train(tiny_config(tmp_path, *settings), None)
    before = train_steps(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000009"
    (newest / "__0_0.distcp").write_bytes(b"")
    capsys.readouterr()
    train(tiny_config(tmp_path, *settings, "resume=auto"), None)
    printed = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged (__0_0.distcp is not what was written)" in printed
    assert "continuing from step 6" in printed
    assert train_steps(tmp_path / "run") == before


def test_a_finished_run_can_be_resumed_and_lengthened(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, "train.steps=2"), None)
    again = train(tiny_config(tmp_path, "train.steps=2", "resume=auto"), None)
    assert again["steps"] == 2
    assert [record["step"] for record in train_steps(tmp_path / "run")] == [1, 2]
    train(tiny_config(tmp_path, "train.steps=3", "resume=auto"), None)
    assert [record["step"] for record in train_steps(tmp_path / "run")] == [1, 2, 3]
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").train.steps == 3
    assert workers.evaluate(tiny_config(tmp_path, "train.steps=3"), tmp_path / "run")["step"] == 3


def test_a_resumed_run_is_the_same_run_for_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, told = [], []

    def note(config: Any, run_dir: Path, run_id: str, run_config: dict[str, Any]) -> list:
        started.append((run_id, run_config["model"]["dim"]))
        return [SimpleNamespace(log=lambda *_: None, finish=told.append)]

    monkeypatch.setattr(workers, "build_trackers", note)
    for settings in (["train.steps=1"], ["train.steps=2", "resume=auto"]):
        train(tiny_config(tmp_path, *settings), None)
    assert started[0] == started[1]
    assert started[0][0]
    assert [summary["steps"] for summary in told] == [1, 2]
    train(tiny_config(tmp_path, "train.steps=1", f"run.dir={tmp_path / 'other'}"), None)
    assert started[2] != started[0]


# Input that cannot be trained on


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, "train.steps=1"), None)
    config_before = (tmp_path / "run" / "config.yaml").read_text()
    for override, key in (
        ("model.ffn_dim=64", "model.ffn_dim=32"),
        ("seed=5", "seed=0"),
        ("train.seq_len=8", "train.seq_len=16"),
    ):
        with pytest.raises(CheckpointError, match=f"was made with {key}, but this run has {override}"):
            train(tiny_config(tmp_path, "train.steps=2", "resume=auto", override), None)
        assert (tmp_path / "run" / "config.yaml").read_text() == config_before


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=100 is smaller than the 257 classes"):
        train(tiny_config(tmp_path, "model.vocab_size=100"), None)


def test_ranks_that_fill_no_whole_nodes_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    with pytest.raises(ConfigError, match="3 does not divide the world of 2 ranks"):
        run_distributed(runs.train_run, 2, tmp_path, [], init=False, env={"LOCAL_WORLD_SIZE": "3"})


def test_a_loss_that_explodes_ends_the_run_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+: the loss is .*lower optim\.lr=1e\+18"):
        train(tiny_config(tmp_path, "optim.lr=1e18", "optim.clip_norm=null"), None)


def test_a_sweep_survives_a_job_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path)
    arguments = [argument for argument in tiny_overrides(tmp_path) if not argument.startswith("run.dir=")]
    sweep = ["model.vocab_size=100,null", "train.steps=2", "launch.nproc=2"]
    assert cli.run(["train", "--multirun", *arguments, *sweep, f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 1
    out, err = capfd.readouterr()
    assert "summary.json" not in os.listdir(tmp_path / "sweep" / "0")
    assert "summary.json" in os.listdir(tmp_path / "sweep" / "1")
    assert "2 jobs, 1 failed" in out
    assert len(err.splitlines()) == 1, err  # one clear error, and nothing from the ranks
    assert "model.vocab_size=100 is smaller" in err


# Ranks that are missing or stuck


def join_unless_rank_1(timeout_s: float) -> str:
    config = tiny_config(Path("/"), f"comm.init_timeout_s={timeout_s}", "data.files=[x]").comm
    if os.environ["RANK"] == "1":
        return ""
    try:
        join_world(config)
    except UserError as error:
        return str(error)
    return "joined"


def test_a_rank_that_does_not_start_is_named() -> None:
    problem = run_distributed(join_unless_rank_1, 2, 1.0, init=False)[0]
    assert problem.startswith("ranks [1] of 2 did not start within comm.init_timeout_s=1")


def hang_on_rank_1(directory: Path, overrides: Sequence[str]) -> None:
    run = runs.start(directory, "comm.timeout_s=2", *overrides)
    train_step(run, 0)
    if rank() == 1:
        time.sleep(60)  # the harness ends it
    train_step(run, 1)


@pytest.mark.parametrize(("ep_size", "named"), [(2, "MoE layer 0"), (1, "gradients")])
def test_a_rank_that_hangs_does_not_hang_the_others(tmp_path: Path, ep_size: int, named: str) -> None:
    write_corpus(tmp_path)
    with pytest.raises(CommError, match=f"rank 0, {named}"):
        run_distributed(hang_on_rank_1, 2, tmp_path, [f"comm.ep_size={ep_size}"], init=False)


def order_of_visits(directory: Path) -> float:
    join_world(tiny_config(directory).comm)

    def visit() -> float:
        time.sleep(0.2 if rank() == 0 else 0.0)
        return time.monotonic()

    return leader_first(visit, 30.0)


def test_local_rank_0_goes_first(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    first, *others = run_distributed(order_of_visits, 3, tmp_path, init=False)
    assert all(moment > first for moment in others)


def test_an_error_on_one_rank_reaches_the_others_by_name(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    waiting, failed = run_distributed(runs.train_with_bad_data_on_rank_1, 2, tmp_path, init=False)
    assert failed == "the disk is gone"
    assert "rank 1 stopped: step 2: OSError: the disk is gone" in waiting
