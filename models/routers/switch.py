"""The Switch Transformer's router (Fedus 2021): one expert for each token, weighted by its probability."""

from twohop.models.config import RouterConfig
from twohop.models.routers.softmax_topk import SoftmaxTopKRouter


class SwitchRouter(SoftmaxTopKRouter):
    """Softmax top-1. The weight stays p < 1: it is the only way for the gradient of the output to reach the gate."""

    def __init__(self, config: RouterConfig, dim: int, num_experts: int) -> None:
        if config.top_k != 1:
            raise ValueError(
                f"model.moe.router.top_k={config.top_k}: the switch router sends a token to 1 expert; "
                "set top_k=1 or use router.name=softmax_topk"
            )
        if config.renormalize:
            raise ValueError(
                "model.moe.router.renormalize=true: with 1 expert every weight would be 1 and the switch router "
                "would not learn from the output; set renormalize=false"
            )
        super().__init__(config, dim, num_experts)
