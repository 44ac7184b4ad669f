"""Impossible model configurations are refused with the key, the value and the cure."""

import subprocess
import sys

import pytest

from twohop import models
from twohop.models.config import BatchPriority, ModelConfig, MoEConfig, RouterConfig
from twohop.models.layer_counts import expert_counts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterConfig(top_k=0), r"router.top_k=0: .*at least 1"),
        (lambda: RouterConfig(jitter=1.0), r"router.jitter=1.0: use a value in \[0, 1\)"),
        (lambda: RouterConfig(load_balance_loss=-1.0), r"router.load_balance_loss=-1.0"),
        (lambda: RouterConfig(z_loss=-1.0), r"router.z_loss=-1.0"),
        (lambda: MoEConfig(every=0), r"moe.every=0: use 1"),
        (lambda: MoEConfig(experts=[4, -1]), r"moe.experts=\[4, -1\]: use 1 or more experts, or 0 for a dense block"),
        (lambda: MoEConfig(experts=[0, 0]), r"moe.experts=\[0, 0\]: no layer has experts: use \[\]"),
        (lambda: MoEConfig(experts=[4, 2], router=RouterConfig(top_k=3)), r"top_k=3 is more than the 2 experts"),
        (lambda: MoEConfig(capacity_factor=0.0), r"moe.capacity_factor=0.0: use a positive factor, or null"),
        (lambda: MoEConfig(eval_capacity_factor=-1.0), r"moe.eval_capacity_factor=-1.0"),
        (lambda: MoEConfig(min_capacity=-1), r"moe.min_capacity=-1"),
        (lambda: RouterConfig(noise=-1.0), r"router.noise=-1.0: use 0 for none"),
        (lambda: RouterConfig(bias_rate=-1.0), r"router.bias_rate=-1.0: use 0 for none"),
        (lambda: RouterConfig(scale=0.0), r"router.scale=0.0: use a positive factor"),
        (lambda: RouterConfig(iterations=0), r"router.iterations=0: use 1 or more"),
        (lambda: RouterConfig(groups=2, top_groups=3), r"router.top_groups=3: use a number from 1 to groups=2"),
        (lambda: RouterConfig(importance_loss=-1.0), r"router.importance_loss=-1.0: a loss weight is at least 0"),
        (lambda: MoEConfig(batch_priority=BatchPriority.max), r"batch_priority=max has no use without a capacity"),
        (
            lambda: MoEConfig(
                capacity_factor=1.0, batch_priority=BatchPriority.sum, router=RouterConfig(renormalize=True)
            ),
            r"batch_priority=sum has no use with .*renormalize=true, which makes every sum 1: use max",
        ),
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
        ([0, 8], 2, [0, 0, 0, 8]),
        (8, 2, [0, 8, 0, 8]),
        ("[4] + [8]", 2, [0, 4, 0, 8]),
        ("pyramid(0, 8, last=2)", 1, [0, 0, 8, 8]),
    ],
)
def test_experts_by_block(experts, every, expected):
    moe = MoEConfig(experts=experts, every=every)
    assert ModelConfig(num_layers=4, moe=moe).experts_by_block == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[32]*10+[64]*2", [32] * 10 + [64] * 2),
        ("pyramid(32, 64, last=2)", [32] * 10 + [64] * 2),
        (" [ 1,2 ] * 2 + [3]+[4, 5]*3 + [6] ", [1, 2, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6]),
        ("pyramid( 4,8 , last = 11 )", [4] + [8] * 11),
        ("[7]", [7]),
        ((4, 8), [4, 8]),
        (3, [3]),
    ],
)
def test_experts_of_layers_in_one_line(written, expected):
    assert expert_counts(written, 12) == expected
    assert ModelConfig(num_layers=2 * 12, moe=MoEConfig("[2]*12")).experts_by_layer == [2] * 12


@pytest.mark.parametrize(
    "written",
    ["", "[4]*0", "[4]**2", "[4]+", "[4]*2.0", "[-4]", "[]", "4*[2]", "[4]*[2]", "[1]*9999999", "[4", "pyramid(4, 8)",
     "pyramid(4, 8, 1)", "pyramid(4, 8, last=1) + [8]", "().__class__", "__import__('os')", None, True, [4.0], [True],
     ["4"]],
)  # fmt: skip
def test_other_texts_are_refused(written):
    with pytest.raises(
        ValueError, match=r"(?s)model\.moe\.experts=.*: use a number, a list as \[4,4,8\], or a text as"
    ):
        ModelConfig(num_layers=24, moe=MoEConfig(written))


@pytest.mark.parametrize(
    ("layers", "last", "cure"), [(3, 0, "last=1 to last=2"), (3, 3, "last=2"), (1, 1, "2 or more")]
)
def test_a_pyramid_fits_the_number_of_layers(layers, last, cure):
    with pytest.raises(ValueError, match=rf"pyramid\(4, 8, last={last}\): the model has {layers} MoE layers: .*{cure}"):
        ModelConfig(num_layers=2 * layers, moe=MoEConfig(f"pyramid(4, 8, last={last})"))


def test_counts_written_as_text_are_checked_like_a_list():
    with pytest.raises(ValueError, match=r"top_k=3 is more than the 2 experts"):
        ModelConfig(num_layers=4, moe=MoEConfig("[4]+[2]", router=RouterConfig(top_k=3)))
    with pytest.raises(ValueError, match=r"lists 3 layers.* makes 2 MoE layers"):
        ModelConfig(num_layers=4, moe=MoEConfig("[4]*3"))


def test_reading_a_configuration_imports_no_torch():
    code = "from twohop.models import ModelConfig; import sys; print(ModelConfig().dim, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["128", "False"], result.stderr


def test_every_public_name_is_there():
    assert [getattr(models, name).__name__ for name in models.__all__] == models.__all__
    assert set(models.__all__) == set(models._HOME)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        models.Nothing  # noqa: B018
