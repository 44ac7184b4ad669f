"""Bytes that a rank holds when it holds most, by part: what the passes make, beside what its engine makes of gradients.

Shapes: P moments of the passes, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from twohop.trainer.config import Precision
from twohop.trainer.plan.holding import NUMBER, WIDTHS, Holder
from twohop.trainer.plan.passes import Array, Passes

BUCKET = 32 << 20  # of the engines' messages
NORM_NUMBERS = 4 << 20  # of a gradient that engines look at together
FLAT_NUMBERS = 500_000_000  # that DeepSpeed without ZeRO sends at once
ROOT, EXPERTS = -1, "experts"  # the block of what is outside of blocks; the branch of experts
PLAN_BYTES = 80  # of an assignment: about ten indices, kept for the backward pass


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its peak."""

    weights: float
    gradients: float
    moments: float  # and master copies
    activations: float  # all that the passes make, rows on their way included
    plans: float  # of the dispatches of all layers
    buffers: float  # weights that are gathered, gradients that are sent

    @property
    def peak(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.activations + self.plans + self.buffers


def precision_of_passes(engine: str, precision: Precision) -> Precision:
    """In which the model runs: what autocast would convert comes from FSDP in bf16."""
    return Precision.bf16_params if engine == "fsdp" and precision is Precision.bf16 else precision


def memory_of(holder: Holder, passes: Passes, micro_batch: int, accumulates: bool) -> Memory:
    """Memory of a rank.

    Args:
        holder: the rank.
        passes: of the model, in `precision_of_passes`.
        micro_batch: sequences.
        accumulates: a step has more than one micro-batch.
    """
    made_P = passes.once_P + micro_batch * passes.each_P + passes.copies_PL @ holder.local_experts
    plans = PLAN_BYTES * micro_batch * sum(layer.tokens * layer.top_k for layer in holder.shape.layers)
    moments = _fsdp if holder.engine == "fsdp" else _whole
    gradients, made, kept, buffers = max(
        (
            (gradients, made, plans if made else 0.0, buffers)
            for gradients, made, buffers in moments(holder, passes, made_P, accumulates)
        ),
        key=sum,
    )
    return Memory(holder.weights, gradients, holder.moments, made, kept, buffers)


Moment = tuple[float, float, float]  # bytes of gradients, of what the passes make, of buffers


def _most(gradients_P: Array, made_P: Array, buffers_P: Array) -> Moment:
    i = int(np.argmax(gradients_P + made_P + buffers_P))
    return float(gradients_P[i]), float(made_P[i]), float(buffers_P[i])


def _whole(holder: Holder, passes: Passes, made_P: Array, accumulates: bool) -> Iterator[Moment]:
    """Engines whose ranks compute with weights of their own."""
    sizes = [holder.local(holder.shape.parameters[name]) for name in passes.order]
    width = WIDTHS[holder.precision][1]
    whole, share = width * sum(sizes), NUMBER * holder.shared
    engine, none_P = holder.engine, np.zeros_like(made_P)
    if engine in ("ddp", "zero0"):
        arrived_P = width * np.concatenate([[0.0], np.cumsum(sizes)])[passes.done_P]
        yield _most(none_P + whole if accumulates else arrived_P, made_P, none_P)
        gradients, made, buffer = _sums(holder, whole)
        yield gradients, made, max(buffer, _copy_for_norm(holder))
    else:  # DeepSpeed's bucket takes gradients, sends them as one more copy, and keeps this rank's share
        bucket_P = np.where(passes.done_P > 0, float(BUCKET), 0.0)  # the first one brings it along
        if engine == "zero1":  # makes all gradients before the last backward pass
            yield _most(none_P + whole, made_P, bucket_P)
            copied = min(BUCKET, NUMBER * max(map(sum, _replicated_alike(holder).values())))
            yield whole - min(BUCKET, whole) + share, 0.0, BUCKET + copied
        else:
            before = share if accumulates else 0.0
            yield _most(none_P + before, made_P, bucket_P)
            # Buckets are sent amid the pass, when a gradient does not fit. Memory for the whole share is taken after.
            for number, (done, sent) in enumerate(_buckets(holder, passes)):
                made = max(made_P[passes.done_P == done], default=0.0)
                yield before + (share if number else 0.0), float(made), BUCKET + sent
            yield before + share, 0.0, BUCKET
        yield share, 0.0, BUCKET + max(share, _copy_for_norm(holder))  # for the update


def _sums(holder: Holder, whole: float) -> Moment:
    """Gradients of all replicas are added up."""
    groups = _replicated_alike(holder)
    if holder.engine == "zero0":
        return whole, 0.0, NUMBER * min(FLAT_NUMBERS, max(map(sum, groups.values())))
    width = WIDTHS[holder.precision][1]
    sent = [numbers for ep_size, numbers in groups.items() if holder.world > max(1, ep_size)]
    buckets = [width * max(min(BUCKET // width, sum(numbers)), *numbers) for numbers in sent]
    if holder.precision is Precision.bf16_params:  # masters get fp32 gradients; the last bucket of each kind is there
        return NUMBER * holder.held, 0.0, sum(buckets)
    return whole, 0.0, max(buckets, default=0.0)


def _copy_for_norm(holder: Holder) -> float:
    """Of the largest gradient, in fp64, for its norm."""
    return 2 * NUMBER * min(NORM_NUMBERS, max(map(holder.share, holder.shape.parameters.values())))


def _buckets(holder: Holder, passes: Passes) -> Iterator[tuple[int, float]]:
    """How many gradients there are when each of ZeRO-2's buckets is sent, and the bytes that this takes beside it."""
    filled = 0.0
    sizes: dict[int, float] = {}  # of each kind of replicas, which are sent one after the other
    for done, name in enumerate(passes.order):
        parameter = holder.shape.parameters[name]
        size = NUMBER * holder.local(parameter)
        if filled and filled + size > BUCKET:
            yield done, _sending(filled, sizes)
            filled, sizes = 0.0, {}
        kind = holder.ep_sizes[parameter.layer] if parameter.layer >= 0 else 0
        sizes[kind] = sizes.get(kind, 0.0) + size
        filled += size
    yield len(passes.order), _sending(filled, sizes)


def _sending(filled: float, sizes: dict[int, float]) -> float:
    """A copy of each part; what is too large for the bucket stands outside of it."""
    return max(sizes.values()) + (filled if filled > BUCKET else 0.0)


def _replicated_alike(holder: Holder) -> dict[int, list[float]]:
    """Numbers of each dense parameter (key 0), and of the experts' parameters of each EP size."""
    numbers: dict[int, list[float]] = {}
    for parameter in holder.shape.parameters.values():
        key = holder.ep_sizes[parameter.layer] if parameter.layer >= 0 else 0
        numbers.setdefault(key, []).append(holder.local(parameter))
    return numbers


def _fsdp(holder: Holder, passes: Passes, made_P: Array, accumulates: bool) -> Iterator[Moment]:
    """Weights are gathered module by module; gradients of a module are summed and shared out when it is done."""
    width = NUMBER if holder.precision is Precision.fp32 else 2  # of what is gathered, and of its gradients
    parameters = [holder.shape.parameters[name] for name in passes.order]
    block_P = np.array([parameter.block for parameter in parameters])[passes.done_P]  # whose gradient comes next
    arrived_P = np.concatenate([[0.0], np.cumsum([holder.local(p) for p in parameters])])[passes.done_P]
    groups = _gathered_together(holder)
    root = sum(groups[ROOT].values())
    sent, shared, waiting = 0.0, 0.0, holder.held if accumulates else 0.0
    # Gradients in fp32 are added to those that wait; others stand beside them until their module is done.
    arriving = 0 if accumulates and width == NUMBER else width
    outside = 0.0  # numbers that have gradients and belong to no block
    for start, end in _runs(block_P):
        block = int(block_P[start])
        own = groups[block] if block != ROOT else {}
        after = block_P[end:][block_P[end:] != ROOT]  # blocks whose turn comes later
        following = groups[int(after[0])] if len(after) else {}
        weights = width * (root + sum(own.values()) + max(following.values(), default=0.0))
        inside_P = arrived_P[start:end] - arrived_P[start]
        gradients_P = arriving * (outside + inside_P) + NUMBER * (shared + waiting)
        none_P = np.zeros(end - start)
        yield _most(gradients_P, made_P[start:end], none_P + weights + NUMBER * sent)
        of_run = parameters[passes.done_P[start] : (passes.done_P[end] if end < len(block_P) else None)]
        total = sum(map(holder.local, of_run))
        if block == ROOT:
            outside += total
            continue
        # Experts, which are not cut along their first dimension, are there three times while they are put together.
        together = width * (root + own.get("", 0.0) + 3 * own.get(EXPERTS, 0.0)) + NUMBER * sent
        yield float(gradients_P[0]), float(made_P[start]), together
        largest = max(own.values(), default=0.0)
        message = NUMBER * (sent + largest)  # the last one is kept until the next has been made
        yield float(gradients_P[0]) + arriving * total, float(made_P[end - 1]), weights - width * largest + message
        sent, shared = largest, shared + sum(map(holder.share, of_run))
        waiting -= total if accumulates else 0.0
    yield arriving * outside + NUMBER * (shared + waiting), 0.0, NUMBER * (sent + root)
    yield NUMBER * holder.shared, 0.0, _copy_for_norm(holder)


def _gathered_together(holder: Holder) -> dict[int, dict[str, float]]:
    """Numbers of each group of parameters that FSDP gathers at once, by block and by branch of its MoE layer."""
    groups: dict[int, dict[str, float]] = {}
    whole = [holder.world // ep == 1 for ep in holder.ep_sizes]  # these layers' experts are nobody else's
    layer_of = {p.block: p.layer for p in holder.shape.parameters.values() if p.layer >= 0}
    for parameter in holder.shape.parameters.values():
        if parameter.layer >= 0:
            if whole[parameter.layer]:
                continue
            branch = EXPERTS
        else:
            apart = parameter.branch and not whole[layer_of[parameter.block]]
            branch = parameter.branch if apart else ""
        of_block = groups.setdefault(parameter.block, {})
        of_block[branch] = of_block.get(branch, 0.0) + holder.local(parameter)
    return groups


def _runs(values_P: Array) -> list[tuple[int, int]]:
    """(start, end) of each run of equal values."""
    cuts = [0, *(np.flatnonzero(np.diff(values_P)) + 1).tolist(), len(values_P)]
    return list(pairwise(cuts))
