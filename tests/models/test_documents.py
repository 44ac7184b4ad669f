"""Documents that share a sequence: each is treated as if it stood alone.

Shapes: B sequences, T positions.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from twohop.models import ModelConfig, MoEConfig, RouterConfig, build_model, init_weights
from twohop.models.attention import Documents, attend, build_attention
from twohop.models.attention.masks import causal
from twohop.models.base import MoEModel
from twohop.models.config.attention import AttentionConfig

T, VOCAB = 48, 30
NUMBERS = [[0] * 20 + [1] * 1 + [2] * 27, [5] * 3 + [9] * 40 + [7] * 5]  # only a change counts
KINDS = {
    "full": {},
    "sliding": {"window": 5, "dilation": 2},
    "strided": {"stride": 4},
    "fixed": {"stride": 4, "summary": 2, "split_heads": True},
    "bigbird": {"window": 3, "global_tokens": 2, "random_blocks": 1, "block": 4},
    "adaptive_span": {"window": 12, "ramp": 4},
    "latent": {"q_rank": 8, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4},
}


def make_config(kind: str, **options) -> ModelConfig:
    """Two blocks, one of them with experts, which drop nothing."""
    moe = MoEConfig(experts=[4], every=2, router=RouterConfig(name="softmax_topk", top_k=2))
    return ModelConfig(
        vocab_size=VOCAB, max_seq_len=T, dim=16, num_layers=2, num_heads=4, ffn_dim=24, init_std=0.3, moe=moe,
        attention=AttentionConfig(kind=kind, **options),
    )  # fmt: skip


def make(kind: str, **options) -> MoEModel:
    """The model with its first weights, in fp64."""
    model = build_model(make_config(kind, **options), device=torch.device("cpu"))
    init_weights(model, 0)
    return model.double()


def loss_and_gradients(
    model: MoEModel, batches: list[tuple[Tensor, Tensor, Tensor | None]]
) -> tuple[Tensor, list[Tensor]]:
    """Summed cross-entropy over (ids, targets, numbers of documents) of each batch, and its gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for ids_BT, targets_BT, document_BT in batches:
        logits = model(ids_BT, document_BT=document_BT).logits
        total = total + F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    total.backward()
    return total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_have_the_loss_and_gradients_of_documents_alone(kind: str) -> None:
    model = make(kind, **KINDS[kind])
    for name, parameter in model.named_parameters():
        if name.endswith("span"):
            torch.nn.init.constant_(parameter, 0.5)
    numbers_BT = torch.tensor(NUMBERS)
    draw = torch.Generator().manual_seed(0)
    ids_BT, targets_BT = torch.randint(VOCAB, (2, 2, T), generator=draw)
    alone = [
        (ids_BT[row][own][None], targets_BT[row][own][None], None)
        for row in range(2)
        for own in (numbers_BT[row] == number for number in numbers_BT[row].unique())
    ]
    assert len(alone) == 6
    expected, expected_gradients = loss_and_gradients(model, alone)
    found, gradients = loss_and_gradients(model, [(ids_BT, targets_BT, numbers_BT)])
    # fp64 sums of a few thousand terms in another order.
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    without, _ = loss_and_gradients(model, [(ids_BT, targets_BT, None)])
    assert abs(without - expected) > 1e-3  # the mask is not idle


def test_positions_begin_again_with_every_document() -> None:
    documents = Documents(torch.tensor(NUMBERS))
    assert documents.position_BT.tolist() == [
        [*range(20), 0, *range(27)],
        [*range(3), *range(40), *range(5)],
    ]


def test_layers_share_a_mask() -> None:
    documents = Documents(torch.tensor(NUMBERS))
    made: list[object] = []
    for mask in (causal, causal, None):
        documents.once(mask, lambda within: made.append(within) or len(made))
    assert len(made) == 2


@pytest.mark.parametrize("kind", ["linear", "memory"])
def test_kinds_that_pass_a_state_on_refuse_documents(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.attention\.kind={kind} sees across documents"):
        make(kind)(torch.zeros(1, 4, dtype=torch.int64), document_BT=torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["full", "fixed", "bigbird"])
def test_flex_attention_keeps_documents_apart_as_sdpa_does(kind: str) -> None:
    """Uncompiled, FlexAttention runs on the CPU too, forwards."""
    mask = build_attention(make_config(kind, **KINDS[kind])).mask
    documents = Documents(torch.tensor(NUMBERS))
    q, k, v = torch.randn(3, 2, 4, T, 16, generator=torch.Generator().manual_seed(0))
    ours = flex_attention(q, k, v, block_mask=attend.document_blocks(documents.within(mask), q))
    torch.testing.assert_close(ours, attend.attend(q, k, v, mask, documents=documents), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels need a GPU")
@pytest.mark.parametrize("kind", ["full", "sliding", "fixed", "bigbird"])
def test_flex_attention_on_cuda_keeps_documents_apart(kind: str) -> None:
    config = ModelConfig(
        vocab_size=VOCAB, max_seq_len=256, dim=128, num_heads=4, ffn_dim=24,
        attention=AttentionConfig(kind=kind, **KINDS[kind]),
    )  # fmt: skip
    mask = build_attention(config).mask
    for seed in range(2):  # a second batch takes the same kernel
        numbers_BT = torch.randint(2, (2, 256), generator=torch.Generator().manual_seed(seed)).cumsum(1) // 30
        q, k, v = torch.randn(3, 2, 4, 256, 32, device="cuda")
        ours = attend.attend(q, k, v, mask, documents=Documents(numbers_BT.cuda()))
        seen = attend.dense_mask(Documents(numbers_BT.cuda()).within(mask), q, 256, 0, 0, each_sequence=True)
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)  # TF32
