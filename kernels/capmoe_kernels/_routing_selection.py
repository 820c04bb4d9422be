"""What the routing returns: who holds which expert. Letters: routing.py."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from capmoe_kernels.contract import Seats


@dataclass(frozen=True, eq=False)
class RoutedSelection:
    """Who holds which expert: the fields of `vllm_capmoe.torch_routing.Selection`, and `seats`.

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
