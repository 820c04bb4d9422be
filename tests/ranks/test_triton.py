"""The Triton kernels on two ranks, interpreted: what each gets of the seats, and the numbers.

Reroute, per request, with candidates anywhere: what is dropped and given doesn't depend on who
shares a step, so one process with plain torch is the measure for every layout.
"""

from typing import Any

import pytest
from clusters import DATA_PARALLEL, TENSOR_PARALLEL, cores
from comparing import assert_same
from counting import layers_of

from vllm_capmoe.integration import stats

pytestmark = [pytest.mark.engine, pytest.mark.cpu]

TEXT = "The oldest bridge of the town was built where the river is narrow, "
REQUESTS = [{"prompt": TEXT * n + "and", "max_tokens": 3} for n in (1, 2, 1)]
LIMITED = {
    "moe_capacity_mode": "reroute",
    "moe_capacity_candidates": "global",
    "moe_capacity_factor": 1.0,
    "moe_capacity_scope": "request",
    "moe_capacity_min_capacity": 1,
    "enable_prefix_caching": None,  # off by the scope
}


@pytest.fixture(scope="module")
def plain(run_ranks, nine_experts) -> dict[str, Any]:
    """One process, plain torch."""
    env = {"VLLM_CPU_OMP_THREADS_BIND": cores(1)}
    return run_ranks(REQUESTS, model=str(nine_experts), record="loads", env=env, **LIMITED)


@pytest.mark.parametrize("layout", [TENSOR_PARALLEL, DATA_PARALLEL], ids=["tensor", "data"])
def test_ranks_agree_with_plain_torch(run_ranks, nine_experts, plain, layout):
    """Nine experts: five here, four there. Data parallel ranks get each other's rows, no seats."""
    data = "data_parallel_size" in layout
    ours = run_ranks(
        [{**r, "rank": n % 2 if data else None} for n, r in enumerate(REQUESTS)],
        model=str(nine_experts),
        record="loads",
        env={"TRITON_INTERPRET": "1"},
        moe_capacity_backend="triton",
        **LIMITED,
        **layout,
    )
    assert "backend=triton, " in ours["log"] and "ranks=2" in ours["log"]
    assert_same(plain, ours)
    counted, expected = (stats.totals(layers_of(each["counters"])) for each in (ours, plain))
    for key in ("assignments", "dropped", "expanded"):
        assert counted[key] == expected[key] > 0
    assert counted["left_without"] == expected["left_without"]
    # Scores of the kernels differ in their last bits.
    assert counted["mass"] == pytest.approx(expected["mass"], rel=1e-5)
    assert counted["lost"] == pytest.approx(expected["lost"], rel=1e-5) and counted["lost"] > 0
