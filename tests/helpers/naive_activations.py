"""The activations, a line each, after vLLM 0.32's layers/activation.py: the oracle of the experts.

Nothing is shared with the packages, and a name that isn't here is a KeyError: a new activation has
no oracle until it is written down here too.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(
    gate: Tensor, up: Tensor, limit: float = math.inf, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def swigluoai(
    gate: Tensor, up: Tensor, limit: float = 7.0, alpha: float = 1.702, beta: float = 1.0
) -> Tensor:
    return swiglu(gate, up, limit, alpha, beta)


def swiglustep(gate: Tensor, up: Tensor, limit: float = 7.0) -> Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def situ(gate: Tensor, up: Tensor, beta: float, linear_beta: float | None = None) -> Tensor:
    up = up if linear_beta is None else linear_beta * torch.tanh(up / linear_beta)
    return beta * torch.tanh(gate / beta) * gate.sigmoid() * up


ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_no_mul": F.silu,
    "gelu_no_mul": F.gelu,
    "gelu_tanh_no_mul": lambda x: F.gelu(x, approximate="tanh"),
    "relu2_no_mul": lambda x: F.relu(x).square(),
}
PAIR: dict[str, Callable[..., Tensor]] = {
    "silu": lambda gate, up, limit=math.inf: swiglu(gate, up, limit),
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "swigluoai": swigluoai,
    "swigluoai_uninterleave": swiglu,
    "swiglustep": swiglustep,
    "situ": situ,
}


def activate(name: str, h: Tensor, **parameters: float | None) -> Tensor:
    """The activation of h, [N, 2I] or without a gate [N, I], in its dtype.

    parameters: swiglu_alpha, swiglu_beta, swiglu_limit, situ_beta and situ_linear_beta, as
        `fused_experts` takes them; None is as if not given.
    """
    if name in ONE:
        return ONE[name](h)
    gate, up = (h[:, ::2], h[:, 1::2]) if name == "swigluoai" else h.chunk(2, dim=1)
    given = {key: value for key, value in parameters.items() if value is not None}
    return PAIR[name](gate, up, **{key.split("_", 1)[1]: value for key, value in given.items()})
