"""Tensors and options as the routing kernels take them. Host only."""

import contextlib

import torch
from torch import Tensor

from capmoe_kernels.launch import ceil_div


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device: make it the tensor's."""
    if getattr(tensor, "is_cuda", False):
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


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
