"""Sizes of the routing launches, and the table of limits. Host only: no kernel, no tensor read."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

NO_LIMIT = 2**31 - 1
"""The capacity of a group in which no limit is in effect. As `vllm_capmoe.limits.NO_LIMIT`."""


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


# Tables that are kept. A captured graph reads a table without owning it, so none that an engine
# uses may fall out: one for each power of two of tokens and each setting of its layers.
TABLES = 1 << 14


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
    """`Plan.keeps` on a device, int32. As `limit_table`: not built inside of a capture."""
    return torch.tensor(keeps, dtype=torch.int32).to(device)


def fmix32(x: int) -> int:
    """Murmur3's 32-bit finaliser, as int32 (the bits of the uint32)."""
    x &= 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    x ^= x >> 16
    return x - 2**32 if x >= 2**31 else x


def limit_table(plan: Any, max_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """Limits of groups of 0, 1, ... max_tokens (or more) tokens, and the lowest number with one.

    C = max(n * min_capacity, ceil(n * gamma * T * k / E)) for a bin of n experts, in exact
    integers; NO_LIMIT in rows where no load can pass its limit: at most T * min(k, n)
    assignments come to a bin. Returns int32 [max_tokens + 1 or more, X], and that number of tokens
    (NO_LIMIT if none has a limit). Built once per plan and power of two of max_tokens: the first
    call of a size must not be inside of a CUDA graph's capture.

    plan: num_experts, top_k, gamma (a Fraction), min_capacity, bin_sizes are read.
    """
    return _limit_table(
        plan.num_experts,
        plan.top_k,
        plan.gamma.numerator,
        plan.gamma.denominator,
        plan.min_capacity,
        tuple(plan.bin_sizes),
        1 << max(max_tokens, 1).bit_length(),
        device,
    )


@lru_cache(maxsize=TABLES)
def _limit_table(
    E: int,
    k: int,
    numerator: int,
    denominator: int,
    min_capacity: int,
    bin_sizes: tuple[int, ...],
    max_tokens: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    columns: dict[int, list[int]] = {}
    binds = [False] * (max_tokens + 1)
    for n in set(bin_sizes):
        rise, base, least = n * numerator * k, denominator * E, n * min_capacity
        most = min(k, n)
        limits = [max(least, -(-rise * T // base)) for T in range(max_tokens + 1)]
        for T, limit in enumerate(limits):
            if limit < T * most:
                binds[T] = True
        columns[n] = [min(limit, NO_LIMIT) for limit in limits]
    first = binds.index(True) if True in binds else NO_LIMIT
    tensors = {n: torch.tensor(column, dtype=torch.int32) for n, column in columns.items()}
    table = torch.stack([tensors[n] for n in bin_sizes], dim=1)
    table[~torch.tensor(binds)] = NO_LIMIT
    return table.to(device), first
