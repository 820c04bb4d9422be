"""Which limit is in effect in a group. Letters: `torch_routing.py`."""

import torch
from torch import Tensor

from capmoe_kernels.contract import NO_LIMIT, Plan


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
