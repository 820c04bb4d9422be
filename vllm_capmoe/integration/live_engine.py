"""A change of settings in a whole engine: on all ranks between two steps, or nowhere.

A front end works out all that is to be in effect, so that workers which differ agree afterwards:

    check       every worker says whether it can; if one can't, nothing happens
    pause       vLLM's scheduler holds, with its requests: no step is in flight
    change      every worker, in one call
    forget      cached prefixes; running requests start over with the tokens they have, none is lost
    resume

Several front ends must not pause and resume across each other, and a pause of data parallel engines
needs all of them. So where there are other API servers, or engines behind front ends of their own
(an external or a hybrid load balancer), nothing pauses: an engine core takes a call between two
steps anyway, and its workers in one order. Ray's take one in the middle of a step; there it is
refused. `LLM` does nothing between two calls.
"""

from typing import Any

from vllm.logger import init_logger

from vllm_capmoe.integration.settings import capacity_config
from vllm_capmoe.integration.stats import Layer, by_layer
from vllm_capmoe.live import Live

logger = init_logger("vllm.capmoe")

Answers = list[list[Any]]  # of the workers of each engine core


async def ask_workers(client: Any, method: str, *args: Any) -> Answers:
    """What every worker of every engine core answers. client: `engine_core` of an `AsyncLLM`."""
    rpc: tuple[Any, ...] = ("collective_rpc", method, None, args, {})
    answers: Answers = await client.call_utility_all_async(*rpc)
    return answers


async def read_settings(engine: Any) -> dict[str, Any]:
    """What an `AsyncLLM` was started with, what is in effect, and whether its workers agree."""
    return _summary(await ask_workers(engine.engine_core, "moe_capacity_settings"))


async def read_counters(engine: Any) -> list[Layer]:
    """What the layers of an `AsyncLLM` have counted since its start, see `stats.by_layer`."""
    return by_layer(await ask_workers(engine.engine_core, "moe_capacity_counters"))


async def change(engine: Any, values: Any) -> dict[str, Any]:
    """Change the settings of an `AsyncLLM`.

    values: some of `vllm_capmoe.live.KEYS`.

    Returns:
        what is in effect (`now`), and whether cached prefixes are forgotten (`forgotten`): where
        vLLM can't forget them, the change stands all the same.

    Raises:
        ValueError: with one sentence that says what came and what is accepted; nothing has changed.
    """
    settings = await read_settings(engine)
    new = _target(engine.vllm_config, settings, values)
    if settings["agree"] and new == settings["now"]:
        return {"now": new, "forgotten": True}
    core = engine.engine_core
    _refuse_bad(await ask_workers(core, "moe_capacity_check", new))
    if not _is_alone(engine):
        if engine.vllm_config.parallel_config.distributed_executor_backend == "ray":
            raise ValueError(
                "Ray's workers take a change in the middle of a step, and beside other front ends "
                "this one can't pause the engines: a restart with other settings is accepted."
            )
        await ask_workers(core, "moe_capacity_change", new)
        return {"now": new, "forgotten": await _forget(engine)}
    was_paused = await engine.is_paused()
    try:
        await engine.pause_generation(mode="keep", clear_cache=False)
        await ask_workers(core, "moe_capacity_change", new)
        return {"now": new, "forgotten": await _forget(engine)}
    finally:
        if not was_paused:
            await engine.resume_generation()


def change_settings(llm: Any, **values: Any) -> dict[str, Any]:
    """Change what an `LLM` does from its next call on, and return what is in effect.

        change_settings(llm, factor=1.2)
        change_settings(llm, mode="off")

    values: `mode` (the one that the engine was started with, or "off"), `factor`, `decode_keep`,
        `observe`, see *Change it while it serves* in the README.

    Raises:
        ValueError: with one sentence that says what came and what is accepted; nothing has changed.
        RuntimeError: the settings have changed, and vLLM can't forget what it has cached.
    """
    settings = _summary([llm.collective_rpc("moe_capacity_settings")])
    new = _target(llm.llm_engine.vllm_config, settings, values)
    _refuse_bad([llm.collective_rpc("moe_capacity_check", args=(new,))])
    llm.collective_rpc("moe_capacity_change", args=(new,))
    if not llm.reset_prefix_cache(reset_connector=True):
        raise RuntimeError("the settings have changed, but vLLM keeps its cached prefixes.")
    return new


def _target(vllm_config: Any, settings: dict[str, Any], values: Any) -> dict[str, Any]:
    """All that is to be in effect.

    Raises:
        ValueError: with one sentence.
    """
    started = Live.of(capacity_config(vllm_config.additional_config))
    return started.changed(settings["now"]).changed(values).to_dict()


async def _forget(engine: Any) -> bool:
    """Forget cached prefixes, and let running requests start over. Returns whether that went."""
    try:
        return bool(
            await engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        )
    except Exception as error:  # as while a request waits for its keys and values from elsewhere
        logger.warning("MoE capacity changed, but cached prefixes stay: %s", error)
        return False


def _is_alone(engine: Any) -> bool:
    """Whether this front end speaks for all data parallel engines, and no other does."""
    parallel = engine.vllm_config.parallel_config
    everywhere: int = parallel.data_parallel_size
    alone = parallel._api_process_count == 1
    return alone and len(engine.engine_core.core_engines) >= everywhere


def _refuse_bad(checked: Answers) -> None:
    """What a worker can't do, or what no layer takes. checked: `moe_capacity_check` of all.

    Raises:
        ValueError: with one sentence.
    """
    answers = [answer for workers in checked for answer in workers]
    for answer in answers:
        if answer["error"]:
            raise ValueError(answer["error"])
    if answers[0]["new"] and not any(answer["takes"] for answer in answers):
        raise ValueError(
            f"the change ({answers[0]['new']}) reaches no layer: all have settings of their own "
            "(--moe-capacity-layers), so mode 'off', or a restart with others, is accepted."
        )


def _summary(answers: Answers) -> dict[str, Any]:
    """`started`, `now` of the first worker, and whether all `agree`."""
    settings = [answer for workers in answers for answer in workers]
    return {**settings[0], "agree": all(each == settings[0] for each in settings)}
