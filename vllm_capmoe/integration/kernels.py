"""vLLM's own expert kernels under our routing (backend `vllm`): what a dropped assignment costs.

`KERNELS` is the one table: phantom.py asks it who skips, layer_checks.py refuses layers by it,
`patches` have vLLM choose by it, and docs/vllm_kernels.md is printed from it:

    python -m vllm_capmoe.integration.kernels > docs/vllm_kernels.md

It says how the code of vLLM 0.32 and 0.33 reads; none of it was run on a GPU yet.
"""

from enum import Enum
from typing import Any

from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.settings import current_config


class Dropped(Enum):
    """What becomes of a dropped assignment, which is also what an unused place costs."""

    SKIPPED = "skipped"
    WEIGHT_ZERO = "computed, with weight zero"
    REFUSED = "the layer is refused"
    REFUSED_IN_MODE = "the layer is refused under a mode"


# Class in vllm.model_executor.layers.fused_moe, or a folder above it. By exact class, since a
# subclass may do otherwise; a class that isn't here counts as WEIGHT_ZERO.
KERNELS: dict[str, tuple[Dropped, str]] = {
    "TritonExperts": (Dropped.SKIPPED, "bf16, fp16, fp8, int8; Triton"),
    "TritonWNA16Experts": (Dropped.SKIPPED, "int4 and int8 weights (AWQ, GPTQ); Triton"),
    "MarlinExperts": (Dropped.SKIPPED, "AWQ, GPTQ, fp8, nvfp4, mxfp4 weights, 16-bit inputs"),
    "DeepGemmExperts": (Dropped.SKIPPED, "fp8 and mxfp8; DeepGEMM"),
    "DeepGemmFP4Experts": (Dropped.SKIPPED, "mxfp4; DeepGEMM, Blackwell"),
    "TritonOrDeepGemmExperts": (Dropped.SKIPPED, "fp8 in blocks; DeepGEMM, or Triton"),
    # Both with weight zero under release 3.8 of triton_kernels, see phantom.py.
    "OAITritonExperts": (Dropped.SKIPPED, "mxfp4 (gpt-oss); triton_kernels"),
    "UnfusedOAITritonExperts": (Dropped.SKIPPED, "mxfp4 (gpt-oss); triton_kernels"),
    # FlashInfer's CUTLASS kernels ignore the expert map. One revision of their source skips ids out
    # of range; it may come under SKIPPED once that was seen on a GPU.
    "FlashInferExperts": (Dropped.WEIGHT_ZERO, "bf16, fp8, nvfp4, mxfp4; FlashInfer's CUTLASS"),
    # The permutation before these asserts that every id has an expert: a phantom would fail.
    "CutlassExpertsFp8": (Dropped.WEIGHT_ZERO, "fp8; vLLM's CUTLASS"),
    "TritonOrCutlassExperts": (Dropped.WEIGHT_ZERO, "fp8; vLLM's CUTLASS, or Triton"),
    "CutlassExpertsFp4": (Dropped.WEIGHT_ZERO, "nvfp4; vLLM's CUTLASS"),
    "CutlassExpertsMxfp4": (Dropped.WEIGHT_ZERO, "mxfp4; vLLM's CUTLASS"),
    "CutlassExpertsW4A8Fp8": (Dropped.WEIGHT_ZERO, "int4 weights, fp8 inputs; vLLM's CUTLASS"),
    "TrtLlmBf16ExpertsModular": (Dropped.WEIGHT_ZERO, "bf16; TensorRT-LLM, Blackwell"),
    "TrtLlmFp8ExpertsModular": (Dropped.WEIGHT_ZERO, "fp8; TensorRT-LLM, Blackwell"),
    "TrtLlmMxfp4ExpertsModular": (Dropped.WEIGHT_ZERO, "mxfp4; TensorRT-LLM, Blackwell"),
    "TrtLlmNvFp4ExpertsModular": (Dropped.WEIGHT_ZERO, "nvfp4; TensorRT-LLM, Blackwell"),
    "HummingIndexedExperts": (Dropped.WEIGHT_ZERO, "weights of 1 to 8 bits; Humming"),
    "HummingGroupedExperts": (Dropped.WEIGHT_ZERO, "weights of 1 to 8 bits; Humming"),
    "B12xExperts": (Dropped.WEIGHT_ZERO, "mxfp4, nvfp4; b12x, Blackwell"),
    "FlashInferB12xExperts": (Dropped.WEIGHT_ZERO, "nvfp4; FlashInfer's b12x, Blackwell"),
    "FlashInferCuteDSLExperts": (Dropped.WEIGHT_ZERO, "nvfp4; FlashInfer's CuTe DSL, Blackwell"),
    "HPCExperts": (Dropped.WEIGHT_ZERO, "fp8; HPC, Hopper"),
    "Int4EmulationTritonExperts": (Dropped.WEIGHT_ZERO, "int4, emulated"),
    "Mxfp8EmulationTritonExperts": (Dropped.WEIGHT_ZERO, "mxfp8, emulated"),
    "Nvfp4QuantizationEmulationTritonExperts": (Dropped.WEIGHT_ZERO, "nvfp4, emulated"),
    "OCP_MXQuantizationEmulationTritonExperts": (Dropped.WEIGHT_ZERO, "OCP MX, emulated"),
    "CPUUnquantizedExperts": (Dropped.WEIGHT_ZERO, "bf16, fp16, fp32; CPU"),
    "X86CPUUnquantizedExperts": (Dropped.WEIGHT_ZERO, "bf16, fp16, fp32; x86 CPU"),
    "ArmCPUUnquantizedExperts": (Dropped.WEIGHT_ZERO, "bf16, fp16, fp32; Arm CPU"),
    "PowerCPUUnquantizedExperts": (Dropped.WEIGHT_ZERO, "bf16, fp16, fp32; Power CPU"),
    "CPUExpertsFp8": (Dropped.WEIGHT_ZERO, "fp8 weights; CPU"),
    "CPUExpertsFp8W8A8": (Dropped.WEIGHT_ZERO, "fp8; CPU"),
    "CPUExpertsMxfp4": (Dropped.WEIGHT_ZERO, "mxfp4; CPU"),
    "CPUExpertsInt8": (Dropped.WEIGHT_ZERO, "int8; CPU"),
    "ArmCPUExpertsInt8": (Dropped.WEIGHT_ZERO, "int8; Arm CPU"),
    "PowerCPUExpertsInt8": (Dropped.WEIGHT_ZERO, "int8; Power CPU"),
    "ZenCPUExpertsInt8": (Dropped.WEIGHT_ZERO, "int8; Zen CPU"),
    # Two classes of vLLM have this name; the monolithic one is refused all the same.
    "CPUExpertsInt4": (Dropped.WEIGHT_ZERO, "int4; CPU, the modular one"),
    # Monolithic: they route by themselves. On CUDA vLLM takes another kernel instead where it has
    # one: 0.33 asks the router, and 0.32 finds `Custom` on none of their lists.
    "OAITritonMxfp4ExpertsMonolithic": (Dropped.REFUSED, "mxfp4 (gpt-oss); routes by itself"),
    "TrtLlmBf16ExpertsMonolithic": (Dropped.REFUSED, "bf16; routes by itself"),
    "TrtLlmFp8ExpertsMonolithic": (Dropped.REFUSED, "fp8; routes by itself"),
    "TrtLlmMxfp4ExpertsMonolithic": (Dropped.REFUSED, "mxfp4; routes by itself"),
    "TrtLlmMxint4ExpertsMonolithic": (Dropped.REFUSED, "mxint4; routes by itself"),
    "TrtLlmNvFp4ExpertsMonolithic": (Dropped.REFUSED, "nvfp4; routes by itself"),
    "ZentorchExpertsInt4": (Dropped.REFUSED, "int4; Zen CPU, routes by itself"),
    # Batches of a fixed size per expert, see `checks.BATCHES`.
    "BatchedDeepGemmExperts": (Dropped.REFUSED_IN_MODE, "batches of a fixed size"),
    "BatchedHummingGroupedExperts": (Dropped.REFUSED_IN_MODE, "batches of a fixed size"),
    "BatchedMarlinExperts": (Dropped.REFUSED_IN_MODE, "batches of a fixed size"),
    "BatchedTritonExperts": (Dropped.REFUSED_IN_MODE, "batches of a fixed size"),
    "CutlassBatchedExpertsFp8": (Dropped.REFUSED_IN_MODE, "batches of a fixed size"),
    "FlashInferCuteDSLBatchedExperts": (Dropped.REFUSED_IN_MODE, "batches of a fixed size"),
    "NaiveBatchedExperts": (Dropped.REFUSED_IN_MODE, "batches of a fixed size"),
    # Others.
    "FlashInferMoeEpExperts": (Dropped.REFUSED, "an all-to-all of its own"),
    "MoonEPExperts": (Dropped.REFUSED, "an all-to-all of its own"),
    "TrtLlmBf16LoRAExperts": (Dropped.REFUSED, "LoRA, which no mode serves"),
    "TrtLlmMxfp4LoRAExperts": (Dropped.REFUSED, "LoRA, which no mode serves"),
}

# Backends of vLLM's choice, by its own names, whose kernels skip and compute as those they pass.
# Marlin skips too, but multiplies 16-bit inputs where others take them as fp8: it stays in its
# place, and so does all of what vLLM chooses for 4-bit weights.
PREFERRED = ("DEEPGEMM", "TRITON")


def dropped_by(kernel: type) -> Dropped:
    """What vLLM's class `kernel` does with dropped assignments."""
    if not kernel.__module__.startswith("vllm."):
        return Dropped.WEIGHT_ZERO
    if getattr(kernel, "is_monolithic", bool)():
        return Dropped.REFUSED
    return KERNELS.get(kernel.__name__, (Dropped.WEIGHT_ZERO,))[0]


def kernel_name(layer: Any) -> str:
    """The class by which vLLM computes the experts of a layer (`MoERunner`)."""
    method = layer.routed_experts.quant_method
    return type(method if method.moe_kernel is None else method.moe_kernel.fused_experts).__name__


def patches() -> list[Patch]:
    """What has vLLM choose a kernel that skips.

    vllm...oracle.fp8, oracle.unquantized: `_get_priority_backends`, the order in which vLLM tries
        its kernels where neither --moe-backend nor the environment names one. They can go once
        vLLM has a registry of MoE kernels.
    """
    from vllm.model_executor.layers.fused_moe.oracle import fp8, unquantized

    return [
        Patch(fp8, "_get_priority_backends", _skipping_first, ("moe_config",)),
        Patch(unquantized, "_get_priority_backends", _skipping_first, ("moe_config",)),
    ]


def _skipping_first(original: Function) -> Function:
    def _get_priority_backends(*args: Any, **kwargs: Any) -> list[Any]:
        from vllm.platforms import current_platform

        backends, config = list(original(*args, **kwargs)), current_config()
        if config.drops and current_platform.is_cuda():
            backends.sort(key=lambda backend: backend.name not in PREFERRED)
        return backends

    return _get_priority_backends


def markdown() -> str:
    """docs/vllm_kernels.md."""
    lines = [
        "# vLLM's expert kernels under `--moe-capacity-backend vllm`",
        "",
        "Printed by `python -m vllm_capmoe.integration.kernels`; a test compares them. As the code",
        "of vLLM 0.32 and 0.33 reads: none of it was run on a GPU yet.",
        "",
        "| kernel (class) | for | a dropped assignment |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {what} | {dropped.value} |" for name, (dropped, what) in KERNELS.items()
    ]
    return "\n".join([*lines, "", _NOTES])


_NOTES = """\
- **Skipped**: it costs nothing, and neither does an unused place of Expanded Drop's wider rows. One
  expert more, a phantom that lives on no rank, stands for both. (64 experts become 65 by it; for
  steps of fewer than 1024 assignments vLLM's alignment of blocks then leaves its shortest way.)
- **Weight zero**: outputs follow the capacity, and no time is saved. The place goes to an expert
  with a low load, not back to the one that dropped it. Expanded Drop with rows wider than the
  model's top-k is refused.
- **fp8, and unquantised weights**: where neither `--moe-backend` nor vLLM's environment variables
  name a kernel, vLLM tries DeepGEMM and Triton first under a mode, since they skip; stock vLLM
  prefers FlashInfer's CUTLASS for fp8 in blocks with expert parallelism on Hopper. For other
  weights the choice is that of stock vLLM, without the monolithic kernels.
- **Refused under a mode**: but served by decode keep alone and where capacity only observes, since
  every token then holds exactly its top-k.
- Kernels for ROCm and XPU are not listed: a mode is refused there.
- vLLM warms DeepGEMM up for rows of the top-k, not for wider ones; their first steps may compile.
"""


if __name__ == "__main__":
    print(markdown(), end="")
