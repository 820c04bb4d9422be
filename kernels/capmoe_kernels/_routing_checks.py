"""What the routing accepts: checks raise ValueError with the argument, what came and what fits.

Host only, and only of what the host knows: shapes, types, devices, the plan.
"""

import torch
from torch import Tensor

from capmoe_kernels._routing_bids import METRICS
from capmoe_kernels.contract import Plan

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MAX_EXPERTS = 1024  # a program holds whole rows of scores in registers
_SIZE_LIMIT = 2**30  # of T * E: the part of a bid that holds token and expert has 30 bits
_TABLE_LIMIT = 2**31
_BINS_LIMIT = 2**29  # of groups * bins: a tag is 4 * group + 3 in 31 bits


def check_scores(scores_TE: Tensor, plan: Plan, interpreted: bool) -> None:
    if not isinstance(scores_TE, Tensor):
        raise ValueError(f"scores_TE is a {type(scores_TE).__name__}, but it must be a tensor.")
    E = plan.num_experts
    if scores_TE.dim() != 2 or scores_TE.shape[1] != E:
        raise ValueError(
            f"scores_TE has the shape {list(scores_TE.shape)}, but it must be [T, {E}], for the "
            f"{E} experts of plan."
        )
    if scores_TE.dtype not in _FLOATS:
        names = ", ".join(str(dtype) for dtype in _FLOATS)
        raise ValueError(f"scores_TE is {scores_TE.dtype}, but it must be one of {names}.")
    if not scores_TE.is_cuda and not interpreted:
        raise ValueError(
            f"scores_TE is on {scores_TE.device}, but it must be on a CUDA device (or on the CPU "
            "under Triton's interpreter, TRITON_INTERPRET=1)."
        )


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


def check_tensor(
    name: str,
    tensor: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    scores_TE: Tensor,
    needed: bool,
) -> None:
    if tensor is None:
        if needed:
            raise ValueError(f"{name} is None, but this plan needs a tensor {list(shape)}.")
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}, but it must be a tensor or None.")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}, but it must be one of {names}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has the shape {list(tensor.shape)}, but it must be {list(shape)} (the scores "
            f"are {list(scores_TE.shape)})."
        )
    if tensor.device != scores_TE.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but it must be on {scores_TE.device}, as the scores."
        )
