"""What a capacity mode can't serve is refused, in as early a place as can know of it:

    config, settings, engine_args   a setting that can't be read, or came twice
    checks (this file)              what the settings and vLLM's configuration say together: before
                                    an engine is made, and again in each worker; isolation.py is
                                    its part for scope `request`
    families, layer_checks          what only a model's router or a layer shows: in the workers
    compat, proof                   another vLLM, or another plugin in some process
    rpc                             a call that a worker can't answer

Every message is one sentence that names the flag, what came, and what is accepted.
"""

import os
from typing import TYPE_CHECKING, Any

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration import isolation

if TYPE_CHECKING:
    from vllm.config import VllmConfig


PLUGIN = "capmoe"  # the name of our entry point


def check_environment(config: CapacityConfig) -> None:
    """Refuse environment variables that contradict the configuration."""
    import vllm.envs as envs

    if envs.VLLM_PLUGINS is not None and PLUGIN not in envs.VLLM_PLUGINS:
        raise ValueError(
            f"{config.asked}, but VLLM_PLUGINS is "
            f"{','.join(envs.VLLM_PLUGINS)!r}, which keeps this plugin out of vLLM's processes: a "
            f"list that names {PLUGIN!r}, or none, is accepted."
        )
    if envs.VLLM_BATCH_INVARIANT and config.decode_keep != "off" and not config.observe:
        raise ValueError(
            f"--moe-capacity-decode-keep is {config.decode_keep!r}, under which a token's experts "
            "depend on its neighbours, but VLLM_BATCH_INVARIANT=1 asks for the contrary: 'off' is "
            "accepted with it."
        )
    if envs.VLLM_BATCH_INVARIANT and config.scope == "batch" and not config.observe:
        raise ValueError(
            "--moe-capacity-scope is 'batch', where who shares a batch decides what is dropped, "
            "but VLLM_BATCH_INVARIANT=1 asks for the contrary: 'request' is accepted with it, and "
            "--moe-capacity-backend 'vllm'."
        )
    if not envs.VLLM_MOE_SKIP_PADDING:
        raise ValueError(
            f"{config.asked}, but VLLM_MOE_SKIP_PADDING=0 hides which "
            "tokens are padding: 1, vLLM's default, is accepted."
        )


def check_engine(config: CapacityConfig, vllm_config: "VllmConfig") -> None:
    """Refuse what the model or the layout of the engine can't give, in any layer.

    Raises:
        ValueError: with one sentence that says what and why.
    """
    for variant in config.variants:
        if variant.enabled:
            _check_variant(variant, vllm_config)
    model = vllm_config.model_config
    number = model.get_total_num_hidden_layers() if config.layers else 0
    for entry in config.layers:
        if entry.last >= number:
            raise ValueError(
                f"--moe-capacity-layers names the layers {entry.name!r}, but {model.model} has the "
                f"layers 0 to {number - 1}: these are accepted."
            )


def _check_variant(config: CapacityConfig, vllm_config: "VllmConfig") -> None:
    """What `check_engine` asks of settings that are in effect in some layer."""
    import vllm.envs as envs

    mode = f"{config.asked}, but"
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not model.is_moe:
        raise ValueError(
            f"{mode} {model.model} has no Mixture-of-Experts layers: a mode other than 'off' is "
            "accepted for MoE models only."
        )
    top_k = model.get_num_experts_per_tok()
    if isinstance(config.max_experts, int) and top_k and config.max_experts < top_k:
        raise ValueError(
            f"--moe-capacity-max-experts is {config.max_experts}, but {model.model} gives each "
            f"token {top_k} experts: an integer >= {top_k}, 'none' or 'auto' is accepted."
        )
    if top_k:
        config.keeps(top_k)  # refuses more than the model has
    for architecture in model.architectures or ():
        if architecture in UNSERVED_MODELS:
            raise ValueError(
                f"{mode} {architecture} {UNSERVED_MODELS[architecture]}: 'off' is accepted with it."
            )
    for setting, value, accepted in _unserved(vllm_config):
        raise ValueError(f"{mode} {setting} is {value!r}: {accepted} is accepted with it.")
    isolation.check_caches(config, vllm_config)
    if config.priority != "uniform":
        raise ValueError(
            f"--moe-capacity-priority is {config.priority!r}, but the engine doesn't tell the "
            "plugin yet which tokens are images: 'uniform' is accepted."
        )
    owned = parallel.data_parallel_size > 1 and parallel.enable_expert_parallel
    if config.candidates == "local" and not owned:
        raise ValueError(
            "--moe-capacity-candidates is 'local', but no token belongs to one rank here: 'auto' "
            "or 'global' is accepted without both --enable-expert-parallel and "
            "--data-parallel-size above 1."
        )
    if parallel.enable_eplb:
        check_load_balancing(config, vllm_config)
    backend, kernels = resolve_backend(config, vllm_config), vllm_config.kernel_config.moe_backend
    as_vllm = config.observe or (config.mode == "off" and backend == "vllm")  # rows as its own
    if parallel.enable_expert_parallel and parallel.data_parallel_size > 1 and not as_vllm:
        check_all_to_all(config, parallel.all2all_backend, top_k)
    if backend != "vllm" and kernels != "auto":
        raise ValueError(
            f"--moe-backend is {kernels!r}, but --moe-capacity-backend {config.backend!r} has the "
            f"experts computed by {backend!r}: 'auto', or --moe-capacity-backend 'vllm', is "
            "accepted."
        )
    if backend != "vllm" and envs.VLLM_BATCH_INVARIANT:
        raise ValueError(
            f"--moe-capacity-backend is {config.backend!r}, but VLLM_BATCH_INVARIANT=1 needs "
            f"results that don't depend on the size of a step, as those of {backend!r} may: 'vllm' "
            "is accepted with it."
        )


# Models whose layers let us in, but would be routed wrongly.
UNSERVED_MODELS = {
    "Ernie4_5_VLMoeForConditionalGeneration": "routes a step's text and images apart, so that the "
    "limit of neither could be counted",
    "FlintForCausalLM": "computes small steps by kernels that choose experts by themselves",
}


def check_load_balancing(config: CapacityConfig, vllm_config: "VllmConfig") -> None:
    """Refuse what EPLB, which moves experts between ranks and copies some, can't give.

    Capacity is decided on logical experts; vLLM maps them to replicas afterwards.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if config.level == "device":
        raise ValueError(
            "--moe-capacity-level is 'device', but --enable-eplb moves experts between devices "
            "and spreads the load of one over several: 'expert' is accepted with it."
        )
    if config.candidates == "local":
        raise ValueError(
            "--moe-capacity-candidates is 'local', but --enable-eplb moves experts between ranks, "
            "so none is local to a token: 'auto' or 'global' is accepted with it."
        )
    redundant = parallel.eplb_config.num_redundant_experts
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    experts = model.get_num_experts()
    if (experts + redundant) % ranks:
        raise ValueError(
            f"--eplb-config.num_redundant_experts is {redundant}, but {experts} + {redundant} "
            f"experts don't fit {ranks} ranks evenly: a number that makes their sum a multiple of "
            f"{ranks} is accepted, such as {-experts % ranks}."
        )


# What is known of vLLM's all-to-all backends. Dropped assignments have the expert id -1; rows of
# Expanded Drop are wider than the top-k. Only all-gather and reduce-scatter take rows of any width:
# the others size their buffers, or take their handles, with `FusedMoEConfig.experts_per_token`.
# Those of low latency hand out rows in batches of a fixed size per expert, which our kernels don't
# read, and which dropped assignments at weight zero could overflow.
ANY_WIDTH = ("allgather_reducescatter",)
SKIP_DROPPED = (*ANY_WIDTH, "deepep_high_throughput")
BATCHES = ("deepep_low_latency", "nixl_ep")


def check_all_to_all(config: CapacityConfig, backend: str, top_k: int) -> None:
    """Refuse an all-to-all backend whose buffers can't hold what a mode sends through them."""
    accepted = ", ".join(map(repr, SKIP_DROPPED))
    if backend in BATCHES:
        raise ValueError(
            f"{config.asked}, but --all2all-backend {backend!r} hands out "
            f"rows in batches of a fixed size for each expert: {accepted} are accepted."
        )
    if config.mode == "expanded" and config.max_experts != top_k and backend not in ANY_WIDTH:
        raise ValueError(
            f"--moe-capacity-mode is 'expanded', but the buffers of --all2all-backend {backend!r} "
            f"hold the {top_k} experts of a token's top-k and no more: {ANY_WIDTH[0]!r}, or "
            f"--moe-capacity-max-experts {top_k}, is accepted."
        )
    if backend not in SKIP_DROPPED:
        raise ValueError(
            f"{config.asked}, but --all2all-backend {backend!r} isn't "
            f"known to skip dropped assignments: {accepted} are accepted."
        )


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors in this process: slow, and meant for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(config: CapacityConfig, vllm_config: "VllmConfig") -> str:
    """Who computes the experts: "triton", "torch" or "vllm".

    `auto` is "vllm" for quantised weights, and for decode keep without a mode, under which nothing
    is dropped and rows are as wide as vLLM's own (but for expert parallelism on the CPU, which only
    ours know); else "triton" on CUDA and "torch" on the CPU. Where capacity only observes, vLLM's
    own kernels run, whatever was asked for.

    Raises:
        ValueError: the backend that was asked for can't serve this engine.
    """
    from vllm.platforms import current_platform

    quantization = vllm_config.model_config.quantization
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ValueError(
            f"{config.asked}, but the platform is "
            f"{current_platform.device_name!r}: it is accepted on CUDA and on the CPU."
        )
    if config.observe:
        return "vllm"
    own = "torch" if current_platform.is_cpu() else "triton"
    backend = config.backend
    if backend == "auto":
        ours = config.drops
        ours |= own == "torch" and vllm_config.parallel_config.enable_expert_parallel
        return own if ours and quantization is None else "vllm"
    interpreted = backend == "triton" and own == "torch" and triton_is_interpreted()
    if backend not in (own, "vllm") and not interpreted:
        raise ValueError(
            f"--moe-capacity-backend is {backend!r}, but the platform is "
            f"{current_platform.device_name!r}: 'auto', {own!r} or 'vllm' is accepted."
        )
    if backend != "vllm" and quantization is not None:
        raise ValueError(
            f"--moe-capacity-backend is {backend!r}, but the weights are quantised "
            f"({quantization}): 'auto' or 'vllm' is accepted."
        )
    return backend


def _unserved(vllm_config: "VllmConfig") -> list[tuple[str, Any, str]]:
    """Settings that a capacity mode doesn't work with: (setting, its value, what is accepted)."""
    parallel = vllm_config.parallel_config
    auxiliary = getattr(vllm_config, "aux_output_config", None)
    settings = [
        # Microbatches split a step; T, and with it the capacity, would be counted by halves.
        ("--enable-dbo", parallel.use_ubatching, False),
        # Rows of other ranks would reach the router with the padding of this one.
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size, 1),
        # Ranks come and go; where experts live is settled once, when the model is loaded.
        ("--enable-elastic-ep", parallel.enable_elastic_ep, False),
        # Some layers would see only the rows of the last tokens.
        ("--kv-sharing-fast-prefill", vllm_config.cache_config.kv_sharing_fast_prefill, False),
        # LoRA's expert kernels aren't ours, and they know no dropped assignments.
        ("--enable-lora", vllm_config.lora_config is not None, False),
        # The capture buffer holds exactly the top-k experts of a token.
        (
            "--enable-return-routed-experts",
            bool(getattr(auxiliary, "enable_return_routed_experts", False)),
            False,
        ),
    ]
    return [(name, value, repr(good)) for name, value, good in settings if value != good]
