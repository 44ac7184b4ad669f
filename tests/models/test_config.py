"""Impossible model configurations are refused with the key, the value and the cure."""

import subprocess
import sys

import pytest

from twohop import models
from twohop.models.config import ModelConfig, MoEConfig, RouterConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterConfig(top_k=0), r"router.top_k=0: .*at least 1"),
        (lambda: RouterConfig(jitter=1.0), r"router.jitter=1.0: use a value in \[0, 1\)"),
        (lambda: RouterConfig(load_balance_loss=-1.0), r"router.load_balance_loss=-1.0"),
        (lambda: RouterConfig(z_loss=-1.0), r"router.z_loss=-1.0"),
        (lambda: MoEConfig(every=0), r"moe.every=0: use 1"),
        (lambda: MoEConfig(experts=[4, 0]), r"moe.experts=\[4, 0\]: every MoE layer needs at least 1 expert"),
        (lambda: MoEConfig(experts=[4, 2], router=RouterConfig(top_k=3)), r"top_k=3 is more than the 2 experts"),
        (lambda: MoEConfig(capacity_factor=0.0), r"moe.capacity_factor=0.0: use a positive factor, or null"),
        (lambda: MoEConfig(eval_capacity_factor=-1.0), r"moe.eval_capacity_factor=-1.0"),
        (lambda: MoEConfig(min_capacity=-1), r"moe.min_capacity=-1"),
        (lambda: MoEConfig(shared_ffn_dim=-1), r"moe.shared_ffn_dim=-1"),
        (lambda: ModelConfig(dim=0), r"model.dim=0: use a positive number"),
        (lambda: ModelConfig(dim=100, num_heads=3), r"model.num_heads=3 does not divide model.dim=100"),
        (lambda: ModelConfig(dim=12, num_heads=4), r"head_dim=3 is odd"),
        (lambda: ModelConfig(num_heads=4, num_kv_heads=3), r"num_kv_heads=3 does not divide model.num_heads=4"),
        (lambda: ModelConfig(num_layers=6, moe=MoEConfig(experts=[4, 8])), r"lists 2 layers.* makes 3 MoE layers"),
    ],
)
def test_impossible_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("experts", "every", "expected"),
    [
        ([], 2, [0, 0, 0, 0]),
        ([8], 2, [0, 8, 0, 8]),
        ([4, 8], 2, [0, 4, 0, 8]),
        ([4], 1, [4, 4, 4, 4]),
        ([4], 3, [0, 0, 4, 0]),
    ],
)
def test_experts_by_block(experts, every, expected):
    moe = MoEConfig(experts=experts, every=every)
    assert ModelConfig(num_layers=4, moe=moe).experts_by_block == expected


def test_reading_a_configuration_imports_no_torch():
    code = "from twohop.models import ModelConfig; import sys; print(ModelConfig().dim, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["128", "False"], result.stderr


def test_every_public_name_is_there():
    assert [getattr(models, name).__name__ for name in models.__all__] == models.__all__
    assert set(models.__all__) == set(models._HOME)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        models.Nothing  # noqa: B018
