"""Experiment trackers: chosen by name, imported when chosen, real W&B runs offline."""

import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from twohop.trainer.config import TrackerConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.monitoring.metrics import MetricsWriter
from twohop.trainer.trackers import build_trackers


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no settings of the person who runs the tests, and no files outside the test's folder."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))


class OfflineRun(NamedTuple):
    """What a .wandb file holds."""

    run_id: str
    group: str
    config: dict[str, str]
    history: dict[int, dict[str, float]]


def records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file: a LevelDB log of protocol buffers, here of less than one block of 32 KiB."""
    raw = file.read_bytes()
    assert len(raw) < 32768
    position = 7  # behind the magic number
    while position < len(raw):
        _checksum, length, kind = struct.unpack_from("<IHB", raw, position)
        assert kind == 1  # a whole record
        yield Record.FromString(raw[position + 7 : position + 7 + length])
        position += 7 + length


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    """The runs below a run folder, oldest first."""
    runs = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        content = list(records(file))
        run = next(record.run for record in content if record.HasField("run"))
        history = {
            record.history.step.num: {
                name: json.loads(item.value_json)
                for item in record.history.item
                if not (name := item.key or "/".join(item.nested_key)).startswith("_")
            }
            for record in content
            if record.HasField("history")
        }
        config = {update.key: update.value_json for update in run.config.update}
        runs.append(OfflineRun(run.run_id, run.run_group, config, history))
    return runs


def test_wandb_offline_twice_with_one_id(tmp_path: Path) -> None:
    config = TrackerConfig(name="wandb", project="tests", group="sweep")
    for resumed_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        trackers = build_trackers(config, tmp_path, "abc123", {"model": {"dim": 64}})
        with MetricsWriter(tmp_path, trackers, resumed_step) as writer:
            for step in steps:
                writer.log(step, {"loss": 1.0 / step})
            writer.log(steps[-1], {"valid_loss": 0.5}, kind="eval")
            writer.close({"valid_loss": 0.5})
        time.sleep(1.1)  # W&B names its folders by the second
    first, second = offline_runs(tmp_path)
    assert (first.run_id, first.group) == (second.run_id, second.group) == ("abc123", "sweep")
    assert json.loads(first.config["model"]) == {"dim": 64}
    train = {step: {"train/loss": 1 / step} for step in (1, 2, 3, 4)}
    valid = {"eval/valid_loss": 0.5}
    assert first.history == {1: train[1], 2: train[2], 3: train[3] | valid}
    assert second.history == {3: train[3], 4: train[4] | valid}
    assert not list((tmp_path / "home").rglob("*.wandb"))


def test_wandb_disabled_writes_nothing(tmp_path: Path) -> None:
    (tracker,) = build_trackers(TrackerConfig(name="wandb", mode="disabled"), tmp_path, "abc", {})
    tracker.log(1, {"loss": 1.0})
    tracker.finish({})
    assert not (tmp_path / "wandb").exists()


def test_wandb_online_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracker\.mode=online: no W&B API key.*WANDB_API_KEY.*offline"):
        build_trackers(TrackerConfig(name="wandb", mode="online"), tmp_path, "abc", {})
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrackerConfig(name="mlflow"), r"tracker\.name=mlflow: unknown; use one of none, wandb, tensorboard"),
        (TrackerConfig(name="wandb", mode="onlin"), r"tracker\.mode=onlin: use one of offline, online, disabled"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, config: TrackerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_trackers(config, tmp_path, "abc", {})


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    for resumed_step, steps, loss in ((None, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        trackers = build_trackers(TrackerConfig(name="tensorboard"), tmp_path, "abc", {"model": {"dim": 64}})
        with MetricsWriter(tmp_path, trackers, resumed_step) as writer:
            for step in steps:
                writer.log(step, {"loss": loss / step, "moe": {"blocks.1": {"load": [0.75, 0.25]}}})
            writer.log(steps[-1], {"valid_loss": 0.5}, kind="eval")
            writer.close({"valid_loss": 0.5, "sample": "${x"})
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    assert curve == [(1, 1.0), (2, 0.5), (3, pytest.approx(2 / 3)), (4, 0.5)]  # step 3 as it was taken again
    assert {"train/moe/blocks.1/max_load", "eval/valid_loss"} <= set(shown.Tags()["scalars"])
    texts = {
        name: shown.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("config", "summary")
    }
    assert b'    {\n      "model": {\n        "dim": 64' in texts["config"]
    assert b'"valid_loss": 0.5' in texts["summary"]


def test_tensorboard_takes_no_settings_of_wandb() -> None:
    with pytest.raises(ValueError, match=r"tracker\.group=a has no use with tracker=tensorboard"):
        TrackerConfig(name="tensorboard", group="a")


def test_wandb_is_imported_only_when_chosen() -> None:
    code = (
        "import sys; from pathlib import Path; from twohop.trainer.config import TrackerConfig\n"
        "from twohop.trainer.trackers import build_trackers\n"
        "assert build_trackers(TrackerConfig(), Path('.'), 'abc', {}) == []\n"
        "import twohop.trainer.data, twohop.trainer.monitoring.metrics\n"
        "assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
