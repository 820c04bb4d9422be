"""gamma = 1: every rank keeps its limit, and ranks that must agree do, step by step.

Layer 1 has decode keep, too: what is shared is counted for the limit, and each data parallel rank
shares what its own tokens load.
"""

import json
import math
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clusters import DATA_PARALLEL, TENSOR_PARALLEL, start
from engines import free_port
from sharing import Step, asked_load, check_shared

pytestmark = [pytest.mark.engine, pytest.mark.cpu]

TEXT = "Experts that are overloaded drop the tokens that they need least, say those who know. "
NO_LIMIT = 2**31 - 1
SHARING = {"moe_capacity_layers": {"1": {"decode_keep": 1}}}
OFFLINE = Path(__file__).parent.parent / "e2e" / "run_engine.py"


def by_layer(records: list[Step]) -> dict[str, list[Step]]:
    """The steps of each layer, in order."""
    layers = defaultdict(list)
    for step in records:
        layers[step["layer"]].append(step)
    return layers


def decode_load(step: Step) -> list[int]:
    """Assignments of generated tokens, which are never dropped, by expert."""
    load = [0] * len(step["load_after"])
    for held, decode, padding in zip(
        step["experts"], step["is_decode"], step["is_padding"], strict=True
    ):
        for expert in held:
            if decode and not padding and expert >= 0:
                load[expert] += 1
    return load


def real_tokens(step: Step) -> int:
    return step["is_padding"].count(False)


@pytest.fixture(scope="module")
def tensor_parallel(run_ranks, make_mixtral, tmp_path_factory) -> dict[str, Any]:
    """Device level, on seven experts: rank 0 has four of them and rank 1 three."""
    model = make_mixtral.make_checkpoint(
        tmp_path_factory.mktemp("models") / "seven", experts=7, layers=2, skew=2.0
    )
    requests = [
        {"prompt": TEXT * (2 + n), "max_tokens": 40 * n, "ignore_eos": True} for n in range(1, 7)
    ]
    return run_ranks(
        requests,
        record="rows",
        model=str(model),
        max_num_batched_tokens=64,  # prompts in chunks, beside requests that generate
        moe_capacity_mode="expanded",
        moe_capacity_factor=1.0,
        moe_capacity_level="device",
        moe_capacity_min_capacity=1,
        **SHARING,
        **TENSOR_PARALLEL,
    )


def test_tensor_parallel_ranks_decide_alike(tensor_parallel):
    one, other = tensor_parallel["records"][0]
    for layer, steps in by_layer(one).items():
        theirs = by_layer(other)[layer]
        digests = [step["digest"] for step in steps]
        assert digests == [step["digest"] for step in theirs]
        # What repeats is decoding, of which the last request does 240 steps.
        assert len(digests) >= 240 and len(set(digests)) >= 50
        assert sum(step["load_before"] != step["load_after"] for step in steps) >= 10


def test_the_load_of_a_device_stays_within_its_limit(tensor_parallel):
    """What the experts of each rank were called with is within the limit, too."""
    owner = [0, 0, 0, 0, 1, 1, 1]
    limited = shared = 0
    for rank, records in enumerate(tensor_parallel["records"][0]):
        calls = by_layer(tensor_parallel["received"][0][rank])
        for layer, steps in by_layer(records).items():
            for step, call in zip(steps, calls[layer], strict=True):
                assert call["counts"] == step["load_after"]
                shared += check_shared(step, keep=1) if ".1." in layer else 0
                ((*capacity,),) = step["capacity"]
                if NO_LIMIT in capacity:
                    continue
                tokens = real_tokens(step)
                before = [0, 0]
                for device, load in zip(owner, asked_load(step), strict=True):
                    before[device] += load
                assert capacity == [
                    min(max(n, math.ceil(n * tokens * 2 / 7)), max(before))  # fill busiest
                    for n in (owner.count(0), owner.count(1))
                ]
                decode, load = decode_load(step), step["load_after"]
                for device in (0, 1):
                    mine = [expert for expert in range(7) if owner[expert] == device]
                    bound = max(capacity[device], sum(decode[expert] for expert in mine))
                    assert sum(load[expert] for expert in mine) <= bound
                limited += load != asked_load(step)
    assert limited >= 20 and shared >= 20, "hardly a step had a limit in effect, or shared"


@pytest.fixture(scope="module")
def data_parallel(run_ranks) -> dict[str, Any]:
    """Rank 0 has a lot to do; rank 1 a little, and is done early."""
    busy = [
        {"prompt": TEXT * (3 + n), "max_tokens": 20 + 4 * n, "ignore_eos": True, "rank": 0}
        for n in range(10)
    ]
    idle = [{"prompt": TEXT * 8, "max_tokens": 6, "ignore_eos": True, "rank": 1}] * 4
    # Alternately, so that both ranks have prompts from the first steps on.
    requests = [each for pair in zip(busy, idle, strict=False) for each in pair] + busy[4:]
    return run_ranks(
        requests,
        record="rows",
        max_num_batched_tokens=128,
        moe_capacity_mode="expanded",
        moe_capacity_factor=1.0,
        moe_capacity_min_capacity=1,
        **SHARING,
        **DATA_PARALLEL,
    )


def check_own_limit(records: list[Step], rank: int) -> dict[str, int]:
    """Limits count the rank's own tokens; extra candidates are experts that live on it.

    Returns the steps in which the limit did something, the assignments that Expanded Drop added,
    the steps without a token, and the decode rows that decode keep changed in layer 1.
    """
    seen = {"limited": 0, "expanded": 0, "idle": 0, "shared": 0}
    local = range(4 * rank, 4 * rank + 4)
    for step in records:
        tokens = real_tokens(step)
        seen["idle"] += tokens == 0
        if ".1." in step["layer"]:
            seen["shared"] += check_shared(step, keep=1)
        asked = asked_load(step)
        ((capacity,),) = step["capacity"]
        if capacity == NO_LIMIT:
            assert step["load_after"] == asked
            continue
        assert capacity == max(1, math.ceil(tokens * 2 / 8))
        for load, decode in zip(step["load_after"], decode_load(step), strict=True):
            assert load <= max(capacity, decode)
        seen["limited"] += step["load_after"] != asked
        for row, held in enumerate(step["experts"]):
            if not step["is_decode"][row]:
                extra = {expert for expert in held if expert >= 0} - set(step["topk"][row])
                assert all(expert in local for expert in extra)
                seen["expanded"] += len(extra)
    return seen


def test_each_data_parallel_rank_keeps_its_own_limit(data_parallel):
    for rank in (0, 1):
        (records,) = data_parallel["records"][rank]
        seen = check_own_limit(records, rank)
        assert seen["limited"] >= 4 and seen["expanded"] > 0
        assert seen["shared"] >= (20 if rank == 0 else 1)
    assert seen["idle"] >= 20, "rank 1 was never idle while rank 0 worked"


def test_each_offline_data_parallel_process_keeps_its_own_limit(example_model, tmp_path):
    """`LLM` in two processes that VLLM_DP_RANK makes ranks, as vLLM's example has it."""
    port = free_port()
    engine = {
        "model": str(example_model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 128,
        "enable_expert_parallel": True,
        "moe_capacity_mode": "expanded",
        "moe_capacity_factor": 1.0,
        "moe_capacity_min_capacity": 1,
        **SHARING,
    }

    def run(rank: int) -> dict[str, Any]:
        prompts = [TEXT * (3 + n) for n in range(6 if rank == 0 else 2)]
        spec = {"engine": engine, "batches": [prompts], "max_tokens": 8, "capacity": True}
        before, after = tmp_path / f"{rank}.spec.json", tmp_path / f"{rank}.json"
        before.write_text(json.dumps(spec))
        command = [sys.executable, str(OFFLINE), str(before), str(after)]
        ranks = {"VLLM_DP_RANK": str(rank), "VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_PORT": str(port)}
        env = {**ranks, "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        log = start(command, tmp_path / f"{rank}.log", 550, **env)
        return json.loads(after.read_text()) | {"log": log}

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, (0, 1)))
    for rank, result in enumerate(results):
        assert "ranks=2, backend=torch (auto)" in result["log"]
        assert "candidates=local (auto)" in result["log"]
        seen = check_own_limit(result["records"][0], rank)
        assert seen["limited"] >= 4 and seen["expanded"] > 0
        counted = sum(layer["load_before"][0] for layer in result["counters"])
        assert counted == sum(step["load_before"][0] for step in result["records"][0]) > 0


def test_what_a_rank_receives_is_within_the_sum_of_the_limits(data_parallel):
    """The experts of a rank get what both ranks decided in that step, and no more."""
    both = [by_layer(worker) for (worker,) in data_parallel["records"]]
    limited = 0
    for rank in (0, 1):
        (calls,) = data_parallel["received"][rank]
        for layer, received in by_layer(calls).items():
            for call, one, other in zip(received, both[0][layer], both[1][layer], strict=True):
                assert call["counts"] == [
                    a + b for a, b in zip(one["load_after"], other["load_after"], strict=True)
                ]
                capacity = [each["capacity"][0][0] for each in (one, other)]
                if NO_LIMIT in capacity:
                    continue
                tokens = real_tokens(one) + real_tokens(other)
                # + 1: two ranks round up instead of one
                assert sum(capacity) <= math.ceil(tokens * 2 / 8) + 1
                decode = (decode_load(one), decode_load(other))
                for expert, count in enumerate(call["counts"]):
                    assert count <= sum(
                        max(limit, load[expert])
                        for limit, load in zip(capacity, decode, strict=True)
                    )
                limited += 1
    assert limited >= 4, "the ranks never had prompts in the same step"
