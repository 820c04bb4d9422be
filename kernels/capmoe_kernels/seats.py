"""Seats: the assignments of a step grouped by expert, without a sort.

Letters: T tokens, W places per token, A = T*W assignments (a = t*W + w), E experts on this rank,
G experts of the layer. The routing kernel hands out seats with its result; :func:`make_seats` makes
them from the experts alone, where rows come from other ranks.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from capmoe_kernels import _seat_kernels as kernels
from capmoe_kernels.checks import check_runs, check_tensor
from capmoe_kernels.contract import Seats
from capmoe_kernels.launch import ceil_div

__all__ = ["Seats", "make_seats"]

WARPS = 4
MAX_EXPERTS = 2**15  # with at most 2^15 blocks, see seats_launch, counts are numbered by int32
TILE = 2048  # flags of one step of place_kernel, 16 for each thread: no register is spilled
# Whether TRITON_INTERPRET was set when the kernels were imported: they then run on CPU tensors.
INTERPRETED = not isinstance(kernels.count_kernel, triton.runtime.JITFunction)


@dataclass(frozen=True)
class SeatsLaunch:
    """Blocks and tiles of the two kernels, powers of two.

    span: assignments of a block, a multiple of step. experts: those of one program. step:
    assignments of one step of place_kernel, whose tile is [step, experts]. count_step: those of one
    step of count_kernel. What a kernel is compiled for depends on E alone: span is no constant.
    """

    span: int
    experts: int
    step: int
    count_step: int


@functools.lru_cache(maxsize=1024)
def seats_launch(assignments: int, num_experts: int) -> SeatsLaunch:
    """The launch for A assignments and E experts here, both at least 1. Not measured yet.

    place_kernel reads in each block the loads of all earlier ones: blocks^2 / 2 * E numbers in all.
    With blocks of at least the root of A these are at most A * E / 2, half the flags in its tiles.
    Example: A = 65536 * 8, E = 16: 512 blocks of 1024, 8 steps of [128, 16] each.
    """
    experts = max(2, min(triton.next_power_of_2(num_experts), 64))
    step = min(TILE // experts, 512)
    span = max(step, triton.next_power_of_2(math.isqrt(assignments - 1) + 1))
    return SeatsLaunch(span, experts, step, count_step=512)


def make_seats(experts: Tensor, num_experts: int, expert_map: Tensor | None = None) -> Seats:
    """Seats from the experts alone: two launches after one that zeroes E numbers.

    experts: int32 or int64 [T, W]; a negative id or one out of range names no expert, and an expert
        may stand in a row more than once.
    num_experts: E, the experts here.
    expert_map: int32 [G], global expert -> expert here, -1 = elsewhere; None: ids are those of the
        experts here.

    Integers are exact, so the result repeats bitwise; entries of `order` past ``offsets[E]`` are
    not written. Time is linear in A * E. The host reads no device value: a CUDA graph can hold the
    call, after one with the same types and E outside of a capture, which compiles the kernels.

    Raises:
        ValueError: a shape, dtype or device that does not fit; names both values. Nothing has been
            launched then. No value of a tensor makes a kernel leave its tensors.
    """
    _check(experts, num_experts, expert_map)
    assignments, device = experts.numel(), experts.device
    order = torch.empty(assignments, dtype=torch.int32, device=device)
    if assignments == 0 or num_experts == 0:
        return Seats(order, torch.zeros(num_experts + 1, dtype=torch.int32, device=device))
    launch = seats_launch(assignments, num_experts)
    blocks = ceil_div(assignments, launch.span)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    counts = torch.empty(blocks * num_experts, dtype=torch.int32, device=device)
    loads = torch.zeros(num_experts, dtype=torch.int32, device=device)
    ids = experts.reshape(-1)
    map_G = None if expert_map is None else expert_map.contiguous()
    sizes = (assignments, 0 if map_G is None else map_G.shape[0], launch.span)
    constants = {"E": num_experts, "B": launch.experts, "num_warps": WARPS}
    grid = (blocks, ceil_div(num_experts, launch.experts))
    with torch.cuda.device(device) if experts.is_cuda else contextlib.nullcontext():
        kernels.count_kernel[grid](
            *(ids, map_G, counts, loads, *sizes), STEP=launch.count_step, **constants
        )
        kernels.place_kernel[grid](
            *(ids, map_G, counts, loads, order, offsets, *sizes), STEP=launch.step, **constants
        )
    return Seats(order, offsets)


def _check(experts: Tensor, num_experts: int, expert_map: Tensor | None) -> None:
    """What make_seats asks of its arguments."""
    check_tensor("experts", experts, dtypes=[torch.int32, torch.int64], shape=("T", "W"))
    if not 0 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}, but it must be from 0 to {MAX_EXPERTS}.")
    check_runs("experts", experts, INTERPRETED)
    check_tensor("expert_map", expert_map, dtypes=[torch.int32], shape=("E",), optional=True)
    check_tensor("expert_map", expert_map, device=experts.device, fits="experts", optional=True)
    if experts.numel() >= 2**31:
        raise ValueError(f"experts has {experts.numel()} elements, but it must be below {2**31}.")
