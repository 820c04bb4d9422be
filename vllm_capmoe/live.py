"""What of the settings can change while an engine serves. Standard library only.

An engine is bound at its start: modes, rows, buffers. What can change is what a layer reads anew in
every step: the factor, whether there is a limit at all, k0 of decode keep, and whether decisions
are applied or only counted. `Live` says what each of them may become, and what a layer then does;
`vllm_capmoe.integration` has what does it: live_worker.py, live_engine.py, and endpoint.py over
HTTP.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_capmoe.config import OPTIONS, CapacityConfig, ConfigError
from vllm_capmoe.layer_settings import shown

KEYS = ("mode", "factor", "decode_keep", "observe")
"""The keys of a change, as those of `CapacityConfig`."""

_OPTIONS = {option.key: option for option in OPTIONS if option.key in KEYS}


@dataclass(frozen=True)
class Live:
    """What is in effect in an engine.

    started: the settings that it was started with. is_on: if not, every layer is plain top-k, as
    with mode off, whatever it was started with. factor, decode_keep, observe: as in
    `CapacityConfig`; settings by layer go before them, as at the start.

        >>> live = Live.of(CapacityConfig(mode="drop"))
        >>> live.changed({"factor": 1.2}).to_dict()
        {'mode': 'drop', 'factor': 1.2, 'decode_keep': 'off', 'observe': False}
        >>> live.changed({"mode": "expanded"})
        Traceback (most recent call last):
        ...
        vllm_capmoe.config.ConfigError: mode is 'expanded', but this engine was started with \
'drop': 'drop' or 'off' is accepted.
    """

    started: CapacityConfig
    is_on: bool
    factor: int | float | str
    decode_keep: int | str
    observe: bool

    @classmethod
    def of(cls, started: CapacityConfig) -> "Live":
        """What is in effect at the start."""
        return cls(started, True, started.factor, started.decode_keep, started.observe)

    @property
    def mode_on(self) -> str:
        """The mode that stands for what the engine was started with.

        "on" where its general mode is off, and what it does is decode keep, or by layer.
        """
        return "on" if self.started.mode == "off" else self.started.mode

    def to_dict(self) -> dict[str, Any]:
        """What is in effect as plain JSON values; an infinite factor is the text "inf"."""
        return {
            "mode": self.mode_on if self.is_on else "off",
            "factor": "inf" if self.factor == math.inf else self.factor,
            "decode_keep": self.decode_keep,
            "observe": self.observe,
        }

    def changed(self, values: Any) -> "Live":
        """This with some of `KEYS` changed.

        Raises:
            ConfigError: with one sentence that says what came and what is accepted.
        """
        accepted = ", ".join(KEYS)
        if not isinstance(values, Mapping) or not values:
            raise ConfigError(
                f"the change is {shown(values)}, but an object with some of {accepted} is accepted."
            )
        for key in values:
            if key not in KEYS:
                raise ConfigError(
                    f"the change has {shown(key)}, but {accepted} can change while an engine "
                    "serves: all else needs a restart."
                )
        new = self
        if "mode" in values:
            new = replace(new, is_on=self._is_on(values["mode"]))
        if "factor" in values:
            new = replace(new, factor=self._factor(values["factor"]))
        if "decode_keep" in values:
            new = replace(new, decode_keep=self._decode_keep(values["decode_keep"]))
        if "observe" in values:
            new = replace(new, observe=self._observe(values["observe"]))
        return new

    def for_layer(self, layer: int) -> CapacityConfig:
        """What is in effect in the decoder layer of this number.

        Its mode stays what the layer is bound to: a limit that isn't there has the factor inf.
        """
        if not self.is_on:
            return replace(self.started.for_layer(layer), factor=math.inf, decode_keep="off")
        now = replace(self.started, factor=self.factor, decode_keep=self.decode_keep)
        return now.for_layer(layer)

    def reaches(self, layer: int, before: "Live") -> bool:
        """Whether a layer of this number could do otherwise now than `before`.

        Not where it has settings of its own for all that differs.
        """
        if (self.is_on, self.observe) != (before.is_on, before.observe):
            return True
        own = {
            key
            for entry in self.started.layers
            if entry.first <= layer <= entry.last
            for key, _ in entry.values
        }
        limited = self.started.for_layer(layer).mode != "off"
        return (self.factor != before.factor and limited and "factor" not in own) or (
            self.decode_keep != before.decode_keep and "decode_keep" not in own
        )

    def _is_on(self, mode: Any) -> bool:
        names = tuple(dict.fromkeys((self.mode_on, "on", "off")))
        if not isinstance(mode, str) or mode not in names:
            started = f"this engine was started with {self.started.mode!r}"
            raise ConfigError(
                f"mode is {shown(mode)}, but {started}: {self.mode_on!r} or 'off' is accepted."
            )
        return mode != "off"

    def _factor(self, value: Any) -> int | float | str:
        factor: int | float | str = _OPTIONS["factor"].check(value)
        if factor == self.factor:
            return factor
        if all(variant.mode == "off" for variant in self.started.variants):
            raise ConfigError(
                f"factor is {shown(value)}, but this engine was started with mode 'off' in every "
                "layer: there is no limit that it could set."
            )
        if self.started.factor == math.inf:
            raise ConfigError(
                f"factor is {shown(value)}, but this engine was started with 'inf': only an engine "
                "that was started with a limit can get another one."
            )
        return factor

    def _decode_keep(self, value: Any) -> int | str:
        keep: int | str = _OPTIONS["decode_keep"].check(value)
        started = self.started.decode_keep
        if started == "off" and keep != "off":
            raise ConfigError(
                f"decode_keep is {shown(value)}, but this engine was started with 'off': 'off' is "
                "accepted."
            )
        if keep == "auto" and started != "auto":
            raise ConfigError(
                f"decode_keep is 'auto', but this engine was started with {started!r}: an integer "
                "from 1 to the model's top-k, or 'off', is accepted."
            )
        return keep

    def _observe(self, value: Any) -> bool:
        observe: bool = _OPTIONS["observe"].check(value)
        if self.started.observe and not observe:
            raise ConfigError(
                "observe is False, but this engine was started with --moe-capacity-observe, on "
                "vLLM's own experts: True is accepted, and a restart without it."
            )
        return observe


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What changed, as text: `factor 1.5 -> 1.2`."""
    return ", ".join(f"{key} {old[key]} -> {new[key]}" for key in new if new[key] != old[key])
