"""Where the settings stand in vLLM's configuration, and how every process reads them."""

from typing import Any

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.layer_settings import shown

KEY = "moe_capacity"
PREFIX = "moe_capacity_"  # of keywords and of parsed flags


def capacity_config(additional_config: Any) -> CapacityConfig:
    """The `CapacityConfig` in an `additional_config`; mode `off` where there is none.

    Raises:
        ValueError: what is there isn't a dict, or holds an unknown key or a bad value.
    """
    if not isinstance(additional_config, dict):
        return CapacityConfig()
    for key in additional_config:
        plain = str(key).lower().replace("-", "_")
        if key != KEY and (plain == KEY or plain.startswith(PREFIX)):
            raise ValueError(
                f"additional_config has the key {shown(key)}, but {KEY!r} is accepted, with a "
                'dict of settings such as {"mode": "expanded", "factor": 1.5}.'
            )
    found = additional_config.get(KEY)
    if found is None:
        return CapacityConfig()
    if not isinstance(found, dict):
        raise ValueError(
            f'additional_config["{KEY}"] is {shown(found)}, but a dict of settings is accepted, '
            'such as {"mode": "expanded", "factor": 1.5}.'
        )
    return CapacityConfig.from_dict(found)


def current_config() -> CapacityConfig:
    """The settings of the engine whose model vLLM is building right now."""
    from vllm.config import get_current_vllm_config

    return capacity_config(get_current_vllm_config().additional_config)
