"""vLLM's compile cache, keyed by those of our settings that change the graph.

vLLM hashes `additional_config` as it is. A new limit would mean a new compilation, although it is
not in the graph: the graph holds the call of `torch.ops.capmoe.route`, with the width of its
result, and whoever computes the experts; all else is read when they run. Other hashes of vLLM's
configuration (memory plans, the fingerprint in answers) stay whole.
"""

import copy
from typing import Any

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.settings import KEY, capacity_config
from vllm_capmoe.version import own_version

# Read within `torch.ops.capmoe.route`. What is not here, new options too, is in the key.
NOT_IN_GRAPH = {
    "factor",
    "fill",
    "metric",
    "min_capacity",
    "min_tokens",
    "priority",
    "renormalize",
    "scope",
}
# Without Expanded Drop a row is as wide as the model's top-k. The level says what candidates `auto`
# are, where several tensor parallel ranks hold a token (placement.py).
OF_WIDE_ROWS = {"candidates", "expanded_experts", "level", "max_experts"}


def patches() -> list[Patch]:
    """What computes the keys. Both can go once a plugin can say what changes the graph.

    vllm.compilation.caching.aot_compile_hash_factors: key of the compiled model as a whole.
    vllm.compilation.backends.VllmBackend.__init__: it keeps the configuration for the key of the
        compiled pieces.
    """
    from vllm.compilation import caching
    from vllm.compilation.backends import VllmBackend

    return [
        Patch(caching, "aot_compile_hash_factors", _by_graph, ("vllm_config",)),
        Patch(VllmBackend, "__init__", _backend_by_graph, ("vllm_config",)),
    ]


def graph_settings(config: CapacityConfig) -> dict[str, Any]:
    """What of a configuration is in the compiled graph, as JSON values."""
    general = config.variants[0]
    own = {entry.name: _of_layer(config.for_layer(entry.first)) for entry in config.layers}
    return {
        "version": own_version(),
        "general": _of_layer(general),
        "layers": {name: each for name, each in own.items() if each != _of_layer(general)},
    }


def _of_layer(config: CapacityConfig) -> dict[str, Any]:
    wide = config.mode == "expanded"
    left_out = NOT_IN_GRAPH | {"layers", "mode"} | (set() if wide else OF_WIDE_ROWS)
    kept = {key: value for key, value in config.to_dict().items() if key not in left_out}
    return {"on": config.mode != "off", "wide": wide, **kept}


def _reduced(vllm_config: Any) -> Any:
    """The same configuration, for a key."""
    config = capacity_config(vllm_config.additional_config)
    if not config.enabled:
        return vllm_config
    reduced = copy.copy(vllm_config)
    reduced.additional_config = {**vllm_config.additional_config, KEY: graph_settings(config)}
    return reduced


def _by_graph(original: Function) -> Function:
    def aot_compile_hash_factors(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        return original(_reduced(vllm_config), *args, **kwargs)

    return aot_compile_hash_factors


def _backend_by_graph(original: Function) -> Function:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, _reduced(vllm_config), *args, **kwargs)

    return __init__
