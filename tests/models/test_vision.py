"""The vision Transformer: against a convolution and plain loops, what its tokens see, and where its experts stand."""

from typing import Any

import pytest
import torch

from tests.models.attention_reference import rms_norm
from tests.models.reference import feed_forward, moe_layer
from twohop.models import ModelConfig, MoEConfig, MoEModel, RouterConfig, build_model, init_weights
from twohop.models.config import BatchPriority, ModelKind, VisionConfig
from twohop.models.vision import VisionTransformer


def tiny(moe: MoEConfig | None = None, **options: Any) -> ModelConfig:
    defaults = {"vocab_size": 5, "dim": 16, "num_layers": 4, "num_heads": 2, "ffn_dim": 24, "init_std": 0.3}
    vision = options.pop("vision", VisionConfig(image_size=6, patch_size=2, channels=3))
    return ModelConfig(kind=ModelKind.vit, vision=vision, **{**defaults, **options}, moe=moe or MoEConfig())


def build(config: ModelConfig) -> MoEModel:
    model = build_model(config).double()
    init_weights(model, seed=0)
    return model.eval()


def make_images(batch: int, channels: int = 3, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)


def attention(module: torch.nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """Every position sees every other, without any rotation."""
    heads = []
    for q, k, v in zip(*(w(x_TD).split(module.head_dim, -1) for w in (module.wq, module.wk, module.wv)), strict=True):
        exp = (q @ k.T / module.head_dim**0.5).exp()
        heads.append(exp / exp.sum(-1, keepdim=True) @ v)
    return module.wo(torch.cat(heads, -1))


def test_model_is_what_its_definition_says() -> None:
    config = tiny(MoEConfig(experts=[4], router=RouterConfig(top_k=2)), vision=VisionConfig(6, 3, 2))
    model, images = build(config), make_images(3, channels=2)
    # Patches by a convolution whose kernels are the rows of `embed`.
    kernels = model.embed.weight.view(16, 2, 3, 3)
    x_BTD = torch.nn.functional.conv2d(images, kernels, stride=3).flatten(2).mT + model.position
    for block in model.blocks:
        h_BTD = rms_norm(x_BTD, block.attention_norm.weight)
        x_BTD = x_BTD + torch.stack([attention(block.attention, h_TD) for h_TD in h_BTD])
        h_BTD = rms_norm(x_BTD, block.ffn_norm.weight)
        if block.is_moe:
            x_BTD = x_BTD + moe_layer(block.moe, config.moe, h_BTD, None)[0]
        else:
            weights = block.mlp.up.weight, block.mlp.down.weight, config.activation
            x_BTD = x_BTD + torch.stack([torch.stack([feed_forward(h, *weights) for h in h_TD]) for h_TD in h_BTD])
    expected = rms_norm(x_BTD, model.norm.weight).mean(1) @ model.head.weight.T
    output = model(images)
    torch.testing.assert_close(output.logits, expected, rtol=1e-10, atol=1e-10)
    assert len(output.moe) == 2


def test_without_positions_the_order_of_patches_means_nothing() -> None:
    model, images = build(tiny()), make_images(2)
    rolled = images.roll(2, -1)  # by one patch
    assert not torch.allclose(model(rolled).logits, model(images).logits)
    model.position.data.zero_()
    torch.testing.assert_close(model(rolled).logits, model(images).logits, rtol=1e-10, atol=1e-10)


def test_images_are_classified_one_by_one_unless_a_capacity_makes_them_compete() -> None:
    images = make_images(4)
    dropless = build(tiny(MoEConfig(experts=[4])))
    alone = torch.cat([dropless(images[i : i + 1]).logits for i in range(4)])
    torch.testing.assert_close(dropless(images).logits, alone, rtol=1e-10, atol=1e-10)

    narrow = MoEConfig(experts=[4], eval_capacity_factor=0.5, min_capacity=0, every=4)
    output = build(tiny(narrow))(images)
    load_E, dropped = output.moe[0].load_E, output.moe[0].dropped
    # 4 images × 9 patches × 2 choices are one group: an expert takes 72 · 0.5 / 4 of them.
    assert int(dropped) == int((load_E - 9).clamp(min=0).sum()) > 0
    # Queues fill image by image: the first is as it would be in half of the company, the last is not.
    fewer = build(tiny(narrow))(images[:2]).logits
    full = build(tiny(MoEConfig(experts=[4], every=4)))(images).logits
    assert not torch.allclose(output.logits[3], full[3])
    assert not torch.allclose(fewer, output.logits[:2])
    # By priority the order of the images means nothing.
    narrow.batch_priority = BatchPriority.max
    model = build(tiny(narrow))
    torch.testing.assert_close(model(images.flip(0)).logits.flip(0), model(images).logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(output.logits.flip(0), build(tiny(narrow))(images.flip(0)).logits)


@pytest.mark.parametrize(
    ("every", "last", "experts", "expected"),
    [
        (2, None, [8], [0, 8, 0, 8, 0, 8]),
        (2, 1, [8], [0, 0, 0, 0, 0, 8]),
        (2, 2, [4, 8], [0, 0, 0, 4, 0, 8]),
        (1, 2, [8], [0, 0, 0, 0, 8, 8]),
        (3, 2, "pyramid(4, 8, last=1)", [0, 0, 4, 0, 0, 8]),
    ],
)
def test_experts_stand_in_every_nth_block_or_the_last_of_these(
    every: int, last: int | None, experts: Any, expected: list[int]
) -> None:
    config = tiny(MoEConfig(experts=experts, every=every, last=last), num_layers=6)
    assert config.experts_by_block == expected
    assert [name for name, _ in build(config).moe_layers()] == [f"blocks.{i}.moe" for i, n in enumerate(expected) if n]


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\), where model.vision says \(3, 6, 6\)"):
        build(tiny())(make_images(1, size=8))


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size or model\.vision is null"):
        build_model(tiny(vocab_size=None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionConfig(image_size=0), r"vision.image_size=0: use a positive number"),
        (lambda: VisionConfig(image_size=8, patch_size=3), r"vision.patch_size=3 does not divide image_size=8"),
        (lambda: ModelConfig(vision=VisionConfig()), r"model.vision has no use with model.kind=decoder: add"),
        (lambda: tiny(rope_theta=5.0), r"model.rope_theta=5.0 has no use with model.kind=vit: leave it out"),
        (lambda: tiny(max_seq_len=9), r"model.max_seq_len=9 has no use with model.kind=vit"),
        (lambda: tiny(tie_embeddings=False), r"model.tie_embeddings=False has no use with model.kind=vit"),
        (lambda: tiny(num_tasks=2), r"model.num_tasks=2 has no use with model.kind=vit"),
        (lambda: MoEConfig(last=0), r"moe.last=0: use 1 or more, or null"),
        (lambda: tiny(MoEConfig(last=3)), r"moe.last=3: .* has only 2 such blocks: lower last"),
    ],
)
def test_impossible_configurations_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_vit_sees_small_grey_images_unless_told_otherwise() -> None:
    config = ModelConfig(kind=ModelKind.vit, vocab_size=10)
    assert (config.vision, config.vision.num_patches) == (VisionConfig(8, 2, 1), 16)
    assert isinstance(build_model(config, device="meta"), VisionTransformer)
