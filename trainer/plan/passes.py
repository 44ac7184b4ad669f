"""Forward and backward of a micro-batch on tensors without memory: what is alive when, and how much is multiplied.

The model's own code runs, recomputation included, so that whatever it comes to keep is counted. Only the dispatcher is
a stand-in (see `stand_in`), and sequences have no padding that could be left out. Time is cut where a parameter gets
its gradient, so that any engine's gradients can be laid beside the rest.

Shapes: P moments, L MoE layers.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from twohop.models import ModelConfig, MoEModel
from twohop.models.build import MODELS
from twohop.trainer.config import Precision, Recompute
from twohop.trainer.objective import cross_entropy_sum
from twohop.trainer.plan.stand_in import FIRST_NUMBER, StandIn, grouped_products, stand_ins
from twohop.trainer.transforms.recompute import recompute_activations

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Passes:
    """Forward and backward of a micro-batch: moments of much memory, at least one before each gradient comes."""

    once_P: Array  # bytes that are neither parameters nor their gradients, whatever the micro-batch
    each_P: Array  # the same, for each sequence
    copies_PL: Array  # the same, for each local expert: its weights in another precision, a gradient on its way
    done_P: NDArray[np.int64]  # how many parameters have their gradients
    order: tuple[str, ...]  # names of the parameters as their gradients come
    operations: float  # for each sequence, of all products but the experts'; without attention's in backward
    expert_operations: tuple[float, ...]  # of the experts' products but those for gradients of weights, of each layer
    dispatched: tuple[float, ...]  # how often rows travel to the experts of each layer in the forward direction
    combined: tuple[float, ...]  # how often they travel home


class _Watch(TorchDispatchMode):
    """Adds up the storages that operations make, until they are gone, and the operations of products."""

    def __init__(self, model: MoEModel, layers: int) -> None:
        super().__init__()
        self.rest, self.copies_L = 0.0, np.zeros(layers)
        self.operations, self.operations_L = 0.0, np.zeros(layers)  # of the experts' products that make rows
        self.done: list[str] = []  # parameters with gradients
        self.points: list[tuple[float, Array, int]] = []  # (rest, copies, parameters with gradients) when most is alive
        self.most = self.most_copies = self._now()
        self.made: weakref.WeakKeyDictionary[Any, _Made] = weakref.WeakKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self.made[tensor.untyped_storage()] = _Made(self._layer(tensor), 0.0)
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        out = _without_padding(func, args) if _leaves_out(func, args) else func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # torch has no count
            self.operations += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif func._overloadpacket in flop_registry:
            operations = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            layer = max(self.made[tensor.untyped_storage()].layer for tensor in args if isinstance(tensor, Tensor))
            if layer < 0:
                self.operations += operations
            else:
                self.operations_L[layer] += operations
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.made:
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        layer = self._layer(tensor)
        made = _Made(layer, storage.nbytes() / (tensor.shape[0] if layer >= 0 else 1))
        self.made[storage] = made
        weakref.finalize(storage, self._add, made, -1)
        self._add(made, 1)
        if self.rest > self.most[0]:
            self.most = self._now()
        if self.copies_L.sum() > self.most_copies[1].sum():
            self.most_copies = self._now()

    def _layer(self, tensor: Tensor) -> int:
        """To whose experts it belongs: -1 for none."""
        layer = tensor.shape[0] - FIRST_NUMBER if tensor.dim() else -1
        return layer if 0 <= layer < len(self.copies_L) else -1

    def _arrived(self, name: str, parameter: Tensor) -> None:
        """From now on the gradient is counted elsewhere."""
        self.points += [self.most, self.most_copies]
        self.done.append(name)
        assert parameter.grad is not None
        made = self.made[parameter.grad.untyped_storage()]
        self._add(made, -1)
        made.size = 0.0
        self.most = self.most_copies = self._now()

    def _add(self, made: "_Made", sign: int) -> None:
        if made.layer < 0:
            self.rest += sign * made.size
        else:
            self.copies_L[made.layer] += sign * made.size

    def _now(self) -> tuple[float, Array, int]:
        return self.rest, self.copies_L.copy(), len(self.done)


def _leaves_out(func: Any, args: Any) -> bool:
    """Whether an operation takes what a mask lets through: how much that is only its values can tell."""
    takes = func in (torch.ops.aten.index.Tensor, torch.ops.aten.masked_scatter_backward.default)
    return takes and (args[1][0] if isinstance(args[1], (list, tuple)) else args[1]).dtype is torch.bool


def _without_padding(func: Any, args: Any) -> Tensor:
    """What such an operation makes where the mask lets everything through."""
    if func is torch.ops.aten.masked_scatter_backward.default:
        grad, _, sizes = args
        return grad.new_empty(sizes)
    x, (mask,) = args
    return x.new_empty(mask.numel(), *x.shape[mask.dim() :])


@dataclass(eq=False)
class _Made:
    """A storage: of which layer's experts, -1 for none; bytes, of one expert if it is theirs."""

    layer: int
    size: float


def passes(
    config: ModelConfig,
    seq_len: int,
    source_len: int | None,
    precision: Precision,
    recompute: Recompute,
    loads: Sequence[float] | None = None,
) -> Passes:
    """Run one sequence, and two; a few seconds for a large model.

    Args:
        config: of the model; lengths as in `model_shape`.
        seq_len: see there.
        source_len: see there.
        precision: as the engine runs the model.
        recompute: as train.recompute.
        loads: of each MoE layer, the rows that come to this rank's experts ÷ those of a mean rank; None: 1.
    """
    loads = loads or [1.0] * (len(config.experts_by_layer))
    one, two = (_run(config, (seq_len, source_len), sequences, precision, recompute, loads) for sequences in (1, 2))
    (rest_1P, copies_PL, done_P), (rest_2P, _, _) = (
        tuple(np.array(column, dtype=np.float64) for column in zip(*watch.points, strict=True))
        for watch, _ in (one, two)
    )
    watch, ways = one
    each_P = rest_2P - rest_1P
    return Passes(
        once_P=rest_1P - each_P,
        each_P=each_P,
        copies_PL=copies_PL,
        done_P=done_P.astype(np.int64),
        order=tuple(watch.done),
        operations=watch.operations,
        expert_operations=tuple(watch.operations_L),
        dispatched=tuple(way.dispatched for way in ways),
        combined=tuple(way.combined for way in ways),
    )


def _run(
    config: ModelConfig,
    lengths: tuple[int, int | None],
    sequences: int,
    precision: Precision,
    recompute: Recompute,
    loads: Sequence[float],
) -> tuple[_Watch, list[StandIn]]:
    ways = stand_ins(config, loads)
    with FakeTensorMode(), grouped_products():
        model = MODELS[config.kind](config, ways)
        if precision is Precision.bf16_params:
            routers = {parameter for _, layer in model.moe_layers() for parameter in layer.router.parameters()}
            for parameter in set(model.parameters()) - routers:
                parameter.data = parameter.data.bfloat16()
        recompute_activations(model, recompute)
        inputs, targets = _batch(config, sequences, *lengths)
        with _Watch(model.train(), len(ways)) as watch:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
                output = model(**inputs)
                losses = [loss for stats in output.moe for loss in stats.losses.values()]
                losses += output.losses.values()
                loss = torch.stack([cross_entropy_sum(output.logits, targets), *losses]).sum()
            del output  # as the training loop does
            loss.backward()
    return watch, ways


def _batch(
    config: ModelConfig, sequences: int, seq_len: int, source_len: int | None
) -> tuple[dict[str, Tensor], Tensor]:
    """What the loader would bring (see `twohop.trainer.data`): inputs by name, and targets."""
    per_sequence = torch.zeros(sequences, dtype=torch.int64)
    if config.vision is not None:
        images = torch.zeros(sequences, config.vision.channels, config.vision.image_size, config.vision.image_size)
        return {"images_BCHW": images}, per_sequence
    ids_BT = torch.zeros(sequences, seq_len, dtype=torch.int64)
    if source_len is None:
        return {"ids_BT": ids_BT}, ids_BT
    inputs = {
        "source_BS": torch.zeros(sequences, source_len, dtype=torch.int64),
        "source_length_B": per_sequence,
        "ids_BT": ids_BT,
        "length_B": torch.zeros_like(per_sequence),
        "task_B": torch.zeros_like(per_sequence),
    }
    return inputs, torch.zeros_like(ids_BT)
