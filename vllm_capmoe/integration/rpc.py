"""What a worker answers by `collective_rpc`, which vLLM runs on every worker between two steps.

Methods of a worker:

    moe_capacity_counters()     the counters of every layer
    moe_capacity_totals()       their sums
    moe_capacity_record()       start or stop keeping every step's routing
    moe_capacity_records()      what was kept
    moe_capacity_try()          try settings on every step
    moe_capacity_tried()        what they would do
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration.layers import moe_layers
from vllm_capmoe.integration.stats import read, totals
from vllm_capmoe.integration.trials import LayerTrials
from vllm_capmoe.layer_settings import layer_number
from vllm_capmoe.plan import resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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
    if on:
        refuse_graphs("moe_capacity_record keeps every step", vllm_config)
    for layer in moe_layers(vllm_config):
        stats = layer.router.stats
        stats.recording, stats.recording_rows = on, rows
        stats.records.clear()


def moe_capacity_records(vllm_config: "VllmConfig") -> list[dict[str, Any]]:
    """What was kept since recording began: one dict per layer and step, layer by layer."""
    return [record for layer in moe_layers(vllm_config) for record in layer.router.stats.records]


def has_graphs(vllm_config: "VllmConfig") -> bool:
    """Whether steps are replayed from CUDA graphs."""
    return vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)


def refuse_graphs(what: str, vllm_config: "VllmConfig") -> None:
    """Refuse what Python must do in every step."""
    if has_graphs(vllm_config):
        mode = vllm_config.compilation_config.cudagraph_mode
        raise ValueError(
            f"{what}, but steps are replayed from the CUDA graphs of cudagraph_mode {mode.name}: "
            "--enforce-eager is accepted."
        )


def moe_capacity_try(
    vllm_config: "VllmConfig",
    trials: dict[str, dict[str, Any]],
    ep_size: int,
    requests: Sequence[int] = (),
) -> None:
    """Try settings on every step from here on; none of them: stop, and forget what was counted.

    trials: by name, what `CapacityConfig.from_dict` takes. ep_size: the ranks over which the
    experts of a layer are spread in blocks, for what is counted by rank. requests: as for
    `LayerTrials`.

    Raises:
        ValueError: ep_size doesn't divide the experts of a layer, or steps are replayed from CUDA
            graphs, in which nothing reaches the host.
    """
    if trials:
        refuse_graphs("trials need every step", vllm_config)
    for layer in moe_layers(vllm_config):
        router = layer.router
        experts = router.num_logical_experts
        if experts % ep_size:
            raise ValueError(
                f"--ep-size is {ep_size}, but it must divide the {experts} experts of layer "
                f"{layer.layer_name}."
            )
        ranks = [expert // (experts // ep_size) for expert in range(experts)]
        plans = {
            name: resolve(
                CapacityConfig.from_dict(config),
                num_experts=experts,
                top_k=router.top_k,
                expert_device=ranks,
                renormalize=router.renormalize,
            )
            for name, config in trials.items()
        }
        device = router.stats.counts.device
        rank_E = torch.tensor(ranks, device=device)
        router.trials = LayerTrials(plans, rank_E, requests) if plans else None


def moe_capacity_tried(vllm_config: "VllmConfig") -> list[dict[str, Any]]:
    """What the trials have counted, layer by layer, as plain numbers.

    The keys of a layer are the fields of `vllm_capmoe.planner.counts.Layer`.
    """
    found = []
    for layer in moe_layers(vllm_config):
        trials: LayerTrials = layer.router.trials
        counts = {
            kind: {name: dict(sums) for name, sums in by_trial.items()}
            for kind, by_trial in trials.counts.items()
        }
        found.append(
            {
                "number": layer_number(layer.layer_name),
                "experts": layer.router.num_logical_experts,
                "top_k": layer.router.top_k,
                "loads": trials.loads,
                **counts,
            }
        )
    return found


METHODS = (
    moe_capacity_counters,
    moe_capacity_totals,
    moe_capacity_record,
    moe_capacity_records,
    moe_capacity_try,
    moe_capacity_tried,
)
"""What a worker gets as methods, without the first argument."""
