"""The MoE layers of a loaded model: bound to the configuration once, read for counters later."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration import kernels, phantom
from vllm_capmoe.integration.experts import TorchExperts, TritonExperts
from vllm_capmoe.integration.router import CapacityRouter
from vllm_capmoe.integration.stats import LayerStats, read, totals
from vllm_capmoe.integration.step import Shard, StepTokens
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
        mode = f"{own.asked}, but layer"
        router, routed = layer.router, layer.routed_experts
        kernels.check_layer(config, layer)
        if layer.do_naive_dispatch_combine:
            raise ValueError(
                f"{mode} {layer.layer_name} gathers the rows of all ranks before they are routed "
                f"({type(routed.quant_method).__name__}): accepted are kernels that vLLM hands "
                "routed rows to."
            )
        if getattr(routed, "expert_substitution", None) is not None:
            raise ValueError(
                f"{mode} {layer.layer_name} has experts that were replaced by constants (MoNE): "
                "accepted are models with all their experts."
            )
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
        applied = not config.observe
        weighs_input = applied and routed.apply_router_weight_on_input
        if weighs_input and (plan.width > 1 or backend == "vllm"):
            raise ValueError(
                f"{mode} {layer.layer_name} weighs the "
                f"experts' input, and {plan.width} experts per token by backend {backend!r} can't: "
                "one expert per token (--moe-capacity-max-experts 1) and another backend than "
                "'vllm' are accepted."
            )
        phantom_expert = None
        if backend == "vllm" and applied and plan.mode != "off":  # else nothing is dropped
            phantom_expert = phantom.install(layer, device)
            if phantom_expert is None and plan.width > plan.top_k:
                raise ValueError(
                    f"--moe-capacity-mode is 'expanded' with {plan.width} experts per token, but "
                    f"{kernel_name(layer)} isn't known to skip unused ones and would compute them "
                    f"all: --moe-capacity-max-experts {plan.top_k} is accepted."
                )
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
    mine = {id(module) for module in model.modules()}
    drafts = set() if draft is None else {id(module) for module in draft.modules()}
    for name, module in model.named_modules():
        if "megamoe" in type(module).__name__.lower():
            raise ValueError(
                f"{config.asked}, but {name} is a {type(module).__name__}, "
                "which routes by itself: another --moe-backend is accepted."
            )
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if not isinstance(layer, MoERunner):
            continue
        if id(layer) in mine:
            yield layer
        elif id(layer) not in drafts:
            raise ValueError(
                f"{config.asked}, but layer {layer.layer_name} belongs "
                "neither to the model nor to its draft: accepted are models whose layers are "
                "modules of theirs."
            )
        elif isinstance(layer.router, CapacityRouter):
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


@dataclass(frozen=True)
class Placement:
    """Where the experts of a layer live, and whose tokens its router sees.

    expert_device: the device of every logical expert, all 0 on one rank.
    own_device: the device that owns the tokens which this router sees, None where none does.
    shard: the part of the batch that this router sees.
    ranks: expert parallel ranks.
    first_local: the first expert of this rank, if its experts are consecutive and stay here.
    """

    expert_device: list[int]
    own_device: int | None = None
    shard: Shard = Shard()
    ranks: int = 1
    first_local: int | None = 0


def placement(config: CapacityConfig, layer: MoERunner, num_experts: int) -> Placement:
    """The `Placement` of a layer, from how vLLM has parallelised it.

    A device is an expert parallel rank. Who owns a token depends on the attention:

        tensor parallel      nobody: all ranks hold all tokens and decide alike
        data parallel        the rank, which routes its own tokens before dispatch
        both, sequence       the rank: each tensor parallel rank routes its part of the tokens
          parallel experts
        both                 all tensor parallel ranks of the engine together: an engine counts as
                             one device then, and all its ranks decide alike

    Under EPLB experts move between ranks, so no expert is local to anyone.

    Raises:
        ValueError: level `device` with local candidates, where a device is an engine for one and
            a rank for the other.
    """
    parallel = layer.moe_config.moe_parallel_config
    shard = Shard()
    if parallel.is_sequence_parallel:
        shard = Shard(get_tensor_model_parallel_rank(), parallel.sp_size, parallel.dp_rank)
    if not parallel.use_ep:
        return Placement([0] * num_experts, shard=shard)
    strategy = layer.expert_map_manager.placement_strategy
    expert_device = [0] * num_experts
    for rank in range(parallel.ep_size):
        _, expert_map, _ = determine_expert_map(parallel.ep_size, rank, num_experts, strategy)
        if expert_map is not None:
            for expert in (expert_map >= 0).nonzero().flatten().tolist():
                expert_device[expert] = rank
    here = [expert for expert, rank in enumerate(expert_device) if rank == parallel.ep_rank]
    consecutive = here == list(range(here[0], here[0] + len(here))) if here else False
    first_local = here[0] if consecutive and not parallel.enable_eplb else None
    own_device = parallel.ep_rank if parallel.dp_size > 1 and not parallel.enable_eplb else None
    sharing = parallel.ep_size // parallel.dp_size  # ranks of an engine
    if own_device is not None and sharing > 1 and not parallel.is_sequence_parallel:
        if config.level == "expert":
            expert_device = [rank // sharing for rank in expert_device]
            own_device //= sharing
        elif config.candidates == "local":
            raise ValueError(
                "--moe-capacity-candidates is 'local' with --moe-capacity-level 'device', but "
                f"{sharing} tensor parallel ranks hold each token of layer {layer.layer_name} "
                "together: 'auto' or 'global', or level 'expert', is accepted."
            )
        else:
            own_device = None
    return Placement(expert_device, own_device, shard, parallel.ep_size, first_local)


def layer_number(layer_name: str) -> int:
    """The number of the decoder layer that an MoE layer belongs to, by the name vLLM gives it.

    `model.layers.17.mlp.experts` is 17; -1 for a name without a number.
    """
    found = re.search(r"\blayers?\.(\d+)\b", layer_name) or re.search(r"\.(\d+)\b", layer_name)
    return int(found[1]) if found else -1


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


def kernel_name(layer: MoERunner) -> str:
    """The class by which vLLM computes the layer's experts."""
    method = layer.routed_experts.quant_method
    return type(method if method.moe_kernel is None else method.moe_kernel.fused_experts).__name__


def log_dropped(layer: MoERunner, *, skipped: bool) -> None:
    """Say what vLLM's own kernel does with dropped assignments, once for each kernel."""
    kernel = kernel_name(layer)
    if skipped:
        logger.info_once("MoE capacity: %s skips dropped assignments.", kernel, scope="local")
    else:
        logger.warning_once(
            "MoE capacity: %s isn't known to skip dropped assignments: they are computed with "
            "weight zero, so outputs follow the capacity and no time is saved.",
            kernel,
            scope="local",
        )


def _read(layers: list[MoERunner]) -> list[dict[str, Any]]:
    """Their counters. Nothing is changed here: with Ray's compiled DAG a step may run meanwhile."""
    started = not any(layer.router.tokens.before_first_step for layer in layers)
    return read([layer.router.stats for layer in layers], started)


def moe_capacity_counters(vllm_config: "VllmConfig") -> list[dict[str, Any]]:
    """The counters of every layer of this worker since it started, see `LayerStats.counters`."""
    return _read(moe_layers(vllm_config))


def moe_capacity_totals(vllm_config: "VllmConfig") -> dict[str, float]:
    """What this worker adds to the counters of its engine, see `stats.totals`.

    Tensor parallel ranks that route the same tokens count the same: the first of them answers.
    """
    rank = get_tensor_model_parallel_rank()
    layers = [layer for layer in moe_layers(vllm_config) if layer.router.stats.part == rank]
    return totals(_read(layers))


def moe_capacity_record(vllm_config: "VllmConfig", on: bool, rows: bool = True) -> None:
    """Start or stop keeping the routing of every step; each change forgets what was kept.

    rows: keep what belongs to single tokens too, not only loads, capacity and digest.

    Raises:
        ValueError: steps are replayed from CUDA graphs, in which nothing reaches the host.
    """
    graphs = vllm_config.compilation_config.cudagraph_mode
    if on and graphs not in (None, CUDAGraphMode.NONE):
        raise ValueError(
            "moe_capacity_record keeps every step, but the CUDA graphs of cudagraph_mode "
            f"{graphs.name} hide them: --enforce-eager is accepted."
        )
    for layer in moe_layers(vllm_config):
        stats = layer.router.stats
        stats.recording, stats.recording_rows = on, rows
        stats.records.clear()


def moe_capacity_records(vllm_config: "VllmConfig") -> list[dict[str, Any]]:
    """What was kept since recording began: one dict per layer and step, layer by layer."""
    return [record for layer in moe_layers(vllm_config) for record in layer.router.stats.records]
