"""A small plan for tests: what an observed run counted, and what follows from it."""

import math

from vllm_capmoe.planner.counts import Counts, Layer, Observation
from vllm_capmoe.planner.grid import FACTORS, MODES
from vllm_capmoe.planner.verdict import decide, decode_advice, judge_decode


def observed() -> Observation:
    """Two layers of 4 experts, whose loads are 4 2 1 1, then even."""
    layers = []
    for number, load in enumerate(([400, 200, 100, 100], [200, 200, 200, 200])):
        prompt = {}
        for mode in MODES:
            for factor in FACTORS:
                dropped = sum(max(0, own - math.ceil(factor * 200)) for own in load)
                prompt[f"{mode} {factor:g}"] = Counts(
                    steps=1, assignments=800, dropped=dropped, mass=400.0, lost=dropped / 4,
                    missing=dropped / 4, peak_before=max(load),
                    peak_after=min(max(load), math.ceil(factor * 200)), rank_before=max(load),
                    rank_after=min(max(load), math.ceil(factor * 200)),
                )  # fmt: skip
        decode = {
            "keep 1 at 8": Counts(
                steps=5, mass=10.0, missing=0.5, active_before=20, active_after=15
            )
        }
        layers.append(Layer(number, 4, 2, [load], prompt, decode))
    return Observation("a <model>", 4, 3, 0, 400, 30, layers)


FOUND = observed()
VERDICT = decide(FOUND, 0.05)
TIMED = {
    "milliseconds": {"2": [10.0, 11.0, 10.0], "1": [8.0, 8.8, 9.0]},
    "active": {"2": 4.0, "1": 3.0},
}
DECODE = [judge_decode(advice, TIMED, 0.05) for advice in decode_advice(FOUND, [8], 0.05)]
