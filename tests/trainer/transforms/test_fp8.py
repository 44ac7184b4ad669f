"""fp8 experts: the way around torchao's product on any device, the product itself where there is a GPU for it."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import tiny_config
from twohop.models import build_model, init_weights
from twohop.trainer.errors import ConfigError
from twohop.trainer.run_folder import write_config
from twohop.trainer.stored import run_stored
from twohop.trainer.transforms import fp8
from twohop.trainer.transforms.fp8 import CAPABILITY, _places, fp8_grouped_linear, use_fp8_experts

COUNTS = [5, 0, 16, 19]
has_fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY


def rows_and_weight(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(sum(COUNTS), 32, generator=generator).to(device, torch.bfloat16)
    weight_EOI = torch.randn(len(COUNTS), 48, 32, generator=generator).to(device, torch.bfloat16)
    return x_RI.requires_grad_(), weight_EOI.requires_grad_()


def results(x_RI: Tensor, weight_EOI: Tensor, y_RO: Tensor) -> list[Tensor]:
    return [y_RO, *torch.autograd.grad(y_RO.square().sum(), (x_RI, weight_EOI))]


def plain(x_RI: Tensor, weight_EOI: Tensor) -> Tensor:
    parts = x_RI.split(COUNTS)
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight_EOI, strict=True)])


def grouped_mm(a: Tensor, b_t: Tensor, offs: Tensor, pad_token_groups_for_grouped_mm: bool) -> Tensor:
    """What torchao asks of its arguments, and its product without rounding."""
    sizes = offs.diff(prepend=offs.new_zeros(1))
    assert not pad_token_groups_for_grouped_mm
    assert (sizes >= 16).all()
    assert not (sizes % 16).any()
    assert b_t.mT.is_contiguous()
    return F.grouped_mm(a, b_t, offs=offs)


def test_rows_are_padded_and_found_again() -> None:
    x_RI, weight_EOI = rows_and_weight("cpu")
    with patch("torchao.prototype.moe_training._to_fp8_rowwise_then_scaled_grouped_mm", side_effect=grouped_mm):
        ours = results(x_RI, weight_EOI, fp8_grouped_linear(x_RI, weight_EOI, COUNTS))
    for mine, theirs in zip(ours, results(x_RI, weight_EOI, plain(x_RI, weight_EOI)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=2**-6)  # bf16, summed in another order


def test_places_by_hand() -> None:
    """Experts begin at 0, 16, 32 and 48 and have 16 places for 5, 0 and 16 rows; two more rows are nobody's."""
    place_R, ends_E = _places(torch.tensor([5, 5, 21, 22]), 24)
    assert ends_E.tolist() == [16, 32, 48, 64]
    assert place_R.tolist() == [*range(5), *range(32, 48), 48, 64, 65]


def test_experts_train_in_fp8_and_are_evaluated_as_they_are(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.vocab_size=32", "model.dim=32", "model.moe.ffn_dim=16")
    model = build_model(config.model).bfloat16()
    init_weights(model, 0)
    experts = next(layer.experts for _, layer in model.moe_layers())
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    counts = [3, 20, *[1] * (len(experts.up) - 2)]
    rows_RD = torch.randn(sum(counts), 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = experts(rows_RD, counts)
    product = "torchao.prototype.moe_training._to_fp8_rowwise_then_scaled_grouped_mm"
    with patch.object(fp8, "_check_device"), patch(product, side_effect=grouped_mm) as multiply:
        use_fp8_experts(model)
        difference = experts.train()(rows_RD, counts) - expected
        assert difference.norm() < 2**-6 * expected.norm()
        assert multiply.call_count == 2
        assert torch.equal(experts.eval()(rows_RD, counts), expected)
        assert multiply.call_count == 2


def test_widths_that_the_hardware_cannot_take_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.vocab_size=32", "model.dim=32", "model.moe.ffn_dim=24")
    refused = pytest.raises(ConfigError, match=r"fp8_experts=true: experts are matrices of .*24.*multiples of 16")
    with patch.object(fp8, "_check_device"), refused:
        use_fp8_experts(build_model(config.model))


@pytest.mark.skipif(not has_fp8, reason="needs a GPU of compute capability 9.0, H100 or newer")
def test_products_are_those_of_bf16_within_fp8() -> None:
    x_RI, weight_EOI = rows_and_weight("cuda")
    ours = results(x_RI, weight_EOI, fp8_grouped_linear(x_RI, weight_EOI, COUNTS))
    for mine, theirs in zip(ours, results(x_RI, weight_EOI, plain(x_RI, weight_EOI)), strict=True):
        # e4m3 keeps 4 bits: each factor is off by 2^-4 at most, a product by 2^-3, and its gradient once more.
        assert (mine - theirs).norm() < 2**-2 * theirs.norm()


def test_other_devices_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.vocab_size=32")
    with pytest.raises(
        ConfigError, match=r"fp8_experts=true needs a GPU of compute capability 9\.0 .* which cpu is not"
    ):
        use_fp8_experts(build_model(config.model))
    with pytest.raises(ValueError, match=r"add engine\.precision=bf16"):
        tiny_config(tmp_path, "engine.fp8_experts=true")


def test_a_run_that_was_trained_with_it_is_evaluated_anywhere(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "engine.fp8_experts=true", "engine.precision=bf16", "train.compile=true")
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", config)
    with patch("twohop.trainer.stored.start", return_value={}) as start:
        assert run_stored("evaluate", [f"run={tmp_path / 'run'}"], "twohop.trainer.launching.workers:evaluate") == 0
    used = start.call_args.args[1]
    assert not used.engine.fp8_experts
    assert not used.train.compile
