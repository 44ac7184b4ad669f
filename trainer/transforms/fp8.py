"""Products of experts in fp8 by torchao: rows and weights rounded to e4m3 as they come, with a scale for each row.

Forward pass and both gradients are fp8 with bf16 results; weights, their gradients and the optimizer stay as they were.

Shapes: R rows, grouped by expert; P rows with padding; E experts, I and O widths of a projection, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from twohop.models import MoEModel
from twohop.models.experts import Experts
from twohop.models.grouped import Counts, LateWeight, ends
from twohop.trainer.errors import ConfigError

MULTIPLE = 16  # of widths and of an expert's rows, which the hardware asks for
CAPABILITY = (9, 0)  # H100


def use_fp8_experts(model: MoEModel) -> None:
    """Let the experts of `model` multiply in fp8 while training. Call it before anything else wraps the model.

    Raises:
        ConfigError: the device cannot, or the experts' widths do not fit.
    """
    _check_device(next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, Experts):
            shapes = [list(weight.shape[1:]) for weight in module.parameters()]
            if any(width % MULTIPLE for shape in shapes for width in shape):
                raise ConfigError(
                    f"engine.fp8_experts=true: experts are matrices of {shapes}: use a model.dim and model.moe.ffn_dim "
                    f"that are multiples of {MULTIPLE}"
                )
            module.network = _fp8_network(module, module.network)  # type: ignore[method-assign]


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        wanted = ".".join(map(str, CAPABILITY))
        raise ConfigError(
            f"engine.fp8_experts=true needs a GPU of compute capability {wanted} or more (H100), which {device} is "
            "not: leave it out"
        )


def _fp8_network(experts: Experts, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def network(rows_RD: Tensor, up: LateWeight, down: LateWeight, counts_E: Counts) -> Tensor:
        if not experts.training:
            return plain(rows_RD, up, down, counts_E)
        # torchao's products bring the weights' gradients with those of the rows, so nothing of them is late.
        h_RU = fp8_grouped_linear(rows_RD, experts.up.to(rows_RD.dtype), counts_E)
        return fp8_grouped_linear(experts.activate(h_RU), experts.down.to(rows_RD.dtype), counts_E)

    return network


def fp8_grouped_linear(x_RI: Tensor, weight_EOI: Tensor, counts_E: Counts) -> Tensor:
    """Each group of rows times its own matrix: bf16 [R, O]; counts_E[e] rows for expert e. R may be 0.

    What rows behind the last expert's become is not defined; see `twohop.models.grouped`. No value is read on the host.
    """
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm  # takes seconds

    place_R, ends_E = _places(ends(counts_E, x_RI.device), len(x_RI))
    # Room for the most padding that there can be; products end with the last expert's rows.
    x_PI = x_RI.new_zeros(len(x_RI) + MULTIPLE * len(weight_EOI), x_RI.shape[1]).index_copy(0, place_R, x_RI)
    y_PO = _to_fp8_rowwise_then_scaled_grouped_mm(
        x_PI, weight_EOI.transpose(1, 2), ends_E, pad_token_groups_for_grouped_mm=False
    )
    return y_PO.index_select(0, place_R)


def _places(ends_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where each row stands and, int32, where each expert's rows end, when each expert has whole multiples of rows.

    At least one of them, also for an expert without rows: of nothing there are no scales.
    """
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    padded_E = ((counts_E + MULTIPLE - 1) // MULTIPLE * MULTIPLE).clamp(min=MULTIPLE)
    padded_ends_E = padded_E.cumsum(0, dtype=torch.int32)
    # Rows of expert e move by the padding of all before it; those of nobody move behind all of it.
    shift = torch.nn.functional.pad(padded_ends_E - ends_E, (1, 0))
    row_R = torch.arange(num_rows, device=ends_E.device)
    return row_R + shift[torch.searchsorted(ends_E, row_R, right=True)], padded_ends_E
