"""What a front end has in place, whichever process made its configuration.

A server and `LLM` make their configuration themselves. Ray Serve makes it in a task of its own and
sends it to the replica that serves, and there vLLM loads no plugin by itself: no series would be
published, and nobody would ask the engine cores for their proof.
"""

from importlib import import_module
from operator import itemgetter
from typing import Any

from vllm_capmoe.integration import checks, compat, metrics, proof, readings
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
        config = capacity_config(vllm_config.additional_config)
        if config.enabled:
            checks.check_environment(config)
            readings.check(readings.OF_FRONT_ENDS)
            compat.apply(metrics.patches, proof.front_end_patches)
            # Engine cores and workers read it without the package, too: `proof` says who and where.
            _send_with(vllm_config, _Plugins())
        return original(vllm_config)

    return get_class


class _Plugins:
    """Where it arrives, vLLM loads its general plugins, and it is None from there on."""

    def __reduce__(self) -> tuple[Function, tuple[()]]:
        from vllm.plugins import load_general_plugins

        return load_general_plugins, ()


class _Required:
    """It arrives only where this package is installed, and is registered there."""

    def __reduce__(self) -> tuple[Function, tuple[str]]:
        return import_module, ("vllm_capmoe.integration.required",)


class _InstanceId(str):
    """vLLM's name of an engine. Sent to another process, it is a plain string there, and what it
    `brings` comes first."""

    brings: Any

    def __reduce__(self) -> tuple[Function, tuple[tuple[str, Any]]]:
        return itemgetter(0), ((str(self), self.brings),)


def require_plugin(vllm_config: Any) -> None:
    """Let this configuration be read only where this package is installed.

    Until a front end has it: who makes an engine of it without the plugin would serve without a
    mode, and nobody would ask for a proof.
    """
    _send_with(vllm_config, _Required())


def _send_with(vllm_config: Any, brings: Any) -> None:
    """In a field that vLLM has, since it makes the configuration of a draft model by copying
    fields."""
    vllm_config.instance_id = _InstanceId(vllm_config.instance_id)
    vllm_config.instance_id.brings = brings
