"""What FSDP is told: which modules gather together, over whom, in what precision, and whether they let go."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny import tiny_config
from twohop.comm import Topology, build_dispatcher
from twohop.models import build_model, init_weights
from twohop.trainer.engines import build_engine, fsdp
from twohop.trainer.engines.fsdp import _even_dim
from twohop.trainer.errors import ConfigError


def told(directory: Path, reshard: bool) -> list[tuple[str, tuple[str, ...], bool, Any, Any]]:
    """Of each module its name, its mesh, whether its weights go after forward, and its precision, inputs' too."""
    config = tiny_config(
        directory, "engine.name=fsdp", "engine.precision=bf16", f"engine.reshard_after_forward={reshard}",
        "model.vocab_size=32", "model.moe.residual=learned", "model.moe.shared_ffn_dim=16",
    )  # fmt: skip
    topology = Topology.discover()
    model = build_model(config.model, lambda i, n: build_dispatcher("dedup", topology.with_ep(i + 1), n))
    init_weights(model, 0)
    names = {module: name for name, module in model.named_modules()}
    with patch.object(fsdp, "fully_shard", side_effect=fsdp.fully_shard) as shard:
        build_engine(model, config)
    rows = []
    for call in shard.call_args_list:
        (module,), options = call.args, call.kwargs
        policy = options["mp_policy"]
        mesh = options["mesh"].mesh_dim_names or ("world",)
        rows.append(
            (names[module], mesh, options["reshard_after_forward"], policy.param_dtype, policy.cast_forward_inputs)
        )
    return rows


@pytest.mark.parametrize("reshard", [True, False])
def test_blocks_gather_one_by_one_and_experts_with_replicas_apart(tmp_path: Path, reshard: bool) -> None:
    """Two MoE layers on two ranks: one with EP 1, whose experts have replicas, and one with EP 2."""
    tiny_config(tmp_path)
    rows = run_distributed(told, 2, tmp_path, reshard)[0]
    low = torch.bfloat16
    first, second = [name for name, mesh, *_ in rows if mesh == ("edp",)], [name for name, *_ in rows]
    assert first == ["blocks.1.moe"]
    parts = ["shared", "residual.mlp", "residual.mix", "router", ""]
    assert second == [
        *(f"blocks.1.moe.{part}".rstrip(".") for part in parts), *(f"blocks.{i}" for i in range(4)), "",
    ]  # fmt: skip
    for name, _, goes, dtype, casts in rows:
        assert goes is reshard, name
        assert dtype is (None if name.endswith("router") else low), name
        assert not casts, name


@pytest.mark.parametrize(("parts", "dim"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_experts_are_cut_where_it_is_even_and_not_by_number(parts: int, dim: int) -> None:
    assert _even_dim(torch.nn.Parameter(torch.empty(4, 6, 8)), parts) == dim


def test_experts_that_nothing_divides_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot share experts of shape \[6, 8\] among 5 ranks: use a model\.moe"):
        _even_dim(torch.nn.Parameter(torch.empty(5, 6, 8)), 5)
