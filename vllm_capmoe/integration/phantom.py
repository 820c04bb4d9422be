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

from vllm_capmoe.integration.kernels import Dropped, dropped_by

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

GPT_OSS = {"OAITritonExperts", "UnfusedOAITritonExperts"}
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
    if kernel is None or dropped_by(type(kernel.fused_experts)) is not Dropped.SKIPPED:
        return None
    gpt_oss = type(kernel.fused_experts).__name__ in GPT_OSS
    if gpt_oss and import_utils.get_triton_kernels_version() == "3.8":
        return None  # computes -1 as expert 0, with weight zero
    prepare = type(kernel.prepare_finalize)
    if prepare.__name__ not in PREPARING or not prepare.__module__.startswith("vllm."):
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


def fill_unused(experts_TW: Tensor, loads_E: Tensor, is_padding_T: Tensor | None = None) -> Tensor:
    """Experts in the unused places (-1) too, distinct in a row, and the busiest ones last.

    What was dropped must not go back to the expert that dropped it. So the experts stand in the
    order of their loads, each with a share of the unused places as large as what it lacks to the
    busiest one (and one more); a row begins where its first place falls, and goes on in that
    order, past those it holds. loads_E = [5, 1, 3] and [[0, -1], [0, -1]] give [[0, 1], [0, 1]]:
    the shares are [1, 5, 3], expert 1 comes first, and both places fall into its share.

    Args:
        experts_TW: int [T, W], W <= E, distinct but for -1, which stands to the right.
        loads_E: int [E], assignments that the experts hold.
        is_padding_T: bool [T], rows that stay as they are.
    """
    W, E = experts_TW.shape[1], loads_E.shape[0]
    unused_TW = experts_TW < 0
    held_TE = unused_TW.new_zeros((experts_TW.shape[0], E + 1))
    held_TE.scatter_(1, experts_TW.long().masked_fill(unused_TW, E), True)
    num_held_T = (~unused_TW).sum(1, keepdim=True)
    if is_padding_T is not None:
        unused_TW = unused_TW & ~is_padding_T[:, None]
    order_E = loads_E.argsort(stable=True)
    shares_E = (loads_E.max() + 1 - loads_E.long())[order_E].cumsum(0)
    until_T = unused_TW.sum(1).cumsum(0)
    first_T = (until_T - unused_TW.sum(1)) * shares_E[-1] // until_T[-1:].clamp(min=1)
    begin_T = torch.searchsorted(shares_E, first_T, right=True)
    turn_TE = (torch.arange(E, device=loads_E.device) - begin_T[:, None]) % E
    turn_TE = turn_TE.masked_fill(held_TE[:, order_E], E)
    free_TW = order_E[turn_TE.topk(W, largest=False).indices]
    places_TW = torch.arange(W, device=loads_E.device) - num_held_T
    filler_TW = free_TW.gather(1, places_TW.clamp(min=0)).to(experts_TW.dtype)
    return torch.where(unused_TW, filler_TW, experts_TW)
