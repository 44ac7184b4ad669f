"""Settings that every test needs, and what tests of several folders share."""

import os
from contextlib import nullcontext

import pytest

# Worker processes of the tests share few cores; set before torch is imported for the first time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that put something else in the place of workers: no process imports what these would need."""
    monkeypatch.setattr("twohop.trainer.launching.prefork.serving", lambda worker: nullcontext())
