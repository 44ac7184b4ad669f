"""Images with classes, whole data sets that a package carries: kept in memory, split once for all.

Shapes: S images of a split, B images of a batch, C channels, H height, W width.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from twohop.trainer.data.samples import Batch


class Pictures(NamedTuple):
    """A data set before it is split."""

    pixels_SCHW: np.ndarray  # uint8
    classes_S: np.ndarray  # uint8, from 0
    brightest: int  # the largest value that a pixel can have


def digits() -> Pictures:
    """1,797 scans of handwritten digits, 8×8 pixels in 17 shades, from scikit-learn (Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits  # takes a second to import

    found = load_digits()
    return Pictures(found.images[:, None].astype(np.uint8), found.target.astype(np.uint8), brightest=16)


IMAGES: dict[str, Callable[[], Pictures]] = {"digits": digits}


class Images:
    """A split as training samples: `Samples` whose inputs are pixels from -1 to 1 and whose targets are classes."""

    def __init__(self, pictures: Pictures, numbers: np.ndarray) -> None:
        self.pixels_SCHW = torch.from_numpy(pictures.pixels_SCHW[numbers]).float() * (2 / pictures.brightest) - 1
        self.classes_S = torch.from_numpy(pictures.classes_S[numbers]).long()

    def __len__(self) -> int:
        return len(self.classes_S)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """See `Samples`: images_BCHW, and the class of each."""
        chosen_B = torch.tensor(list(numbers))
        return Batch({"images_BCHW": self.pixels_SCHW[chosen_B], "sample_B": chosen_B}, self.classes_S[chosen_B])

    def num_targets(self, numbers: Sequence[int]) -> int:
        """See `Samples`: an image has one."""
        return len(numbers)

    def target_entropy(self) -> float:
        """See `Samples`: of the classes."""
        p = self.classes_S.bincount() / len(self)
        return float(torch.special.entr(p.double()).sum())


class ImageData(NamedTuple):
    """Both splits of a data set."""

    train: Images
    valid: Images
    num_classes: int
    image_shape: tuple[int, int, int]  # channels, height, width
    fingerprint: str


def build_image_data(source: str, valid_fraction: float) -> ImageData:
    """The data set `IMAGES[source]`, with `valid_fraction` of its images for validation, whatever the run's seed."""
    pictures = IMAGES[source]()
    digest = hashlib.sha256(pictures.pixels_SCHW.tobytes() + pictures.classes_S.tobytes())
    # Neighbours in a data set are often of one writer or one class: so it is shuffled, always alike.
    shuffled_S = np.argsort(np.random.Philox(key=0).random_raw(len(pictures.classes_S)), kind="stable")
    num_valid = min(max(1, round(valid_fraction * len(shuffled_S))), len(shuffled_S) - 1)
    digest.update(str(num_valid).encode())
    _, channels, height, width = pictures.pixels_SCHW.shape
    return ImageData(
        train=Images(pictures, shuffled_S[num_valid:]),
        valid=Images(pictures, shuffled_S[:num_valid]),
        num_classes=int(pictures.classes_S.max()) + 1,
        image_shape=(channels, height, width),
        fingerprint=digest.hexdigest(),
    )
