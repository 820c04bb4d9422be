"""What only a layer shows is refused here, in the workers: the rest stands in checks.py.

Every message is one sentence that names the flag, what came, and what is accepted. A layer is an
`MoERunner` of vLLM throughout.
"""

from typing import Any

import vllm.model_executor.layers.fused_moe.modular_kernel as mk

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.kernels import Dropped, dropped_by, kernel_name
from vllm_capmoe.integration.router import CapacityRouter
from vllm_capmoe.integration.settings import current_config
from vllm_capmoe.plan import Plan


def patches() -> list[Patch]:
    """What refuses layers before weights are loaded.

    vllm...runner.moe_runner.MoERunner.__init__: a layer is complete but for its weights.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return [Patch(MoERunner, "__init__", _check_first, ("layer_name", "router", "routed_experts"))]


def _check_first(original: Function) -> Function:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = current_config()
        if config.enabled:
            check_layer(config, self)

    return __init__


def check_layer(config: CapacityConfig, layer: Any) -> None:
    """Refuse a layer that bypasses our router, or whose kernel can't serve.

    Raises:
        ValueError: with one sentence that names the layer, its router and its kernel.
    """
    method = layer.routed_experts.quant_method
    kernel = getattr(method, "experts_cls", None)  # some methods know it once weights are there
    dropped = None if kernel is None else dropped_by(kernel)
    refused = dropped is Dropped.REFUSED or (dropped is Dropped.REFUSED_IN_MODE and config.drops)
    by_itself = method.moe_kernel is not None and layer.is_monolithic
    if isinstance(layer.router, CapacityRouter) and not refused and not by_itself:
        return
    names = [type(part).__name__ for part in (layer.router, method)]
    names += [] if kernel is None else [kernel.__name__]
    raise ValueError(
        f"{config.asked}, but layer {layer.layer_name} routes by itself, "
        f"or needs what no mode serves ({', '.join(names)}): accepted are layers with vLLM's own "
        "top-k routers and modular kernels, which --moe-backend may choose."
    )


def check_backend(config: CapacityConfig, moe_config: Any, experts: Any) -> None:
    """Refuse a layer that our experts can't compute.

    moe_config: its `FusedMoEConfig`. experts: the class of ours that was asked for.
    """
    supported, reason = experts.is_supported_config(
        experts, moe_config, None, None, mk.FusedMoEActivationFormat.Standard
    )
    if not supported:
        raise ValueError(
            f"--moe-capacity-backend is {config.backend!r}, but {reason}: 'vllm' is accepted "
            "where vLLM has a kernel for it."
        )


def check_model(config: CapacityConfig, model: Any) -> None:
    """Refuse experts that are no layers of vLLM's, and so nothing that we could bind."""
    for name, module in model.named_modules():
        if "megamoe" in type(module).__name__.lower():
            raise ValueError(
                f"{config.asked}, but {name} is a {type(module).__name__}, "
                "which routes by itself: another --moe-backend is accepted."
            )


def check_draft(config: CapacityConfig, layer: Any, drafts: set[int]) -> None:
    """Refuse a layer that isn't the model's, unless it is its draft's.

    drafts: the ids of the draft model's modules.
    """
    if id(layer) not in drafts:
        raise ValueError(
            f"{config.asked}, but layer {layer.layer_name} belongs "
            "neither to the model nor to its draft: accepted are models whose layers are "
            "modules of theirs."
        )


def check_loaded(config: CapacityConfig, layer: Any) -> None:
    """Refuse a loaded layer that gets other rows than we route, or has not all its experts."""
    mode = f"{config.asked}, but layer {layer.layer_name}"
    if layer.do_naive_dispatch_combine:
        raise ValueError(
            f"{mode} gathers the rows of all ranks before they are routed "
            f"({type(layer.routed_experts.quant_method).__name__}): accepted are kernels that vLLM "
            "hands routed rows to."
        )
    if getattr(layer.routed_experts, "expert_substitution", None) is not None:
        raise ValueError(
            f"{mode} has experts that were replaced by constants (MoNE): accepted are models with "
            "all their experts."
        )


def check_owner(config: CapacityConfig, layer: Any, sharing: int) -> None:
    """Refuse candidates of a token's own device where as many ranks hold the token together."""
    if config.candidates == "local":
        raise ValueError(
            "--moe-capacity-candidates is 'local' with --moe-capacity-level 'device', but "
            f"{sharing} tensor parallel ranks hold each token of layer {layer.layer_name} "
            "together: 'auto' or 'global', or level 'expert', is accepted."
        )


def check_weights(config: CapacityConfig, layer: Any, plan: Plan, backend: str) -> None:
    """Refuse to weigh the experts' input, which is one row for all experts of a token."""
    weighs_input = layer.routed_experts.apply_router_weight_on_input
    if weighs_input and (plan.width > 1 or backend == "vllm"):
        raise ValueError(
            f"{config.asked}, but layer {layer.layer_name} weighs the "
            f"experts' input, and {plan.width} experts per token by backend {backend!r} can't: "
            "one expert per token (--moe-capacity-max-experts 1) and another backend than "
            "'vllm' are accepted."
        )


def check_width(layer: Any, plan: Plan, *, skipped: bool) -> None:
    """Refuse wider rows than the top-k where unused places are not `skipped`."""
    if not skipped and plan.width > plan.top_k:
        raise ValueError(
            f"--moe-capacity-mode is 'expanded' with {plan.width} experts per token, but "
            f"{kernel_name(layer)} isn't known to skip unused ones and would compute them "
            f"all: --moe-capacity-max-experts {plan.top_k} is accepted."
        )
