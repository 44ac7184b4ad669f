#!/usr/bin/env python3
"""python scripts/bench/place.py

Processor time of a placement of 256 experts on 64 ranks (`twohop.comm.placement`), from 8,192 tokens with K = 8, and
what it does to them: tokens of 8 topics, whose experts stand anywhere, and tokens that choose by chance.
"""

import time

import numpy as np

from twohop.comm.placement import KINDS, Sample, place, quality

EXPERTS, BLOCK, TOKENS, TOP_K, TOPICS = 256, (8, 8), 8192, 8, 8


def sample(topics: int) -> Sample:
    """Experts of a token's topic are likelier by a factor of 12; experts differ in load."""
    draw = np.random.default_rng(0)
    topic_E, topic_T = draw.permutation(np.arange(EXPERTS) % topics), draw.integers(0, topics, TOKENS)
    logits_TE = draw.gumbel(size=(TOKENS, EXPERTS)) + 0.3 * draw.normal(size=EXPERTS)
    logits_TE += 2.5 * (topic_T[:, None] == topic_E[None, :])
    return Sample(np.argsort(-logits_TE, 1)[:, :TOP_K], draw.integers(0, BLOCK[0], TOKENS), EXPERTS)


def main() -> None:
    print("| tokens | placement | counting, ms | placing, ms | rows between nodes | fullest rank ÷ mean |")
    print("|---|---|---|---|---|---|")
    for name, topics in (("of 8 topics", TOPICS), ("by chance", 1)):
        seen = sample(topics)
        for kind in KINDS:
            times = []
            for _ in range(5):
                started = time.process_time()
                load_E, together_EE = seen.load(), seen.together()
                counted = time.process_time()
                slots_E = place(kind, load_E, together_EE, BLOCK)
                times.append((counted - started, time.process_time() - counted))
            counting, placing = (1e3 * sorted(column)[2] for column in zip(*times, strict=True))
            found = quality(seen, slots_E, BLOCK)
            seconds = f"{counting:.1f} | {placing:.1f}"
            print(f"| {name} | {kind} | {seconds} | {found.crossing_rows:.2f} | {found.rank_load:.2f} |")


if __name__ == "__main__":
    main()
