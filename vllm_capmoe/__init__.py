"""Capacity-aware routing of mixture-of-experts models for vLLM (arXiv 2503.05066).

The public names are looked up when they are first used (PEP 562), so that importing the package
imports neither torch nor vLLM. vLLM imports it in every process for its entry point.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_capmoe.config import CapacityConfig
    from vllm_capmoe.integration import register
    from vllm_capmoe.integration.live_engine import change_settings
    from vllm_capmoe.integration.required import Required
    from vllm_capmoe.ops import Routing, route

    __version__: str

__all__ = [
    "CapacityConfig",
    "Required",
    "Routing",
    "__version__",
    "change_settings",
    "register",
    "route",
]

_HOME = {
    "CapacityConfig": "vllm_capmoe.config",
    "Required": "vllm_capmoe.integration.required",
    "Routing": "vllm_capmoe.ops",
    "change_settings": "vllm_capmoe.integration.live_engine",
    "register": "vllm_capmoe.integration",
    "route": "vllm_capmoe.ops",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("vllm_capmoe.version").own_version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
