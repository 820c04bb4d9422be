"""Routers of layers under a capacity mode, made as a model makes them, on tensors of the CPU."""

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.models.cohere2_moe import token_choice_with_bias
from vllm.model_executor.models.gemma4 import Gemma4Router
from vllm.model_executor.models.llama4 import Llama4MoE

from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration import router as router_module
from vllm_capmoe.integration.router import CapacityRouter
from vllm_capmoe.integration.stats import LayerStats
from vllm_capmoe.integration.step import StepTokens
from vllm_capmoe.plan import resolve

T, E, K = 37, 16, 4
BIAS = torch.linspace(-0.2, 0.2, E)

# What a model asks for, as arguments of vLLM's router factory.
MODELS: dict[str, dict[str, Any]] = {
    "mixtral: softmax, renormalised": {"renormalize": True},
    "olmoe: softmax as it is": {"renormalize": False},
    "deepseek-v2: softmax in groups, scaled": {
        "renormalize": False,
        "use_grouped_topk": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
    "deepseek-v3: sigmoid in groups, biased, renormalised, scaled": {
        "renormalize": True,
        "use_grouped_topk": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "e_score_correction_bias": BIAS,
    },
    "cohere2: sigmoid by a function, renormalised": {
        "renormalize": True,
        "custom_routing_function": token_choice_with_bias,
    },
    "llama4: sigmoid by a function": {
        "renormalize": False,
        "custom_routing_function": Llama4MoE.custom_routing_function,
    },
    "gemma4: softmax by a function, renormalised, each expert scaled": {
        "renormalize": True,
        "custom_routing_function": MethodType(
            Gemma4Router.routing_function, SimpleNamespace(per_expert_scale=1.0 + BIAS)
        ),
    },
}

MIXTRAL = MODELS["mixtral: softmax, renormalised"]


def prompt_of_one_request() -> StepTokens:
    """A step of T prompt tokens."""
    here = StepTokens.allocate(T, 8, torch.device("cpu"))
    here.fill(torch.zeros(T, dtype=torch.int64), torch.arange(T), torch.tensor([T]))
    return here


def forward_context() -> ForwardContext:
    """Of a step without padding."""
    return ForwardContext(
        no_compile_layers={},
        attn_metadata={},
        slot_mapping={},
        is_padding=torch.zeros(T, dtype=torch.bool),
    )


def make(
    asked: dict[str, Any],
    tokens: StepTokens,
    backend: str = "torch",
    phantom: int | None = None,
    size: tuple[int, int] = (E, K),
    **settings: Any,
) -> CapacityRouter:
    """Through the wrapped factory, as a layer of a model gets its router. size: E and k."""
    experts, top_k = size

    def original(**kwargs: Any) -> CPURouter:
        names = ("eplb_state", "num_logical_experts")
        return CPURouter(**{k: v for k, v in kwargs.items() if k not in names})

    config = CapacityConfig(**settings)

    class VllmConfig:
        additional_config = {"moe_capacity": config.to_dict()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.get_current_vllm_config", lambda: VllmConfig)
        made = router_module._make_router(original)(
            top_k=top_k, global_num_experts=experts, num_logical_experts=experts, **asked
        )
    assert isinstance(made, CapacityRouter)
    plan = resolve(config, num_experts=experts, top_k=top_k, renormalize=made.renormalize)
    made.bind(
        "layer",
        plan,
        LayerStats.allocate("layer", experts, torch.device("cpu")),
        tokens,
        seed=0,
        expert_device_E=None,
        own_device=None,
        backend=backend,
        phantom=phantom,
    )
    return made
