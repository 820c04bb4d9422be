"""The gates of the GPU benchmarks: every row of a result is compared before it is timed.

Letters: T tokens, W places per token, A = T * W assignments, E experts, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class GateError(Exception):
    """A result is not what it should be."""


@dataclass(frozen=True)
class Reference:
    """What the experts should give: `exact` float32 [T, H], and the three errors of torch.

    errors: of the same layer with its products in the layer's dtype (by cuBLAS on a GPU), as
    `errors_of` measures them.
    """

    exact: Tensor
    errors: tuple[float, float, float]


def errors_of(out: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Largest error of an element, norm of all errors, norm of the worst row's over that row's."""
    error = out.float() - exact
    scale_T = exact.norm(dim=1)
    floor = 1e-3 * float(scale_T.mean()) + 1e-30  # of a row that is next to nothing
    worst = (error.norm(dim=1) / scale_T.clamp(min=floor)).max()
    return float(error.abs().max()), float(error.norm()), float(worst)


def loop(
    layer: Any, hidden: Tensor, weights: Tensor, experts: Tensor, dtype: torch.dtype
) -> Tensor:
    """The layer, expert by expert, products in `dtype`; float32 [T, H]."""
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for e in experts.unique().tolist():
        if e < 0:
            continue
        token, place = (experts == e).nonzero(as_tuple=True)
        gate, up = F.linear(hidden[token].to(dtype), layer.w13[e].to(dtype)).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, layer.w2[e].to(dtype)).float()
        out.index_add_(0, token, y * weights[token, place, None])
    return out


def reference(layer: Any, hidden: Tensor, weights: Tensor, experts: Tensor) -> Reference:
    """All rows, exact and as torch computes them. weights, experts: [T, W], -1 is no expert."""
    exact = loop(layer, hidden, weights, experts, torch.float32)
    torchs = loop(layer, hidden, weights, experts, hidden.dtype).to(hidden.dtype)
    return Reference(exact, errors_of(torchs, exact))


def gate_experts(name: str, out: Tensor, expected: Reference) -> float:
    """Compare all rows with float32 torch: at most twice the errors of torch in their dtype.

    Returns the worst error over what is allowed. Raises GateError above 1.
    """
    found = errors_of(out, expected.exact)
    ratios = [o / (2 * t + 1e-6) for o, t in zip(found, expected.errors, strict=True)]
    worst = max(ratios) if all(r == r for r in ratios) else math.inf
    if not worst <= 1:
        row = (out.float() - expected.exact).norm(dim=1).nan_to_num(math.inf).argmax()
        raise GateError(
            f"{name} at {out.shape[0]} tokens is off by {worst:.3g} times what is allowed (twice "
            f"torch's own error against float32), worst in row {int(row)}"
        )
    return worst


def gate_routing(name: str, ours: Any, expected: Any) -> None:
    """All integers are those of `route_torch`; weights, too, to float32's last bits."""
    for part in ("experts", "load_before", "load_after"):
        got, wanted = getattr(ours, part), getattr(expected, part)
        count = int((got.to(wanted.dtype) != wanted).sum())
        if count:
            raise GateError(f"{name}: {count} of {wanted.numel()} {part} differ from torch's")
    if not torch.allclose(ours.weights, expected.weights, rtol=1e-6, atol=0):
        raise GateError(f"{name}: weights differ from torch's by more than a millionth")


def gate_choice(name: str, experts: Tensor, expected: Tensor) -> None:
    """Experts from logits, whose scores may differ in the last bits: few rows go the other way."""
    T = experts.shape[0]
    other = int((experts.sort(dim=1).values != expected.sort(dim=1).values).any(1).sum())
    if other > max(2, T // 250):
        raise GateError(f"{name}: {other} of {T} rows routed otherwise from logits than by torch")


def seats_of(experts: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order` [A], `offsets` [E + 1] and `seat` [T, W] of experts [T, W], by torch alone; int32."""
    flat_A = experts.reshape(-1).long()
    order_A = flat_A.masked_fill(flat_A < 0, E).argsort(stable=True)
    loads_E = torch.bincount(flat_A[flat_A >= 0], minlength=E)
    offsets = F.pad(loads_E.cumsum(0), (1, 0)).int()
    seat_A = torch.empty_like(order_A)
    seat_A[order_A] = torch.arange(flat_A.numel(), device=flat_A.device)
    seat_TW = seat_A.masked_fill(flat_A < 0, -1).view(experts.shape)
    return order_A.int(), offsets, seat_TW.int()


def gate_seats(name: str, seats: Any, experts: Tensor, E: int) -> None:
    """Seats are those of their own experts, every one."""
    order, offsets, _ = seats_of(experts, E)
    held = int(offsets[-1])
    if not torch.equal(seats.offsets, offsets) or not torch.equal(seats.order[:held], order[:held]):
        raise GateError(f"{name}: seats are not those of the experts")
