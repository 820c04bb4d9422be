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


@dataclass(frozen=True)
class Function:
    """A routing function of a model, of which more is known than what it returns.

    scoring: a key of `SCORING`: the numbers that it returns as weights, before it renormalises
        them if it is asked to.
    expert_scale: where the function is a method, the attribute of its object that holds factors
        [E], by which it multiplies the weights of each expert at last.
    """

    scoring: str
    expert_scale: str = ""


_MODELS = "vllm.model_executor.models"
FUNCTIONS = {
    f"{_MODELS}.cohere2_moe.token_choice_with_bias": Function("sigmoid"),
    f"{_MODELS}.gemma4.Gemma4Router.routing_function": Function("softmax", "per_expert_scale"),
    f"{_MODELS}.interns1_pro.InternS1ProMoeSparseMoeBlock._custom_routing_function": Function(
        "softmax"
    ),
    # It weighs the input of its one expert; layer_checks.check_weights has what follows from that.
    f"{_MODELS}.llama4.Llama4MoE.custom_routing_function": Function("sigmoid"),
}
"""Routing functions of models that choose by themselves, by module and name as vLLM has them."""

UNSERVED_FUNCTIONS = {
    f"{_MODELS}.phimoe.phimoe_routing_function": "it weighs its second expert by what the first "
    "leaves, so that an expert has no score of its own",
}
"""Those that were looked at, and why they are refused."""

# Arguments of create_fused_moe_router under which a row holds more than routed experts, and what.
_UNSERVED = {
    "zero_expert_type": "experts that compute nothing stand in the top-k beside the others",
    "num_fused_shared_experts": "shared experts stand in the rows of the routed ones",
}
# Arguments by which vLLM's router chooses otherwise than by the highest scores, and applies the
# routed scaling factor: groups, biases (of text and of images), a table by token ids.
_CHOOSING = ("e_score_correction_bias", "hash_indices_table", "bias_vl")


@dataclass(frozen=True)
class Family:
    """How the router of a layer scores and chooses.

    scoring: a key of `SCORING`. scale: the factor that it multiplies its weights with. plain:
    whether it chooses the experts of the highest scores, without more ado. expert_scale: what
    returns the factors of the experts' weights, float [E], as they are then; None without any.
    """

    scoring: str
    scale: float
    plain: bool
    expert_scale: Callable[[], Tensor] | None = None


def family_of(config: CapacityConfig, inner: Any, asked: Mapping[str, Any]) -> Family:
    """What is known of `inner`, the router that vLLM made of the arguments `asked`.

    Raises:
        ValueError: it isn't served.
    """
    routing = asked.get("custom_routing_function")
    name = "" if routing is None else f"{routing.__module__}.{getattr(routing, '__qualname__', '')}"
    known = FUNCTIONS.get(name)
    scoring: str = known.scoring if known else asked.get("scoring_func", "softmax")
    reason = _unserved(inner, asked, name, scoring)
    if reason:
        raise ValueError(
            f"{config.asked}, but this model's layers route with {type(inner).__name__} "
            f"({reason}): accepted are top-k routers over softmax, sigmoid or sqrtsoftplus scores, "
            "with or without groups, biases or a table of token ids."
        )
    chooses = asked.get("use_grouped_topk") or any(asked.get(x) is not None for x in _CHOOSING)
    plain = type(inner) is FusedTopKRouter or (type(inner) is CPURouter and not chooses)
    return Family(
        scoring=scoring,
        # vLLM's plain top-k router doesn't apply the factor; the others do.
        scale=asked.get("routed_scaling_factor", 1.0) if chooses else 1.0,
        plain=plain and routing is None,
        expert_scale=_expert_scale(routing, known) if known and known.expert_scale else None,
    )


def _unserved(inner: Any, asked: Mapping[str, Any], function: str, scoring: str) -> str:
    """Why a router isn't served, empty if it is. function: its own, by name."""
    if function and function not in FUNCTIONS:
        return UNSERVED_FUNCTIONS.get(function, "custom routing function")
    for argument, why in _UNSERVED.items():
        if asked.get(argument) not in (None, 0):
            return f"{argument.replace('_', ' ')}: {why}"
    if scoring not in SCORING or not isinstance(inner, BaseRouter):
        return f"scores by {scoring}"
    return ""


def _expert_scale(routing: Any, known: Function) -> Callable[[], Tensor]:
    """Looked up with every call: a model's parameters may be replaced."""
    return lambda: getattr(routing.__self__, known.expert_scale)
