"""What :func:`capmoe_kernels.experts.fused_experts` asks of its arguments, before any launch.

Every function raises ValueError that names the argument, what came and what was expected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capmoe_kernels.launch import Chip, ExpertsConfig, ceil_div, num_tiles_bound, shared_bytes

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _shape(name: str, tensor: Tensor, expected: tuple[int, ...], reason: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected {list(expected)} from {reason}"
        )


def _contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {list(tensor.stride())}, expected a contiguous tensor of shape "
            f"{list(tensor.shape)}"
        )


def _rows(name: str, tensor: Tensor) -> None:
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {list(tensor.stride())}, expected 1 in the last dimension"
        )


def weights(
    w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None, gated: bool
) -> None:
    """Weights and biases of the experts fit together."""
    if w13.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"w13 and w2 have shapes {list(w13.shape)} and {list(w2.shape)}, "
            "expected three dimensions each"
        )
    num_experts, hidden, intermediate = w2.shape
    wide = 2 * intermediate if gated else intermediate
    _shape("w13", w13, (num_experts, wide, hidden), f"w2 {list(w2.shape)}")
    if hidden == 0 or intermediate == 0:
        raise ValueError(f"w2 has shape {list(w2.shape)}, expected H and I of at least 1")
    if w13.dtype not in FLOATS or w2.dtype != w13.dtype:
        raise ValueError(
            f"w13 is {w13.dtype} and w2 {w2.dtype}, expected the same of bfloat16, float16, float32"
        )
    _rows("w13", w13)
    _rows("w2", w2)
    for name, bias, columns in (("w13_bias", w13_bias, wide), ("w2_bias", w2_bias, hidden)):
        if bias is None:
            continue
        _shape(name, bias, (num_experts, columns), f"w2 {list(w2.shape)}")
        if bias.dtype not in FLOATS:
            raise ValueError(f"{name} is {bias.dtype}, expected bfloat16, float16 or float32")
        _contiguous(name, bias)


def call(
    hidden: Tensor,
    w13: Tensor,
    weights_TW: Tensor,
    experts: Tensor,
    expert_map: Tensor | None,
    max_rows: int | None,
    most_held: int | None,
    out: Tensor | None,
) -> None:
    """Activations, routing and result fit the weights."""
    if hidden.dim() != 2 or hidden.shape[1] != w13.shape[2]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, expected [T, {w13.shape[2]}] "
            f"from w13 {list(w13.shape)}"
        )
    if hidden.dtype != w13.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, expected {w13.dtype} as w13")
    _rows("hidden", hidden)
    if experts.dim() != 2 or experts.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"experts has shape {list(experts.shape)}, expected [{hidden.shape[0]}, W] "
            f"from hidden {list(hidden.shape)}"
        )
    _shape("weights", weights_TW, tuple(experts.shape), f"experts {list(experts.shape)}")
    if experts.dtype != torch.int32:
        raise ValueError(f"experts is {experts.dtype}, expected torch.int32")
    if weights_TW.dtype != torch.float32:
        raise ValueError(f"weights is {weights_TW.dtype}, expected torch.float32")
    if experts.numel() >= 2**31:
        raise ValueError(f"experts has {experts.numel()} elements, expected less than {2**31}")
    _contiguous("experts", experts)
    _contiguous("weights", weights_TW)
    if expert_map is not None:
        if expert_map.dim() != 1 or expert_map.dtype != torch.int32:
            raise ValueError(
                f"expert_map is {expert_map.dtype} of shape {list(expert_map.shape)}, "
                "expected torch.int32 of one dimension"
            )
        _contiguous("expert_map", expert_map)
    for name, most in (("max_rows_per_expert", max_rows), ("most_held", most_held)):
        if most is not None and most < 0:
            raise ValueError(f"{name} is {most}, expected at least 0")
    if out is not None:
        _shape("out", out, tuple(hidden.shape), f"hidden {list(hidden.shape)}")
        if out.dtype != hidden.dtype:
            raise ValueError(f"out is {out.dtype}, expected {hidden.dtype} as hidden")
        _rows("out", out)


def devices(hidden: Tensor, *others: Tensor | None, interpreted: bool) -> None:
    """All on one device, and one that can run the kernels."""
    expected = "cpu" if interpreted else "cuda"
    if hidden.device.type != expected:
        where = "under TRITON_INTERPRET=1" if interpreted else "without TRITON_INTERPRET=1"
        raise ValueError(f"hidden is on {hidden.device}, expected {expected} {where}")
    for other in others:
        if other is not None and other.device != hidden.device:
            raise ValueError(
                f"a tensor of shape {list(other.shape)} is on {other.device}, "
                f"expected {hidden.device} as hidden"
            )


def seats(order: Tensor, offsets: Tensor, experts: Tensor, num_experts: int) -> None:
    """Seats have the shapes of the routing."""
    _shape("seats.order", order, (experts.numel(),), f"experts {list(experts.shape)}")
    _shape("seats.offsets", offsets, (num_experts + 1,), f"{num_experts} experts in w13")
    for name, tensor in (("seats.order", order), ("seats.offsets", offsets)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}, expected torch.int32")
        if tensor.device != experts.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {experts.device} as experts")
        _contiguous(name, tensor)


def workspaces(pair: tuple[Tensor, Tensor], sizes: tuple[int, int], hidden: Tensor) -> None:
    """Two buffers, large enough, of the dtype and device of `hidden`."""
    for index, (tensor, size) in enumerate(zip(pair, sizes, strict=True)):
        name = f"workspaces[{index}]"
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, "
                f"expected {hidden.dtype} on {hidden.device}"
            )
        if tensor.numel() < size:
            raise ValueError(f"{name} has {tensor.numel()} elements, expected at least {size}")
        _contiguous(name, tensor)


def config(config: ExpertsConfig, gated: bool, chip: Chip, slots: int, w2: Tensor) -> None:
    """A configuration that the chip and the kernels can run."""
    num_experts, hidden, intermediate = w2.shape
    if gated and config.gate_up.block_n < 32:
        raise ValueError(
            f"config.gate_up has block_n {config.gate_up.block_n}, expected at least 32: "
            "half of it are gates"
        )
    columns = ceil_div(intermediate * (2 if gated else 1), config.gate_up.block_n)
    for name, gemm, n_tiles in (
        ("gate_up", config.gate_up, columns + 1),
        ("down", config.down, ceil_div(hidden, config.down.block_n) * config.down.split_k),
    ):
        needed = shared_bytes(gemm, w2.element_size())
        if needed > chip.shared_limit:
            raise ValueError(
                f"config.{name} needs {needed} bytes of shared memory, expected at most "
                f"{chip.shared_limit} on this device"
            )
        tiles = num_tiles_bound(slots, num_experts, gemm.block_m) * n_tiles
        if tiles >= 2**31:
            raise ValueError(f"config.{name} gives {tiles} tiles, expected less than {2**31}")
