"""Pruning and merging of experts, on numbers that can be checked by hand."""

import pytest
import torch

from twohop.models import ModelConfig, MoEConfig, RouterConfig, build_model, init_weights
from twohop.models.compress import check_gate, compress, gate_weights
from twohop.models.routers import TokenInfo

SCORE = torch.tensor([5.0, 1.0, 3.0, 2.0], dtype=torch.float64)
LAYER = {
    "experts.up": torch.tensor([[10.0], [20.0], [30.0], [40.0]]),
    "router.gate.weight": torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.0, 20.0], [3.0, 0.3]]),
    "router.gate.bias": torch.tensor([1, 2, 3, 4]),
    "residual.mlp.up.weight": torch.ones(4, 2),  # four rows, but not one for each expert
    "router.scale": torch.ones(3),
}


def test_the_best_stay_in_their_order() -> None:
    made = compress(LAYER, SCORE, keep=2, merge=False)
    assert made["experts.up"].tolist() == [[10.0], [30.0]]
    assert torch.equal(made["router.gate.weight"], LAYER["router.gate.weight"][[0, 2]])
    assert made["router.gate.bias"].tolist() == [1, 3]
    assert made["residual.mlp.up.weight"] is LAYER["residual.mlp.up.weight"]
    assert made["router.scale"] is LAYER["router.scale"]
    assert compress(LAYER, SCORE, keep=4, merge=True)["experts.up"].tolist() == LAYER["experts.up"].tolist()


def test_others_are_averaged_into_the_one_their_gate_is_most_like() -> None:
    made = compress(LAYER, SCORE, keep=2, merge=True)
    # Expert 1 looks like expert 2, and expert 3 like expert 0, whatever the lengths of their gates.
    expected = torch.tensor([[(5 * 10 + 2 * 40) / 7], [(3 * 30 + 1 * 20) / 4]])
    torch.testing.assert_close(made["experts.up"], expected)
    assert torch.equal(made["router.gate.weight"], LAYER["router.gate.weight"][[0, 2]])


def test_experts_that_nobody_used_leave_the_kept_one_as_it_is() -> None:
    made = compress(LAYER, torch.zeros(4, dtype=torch.float64), keep=1, merge=True)
    assert made["experts.up"].shape == (1, 1)
    assert made["experts.up"].isfinite().all()


def test_score_is_the_sum_of_the_gate_weights() -> None:
    config = ModelConfig(
        vocab_size=11,
        dim=8,
        num_layers=4,
        num_heads=2,
        ffn_dim=16,
        max_seq_len=8,
        moe=MoEConfig([4, 6], eval_capacity_factor=0.5, router=RouterConfig(top_k=2)),
    )
    model = build_model(config).eval()
    init_weights(model, 0)
    seen: dict[str, list] = {}
    for name, layer in model.moe_layers():
        layer.router.register_forward_hook(lambda router, given, out, name=name: seen.setdefault(name, []).append(out))
    with torch.no_grad(), gate_weights(model) as sums:
        for _ in range(2):
            model(torch.randint(11, (2, 8)))
    model(torch.randint(11, (2, 8)))  # after the end: not counted
    assert {name: len(total) for name, total in sums.items()} == {"blocks.1.moe": 4, "blocks.3.moe": 6}
    for name, total in sums.items():
        assert len(seen[name]) == 3
        for expert in range(len(total)):
            chosen = [r.weights_NK[r.ids_NK == expert].double() for r in seen[name][:2]]
            weights = torch.cat(chosen)
            score = len(weights) * float(weights.mean()) if len(weights) else 0.0
            assert float(total[expert]) == pytest.approx(score, rel=1e-9)


def test_a_router_without_a_gate_is_refused() -> None:
    router = RouterConfig(name="hash", top_k=1, load_balance_loss=0)
    moe = MoEConfig([4], router=router)
    config = ModelConfig(vocab_size=11, dim=8, num_layers=2, num_heads=2, ffn_dim=16, max_seq_len=8, moe=moe)
    ((name, layer),) = build_model(config, device="meta").moe_layers()
    with pytest.raises(ValueError, match=r"blocks\.1\.moe: the hash router has no gate"):
        check_gate(name, layer)
    assert TokenInfo(1).num_sequences == 1
