"""From counts to a verdict: the best factors within the budget, and when it isn't worth it."""

import itertools
import random
from dataclasses import replace

import pytest

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.planner.counts import Counts, Layer, Observation, total
from vllm_capmoe.planner.grid import FACTORS, MODES
from vllm_capmoe.planner.verdict import (
    DecodeAdvice,
    best_limits,
    decide,
    decode_advice,
    judge_decode,
)

STEPS, ASSIGNMENTS, EXPERTS, RANKS = 4, 32_000, 64, 8


def counts(rank_before: int, rank_after: int, missing: float) -> Counts:
    """One trial of a layer, of a gate mass of 1000."""
    return Counts(
        steps=STEPS,
        assignments=ASSIGNMENTS,
        dropped=int(100 * missing),
        mass=1000.0,
        lost=2 * missing,
        missing=missing,
        rank_before=rank_before,
        rank_after=rank_after,
    )


def layer(number: int, rank_before: int, tried: dict[float, tuple[int, float]]) -> Layer:
    """tried: by factor the load of the busiest rank and the missing mass, in all modes alike."""
    prompt = {
        f"{mode} {factor:g}": counts(rank_before, *tried.get(factor, (rank_before, 0.0)))
        for mode in MODES
        for factor in FACTORS
    }
    return Layer(number, EXPERTS, 8, [[1] * EXPERTS] * STEPS, prompt, {})


def observation(layers: list[Layer], ep_size: int = RANKS) -> Observation:
    return Observation("a model", ep_size, 10, 0, 16_000, 0, layers)


def test_the_budget_goes_where_it_removes_the_most_load() -> None:
    """Layer 0: 1000 of load for 1 of mass, then 100 for 5. Layer 1: 500 for 1."""
    found = observation([
        layer(0, 8000, {2.0: (7000, 1.0), 1.5: (7000, 1.0), 1.0: (6900, 6.0)}),
        layer(1, 8000, {1.5: (7500, 1.0), 1.0: (7500, 2.0)}),
    ])  # fmt: skip
    # 2000 of mass in all, so 0.001 is a budget of 2.
    assert best_limits(found, "reroute", 0.0004).factors == {0: None, 1: None}
    assert best_limits(found, "reroute", 0.0005).factors == {0: 2.0, 1: None}
    assert best_limits(found, "reroute", 0.001).factors == {0: 2.0, 1: 1.5}
    everything = best_limits(found, "reroute", 1.0)
    assert everything.factors == {0: 1.0, 1: 1.5}
    assert everything.counts.rank_after == 6900 + 7500
    assert everything.speed == 16_000 / 14_400


def test_the_choice_is_nearly_the_best_of_all() -> None:
    """Against all combinations, on random layers: a greedy choice may lose one step at the end."""
    draw = random.Random(5)
    for _ in range(20):
        layers = []
        for number in range(3):
            load, missing, tried = 8000, 0.0, {}
            for factor in FACTORS:
                load -= draw.randrange(0, 500)
                missing += draw.uniform(0, 4)
                tried[factor] = (load, missing)
            layers.append(layer(number, 8000, tried))
        found, budget = observation(layers), draw.uniform(0, 0.02)
        ours = best_limits(found, "drop", budget)
        assert ours.counts.missing <= budget * 3000 + 1e-9
        best = 3 * 8000
        options = [
            [counts(8000, 8000, 0.0), *(own.prompt[f"drop {f:g}"] for f in FACTORS)]
            for own in layers
        ]
        for choice in itertools.product(*options):
            summed = total(choice)
            if summed.missing <= budget * 3000:
                best = min(best, summed.rank_after)
        largest_step = 9 * 500
        assert best <= ours.counts.rank_after <= best + largest_step
        reached = (24_000 - ours.counts.rank_after) / max(1, 24_000 - best)
        assert reached >= 0.6


def test_settings_put_neighbours_alike_together_and_the_engine_takes_them() -> None:
    own = {1.5: (7000, 1.0)}
    free: dict[float, tuple[int, float]] = {}
    found = observation([layer(n, 8000, own if n in (1, 2, 5) else free) for n in range(7)])
    limits = best_limits(found, "drop", 1.0)
    assert limits.settings() == {
        "0": {"mode": "off"},
        "1-2": {"factor": 1.5},
        "3-4": {"mode": "off"},
        "5": {"factor": 1.5},
        "6": {"mode": "off"},
    }
    config = CapacityConfig(mode=limits.mode, layers=limits.settings())
    for number, factor in limits.factors.items():
        chosen = config.for_layer(number)
        assert (chosen.mode, chosen.factor) == (("drop", factor) if factor else ("off", 1.5))


GOOD = {1.5: (5000, 1.0)}


@pytest.mark.parametrize(
    ("found", "max_loss", "worth", "reason"),
    [
        (observation([layer(0, 8000, GOOD)]), 0.01, True, "2.00 times the mean.*up to 1.60 times"),
        (observation([layer(0, 8000, GOOD)]), 0.0, False, "at most 1.00 times"),
        (observation([layer(0, 8000, {1.5: (7900, 1.0)})]), 0.01, False, "at most 1.01 times"),
        (
            observation([layer(0, 8000, GOOD)], ep_size=1),
            0.01,
            False,
            "one rank waits for no other",
        ),
    ],
)
def test_the_verdict_says_why(
    found: Observation, max_loss: float, worth: bool, reason: str
) -> None:
    import re

    verdict = decide(found, max_loss)
    assert verdict.worth is worth
    assert re.search(reason, verdict.reason)


def test_few_rows_for_an_expert_are_not_worth_it() -> None:
    few = layer(0, 8000, GOOD)
    few = replace(
        few, prompt={n: replace(c, assignments=4 * 64 * 15) for n, c in few.prompt.items()}
    )
    assert "15.0 rows" in decide(observation([few]), 0.01).reason


def test_no_step_with_a_prompt() -> None:
    none = replace(
        layer(0, 8000, GOOD), prompt={f"{m} {f:g}": Counts() for m in MODES for f in FACTORS}
    )
    assert "no step" in decide(observation([none]), 0.01).reason


def test_decode_advice_is_per_layer_and_step() -> None:
    tried = {
        f"keep {keep} at 16": Counts(
            steps=10, mass=100.0, missing=8.0 - keep, active_before=400, active_after=50 * keep
        )
        for keep in range(1, 8)
    }
    found = observation([replace(layer(n, 8000, GOOD), decode=tried) for n in range(3)])
    (advice,) = decode_advice(found, [16, 32], 0.041)
    assert (advice.requests, advice.before) == (16, 40.0)
    assert advice.rows[4] == (20.0, pytest.approx(0.04))
    assert advice.keep == 4 and advice.keeps == [8, 4, 1]
    (advice,) = decode_advice(found, [16], 0.0)
    assert advice.keep is None and advice.keeps == [8, 1]
    assert decode_advice(observation([layer(0, 8000, GOOD)]), [16], 0.1) == []


@pytest.mark.parametrize(
    ("keep", "times", "worth", "reason"),
    [
        (4, {8: [10, 20], 4: [8, 17], 1: [6, 11]}, True, "such steps took 0.82 of the time"),
        (4, {8: [10, 20], 4: [9.8, 19], 1: [6, 11]}, False, "such steps took 0.97 of the time"),
        (4, {8: [10, 20], 4: [5, 10], 1: [9.9, 20]}, False, "aren't bound by the experts"),
        (
            None,
            {8: [10, 20], 1: [6, 11]},
            False,
            "at least 1.00% of the gate mass would be missing",
        ),
    ],
)
def test_decode_is_judged_by_the_time_of_its_steps(keep, times, worth, reason) -> None:
    rows = {number: (5.0 * number, 0.08 - number / 100) for number in range(1, 8)}
    advice = DecodeAdvice(16, 8, 40.0, rows, keep)
    timed = {
        "milliseconds": {str(number): own for number, own in times.items()},
        "active": {str(number): 5.0 * number for number in times},
    }
    judged = judge_decode(advice, timed, 0.001)
    assert judged.worth is worth and reason in judged.reason
    assert judged.measured[8] == (40.0, 1.0)
