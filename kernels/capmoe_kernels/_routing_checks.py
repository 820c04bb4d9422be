"""What the routing accepts of scores, plan and the tensors beside them, as `checks` says it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from capmoe_kernels._routing_bids import METRICS
from capmoe_kernels.checks import FLOATS, check_beside, check_runs, check_tensor
from capmoe_kernels.contract import Plan
from capmoe_kernels.tables import Tables

_MAX_EXPERTS = 1024  # a program holds whole rows of scores in registers
_SIZE_LIMIT = 2**30  # of T * E: the part of a bid that holds token and expert has 30 bits
_TABLE_LIMIT = 2**31
_BINS_LIMIT = 2**29  # of groups * bins: a tag is 4 * group + 3 in 31 bits


def check_scores(scores_TE: Tensor, plan: Plan, interpreted: bool) -> None:
    check_tensor("scores_TE", scores_TE, dtypes=FLOATS, shape=("T", plan.num_experts), fits="plan")
    check_runs("scores_TE", scores_TE, interpreted)


def check_plan(plan: Plan, T: int, groups: int) -> None:
    E = plan.num_experts
    if not 1 <= E <= _MAX_EXPERTS:
        raise ValueError(f"plan.num_experts is {E}, but it must be from 1 to {_MAX_EXPERTS}.")
    if not 1 <= plan.top_k <= E or plan.top_k + plan.extra > E:
        raise ValueError(
            f"plan.top_k is {plan.top_k} and plan.extra {plan.extra}, but together they must be "
            f"from 1 to {E}, the experts."
        )
    if plan.metric not in METRICS:
        raise ValueError(
            f"plan.metric is {plan.metric!r}, but it must be one of {', '.join(METRICS)}."
        )
    if T * E >= _SIZE_LIMIT:
        raise ValueError(f"T * E is {T} * {E}, but it must be below {_SIZE_LIMIT}.")
    if plan.keeps and not 1 <= min(plan.keeps) <= max(plan.keeps) <= plan.top_k:
        raise ValueError(
            f"plan.keeps is {plan.keeps}, but its numbers must be from 1 to {plan.top_k}, top_k."
        )
    X = len(plan.bin_sizes)
    if 2 * (T + 1) * X >= _TABLE_LIMIT:
        raise ValueError(
            f"T is {T} with {X} devices in plan.bin_sizes, but 2 * (T + 1) times these must be "
            f"below {_TABLE_LIMIT}, the entries of the table of limits."
        )
    if groups < 1 or groups * max(plan.num_bins, X) >= _BINS_LIMIT:
        raise ValueError(
            f"num_requests is {groups}, but it must be at least 1, and times the {plan.num_bins} "
            f"bins of a request below {_BINS_LIMIT}."
        )


def check_one(
    name: str,
    tensor: Tensor | None,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int, ...],
    scores_TE: Tensor,
    needed: bool,
) -> None:
    """A tensor beside the scores. needed: this plan can't do without."""
    if tensor is None and needed:
        raise ValueError(f"{name} is None, but this plan needs a tensor {list(shape)}.")
    check_beside(name, tensor, dtypes, shape, scores_TE)


def check_tables(tables: Tables, plan: Plan, T: int, device: torch.device) -> None:
    """Tables that were made for a plan which differs in gamma and keeps at most."""
    made_for = tables.plan
    if plan is not made_for and made_for != replace(
        plan, gamma=made_for.gamma, keeps=made_for.keeps
    ):
        raise ValueError(f"tables were made for {made_for}, but the plan is {plan}.")
    for each in (tables.limits, tables.keeps):
        if each is not None and each.device != device:
            raise ValueError(f"tables are on {each.device}, but they must be on {device}.")
    if tables.limits is not None and len(tables.limits) <= T:
        raise ValueError(
            f"tables are for {len(tables.limits) - 1} tokens, but they must be for {T}, those of "
            "scores_TE."
        )
