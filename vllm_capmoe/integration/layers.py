"""The MoE layers of a loaded model: bound to the configuration once, read for counters later."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration import checks
from vllm_capmoe.integration.router import CapacityRouter
from vllm_capmoe.integration.stats import LayerStats
from vllm_capmoe.plan import Plan, resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.capmoe")


def moe_layers(vllm_config: "VllmConfig") -> list[MoERunner]:
    """The MoE layers of this process, in the order in which the model made them."""
    found = vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in found if isinstance(layer, MoERunner)]


def bind(config: CapacityConfig, vllm_config: "VllmConfig", device: torch.device) -> None:
    """Resolve the configuration for every MoE layer, and log the start-up line.

    Raises:
        ValueError: a layer routes by itself, or the configuration doesn't fit it.
    """
    backend = checks.resolve_backend(config, vllm_config)
    layers = moe_layers(vllm_config)
    for index, layer in enumerate(layers):
        router = layer.router
        if not isinstance(router, CapacityRouter) or layer.is_monolithic:
            method = type(layer.routed_experts.quant_method).__name__
            raise ValueError(
                f"--moe-capacity-mode is {config.mode!r}, but layer {layer.layer_name} routes by "
                f"itself ({type(router).__name__}, {method}): accepted are layers with vLLM's own "
                "top-k routers and modular kernels."
            )
        expert_device, own_device = placement(layer, router.num_logical_experts)
        if expert_device is None and config.level == "device":
            expert_device = [0] * router.num_logical_experts
        plan = resolve(
            config,
            num_experts=router.num_logical_experts,
            top_k=router.top_k,
            expert_device=expert_device,
            has_token_device=own_device is not None,
            renormalize=router.renormalize,
        )
        router.bind(
            layer.layer_name,
            plan,
            LayerStats.allocate(layer.layer_name, plan.num_experts, device),
            seed=layer_seed(vllm_config.model_config.seed, layer.layer_id),
            expert_device_E=None
            if expert_device is None
            else torch.tensor(expert_device).to(device),
            own_device=own_device,
            fill_dropped=backend == "vllm",
        )
        if index == 0:
            log_start(config, plan, backend, len(layers), len(set(expert_device or [0])))
    if not layers:
        raise ValueError(
            f"--moe-capacity-mode is {config.mode!r}, but no layer of "
            f"{vllm_config.model_config.model} is a vLLM MoE layer: 'off' is accepted."
        )


def placement(layer: MoERunner, num_experts: int) -> tuple[list[int] | None, int | None]:
    """Where experts and tokens live.

    Returns:
        The EP rank of every logical expert, or None without expert parallelism; and the EP rank
        that owns the tokens which this process routes, or None where all ranks route all tokens.
    """
    parallel = layer.moe_config.moe_parallel_config
    if not parallel.use_ep:
        return None, None
    strategy = layer.expert_map_manager.placement_strategy
    expert_device = [0] * num_experts
    for rank in range(parallel.ep_size):
        _, expert_map, _ = determine_expert_map(parallel.ep_size, rank, num_experts, strategy)
        if expert_map is not None:
            for expert in (expert_map >= 0).nonzero().flatten().tolist():
                expert_device[expert] = rank
    return expert_device, parallel.ep_rank if parallel.dp_size > 1 else None


def layer_seed(seed: int | None, layer_id: int) -> int:
    """A seed for the metric `random` that differs by layer and is the same on every rank."""
    return (seed or 0) * 1_000_003 + layer_id


def log_start(
    config: CapacityConfig, plan: Plan, backend: str, num_layers: int, num_ranks: int
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
        f"backend={chosen(config.backend, backend)}",
        f"renormalize={chosen(config.renormalize, 'yes' if plan.renormalize else 'no')}",
    ]
    if plan.mode == "expanded":
        limit = "none" if plan.max_experts is None else plan.max_experts
        parts += [
            f"candidates={chosen(config.candidates, 'local' if plan.local else 'global')}",
            f"expanded_experts={chosen(config.expanded_experts, plan.extra)}",
            f"max_experts={chosen(config.max_experts, limit)}",
        ]
    logger.info_once("MoE capacity: %s", ", ".join(parts), scope="local")
    if num_ranks == 1:
        logger.warning_once(
            "MoE capacity is on without expert parallelism: the straggler effect that it removes "
            "needs several ranks (--enable-expert-parallel). Here it only bounds the work.",
            scope="local",
        )
    if backend == "vllm":
        logger.warning_once(
            "MoE capacity: vLLM's CPU kernels know no dropped assignments; they are computed with "
            "weight zero, so outputs follow the capacity and no time is saved.",
            scope="local",
        )


def moe_capacity_counters(vllm_config: "VllmConfig") -> list[dict[str, Any]]:
    """The counters of every layer of this worker since it started, see `LayerStats.counters`."""
    return [layer.router.stats.counters() for layer in moe_layers(vllm_config)]


def moe_capacity_record(vllm_config: "VllmConfig", on: bool) -> None:
    """Start or stop keeping the routing of every step; each change forgets what was kept."""
    for layer in moe_layers(vllm_config):
        layer.router.stats.recording = on
        layer.router.stats.records.clear()


def moe_capacity_records(vllm_config: "VllmConfig") -> list[dict[str, Any]]:
    """What was kept since recording began: one dict per layer and step, layer by layer."""
    return [record for layer in moe_layers(vllm_config) for record in layer.router.stats.records]
