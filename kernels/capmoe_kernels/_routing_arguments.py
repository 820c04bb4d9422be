"""Tensors and options as the routing kernels take them. Host only."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from capmoe_kernels.launch import ceil_div

Rest = ParamSpec("Rest")
Result = TypeVar("Result")
Routes = Callable[Concatenate[Tensor, Rest], Result]


def on_device_of_scores(function: Routes[Rest, Result]) -> Routes[Rest, Result]:
    """Launches go to the current device: make it that of the first argument, meanwhile."""

    @functools.wraps(function)
    def on_device(scores_TE: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        if not getattr(scores_TE, "is_cuda", False):
            return function(scores_TE, *args, **kwargs)
        with torch.cuda.device(scores_TE.device):
            return function(scores_TE, *args, **kwargs)

    return on_device


def ints(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


def options(warps: int) -> dict[str, int]:
    """Compiler options. With the most registers that the warps of one program can have named, ptxas
    spills none; left to itself it spills a few for a second program on the same multiprocessor.
    """
    if torch.version.hip is not None:
        return {"num_warps": warps}
    return {"num_warps": warps, "maxnreg": min(255, 2048 // warps)}


def up_to_four(size: int) -> int:
    """The next multiple of four: int32 arrays that start there are aligned to 16 bytes."""
    return ceil_div(size, 4) * 4


def rows(tensor: Tensor) -> Tensor:
    """A matrix whose rows are contiguous; a copy only if they are not."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def ids(tensor: Tensor) -> Tensor:
    """int32 or int64; a copy only if it is neither."""
    return tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.to(torch.int32)


def flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else ids(tensor).contiguous()


def mask(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous().view(torch.uint8)
