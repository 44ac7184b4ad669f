"""Where experts should live: permutations that are what they are called, against search and planted structure."""

from itertools import permutations

import numpy as np
import pytest

from twohop.comm.placement import KINDS, LOAD_SLACK, Sample, place, quality


def sample_of(experts: int, tokens: int, top_k: int, topics: int = 1, seed: int = 0, nodes: int = 2) -> Sample:
    """Tokens choose among the experts of one topic; experts of a topic stand far apart, and differ in load."""
    draw = np.random.default_rng(seed)
    topic_E = draw.permutation(np.arange(experts) % topics)
    topic_T = draw.integers(0, topics, tokens)
    logits_TE = draw.gumbel(size=(tokens, experts)) + 0.3 * draw.normal(size=experts)
    logits_TE[topic_T[:, None] != topic_E[None, :]] -= 1e6
    ids_TK = np.argsort(-logits_TE, axis=1)[:, :top_k]
    return Sample(ids_TK, draw.integers(0, nodes, tokens), experts)


def crossings_by_loop(sample: Sample, slots_E: np.ndarray, block: tuple[int, int], shares: str) -> float:
    of_rank = sample.num_experts // (block[0] * block[1])
    crossing = 0
    for ids, home in zip(sample.ids_TK.tolist(), sample.node_T.tolist(), strict=True):
        slots = [slots_E[e] for e in ids if e >= 0]
        node_of = {slot: slot // of_rank // block[1] for slot in slots}
        place_of = {"node": node_of, "rank": {slot: slot // of_rank for slot in slots}, "expert": {s: s for s in slots}}
        crossing += len({place_of[shares][slot] for slot in slots if node_of[slot] != home})
    return crossing / len(sample.ids_TK)


@pytest.mark.parametrize("shares", ["node", "rank", "expert"])
def test_quality_is_what_a_loop_counts(shares: str) -> None:
    sample = sample_of(16, 100, 3, topics=3)
    sample.ids_TK[::7, 1] = -1
    for kind in KINDS:
        slots_E = place(kind, sample.load(), sample.together(), (2, 2))
        found = quality(sample, slots_E, (2, 2), shares)
        assert found.crossing_rows == crossings_by_loop(sample, slots_E, (2, 2), shares)


def test_pairs_and_loads_are_what_a_loop_counts() -> None:
    sample = sample_of(8, 50, 3)
    sample.ids_TK[::5, 2] = -1
    load, together = np.zeros(8), np.zeros((8, 8))
    for ids in sample.ids_TK.tolist():
        for a in (e for e in ids if e >= 0):
            load[a] += 1
            for b in (e for e in ids if e >= 0 and e != a):
                together[a, b] += 1
    assert (sample.load() == load).all()
    assert (sample.together() == together).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("experts", "block"), [(16, (4, 2)), (8, (1, 4)), (12, (3, 1)), (4, (2, 2)), (6, (1, 1))])
def test_a_placement_is_a_permutation_and_the_same_again(kind: str, experts: int, block: tuple[int, int]) -> None:
    sample = sample_of(experts, 200, 2, nodes=block[0])
    slots_E = place(kind, sample.load(), sample.together(), block)
    assert sorted(slots_E) == list(range(experts))
    assert (slots_E == place(kind, sample.load(), sample.together(), block)).all()
    if kind == "contiguous":
        assert (slots_E == np.arange(experts)).all()


def test_balanced_is_near_the_best_of_all_permutations() -> None:
    for seed in range(5):
        sample = sample_of(6, 300, 2, seed=seed)
        load = sample.load() ** 2  # far from even
        found = load[place("balanced", load, sample.together(), (1, 3)).argsort()].reshape(3, 2).sum(1).max()
        best = min(load[list(order)].reshape(3, 2).sum(1).max() for order in permutations(range(6)))
        assert found <= 4 / 3 * best


def test_balanced_begins_with_the_heaviest() -> None:
    load = np.array([3.0, 8.0, 5.0, 4.0, 7.0, 6.0])
    slots_E = place("balanced", load, np.zeros((6, 6)), (3, 1))
    assert np.bincount(slots_E // 2, load).tolist() == [11, 11, 11]


def test_affinity_finds_friends_and_keeps_nodes_even() -> None:
    """Every token stays within one of 4 topics, whose experts fit one node: one row for each token is enough."""
    sample = sample_of(32, 4000, 4, topics=4, nodes=4)
    load, together = sample.load(), sample.together()
    slots_E = place("affinity", load, together, (4, 2))
    contiguous = quality(sample, np.arange(32), (4, 2))
    found = quality(sample, slots_E, (4, 2))
    assert found.crossing_rows == pytest.approx(0.75, abs=0.03)  # unless the token is there already
    assert contiguous.crossing_rows > 1.5
    assert found.rank_load < 1.2


def test_affinity_does_not_gather_load() -> None:
    """Whom chance brings together are no friends: nodes stay within the limit."""
    sample = sample_of(64, 4000, 4, nodes=4)
    load = sample.load()
    slots_E = place("affinity", load, sample.together(), (4, 4))
    of_node = np.bincount(slots_E // 16, load)
    assert of_node.max() <= LOAD_SLACK * of_node.mean() * (1 + 1e-9)
    assert quality(sample, slots_E, (4, 4)).crossing_rows <= quality(sample, np.arange(64), (4, 4)).crossing_rows


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="placement 'best' is unknown: use one of contiguous, balanced, affinity"):
        place("best", np.ones(4), np.zeros((4, 4)), (2, 2))
