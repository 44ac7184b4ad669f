"""Sampling text from a model, one token at a time, with a key/value cache.

Shapes: B sequences, T positions, V vocabulary.
"""

import torch
from torch import Tensor

from twohop.models.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    ids_BT: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues every prompt by `max_new_tokens`: int64 [B, T + max_new_tokens].

    Temperature 0 takes the most probable token; `top_k` samples among that many. The model is in evaluation mode
    meanwhile. With expert parallelism this is collective: every rank calls it with the same prompt and an equally
    seeded generator, which lives on the model's device. Raises ValueError if prompt and continuation do not fit into
    max_seq_len.
    """
    total = ids_BT.shape[1] + max_new_tokens
    if ids_BT.shape[1] == 0:
        raise ValueError("generate.prompt is empty: give at least one token to continue from")
    if total > model.config.max_seq_len:
        raise ValueError(
            f"generate.max_new_tokens={max_new_tokens} after a prompt of {ids_BT.shape[1]} tokens exceeds "
            f"model.max_seq_len={model.config.max_seq_len}: ask for at most "
            f"{max(0, model.config.max_seq_len - ids_BT.shape[1])} new tokens"
        )
    was_training = model.training
    model.eval()
    cache = model.new_cache(total)
    new_ids_BT = ids_BT
    for _ in range(max_new_tokens):
        logits_BV = model(new_ids_BT, cache).logits[:, -1]
        new_ids_BT = _sample(logits_BV, temperature, top_k, generator)
        ids_BT = torch.cat([ids_BT, new_ids_BT], 1)
    model.train(was_training)
    return ids_BT


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One id for each sequence: [B, 1]."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
