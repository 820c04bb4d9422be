"""A change of settings in a whole engine: on all ranks between two steps, or nowhere.

vLLM can hold its scheduler, with requests kept, and throw away what it has cached. So a change is

    check       every worker says whether it can; if one can't, nothing happens
    pause       no step is in flight, prefixes are forgotten, running requests start over: what was
                computed for them so far is computed again, and none is lost
    change      every worker, in one call
    resume

A pause of data parallel engines needs all of them. Where each front end has engines of its own
(an external or a hybrid load balancer), its own change between two of their steps and then start
over; the others' go by what their front ends are told. `LLM` does nothing between two calls.
"""

from typing import Any

from vllm_capmoe.integration.stats import Layer, by_layer

Answers = list[list[Any]]  # of the workers of each engine core


async def ask_workers(client: Any, method: str, *args: Any) -> Answers:
    """What every worker of every engine core answers. client: `engine_core` of an `AsyncLLM`."""
    rpc: tuple[Any, ...] = ("collective_rpc", method, None, args, {})
    answers: Answers = await client.call_utility_all_async(*rpc)
    return answers


async def read_settings(engine: Any) -> dict[str, Any]:
    """What an `AsyncLLM` was started with (`started`), and what is in effect (`now`)."""
    return _agreed(await ask_workers(engine.engine_core, "moe_capacity_settings"))


async def read_counters(engine: Any) -> list[Layer]:
    """What the layers of an `AsyncLLM` have counted since its start, see `stats.by_layer`."""
    return by_layer(await ask_workers(engine.engine_core, "moe_capacity_counters"))


async def change(engine: Any, values: Any) -> dict[str, Any]:
    """Change the settings of an `AsyncLLM`, and return what is in effect.

    values: some of `vllm_capmoe.live.KEYS`.

    Raises:
        ValueError: with one sentence that says what came and what is accepted; nothing has changed.
        RuntimeError: vLLM can't pause now, or two changes came at once from several API servers.
    """
    refuse_bad(await ask_workers(engine.engine_core, "moe_capacity_check", values))
    if _has_all_engines(engine):
        was_paused = await engine.is_paused()
        try:
            await engine.pause_generation(mode="keep", clear_cache=True)
            return _agreed(await ask_workers(engine.engine_core, "moe_capacity_change", values))
        finally:
            if not was_paused:
                await engine.resume_generation()
    if engine.vllm_config.parallel_config.distributed_executor_backend == "ray":
        raise ValueError(
            "Ray's workers take a change in the middle of a step, and this front end can't pause "
            "the data parallel engines of others: a restart with other settings is accepted."
        )
    now = _agreed(await ask_workers(engine.engine_core, "moe_capacity_change", values))
    await engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    return now


def _has_all_engines(engine: Any) -> bool:
    """Whether this front end speaks for all data parallel engines."""
    everywhere: int = engine.vllm_config.parallel_config.data_parallel_size
    return len(engine.engine_core.core_engines) >= everywhere


def change_settings(llm: Any, **values: Any) -> dict[str, Any]:
    """Change what an `LLM` does from its next call on, and return what is in effect.

        change_settings(llm, factor=1.2)
        change_settings(llm, mode="off")

    values: `mode` (the one that the engine was started with, or "off"), `factor`, `decode_keep`,
        `observe`, see *Live changes* in the README.

    Raises:
        ValueError: with one sentence that says what came and what is accepted; nothing has changed.
    """
    refuse_bad([llm.collective_rpc("moe_capacity_check", args=(values,))])
    now = _agreed([llm.collective_rpc("moe_capacity_change", args=(values,))])
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM could not forget its cached prefixes: requests are running.")
    return now


def refuse_bad(checked: Answers) -> None:
    """What a worker can't do, or what reaches no layer although it would change something.

    checked: of all workers, see `LiveWorker.moe_capacity_check`.

    Raises:
        ValueError: with one sentence.
    """
    answers = [answer for workers in checked for answer in workers]
    for answer in answers:
        if answer["error"]:
            raise ValueError(answer["error"])
    new = answers[0]["new"]
    if new and answers[0]["is_on"] and not any(answer["layers"] for answer in answers):
        raise ValueError(
            f"the change ({new}) reaches no layer: all have settings of their own "
            "(--moe-capacity-layers), so mode 'off', or a restart with others, is accepted."
        )


def _agreed(answers: Answers) -> dict[str, Any]:
    """What all workers say.

    Raises:
        RuntimeError: they differ.
    """
    all_answers = [answer for workers in answers for answer in workers]
    if any(answer != all_answers[0] for answer in all_answers):
        raise RuntimeError(
            "the workers differ in what is in effect, as after two changes at once by several API "
            "servers: a change of all settings makes them agree again."
        )
    found: dict[str, Any] = all_answers[0]
    return found
