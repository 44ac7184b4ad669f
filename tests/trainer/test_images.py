"""Images as samples: the digits are scikit-learn's own, each in one split."""

import math
from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits

from twohop.trainer.config import DataConfig
from twohop.trainer.data import build_data
from twohop.trainer.data.images import Images, Pictures, build_image_data


def rows(split: Images) -> Counter:
    """Every image with its class, as plain numbers from 0 to 16."""
    pixels = ((split.pixels_SCHW + 1) * 8).flatten(1)
    assert torch.equal(pixels, pixels.round())
    return Counter((*row, label) for row, label in zip(pixels.int().tolist(), split.classes_S.tolist(), strict=True))


def test_splits_are_all_digits_each_in_one() -> None:
    data = build_image_data("digits", 0.2)
    assert (len(data.train), len(data.valid)) == (1438, 359)
    assert (data.num_classes, data.image_shape) == (10, (1, 8, 8))
    found = load_digits()
    whole = Counter((*map(int, image.flatten()), int(label)) for image, label in zip(found.images, found.target))  # noqa: B905
    assert rows(data.train) + rows(data.valid) == whole
    assert len(data.valid.classes_S.unique()) == 10


def test_the_split_is_the_same_every_time_and_part_of_the_fingerprint() -> None:
    once, again, other = (build_image_data("digits", fraction) for fraction in (0.2, 0.2, 0.3))
    assert torch.equal(once.valid.pixels_SCHW, again.valid.pixels_SCHW)
    assert once.fingerprint == again.fingerprint != other.fingerprint
    # More validation images are those, and more of the others.
    assert torch.equal(other.valid.pixels_SCHW[: len(once.valid)], once.valid.pixels_SCHW)


@pytest.mark.parametrize(("fraction", "expected"), [(1e-9, 1), (1 - 1e-9, 1796)])
def test_both_splits_have_an_image(fraction: float, expected: int) -> None:
    assert len(build_image_data("digits", fraction).valid) == expected


def test_a_batch_holds_what_the_model_is_called_with() -> None:
    data = build_data(DataConfig(source="digits", valid_fraction=0.2), seq_len=256)
    batch = data.train.batch([7, 3, 7])
    images = batch.inputs["images_BCHW"]
    assert (images.shape, images.dtype) == ((3, 1, 8, 8), torch.float32)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(images[0], images[2])
    assert batch.inputs["sample_B"].tolist() == [7, 3, 7]
    assert (batch.targets.shape, batch.targets.dtype) == ((3,), torch.int64)
    assert batch.targets[0] == batch.targets[2]
    assert data.train.num_targets([7, 3, 7]) == 3
    assert (data.tokenizer, data.unit, data.num_classes) == (None, "image", 10)


def test_entropy_of_classes() -> None:
    pictures = Pictures(torch.zeros(4, 1, 2, 2).byte().numpy(), torch.tensor([0, 0, 2, 1]).byte().numpy(), 16)
    split = Images(pictures, torch.arange(4).numpy())
    assert split.target_entropy() == pytest.approx(1.5 * math.log(2))
