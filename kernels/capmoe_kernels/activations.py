"""Names and parameters of the activations between the two products. Standard library only."""

from __future__ import annotations

import functools
from typing import NamedTuple

__all__ = ["ACTIVATIONS", "Activation", "resolve_activation"]

# vLLM's name -> the kernels' name. All but `_no_mul` have a gate.
_KINDS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "swigluoai": "silu",
    "swigluoai_uninterleave": "silu",
    "swiglustep": "swiglustep",
    "situ": "situ",
    "silu_no_mul": "silu",
    "gelu_no_mul": "gelu",
    "gelu_tanh_no_mul": "gelu_tanh",
    "relu2_no_mul": "relu2",
}
_ALIASES = {"gelu_pytorch_tanh": "gelu_tanh"}  # as vLLM's MoEActivation.from_str
ACTIVATIONS = tuple(_KINDS)


class Activation(NamedTuple):
    """An activation with vLLM's defaults filled in. Fields as the kernels take them."""

    kind: str
    gated: bool
    interleaved: bool
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


@functools.lru_cache(maxsize=64)
def resolve_activation(
    name: str,
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    swiglu_limit: float | None = None,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
) -> Activation:
    """What `name` means. Parameters as in :func:`fused_experts`.

    Raises ValueError for an unknown name or a parameter that is missing.
    """
    name = _ALIASES.get(name, name)
    if name not in _KINDS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    gated = not name.endswith("_no_mul")
    plain = Activation(_KINDS[name], gated, interleaved=name == "swigluoai")
    if name == "silu":
        return plain._replace(limit=swiglu_limit)
    if name == "swigluoai":
        return plain._replace(
            alpha=1.702 if swiglu_alpha is None else swiglu_alpha,
            beta=1.0 if swiglu_beta is None else swiglu_beta,
            limit=7.0 if swiglu_limit is None else swiglu_limit,
        )
    if name == "swigluoai_uninterleave":
        if swiglu_limit is None:
            raise ValueError(f"activation {name!r} has swiglu_limit None, expected a number")
        return plain._replace(
            alpha=1.0 if swiglu_alpha is None else swiglu_alpha,
            beta=0.0 if swiglu_beta is None else swiglu_beta,
            limit=swiglu_limit,
        )
    if name == "swiglustep":
        return plain._replace(limit=7.0 if swiglu_limit is None else swiglu_limit)
    if name == "situ":
        if situ_beta is None:
            raise ValueError(f"activation {name!r} has situ_beta None, expected a number")
        linear = 0.0 if situ_linear_beta is None else max(0.0, situ_linear_beta)
        return plain._replace(alpha=situ_beta, beta=linear)
    return plain
