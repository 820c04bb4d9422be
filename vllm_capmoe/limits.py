"""The capacity of a bin, and which limit is in effect in a group. Letters: `reference.py`."""

from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from vllm_capmoe.plan import Plan

NO_LIMIT = 2**31 - 1
"""The capacity of a group in which no limit is in effect: every load is below it."""


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


def capacities(plan: Plan, experts: int, max_tokens: int) -> Tensor:
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


@lru_cache(maxsize=1 << 14)  # a captured graph reads its table without owning it
def _capacity_table(plan: Plan, max_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    sizes = torch.tensor(plan.bin_sizes)
    limit_by_size = {n: capacities(plan, n, max_tokens) for n in set(plan.bin_sizes)}
    limit_TX = torch.stack([limit_by_size[n] for n in plan.bin_sizes], dim=1)
    # A bin of n experts takes at most T * min(k, n) assignments of the top-k.
    most_TX = torch.arange(max_tokens + 1)[:, None] * sizes.clamp(max=plan.top_k)
    free_T = (limit_TX >= most_TX).all(dim=1)
    limited = (~free_T).nonzero().flatten()
    first = int(limited[0]) if len(limited) else NO_LIMIT
    table = limit_TX.clamp_(max=NO_LIMIT).masked_fill_(free_T[:, None], NO_LIMIT)
    return table.int().to(device), first


def capacity_table(plan: Plan, max_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """The limits of groups of 0, 1, ... max_tokens (or more) tokens, for look-ups by a tensor.

    Returns the table, int32 [max_tokens + 1 or more, X], with NO_LIMIT in the rows of groups in
    which no load can pass its limit, and the lowest number of tokens that has a limit (NO_LIMIT
    if none has). Built once for each power of two of max_tokens and kept.
    """
    return _capacity_table(plan, 1 << max(max_tokens, 1).bit_length(), device)


def count(index: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each number in [0, size) occurs. Integers, so order is nothing."""
    index_N = index.reshape(-1)
    zeros = torch.zeros(size, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index_N, torch.ones_like(index_N))


def group_limits(
    plan: Plan,
    table: Tensor,
    T: int,
    real_T: Tensor | None,
    prompt_T: Tensor | None,
    group_T: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor]:
    """int64 [G], the real tokens of each group, and int32 [G, X], its limits or NO_LIMIT.

    No limit is in effect in a group of fewer than min_tokens, in a group without a prompt token,
    and where no load can pass its limit (which the table of capacities says).
    """
    if group_T is not None:
        count_G = count(group_T, num_groups + 1)[:-1]
    elif real_T is not None:
        count_G = real_T.sum().reshape(1)
    else:
        count_G = torch.full((1,), T, device=table.device)
    limit_GX = table[count_G]
    if plan.min_tokens > 0:
        limit_GX = limit_GX.masked_fill((count_G < plan.min_tokens)[:, None], NO_LIMIT)
    if prompt_T is not None and prompt_T is not real_T:
        if group_T is None:
            prompts_G = prompt_T.sum().reshape(1)
        else:
            prompts_G = count(group_T.where(prompt_T, num_groups), num_groups + 1)[:-1]
        limit_GX = limit_GX.masked_fill((prompts_G == 0)[:, None], NO_LIMIT)
    return count_G, limit_GX


def below_the_busiest(limit_GX: Tensor, load_GB: Tensor) -> Tensor:
    """int32 [G, X]: the limits, none above the largest load of its group (fill busiest).

    load_GB: int64, the load of each bin before the limit. NO_LIMIT stays.
    """
    busiest_G1 = load_GB.amax(1, keepdim=True).int()
    return limit_GX.minimum(busiest_G1).where(limit_GX != NO_LIMIT, NO_LIMIT)
