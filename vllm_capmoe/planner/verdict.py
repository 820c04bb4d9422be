"""From counts to a verdict: turn it on or not, which mode, and the factor of every layer.

A layer of a prompt step takes the time of its busiest rank. Every trial says, layer by layer, how
much of that load a factor removes and how much gate mass it costs. The factors are chosen for the
most load removed within the budget of mass: starting from no limit, the lower factor of some layer
that removes the most for its cost comes next, until nothing fits the budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from vllm_capmoe.planner.counts import Counts, Layer, Observation, total
from vllm_capmoe.planner.grid import FACTORS, MODES

WORTH = 1.05
"""The least bound of a speed-up that is worth a change of a model's answers."""

_MANY_TOKENS = 16
"""Rows of an expert, on average, below which a step is bound by the weights it reads and not by its
busiest expert (about a tile of the kernels; an estimate)."""


@dataclass(frozen=True)
class Limits:
    """A mode with a factor for each layer, and what that does on the observed steps.

    factors: by layer number; None where the layer has no limit.
    by_layer: what that does in each layer.
    """

    mode: str
    factors: dict[int, float | None]
    by_layer: dict[int, Counts]

    @property
    def counts(self) -> Counts:
        """Of all layers."""
        return total(self.by_layer.values())

    @property
    def speed(self) -> float:
        """The bound of the speed-up of the MoE layers of prompt steps."""
        return self.counts.rank_ratio

    def settings(self) -> dict[str, dict[str, Any]]:
        """The content of a file for `--moe-capacity-layers`: neighbours alike share an entry."""
        found: dict[str, dict[str, Any]] = {}
        numbers = sorted(self.factors)
        first = 0
        for at, number in enumerate(numbers):
            factor = self.factors[number]
            after = numbers[at + 1] if at + 1 < len(numbers) else None
            if after is not None and self.factors[after] == factor:
                continue
            name = f"{numbers[first]}" if first == at else f"{numbers[first]}-{number}"
            found[name] = {"mode": "off"} if factor is None else {"factor": factor}
            first = at + 1
        return found


@dataclass(frozen=True)
class Verdict:
    """What the planner advises for prompts.

    limits: the best limits within the budget (also where they aren't worth it). worth: turn it on.
    reason: why, as one sentence. by_mode: the best of each mode.
    """

    worth: bool
    reason: str
    limits: Limits
    by_mode: list[Limits] = field(default_factory=list)


def _options(layer: Layer, mode: str) -> list[tuple[float | None, Counts]]:
    """No limit, then the factors, each of which loses more and removes more than those before."""
    tried = [(factor, layer.prompt[f"{mode} {factor:g}"]) for factor in FACTORS]
    free = tried[0][1]
    none = replace(
        free,
        dropped=0,
        added=0,
        left_without=0,
        lost=0.0,
        missing=0.0,
        peak_after=free.peak_before,
        rank_after=free.rank_before,
        active_after=free.active_before,
    )
    found: list[tuple[float | None, Counts]] = [(None, none)]
    for factor, counts in sorted(tried, key=lambda item: (item[1].missing, item[1].rank_after)):
        if counts.rank_after < found[-1][1].rank_after:
            found.append((factor, counts))
    return found


def best_limits(observation: Observation, mode: str, max_loss: float) -> Limits:
    """The factors by layer that remove the most load within the budget.

    max_loss: of the gate mass of all layers, as a share.
    """
    options = {layer.number: _options(layer, mode) for layer in observation.layers}
    chosen = {number: own[0] for number, own in options.items()}
    left = max_loss * sum(counts.mass for _, counts in chosen.values())
    while True:
        steps = []
        for number, own in options.items():
            now = chosen[number][1]
            for factor, counts in own:
                removed, cost = now.rank_after - counts.rank_after, counts.missing - now.missing
                if removed > 0 and cost <= left:
                    rate = removed / cost if cost > 0 else float("inf")
                    steps.append((rate, removed, -number, cost, (factor, counts)))
        if not steps:
            break
        _, _, number, cost, option = max(steps, key=lambda step: step[:3])
        chosen[-number] = option
        left -= cost
    factors = {number: factor for number, (factor, _) in chosen.items()}
    return Limits(mode, factors, {number: counts for number, (_, counts) in chosen.items()})


def decide(observation: Observation, max_loss: float) -> Verdict:
    """The verdict for prompts. max_loss: share of the gate mass that may be lost."""
    by_mode = [best_limits(observation, mode, max_loss) for mode in MODES]
    best = max(by_mode, key=lambda limits: (limits.speed, -limits.counts.missing))
    worth, reason = _judge(observation, best, max_loss)
    return Verdict(worth, reason, best, by_mode)


def _judge(observation: Observation, best: Limits, max_loss: float) -> tuple[bool, str]:
    counts = best.counts
    if not counts.steps:
        return False, "no step with prompt tokens was observed."
    if observation.ep_size == 1:
        return False, "one rank waits for no other: the straggler effect needs expert parallelism."
    ranks = observation.ep_size
    imbalance = counts.rank_before * ranks / max(1, counts.assignments)
    experts = observation.layers[0].experts
    rows = counts.assignments / counts.steps / experts
    if rows < _MANY_TOKENS:
        return False, (
            f"an expert gets {rows:.1f} rows a step on average, and such a step is bound by the "
            "weights that it reads rather than by its busiest expert."
        )
    if best.speed < WORTH:
        return False, (
            f"the busiest rank has {imbalance:.2f} times the mean load, and within a loss of "
            f"{max_loss:.2%} of the gate mass a limit makes the MoE layers at most "
            f"{best.speed:.2f} times as fast."
        )
    return True, (
        f"the busiest rank has {imbalance:.2f} times the mean load; for "
        f"{counts.missing_share:.2%} of the gate mass the MoE layers of prompt steps become "
        f"up to {best.speed:.2f} times as fast (the whole step gains less)."
    )


@dataclass(frozen=True)
class DecodeAdvice:
    """Decode keep, for steps of so many requests without a prompt.

    before: experts active per layer and step without it. rows: by k0 the experts active with it,
    and the share of gate mass that is missing. keep: the least k0 within the budget; None if there
    is none. worth: use it. reason: why, as one sentence; empty until steps were timed.
    measured: by k0 the experts active in the timed steps, and their time over that with all kept.
    """

    requests: int
    top_k: int
    before: float
    rows: dict[int, tuple[float, float]]
    keep: int | None
    worth: bool = False
    reason: str = ""
    measured: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def keeps(self) -> list[int]:
        """What to time: all kept, what the budget allows, and the fewest experts there can be."""
        return sorted({self.top_k, self.keep or 1, 1}, reverse=True)


def decode_advice(
    observation: Observation, requests: Sequence[int], max_loss: float
) -> list[DecodeAdvice]:
    """What decode keep does to the observed decode steps; none for sizes that didn't occur."""
    top_k = min(layer.top_k for layer in observation.layers)
    found = []
    for size in requests:
        rows, before = {}, 0.0
        for keep in range(1, top_k):
            counts = observation.over_layers(f"keep {keep} at {size}", "decode")
            if counts.steps:
                before = counts.active_before / counts.steps
                rows[keep] = counts.active_after / counts.steps, counts.missing_share
        if rows:
            within = [keep for keep, (_, missing) in rows.items() if missing <= max_loss]
            found.append(DecodeAdvice(size, top_k, before, rows, min(within, default=None)))
    return found


def judge_decode(advice: DecodeAdvice, timed: Mapping[str, Any], max_loss: float) -> DecodeAdvice:
    """The verdict for decode steps, by their times. timed: see `planner_engine.run_times`."""
    times = timed["milliseconds"]
    all_kept = times[str(advice.top_k)]
    measured = {}
    for keep, own in times.items():
        ratios = [new / old for new, old in zip(own, all_kept, strict=True)]
        measured[int(keep)] = timed["active"][keep], median(ratios)
    fewest, most = measured[1], measured[advice.top_k]
    worth = False
    if fewest[1] > 1 / WORTH:
        reason = (
            f"steps of {advice.requests} requests that loaded {fewest[0]:.1f} experts in a layer "
            f"instead of {most[0]:.1f} took {fewest[1]:.2f} of the time: they aren't bound by the "
            "experts that they load."
        )
    elif advice.keep is None:
        least = min(missing for _, missing in advice.rows.values())
        reason = (
            f"at least {least:.2%} of the gate mass would be missing, more than {max_loss:.2%}."
        )
    else:
        active, ratio = measured[advice.keep]
        worth = ratio <= 1 / WORTH
        reason = (
            f"at {advice.requests} requests, keeping {advice.keep} of {advice.top_k} loads "
            f"{active:.1f} experts in a layer instead of {most[0]:.1f}, for "
            f"{advice.rows[advice.keep][1]:.2%} of the gate mass; such steps took {ratio:.2f} of "
            "the time."
        )
    return replace(advice, worth=worth, reason=reason, measured=measured)
