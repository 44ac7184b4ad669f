"""The MoE layer and its experts against plain references: outputs and every gradient."""

import pytest
import torch

from tests.models.reference import ReferenceDispatcher, feed_forward, moe_layer
from twohop.comm import Topology, build_dispatcher
from twohop.models.config import Activation, ModelConfig, MoEConfig, Residual, RouterConfig
from twohop.models.experts import ExpertPass, Experts
from twohop.models.feed_forward import FeedForward
from twohop.models.grouped import LateWeight, grouped_linear
from twohop.models.moe import MoELayer

DIM, FFN = 8, 12


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)


def make_layer(moe: MoEConfig, activation: Activation = Activation.gelu, dispatcher=None) -> MoELayer:
    config = ModelConfig(dim=DIM, num_layers=2, num_heads=2, ffn_dim=FFN, activation=activation, moe=moe)
    layer = MoELayer(config, dispatcher or ReferenceDispatcher(moe.experts[0])).double()
    randomise(layer)
    return layer


def gradients(output: torch.Tensor, aux: torch.Tensor, layer: MoELayer, x: torch.Tensor) -> dict[str, torch.Tensor]:
    factors = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    named = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad((output * factors).sum() + aux, list(named.values()))
    return dict(zip(named, grads, strict=True))


LAYERS = {
    "top-1, capacity": MoEConfig(experts=[4], capacity_factor=0.75, min_capacity=1, router=RouterConfig(top_k=1)),
    "top-2, dropless": MoEConfig(experts=[4], router=RouterConfig(top_k=2, z_loss=0.1)),
    "top-3, capacity, renormalised": MoEConfig(
        experts=[6], capacity_factor=0.6, min_capacity=1, router=RouterConfig(top_k=3, renormalize=True)
    ),
    "shared expert, own width": MoEConfig(experts=[4], ffn_dim=20, shared_ffn_dim=6),
    "residual sum": MoEConfig(experts=[4], ffn_dim=20, residual=Residual.sum, router=RouterConfig(top_k=1)),
    "residual learned": MoEConfig(
        experts=[4], residual=Residual.learned, capacity_factor=0.5, min_capacity=1, router=RouterConfig(top_k=1)
    ),
    "one expert": MoEConfig(experts=[1], router=RouterConfig(top_k=1)),
}


@pytest.mark.parametrize("dispatcher", ["reference", "flat"])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_plain_reference(name, activation, dispatcher):
    moe = LAYERS[name]
    real = build_dispatcher("flat", Topology.discover(), moe.experts[0]) if dispatcher == "flat" else None
    layer = make_layer(moe, activation, real)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    capacity = None
    if moe.capacity_factor is not None:
        capacity = -(-int(100 * moe.capacity_factor) * moe.router.top_k * 14 // (100 * moe.experts[0]))
    expected, expected_aux = moe_layer(layer, moe, x, capacity)
    output, stats = layer(x)
    aux = sum(stats.losses.values())
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(aux, expected_aux, rtol=1e-12, atol=1e-12)
    assert stats.load_E.sum() == 14 * moe.router.top_k
    assert (stats.dropped > 0) == (capacity is not None)
    ours, theirs = gradients(output, aux, layer, x), gradients(expected, expected_aux, layer, x)
    for parameter in ours:
        torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-10, atol=1e-12, msg=parameter)


def test_widths_are_those_of_the_configuration():
    layer = make_layer(LAYERS["shared expert, own width"])
    assert (layer.experts.down.shape, layer.shared.down.weight.shape) == ((4, DIM, 20), (DIM, 6))
    layer = make_layer(LAYERS["residual sum"])
    assert (layer.experts.down.shape, layer.residual.mlp.down.weight.shape) == ((4, DIM, 20), (DIM, FFN))
    assert make_layer(LAYERS["one expert"]).experts.down.shape == (1, DIM, FFN)


def test_capacity_of_evaluation_is_its_own():
    layer = make_layer(MoEConfig(experts=[4], capacity_factor=None, eval_capacity_factor=0.25, min_capacity=1))
    x = torch.randn(1, 16, DIM, dtype=torch.float64)
    assert layer(x)[1].dropped == 0
    assert layer.eval()(x)[1].dropped >= 16 * 2 - 4 * 2


def test_min_capacity_and_rounding_are_used():
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    one_expert = {"experts": [1], "capacity_factor": 0.4, "router": RouterConfig(top_k=1)}  # 2.4 rows
    for options, kept in (
        ({"min_capacity": 0}, 3),
        ({"min_capacity": 0, "capacity_rounding": "round"}, 2),
        ({"min_capacity": 0, "capacity_rounding": "ceil4"}, 4),
        ({"min_capacity": 5}, 5),
    ):
        moe = MoEConfig(**one_expert, **options)
        moe.capacity_rounding = type(MoEConfig().capacity_rounding)(moe.capacity_rounding)
        assert layer_drops(moe, x) == 6 - kept


def layer_drops(moe: MoEConfig, x: torch.Tensor) -> int:
    return int(make_layer(moe)(x)[1].dropped)


def test_dropped_tokens_come_back_as_zero():
    layer = make_layer(MoEConfig(experts=[1], capacity_factor=0.5, min_capacity=0, router=RouterConfig(top_k=1)))
    y, stats = layer(torch.randn(1, 8, DIM, dtype=torch.float64))
    assert stats.dropped == 4
    assert (y[0, 4:] == 0).all()
    assert (y[0, :4] != 0).all()


GROUPS = [[3, 0, 5, 1], [0, 0, 0, 0], [0, 0, 0, 9], [4, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("counts", GROUPS, ids=str)
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_are_dense_networks_side_by_side(counts, activation, dtype):
    experts = Experts(4, DIM, FFN, activation).to(dtype)
    randomise(experts)
    rows = torch.randn(sum(counts), DIM, dtype=dtype, requires_grad=True)
    output = experts(rows, counts)
    expert_of_row = [e for e, count in enumerate(counts) for _ in range(count)]
    expected = [
        feed_forward(x, experts.up[e], experts.down[e], activation) for e, x in zip(expert_of_row, rows, strict=True)
    ]
    expected = torch.stack(expected) if expected else rows * 0
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(output)
    inputs = [rows, experts.up, experts.down]
    ours = torch.autograd.grad((output * weights).sum(), inputs)
    # Experts without rows get a gradient of zeros, not none: the optimizer and the reduction see every parameter.
    theirs = torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
    for our_grad, their_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_both_ways_of_multiplying_give_the_same_bits(counts, monkeypatch):
    x, w = torch.randn(sum(counts), 16, requires_grad=True), torch.randn(4, 8, 16, requires_grad=True)
    factors = torch.randn(sum(counts), 8)

    def run() -> tuple[torch.Tensor, ...]:
        y = grouped_linear(x, LateWeight(w, w.dtype), counts)
        return y, *torch.autograd.grad(y, (x, w), factors)

    grouped = run()
    monkeypatch.setattr("twohop.models.grouped._grouped_mm_is_defined", lambda *_: False)
    for one, other in zip(grouped, run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_may_come_in_several_calls(dtype):
    """As one call with all rows; a product may use another kernel for another number of rows, hence no equal bits."""
    experts = Experts(4, DIM, FFN, Activation.gelu).to(dtype)
    randomise(experts)
    calls = [torch.randn(sum(counts), DIM, dtype=dtype, requires_grad=True) for counts in GROUPS]
    factors = [torch.randn_like(rows) for rows in calls]
    one_pass = ExpertPass(experts, calls[0])
    one_pass.open()
    outputs = [one_pass(rows, counts) for rows, counts in zip(calls, GROUPS, strict=True)]
    loss = sum((y * factor).sum() for y, factor in zip(outputs, factors, strict=True))
    got = torch.autograd.grad(loss, [*calls, experts.up, experts.down], retain_graph=True)
    again = torch.autograd.grad(loss, [*calls, experts.up, experts.down])
    assert all(torch.equal(first, second) for first, second in zip(got, again, strict=True))

    # Calls as they would be, all rows at once: of each expert first those of the first call.
    split = [rows.split(counts) for rows, counts in zip(calls, GROUPS, strict=True)]
    whole = torch.cat([rows for of_expert in zip(*split, strict=True) for rows in of_expert])
    factors = [factor.split(counts) for factor, counts in zip(factors, GROUPS, strict=True)]
    whole_factor = torch.cat([factor for of_expert in zip(*factors, strict=True) for factor in of_expert])
    y = experts(whole, [sum(column) for column in zip(*GROUPS, strict=True)])
    expected = torch.autograd.grad((y * whole_factor).sum(), [*calls, experts.up, experts.down])
    rounding = 100 * torch.finfo(dtype).eps  # of sums over at most 36 rows and 32 columns
    for our_grad, their_grad in zip(got, expected, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=rounding, atol=rounding * their_grad.norm().item())


def test_when_weight_gradients_are_computed():
    """After everything that was computed since the pass was opened, and before what was computed earlier."""
    order = []
    experts, rows = Experts(2, 16, 16, Activation.gelu), torch.randn(4, 16, requires_grad=True)
    randomise(experts)
    experts.up.register_hook(lambda grad: order.append("weights"))
    one_pass = ExpertPass(experts, rows)
    before = rows * 1
    one_pass.open()
    after = before * 1
    before.register_hook(lambda grad: order.append("computed before"))
    after.register_hook(lambda grad: order.append("computed after"))
    one_pass(after, [1, 3]).sum().backward()
    assert order == ["computed after", "weights", "computed before"]
    assert experts.up.grad is not None


@pytest.mark.parametrize(("dtype", "width", "grouped"), [
    (torch.float32, 12, True), (torch.float32, 10, False), (torch.bfloat16, 16, True), (torch.bfloat16, 12, False),
    (torch.float64, 16, False),
])  # fmt: skip
def test_grouped_mm_is_used_where_it_is_defined(dtype, width, grouped, monkeypatch):
    calls = []
    real = torch.nn.functional.grouped_mm
    monkeypatch.setattr("torch.nn.functional.grouped_mm", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    x, w = torch.randn(5, width).to(dtype), torch.randn(2, 8, width).to(dtype)
    y = grouped_linear(x, LateWeight(w, w.dtype), [2, 3])
    torch.testing.assert_close(y, torch.cat([x[:2] @ w[0].T, x[2:] @ w[1].T]))
    assert bool(calls) == grouped


def test_bf16_autocast_multiplies_in_bf16_and_returns_the_rows_dtype():
    experts = Experts(2, 16, 16, Activation.swiglu)
    randomise(experts)
    rows = torch.randn(6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = experts(rows, [2, 4])
    exact = experts(rows, [2, 4])
    assert output.dtype == torch.float32
    assert not torch.equal(output, exact)
    torch.testing.assert_close(output, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    low = Experts(2, 16, 16, Activation.swiglu).bfloat16()
    low.load_state_dict(experts.state_dict())
    assert torch.equal(low(rows.bfloat16(), [2, 4]), output.bfloat16())


@pytest.mark.parametrize("activation", list(Activation))
def test_feed_forward_is_its_definition(activation):
    mlp = FeedForward(DIM, FFN, activation).double()
    x = torch.randn(3, DIM, dtype=torch.float64)
    expected = torch.stack([feed_forward(row, mlp.up.weight, mlp.down.weight, activation) for row in x])
    torch.testing.assert_close(mlp(x), expected)
