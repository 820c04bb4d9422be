"""The MoE layers of a loaded model: bound to the configuration once, and found again later."""

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration import kernels, layer_checks, phantom
from vllm_capmoe.integration.experts import TorchExperts, TritonExperts
from vllm_capmoe.integration.placement import placement
from vllm_capmoe.integration.router import CapacityRouter
from vllm_capmoe.integration.stats import LayerStats
from vllm_capmoe.integration.step import StepTokens
from vllm_capmoe.layer_settings import layer_number
from vllm_capmoe.plan import Plan, resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.capmoe")


def moe_layers(vllm_config: "VllmConfig") -> list[MoERunner]:
    """The MoE layers of this process that are bound, in the order in which the model made them."""
    found = vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in found if isinstance(layer, MoERunner) and _is_bound(layer.router)]


def num_asked(config: CapacityConfig, vllm_config: "VllmConfig") -> int:
    """How many bound MoE layers of this process the settings ask anything of."""
    numbers = [layer_number(layer.layer_name) for layer in moe_layers(vllm_config)]
    return sum(config.for_layer(number).acts for number in numbers)


def _is_bound(router: Any) -> bool:
    return isinstance(router, CapacityRouter) and router.plan is not None


def bind(
    config: CapacityConfig, vllm_config: "VllmConfig", model_runner: Any, tokens: StepTokens
) -> None:
    """Resolve the configuration for every MoE layer of the model, and log the start-up line.

    The layers of a draft model are told apart: nothing is dropped in them, nothing counted. A
    worker without any MoE layer (a stage of a pipeline) binds nothing.

    model_runner: vLLM's, with its model loaded. tokens: what the routers will read of every step.

    Raises:
        ValueError: a layer routes by itself, or the configuration doesn't fit it.
    """
    device = torch.device(model_runner.device)
    bound: list[tuple[Plan, str, int]] = []
    for layer in layers_of_model(config, vllm_config, model_runner):
        own = config.for_layer(layer_number(layer.layer_name))
        router = layer.router
        layer_checks.check_layer(config, layer)
        layer_checks.check_loaded(own, layer)
        placed = placement(own, layer, router.num_logical_experts)
        plan = resolve(
            own,
            num_experts=router.num_logical_experts,
            top_k=router.top_k,
            expert_device=placed.expert_device,
            has_token_device=placed.own_device is not None,
            renormalize=router.renormalize,
        )
        backend = backend_of(layer)
        if not config.observe:
            layer_checks.check_weights(own, layer, plan, backend)
        phantom_expert = None
        if backend == "vllm" and not config.observe and plan.mode != "off":  # else none is dropped
            phantom_expert = phantom.install(layer, device)
            layer_checks.check_width(layer, plan, skipped=phantom_expert is not None)
            log_dropped(layer, skipped=phantom_expert is not None)
        stats = LayerStats.allocate(layer.layer_name, plan.num_experts, device, placed.shard.index)
        tokens.before_first_step.append(stats.reset)
        router.bind(
            layer.layer_name,
            plan,
            stats,
            tokens,
            seed=layer_seed(vllm_config.model_config.seed, layer.layer_name),
            expert_device_E=torch.tensor(placed.expert_device, device=device),
            own_device=placed.own_device,
            backend=backend,
            observes=config.observe,
            phantom=phantom_expert,
            shard=placed.shard,
            first_local=placed.first_local if keeps_rows(layer) else None,
        )
        bound.append((plan, backend, placed.ranks))
    if bound:
        shown = next((made for made in bound if made[0].acts), bound[0])
        log_start(config, *shown, len(bound))


def layers_of_model(
    config: CapacityConfig, vllm_config: "VllmConfig", model_runner: Any
) -> Iterator[MoERunner]:
    """The MoE layers of the model itself; its draft's are bound as a draft's on the way.

    Raises:
        ValueError: a layer is neither's, or the model has experts that are no `MoERunner`.
    """
    model, draft = model_runner.get_model(), model_runner.get_draft_model()
    layer_checks.check_model(config, model)
    mine = {id(module) for module in model.modules()}
    drafts = set() if draft is None else {id(module) for module in draft.modules()}
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if not isinstance(layer, MoERunner):
            continue
        if id(layer) in mine:
            yield layer
            continue
        layer_checks.check_draft(config, layer, drafts)
        if isinstance(layer.router, CapacityRouter):
            layer.router.bind_draft()


def backend_of(layer: MoERunner) -> str:
    """Who computes the layer's experts, by what vLLM installed: "triton", "torch" or "vllm"."""
    kernel = layer.routed_experts.quant_method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    if isinstance(experts, TritonExperts):
        return "triton"
    return "torch" if isinstance(experts, TorchExperts) else "vllm"


def keeps_rows(layer: MoERunner) -> bool:
    """Whether the layer's experts get the very rows that its router routed, in their order."""
    kernel = layer.routed_experts.quant_method.moe_kernel
    return kernel is not None and isinstance(
        kernel.prepare_finalize, MoEPrepareAndFinalizeNoDPEPModular
    )


def layer_seed(seed: int | None, layer_name: str) -> int:
    """A seed for the metric `random` that differs by layer and is the same on every rank."""
    return (seed or 0) * 1_000_003 + zlib.crc32(layer_name.encode())


def log_start(
    config: CapacityConfig, plan: Plan, backend: str, num_ranks: int, num_layers: int
) -> None:
    """Say once what is in effect, and what each `auto` became."""

    def chosen(setting: Any, became: Any) -> str:
        return f"{became} (auto)" if setting in ("auto", None) else f"{became}"

    parts = [
        f"mode={config.mode}",
        f"factor={config.factor}",
        f"level={config.level}",
        f"scope={config.scope}",
        f"metric={config.metric}",
        f"min_capacity={config.min_capacity}",
        f"layers={num_layers}",
        f"ranks={num_ranks}",
        f"backend={chosen(config.backend, backend)}",
        f"renormalize={chosen(config.renormalize, 'yes' if plan.renormalize else 'no')}",
    ]
    if plan.mode in ("expanded", "reroute"):
        parts.append(f"candidates={chosen(config.candidates, 'local' if plan.local else 'global')}")
    if plan.mode == "expanded":
        limit = "none" if plan.max_experts is None else plan.max_experts
        parts += [
            f"expanded_experts={chosen(config.expanded_experts, plan.extra)}",
            f"fill={chosen(config.fill, 'busiest' if plan.busiest else 'capacity')}",
            f"max_experts={chosen(config.max_experts, limit)}",
        ]
    if config.decode_keep != "off":
        parts.append(f"decode_keep={config.decode_keep}")
    if config.layers:
        parts.append(f"own_settings={{{', '.join(entry.name for entry in config.layers)}}}")
    logger.info_once("MoE capacity: %s", ", ".join(parts), scope="local")
    if config.observe:
        logger.info_once(
            "MoE capacity only observes: all is decided and counted, and nothing is applied.",
            scope="local",
        )
        return
    if num_ranks == 1 and config.drops:
        logger.warning_once(
            "MoE capacity is on without expert parallelism: the straggler effect that it removes "
            "needs several ranks (--enable-expert-parallel). Here it only bounds the work.",
            scope="local",
        )


def log_dropped(layer: MoERunner, *, skipped: bool) -> None:
    """Say what vLLM's own kernel does with dropped assignments, once for each kernel."""
    kernel = kernels.kernel_name(layer)
    if skipped:
        logger.info_once("MoE capacity: %s skips dropped assignments.", kernel, scope="local")
    else:
        logger.warning_once(
            "MoE capacity: %s isn't known to skip dropped assignments: they are computed with "
            "weight zero, so outputs follow the capacity and no time is saved.",
            kernel,
            scope="local",
        )
