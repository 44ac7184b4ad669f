"""Which sample comes when: a function of (seed, global sample index) alone.

World size, accumulation and restarts have no say in it, so a run continues on any number of ranks with
exactly the samples that it has not seen.
"""

from functools import lru_cache

import numpy as np
import torch

from twohop.trainer.data.tokens import TokenWindows


def sample_index(seed: int, global_sample: int, num_samples: int) -> int:
    """The sample in [0, num_samples) that is the `global_sample`-th of the whole training, counted from 0.

    Every epoch of num_samples draws is a permutation of its own: each sample once.
    """
    epoch, position = divmod(global_sample, num_samples)
    return int(_permutation(seed, epoch, num_samples)[position])


def micro_batch(windows: TokenWindows, seed: int, first_global_sample: int, size: int) -> torch.Tensor:
    """Samples first_global_sample … + size - 1 as int64 ids_BT1 [size, seq_len + 1]."""
    samples = range(first_global_sample, first_global_sample + size)
    return torch.stack([windows.window(sample_index(seed, sample, len(windows))) for sample in samples])


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    # Ranking raw counter-based random words, not Generator.permutation: only the raw stream is promised to stay
    # the same in later versions of numpy (Philox: Salmon et al., 2011).
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(num_samples), kind="stable")
