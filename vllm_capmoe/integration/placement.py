"""Where the experts of a layer live, and whose tokens its router sees."""

from dataclasses import dataclass

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration import layer_checks
from vllm_capmoe.integration.step import Shard


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
        else:
            layer_checks.check_owner(config, layer, sharing)
            own_device = None
    return Placement(expert_device, own_device, shard, parallel.ep_size, first_local)
