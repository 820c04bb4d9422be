"""The numbers of a plan that may change while it is in use. Host only. Letters: contract.py.

A captured CUDA graph replays launches, whose sizes and plain numbers stay as they were. What it
reads through a pointer is looked up anew: so the limits and k0 stand in tables at one address, and
another capacity factor, or none, is written into them between two steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capmoe_kernels.capacity import limits_by_tokens
from capmoe_kernels.contract import NO_LIMIT, Plan

__all__ = ["Tables"]


@dataclass(eq=False)
class Tables:
    """What `route_triton` reads in the place of `gamma` and `keeps` of its plan.

    plan: the one that they were made for; another may only differ in these two.
    limits: int32 [max_tokens + 1, X], the limits of a group by its tokens; None where the plan had
        no gamma, and no limit can come.
    least: no group of fewer tokens has a limit, whatever gamma.
    keeps: int32 [len(plan.keeps)], k0 by the decode tokens of a step; None where there were none.
    """

    plan: Plan
    limits: Tensor | None
    least: int
    keeps: Tensor | None

    @classmethod
    def of(cls, plan: Plan, max_tokens: int, device: torch.device) -> Tables:
        """Tables for steps of up to max_tokens tokens, set to what the plan says."""
        limits, keeps = None, None
        if plan.mode != "off" and plan.gamma is not None:
            shape = (max_tokens + 1, len(plan.bin_sizes))
            limits = torch.empty(shape, dtype=torch.int32, device=device)
        if plan.keeps:
            keeps = torch.empty(len(plan.keeps), dtype=torch.int32, device=device)
        tables = cls(plan, limits, _least(plan), keeps)
        tables.set(plan)
        return tables

    def set(self, plan: Plan) -> None:
        """Write the gamma (None: no limit) and the keeps (fewer: the last one for all other steps,
        none: all is kept) of a plan, in place.

        Raises:
            ValueError: there is no table for what the plan has.
        """
        if (plan.gamma is not None and self.limits is None) or (
            len(plan.keeps) > (0 if self.keeps is None else len(self.keeps))
        ):
            raise ValueError(
                f"plan has gamma {plan.gamma} and keeps {plan.keeps}, but these tables were made "
                f"for gamma {self.plan.gamma} and keeps {self.plan.keeps}."
            )
        if self.limits is not None and plan.gamma is None:
            self.limits.fill_(NO_LIMIT)
        elif self.limits is not None:
            self.limits.copy_(limits_by_tokens(plan, len(self.limits) - 1)[0])
        if self.keeps is not None:
            keeps = plan.keeps or (plan.top_k,)
            keeps += keeps[-1:] * (len(self.keeps) - len(keeps))
            self.keeps.copy_(torch.tensor(keeps, dtype=torch.int32))


def _least(plan: Plan) -> int:
    """The lowest T of which min(k, n) assignments a token can pass n * min_capacity in some bin."""
    tokens = [n * plan.min_capacity // min(plan.top_k, n) + 1 for n in plan.bin_sizes if n > 0]
    return min(tokens, default=NO_LIMIT)
