"""gamma = inf: ranks say what one process says, in every layout and with both executors.

With decode keep, too, where all ranks see all tokens. Experts are spread unevenly over the ranks;
four ranks share the two cores.
"""

from pathlib import Path
from typing import Any

import pytest
from clusters import DATA_PARALLEL, TENSOR_PARALLEL, cores
from comparing import assert_same
from counting import layers_of
from sharing import active, check_shared

from vllm_capmoe.integration import stats

pytestmark = [pytest.mark.engine, pytest.mark.cpu]

TEXT = "The oldest bridge of the town was built where the river is narrow, "
REQUESTS = [
    {"prompt": TEXT * count + ending, "max_tokens": 12}
    for count, ending in ((1, ""), (3, "so"), (9, ""), (2, "and then"), (5, "because"), (1, "but"))
]
UNLIMITED = {"moe_capacity_mode": "expanded", "moe_capacity_factor": "inf"}
SHARING = {**UNLIMITED, "moe_capacity_decode_keep": 1}

MP, RAY = {"distributed_executor_backend": "mp"}, {"distributed_executor_backend": "ray"}
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "tensor parallel": ({**TENSOR_PARALLEL, **MP}, "global"),
    "data parallel": (DATA_PARALLEL, "local"),
    "tensor parallel, Ray, decode keep": ({**TENSOR_PARALLEL, **RAY, **SHARING}, "global"),
    "data parallel, Ray": ({**DATA_PARALLEL, **RAY, "data_parallel_backend": "ray"}, "local"),
    "both, sequence parallel": ({**TENSOR_PARALLEL, **DATA_PARALLEL, **MP}, "local"),
}
SLOW = "data parallel, Ray"  # its two parts are in others


def one_process(run_ranks, model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    env = {"VLLM_CPU_OMP_THREADS_BIND": cores(1)}
    return run_ranks(REQUESTS, model=str(model), record="rows", env=env, **settings)


@pytest.fixture(scope="module")
def unlimited(run_ranks, nine_experts) -> dict[str, Any]:
    return one_process(run_ranks, nine_experts, UNLIMITED)


@pytest.fixture(scope="module")
def sharing(run_ranks, nine_experts, unlimited) -> dict[str, Any]:
    """One process with decode keep, which does what it should."""
    one = one_process(run_ranks, nine_experts, SHARING)
    steps = one["records"][0][0]
    assert sum(check_shared(step, keep=1) for step in steps) >= 40
    assert all(active(step["load_after"]) <= active(step["load_before"]) for step in steps)
    tokens = [[output["token_ids"] for output in each["batches"][0]] for each in (one, unlimited)]
    assert tokens[0] != tokens[1], "what is shared makes no difference to this model"
    return one


def total_loads(result: dict[str, Any]) -> dict[str, list[int]]:
    """Layer -> assignments of each expert, over all engines and parts of their tokens."""
    loads: dict[str, list[int]] = {}
    for layer in layers_of(result["counters"]):
        before = loads.get(layer["layer"], [0] * len(layer["load_after"]))
        loads[layer["layer"]] = [a + b for a, b in zip(before, layer["load_after"], strict=True)]
    return loads


@pytest.mark.parametrize(
    ("layout", "candidates"),
    [
        pytest.param(*values, id=name, marks=pytest.mark.slow if name == SLOW else ())
        for name, values in LAYOUTS.items()
    ],
)
def test_ranks_are_one_process_to_rounding(
    run_ranks, nine_experts, layout, candidates, request: pytest.FixtureRequest
):
    tensor, data = layout.get("tensor_parallel_size", 1), layout.get("data_parallel_size", 1)
    ray, shares = "ray" in layout.values(), "moe_capacity_decode_keep" in layout
    one_process = request.getfixturevalue("sharing" if shares else "unlimited")
    env = dict(request.getfixturevalue("ray_cluster")) if ray else {}
    if tensor * data == 4:
        env["VLLM_CPU_OMP_THREADS_BIND"] = cores(4)
    requests = [{**r, "rank": n % 2 if data > 1 else None} for n, r in enumerate(REQUESTS)]
    ours = run_ranks(
        requests, model=str(nine_experts), record="loads", env=env, **{**UNLIMITED, **layout}
    )
    assert_same(one_process, ours)
    assert total_loads(ours) == total_loads(one_process)
    if shares:  # the same integers on both ranks, step by step
        one, other = ([step["digest"] for step in each] for each in ours["records"][0])
        assert one == other
    # What the series are made of: every layer once, whoever counted it.
    answers = [worker for engine in ours["totals"] for worker in engine]
    published = {key: sum(answer[key] for answer in answers) for key in answers[0]}
    assert published == pytest.approx(stats.totals(layers_of(ours["counters"])))
    log = ours["log"]
    assert ("RayWorkerProc" in log) == ray
    assert f"ranks={tensor * data}, backend=torch (auto)" in log
    assert f"candidates={candidates} (auto)" in log
    parts = {layer["part"] for engine in ours["counters"] for each in engine for layer in each}
    assert parts == ({0, 1} if tensor * data == 4 else {0})
    assert [len(engine) for engine in ours["received"]] == [tensor] * data
    for each in (worker for engine in ours["received"] for worker in engine):
        assert each, "a rank's experts were never called"
