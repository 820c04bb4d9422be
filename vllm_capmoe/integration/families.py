"""Which routers of models are served, and how each scores its experts: the door for a new family.

Capacity needs the scores S [T, E] of all experts, of which a token's weights are those of the
experts that it holds. So a router is served if its scoring function is known, however it then
chooses the top-k: vLLM's own router goes on doing that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

from vllm_capmoe.config import CapacityConfig

SCORING: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
    # DeepSeek-V4's scores: the square root of softplus.
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}
"""Of float32 logits [T, E]. The routing kernel has those of `capmoe_kernels.contract.SCORINGS`
inside; it gets the scores of all others.
"""

FUNCTIONS: dict[str, str] = {}
"""Routing functions of models that choose by themselves, by module and name as vLLM has them: the
scoring whose numbers they return as weights (before they renormalise, if they are asked to).
"""

# Arguments of create_fused_moe_router under which the scores of all experts are not known to us,
# or the chosen rows hold more than routed experts.
_UNSERVED = ("zero_expert_type", "num_fused_shared_experts")
_UNSERVED_TENSORS = ("hash_indices_table", "bias_vl")


@dataclass(frozen=True)
class Family:
    """How the router of a layer scores and chooses.

    scoring: a key of `SCORING`. scale: the factor that it multiplies its weights with. plain:
    whether it chooses the experts of the highest scores, without more ado.
    """

    scoring: str
    scale: float
    plain: bool


def family_of(config: CapacityConfig, inner: Any, asked: Mapping[str, Any]) -> Family:
    """What is known of `inner`, the router that vLLM made of the arguments `asked`.

    Raises:
        ValueError: it isn't served.
    """
    function = asked.get("custom_routing_function")
    scoring: str | None = asked.get("scoring_func", "softmax")
    refused = []
    if function is not None:
        name = f"{function.__module__}.{getattr(function, '__qualname__', '')}"
        scoring = FUNCTIONS.get(name)
        refused = [] if scoring else ["custom_routing_function"]
    refused += [name for name in _UNSERVED if asked.get(name) not in (None, 0)]
    refused += [name for name in _UNSERVED_TENSORS if asked.get(name) is not None]
    if refused or scoring not in SCORING or not isinstance(inner, BaseRouter):
        what = refused[0].replace("_", " ") if refused else f"scores by {scoring}"
        raise ValueError(
            f"{config.asked}, but this model's layers route with "
            f"{type(inner).__name__} ({what}): accepted are top-k routers over softmax, "
            "sigmoid or sqrtsoftplus scores, with or without groups and biases."
        )
    grouped = asked.get("use_grouped_topk") or asked.get("e_score_correction_bias") is not None
    plain = type(inner) is FusedTopKRouter or (type(inner) is CPURouter and not grouped)
    return Family(
        scoring=scoring,
        # vLLM's plain top-k router doesn't apply the factor; the others do.
        scale=asked.get("routed_scaling_factor", 1.0) if grouped else 1.0,
        plain=plain and function is None,
    )
