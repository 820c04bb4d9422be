"""gamma = inf: two ranks say what one process says, in every layout and with both executors."""

from typing import Any

import pytest
from clusters import DATA_PARALLEL, TENSOR_PARALLEL
from comparing import assert_same

pytestmark = pytest.mark.engine

TEXT = "The oldest bridge of the town was built where the river is narrow, "
REQUESTS = [
    {"prompt": TEXT * count + ending, "max_tokens": 12, "rank": None}
    for count, ending in ((1, ""), (3, "so"), (9, ""), (2, "and then"), (5, "because"), (1, "but"))
]
UNLIMITED = {"moe_capacity_mode": "expanded", "moe_capacity_factor": "inf"}

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "tensor parallel": ({**TENSOR_PARALLEL, "distributed_executor_backend": "mp"}, "global"),
    "data parallel": (DATA_PARALLEL, "local"),
    "tensor parallel, Ray": ({**TENSOR_PARALLEL, "distributed_executor_backend": "ray"}, "global"),
    "data parallel, Ray": (
        {
            **DATA_PARALLEL,
            "data_parallel_backend": "ray",
            "distributed_executor_backend": "ray",
        },
        "local",
    ),
}


@pytest.fixture(scope="module")
def one_process(run_ranks) -> dict[str, Any]:
    return run_ranks(REQUESTS, **UNLIMITED, env={"VLLM_CPU_OMP_THREADS_BIND": "auto"})


@pytest.mark.parametrize(("layout", "candidates"), LAYOUTS.values(), ids=LAYOUTS)
def test_two_ranks_are_one_process_to_rounding(
    run_ranks, one_process, layout, candidates, request: pytest.FixtureRequest
):
    ray = "ray" in layout.values()
    env = request.getfixturevalue("ray_cluster") if ray else {}
    requests = REQUESTS
    if "data_parallel_size" in layout:
        requests = [{**r, "rank": n % 2} for n, r in enumerate(REQUESTS)]
    ours = run_ranks(requests, record="loads", env=env, **UNLIMITED, **layout)
    assert_same(one_process, ours)
    assert ("RayWorkerProc" in ours["log"]) == ray
    assert (
        f"ranks=2, backend=torch (auto), renormalize=yes (auto), candidates={candidates} "
        in (ours["log"])
    )
    for engine in ours["counters"]:
        for worker in engine:
            assert all(sum(layer["load_after"]) > 0 for layer in worker)
    for each in (worker for engine in ours["received"] for worker in engine):
        assert each, "a rank's experts were never called"
