"""Models over several ranks; a module of its own, because importing transformers would cost its workers seconds."""

import torch

from tests.distributed import run_distributed
from twohop.comm import Topology, build_dispatcher
from twohop.models import ModelConfig, MoEConfig, build_model, expert_parameters, generate, init_weights

CONFIG = ModelConfig(
    vocab_size=50, max_seq_len=32, dim=32, num_layers=4, num_heads=4, ffn_dim=48, init_std=0.3,
    moe=MoEConfig(experts=[4, 8]),
)  # fmt: skip


def prompt() -> torch.Tensor:
    return torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))


def whole_model() -> torch.nn.Module:
    model = build_model(CONFIG)
    init_weights(model, seed=3)
    return model


def ep_worker(ep_size: int) -> tuple[dict, int, torch.Tensor]:
    """One rank's parameters, its EP rank, and what it generates."""
    topology = Topology.discover(ranks_per_node=2, ep_size=ep_size)
    model = build_model(CONFIG, lambda i, num_experts: build_dispatcher("dedup", topology, num_experts))
    init_weights(model, seed=3)
    text = generate(model, prompt(), 8, temperature=0.8, generator=torch.Generator().manual_seed(0))
    return {name: p.detach() for name, p in model.named_parameters()}, topology.ep_rank, text


def test_expert_parallelism_changes_neither_weights_nor_text():
    whole = whole_model()
    text = generate(whole, prompt(), 8, temperature=0.8, generator=torch.Generator().manual_seed(0))
    experts = expert_parameters(whole)
    for ep_size in (2, 4):
        for parameters, ep_rank, rank_text in run_distributed(ep_worker, 4, ep_size):
            assert torch.equal(rank_text, text)
            for name, p in whole.named_parameters():
                share = p.chunk(ep_size)[ep_rank] if name in experts else p
                assert torch.equal(parameters[name], share), name


def one_process_worker() -> torch.Tensor | None:
    """Builds a whole model on rank 0 alone, inside a world of two."""
    return whole_model()(prompt()).logits.detach() if torch.distributed.get_rank() == 0 else None


def test_a_model_without_dispatchers_needs_no_other_rank():
    logits, _ = run_distributed(one_process_worker, 2)
    torch.testing.assert_close(logits, whole_model()(prompt()).logits)
