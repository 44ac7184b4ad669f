"""Sweeps: what jobs leave, what their starter reads, and what a search gets to know of them."""

import json
import signal
from pathlib import Path

import pytest
import yaml

from twohop.trainer import cli
from twohop.trainer.errors import ConfigError
from twohop.trainer.sweep import handing_on_stops, is_started_again


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch, nothing_starts):
    monkeypatch.chdir(tmp_path)


def test_optuna_minimises_what_a_run_tells_and_a_trial_that_fails_is_no_end(monkeypatch, capfd):
    seen = []

    def started(worker, config, run_dir, nodes):
        seen.append(config)
        if len(seen) == 2:
            raise ConfigError("not this one")
        return {"valid_loss": -1.0, "train_loss": 3.0 - len(seen)}

    monkeypatch.setattr("twohop.trainer.commands.train.start", started)
    words = "experiment=router_search hydra.sweeper.n_trials=3 hydra.sweep.dir=sweep optimized_metric=train_loss"
    assert cli.run(["train", "--multirun", *words.split()]) == 1  # one job has failed
    out = capfd.readouterr().out
    assert "sweep: 3 jobs, 1 failed" in out
    assert "FAILED: not this one" in out
    best = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    assert best["best_value"] == 0.0
    assert best["best_params"]["model.moe.router.top_k"] == seen[2].model.moe.router.top_k
    assert best["best_params"]["model.moe.capacity_factor"] == seen[2].model.moe.capacity_factor
    answers = [json.loads(Path(f"sweep/{number}/job.json").read_text()) for number in range(3)]
    assert [answer["value"] for answer in answers] == [2.0, None, 0.0]


def test_answers_of_an_earlier_sweep_in_the_folder_do_not_count(monkeypatch, capfd):
    monkeypatch.setattr("twohop.trainer.commands.train.start", lambda *args: {"valid_loss": 1.0})
    for seeds, count in (("1,2,3", 3), ("4", 1)):
        assert cli.run(["train", "--multirun", "hydra.sweep.dir=sweep", f"seed={seeds}"]) == 0
        assert f"sweep: {count} jobs, 0 failed" in capfd.readouterr().out


def test_a_job_that_is_started_again_goes_on_with_its_own_run(monkeypatch, capfd):
    resumed = []

    def started(worker, config, run_dir, nodes):
        resumed.append(config.resume)
        Path(run_dir, "checkpoints", "step-1").mkdir(parents=True, exist_ok=True)
        return {}

    monkeypatch.setattr("twohop.trainer.commands.train.start", started)
    words = ["train", "--multirun", "hydra.sweep.dir=sweep", "seed=1"]
    assert cli.run(words) == 0
    assert cli.run(words) == 1
    assert "holds a run already" in capfd.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_started_again()
    assert cli.run(words) == 0
    assert resumed == [None, str(Path("sweep/0").resolve())]


def test_several_nodes_do_not_sweep_each_for_itself(capfd):
    words = "cluster=torchrun cluster.nodes=2 cluster.rdzv_endpoint=a:1 hydra.sweep.dir=sweep"
    assert cli.run(["train", "--multirun", *words.split()]) == 1
    assert "--multirun on 2 nodes would make each of them its own sweep" in capfd.readouterr().err


def test_a_saved_run_hands_the_signal_on_to_who_listened_before():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        for code in (75, 143):
            with pytest.raises(SystemExit), handing_on_stops():
                raise SystemExit(code)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    with pytest.raises(SystemExit), handing_on_stops():  # nobody listens: the process would be killed
        raise SystemExit(75)
