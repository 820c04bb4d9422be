"""What the routing returns: who holds which expert, and their seats. Letters: routing.py."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Seats:
    """The held assignments, expert by expert: what a grouped product needs, without alignment.

    An assignment is a place of the result, numbered a = token * W + place: its token is a // W,
    its weight `weights.view(-1)[a]`. A seat is a position in `order`.

    order: int32 [T * W], assignments ascending by (expert, token); -1 in the rest, from
        offsets[E] on.
    offsets: int32 [E + 1], the exclusive prefix sum of the loads: expert e has the seats
        offsets[e] ... offsets[e + 1] - 1, of which there are load_after[e].
    seat: int32 [T, W], the seat of each place, the inverse of `order`; -1 where a place is
        unused.

    Example: experts [[1, 0], [1, -1]] and E = 2 give order [1, 0, 2, -1], offsets [0, 1, 3] and
    seat [[1, 0], [2, -1]].
    """

    order: Tensor
    offsets: Tensor
    seat: Tensor


@dataclass(frozen=True, eq=False)
class RoutedSelection:
    """Who holds which expert: the fields of `vllm_capmoe.reference.Selection`, and `seats`.

    experts: int32 [T, W], by descending score, ties to the lower expert; -1 where unused.
    weights: float32 [T, W]; 0 where unused.
    load_before: int32 [E], the top-k assignments of the real tokens.
    load_after: int32 [E], the assignments that are held.
    capacity: int32 [G, X]; NO_LIMIT where none is in effect.
    kept: int64 [], the top-k assignments that are held.
    left_without: int64 [], the real tokens that hold no expert.
    mass, lost: int64 [], gate mass in units of 2^-20 (S of an assignment rounded down, from 0 to
        1024), added up over the top-k assignments of real tokens, and over those of them not held.
    prompts: int64 [], the real tokens that are not decode.
    seats: the held assignments by expert.
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
    seats: Seats

    @property
    def dropped(self) -> Tensor:
        """int64 []: top-k assignments of real tokens that are not held."""
        return self.load_before.sum() - self.kept

    @property
    def expanded(self) -> Tensor:
        """int64 []: held assignments outside of the token's top-k."""
        return self.load_after.sum() - self.kept
