"""The checks of tensors and experts that all backends have in common, and their one sentence.

Every check raises ValueError: "X is A, but it must be B.". Host only, and only of what the host
knows: types, shapes, strides, devices; never of a tensor's values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)
"""What experts' weights may be."""


def check_tensor(
    name: str,
    tensor: object,
    *,
    dtypes: Sequence[torch.dtype] = (),
    shape: Sequence[int | str] | None = None,
    device: torch.device | None = None,
    fits: str = "",
    optional: bool = False,
) -> None:
    """Raise ValueError unless `tensor` is one, and as it must be.

    dtypes: those accepted; () for any. shape: sizes, or letters for those that may be any.
    device: where it must be; None for anywhere. fits: the tensor that says so, for the sentence.
    optional: None is accepted.
    """
    if tensor is None and optional:
        return
    if not isinstance(tensor, Tensor):
        wanted = "a tensor or None" if optional else "a tensor"
        raise ValueError(f"{name} is a {type(tensor).__name__}, but it must be {wanted}.")
    by = f", by {fits}" if fits else ""
    if dtypes and tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} is {tensor.dtype}, but it must be {wanted}{by}.")
    if shape is not None and not _has_shape(tensor, shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{name} has the shape {list(tensor.shape)}, but it must be [{wanted}]{by}."
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but it must be on {device}{by}.")


def check_beside(
    name: str, tensor: object, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], scores: Tensor
) -> None:
    """`check_tensor` of None, or of a tensor that belongs to scores [T, E]."""
    check_tensor(
        name,
        tensor,
        dtypes=dtypes,
        shape=shape,
        device=scores.device,
        fits=f"the scores {list(scores.shape)}",
        optional=True,
    )


def _has_shape(tensor: Tensor, shape: Sequence[int | str]) -> bool:
    return (
        tuple(tensor.shape) == shape
        or tensor.dim() == len(shape)
        and all(
            isinstance(wanted, str) or size == wanted
            for size, wanted in zip(tensor.shape, shape, strict=True)
        )
    )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless it is."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has the strides {list(tensor.stride())}, but it must be contiguous, of the "
            f"shape {list(tensor.shape)}."
        )


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the elements of a row stand beside each other."""
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has the strides {list(tensor.stride())}, but the last must be 1.")


def check_runs(name: str, tensor: Tensor, interpreted: bool) -> None:
    """Raise ValueError unless Triton's kernels run on the tensor's device."""
    wanted = "cpu" if interpreted else "cuda"
    if tensor.device.type != wanted:
        where = "under" if interpreted else "without"
        raise ValueError(
            f"{name} is on {tensor.device}, but it must be on {wanted} {where} TRITON_INTERPRET=1."
        )


def check_experts(
    w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None, gated: bool
) -> None:
    """Raise ValueError unless weights and biases of experts fit together.

    w13: [E, 2I, H], or [E, I, H] without gates. w2: [E, H, I]. w13_bias: [E, 2I] or [E, I].
    w2_bias: [E, H].
    """
    check_tensor("w2", w2, dtypes=WEIGHTS, shape=("E", "H", "I"))
    num_experts, hidden, intermediate = w2.shape
    wide = 2 * intermediate if gated else intermediate
    fits = f"w2 {list(w2.shape)} and an activation {'with' if gated else 'without'} gates"
    check_tensor("w13", w13, dtypes=[w2.dtype], shape=(num_experts, wide, hidden), fits=fits)
    for name, bias, columns in (("w13_bias", w13_bias, wide), ("w2_bias", w2_bias, hidden)):
        shape = (num_experts, columns)
        check_tensor(name, bias, dtypes=WEIGHTS, shape=shape, fits=fits, optional=True)
