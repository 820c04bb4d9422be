"""Runs one engine of several ranks in a process of its own: JSON specification in, result out.

    python run_ranks.py SPEC.json RESULT.json

SPEC: {"engine": keywords of AsyncEngineArgs, "requests": [{"prompt": text, "max_tokens": n,
"rank": data parallel rank or None, "ignore_eos": bool}, ...], "record": "rows", "loads" or None,
"changes": settings that change on the way, one after the other, each some steps after the last}.

Greedy, with log-probabilities. All requests are queued, in their order, before the first step, and
all ranks have stopped after the same step when the records are fetched: what shares a step doesn't
depend on how fast anyone is. The result has the outputs as run_engine.py writes them, and, where
recorded, for every engine and worker of it the records, the counters, their totals, and what the
experts received: `records[engine][worker]` and so on.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from run_engine import as_dict

STEPS_BETWEEN = 8


def watch_experts(worker: Any) -> None:
    """Keep, for every call of a layer's experts, how many assignments come in for each expert.

    Sent to the workers by collective_rpc. It sees what the all-to-all delivered, from all ranks.
    """
    import inspect

    from vllm_capmoe.integration.layers import moe_layers

    worker.received = []

    def watched(name: str, compute: Any, num_experts: int) -> Any:
        place = list(inspect.signature(compute).parameters).index("experts")

        def watching(*args: Any) -> None:
            experts = args[place]
            counts = [int((experts == expert).sum()) for expert in range(num_experts)]
            worker.received.append({"layer": name, "counts": counts})
            compute(*args)

        return watching

    for layer in moe_layers(worker.vllm_config):
        experts, count = layer.routed_experts.capacity_experts, layer.router.num_logical_experts
        experts.compute = watched(layer.layer_name, experts.compute, count)


def received(worker: Any) -> list[dict[str, Any]]:
    """What `watch_experts` has kept, in the order of the calls."""
    return worker.received


async def run(spec: dict[str, Any]) -> dict[str, Any]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_capmoe.integration import live_engine

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec["engine"]))

    async def ask(number: int, request: dict[str, Any]) -> dict[str, Any]:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=request["max_tokens"],
            ignore_eos=request.get("ignore_eos", False),
            logprobs=2,
            prompt_logprobs=0,
        )
        last = None
        async for output in engine.generate(
            request["prompt"], sampling, str(number), data_parallel_rank=request.get("rank")
        ):
            last = output
        return as_dict(last)

    async def tell_all(method: Any, *arguments: Any) -> list[list[Any]]:
        """Call a method of every worker of every data parallel engine."""
        client: Any = engine.engine_core
        return await client.call_utility_all_async("collective_rpc", method, None, arguments, {})

    async def steps_of_all() -> int:
        """The steps of the engine that has done the fewest."""
        counters = await tell_all("moe_capacity_counters")
        return min(workers[0][0]["steps"] for workers in counters)

    try:
        record, result = spec.get("record"), {"platform": type(current_platform).__name__}
        if record:
            await tell_all(watch_experts)
            await tell_all("moe_capacity_record", True, record == "rows")
        await engine.pause_generation(mode="keep", clear_cache=False)
        asked = []
        for number, request in enumerate(spec["requests"]):
            asked.append(asyncio.create_task(ask(number, request)))
            while engine.output_processor.get_num_unfinished_requests() <= number:
                await asyncio.sleep(0.001)
        await engine.resume_generation()
        result["now"] = []
        for values in spec.get("changes") or []:
            steps = await steps_of_all()
            while await steps_of_all() < steps + STEPS_BETWEEN:
                await asyncio.sleep(0.01)
            result["now"].append((await live_engine.change(engine, values))["now"])
        outputs = await asyncio.gather(*asked)
        await engine.pause_generation(mode="keep", clear_cache=False)
        if record:
            result["received"] = await tell_all(received)
            result["records"] = await tell_all("moe_capacity_records")
            result["counters"] = await tell_all("moe_capacity_counters")
            result["totals"] = await tell_all("moe_capacity_totals")
        return {"batches": [outputs], **result}
    finally:
        engine.shutdown()


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    import vllm_capmoe

    vllm_capmoe.register()
    result = asyncio.run(run(spec))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
