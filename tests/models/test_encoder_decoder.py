"""The encoder-decoder: against a plain version, against itself sample by sample, and one task cut out of it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from twohop.comm import Topology, build_dispatcher
from twohop.models import (
    EncoderDecoder,
    ModelConfig,
    MoEConfig,
    MoELayer,
    RouterConfig,
    build_model,
    init_weights,
    parameter_counts,
    translate,
)
from twohop.models.config import Activation, EncoderConfig, ModelKind, Residual
from twohop.models.extract import extract_task
from twohop.models.routers import TokenInfo

VOCAB, TASKS = 30, 4
LENGTHS = torch.tensor([6, 2, 4, 1]), torch.tensor([5, 3, 1, 4])  # of sources and targets


def side(router: str, experts: tuple[int, ...] | str = (4,), **options) -> MoEConfig:
    config = RouterConfig(name=router, top_k=2) if router else RouterConfig()
    return MoEConfig(experts=experts if router else [], every=1, router=config, **options)


def make_config(encoder: MoEConfig, decoder: MoEConfig, **options) -> ModelConfig:
    defaults = {"vocab_size": VOCAB, "num_tasks": TASKS, "max_seq_len": 12, "dim": 16, "num_heads": 2, "ffn_dim": 24}
    config = {**defaults, "num_layers": 2, "init_std": 0.3, **options}
    return ModelConfig(
        kind=ModelKind.encoder_decoder, encoder=EncoderConfig(num_layers=2, moe=encoder), moe=decoder, **config
    )


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> EncoderDecoder:
    model = build_model(config).to(dtype)
    init_weights(model, 0)
    return model.eval()


def inputs(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = [int(lengths.max()) for lengths in LENGTHS]
    source_BS, ids_BT = (torch.randint(VOCAB, (4, size), generator=draw) for size in sizes)
    return {
        "source_BS": source_BS,
        "source_length_B": LENGTHS[0],
        "ids_BT": ids_BT,
        "length_B": LENGTHS[1],
        "task_B": torch.tensor([2, 0, 1, 2]),
    }


def is_target() -> Tensor:
    return torch.arange(int(LENGTHS[1].max())) < LENGTHS[1][:, None]


# A slow and plain version


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def attention(weights: dict, name: str, x_TD: Tensor, memory_SD: Tensor, causal: bool) -> Tensor:
    def heads(part: str, x: Tensor) -> list[Tensor]:
        return list((x @ weights[f"{name}.{part}.weight"].T).split(8, -1))

    def rotated(x: Tensor) -> Tensor:
        rows = []
        for position, row in enumerate(x):
            z = torch.complex(row[:4], row[4:])
            angles = torch.tensor([position * 10_000 ** (-i / 4) for i in range(4)], dtype=x.dtype)
            z = z * torch.polar(torch.ones_like(angles), angles)
            rows.append(torch.cat([z.real, z.imag]))
        return torch.stack(rows)

    out = []
    for q, k, v in zip(heads("wq", x_TD), heads("wk", memory_SD), heads("wv", memory_SD), strict=True):
        scores = rotated(q) @ rotated(k).T / math.sqrt(8)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, -1) @ weights[f"{name}.wo.weight"].T


def mlp(weights: dict, name: str, x: Tensor) -> Tensor:
    hidden = torch.nn.functional.gelu(x @ weights[f"{name}.up.weight"].T)
    return hidden @ weights[f"{name}.down.weight"].T


def embed(weights: dict, ids: Tensor) -> Tensor:
    rows = []
    for position, i in enumerate(ids.tolist()):
        angles = torch.tensor([position * 10_000 ** (-j / 8) for j in range(8)], dtype=torch.float64)
        rows.append(weights["embed.weight"][i] * 4 + torch.cat([angles.cos(), angles.sin()]))
    return torch.stack(rows)


def plain_logits(model: EncoderDecoder, source: Tensor, target: Tensor) -> Tensor:
    """Of one pair without padding, for a dense model."""
    weights = dict(model.named_parameters())
    x = embed(weights, source)
    for block in ("encoder.0", "encoder.1"):
        h = norm(x, weights[f"{block}.attention_norm.weight"])
        x = x + attention(weights, f"{block}.attention", h, h, causal=False)
        x = x + mlp(weights, f"{block}.mlp", norm(x, weights[f"{block}.ffn_norm.weight"]))
    memory = norm(x, weights["encoder_norm.weight"])
    x = embed(weights, target)
    for block in ("decoder.0", "decoder.1"):
        h = norm(x, weights[f"{block}.attention_norm.weight"])
        x = x + attention(weights, f"{block}.attention", h, h, causal=True)
        h = norm(x, weights[f"{block}.cross_norm.weight"])
        x = x + attention(weights, f"{block}.cross_attention", h, memory, causal=False)
        x = x + mlp(weights, f"{block}.mlp", norm(x, weights[f"{block}.ffn_norm.weight"]))
    return norm(x, weights["norm.weight"]) @ weights["embed.weight"].T


def test_logits_are_those_of_a_plain_version():
    model, batch = build(make_config(side(""), side(""))), inputs()
    logits = model(**batch).logits
    for row, (source_len, length) in enumerate(zip(*LENGTHS, strict=True)):
        expected = plain_logits(model, batch["source_BS"][row, :source_len], batch["ids_BT"][row, :length])
        torch.testing.assert_close(logits[row, :length], expected)


# Padding, later tokens, caches

ROUTERS = [("task", "task"), ("softmax_topk", "task"), ("sentence", "sentence")]


@pytest.mark.parametrize(("encoder", "decoder"), ROUTERS)
def test_a_sample_does_not_depend_on_those_beside_it(encoder: str, decoder: str):
    model, batch = build(make_config(side(encoder), side(decoder))), inputs()
    output = model(**batch)
    for row, (source_len, length) in enumerate(zip(*LENGTHS, strict=True)):
        own = slice(row, row + 1)
        alone = model(
            batch["source_BS"][own, :source_len],
            LENGTHS[0][own],
            batch["ids_BT"][own, :length],
            task_B=batch["task_B"][own],
        )
        torch.testing.assert_close(output.logits[own, :length], alone.logits)
    # An assignment for each token and choice, and none for padding.
    assert [int(stats.load_E.sum()) for stats in output.moe] == [2 * n for n in (13, 13, 13, 13)]


@pytest.mark.parametrize(("encoder", "decoder"), ROUTERS)
def test_a_logit_depends_on_no_later_target(encoder: str, decoder: str):
    model, batch = build(make_config(side(encoder), side(decoder))), inputs()
    changed = batch | {"ids_BT": torch.cat([batch["ids_BT"][:, :2], batch["ids_BT"][:, 2:] ^ 1], 1)}
    before, after = model(**batch).logits, model(**changed).logits
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.isclose(before[0, 2], after[0, 2]).all()


@pytest.mark.parametrize(("encoder", "decoder"), ROUTERS)
def test_decoding_with_a_cache_gives_the_same_logits(encoder: str, decoder: str):
    model, batch = build(make_config(side(encoder), side(decoder))), inputs()
    source = model.encode(batch["source_BS"], batch["source_length_B"], batch["task_B"])
    cache = model.new_cache(source_len=6, max_len=5)
    steps = [model.decode(batch["ids_BT"][:, t : t + 1], source, cache).logits for t in range(5)]
    whole = model.decode(batch["ids_BT"], source).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_translate_takes_the_best_token_and_stays_at_the_end():
    model, batch = build(make_config(side("task"), side("task"), init_std=2.0)), inputs()
    given = batch["source_BS"], batch["source_length_B"], batch["task_B"]
    source = model.encode(*given)
    went_on = shorter = 0
    for end in range(VOCAB):
        ids = torch.full((4, 1), end)
        for _ in range(8):
            ids = torch.cat([ids, model.decode(ids, source).logits[:, -1:].argmax(-1)], 1)
        has_ended = (ids[:, 1:] == end).cumsum(1) > 0
        expected = ids[:, 1:].masked_fill(has_ended, end)
        widths = ((~has_ended).sum(1) + 1).clamp(max=8).tolist()
        assert torch.equal(translate(model, *given, 8, end), expected[:, : max(widths)])
        for row, width in enumerate(widths):
            alone = translate(model, *(x[row : row + 1] for x in given), 8, end)
            assert torch.equal(alone, expected[row : row + 1, :width])
        went_on += int((expected != ids[:, 1:]).any())
        shorter += min(widths) < 8
    assert went_on
    assert shorter


def test_a_sequence_past_max_seq_len_is_refused():
    model = build(make_config(side(""), side("")))
    with pytest.raises(ValueError, match=r"a sequence of 13 tokens is longer than model.max_seq_len=12"):
        model.encode(torch.zeros(1, 13, dtype=torch.int64), torch.tensor([13]))


# Gates


def test_what_a_router_hears_of_sequences_of_different_length():
    about = TokenInfo(3, length_B=torch.tensor([1, 3, 2]))
    x_N = torch.tensor([5.0, 1.0, 2.0, 6.0, 4.0, 8.0], dtype=torch.float64)
    assert about.mean(x_N).tolist() == [5, 3, 6]
    assert about.for_each_token(torch.tensor([7, 8, 9]), 6).tolist() == [7, 8, 8, 8, 9, 9]
    alike = TokenInfo(2)
    assert alike.mean(x_N).tolist() == [8 / 3, 6]
    assert alike.for_each_token(torch.tensor([7, 8]), 6).tolist() == [7, 7, 7, 8, 8, 8]


def test_each_side_has_its_own_gates():
    config = make_config(side("softmax_topk", (4, 8)), side("task", (2, 4)))
    model, batch = build(config), inputs()
    assert config.experts_by_layer == [4, 8, 2, 4]
    assert [type(layer.router).__name__ for _, layer in model.moe_layers()] == ["SoftmaxTopKRouter"] * 2 + [
        "TaskRouter"
    ] * 2
    # One task uses K experts on the side that routes by task, and more on the other.
    output = model(**(batch | {"task_B": torch.full((4,), 3)}))
    used = [int(stats.load_E.count_nonzero()) for stats in output.moe]
    assert used[2:] == [2, 2]
    assert min(used[:2]) > 2


def test_a_sentence_gate_of_the_decoder_goes_by_the_source():
    model, batch = build(make_config(side("task"), side("sentence", (8,)))), inputs()
    loads = [stats.load_E.tolist() for stats in model(**batch).moe[2:]]
    other_target = batch | {"ids_BT": inputs(1)["ids_BT"]}
    assert [stats.load_E.tolist() for stats in model(**other_target).moe[2:]] == loads
    other_source = batch | {"source_BS": inputs(1)["source_BS"]}
    assert [stats.load_E.tolist() for stats in model(**other_source).moe[2:]] != loads


def ep_worker(ep_size: int) -> Tensor:
    topology = Topology.discover(ranks_per_node=2, ep_size=ep_size)
    config = make_config(side("softmax_topk"), side("task"))
    model = build_model(config, lambda i, n: build_dispatcher("dedup", topology, n)).double()
    init_weights(model, 0)
    own = inputs(torch.distributed.get_rank())
    return model.eval()(**own).logits.detach()


def test_expert_parallelism_changes_no_logit():
    whole = build(make_config(side("softmax_topk"), side("task")))
    for rank, logits in enumerate(run_distributed(ep_worker, 2, 2)):
        torch.testing.assert_close(logits[is_target()], whole(**inputs(rank)).logits[is_target()])


# One task cut out

PARTS = [
    {},
    {"shared_ffn_dim": 12},
    {"residual": Residual.sum, "ffn_dim": 8},
]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("activation", Activation)
def test_a_cut_out_task_has_the_whole_model_s_logits(activation: Activation, parts: dict):
    config = make_config(side("task", (4, 0), **parts), side("task", (3, 6), **parts), activation=activation)
    whole = build(config)
    for task in range(TASKS):
        batch = inputs(task) | {"task_B": torch.full((4,), task)}
        part = extract_task(config, whole.state_dict().__getitem__, task)
        assert not any(isinstance(module, MoELayer) for module in part.modules())
        assert parameter_counts(part.config).total == sum(p.numel() for p in part.parameters())
        del batch["task_B"]  # it has no use for it
        expected = whole(**batch, task_B=torch.full((4,), task)).logits
        torch.testing.assert_close(part(**batch).logits[is_target()], expected[is_target()])


def test_a_cut_out_task_agrees_in_single_precision():
    config = make_config(side("task"), side("task"), init_std=0.05)
    whole, batch = build(config, torch.float32), inputs() | {"task_B": torch.full((4,), 1)}
    part = extract_task(config, whole.state_dict().__getitem__, 1)
    torch.testing.assert_close(part(**batch).logits[is_target()], whole(**batch).logits[is_target()], atol=1e-6, rtol=0)


def test_a_side_without_task_gates_keeps_its_experts():
    config = make_config(side("softmax_topk"), side("task"))
    whole, batch = build(config), inputs() | {"task_B": torch.full((4,), 1)}
    part = extract_task(config, whole.state_dict().__getitem__, 1)
    assert part.config.experts_by_layer == [4, 4]
    torch.testing.assert_close(part(**batch).logits[is_target()], whole(**batch).logits[is_target()])


def test_what_cannot_be_cut_out_is_refused():
    config = make_config(side("task"), side("task"))
    read = build(config).state_dict().__getitem__
    with pytest.raises(ValueError, match="there is no task 4: the model has 4"):
        extract_task(config, read, 4)
    with pytest.raises(ValueError, match="no router of this model is by task"):
        extract_task(make_config(side("sentence"), side("softmax_topk")), read, 0)
    with pytest.raises(ValueError, match="residual=learned weighs experts and MLP token by token"):
        extract_task(make_config(side("task", residual=Residual.learned), side("task")), read, 0)


# Configuration


def test_keys_of_the_encoder_are_checked_and_named():
    assert make_config(side("task", "pyramid(2, 4, last=1)"), side("")).experts_by_layer == [2, 4]
    with pytest.raises(ValueError, match=r"model.encoder.moe.experts lists 3 layers, but model.encoder.num_layers=2"):
        make_config(side("task", (2, 2, 2)), side(""))
    with pytest.raises(ValueError, match=r"model.encoder has no use with model.kind=decoder"):
        ModelConfig(encoder=EncoderConfig())
    with pytest.raises(ValueError, match=r"model.encoder.ffn_dims=\[3\]: list a positive width for each of the 4"):
        ModelConfig(kind=ModelKind.encoder_decoder, encoder=EncoderConfig(ffn_dims=[3]))


def test_blocks_may_have_widths_of_their_own():
    config = make_config(side(""), side(""), ffn_dims=[8, 40])
    config = replace(config, encoder=EncoderConfig(num_layers=2, ffn_dims=[4, 12]))
    model = build_model(config)
    blocks = [*model.encoder, *model.decoder]
    assert [block.mlp.up.out_features for block in blocks] == [4, 12, 8, 40]
