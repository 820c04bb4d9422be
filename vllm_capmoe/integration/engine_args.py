"""The engine arguments: flags, keywords of `LLM(...)`, and `additional_config["moe_capacity"]`.

All three end in `additional_config`, the one place that vLLM hashes into its compile cache key and
sends to every worker process. These patches touch the parsing of arguments only; the execution
path of vLLM stays as it is until a worker starts with a mode other than `off` (see worker.py).
"""

import argparse
from typing import Any

from vllm_capmoe.config import OPTIONS, CapacityConfig
from vllm_capmoe.integration import checks, compat, front_end, isolation, readings
from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.settings import KEY, PREFIX, capacity_config
from vllm_capmoe.layer_settings import shown

GROUP = "MoECapacityConfig"
_DESCRIPTION = (
    "Capacity-aware Mixture-of-Experts inference (vllm-capmoe): bounds the load of every expert "
    "or device. Off unless --moe-capacity-mode or --moe-capacity-decode-keep is given."
)


def patches() -> list[Patch]:
    """What teaches `EngineArgs` our arguments. All can go once vLLM lets a plugin add some itself.

    EngineArgs.create_engine_config: validates, before and after vLLM builds its config.
    EngineArgs.__init__, AsyncEngineArgs.__init__: accept `moe_capacity_*` keywords, which is how
        `LLM(moe_capacity_mode=...)` arrives.
    EngineArgs.add_cli_args: adds our group; serve, bench, launch and run-batch all call it.
    EngineArgs.from_cli_args: carries the parsed flags over.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    return [
        Patch(EngineArgs, "create_engine_config", _validate, ("self",)),
        Patch(EngineArgs, "__init__", _accept_keywords, ("additional_config",)),
        Patch(AsyncEngineArgs, "__init__", _accept_keywords, ("additional_config",)),
        Patch(EngineArgs, "add_cli_args", _add_group, ("parser",)),
        Patch(EngineArgs, "from_cli_args", _carry_flags, ("cls", "args")),
    ]


def refuse_modes(error: compat.IncompatibleVLLMError) -> None:
    """Where the patches don't fit this vLLM: let a mode in `additional_config` raise `error`."""
    from vllm.engine.arg_utils import EngineArgs

    def refuse(original: Function) -> Function:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            if capacity_config(self.additional_config).enabled:
                raise error
            return original(self, *args, **kwargs)

        return create_engine_config

    compat.apply(lambda: [Patch(EngineArgs, "create_engine_config", refuse, ("self",))])


def merge(additional_config: Any, given: dict[str, Any]) -> Any:
    """Fold `given` settings (key -> value) into an `additional_config` and return the new one.

    Raises:
        ValueError: a setting came twice with different values, or a value isn't accepted.
    """
    if not given:
        return additional_config
    if not isinstance(additional_config, dict):
        raise ValueError(
            f"--moe-capacity-{next(iter(given)).replace('_', '-')} needs an additional_config that "
            f"is a dict, but it is a {type(additional_config).__name__}."
        )
    configured, wanted = capacity_config(additional_config), CapacityConfig.from_dict(given)
    before = additional_config.get(KEY) or {}
    for key in given:
        if key in before and getattr(configured, key) != getattr(wanted, key):
            raise ValueError(
                f"--moe-capacity-{key.replace('_', '-')} came as {shown(given[key])} and in "
                f'additional_config["{KEY}"] as {shown(before[key])}: one value is accepted.'
            )
    merged = CapacityConfig.from_dict({**before, **given})
    return {**additional_config, KEY: merged.to_dict()}


def _accept_keywords(original: Function) -> Function:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        keys = {PREFIX + option.key: option.key for option in OPTIONS}
        given = {keys[name]: kwargs.pop(name) for name in list(kwargs) if name in keys}
        original(self, *args, **kwargs)
        self.additional_config = merge(self.additional_config, given)

    return __init__


def _add_group(original: Function) -> Function:
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        group = parser.add_argument_group(title=GROUP, description=_DESCRIPTION)
        for option in OPTIONS:
            # Suppressed, so that a flag not given isn't taken for a setting.
            said = {
                "default": argparse.SUPPRESS,
                "help": f"{option.help} ({option.values}; default: {option.default_text}).",
            }
            if isinstance(option.default, bool):
                group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **said)
                continue
            choices = "{" + ",".join(option.choices) + "}" if option.choices else None
            group.add_argument(option.flag, type=option.parse, metavar=choices, **said)
        return parser

    return add_cli_args


def _carry_flags(original: Function) -> Function:
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        given = {
            option.key: getattr(args, PREFIX + option.key)
            for option in OPTIONS
            if hasattr(args, PREFIX + option.key)
        }
        engine_args.additional_config = merge(engine_args.additional_config, given)
        # Further API servers are made from these arguments, before they have loaded any plugin.
        args.additional_config = engine_args.additional_config
        return engine_args

    return from_cli_args


def _validate(original: Function) -> Function:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = capacity_config(self.additional_config)
        if not config.enabled:
            if isinstance(self.additional_config, dict):  # vLLM hashes what is there
                self.additional_config = {
                    k: v for k, v in self.additional_config.items() if k != KEY
                }
            return original(self, *args, **kwargs)
        # As it was read here, for all processes: a file of layers may be here alone, or change.
        self.additional_config = {**self.additional_config, KEY: config.to_dict()}
        readings.check(readings.OF_CONFIGURATION)
        checks.check_environment(config)
        isolation.turn_prefix_caching_off(config, self)
        vllm_config = original(self, *args, **kwargs)
        checks.check_engine(config, vllm_config)
        front_end.require_plugin(vllm_config)
        return vllm_config

    return create_engine_config
