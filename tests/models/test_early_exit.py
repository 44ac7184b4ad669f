"""Early exit against a plain loop over blocks and tokens, and layer drop against what it promises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from twohop.models import ModelConfig, MoEConfig, RouterConfig, Transformer, build_model, init_weights
from twohop.models.attention import rope_angles
from twohop.models.config import ModelKind, Residual
from twohop.models.early_exit import early_exit
from twohop.models.layer_drop import drop_layers
from twohop.models.routers import TokenInfo

IDS_BT = torch.randint(13, (3, 8), generator=torch.Generator().manual_seed(5))


def model(layer_drop: float = 0.0, **moe: Any) -> Transformer:
    """Dense and MoE blocks in turn, with a shared expert and a residual branch; sure of some tokens early."""
    config = ModelConfig(
        vocab_size=13,
        dim=16,
        num_layers=4,
        num_heads=2,
        ffn_dim=32,
        max_seq_len=8,
        layer_drop=layer_drop,
        moe=MoEConfig([4], shared_ffn_dim=8, residual=Residual.learned, router=RouterConfig(top_k=2), **moe),
    )
    made = build_model(config)
    init_weights(made, seed=3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    return made.eval()


def plain_exit(model: Transformer, confidence: float) -> tuple[Tensor, list[list[int]]]:
    """Every block sees all tokens; one that had left gets its old state back."""
    x_BTD = model.embed(IDS_BT)
    rope = rope_angles(torch.arange(8), model.config.key_dim, model.config.rope_theta, torch.float32)
    depth = [[4] * 8 for _ in range(3)]
    for number, block in enumerate(model.blocks, start=1):
        y_BTD, _ = block(x_BTD, rope, TokenInfo(3, token_BT=IDS_BT))
        x_BTD = x_BTD.clone()
        for b in range(3):
            for t in range(8):
                if depth[b][t] >= number:
                    x_BTD[b, t] = y_BTD[b, t]
                    probs = (model.norm(x_BTD[b, t]) @ model.embed.weight.T).softmax(-1)
                    if probs.max() > confidence:
                        depth[b][t] = number
    return model.norm(x_BTD) @ model.embed.weight.T, depth


@torch.no_grad()
@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.31, 0.999])
def test_tokens_leave_where_the_head_is_sure(confidence: float) -> None:
    full = model()
    expected, depth = plain_exit(full, confidence)
    with early_exit(full, confidence) as exits:
        output = full(IDS_BT)
    assert exits.depth_BT.tolist() == depth
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    left = [sum(d >= number for row in depth for d in row) for number in (2, 4)]  # who comes to the MoE blocks
    assert [int(stats.load_E.sum()) for stats in output.moe] == [2 * tokens for tokens in left]
    if confidence in (0.3, 0.31):
        assert len({d for row in depth for d in row}) == 4  # some tokens left at each block
    after = full(IDS_BT).logits  # and nothing stays behind
    torch.testing.assert_close(after, plain_exit(full, 1.0)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_who_has_left_takes_no_place_in_a_capacity() -> None:
    limited = model(eval_capacity_factor=0.5, min_capacity=0)
    assert sum(int(stats.dropped) for stats in limited(IDS_BT).moe) > 0
    with early_exit(limited, 0.3) as exits:
        moe = limited(IDS_BT).moe
    goes_on = int((exits.depth_BT >= 4).sum())
    assert goes_on
    assert int(moe[1].load_E.sum()) == 2 * goes_on
    assert int(moe[1].dropped) == sum(max(0, load - 6) for load in moe[1].load_E.tolist())  # 24 tokens · 2 · 0.5 / 4


def left_out(model: Transformer, step: int, seed: int = 0) -> list[bool]:
    drop_layers(model, seed, step)
    return [block.left_out for block in model.blocks]


def test_rate_rises_to_the_last_block() -> None:
    dropping = model(layer_drop=0.6)
    draws = torch.tensor([left_out(dropping, step) for step in range(2000)], dtype=torch.float64)
    expected = torch.tensor([0.15, 0.3, 0.45, 0.6], dtype=torch.float64)
    # Five standard deviations of a mean of 2000 draws.
    assert ((draws.mean(0) - expected).abs() < 5 * (expected * (1 - expected) / 2000).sqrt()).all()
    assert left_out(dropping, 7) == left_out(dropping, 7)
    assert [left_out(dropping, step, seed=1) for step in range(20)] != [left_out(dropping, step) for step in range(20)]


def test_a_block_that_is_left_out_does_nothing_in_training_only() -> None:
    dropping = model(layer_drop=0.9)
    step = next(step for step in range(1000) if left_out(dropping, step) == [False, True, True, False])
    drop_layers(dropping, 0, step)
    full = dropping(IDS_BT)
    dropping.train()
    output = dropping(IDS_BT)
    output.logits.sum().backward()
    worked = [block.attention.wq.weight.grad is not None for block in dropping.blocks]
    assert worked == [True, False, False, True]
    assert [int(stats.load_E.sum()) for stats in output.moe] == [0, 48]
    assert not torch.equal(full.logits, output.logits)
    short = model()
    short.blocks = torch.nn.ModuleList([dropping.blocks[0], dropping.blocks[3]])
    short.eval()
    drop_layers(short, 0, 0)
    torch.testing.assert_close(short(IDS_BT).logits, output.logits)


def test_no_rate_draws_nothing() -> None:
    plain = model()
    plain.blocks[1].left_out = True
    drop_layers(plain, 0, 0)
    assert plain.blocks[1].left_out


def test_only_a_decoder_can_leave_layers_out() -> None:
    with pytest.raises(ValueError, match=r"model\.layer_drop=1: use a part of the steps"):
        ModelConfig(layer_drop=1)
    with pytest.raises(ValueError, match=r"model\.layer_drop=0\.1 has no use with model\.kind=vit"):
        ModelConfig(layer_drop=0.1, kind=ModelKind.vit)
