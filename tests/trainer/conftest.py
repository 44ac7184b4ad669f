"""What tests of command lines share."""

import pytest

from twohop.trainer.commands import train
from twohop.trainer.launching import launch


@pytest.fixture
def started(monkeypatch, nothing_starts):
    """The configurations that would have been run, instead of worker processes."""
    calls = []
    monkeypatch.setattr(launch, "start", lambda worker, config, run_dir, *nodes: calls.append((config, run_dir)) or {})
    monkeypatch.setattr(train, "start", launch.start)
    monkeypatch.setattr("twohop.trainer.stored.start", launch.start)
    return calls


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """Whatever a command writes is not in the repository."""
    monkeypatch.chdir(tmp_path)
