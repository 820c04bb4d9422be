"""A change in the middle of requests: on all ranks after the same step, and no request is lost."""

import math
from typing import Any

import pytest
from clusters import DATA_PARALLEL, TENSOR_PARALLEL

pytestmark = [pytest.mark.engine, pytest.mark.cpu]

TEXT = "Experts that are overloaded drop the tokens that they need least, say those who know. "
NO_LIMIT = 2**31 - 1
CHANGES = [{"mode": "off"}, {"mode": "drop", "factor": 0.5}]
ANSWER = 64


@pytest.mark.parametrize(
    "layout", [TENSOR_PARALLEL, DATA_PARALLEL], ids=["tensor parallel", "data parallel"]
)
def test_all_ranks_change_after_the_same_step(run_ranks, layout):
    requests = [
        {"prompt": TEXT * (2 + n % 3), "max_tokens": ANSWER, "ignore_eos": True} for n in range(6)
    ]
    if layout is DATA_PARALLEL:
        requests = [request | {"rank": n % 2} for n, request in enumerate(requests)]
    ours = run_ranks(
        requests,
        record="rows",
        changes=CHANGES,
        moe_capacity_mode="drop",
        moe_capacity_factor=1.0,
        moe_capacity_min_capacity=1,
        **layout,
    )
    assert [now["mode"] for now in ours["now"]] == ["off", "drop"]
    assert all(len(output["token_ids"]) == ANSWER for output in ours["batches"][0])
    for workers in ours["records"]:  # of each engine
        steps = [[step for step in worker if ".0." in step["layer"]] for worker in workers]
        check_phases(steps[0])
        for other in steps[1:]:
            assert [step["digest"] for step in other] == [step["digest"] for step in steps[0]]
            assert [step["capacity"] for step in other] == [step["capacity"] for step in steps[0]]


def check_phases(steps: list[dict[str, Any]]) -> None:
    """With a limit, without, and with the other one: prompts of running requests come again."""
    phases = []
    for step in steps:
        real = [not padding for padding in step["is_padding"]]
        tokens = sum(real)
        prompt = sum(r and not d for r, d in zip(real, step["is_decode"], strict=True))
        limit = step["capacity"][0][0]
        by_factor = {f: math.ceil(f * tokens * 2 / 8) for f in (1.0, 0.5)}
        if prompt < 40:  # decode steps, and what came between, have no limit, or hardly one
            continue
        fits = [factor for factor, capacity in by_factor.items() if capacity == limit]
        if limit == NO_LIMIT:
            assert step["load_before"] == step["load_after"]
            fits = [math.inf]
        assert len(fits) == 1, step
        phases.append(fits[0])
    assert [f for n, f in enumerate(phases) if n == 0 or phases[n - 1] != f] == [1.0, math.inf, 0.5]
