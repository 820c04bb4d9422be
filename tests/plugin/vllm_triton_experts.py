"""vLLM's own Triton experts, interpreted, with a phantom expert. Exit status 1: a wrong result.

Workspaces and output start as NaN. What vLLM has as CUDA code, the alignment of blocks and the sum
over places, is in plain torch here, after `csrc/libtorch_stable/moe/moe_align_sum_kernels.cu`.
"""

# isort: off
import interpreted_vllm  # noqa: F401 (first)
# isort: on

from typing import Any

import torch
import vllm._custom_ops as ops
from torch import Tensor
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts import triton_moe

from vllm_capmoe.integration.phantom import fill_unused

HIDDEN, INTERMEDIATE, PLACES = 64, 32, 4


def align(
    ids: Tensor,
    num_experts: int,
    block: int,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    count: Tensor,
    expert_map: Tensor | None = None,
    *rest: Any,
) -> None:
    local = ids.reshape(-1).long()
    local = torch.where((local < 0) | (local >= num_experts), -1, local)
    if expert_map is not None:
        local = torch.where(local >= 0, expert_map.long()[local.clamp(min=0)], -1)
    sorted_ids.fill_(local.numel())
    expert_ids.fill_(-1)
    at = 0
    for expert in range(num_experts):
        rows = (local == expert).nonzero().flatten()
        sorted_ids[at : at + len(rows)] = rows.to(sorted_ids.dtype)
        blocks = -(-len(rows) // block)
        expert_ids[at // block : at // block + blocks] = expert
        at += blocks * block
    count.fill_(at)


def add_places(
    rows: Tensor, out: Tensor, ids: Tensor | None = None, expert_map: Tensor | None = None
) -> None:
    total = rows.float()
    if ids is not None:
        skipped = ids < 0
        if expert_map is not None:
            skipped |= expert_map.long()[ids.long().clamp(min=0)] < 0
        total = total.masked_fill(skipped[..., None], 0)
    out.copy_(total.sum(1))


def small_tiles(*args: Any, **kwargs: Any) -> dict[str, int]:
    tile = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1}
    return {**tile, "SPLIT_K": 1, "num_warps": 4, "num_stages": 2}


class Experts(triton_moe.TritonExperts):
    """Without the configuration of an engine."""

    post_gemm2_hook = None

    def __init__(self) -> None:
        self.quantization_emulation = False
        self.quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
        self.activation_config = ApplyMoEActivationConfig()
        self._lora_context = None
        parallel = type("Parallel", (), {"use_all2all_kernels": False})
        self.moe_config = type("Config", (), {"moe_parallel_config": parallel})


def run(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, expert_map: Any, count: int
) -> Tensor:
    shape = (*ids.shape, 2 * INTERMEDIATE + HIDDEN)
    spaces = [torch.full(shape, torch.nan) for _ in range(2)]
    out = torch.full_like(x, torch.nan)
    act = MoEActivation.SILU
    Experts().apply(
        out, x, w13, w2, weights, ids, act, count, expert_map, None, None, *spaces, None, False
    )
    return out


def by_loop(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t, w in (ids >= 0).nonzero().tolist():
        gate, up = (w13[ids[t, w]] @ x[t]).chunk(2)
        out[t] += weights[t, w] * (w2[ids[t, w]] @ (torch.nn.functional.silu(gate) * up))
    return out


def main() -> None:
    ops.moe_align_block_size, ops.moe_sum = align, add_places
    triton_moe.try_get_optimal_moe_config = small_tiles
    fused_moe.current_platform.is_device_capability = lambda *args, **kwargs: False
    generator = torch.Generator().manual_seed(0)
    for tokens, E in ((20, 8), (2, 64)):  # vLLM has a way of its own for few tokens
        x = torch.randn(tokens, HIDDEN, generator=generator)
        w13 = torch.randn(E, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 8
        w2 = torch.randn(E, HIDDEN, INTERMEDIATE, generator=generator) / 8
        logits = torch.randn(tokens, E, generator=generator)
        ids = logits.topk(PLACES).indices.int()
        held = torch.randint(0, PLACES + 1, (tokens, 1), generator=generator)
        held[0] = 0  # a token without any expert
        ids = ids.masked_fill(torch.arange(PLACES) >= held, -1)
        weights = torch.rand(tokens, PLACES, generator=generator).masked_fill(ids < 0, 0)
        want = by_loop(x, w13, w2, weights, ids)
        expert_map = torch.arange(E + 1, dtype=torch.int32)
        expert_map[E] = -1
        loads = ids[ids >= 0].bincount(minlength=E)
        phantom = ids.masked_fill(ids < 0, E)
        got = run(x, w13, w2, weights, phantom, expert_map, E + 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        got = run(x, w13, w2, weights, fill_unused(ids, loads), None, E)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
