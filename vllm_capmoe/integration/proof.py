"""Every process or none: before the first request each worker says what it is bound to.

A worker without the plugin serves stock vLLM without a word, and of several tensor parallel ranks
one that routes otherwise than the others gives garbage. So it is asked for twice:

    the engine core asks its workers, as soon as the model is loaded     names the worker and why
    the front end asks all engine cores, before it takes a request       also where a core has no
                                                                         plugin, on another node
"""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.settings import capacity_config
from vllm_capmoe.version import own_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

METHOD = "moe_capacity_proof"  # of a worker
Proof = dict[str, Any]


def proof(config: CapacityConfig, layers: int) -> Proof:
    """What a worker is bound to. layers: how many of its MoE layers are asked for anything."""
    return {"version": own_version(), "settings": config.to_dict(), "layers": layers}


def core_patches() -> list[Patch]:
    """What asks in the engine core, which is in a process of its own or in the front end's.

    vllm.v1.executor.abstract.Executor.get_kv_cache_specs: what the core asks its workers first,
        once their models are loaded. It can go once vLLM has a hook there.
    """
    from vllm.v1.executor.abstract import Executor

    return [Patch(Executor, "get_kv_cache_specs", _ask_workers_first, ("self",))]


def front_end_patches() -> list[Patch]:
    """What asks in the front end. Both can go once vLLM says which plugins its cores have loaded.

    vllm.v1.engine.async_llm.AsyncLLM.get_supported_tasks,
    vllm.v1.engine.llm_engine.LLMEngine.get_supported_tasks: servers and `LLM` call it when they
        start, and every engine with its first request.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    return [
        Patch(AsyncLLM, "get_supported_tasks", _ask_engines_first, ("self",)),
        Patch(LLMEngine, "get_supported_tasks", _ask_engine_first, ("self",)),
    ]


def check(vllm_config: "VllmConfig", proofs: Iterable[tuple[str, Proof | None]]) -> None:
    """Refuse workers that are bound to something else than this process was told, or to nothing.

    proofs: who a worker is, and its proof; None from one that can't give any.

    Raises:
        ValueError: with one sentence that says which worker and why, or that the settings ask
            nothing of any MoE layer.
    """
    config = capacity_config(vllm_config.additional_config)
    mode, layers = f"{config.asked}, but", 0
    wanted = proof(config, 0)
    for worker, given in proofs:
        if given is None:
            raise ValueError(
                f"{mode} {worker} is without the plugin and would serve without it: vllm-capmoe "
                f"{wanted['version']} is accepted in every process, installed there and not kept "
                "out by VLLM_PLUGINS."
            )
        if given["version"] != wanted["version"]:
            raise ValueError(
                f"{mode} {worker} has vllm-capmoe {given['version']}: {wanted['version']}, as "
                "here, is accepted in every process."
            )
        for key, value in wanted["settings"].items():
            if given["settings"].get(key) != value:
                raise ValueError(
                    f"{mode} {worker} is bound to {key} {given['settings'].get(key)!r}: {value!r}, "
                    "as here, is accepted in every process."
                )
        layers += given["layers"]
    # A process of an external launcher knows one stage of a pipeline only.
    whole = vllm_config.parallel_config.distributed_executor_backend != "external_launcher"
    if whole and not layers:
        raise ValueError(
            f"{mode} it holds for no vLLM MoE layer of {vllm_config.model_config.model}: 'off', or "
            "settings for one, are accepted."
        )


def ask(executor: Any) -> list[tuple[str, Proof | None]]:
    """Who every worker of an executor is, and its proof."""

    def answer(worker: Any, method: str) -> tuple[str, Any]:
        # Sent by value to a process that may lack the plugin: nothing of this module is at hand.
        import os
        import socket

        prove = getattr(worker, method, None)
        who = f"worker {worker.rank} (process {os.getpid()} on {socket.gethostname()})"
        return who, prove() if prove else None

    found: list[tuple[str, Proof | None]] = executor.collective_rpc(answer, args=(METHOD,))
    return found


def _is_on(vllm_config: "VllmConfig") -> bool:
    return capacity_config(vllm_config.additional_config).enabled


def _ask_workers_first(original: Function) -> Function:
    def get_kv_cache_specs(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_on(self.vllm_config):
            check(self.vllm_config, ask(self))
        return original(self, *args, **kwargs)

    return get_kv_cache_specs


def _named(engines: Iterable[Any]) -> list[tuple[str, Proof | None]]:
    """Who every worker of the engines is, and its proof.

    engines: the proofs of each engine's workers, or the exception that came instead.
    """
    found: list[tuple[str, Proof | None]] = []
    for number, engine in enumerate(engines):
        if isinstance(engine, BaseException):
            if METHOD not in str(engine):  # another failure than that a worker has no such method
                raise engine
            engine = [None]
        found += [(f"a worker of engine {number}", each) for each in engine]
    return found


ASKED = "moe_capacity_asked"  # of a front end


def _ask_engines_first(original: Function) -> Function:
    async def get_supported_tasks(self: Any) -> Any:
        if not hasattr(self, ASKED):
            if _is_on(self.vllm_config):
                core = self.engine_core
                rpc: tuple[Any, ...] = ("collective_rpc", METHOD, None, (), {})
                asked = [core._call_utility_async(*rpc, engine=each) for each in core.core_engines]
                engines = await asyncio.gather(*asked, return_exceptions=True)
                check(self.vllm_config, _named(engines))
            setattr(self, ASKED, True)
        return await original(self)

    return get_supported_tasks


def _ask_engine_first(original: Function) -> Function:
    def get_supported_tasks(self: Any) -> Any:
        if not hasattr(self, ASKED):
            if _is_on(self.vllm_config):
                try:
                    engine: Any = self.engine_core.collective_rpc(METHOD)
                except Exception as error:
                    engine = error
                check(self.vllm_config, _named([engine]))
            setattr(self, ASKED, True)
        return original(self)

    return get_supported_tasks
