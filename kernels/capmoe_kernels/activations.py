"""The activations between the two products: one row of the table each, for every backend.

`resolve_activation` looks a name up and fills in the parameters. Plain torch computes by the row's
own formula. The kernels get its `kind`, whose formula stands in `_activation_kernels.py`; they
refuse to be compiled for a kind that they don't know.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "resolve_activation"]


@dataclass(frozen=True)
class Activation:
    """An activation with its parameters. Definitions: vLLM 0.32, layers/activation.py.

    name: vLLM's.
    kind: what the kernels call its formula.
    gated: whether the first product has gates and ups, or one number each.
    formula: in torch, of this object and gates and ups (or the one tensor) [N, I], which it may
        overwrite.
    post_op: the name and algorithm by which oneDNN applies the formula to its product; None where
        it can't. Of gates, without parameters.
    interleaved: gates and ups take turns; else gates come first.
    alpha, beta, limit: the parameters, here vLLM's defaults; limit None: nothing is cut.
    arguments: which argument of `resolve_activation` is which parameter.
    required: arguments that have no default.
    """

    name: str
    kind: str
    gated: bool
    formula: Callable[..., Tensor]
    post_op: tuple[str, str] | None = None
    interleaved: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    arguments: tuple[tuple[str, str], ...] = ()
    required: tuple[str, ...] = ()

    def compute(self, *parts: Tensor) -> Tensor:
        """Of gates and ups [N, I], or of the one tensor without a gate; may overwrite them."""
        return self.formula(self, *parts)

    @property
    def fused(self) -> tuple[str, str] | None:
        """oneDNN's post-op with these parameters, None if torch has to compute."""
        plain = self.limit is None and self.alpha == 1.0 and self.beta == 0.0
        return self.post_op if plain else None


def _silu(act: Activation, x: Tensor) -> Tensor:
    return F.silu(x)


def _gelu(act: Activation, gate: Tensor, up: Tensor | None = None) -> Tensor:
    y = F.gelu(gate)
    return y if up is None else y.mul_(up)


def _gelu_tanh(act: Activation, gate: Tensor, up: Tensor | None = None) -> Tensor:
    y = F.gelu(gate, approximate="tanh")
    return y if up is None else y.mul_(up)


def _relu2(act: Activation, x: Tensor) -> Tensor:
    return F.relu(x).square_()


def _swiglu(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    if act.limit is not None:
        gate, up = gate.clamp_(max=act.limit), up.clamp_(-act.limit, act.limit)
    glu = F.silu(gate) if act.alpha == 1.0 else (gate * act.alpha).sigmoid_().mul_(gate)
    if act.beta == 0.0:
        return glu.mul_(up)
    # (up + beta) * glu without rounding up + beta to the input dtype first.
    return torch.addcmul(glu if act.beta == 1.0 else glu * act.beta, up, glu)


def _swiglustep(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    assert act.limit is not None
    return F.silu(gate).clamp_(max=act.limit).mul_(up.clamp_(-act.limit, act.limit))


def _situ(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """alpha is vLLM's beta, and beta its linear beta: up passes unchanged unless it is above 0."""
    dtype, gate, up = gate.dtype, gate.float(), up.float()
    gate = torch.tanh(gate / act.alpha).mul_(act.alpha).mul_(gate.sigmoid())
    if act.beta > 0:
        up = torch.tanh(up / act.beta).mul_(act.beta)
    return gate.mul_(up).to(dtype)


_LIMIT = ("swiglu_limit", "limit")
_SWIGLU = (("swiglu_alpha", "alpha"), ("swiglu_beta", "beta"), _LIMIT)

_TABLE = {
    act.name: act
    for act in (
        Activation("silu", "silu", True, _swiglu, ("swish", ""), arguments=(_LIMIT,)),
        Activation("gelu", "gelu", True, _gelu, ("gelu", "none")),
        Activation("gelu_tanh", "gelu_tanh", True, _gelu_tanh, ("gelu", "tanh")),
        Activation(
            "swigluoai",
            "silu",
            True,
            _swiglu,
            interleaved=True,
            alpha=1.702,
            beta=1.0,
            limit=7.0,
            arguments=_SWIGLU,
        ),
        Activation(
            "swigluoai_uninterleave",
            "silu",
            True,
            _swiglu,
            arguments=_SWIGLU,
            required=("swiglu_limit",),
        ),
        Activation("swiglustep", "swiglustep", True, _swiglustep, limit=7.0, arguments=(_LIMIT,)),
        Activation(
            "situ",
            "situ",
            True,
            _situ,
            arguments=(("situ_beta", "alpha"), ("situ_linear_beta", "beta")),
            required=("situ_beta",),
        ),
        Activation("silu_no_mul", "silu", False, _silu, ("swish", "")),
        Activation("gelu_no_mul", "gelu", False, _gelu, ("gelu", "none")),
        Activation("gelu_tanh_no_mul", "gelu_tanh", False, _gelu_tanh, ("gelu", "tanh")),
        Activation("relu2_no_mul", "relu2", False, _relu2),
    )
}
_ALIASES = {"gelu_pytorch_tanh": "gelu_tanh"}  # as vLLM's MoEActivation.from_str
ACTIVATIONS = tuple(_TABLE)
"""The names that are known, vLLM's."""


@functools.lru_cache(maxsize=64)
def resolve_activation(
    name: str,
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    swiglu_limit: float | None = None,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
) -> Activation:
    """The activation `name` with these parameters, which mean what :func:`fused_experts` says.

    Raises ValueError for an unknown name or a parameter that is missing.
    """
    given = {
        "swiglu_alpha": swiglu_alpha,
        "swiglu_beta": swiglu_beta,
        "swiglu_limit": swiglu_limit,
        "situ_beta": situ_beta,
        "situ_linear_beta": situ_linear_beta,
    }
    act = _TABLE.get(_ALIASES.get(name, name))
    if act is None:
        raise ValueError(f"activation is {name!r}, but it must be one of {', '.join(ACTIVATIONS)}.")
    for argument in act.required:
        if given[argument] is None:
            raise ValueError(f"activation {name!r} has {argument} None, but it must be a number.")
    parameters: dict[str, Any] = {field: given[argument] for argument, field in act.arguments}
    changes = {field: value for field, value in parameters.items() if value is not None}
    return dataclasses.replace(act, **changes)
