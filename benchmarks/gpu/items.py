"""What run_gpu.py measures, and in which order. Standard library only.

An item is one row of the results, and what a failure costs: one step, shape, number of tokens and
part of a layer, done by one contender.

    parts    experts   the experts, from seats that torch made
             routing   logits to seats and counters, no limit (the call that the engine makes)
             limit     the same with Token Drop and gamma = 1.5
             layer     routing without a limit and experts in one go
             roofs     the largest rate of bf16 products, and of a copy, on this card
    who      ours; loop (a cuBLAS product per expert), grouped (torch._grouped_mm), vllm; in step
             `ab` the name of a choice
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from _shapes import SHAPES, TINY, Shape  # noqa: E402

from capmoe_kernels.launch import _FULL, _TWIN, Chip, ExpertsConfig, default_config, fit  # noqa: E402

GOAL_SHAPES = ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe", "deepseek-v2-lite")
TOKENS = (8192, 1024, 64, 16, 1, 4096)
DRY_SHAPES = {s.name: s for s in (TINY, Shape("tiny-fine", 32, 16, 16, 4))}
DRY_TOKENS = (9, 1)
LIMIT_GAMMA = 1.5
SMOKE = (("experts", "ours"), ("routing", "ours"), ("limit", "ours"))
TIMES = (
    *(("experts", "ours"), ("experts", "vllm"), ("layer", "ours"), ("layer", "vllm")),
    *(("routing", "ours"), ("routing", "vllm"), ("limit", "ours")),
    *(("experts", "loop"), ("experts", "grouped")),
)
STEPS = ("compile", "smoke", "time", "ab", "tests")


@dataclass(frozen=True)
class Item:
    step: str
    shape: str
    tokens: int
    part: str
    who: str = "ours"

    def __str__(self) -> str:
        return f"{self.step}/{self.shape}/{self.tokens}/{self.part}/{self.who}"


@dataclass(frozen=True)
class Grid:
    """Shapes by name, and token counts, of one run."""

    shapes: dict[str, Shape]
    tokens: tuple[int, ...]

    @staticmethod
    def of(dry: bool) -> Grid:
        if dry:
            return Grid(DRY_SHAPES, DRY_TOKENS)
        return Grid({name: SHAPES[name] for name in GOAL_SHAPES}, TOKENS)

    def smoke(self) -> list[Item]:
        return self._round_robin("smoke", SMOKE)

    def time(self) -> list[Item]:
        return [Item("time", "-", 0, "roofs"), *self._round_robin("time", TIMES)]

    def _round_robin(self, step: str, what: tuple[tuple[str, str], ...]) -> list[Item]:
        """By T, then by shape: after any minute there is something of everything."""
        return [
            Item(step, shape, tokens, part, who)
            for tokens in self.tokens
            for shape in self.shapes
            for part, who in what
        ]

    def ab(self) -> list[Item]:
        if self.tokens == DRY_TOKENS:
            points = [(c, s, self.tokens[0]) for c in ("pdl", "group-1") for s in self.shapes]
        else:
            points = [(c, s, t) for c, (_, where) in CHOICES.items() for s, t in where]
        return [Item("ab", shape, tokens, "experts", choice) for choice, shape, tokens in points]

    def compiled(self, items: list[Item]) -> list[Item]:
        """What has to be compiled for `items`, once each and in their order."""
        found: dict[Item, None] = {}
        for item in items:
            part = "routing" if item.part == "layer" else item.part
            choice = item.who if item.step == "ab" else "ours"
            if item.part != "roofs" and item.who in ("ours", choice):
                found[Item("compile", item.shape, item.tokens, part, choice)] = None
        return list(found)


# --- A/B choices --------------------------------------------------------------------------------


def _products(config: ExpertsConfig, **changes: Any) -> ExpertsConfig:
    return replace(
        config,
        gate_up=replace(config.gate_up, **changes),
        down=replace(config.down, **changes),
    )


def _tile(config: ExpertsConfig, tile: Any, chip: Chip) -> ExpertsConfig:
    tile = fit(tile, chip, 2)
    return replace(config, gate_up=tile, down=tile)


def _block_m(config: ExpertsConfig, factor: float) -> ExpertsConfig:
    rows = max(16, int(config.gate_up.block_m * factor))
    return _products(config, block_m=rows, group_m=8)


Choice = Callable[[ExpertsConfig, Chip], ExpertsConfig]
_LARGE = tuple((shape, 8192) for shape in GOAL_SHAPES)
_FINE = _LARGE[1:]
_SMALL = (("mixtral-8x7b", 64), ("mixtral-8x7b", 128), ("qwen3-30b-a3b", 1024))
# Every one is set against what the heuristics choose; where that is the same, no row comes of it.
CHOICES: dict[str, tuple[Choice, tuple[tuple[str, int], ...]]] = {
    "flatten": (lambda c, _: _products(c, flatten=True), _LARGE),
    "no-flatten": (lambda c, _: _products(c, flatten=False), _LARGE),
    "twin": (lambda c, chip: _tile(c, _TWIN, chip), _FINE),
    "full": (lambda c, chip: _tile(c, _FULL, chip), _FINE),
    "group-1": (lambda c, _: _products(c, group_m=1), (*_SMALL, _LARGE[0])),
    "group-8": (lambda c, _: _products(c, group_m=8), _SMALL),
    "half-m": (lambda c, _: _block_m(c, 0.5), _SMALL),
    "double-m": (lambda c, _: _block_m(c, 2), _SMALL),
    "pdl": (
        lambda c, _: replace(c, pdl=True),
        (("mixtral-8x7b", 1), ("olmoe", 16), ("qwen3-30b-a3b", 1024), _LARGE[1]),
    ),
    "pointers": (lambda c, _: _products(c, use_tma=False), (_LARGE[0],)),
}


def config_of(shape: Shape, tokens: int, chip: Chip, choice: str = "ours") -> ExpertsConfig:
    """The heuristics' launches (no tuned file), or those with a choice of CHOICES."""
    config = default_config(
        tokens, shape.top_k, shape.experts, shape.hidden, shape.intermediate, chip=chip
    )
    if choice == "ours":
        return config
    return CHOICES[choice][0](config, chip)
