"""Ranks that meet in a store where others have met before."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from twohop.trainer.errors import UserError
from twohop.trainer.launching.meeting import meet

PATIENCE = timedelta(seconds=60)


def come(
    pool: ThreadPoolExecutor, store: dist.Store, ranks: list[int], size: int, patience: timedelta = PATIENCE
) -> list[Future[dist.Store]]:
    """Each of `ranks` comes in a thread of its own."""
    return [pool.submit(meet, store, rank, size, patience) for rank in ranks]


def test_every_start_has_a_part_of_the_store_for_itself() -> None:
    store, seen = dist.HashStore(), []
    with ThreadPoolExecutor(3) as pool:
        for start in ("first", "second", "third"):
            stores = [future.result() for future in come(pool, store, [2, 0, 1], 3)]
            assert not any(own.check(["start"]) for own in stores)
            stores[1].set("start", start)
            seen.append([own.get("start").decode() for own in stores])
    assert seen == [["first"] * 3, ["second"] * 3, ["third"] * 3]


@pytest.mark.parametrize("late", [0, 2])
def test_one_who_has_been_there_before_is_waited_for(late: int) -> None:
    store = dist.HashStore()
    others = [rank for rank in range(3) if rank != late]
    with ThreadPoolExecutor(3) as pool:
        for future in come(pool, store, [0, 1, 2], 3):
            future.result()
        early = come(pool, store, others, 3)
        time.sleep(0.3)
        assert not any(future.done() for future in early)
        for future in [*early, *come(pool, store, [late], 3)]:
            future.result()


@pytest.mark.parametrize("absent", [0, 2])
def test_who_does_not_come_is_named_whatever_it_has_left_there(absent: int) -> None:
    store = dist.HashStore()
    others = [rank for rank in range(3) if rank != absent]
    with ThreadPoolExecutor(3) as pool:
        for future in come(pool, store, [0, 1, 2], 3):
            future.result()
        for future in come(pool, store, others, 3, timedelta(seconds=0.5)):
            with pytest.raises(UserError, match=rf"ranks \[{absent}\] of 3 did not start within .*=0\.5: look at"):
                future.result()
