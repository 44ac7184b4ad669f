"""Slow and plain routing in lists of numbers, written apart from the routers, for tests to compare with."""

import math
from collections.abc import Sequence

Row = list[float]
Matrix = list[Row]


def softmax(row: Sequence[float]) -> Row:
    largest = max(row)
    exps = [math.exp(x - largest) for x in row]
    return [e / sum(exps) for e in exps]


def sigmoid(row: Sequence[float]) -> Row:
    return [1 / (1 + math.exp(-x)) for x in row]


def best(row: Sequence[float], count: int) -> list[int]:
    """Places of the largest, in descending order."""
    return sorted(range(len(row)), key=lambda i: -row[i])[:count]


def softmax_topk(logits: Row, top_k: int, renormalize: bool) -> tuple[list[int], Row]:
    probs = softmax(logits)
    ids = best(probs, top_k)
    total = sum(probs[i] for i in ids) if renormalize else 1
    return ids, [probs[i] / total for i in ids]


def topk_softmax(logits: Row, top_k: int) -> tuple[list[int], Row]:
    ids = best(logits, top_k)
    return ids, softmax([logits[i] for i in ids])


def deepseek(
    logits: Row, bias: Row, top_k: int, groups: int, top_groups: int, renormalize: bool, scale: float
) -> tuple[list[int], Row]:
    scores = sigmoid(logits)
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // groups
    parts = [biased[g * size : (g + 1) * size] for g in range(groups)]
    allowed = best([sum(sorted(part)[-2:]) for part in parts], top_groups)
    candidates = [e for e in range(len(logits)) if e // size in allowed]
    ids = [candidates[i] for i in best([biased[e] for e in candidates], top_k)]
    total = sum(scores[i] for i in ids) if renormalize else 1
    return ids, [scale * scores[i] / total for i in ids]


def expert_choice(logits: Matrix, average: int) -> list[dict[int, float]]:
    """Of each token, the experts that took it and their weights."""
    probs = [softmax(row) for row in logits]
    num_tokens, num_experts = len(probs), len(probs[0])
    taken = min(num_tokens, max(1, num_tokens * average // num_experts))
    chosen: list[dict[int, float]] = [{} for _ in probs]
    for e in range(num_experts):
        for n in best([row[e] for row in probs], taken):
            chosen[n][e] = probs[n][e]
    return chosen


def sinkhorn(logits: Matrix, iterations: int) -> Matrix:
    matrix = [[math.exp(x) for x in row] for row in logits]
    for _ in range(iterations):
        column_sums = [sum(column) for column in zip(*matrix, strict=True)]
        matrix = [[x / s / len(row) for x, s in zip(row, column_sums, strict=True)] for row in matrix]
        matrix = [[x / sum(row) / len(matrix) for x in row] for row in matrix]
    return matrix


def balance(probs: Matrix, ids: list[list[int]]) -> float:
    """E · Σ f · P over the given tokens."""
    num_experts, places = len(probs[0]), sum(map(len, ids))
    total = 0.0
    for e in range(num_experts):
        fraction = sum(row.count(e) for row in ids) / places
        total += fraction * sum(row[e] for row in probs) / len(probs)
    return num_experts * total


def squared_variation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def importance(logits: Matrix) -> float:
    probs = [softmax(row) for row in logits]
    return squared_variation([sum(column) for column in zip(*probs, strict=True)])


def load(logits: Matrix, noisy: Matrix, std: float, top_k: int) -> float:
    def chance(clean: float, threshold: float) -> float:
        return 1 - 0.5 * (1 + math.erf((threshold - clean) / std / math.sqrt(2)))

    thresholds = [sorted(row)[-top_k] for row in noisy]
    chances = [[chance(x, t) for x in row] for row, t in zip(logits, thresholds, strict=True)]
    return squared_variation([sum(column) / len(logits) for column in zip(*chances, strict=True)])


def z(logits: Matrix) -> float:
    return sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits) / len(logits)
