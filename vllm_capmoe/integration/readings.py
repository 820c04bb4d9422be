"""What we read of vLLM without replacing it: attributes that a new release may rename or move.

`compat.Patch` guards what is replaced, and Python what is imported. An attribute that is gone would
show itself only in the middle of a step, or be taken for one that is None. So the tables here list
all of them, each with what it tells us and where to look for it when it has moved; every process
checks what it reads when it starts, and a test holds that nothing else is read in this folder.
"""

import dis
import importlib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_capmoe.integration.compat import (
    SUPPORTED_TEXT,
    IncompatibleVLLMError,
    check_version,
    vllm_version,
)


@dataclass(frozen=True)
class Reading:
    """Attributes of one class (or module) of vLLM that we read.

    owner: "module" or "module:Class". names: the attributes. told: what they tell us.
    moved: what to do, and where to look, when one of them is gone.
    """

    owner: str
    names: tuple[str, ...]
    told: str
    moved: str


_MOE = "vllm.model_executor.layers.fused_moe"
_CONFIG = "vllm.config.vllm:VllmConfig"

OF_CONFIGURATION = (
    Reading(
        _CONFIG,
        ("model_config", "parallel_config", "cache_config", "scheduler_config", "lora_config")
        + ("compilation_config", "kernel_config", "kv_transfer_config", "additional_config")
        + ("instance_id",),
        "what a mode can't be served with",
        "where a part of the configuration has moved, the refusals of checks.py move with it",
    ),
    Reading(
        "vllm.config.model:ModelConfig",
        ("is_moe", "model", "seed", "quantization", "architectures", "served_model_name")
        + ("get_num_experts", "get_num_experts_per_tok", "get_total_num_hidden_layers")
        + ("max_model_len",),
        "the model, before any layer exists",
        "see checks.check_engine",
    ),
    Reading(
        "vllm.config.parallel:ParallelConfig",
        ("data_parallel_size", "tensor_parallel_size", "prefill_context_parallel_size")
        + ("enable_expert_parallel", "enable_eplb", "eplb_config", "enable_elastic_ep")
        + ("use_ubatching", "all2all_backend", "distributed_executor_backend")
        + ("_api_process_count",),
        "the layout, before any layer exists",
        "see checks._unserved, with the reason for each",
    ),
    Reading(
        "vllm.config.parallel:EPLBConfig",
        ("num_redundant_experts",),
        "replicas of experts",
        "see checks.check_load_balancing",
    ),
    Reading(
        "vllm.config.cache:CacheConfig",
        ("enable_prefix_caching", "kv_offloading_size", "kv_sharing_fast_prefill"),
        "what hands one request's keys and values to another",
        "see isolation.check_caches: whatever else shares between requests belongs there too",
    ),
    Reading(
        "vllm.config.kv_transfer:KVTransferConfig",
        ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config"),
        "the same",
        "see isolation.py, with the list of connectors, which a new release may lengthen",
    ),
    Reading(
        "vllm.config.scheduler:SchedulerConfig",
        ("max_num_batched_tokens", "max_num_seqs"),
        "how large a step may be",
        "see step.attach",
    ),
    Reading(
        "vllm.config.kernel:KernelConfig",
        ("moe_backend",),
        "a kernel that was asked for by name",
        "see checks.resolve_backend",
    ),
    Reading(
        "vllm.config.compilation:CompilationConfig",
        ("static_forward_context", "cudagraph_mode"),
        "all layers of a process by their names, and whether steps are replayed from graphs",
        "see layers.moe_layers",
    ),
    Reading(
        "vllm.envs",
        ("VLLM_PLUGINS", "VLLM_BATCH_INVARIANT", "VLLM_MOE_SKIP_PADDING")
        + ("VLLM_LOG_STATS_INTERVAL", "VLLM_API_KEY"),
        "switches of the environment",
        "see checks.check_environment",
    ),
)
"""Read wherever a configuration is made or judged: checks.py, isolation.py."""

OF_WORKERS = (
    # The rows of a step: step.py.
    Reading(
        "vllm.forward_context:ForwardContext",
        ("is_padding", "dp_metadata", "no_compile_layers"),
        "which rows are padding, how many rows each data parallel rank has, a layer by its name",
        "look for what GPUModelRunner hands to set_forward_context; without a padding mask a layer "
        "can't be routed",
    ),
    Reading(
        "vllm.forward_context:DPMetadata",
        ("num_tokens_across_dp_cpu",),
        "whether a mask of one row is the batch or one of several shards of it",
        "see `Shard._is_cut`: any way to know this rank's rows before they are cut will do",
    ),
    Reading(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        ("input_batch", "req_indices", "positions", "device", "get_model", "get_draft_model"),
        "of each row of a step: its request and position; the model and its draft",
        "look in `_prepare_inputs` for what it fills for the attention; see step._after_v1",
    ),
    Reading(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        ("num_prompt_tokens", "num_reqs"),
        "where a request's prompt ends",
        "any array of prompt lengths in the order of the batch will do",
    ),
    Reading(
        "vllm.v1.utils:CpuGpuBuffer",
        ("gpu",),
        "the device's copy of a row's request",
        "see step._after_v1",
    ),
    Reading(
        "vllm.v1.core.sched.output:SchedulerOutput",
        ("total_num_scheduled_tokens",),
        "how many rows of a step are tokens",
        "it is what `_prepare_inputs` begins with",
    ),
    Reading(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        ("req_states", "device", "get_model", "get_draft_model"),
        "the same of model runner V2",
        "look in `prepare_inputs`; see step._after_v2",
    ),
    Reading(
        "vllm.v1.worker.gpu.states:RequestState",
        ("prompt_len",),
        "where a request's prompt ends",
        "it must be what the user sent, not what is computed again after a preemption",
    ),
    Reading(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        ("idx_mapping_np", "positions", "query_start_loc", "num_reqs", "num_tokens"),
        "of each row of a step: its request and position",
        "look in `prepare_inputs`; see step._after_v2",
    ),
    # A layer and its parts: layers.py, layer_checks.py, placement.py, phantom.py, experts.py.
    Reading(
        f"{_MOE}.runner.moe_runner:MoERunner",
        (
            "router",
            "routed_experts",
            "layer_name",
            "moe_config",
            "expert_map_manager",
            "is_monolithic",
            "do_naive_dispatch_combine",
        ),
        "the router and the experts of a layer, and whether the router is asked at all",
        "look in MoERunner.__init__ and `_forward_impl`: a layer must be refused that doesn't ask "
        "its router, or asks it for rows of other ranks",
    ),
    Reading(
        f"{_MOE}.routed_experts:RoutedExperts",
        (
            "quant_method",
            "moe_config",
            "layer_name",
            "global_num_experts",
            "local_num_experts",
            "expert_map",
            "_expert_map",
            "apply_router_weight_on_input",
        ),
        "which kernel computes, on which experts; the phantom's place in the expert map",
        "look at what `quant_method.apply` hands to its kernel; see phantom.install",
    ),
    Reading(
        f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod",
        ("moe_kernel", "experts_cls", "w13_weight", "w2_weight"),
        "the kernel of a layer, before and after its weights are loaded",
        "look in `process_weights_after_loading`; every quantisation method has them",
    ),
    Reading(
        f"{_MOE}.modular_kernel:FusedMoEKernel",
        ("prepare_finalize", "fused_experts"),
        "who hands rows to the experts, and who computes them",
        "see layers.backend_of and layers.keeps_rows",
    ),
    Reading(
        f"{_MOE}.modular_kernel:FusedMoEExperts",
        ("moe_config", "quant_config", "activation_config", "w1_bias", "w2_bias"),
        "the activation, its parameters, and biases",
        "the base class of our experts; look at what vLLM's TritonExperts reads",
    ),
    Reading(
        f"{_MOE}.modular_kernel",
        ("FusedMoEExpertsModular", "FusedMoEActivationFormat", "TopKWeightAndReduce")
        + ("ExpertTokensMetadata",),
        "what an expert kernel of vLLM's is",
        "our experts are one: see what vLLM's TritonExperts derives from",
    ),
    Reading(
        f"{_MOE}.modular_kernel:FusedMoEExpertsModular",
        ("is_supported_config",),
        "why our experts can't serve a layer",
        "see layer_checks.check_backend",
    ),
    Reading(
        f"{_MOE}.modular_kernel:FusedMoEActivationFormat",
        ("Standard",),
        "rows as they are, no batches of a fixed size",
        "see layer_checks.check_backend",
    ),
    Reading(
        f"{_MOE}.config:FusedMoEQuantConfig",
        ("gemm1_alpha", "gemm1_beta"),
        "parameters of an activation, None where the model gives none",
        "see CapacityExperts._activation_arguments",
    ),
    Reading(
        f"{_MOE}.activation:ApplyMoEActivationConfig",
        ("clamp_limit", "activation_situ_beta", "activation_situ_linear_beta"),
        "the other parameters of an activation",
        "see CapacityExperts._activation_arguments",
    ),
    Reading(
        f"{_MOE}.config:FusedMoEConfig",
        ("activation", "moe_parallel_config"),
        "the activation of a layer, and how it is spread over ranks",
        "look at what vLLM's own experts read",
    ),
    Reading(
        f"{_MOE}.config:FusedMoEParallelConfig",
        ("use_ep", "ep_size", "ep_rank", "dp_size", "dp_rank", "sp_size")
        + ("is_sequence_parallel", "enable_eplb"),
        "where the experts of a layer live, and whose tokens a router sees",
        "see placement.placement, which has a table of all layouts",
    ),
    Reading(
        f"{_MOE}.expert_map_manager:ExpertMapManager",
        ("placement_strategy",),
        "whether experts are dealt out in blocks or in turns",
        "see placement.placement",
    ),
    Reading(
        f"{_MOE}.router.base_router:BaseRouter",
        ("global_num_experts", "eplb_state", "_compute_routing", "_apply_eplb_mapping"),
        "the base class of our router",
        "our router must stand before the mapping to replicas, and after the choice of the top-k",
    ),
    Reading(
        f"{_MOE}.config:RoutingMethodType",
        ("Custom",),
        "the way of routing for which vLLM has no monolithic kernel",
        "layer_checks.check_layer refuses a layer that got one nevertheless",
    ),
    Reading(
        f"{_MOE}.oracle.unquantized:UnquantizedMoeBackend",
        ("CPU", "TRITON"),
        "the backends that leave weights as they are",
        "look in `convert_to_unquantized_kernel_format`",
    ),
    # The worker itself: worker.py, experts.py, proof.py.
    Reading(
        "vllm.v1.executor.abstract:Executor",
        ("vllm_config", "collective_rpc"),
        "how an engine core asks its workers",
        "see proof.ask",
    ),
    Reading(
        "vllm.v1.worker.worker_base:WorkerBase",
        ("vllm_config", "model_runner", "load_model", "rank"),
        "when the model of a worker is loaded",
        "see worker.activate",
    ),
    Reading(
        "vllm.v1.worker.gpu_worker:Worker",
        ("compute_weight_checksums", "reset_weights", "save_sharded_state")
        + ("save_tensorized_model", "start_draft_weight_update", "start_weight_update"),
        "what reads or writes the parameters of a model that is loaded",
        "see experts.open_weights_for: whatever else does belongs there too",
    ),
    Reading(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        ("reload_weights",),
        "the same",
        "the same",
    ),
)
"""Read in workers: layers, their parts, and the rows of a step."""

OF_FRONT_ENDS = (
    Reading(
        "vllm.v1.engine.async_llm:AsyncLLM",
        ("engine_core", "vllm_config", "logger_manager", "output_handler"),
        "which engine a front end listens to, and how it keeps statistics",
        "see metrics._start",
    ),
    # Live changes: live_engine.py, endpoint.py.
    Reading(
        "vllm.v1.engine.async_llm:AsyncLLM",
        ("pause_generation", "resume_generation", "is_paused", "reset_prefix_cache"),
        "how to find all workers between two steps, and to forget what is cached",
        "see live_engine.change: no step may be in flight, and no request may be lost",
    ),
    Reading(
        "vllm.entrypoints.llm:LLM",
        ("reset_prefix_cache",),
        "the same of an engine without a server",
        "see live_engine.change_settings",
    ),
    Reading(
        "vllm.entrypoints.serve.middleware.authenticate",
        ("GUARDED_PREFIX",),
        "under which paths vLLM asks for its key",
        "see endpoint.PATH, which must be one of them",
    ),
    Reading(
        "vllm.v1.engine.core_client:AsyncMPClient",
        ("client_index", "core_engines", "_call_utility_async", "call_utility_all_async"),
        "how to ask every worker of every engine core",
        "see proof._ask_engines_first: no core may be left out, idle ones included",
    ),
    Reading(
        "vllm.v1.metrics.loggers:StatLoggerManager",
        ("stat_loggers",),
        "which loggers an engine has",
        "see metrics._start",
    ),
    Reading(
        "vllm.v1.metrics.loggers:PrometheusStatLogger",
        ("_counter_cls",),
        "the class of its counters, which is another one under Ray",
        "see metrics.series_of",
    ),
    # The planner's engines.
    Reading(
        "vllm.v1.metrics.stats:RequestStateStats",
        ("first_token_ts", "last_token_ts", "num_generation_tokens"),
        "how long the tokens of an answer took",
        "see planner_engine._per_token",
    ),
)
"""Read where requests arrive: metrics.py, proof.py, live_engine.py, planner_engine.py."""

NOT_EVERYWHERE = {
    "aux_output_config": "of VllmConfig, 0.33: getattr with a default in checks._unserved",
    "enable_return_routed_experts": "the same",
    "api_key": "of FrontendArgs, which moved in 0.33: where it is gone, endpoint.py ends the start",
    "host": "the same",
    "uds": "the same",
    "expert_substitution": "of RoutedExperts, 0.33: getattr with a default in layer_checks",
}


def owner_of(reading: Reading) -> Any:
    """The class or module that a row names.

    Raises:
        ImportError, AttributeError: there is none.
    """
    module, _, name = reading.owner.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def known_names(owner: Any) -> set[str]:
    """The attributes of a module, or of a class and its objects.

    Those of objects are what the class's own methods assign to `self`, or register by name.
    """
    if isinstance(owner, types.ModuleType):
        return {*dir(owner), *getattr(owner, "__annotations__", {})}
    names = set(dir(owner))
    for each in owner.__mro__:
        names |= set(each.__dict__.get("__annotations__", {}))
        for function in vars(each).values():
            names |= set(_assigned(function))
    return names


def _assigned(function: Any) -> Iterator[str]:
    """What a method, a property or what it wraps assigns to an attribute or names in a string."""
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None:
            yield from (each for each in code.co_consts if isinstance(each, str))
            yield from (
                str(line.argval)
                for line in dis.get_instructions(code)
                if line.opname == "STORE_ATTR"
            )
        function = getattr(function, "__wrapped__", None)


def missing(readings: Iterable[Reading]) -> list[str]:
    """A line for each name that this vLLM lacks: what it is, what it told us, what to do."""
    lines = []
    for reading in readings:
        try:
            known = known_names(owner_of(reading))
        except (ImportError, AttributeError):
            known = set()
        gone = [name for name in reading.names if name not in known]
        if gone:
            lines.append(
                f"{reading.owner} has no {', '.join(gone)} ({reading.told}; {reading.moved})"
            )
    return lines


def check(*groups: Iterable[Reading]) -> None:
    """Raise `IncompatibleVLLMError` for another vLLM, or one that lacks what these groups read."""
    check_version()
    lines = [line for readings in groups for line in missing(readings)]
    if lines:
        raise IncompatibleVLLMError(
            f"vLLM {vllm_version()}: {'; '.join(lines)}: this release of vllm-capmoe knows vLLM "
            f"{SUPPORTED_TEXT}; leave --moe-capacity-mode off."
        )
