"""C, the capacity of a bin, and its table: for the kernels and for plain torch. Host only.

Letters: contract.py; n experts of a bin, X bins of different size.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from capmoe_kernels.contract import NO_LIMIT, Plan

__all__ = ["TABLES", "capacity", "capacity_table", "limits_by_tokens"]

# Tables that are kept. A captured graph reads a table without owning it, so none that an engine
# uses may fall out: one for each power of two of tokens and each setting of its layers.
TABLES = 1 << 14


def capacity(
    tokens: int,
    *,
    num_experts: int,
    top_k: int,
    gamma: Fraction,
    min_capacity: int = 1,
    experts: int = 1,
) -> int:
    """The limit of a bin of n experts: max(n * min_capacity, ceil(n * gamma * T * k / E)).

    With n = 1 the paper's C = ceil(gamma * N), N = T * k / E the mean load, at least
    min_capacity; with n = n_d the limit of device d ("device-level capacity"). tokens is T of
    the group. Integers only, so that gamma = 1.1 and a mean load of 10 give 11:

        >>> capacity(40, num_experts=8, top_k=2, gamma=Fraction("1.1"))
        11
    """
    assignments = experts * gamma.numerator * tokens * top_k
    ceiling = -(-assignments // (gamma.denominator * num_experts))
    return max(experts * min_capacity, ceiling)


def _capacities(plan: Plan, experts: int, max_tokens: int) -> Tensor:
    """int64 [max_tokens + 1]: `capacity` of a bin of n experts for 0, 1, ... tokens."""
    assert plan.gamma is not None
    per_token = plan.gamma * experts * plan.top_k / plan.num_experts
    if max(per_token.numerator * max_tokens, per_token.denominator) < 2**62:
        ceilings_T = -(-torch.arange(max_tokens + 1) * per_token.numerator // per_token.denominator)
        return ceilings_T.clamp_(min=min(experts * plan.min_capacity, NO_LIMIT))
    exact = [
        capacity(
            tokens,
            num_experts=plan.num_experts,
            top_k=plan.top_k,
            gamma=plan.gamma,
            min_capacity=plan.min_capacity,
            experts=experts,
        )
        for tokens in range(max_tokens + 1)
    ]
    return torch.tensor([min(limit, NO_LIMIT) for limit in exact])


def capacity_table(plan: Plan, max_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """The limits of groups of 0, 1, ... max_tokens (or more) tokens, for look-ups by a tensor.

    Returns the table, int32 [max_tokens + 1 or more, X], with NO_LIMIT in the rows of groups in
    which no load can pass its limit, and the lowest number of tokens that has a limit (NO_LIMIT
    if none has). Built once for each power of two of max_tokens, and kept: the first call of a
    size must not be inside of a CUDA graph's capture.
    """
    return _capacity_table(_numbers(plan), 1 << max(max_tokens, 1).bit_length(), device)


def _numbers(plan: Plan) -> Plan:
    """What a table depends on: plans that differ in other things share one."""
    return Plan(
        mode="",
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        gamma=plan.gamma,
        min_capacity=plan.min_capacity,
        bin_sizes=plan.bin_sizes,
    )


@lru_cache(maxsize=TABLES)
def _capacity_table(plan: Plan, max_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    table, first = limits_by_tokens(plan, max_tokens)
    return table.to(device), first


def limits_by_tokens(plan: Plan, max_tokens: int) -> tuple[Tensor, int]:
    """`capacity_table` for 0, 1, ... max_tokens tokens, on the CPU; not to be written to.

    The last ones are kept: layers that are alike get their numbers one after the other.
    """
    return _limits_by_tokens(_numbers(plan), max_tokens)


@lru_cache(maxsize=8)
def _limits_by_tokens(plan: Plan, max_tokens: int) -> tuple[Tensor, int]:
    sizes = torch.tensor(plan.bin_sizes)
    limit_by_size = {n: _capacities(plan, n, max_tokens) for n in set(plan.bin_sizes)}
    limit_TX = torch.stack([limit_by_size[n] for n in plan.bin_sizes], dim=1)
    # A bin of n experts takes at most T * min(k, n) assignments of the top-k.
    most_TX = torch.arange(max_tokens + 1)[:, None] * sizes.clamp(max=plan.top_k)
    free_T = (limit_TX >= most_TX).all(dim=1)
    limited = (~free_T).nonzero().flatten()
    first = int(limited[0]) if len(limited) else NO_LIMIT
    table = limit_TX.clamp_(max=NO_LIMIT).masked_fill_(free_T[:, None], NO_LIMIT)
    return table.int(), first
