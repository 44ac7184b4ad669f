"""What training and validation draw from: samples by number, put together as batches.

A new kind of data is a class with the methods of `Samples`. Shapes: B samples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

IGNORED = -100  # a target that counts neither for the loss nor for its mean


class Batch(NamedTuple):
    """Samples put together: what the model is called with, by name, and the class wanted at each of its outputs."""

    inputs: dict[str, Tensor]
    targets: Tensor  # int64, the shape of the model's logits without their last dimension; IGNORED: none wanted
    group_B: Tensor | None = None  # int64 on the host: which of `Data.groups` each sample belongs to

    def to(self, device: object) -> "Batch":
        """The same on a device, but for the samples' numbers, which are read on the host alone.

        From pinned memory the copy is only begun: what is queued on the device afterwards finds it done.
        """
        return self._with(lambda x: x.to(device, non_blocking=True))  # type: ignore[call-overload]

    def pinned(self) -> "Batch":
        """The same in memory that a GPU can read by itself."""
        return self._with(Tensor.pin_memory)

    def _with(self, place: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {name: x if name == "sample_B" else place(x) for name, x in self.inputs.items()}
        return Batch(inputs, place(self.targets), self.group_B)


class Samples(Protocol):
    """One split of a data set."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The samples with these numbers, each in [0, len)."""
        ...

    def num_targets(self, numbers: Sequence[int]) -> int:
        """How many targets of these samples are not IGNORED: known without loading them."""
        ...

    def target_entropy(self) -> float:
        """Entropy of the targets' frequencies in nats: the loss of the best model that sees no input."""
        ...
