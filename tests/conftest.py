"""Settings that every test needs, and what tests of several folders share."""

import gc
import os
from contextlib import nullcontext

import pytest
from hypothesis import settings

# Worker processes of the tests share few cores; set before torch is imported for the first time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test fails because the machine was busy for a moment.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """What all these modules have imported stays: collections, which are many, need not look through it."""
    gc.freeze()


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that put something else in the place of workers: no process imports what these would need."""
    monkeypatch.setattr("twohop.trainer.launching.prefork.serving", lambda worker: nullcontext())
