"""What the routing is told and what it hands on, for the kernels and for plain torch alike.

Letters: T tokens, E experts, k per token, m extra candidates, W places per token, C capacity,
D devices, G groups (1, or one per request), X = 1, or D at level device. Loads the standard library
only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "COUNTERS",
    "NO_LIMIT",
    "SCORINGS",
    "TOTALS",
    "Plan",
    "Seats",
    "Selection",
    "Step",
    "fmix32",
]

NO_LIMIT = 2**31 - 1
"""The capacity of a group in which no limit is in effect: every load is below it."""

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
"""How scores are made of router logits; the last is the square root of log(1 + exp(x))."""

Numbers = TypeVar("Numbers", int, "Tensor")


def fmix32(x: Numbers) -> Numbers:
    """Murmur3's 32-bit finaliser of a number in [0, 2^32), or of an int64 tensor of such.

    x ^= x >> 16; x *= 0x85ebca6b; x ^= x >> 13; x *= 0xc2b2ae35; x ^= x >> 16, modulo 2^32.
    A product may pass 2^63, but the 32 lowest bits are right all the same.
    """
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the routing of one layer does: no `auto` is left, and all numbers fit together.

    `vllm_capmoe.plan.resolve` makes it of a configuration. Nothing here depends on a step.

    mode: "off", "drop", "expanded" or "reroute". num_experts: E. top_k: k.
    gamma: exact, None for infinite.
    metric, level, scope, priority: the words of the configuration.
    local: extra candidates are on the token's own device only.
    extra: m, already cut to what there can be; in reroute the most experts that a token can be
        given; 0 in the other modes.
    busiest: no limit is above the largest load before it.
    max_experts: the most experts of one token, or None.
    renormalize: rescale the kept weights to sum to one.
    bin_sizes: experts per bin: (1,) at level expert, (n_0, ..., n_{D-1}) at level device.
    keeps: k0, the experts that decode keep leaves to each decode token, in a step of 0, 1, ...
        decode tokens; the last one for all larger steps. () where it is off, or k0 is always k.
    """

    mode: str
    num_experts: int
    top_k: int
    gamma: Fraction | None = None
    metric: str = "score"
    level: str = "expert"
    scope: str = "batch"
    priority: str = "uniform"
    min_capacity: int = 1
    min_tokens: int = 0
    local: bool = False
    extra: int = 0
    busiest: bool = False
    max_experts: int | None = None
    renormalize: bool = False
    bin_sizes: tuple[int, ...] = (1,)
    keeps: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """W, the columns of the result: the most experts a token can hold."""
        width = self.top_k + self.extra
        return width if self.max_experts is None else min(width, self.max_experts)

    @property
    def acts(self) -> bool:
        """Whether a token may hold others than its top-k."""
        return self.mode != "off" or self.keeps != ()

    @property
    def num_bins(self) -> int:
        """B, the bins of one group."""
        return self.num_experts if self.level == "expert" else len(self.bin_sizes)


class Step(TypedDict):
    """What is known of the rows of a step, as `route_torch` and `route_triton` take it and say."""

    is_padding_T: Tensor | None
    is_decode_T: Tensor | None
    request_T: Tensor | None
    num_requests: int
    device_E: Tensor | None
    token_device_T: Tensor | None
    seed: int


@dataclass(frozen=True, eq=False)
class Seats:
    """The held assignments, expert by expert: what a grouped product needs, without alignment.

    An assignment is a place of the routing, numbered a = token * W + place: its token is a // W,
    its weight `weights.view(-1)[a]`. A seat is a position in `order`.

    order: int32 [T * W], assignments ascending by (expert, token). From offsets[E] on nothing is
        read; the routing writes -1 there, `make_seats` nothing.
    offsets: int32 [E + 1], the exclusive prefix sum of the loads: expert e has the seats
        offsets[e] ... offsets[e + 1] - 1.
    seat: int32 [T, W], the seat of each place, the inverse of `order`; -1 where a place is
        unused. None of `make_seats`.

    Example: experts [[1, 0], [1, -1]] and E = 2 give order [1, 0, 2, -1], offsets [0, 1, 3] and
    seat [[1, 0], [2, -1]].
    """

    order: Tensor
    offsets: Tensor
    seat: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """Who holds which expert. All fields are tensors on the device of the scores.

    experts: int32 [T, W], by descending score, ties to the lower expert; -1 where unused.
    weights: float32 [T, W]; 0 where unused.
    load_before: int32 [E], the top-k assignments of the real tokens.
    load_after: int32 [E], the assignments that are held.
    capacity: int32 [G, X]; NO_LIMIT where none is in effect.
    kept: int64 [], the top-k assignments that are held; of decode tokens, what decode keep gave
        them in the place of their top-k.
    left_without: int64 [], the real tokens that hold no expert.
    mass, lost: int64 [], gate mass in units of 2^-20 (S of an assignment rounded down, from 0 to
        1024), added up over the top-k assignments of the real tokens, and over those of them that
        are not held.
    prompts: int64 [], the real tokens that are not decode.
    seats: the held assignments by expert, which the kernels hand out; None of plain torch.
    """

    experts: Tensor
    weights: Tensor
    load_before: Tensor
    load_after: Tensor
    capacity: Tensor
    kept: Tensor
    left_without: Tensor
    mass: Tensor
    lost: Tensor
    prompts: Tensor
    seats: Seats | None = None

    @property
    def dropped(self) -> Tensor:
        """int64 []: top-k assignments of real tokens that are not held."""
        return self.load_before.sum() - self.kept

    @property
    def expanded(self) -> Tensor:
        """int64 []: held assignments outside of the token's top-k."""
        return self.load_after.sum() - self.kept


def _active(step: str, when: str) -> Callable[[Any], Any]:
    """Experts with a load. step: "prompt", steps with a prompt token, or "decode", the others."""

    def count(s: Any) -> Any:
        loads_E = s.load_before if when == "before" else s.load_after
        return (loads_E > 0).sum(-1) * ((s.prompts > 0) == (step == "prompt"))

    return count


COUNTERS: dict[str, Callable[[Any], Any]] = {
    "steps": lambda s: s.load_before.max(-1) > 0,  # a dummy step has no tokens
    "dropped": lambda s: s.dropped,
    "expanded": lambda s: s.expanded,
    "left_without": lambda s: s.left_without,
    "max_before": lambda s: s.load_before.max(-1),
    "max_after": lambda s: s.load_after.max(-1),
    "mass": lambda s: s.mass,
    "lost": lambda s: s.lost,
    "prompt_steps": lambda s: s.prompts > 0,
    "prompt_active_before": _active("prompt", "before"),
    "prompt_active_after": _active("prompt", "after"),
    "decode_active_before": _active("decode", "before"),
    "decode_active_after": _active("decode", "after"),
}
"""What a step adds to each counter of a layer, beside the loads: an integer or bool, of a
`Selection` of numpy arrays, which may have an axis of steps before their own. The routing kernel
counts them by itself, in this order (`_routing_kernels.count_step`).
"""
TOTALS = tuple(COUNTERS)
