"""The multi-process harness itself: results by rank, the first failure, deadlines, and workers that died."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RemoteError, run_distributed


def sum_of_ranks(scale: int) -> tuple[int, int, str]:
    total = torch.tensor(dist.get_rank() * scale)
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.environ["EXTRA"]


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.barrier()


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(3)


def hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_results_come_back_by_rank(nproc: int) -> None:
    total = 10 * sum(range(nproc))
    expected = [(rank, total, "yes") for rank in range(nproc)]
    assert run_distributed(sum_of_ranks, nproc, 10, env={"EXTRA": "yes"}) == expected
    assert "EXTRA" not in os.environ


def test_the_first_failure_is_raised_with_its_traceback() -> None:
    with pytest.raises(KeyError, match="only here") as caught:
        run_distributed(fail_on_rank_1, 2)
    assert isinstance(caught.value.__cause__, RemoteError)
    assert "rank 1" in str(caught.value.__cause__)
    assert "fail_on_rank_1" in str(caught.value.__cause__)


def test_a_dead_worker_is_named_and_replaced() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died, exit code 3"):
        run_distributed(die_on_rank_0, 2)
    assert len(run_distributed(sum_of_ranks, 2, 1, env={"EXTRA": ""})) == 2


def test_a_hang_ends_at_the_deadline() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0"):
        run_distributed(hang_on_rank_0, 2, timeout=1.0)
