"""Sizes of the routing launches. Host only: no kernel, no tensor read."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from capmoe_kernels.capacity import TABLES
from capmoe_kernels.contract import fmix32


@dataclass(frozen=True)
class RoutingLaunch:
    """Tiles and warps of the kernels. Sizes are powers of two.

    choose_rows: rows per program of `choose_kernel` and `share_kernel`, which hold them whole,
        [choose_rows, E].
    limit_rows: rows per step of `limit_kernel`.
    rows: rows per program of `pack_kernel` and `seats_kernel`, and per row of `counts`.
    pack_rows, seat_rows: of these, the rows per step, [pack_rows, L] and [seat_rows, E].
    seat_chunk: rows of `counts` per step of `seats_kernel`.
    """

    choose_rows: int
    choose_warps: int
    limit_rows: int
    limit_warps: int
    rows: int
    pack_rows: int
    pack_warps: int
    seat_rows: int
    seat_warps: int
    seat_chunk: int


def power_of_two(size: int) -> int:
    """The lowest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _within(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


@lru_cache(maxsize=1024)
def launch_config(T: int, E: int, L: int) -> RoutingLaunch:
    """The launch for T rows of E experts with L candidates each. Not measured yet.

    Tiles give each thread 8 numbers, 4 where they are bids of 64 bits: with more, ptxas starts to
    spill. `rows` balances programs (T / rows) against the sums over earlier blocks, which are
    (T / rows)^2 * E / 2 numbers in all.
    """
    EP, LP = power_of_two(E), power_of_two(L)
    choose_rows = 4 if EP > 512 else _within(8, 2048 // EP, 32)
    limit_rows = 256 if T <= 256 else 2048
    pack_rows = _within(4, 1024 // LP, 64)
    seat_rows = _within(4, 2048 // EP, 64)
    return RoutingLaunch(
        choose_rows=choose_rows,
        choose_warps=_within(1, choose_rows * EP // 256, 16),
        limit_rows=limit_rows,
        limit_warps=4 if limit_rows == 256 else 16,
        rows=64 if T <= 16384 else 256,
        pack_rows=pack_rows,
        pack_warps=_within(1, pack_rows * LP // 128, 16),
        seat_rows=seat_rows,
        seat_warps=_within(1, seat_rows * EP // 256, 16),
        seat_chunk=_within(1, 2048 // EP, 64),
    )


@lru_cache(maxsize=TABLES)
def keep_table(keeps: tuple[int, ...], device: torch.device) -> Tensor:
    """`Plan.keeps` on a device, int32. As `capacity_table`: not built in a capture."""
    return torch.tensor(keeps, dtype=torch.int32).to(device)


def first_draw(seed: int) -> int:
    """fmix32(seed) as int32, which is how a kernel takes it."""
    draw = fmix32(seed & 0xFFFFFFFF)
    return draw - 2**32 if draw >= 2**31 else draw
