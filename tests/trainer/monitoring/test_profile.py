"""`profile=true`: a trace in which every phase is a named range."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import write_corpus
from tests.trainer.monitoring.test_resources import PHASES
from twohop.trainer import loop
from twohop.trainer.config import ProfileConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.monitoring.progress import Progress


def ranges(trace: Path) -> list[dict[str, Any]]:
    """The named ranges of a trace, in order of time."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted((e for e in events if e.get("cat") == "user_annotation"), key=lambda event: event["ts"])


def train(directory: Path, *overrides: str) -> None:
    """The loop alone, without sample and report."""
    run = runs.start(directory, *overrides)
    run.directory.mkdir(exist_ok=True)
    loop.train(run, 0, "", None, Progress(run.config.train.steps, False))


def test_a_trace_of_every_rank_has_a_range_for_every_phase(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    profile = ["profile.enabled=true", "profile.skip=2", "profile.steps=2", "profile.every_rank=true", "train.steps=5"]
    run_distributed(train, 2, tmp_path, *profile, "comm.chunks=2", init=False)
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-1.json.gz"]
    for path in folder.iterdir():
        found = ranges(path)
        count = Counter(event["name"] for event in found)
        assert set(count) >= PHASES - {"other"}
        assert [name for name in count if name.startswith("ProfilerStep")] == ["ProfilerStep#2", "ProfilerStep#3"]
        # Two steps of two micro-batches, each through two MoE layers in two chunks.
        assert count["forward"] == count["backward"] == 2 * 2
        assert count["experts"] == 2 * 2 * 2 * 2
        assert count["optimizer"] == 2
        # A layer's experts are inside the forward pass.
        forward = next(event for event in found if event["name"] == "forward")
        experts = next(event for event in found if event["name"] == "experts")
        assert forward["ts"] < experts["ts"] < experts["ts"] + experts["dur"] < forward["ts"] + forward["dur"]


def test_a_profile_that_does_not_fit_into_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile\.skip=2 and profile\.steps=2 are more than the 3 steps"):
        train(tmp_path, "profile.enabled=true", "train.steps=3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3}, r"profile\.steps=3 has no use without a profile: add profile=true"),
        ({"every_rank": True}, r"profile\.every_rank=True has no use without a profile"),
        ({"enabled": True, "skip": 0}, r"profile\.skip=0: use 1 or more"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfileConfig(**settings)
