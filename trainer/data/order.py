"""Which sample comes when: a function of (seed, global sample index) alone.

World size, accumulation and restarts have no say in it, so a run continues on any number of ranks with
exactly the samples that it has not seen.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from twohop.trainer.config import DataOrder

ENDLESS = 2**48  # the number of samples of a stream: they come as they stand in it
DRAWS = 2**16  # over which the shares of a mixture are exact to one draw


class Mixture(NamedTuple):
    """Corpora whose samples are numbered one corpus after the other, and how often each is drawn."""

    lengths: tuple[int, ...]  # samples of each
    weights: tuple[float, ...]  # in proportion to the draws


def step_numbers(
    order: DataOrder, seed: int, step: int, size: int, num_samples: int, mixture: Mixture | None = None
) -> list[int]:
    """The samples of the global batch of `step`, counted from 0, which holds `size` of them."""
    if mixture is not None:
        return [_mixed(seed, step * size + i, mixture) for i in range(size)]
    if order is DataOrder.samples:
        return sample_numbers(seed, step * size, size, num_samples)
    # The batches are those of the first epoch in order of samples; every epoch is a permutation of them.
    batch = sample_index(seed, step, num_samples // size)
    return sample_numbers(seed, batch * size, size, num_samples)


def sample_index(seed: int, global_sample: int, num_samples: int) -> int:
    """The sample in [0, num_samples) that is the `global_sample`-th of the whole training, counted from 0.

    Every epoch of num_samples draws is a permutation of its own: each sample once.
    """
    if num_samples == ENDLESS:
        return global_sample
    epoch, position = divmod(global_sample, num_samples)
    return int(_epochs(seed, num_samples)(epoch)[position])


def sample_numbers(seed: int, first_global_sample: int, size: int, num_samples: int) -> list[int]:
    """The samples drawn as first_global_sample … + size - 1 of the whole training."""
    return [sample_index(seed, first_global_sample + i, num_samples) for i in range(size)]


def shares(weights: tuple[float, ...], draws: int = DRAWS) -> list[int]:
    """How many of `draws` each corpus gets: its share, rounded so that they add up (largest remainders first)."""
    exact = np.array(weights) / sum(weights) * draws
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: draws - counts.sum()]] += 1
    return counts.tolist()


def _mixed(seed: int, global_sample: int, mixture: Mixture) -> int:
    """The sample that is drawn as the `global_sample`-th: of which corpus, and which of its own epoch."""
    block, place = divmod(global_sample, DRAWS)
    corpus_D, turn_D = _draws(seed, block, mixture.weights)
    corpus, turn = int(corpus_D[place]), int(turn_D[place])
    own = block * shares_of(mixture.weights)[corpus] + turn
    return sum(mixture.lengths[:corpus]) + sample_index(_seed_of(seed, corpus), own, mixture.lengths[corpus])


@lru_cache(maxsize=2)
def _draws(seed: int, block: int, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The corpora of DRAWS draws, and how often each was drawn before within them.

    A corpus with n draws has one in each n-th of them, at a random place: so every stretch has the shares of the whole,
    to a draw or two, and no period meets that of micro-batches and ranks.
    """
    corpora, turns, places = [], [], []
    for corpus, count in enumerate(shares_of(weights)):
        jitter = np.random.Philox(key=_key(_seed_of(seed, corpus), block)).random_raw(count) / 2**64
        corpora.append(np.full(count, corpus))
        turns.append(np.arange(count))
        places.append((turns[-1] + jitter) / count)
    by_place = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(corpora)[by_place], np.concatenate(turns)[by_place]


shares_of = lru_cache(maxsize=8)(shares)


@lru_cache(maxsize=64)
def _seed_of(seed: int, corpus: int) -> int:
    """A seed of its own for a corpus of a mixture."""
    return int.from_bytes(hashlib.sha256(f"{seed}/corpus/{corpus}".encode()).digest()[:8], "little")


@lru_cache(maxsize=64)  # the corpora of a mixture
def _epochs(seed: int, num_samples: int) -> Callable[[int], np.ndarray]:
    return lru_cache(maxsize=2)(partial(_permutation, seed, num_samples))  # a batch may straddle two epochs


def _permutation(seed: int, num_samples: int, epoch: int) -> np.ndarray:
    # Ranking raw counter-based random words, not Generator.permutation: only the raw stream is promised to stay
    # the same in later versions of numpy (Philox: Salmon et al., 2011).
    return np.argsort(np.random.Philox(key=_key(seed, epoch)).random_raw(num_samples), kind="stable")


def _key(seed: int, number: int) -> np.ndarray:
    return np.array([seed % 2**64, number], dtype=np.uint64)
