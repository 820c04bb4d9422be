"""Dropped assignments under vLLM's own kernels: to a phantom expert that lives on no rank.

Kernels that know expert maps skip what is mapped to -1, as they do on every rank for experts of the
others. So a layer gets a map with one more entry, -1, and dropped assignments the id of that entry.
(vLLM's Triton experts have a shorter way for very few tokens, which they don't take with a map.)
Other kernels get weight zero instead, on experts that the token doesn't hold: some take the
experts of a row to be distinct.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.utils import import_utils

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

GPT_OSS = {"OAITritonExperts", "UnfusedOAITritonExperts"}
# Kernels of vLLM 0.32 and 0.33 that leave out a place of id E in a row whose other places count, as
# their code reads; by exact type, since a subclass may sum up otherwise.
SKIPPING = {
    "DeepGemmExperts",
    "DeepGemmFP4Experts",
    "MarlinExperts",
    "TritonExperts",
    "TritonOrDeepGemmExperts",
    "TritonWNA16Experts",
    *GPT_OSS,
}
# What hands rows to them and counts no experts: no all-to-all, or all-gather.
PREPARING = {"MoEPrepareAndFinalizeNaiveDPEPModular", "MoEPrepareAndFinalizeNoDPEPModular"}
# vLLM's alignment of blocks takes fewer experts than this, rounded up to 32.
MAX_ALIGNED = 1024


def install(layer: "MoERunner", device: torch.device) -> int | None:
    """Give the layer a phantom expert if its kernel skips one. Returns its id, else None.

    Every quantisation method of vLLM hands `expert_map` and `global_num_experts` of the layer's
    `RoutedExperts` to its kernel in each call: these two are set, and survive a reload of weights.
    """
    experts, kernel = layer.routed_experts, layer.routed_experts.quant_method.moe_kernel
    if kernel is None or not _from_vllm(kernel.fused_experts, SKIPPING):
        return None
    gpt_oss = _from_vllm(kernel.fused_experts, GPT_OSS)
    if gpt_oss and import_utils.get_triton_kernels_version() == "3.8":
        return None  # computes -1 as expert 0, with weight zero
    if not _from_vllm(kernel.prepare_finalize, PREPARING):
        return None
    total, known = experts.global_num_experts, experts.expert_map  # physical experts
    if -(-(total + 1) // 32) * 32 >= MAX_ALIGNED:
        return None
    if known is None:
        if experts.local_num_experts != total:
            return None
        known = torch.arange(total, dtype=torch.int32, device=device)
    elif known.shape != (total,):
        return None
    experts._expert_map = torch.cat([known, known.new_full((1,), -1)])
    experts.global_num_experts = total + 1
    return total


def fill_unused(
    experts_TW: Tensor, logits_TE: Tensor, is_padding_T: Tensor | None = None
) -> Tensor:
    """Experts in the unused places (-1) too: the best of those that the token doesn't hold.

    experts_TW: int [T, W], W <= E, distinct but for -1, which stands to the right.
    logits_TE: float [T, E]. is_padding_T: bool [T], rows that stay as they are.
    """
    T, E = logits_TE.shape
    W = experts_TW.shape[1]
    unused = experts_TW < 0
    held_TE = logits_TE.new_zeros((T, E + 1), dtype=torch.bool)
    held_TE.scatter_(1, experts_TW.long().masked_fill(unused, E), True)
    finite = torch.finfo(torch.float32)
    rank_TE = logits_TE.float().nan_to_num(finite.min, finite.max, finite.min)
    free_TW = rank_TE.masked_fill(held_TE[:, :E], -torch.inf).topk(W).indices
    places = torch.arange(W, device=unused.device) - (~unused).sum(1, keepdim=True)
    filler_TW = free_TW.gather(1, places.clamp(min=0)).to(experts_TW.dtype)
    if is_padding_T is not None:
        unused = unused & ~is_padding_T[:, None]
    return torch.where(unused, filler_TW, experts_TW)


def _from_vllm(part: object, names: set[str]) -> bool:
    kind = type(part)
    return kind.__name__ in names and kind.__module__.startswith("vllm.")
