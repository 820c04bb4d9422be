"""What a capacity mode can't serve is refused here, before any weight is loaded.

Every message is one sentence that names the flag, what came, and what is accepted.
"""

from typing import TYPE_CHECKING, Any

from vllm_capmoe.config import CapacityConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_environment(config: CapacityConfig) -> None:
    """Refuse environment variables that contradict the configuration."""
    import vllm.envs as envs

    if envs.VLLM_BATCH_INVARIANT and config.scope == "batch":
        raise ValueError(
            "--moe-capacity-scope is 'batch', where who shares a batch decides what is dropped, "
            "but VLLM_BATCH_INVARIANT=1 asks for the contrary: 'request' is accepted with it."
        )
    if not envs.VLLM_MOE_SKIP_PADDING:
        raise ValueError(
            f"--moe-capacity-mode is {config.mode!r}, but VLLM_MOE_SKIP_PADDING=0 hides which "
            "tokens are padding: 1, vLLM's default, is accepted."
        )


def check_engine(config: CapacityConfig, vllm_config: "VllmConfig") -> None:
    """Refuse what the model or the layout of the engine can't give.

    Raises:
        ValueError: with one sentence that says what and why.
    """
    mode = f"--moe-capacity-mode is {config.mode!r}, but"
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
    for setting, value, accepted in _unserved(vllm_config):
        raise ValueError(f"{mode} {setting} is {value!r}: {accepted} is accepted with it.")
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
    resolve_backend(config, vllm_config)


def resolve_backend(config: CapacityConfig, vllm_config: "VllmConfig") -> str:
    """Who computes the experts: "torch" or "vllm".

    `auto` is "torch" for unquantised weights and "vllm" for quantised ones.

    Raises:
        ValueError: the backend that was asked for can't serve this engine.
    """
    from vllm.platforms import current_platform

    quantization = vllm_config.model_config.quantization
    if not current_platform.is_cpu():
        raise ValueError(
            f"--moe-capacity-mode is {config.mode!r}, but this release computes capacity-aware "
            f"experts on the CPU only and the platform is {current_platform.device_name!r}: "
            "'off' is accepted."
        )
    if config.backend == "triton":
        raise ValueError(
            "--moe-capacity-backend is 'triton', but the platform is the CPU: 'auto', 'torch' or "
            "'vllm' is accepted."
        )
    if config.backend == "torch" and quantization is not None:
        raise ValueError(
            f"--moe-capacity-backend is 'torch', but the weights are quantised ({quantization}): "
            "'auto' or 'vllm' is accepted."
        )
    if config.backend == "auto":
        return "torch" if quantization is None else "vllm"
    return config.backend


def _unserved(vllm_config: "VllmConfig") -> list[tuple[str, Any, str]]:
    """Settings that a capacity mode doesn't work with: (setting, its value, what is accepted)."""
    parallel = vllm_config.parallel_config
    auxiliary = getattr(vllm_config, "aux_output_config", None)
    settings = [
        # Microbatches split a step; T, and with it the capacity, would be counted by halves.
        ("--enable-dbo", parallel.use_ubatching, False),
        # Rows of other ranks would reach the router with the padding of this one.
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size, 1),
        ("sequence-parallel MoE", parallel.use_sequence_parallel_moe, False),
        # A router sees logical experts; replicas aren't wired yet.
        ("--enable-eplb", parallel.enable_eplb, False),
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
