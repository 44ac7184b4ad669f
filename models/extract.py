"""One task cut out of a model with task-level gates (Kudugunta 2021, Beyond Distillation): small, dense, by itself.

A task's gate does not look at tokens, so in every layer its K experts and their weights w are constants, and
Σ_k w_k · down_k(act(up_k x)) is one MLP: the K hidden layers side by side, with w multiplied into `down`. What is left
has no router, no unused expert and nothing to exchange.

Shapes: E experts of a layer, K experts of the task, D model width, F hidden width, U width of the up projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twohop.models.build import build_model
from twohop.models.config import Activation, ModelConfig, MoEConfig, Residual
from twohop.models.encoder_decoder import EncoderDecoder
from twohop.models.routers import TokenInfo, build_router

Read = Callable[[str], Tensor]  # a parameter or buffer by its name: the whole of it, with the experts of all ranks


@torch.no_grad()
def extract_task(config: ModelConfig, read: Read, task: int) -> EncoderDecoder:
    """The sub-network of the task number `task`, in this process, in evaluation mode.

    A side whose router is not by task stays as it is, with all its experts. A side that is folded drops no token, so it
    equals the whole model without a capacity at evaluation.

    Args:
        config: of the whole model.
        read: called in an order that depends on `config` alone, so it may be collective.
        task: in [0, config.num_tasks).

    Raises:
        ValueError: no side has task-level gates, there is no such task, or a layer mixes its parts by the token.
    """
    sides = _sides_by_task(config)
    if not 0 <= task < (config.num_tasks or 0):
        raise ValueError(f"there is no task {task}: the model has {config.num_tasks}")
    tensors: dict[str, Tensor] = {}
    for side, stack in sides.items():
        for block, num_experts in enumerate(stack.experts_by_block):
            if num_experts:
                up_UD, down_DF = _fold(stack, num_experts, f"{side}.{block}.moe", read, task)
                tensors |= {f"{side}.{block}.mlp.up.weight": up_UD, f"{side}.{block}.mlp.down.weight": down_DF}
    model = build_model(_without_experts(config, sides))
    assert isinstance(model, EncoderDecoder)
    tensors |= {name: read(name) for name in model.state_dict() if name not in tensors}
    model.to(tensors["embed.weight"].dtype).load_state_dict(tensors)
    return model.eval()


def _sides_by_task(config: ModelConfig) -> dict[str, ModelConfig]:
    """The configurations of the sides that have task-level gates, by the names of their modules."""
    stacks = {} if config.encoder is None else {"encoder": config.encoder_stack, "decoder": config}
    sides = {
        side: stack for side, stack in stacks.items() if any(stack.experts_by_block) and stack.moe.router.name == "task"
    }
    if not sides:
        raise ValueError("no router of this model is by task, so no task can be cut out: train with model=task_moe")
    if any(stack.moe.residual is Residual.learned for stack in sides.values()):
        raise ValueError(
            "residual=learned weighs experts and MLP token by token, so a task's experts are no constant part: "
            "train with residual=sum"
        )
    return sides


def _without_experts(config: ModelConfig, sides: dict[str, ModelConfig]) -> ModelConfig:
    """The same with dense blocks of the folded widths in these sides."""
    dense = {side: {"moe": MoEConfig(), "ffn_dims": _widths(stack)} for side, stack in sides.items()}
    assert config.encoder is not None
    encoder = replace(config.encoder, **dense.get("encoder", {}))  # type: ignore[arg-type]
    return replace(config, encoder=encoder, **dense.get("decoder", {}))  # type: ignore[arg-type]


def _widths(stack: ModelConfig) -> list[int]:
    moe = stack.moe
    folded = moe.router.top_k * (moe.ffn_dim or stack.ffn_dim) + moe.shared_ffn_dim
    folded += stack.ffn_dim if moe.residual is Residual.sum else 0
    dense = stack.ffn_dims or [stack.ffn_dim] * stack.num_layers
    return [folded if experts else width for experts, width in zip(stack.experts_by_block, dense, strict=True)]


def _fold(stack: ModelConfig, num_experts: int, layer: str, read: Read, task: int) -> tuple[Tensor, Tensor]:
    """Weights `up` [U, D] and `down` [D, F] of the MLP that does what the layer does for this task."""
    up_EUD, down_EDF = read(f"{layer}.experts.up"), read(f"{layer}.experts.down")
    router = build_router(stack.moe.router, stack.dim, num_experts, stack.vocab_size, stack.num_tasks)
    router.to(up_EUD.dtype).eval()
    router.load_state_dict({name: read(f"{layer}.router.{name}") for name in router.state_dict()})
    routing = router(up_EUD.new_zeros(1, stack.dim, device="cpu"), TokenInfo(1, task_B=torch.tensor([task])))
    ups = [up_EUD[expert] for expert in routing.ids_NK[0]]
    downs = [w * down_EDF[expert] for w, expert in zip(routing.weights_NK[0], routing.ids_NK[0], strict=True)]
    beside = ["shared"] if stack.moe.shared_ffn_dim else []
    beside += ["residual.mlp"] if stack.moe.residual is Residual.sum else []
    for part in beside:
        ups.append(read(f"{layer}.{part}.up.weight"))
        downs.append(read(f"{layer}.{part}.down.weight"))
    return _join_ups(ups, stack.activation), torch.cat(downs, 1)


def _join_ups(ups: Sequence[Tensor], activation: Activation) -> Tensor:
    """Hidden layers side by side; SwiGLU wants all gates before all that they gate."""
    if activation is Activation.swiglu:
        gates, gated = zip(*(up_UD.chunk(2) for up_UD in ups), strict=True)
        ups = [*gates, *gated]
    return torch.cat(list(ups))
