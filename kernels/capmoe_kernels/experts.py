"""Mixture-of-Experts computation by Triton kernels: the public functions.

    out[t] = sum over the places w of token t that hold an expert e = experts[t, w] >= 0, ascending,
             of weights[t, w] * (w2[e] @ act(w13[e] @ hidden[t] + w13_bias[e]) + w2_bias[e])

Letters: T tokens, W places per token, A = T*W assignments (a = t*W + w), H hidden size,
I intermediate size, E experts on this rank, G experts of the layer.

Three launches: gate/up product with the activation inside, down product with the routing weight
inside, sum over the places. The host needs shapes only: how many tokens an expert has stays on the
device, so a CUDA graph can hold the call. What reads which seat is told by :class:`Seats`; the
routing kernel writes them, :func:`make_seats` makes them from the experts alone (seats.py).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from capmoe_kernels import _expert_checks as check
from capmoe_kernels import _gemm_kernels as kernels
from capmoe_kernels.activations import ACTIVATIONS, Activation, resolve_activation
from capmoe_kernels.launch import (
    MAX_SPLIT,
    MAX_SPLIT_ROWS,
    Chip,
    ExpertsConfig,
    GemmConfig,
    ceil_div,
    choose_config,
    num_tiles_bound,
)
from capmoe_kernels.seats import Seats, make_seats

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Seats",
    "fused_experts",
    "make_seats",
    "resolve_activation",
    "workspace_sizes",
]

# Whether TRITON_INTERPRET was set when the kernels were imported: they then run on CPU tensors.
INTERPRETED = not isinstance(kernels.gate_up_kernel, triton.runtime.JITFunction)


def workspace_sizes(
    tokens: int,
    width: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    config: ExpertsConfig | None = None,
    most_held: int | None = None,
) -> tuple[int, int]:
    """Elements of `dtype` of the two workspaces: after gate/up [R, I], after down [parts, R, H].

    R is A, or `most_held` (see :func:`fused_experts`) where that is less. The parts of a split sum
    are float32. Without `config`: enough for whatever the heuristics choose, for this or a smaller
    number of tokens.
    """
    assignments = workspace_rows(tokens * width, most_held)
    if config is not None and config.down.split_k == 1:
        rows = assignments * hidden
    else:
        parts = (
            min(assignments * MAX_SPLIT, MAX_SPLIT_ROWS)
            if config is None
            else assignments * config.down.split_k
        )
        rows = max(assignments * hidden, ceil_div(parts * hidden * 4, dtype.itemsize))
    return assignments * intermediate, rows


def workspace_rows(assignments: int, most_held: int | None) -> int:
    """Rows of the workspaces, R: one for each assignment, or for each that may be held here."""
    return assignments if most_held is None else min(assignments, max(1, most_held))


def fused_experts(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    experts: Tensor,
    seats: Seats | None = None,
    *,
    activation: str,
    expert_map: Tensor | None = None,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    swiglu_limit: float | None = None,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
    apply_router_weight_on_input: bool = False,
    max_rows_per_expert: int | None = None,
    most_held: int | None = None,
    config: ExpertsConfig | None = None,
    out: Tensor | None = None,
    workspaces: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Weighted sum of expert outputs, the formula at the top of this file. Returns [T, H].

    Args:
        hidden: bfloat16, float16 or float32 [T, H], rows contiguous.
        w13: gate and up projection [E, 2I, H] in the dtype of `hidden`, gates first, or
            interleaved for ``swigluoai``; [E, I, H] for the ``_no_mul`` activations.
        w2: down projection [E, H, I]. Rows of both contiguous, other strides free.
        weights: float32 [T, W] contiguous; read only where an expert is held.
        experts: int32 [T, W] contiguous, any W; -1 = unused or dropped, costs nothing.
        seats: the assignments by expert; None has :func:`make_seats` make them, two launches more.
            They must name exactly the assignments whose expert is here.
        activation: one of ``ACTIVATIONS`` (vLLM's names).
        expert_map: int32 [G], global expert -> expert here, -1 = not on this rank. None: the ids
            in `experts` are those of the experts here.
        w13_bias, w2_bias: [E, 2I] (or [E, I]) and [E, H], any float dtype, contiguous.
        swiglu_alpha, swiglu_beta, swiglu_limit: (up + beta) * gate * sigmoid(alpha * gate), gate
            cut at limit from above, up to [-limit, limit]. None is vLLM's default: 1.702, 1, 7 for
            ``swigluoai``; 1, 0 and a limit that must be given for ``swigluoai_uninterleave``; no
            limit for ``silu``; 7 for ``swiglustep``. Unused by the others.
        situ_beta, situ_linear_beta: parameters of ``situ``.
        apply_router_weight_on_input: multiply the expert's input row instead of its output.
        max_rows_per_expert: no expert holds more (the capacity): a smaller grid, a fitting tile.
            A wrong bound costs time, never correctness.
        most_held: no more assignments are held here, of the A: smaller workspaces, and one launch
            more. What is over it is left out. With `seats`, counted from their first one.
        config: launches; None takes tuned values for this device, else heuristics.
        out: result [T, H], rows contiguous; may be `hidden` itself.
        workspaces: two contiguous buffers of the dtype of `hidden` with at least
            :func:`workspace_sizes` elements, not overlapping; None allocates.

    Sums are float32; what is rounded to the input dtype are the activation, each expert's weighted
    output (unless its sum is split) and the result. For one configuration the result repeats
    bitwise. Float32 inputs are multiplied as ``config`` says: ``ieee`` (the default, in float32),
    ``tf32x3`` (three TF32 products, near float32) or ``tf32``.

    Raises:
        ValueError: a shape, dtype, stride, device or activation that does not fit; names both
            values. Nothing has been launched then. Values on the device are not checked: ids
            outside of their range are the caller's error.

    Example: T=1, H=I=1, W=2, ``relu2_no_mul``, w13 = [[[1]], [[2]]], w2 = [[[1]], [[10]]]. Hidden 3
    held by expert 0 with weight .5 and expert 1 with weight .1: .5 * 3^2 + .1 * 10 * 6^2 = 40.5.
    """
    act = resolve_activation(
        activation, swiglu_alpha, swiglu_beta, swiglu_limit, situ_beta, situ_linear_beta
    )
    check.weights(w13, w2, w13_bias, w2_bias, act.gated)
    check.call(hidden, w13, weights, experts, expert_map, max_rows_per_expert, most_held, out)
    check.devices(
        hidden,
        w13,
        w2,
        w13_bias,
        w2_bias,
        weights,
        experts,
        expert_map,
        out,
        interpreted=INTERPRETED,
    )
    tokens, width = experts.shape
    num_experts, num_hidden, intermediate = w2.shape
    result = torch.empty_like(hidden, memory_format=torch.contiguous_format) if out is None else out
    if tokens == 0:
        return result
    if width == 0 or num_experts == 0:
        return result.zero_()
    chip, device_name = chip_of(hidden.device)
    if config is None:
        config = choose_config(
            tokens,
            width,
            num_experts,
            num_hidden,
            intermediate,
            chip=chip,
            device_name=device_name,
            itemsize=hidden.dtype.itemsize,
            global_experts=None if expert_map is None else expert_map.shape[0],
            max_rows=max_rows_per_expert,
        )
    check.config(config, act.gated, chip, tokens * width, w2)
    rows_R = workspace_rows(tokens * width, most_held)
    sizes = workspace_sizes(
        tokens, width, num_hidden, intermediate, hidden.dtype, config, most_held
    )
    if workspaces is None:
        workspaces = (hidden.new_empty(sizes[0]), hidden.new_empty(sizes[1]))
    else:
        check.workspaces(workspaces, sizes, hidden)
    if seats is None:
        seats = make_seats(experts, num_experts, expert_map)
    else:
        check.seats(seats.order, seats.offsets, experts, num_experts)

    seat_of = None
    if rows_R < tokens * width:
        seat_of = torch.full((tokens * width,), -1, dtype=torch.int32, device=hidden.device)
    acts_RI = workspaces[0].view(-1)[: sizes[0]].view(rows_R, intermediate)
    rows = workspaces[1].view(-1)[: sizes[1]]
    if config.down.split_k > 1:
        rows = rows.view(torch.float32)
    pdl = config.pdl and chip.has_tma and not INTERPRETED
    on_device = torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext()
    with on_device:
        launch_gate_up(
            hidden,
            w13,
            w13_bias,
            weights,
            seats,
            acts_RI,
            act,
            config.gate_up,
            chip,
            mul_weight=apply_router_weight_on_input,
            max_rows=max_rows_per_expert,
            bounded=seat_of is not None,
            pdl=pdl,
        )
        launch_down(
            acts_RI,
            w2,
            w2_bias,
            weights,
            seats,
            rows,
            config.down,
            chip,
            mul_weight=not apply_router_weight_on_input,
            max_rows=max_rows_per_expert,
            seat_of=seat_of,
            pdl=pdl,
        )
        launch_combine(
            rows, experts, expert_map, result, config, num_rows=rows_R, seat_of=seat_of, pdl=pdl
        )
    return result


@functools.lru_cache(maxsize=64)
def chip_of(device: torch.device) -> tuple[Chip, str]:
    """What the heuristics need of `device`, and its name. The interpreter poses as a small H100."""
    if device.type != "cuda":
        return Chip((9, 0), 2), "interpreter"
    properties = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    return Chip(capability, properties.multi_processor_count), properties.name


def launch_gate_up(
    hidden: Tensor,
    w13: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    seats: Seats,
    out_AI: Tensor,
    act: Activation,
    config: GemmConfig,
    chip: Chip,
    *,
    mul_weight: bool,
    max_rows: int | None = None,
    bounded: bool = False,
    pdl: bool = False,
) -> None:
    """First launch of :func:`fused_experts`, arguments unchecked.

    bounded: `out_AI` has fewer rows than there are assignments.
    """
    (num_experts, _, num_hidden), intermediate = w13.shape, out_AI.shape[1]
    out_n = config.block_n // 2 if act.gated else config.block_n
    use_tma = _use_tma(config, chip, w13)
    w: Tensor | TensorDescriptor = w13
    if use_tma:
        if act.gated and not act.interleaved and not config.swap_ab:
            stride_e, stride_n, _ = w13.stride()
            shape = [num_experts, 2, intermediate, num_hidden]
            strides = [stride_e, intermediate * stride_n, stride_n, 1]
            w = TensorDescriptor(w13, shape, strides, [1, 2, out_n, config.block_k])
        else:
            rows = config.block_n if act.interleaved else out_n
            w = TensorDescriptor.from_tensor(w13, [1, rows, config.block_k])
    num_programs = grid_size(
        out_AI.shape[0], num_experts, ceil_div(intermediate, out_n), config, chip, max_rows
    )
    kernels.gate_up_kernel[(num_programs,)](
        hidden,
        w,
        bias,
        weights,
        seats.order,
        seats.offsets,
        out_AI,
        num_programs,
        out_AI.shape[0] if bounded else None,
        HIDDEN_STRIDE=hidden.stride(0),
        W13_STRIDE_E=w13.stride(0),
        W13_STRIDE_N=w13.stride(1),
        E=num_experts,
        P=triton.next_power_of_2(num_experts),
        H=num_hidden,
        I=intermediate,
        W=weights.shape[1],
        ACT=act.kind,
        ALPHA=act.alpha,
        BETA=act.beta,
        LIMIT=act.limit,
        GATED=act.gated,
        INTERLEAVED=act.interleaved,
        MUL_WEIGHT=mul_weight,
        USE_TMA=use_tma,
        **_tile_constants(config),
        **_pdl_constants(pdl),
    )


def launch_down(
    x_AI: Tensor,
    w2: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    seats: Seats,
    out: Tensor,
    config: GemmConfig,
    chip: Chip,
    *,
    mul_weight: bool,
    max_rows: int | None = None,
    seat_of: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Second launch of :func:`fused_experts`, arguments unchecked. `out` is flat."""
    num_experts, num_hidden, intermediate = w2.shape
    num_rows = x_AI.shape[0]
    use_tma = _use_tma(config, chip, w2, x_AI)
    x: Tensor | TensorDescriptor = x_AI
    w: Tensor | TensorDescriptor = w2
    if use_tma:
        x = TensorDescriptor.from_tensor(x_AI, [config.block_m, config.block_k])
        w = TensorDescriptor.from_tensor(w2, [1, config.block_n, config.block_k])
    n_tiles = ceil_div(num_hidden, config.block_n) * config.split_k
    num_programs = grid_size(num_rows, num_experts, n_tiles, config, chip, max_rows)
    kernels.down_kernel[(num_programs,)](
        x,
        w,
        bias,
        weights,
        seats.order,
        seats.offsets,
        out,
        seat_of,
        num_programs,
        num_rows,
        W2_STRIDE_E=w2.stride(0),
        W2_STRIDE_N=w2.stride(1),
        E=num_experts,
        P=triton.next_power_of_2(num_experts),
        H=num_hidden,
        I=intermediate,
        MUL_WEIGHT=mul_weight,
        SPLIT_K=config.split_k,
        USE_TMA=use_tma,
        **_tile_constants(config),
        **_pdl_constants(pdl),
    )


def launch_combine(
    rows: Tensor,
    experts: Tensor,
    expert_map: Tensor | None,
    out: Tensor,
    config: ExpertsConfig,
    *,
    num_rows: int | None = None,
    seat_of: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Third launch of :func:`fused_experts`, arguments unchecked. `rows` is flat, of A rows each
    part, or of `num_rows` with `seat_of`.
    """
    tokens, width = experts.shape
    block_h = config.combine.block_h
    kernels.combine_kernel[(tokens, ceil_div(out.shape[1], block_h))](
        rows,
        experts,
        expert_map,
        seat_of,
        out,
        tokens * width if num_rows is None else num_rows,
        OUT_STRIDE=out.stride(0),
        H=out.shape[1],
        W=width,
        SPLIT_K=config.down.split_k,
        BLOCK_H=block_h,
        INTERPRETED=INTERPRETED,
        num_warps=config.combine.num_warps,
        **_pdl_constants(pdl),
    )


def grid_size(
    assignments: int,
    num_experts: int,
    n_tiles: int,
    config: GemmConfig,
    chip: Chip,
    max_rows: int | None,
) -> int:
    """Programs of a persistent grid: what the chip holds, less where no routing needs as many."""
    bound = num_tiles_bound(assignments, num_experts, config.block_m, max_rows) * n_tiles
    return max(1, min(bound, chip.num_sms * config.programs_per_sm))


def _tile_constants(config: GemmConfig) -> dict[str, Any]:
    """Constants and options that both products take from a configuration."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SWAP_AB": config.swap_ab,
        "FLATTEN": config.flatten,
        "WARP_SPECIALIZE": config.warp_specialize,
        "PRECISION": config.input_precision,
        "INTERPRETED": INTERPRETED,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _pdl_constants(pdl: bool) -> dict[str, Any]:
    """The option is left out where it is off: other backends of Triton don't know it."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _use_tma(config: GemmConfig, chip: Chip, *tensors: Tensor) -> bool:
    """Whether tensor descriptors serve: the chip, boxes of at most 256, 16-byte alignment."""
    if not config.use_tma or not chip.has_tma:
        return False
    if max(config.block_m, config.block_n, config.block_k) > 256:
        return False
    for tensor in tensors:
        size = tensor.element_size()
        if tensor.data_ptr() % 16 or any(s * size % 16 for s in tensor.stride()[:-1]):
            return False
        if any(s >= 2**31 for s in tensor.shape):
            return False
    return True
