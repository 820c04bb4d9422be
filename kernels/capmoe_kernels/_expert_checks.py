"""What :func:`capmoe_kernels.experts.fused_experts` asks of its arguments, before any launch.

Every function raises ValueError, as `checks` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capmoe_kernels.checks import (
    check_contiguous,
    check_experts,
    check_rows,
    check_runs,
    check_tensor,
)
from capmoe_kernels.launch import Chip, ExpertsConfig, ceil_div, num_tiles_bound, shared_bytes


def weights(
    w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None, gated: bool
) -> None:
    """Weights and biases of the experts fit together, and their rows can be read."""
    check_experts(w13, w2, w13_bias, w2_bias, gated)
    if 0 in w2.shape[1:]:
        raise ValueError(f"w2 has the shape {list(w2.shape)}, but H and I must be at least 1.")
    check_rows("w13", w13)
    check_rows("w2", w2)
    for name, bias in (("w13_bias", w13_bias), ("w2_bias", w2_bias)):
        if bias is not None:
            check_contiguous(name, bias)


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
    check_tensor("hidden", hidden, dtypes=[w13.dtype], shape=("T", w13.shape[2]), fits="w13")
    check_rows("hidden", hidden)
    rows = hidden.shape[0]
    check_tensor("experts", experts, dtypes=[torch.int32], shape=(rows, "W"), fits="hidden")
    check_tensor("weights", weights_TW, dtypes=[torch.float32], shape=experts.shape, fits="experts")
    if experts.numel() >= 2**31:
        raise ValueError(f"experts has {experts.numel()} elements, but it must be below {2**31}.")
    check_contiguous("experts", experts)
    check_contiguous("weights", weights_TW)
    check_tensor("expert_map", expert_map, dtypes=[torch.int32], shape=("E",), optional=True)
    if expert_map is not None:
        check_contiguous("expert_map", expert_map)
    for name, most in (("max_rows_per_expert", max_rows), ("most_held", most_held)):
        if most is not None and most < 0:
            raise ValueError(f"{name} is {most}, but it must be at least 0.")
    if out is not None:
        check_tensor("out", out, dtypes=[hidden.dtype], shape=hidden.shape, fits="hidden")
        check_rows("out", out)


def devices(hidden: Tensor, *others: Tensor | None, interpreted: bool) -> None:
    """All on one device, and one that can run the kernels."""
    check_runs("hidden", hidden, interpreted)
    for other in others:
        if other is not None:
            name = f"a tensor of the shape {list(other.shape)}"
            check_tensor(name, other, device=hidden.device, fits="hidden")


def seats(order: Tensor, offsets: Tensor, experts: Tensor, num_experts: int) -> None:
    """Seats have the shapes of the routing."""
    for name, tensor, size, fits in (
        ("seats.order", order, experts.numel(), "experts"),
        ("seats.offsets", offsets, num_experts + 1, "w13"),
    ):
        check_tensor(name, tensor, dtypes=[torch.int32], shape=(size,), fits=fits)
        check_tensor(name, tensor, device=experts.device, fits="experts")
        check_contiguous(name, tensor)


def workspaces(pair: tuple[Tensor, Tensor], sizes: tuple[int, int], hidden: Tensor) -> None:
    """Two buffers, large enough, of the dtype and device of `hidden`."""
    for index, (tensor, size) in enumerate(zip(pair, sizes, strict=True)):
        name = f"workspaces[{index}]"
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but it must be {hidden.dtype} on "
                f"{hidden.device}, as hidden is."
            )
        if tensor.numel() < size:
            raise ValueError(
                f"{name} has {tensor.numel()} elements, but it must have at least {size}."
            )
        check_contiguous(name, tensor)


def config(config: ExpertsConfig, gated: bool, chip: Chip, slots: int, w2: Tensor) -> None:
    """A configuration that the chip and the kernels can run."""
    num_experts, hidden, intermediate = w2.shape
    if gated and config.gate_up.block_n < 32:
        raise ValueError(
            f"config.gate_up has block_n {config.gate_up.block_n}, but it must be at least 32: "
            "half of it are gates."
        )
    columns = ceil_div(intermediate * (2 if gated else 1), config.gate_up.block_n)
    for name, gemm, n_tiles in (
        ("gate_up", config.gate_up, columns + 1),
        ("down", config.down, ceil_div(hidden, config.down.block_n) * config.down.split_k),
    ):
        needed = shared_bytes(gemm, w2.element_size())
        if needed > chip.shared_limit:
            raise ValueError(
                f"config.{name} needs {needed} bytes of shared memory, but it must be at most "
                f"{chip.shared_limit} on this device."
            )
        tiles = num_tiles_bound(slots, num_experts, gemm.block_m) * n_tiles
        if tiles >= 2**31:
            raise ValueError(f"config.{name} gives {tiles} tiles, but they must be below {2**31}.")
