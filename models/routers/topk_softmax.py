"""The K largest logits, then a softmax over them alone (Jiang 2024, Mixtral)."""

from torch import Tensor

from twohop.models.routers.base import Routing, TokenInfo
from twohop.models.routers.softmax_topk import BALANCE, SoftmaxTopKRouter


class TopKSoftmaxRouter(SoftmaxTopKRouter):
    """The weights of a token sum to 1; with K = 1 the weight is constant, and only losses teach the gate."""

    options = BALANCE | {"jitter"}

    def choose(self, logits_NE: Tensor, about: TokenInfo) -> Routing:
        """The losses see the softmax over all experts, as in Mixtral's code."""
        top_logits_NK, ids_NK = logits_NE.topk(self.config.top_k, -1)
        return self.routing(about, ids_NK, top_logits_NK.softmax(-1), logits_NE, logits_NE.softmax(-1))
