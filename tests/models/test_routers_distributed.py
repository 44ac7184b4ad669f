"""Routers over several ranks: the same training as in one process, bounded bytes, and what they learn is kept.

A module of its own, because importing transformers would cost its workers seconds.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import write_corpus
from twohop.comm import Topology, TrafficMeter, build_dispatcher
from twohop.models.config import RouterConfig
from twohop.models.routers import TokenInfo, build_router
from twohop.trainer.checkpoints.checkpoint import load_tensors
from twohop.trainer.loop import train_step

WITHOUT_INPUT_NOISE = ("model.moe.router.jitter=0",)
NON_CAUSAL = ("model.moe.allow_non_causal=true",)
ROUTERS = {
    "topk_softmax": (),
    "noisy": WITHOUT_INPUT_NOISE,
    "sigmoid": (
        "model.moe.router.renormalize=true", "model.moe.router.scale=2.5", "model.moe.router.sequence_loss=0.01",
        "model.moe.router.groups=2", "model.moe.router.bias_rate=0.01",
    ),
    "expert_choice": NON_CAUSAL,
    "sinkhorn": NON_CAUSAL,
    "sentence": NON_CAUSAL,
    "hash": (*WITHOUT_INPUT_NOISE, "model.moe.router.top_k=1", "model.moe.router.z_loss=0"),
    "softmax_topk": (*NON_CAUSAL, "model.moe.batch_priority=max", "model.moe.capacity_factor=0.5"),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("routers")
    write_corpus(directory)
    return directory


def curves(directory: Path, nproc: int, *overrides: str) -> list[tuple[runs.Curve, dict[str, torch.Tensor]]]:
    return run_distributed(runs.curve, nproc, directory, overrides, init=False)


def assert_same_training(ours: runs.Curve, theirs: runs.Curve) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_losses_and_gradients_are_those_of_one_process(directory: Path, name: str) -> None:
    options = (f"model.moe.router.name={name}", *ROUTERS[name], "train.steps=3")
    reference, _ = curves(directory, 1, *options)[0]
    found = curves(directory, 4, *options, "comm.ranks_per_node=2", "comm.ep_size=[2,4]")
    assert_same_training(found[0][0], reference)


@pytest.mark.parametrize("loss", ["load_balance_over=global_batch", "sequence_loss=10.0"])
def test_loss_of_the_global_batch_is_the_formula_for_any_world(directory: Path, loss: str) -> None:
    """Without accumulation: one process sees the global batch as one micro-batch, 4 ranks see a quarter each."""
    options = [f"model.moe.router.{loss}", *WITHOUT_INPUT_NOISE, "train.steps=4"]
    options += ["model.moe.capacity_factor=null"]  # which counts inside a micro-batch
    balance = "model.moe.router.load_balance_loss=" + ("10.0" if "global" in loss else "0")
    plain = [option for option in options if "global" not in option]
    reference, _ = curves(directory, 1, *plain, balance, "train.micro_batch=8")[0]
    for nproc, micro_batch in ((1, 8), (2, 4), (4, 2)):
        found, _ = curves(directory, nproc, *options, balance, f"train.micro_batch={micro_batch}")[0]
        assert_same_training(found, reference)
    if "global" in loss:  # and it is another than that of each micro-batch
        local, _ = curves(directory, 4, *plain, balance, "train.micro_batch=2")[0]
        assert local[-1][1] != pytest.approx(reference[-1][1], rel=1e-4)


def global_balance_with_accumulation(directory: Path) -> runs.Curve:
    """Losses of two steps, and that nothing of a step is left for the next."""
    overrides = ("model.moe.router.load_balance_over=global_batch", "model.moe.router.load_balance_loss=1.0")
    run = runs.start(directory, *overrides, *WITHOUT_INPUT_NOISE)
    records = [train_step(run, step) for step in range(2)]
    assert all(layer.router._load_so_far is None for _, layer in run.model.moe_layers())
    return [(record["loss"], record["grad_norm"]) for record in records]


def test_accumulation_counts_what_was_seen_so_far(directory: Path) -> None:
    """2 ranks x 2 micro-batches: the second sees all four, the first two; so it is near the formula, not equal."""
    found = run_distributed(global_balance_with_accumulation, 2, directory, init=False)
    assert found[0] == found[1]


LEARNED = ("model.moe.router.name=sigmoid", "model.moe.router.bias_rate=0.01", "train.steps=3")


def learn_and_save(directory: Path) -> dict[str, torch.Tensor]:
    run = runs.start(directory, *LEARNED, "comm.ep_size=2")
    for step in range(3):
        train_step(run, step)
    run.checkpoints.save(3, run.state(), run.identity(), "")
    return {name: buffer.clone() for name, buffer in run.model.named_buffers() if "router" in name}


def restore(directory: Path) -> dict[str, torch.Tensor]:
    run = runs.start(directory, *LEARNED)
    checkpoint = run.checkpoints.latest()
    assert checkpoint is not None
    load_tensors(checkpoint, run.state(), run.identity())
    return {name: buffer.clone() for name, buffer in run.model.named_buffers() if "router" in name}


def test_bias_is_equal_on_all_ranks_and_kept_in_checkpoints(directory: Path) -> None:
    learned = run_distributed(learn_and_save, 4, directory, init=False)
    assert len(learned[0]) == 2
    assert all((bias != 0).any() for bias in learned[0].values())
    for other in (*learned[1:], *run_distributed(restore, 1, directory, init=False)):
        assert all(torch.equal(other[name], bias) for name, bias in learned[0].items())


TOKENS, DIM, EXPERTS = 64, 16, 16


def bytes_between_nodes(ranks_per_node: int, groups: int, top_groups: int) -> tuple[int, int, int]:
    """Of this rank: payload sent to other nodes, (token, other node) pairs of the routing, most nodes of a token."""
    topology, meter = Topology.discover(ranks_per_node=ranks_per_node, timeout_s=20), TrafficMeter()
    config = RouterConfig(name="sigmoid", top_k=4, groups=groups, top_groups=top_groups)
    router = build_router(config, DIM, EXPERTS)
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(0))
    x_ND = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1 + topology.rank))
    routing = router(x_ND, TokenInfo(1))
    dispatcher = build_dispatcher("dedup", topology, EXPERTS, meter=meter)
    dispatcher.run(x_ND, routing.ids_NK, routing.weights_NK, lambda rows, counts: rows)
    experts_of_node = EXPERTS // topology.num_nodes
    nodes = [set((row // experts_of_node).tolist()) for row in routing.ids_NK]
    home = topology.rank // ranks_per_node
    pairs = sum(len(touched - {home}) for touched in nodes)
    return meter.bytes_sent("between nodes", "dispatch"), pairs, max(map(len, nodes))


@pytest.mark.parametrize(("ranks_per_node", "most"), [(1, 1), (1, 2), (2, 1)], ids=str)
def test_groups_bound_the_nodes_of_a_token_and_the_bytes_between_them(ranks_per_node: int, most: int) -> None:
    """4 ranks as 4 nodes x 1 or 2 x 2: as many groups as nodes, of which a token may use `most`."""
    nodes = 4 // ranks_per_node
    limited = run_distributed(bytes_between_nodes, 4, ranks_per_node, nodes, most)
    free = run_distributed(bytes_between_nodes, 4, ranks_per_node, 1, 1)
    row_bytes = DIM * 4
    for sent, pairs, touched in limited:
        assert touched <= most
        # A token leaves for at most `most` other nodes. dedup carries it to each once; relaying inside is not counted.
        assert pairs <= most * TOKENS
        assert sent == pairs * row_bytes if ranks_per_node == 1 else sent <= most * TOKENS * ranks_per_node * row_bytes
    assert sum(sent for sent, _, _ in limited) == sum(pairs for _, pairs, _ in limited) * row_bytes
    assert sum(sent for sent, _, _ in limited) < 0.75 * sum(sent for sent, _, _ in free)
    assert max(touched for _, _, touched in free) > most
