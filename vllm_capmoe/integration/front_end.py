"""What a front end has in place, whichever process made its configuration.

A server and `LLM` make their configuration themselves. Ray Serve makes it in a task of its own and
sends it to the replica that serves, and there vLLM loads no plugin by itself: no series would be
published, and nobody would ask the engine cores for their proof.
"""

from operator import itemgetter
from typing import Any

from vllm_capmoe.integration import compat, metrics, proof, readings
from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.settings import capacity_config


def patches() -> list[Patch]:
    """What looks at the configuration whenever an engine is about to be made.

    vllm.v1.executor.abstract.Executor.get_class: every maker of an `AsyncLLM` or `LLMEngine` calls
        it first. It can go once vLLM passes its configuration to general plugins.
    """
    from vllm.v1.executor.abstract import Executor

    return [Patch(Executor, "get_class", _prepare_first, ("vllm_config",))]


def _prepare_first(original: Function) -> Function:
    def get_class(vllm_config: Any) -> Any:
        if capacity_config(vllm_config.additional_config).enabled:
            readings.check(readings.OF_FRONT_ENDS)
            compat.apply(metrics.patches, proof.front_end_patches)
        return original(vllm_config)

    return get_class


class _Plugins:
    """Where it arrives, vLLM loads its general plugins, and it is None from there on."""

    def __reduce__(self) -> tuple[Function, tuple[()]]:
        from vllm.plugins import load_general_plugins

        return load_general_plugins, ()


class _InstanceId(str):
    """vLLM's name of an engine. Sent to another process, it is a plain string there, and brings
    the plugins first."""

    def __reduce__(self) -> tuple[Function, tuple[tuple[str, _Plugins]]]:
        return itemgetter(0), ((str(self), _Plugins()),)


def send_plugins_with(vllm_config: Any) -> None:
    """Have the plugins loaded by the process that this configuration is sent to.

    By functions of vLLM's and Python's: a process without this package reads it, too, see `proof`.
    In a field that vLLM has, since it makes the configuration of a draft model by copying fields.
    """
    vllm_config.instance_id = _InstanceId(vllm_config.instance_id)
