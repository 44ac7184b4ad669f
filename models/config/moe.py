"""Mixture-of-Experts layers: experts, capacity, router, cache."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from twohop.models.config.checks import require
from twohop.models.layer_counts import expert_counts


class CapacityRounding(Enum):
    """How an expert's capacity B is rounded from K·N·C/E (see `twohop.models.capacity`)."""

    ceil = "ceil"
    round = "round"
    ceil4 = "ceil4"
    tutel = "tutel"


class CapacityPolicy(Enum):
    """How the capacity factor C is found while training: given, or by each layer's measured load.

    `dynamic`: the smallest that drops nothing (Tutel; DynaMoE, Kossmann 2022). `schedule`: a margin above the moving
    average of what would have dropped nothing.
    """

    static = "static"
    dynamic = "dynamic"
    schedule = "schedule"


class Residual(Enum):
    """PR-MoE's residual branch: how the dense MLP and the routed expert are added (Rajbhandari 2022)."""

    none = "none"
    sum = "sum"
    learned = "learned"


class BatchPriority(Enum):
    """Which tokens fill the experts first: in their order, or by their largest or summed weight (Riquelme 2021)."""

    none = "none"
    max = "max"
    sum = "sum"


class BalanceOver(Enum):
    """Over which tokens the load-balancing loss counts: those of a micro-batch, or of the global batch (Qiu 2025)."""

    micro_batch = "micro_batch"
    global_batch = "global_batch"


@dataclass
class RouterConfig:
    """Which experts a token goes to. `name` is looked up in `twohop.models.routers`.

    A router refuses what it does not have; a default that it does not have means nothing to it.
    """

    name: str = "softmax_topk"
    top_k: int = 2
    renormalize: bool = False  # divide the weights of a token by their sum
    scale: float = 1.0  # sigmoid: factor of the weights; DeepSeek-V3 uses 2.5
    jitter: float = 0.0  # input noise of Switch: x · U(1 - jitter, 1 + jitter), training only
    noise: float = 1.0  # noisy: the logits' noise has the standard deviation noise / E, training only
    groups: int = 1  # sigmoid: parts of the experts in order; as many as an EP group has nodes: one for each node
    top_groups: int = 1  # sigmoid: how many groups a token may use
    bias_rate: float = 1e-3  # sigmoid: γ, by which the selection bias moves after a step; 0: no bias
    iterations: int = 8  # sinkhorn: normalisations of rows and columns
    load_balance_loss: float = 0.01  # weight α of E · Σ f·P, which is 1 when balanced
    load_balance_over: BalanceOver = BalanceOver.micro_batch
    sequence_loss: float = 0.0  # weight of the same within each sequence; DeepSeek-V3 uses 1e-4
    z_loss: float = 0.0  # weight of mean(logsumexp(logits)²); ST-MoE uses 1e-3
    importance_loss: float = 0.005  # noisy: weight of (std / mean)² of the experts' summed probabilities
    load_loss: float = 0.005  # noisy: weight of (std / mean)² of the experts' chances to be chosen

    def __post_init__(self) -> None:
        require(self.top_k >= 1, f"model.moe.router.top_k={self.top_k}: a token needs at least 1 expert")
        require(0 <= self.jitter < 1, f"model.moe.router.jitter={self.jitter}: use a value in [0, 1)")
        require(self.scale > 0, f"model.moe.router.scale={self.scale}: use a positive factor")
        for key in ("noise", "bias_rate"):
            value = getattr(self, key)
            require(value >= 0, f"model.moe.router.{key}={value}: use 0 for none, or more")
        require(self.iterations >= 1, f"model.moe.router.iterations={self.iterations}: use 1 or more")
        require(
            1 <= self.top_groups <= self.groups,
            f"model.moe.router.top_groups={self.top_groups}: use a number from 1 to groups={self.groups}",
        )
        require(
            self.load_balance_loss != 0 or self.load_balance_over is BalanceOver.micro_batch,
            f"model.moe.router.load_balance_over={self.load_balance_over.value} has no use with "
            "model.moe.router.load_balance_loss=0: leave it out",
        )
        for key in ("load_balance_loss", "sequence_loss", "z_loss", "importance_loss", "load_loss"):
            value = getattr(self, key)
            require(value >= 0, f"model.moe.router.{key}={value}: a loss weight is at least 0")


@dataclass
class AssignmentCacheConfig:
    """Training with a micro-batch's earlier assignments instead of the router (DynaMoE, Kossmann 2022).

    Needs batches that come again: data.order=batches.
    """

    enabled: bool = False
    trigger: float = 0.9  # a layer uses its cache while the moving average of repeated assignments is at least this
    check_every: int = 10  # steps; a layer that uses its cache routes live in each of these, to see what still repeats
    max_plans: int | None = None  # kept by a layer on each rank, up to the end of a step; null: one a micro-batch

    def __post_init__(self) -> None:
        key = "model.moe.cache"
        require(0 < self.trigger <= 1, f"{key}.trigger={self.trigger}: use a fraction above 0, at most 1")
        require(self.check_every >= 2, f"{key}.check_every={self.check_every}: use 2 steps or more")
        require(
            self.max_plans is None or self.max_plans >= 1, f"{key}.max_plans={self.max_plans}: use 1 or more, or null"
        )
        for name in ("trigger", "check_every", "max_plans"):
            value = getattr(self, name)
            require(
                self.enabled or value == getattr(AssignmentCacheConfig, name),
                f"{key}.{name}={value} has no use with {key}.enabled=false: enable it or leave it out",
            )


@dataclass
class MoEConfig:
    """The Mixture-of-Experts layers of a model. `experts=[]` makes the model dense."""

    # One number for each MoE layer (0: a dense block in its place), or one for all. Also a text, "[32]*10 + [64]*2" or
    # "pyramid(32, 64, last=2)", which the `ModelConfig` around makes a list, since it knows the number of layers.
    experts: Any = field(default_factory=list)
    every: int = 2  # the blocks every, 2·every, … (counted from 1) are MoE blocks
    last: int | None = None  # only the last so many of these (V-MoE's last-n, Riquelme 2021); null: all
    ffn_dim: int | None = None  # hidden width of an expert; null: the model's ffn_dim
    expert_bits: int | None = None  # of a run that was exported with fewer bits, 8 or 4; null: full precision
    shared_ffn_dim: int = 0  # hidden width of the shared expert that sees every token; 0: none
    residual: Residual = Residual.none
    capacity_policy: CapacityPolicy = CapacityPolicy.static
    capacity_factor: float | None = None  # static: C while training; null: dropless
    capacity_bound: float | None = None  # dynamic, schedule: the most that C may be; null: no bound
    capacity_margin: float = 1.1  # schedule: C ÷ the moving average of what would have dropped nothing
    eval_capacity_factor: float | None = None  # C at evaluation; null: dropless
    capacity_rounding: CapacityRounding = CapacityRounding.ceil
    min_capacity: int = 4
    batch_priority: BatchPriority = BatchPriority.none
    allow_non_causal: bool = False  # train a causal decoder with routes that depend on later tokens
    router: RouterConfig = field(default_factory=RouterConfig)
    cache: AssignmentCacheConfig = field(default_factory=AssignmentCacheConfig)

    def __post_init__(self) -> None:
        require(self.every >= 1, f"model.moe.every={self.every}: use 1 for every block, 2 for every second")
        require(self.last is None or self.last >= 1, f"model.moe.last={self.last}: use 1 or more, or null for all")
        require(self.expert_bits in (None, 4, 8), f"model.moe.expert_bits={self.expert_bits}: use 8, 4 or null")
        require(self.shared_ffn_dim >= 0, f"model.moe.shared_ffn_dim={self.shared_ffn_dim}: use 0 for none")
        require(self.min_capacity >= 0, f"model.moe.min_capacity={self.min_capacity}: use 0 or more")
        self._check_capacity_policy()
        self._check_router()
        for key in ("capacity_factor", "eval_capacity_factor", "capacity_bound"):
            value = getattr(self, key)
            require(
                value is None or value > 0,
                f"model.moe.{key}={value}: use a positive factor, or null for dropless routing",
            )
        if not isinstance(self.experts, str):
            self.experts = expert_counts(self.experts)
            self._check_experts()

    def _check_capacity_policy(self) -> None:
        policy = self.capacity_policy
        has_use = {
            "capacity_factor": policy is CapacityPolicy.static,
            "capacity_bound": policy is not CapacityPolicy.static,
            "capacity_margin": policy is CapacityPolicy.schedule,
        }
        for key, used in has_use.items():
            value, default = getattr(self, key), getattr(MoEConfig, key)
            require(
                used or value == default,
                f"model.moe.{key}={value} has no use with capacity_policy={policy.value}: set it to "
                f"{'null' if default is None else default}, or use another policy",
            )
        require(self.capacity_margin > 0, f"model.moe.capacity_margin={self.capacity_margin}: use a positive factor")
        if policy is CapacityPolicy.schedule:
            require(
                self.capacity_rounding is CapacityRounding.ceil,
                f"model.moe.capacity_rounding={self.capacity_rounding.value} has no use with capacity_policy=schedule, "
                "which rounds up: leave it out",
            )

    @property
    def drops_in_training(self) -> bool:
        """Whether a capacity may drop assignments while training."""
        factor = self.capacity_factor if self.capacity_policy is CapacityPolicy.static else self.capacity_bound
        return factor is not None or self.capacity_policy is CapacityPolicy.schedule

    def _check_router(self) -> None:
        if self.batch_priority is not BatchPriority.none:
            key = f"model.moe.batch_priority={self.batch_priority.value}"
            require(
                self.drops_in_training or self.eval_capacity_factor is not None,
                f"{key} has no use without a capacity: set capacity_factor or eval_capacity_factor, or leave it out",
            )
            require(
                self.batch_priority is not BatchPriority.sum or not self.router.renormalize,
                f"{key} has no use with model.moe.router.renormalize=true, which makes every sum 1: use max",
            )

    def _check_experts(self) -> None:
        require(
            any(self.experts) or not self.experts,
            f"model.moe.experts={self.experts}: no layer has experts: use [] for a dense model",
        )
        for count in self.experts:
            require(count >= 0, f"model.moe.experts={self.experts}: use 1 or more experts, or 0 for a dense block")
            require(
                self.router.top_k <= count or count == 0,
                f"model.moe.router.top_k={self.router.top_k} is more than the {count} experts of a layer "
                f"(model.moe.experts={self.experts}): lower top_k or add experts",
            )
