"""Scope `request`: nothing of another request may change a request's experts.

The routing sees to it within a step. What a prompt's beginning becomes depends on the rest of that
prompt, since both share a limit, so keys and values must not go from one request to another either:
a cached prefix would carry one request's limit into another one.
"""

from typing import TYPE_CHECKING, Any

from vllm_capmoe.config import CapacityConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# KV connectors of vLLM 0.32 and 0.33 that find a cache by its request, as their code reads: what
# was computed for a request before it came here (prefill elsewhere), ...
HAND_ON = (
    "MooncakeConnector",
    "MoRIIOConnector",
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
)
# ... or nothing at all: they keep a request's own cache in another place, write, or make one up.
LOAD_NOTHING = ("DecodeBenchConnector", "ExampleHiddenStatesConnector", "HiSparseConnector")
# All others look for blocks that have the same tokens.


def turn_prefix_caching_off(config: CapacityConfig, engine_args: "EngineArgs") -> None:
    """In scope `request`, unless prefix caching was asked for: that is refused."""
    from vllm.logger import init_logger

    if config.scope != "request" or config.observe:
        return
    if engine_args.enable_prefix_caching:
        raise ValueError(_prefix_caching())
    engine_args.enable_prefix_caching = False
    init_logger("vllm.capmoe").info_once("MoE capacity: scope 'request' turns prefix caching off.")


def check_caches(config: CapacityConfig, vllm_config: "VllmConfig") -> None:
    """Refuse, in scope `request`, what hands one request's keys and values to another.

    Raises:
        ValueError: with one sentence that says what and why.
    """
    if config.scope != "request" or config.observe:
        return
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    if cache.enable_prefix_caching:
        raise ValueError(_prefix_caching())
    if cache.kv_offloading_size is not None:
        raise ValueError(
            "--moe-capacity-scope is 'request', but --kv-offloading-size "
            f"{cache.kv_offloading_size} hands what one request computed to others: scope 'batch', "
            "or no offloading, is accepted."
        )
    for connector in _connectors(transfer):
        if connector not in HAND_ON + LOAD_NOTHING:
            raise ValueError(
                f"--moe-capacity-scope is 'request', but --kv-transfer-config has {connector}, "
                "which hands what one request computed to others, or isn't known not to: scope "
                "'batch', or a connector of vLLM's that hands on a request's own cache "
                f"({', '.join(HAND_ON)}), is accepted."
            )


def _connectors(transfer: Any) -> list[str]:
    """The connectors of a `KVTransferConfig`, those within a MultiConnector included."""
    if transfer is None or transfer.kv_connector is None:
        return []
    if transfer.kv_connector_module_path:
        return [f"{transfer.kv_connector_module_path}.{transfer.kv_connector}"]
    if transfer.kv_connector != "MultiConnector":
        return [transfer.kv_connector]
    children = transfer.kv_connector_extra_config.get("connectors", [])
    return [name for child in children for name in _connectors(type(transfer)(**child))]


def _prefix_caching() -> str:
    return (
        "--moe-capacity-scope is 'request', but --enable-prefix-caching hands what one request "
        "computed to others: --no-enable-prefix-caching, the default with this scope, is accepted."
    )
