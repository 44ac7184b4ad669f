"""A dense model with experts made of copies computes what it did, and settings that cannot are refused."""

import pytest
import torch

from tests.distributed import run_distributed
from tests.models.upcycle_workers import config, dense_model, ids, upcycled, upcycled_logits
from twohop.models import MoEConfig, RouterConfig
from twohop.models.config import Residual
from twohop.models.upcycle import check_upcycling

RENORMALIZED = {"top_k": 2, "renormalize": True}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(experts=[4, 8], router=RouterConfig(**RENORMALIZED)),
        MoEConfig(experts=[8], every=1, router=RouterConfig(name="topk_softmax", top_k=3, jitter=0.1)),
        MoEConfig(experts=[4], router=RouterConfig(top_k=4)),  # of all experts, probabilities add up to 1
        MoEConfig(experts=[4], router=RouterConfig(name="sigmoid", **RENORMALIZED)),
        MoEConfig(experts=[4], router=RouterConfig(name="hash", top_k=1)),
        MoEConfig(experts=[4], shared_ffn_dim=20, router=RouterConfig(**RENORMALIZED)),
        MoEConfig(experts=[4], residual=Residual.sum, router=RouterConfig(**RENORMALIZED)),
        MoEConfig(experts=[4], residual=Residual.learned, router=RouterConfig(**RENORMALIZED)),
    ],
    ids=[
        "renormalized",
        "topk_softmax",
        "all experts",
        "sigmoid",
        "hash",
        "shared",
        "residual sum",
        "residual learned",
    ],
)
def test_logits_are_those_of_the_dense_model(moe, training):
    check_upcycling(config(moe))
    model, dense = upcycled(moe).train(training), dense_model()
    expected = logits(dense)
    assert expected.std() > 0.3
    # Weights add up to 1 within a few units of fp32's last place, and each layer multiplies by their sum once.
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_every_part_of_the_model_learns():
    model = upcycled(MoEConfig(experts=[4], shared_ffn_dim=20, residual=Residual.sum, router=RouterConfig(top_k=4)))
    torch.nn.functional.cross_entropy(model(ids()).logits.flatten(0, 1), ids().flatten()).backward()
    for name in ("experts.up", "experts.down", "shared.down.weight", "residual.mlp.down.weight"):
        assert model.blocks[1].moe.get_parameter(name).grad.abs().max() > 0, name


def test_every_rank_copies_into_its_own_experts():
    moe = MoEConfig(experts=[4, 8], router=RouterConfig(**RENORMALIZED))
    for per_rank in run_distributed(upcycled_logits, 4, moe):
        torch.testing.assert_close(per_rank, logits(dense_model()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (RouterConfig(top_k=2), r"name=softmax_topk: the weights of a token add up to 0\.\d+ … 0\.\d+ and not to 1"),
        (RouterConfig(name="switch", top_k=1), r"name=switch: the weights of a token add up to"),
        (RouterConfig(name="sigmoid", top_k=2, renormalize=True, scale=2.5), r"name=sigmoid: .* 2\.500 … 2\.500"),
        (RouterConfig(name="expert_choice", top_k=2), r"name=expert_choice: the weights"),
    ],
)
def test_weights_that_do_not_add_up_to_1_are_refused(router, message):
    with pytest.raises(ValueError, match=message):
        check_upcycling(config(MoEConfig(experts=[4], router=router)))


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (MoEConfig(), r"model\.moe\.experts=\[\]: say how many"),
        (MoEConfig(experts=[4], ffn_dim=24), r"model\.moe\.ffn_dim=24: .* hidden width 48; use null"),
        (MoEConfig(experts=[4], capacity_factor=1.25), r"model\.moe\.capacity_factor=1\.25: a dropped token"),
        (MoEConfig(experts=[4], eval_capacity_factor=2.0), r"model\.moe\.eval_capacity_factor=2\.0"),
    ],
)
def test_settings_that_cannot_be_equal_are_refused(moe, message):
    with pytest.raises(ValueError, match=message):
        check_upcycling(config(moe))
