"""Which sample comes when: a function of (seed, global sample index) alone.

World size, accumulation and restarts have no say in it, so a run continues on any number of ranks with
exactly the samples that it has not seen.
"""

from functools import lru_cache

import numpy as np

from twohop.trainer.config import DataOrder


def step_numbers(order: DataOrder, seed: int, step: int, size: int, num_samples: int) -> list[int]:
    """The samples of the global batch of `step`, counted from 0, which holds `size` of them."""
    if order is DataOrder.samples:
        return sample_numbers(seed, step * size, size, num_samples)
    # The batches are those of the first epoch in order of samples; every epoch is a permutation of them.
    batch = sample_index(seed, step, num_samples // size)
    return sample_numbers(seed, batch * size, size, num_samples)


def sample_index(seed: int, global_sample: int, num_samples: int) -> int:
    """The sample in [0, num_samples) that is the `global_sample`-th of the whole training, counted from 0.

    Every epoch of num_samples draws is a permutation of its own: each sample once.
    """
    epoch, position = divmod(global_sample, num_samples)
    return int(_permutation(seed, epoch, num_samples)[position])


def sample_numbers(seed: int, first_global_sample: int, size: int, num_samples: int) -> list[int]:
    """The samples drawn as first_global_sample … + size - 1 of the whole training."""
    return [sample_index(seed, first_global_sample + i, num_samples) for i in range(size)]


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    # Ranking raw counter-based random words, not Generator.permutation: only the raw stream is promised to stay
    # the same in later versions of numpy (Philox: Salmon et al., 2011).
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(num_samples), kind="stable")
