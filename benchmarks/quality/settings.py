"""What is compared: settings of the plugin, and the tables that they belong to.

A setting is a dict of the plugin's keys. Settings that this version of the plugin doesn't know are
left out, so that the list can be run on an older one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vllm_capmoe.config import CapacityConfig, ConfigError

GAMMAS = (2.0, 1.5, 1.0)
CURVE = (3.0, 2.0, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25)
TABLES = ("rules", "metrics", "curve", "candidates", "scope", "renormalised")
METRICS = ("score", "order", "reverse-order", "random")
CAPPED, UNCAPPED = {"max_experts": "auto"}, {"max_experts": "none"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Keys of `additional_config["moe_capacity"]`, with a name that says all of them."""

    keys: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, mode: str, factor: float, **more: Any) -> Setting:
        return cls((("mode", mode), ("factor", factor), *sorted(more.items())))

    @property
    def name(self) -> str:
        mode, factor, *more = self.keys
        return " ".join(
            [str(mode[1]), f"{factor[1]:g}", *(f"{key}={value}" for key, value in more)]
        )

    @property
    def config(self) -> dict[str, Any]:
        # No floor: it is for short prompts, and these steps are long.
        return {"min_capacity": 1, **dict(self.keys)}

    @property
    def known(self) -> bool:
        try:
            CapacityConfig.from_dict(self.config)
        except ConfigError:
            return False
        return True


NONE = Setting.of("drop", float("inf"))
AGAIN = Setting.of("drop", float("inf"), metric="order")  # no limit once more: the noise

# The fill rule of Expanded Drop: by the paper it is the capacity.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "Token Drop": ("drop", {}),
    "reroute": ("reroute", {}),
    "Expanded, uncapped": ("expanded", UNCAPPED),
    "Expanded, uncapped, filled to C": ("expanded", {**UNCAPPED, "fill": "capacity"}),
    "Expanded, at most k": ("expanded", {"max_experts": "K"}),
}


def rule(name: str, factor: float, top_k: int) -> Setting:
    mode, keys = RULES[name]
    filled = {key: top_k if value == "K" else value for key, value in keys.items()}
    return Setting.of(mode, factor, **filled)


def tables(top_k: int) -> dict[str, dict[tuple[str, str], Setting]]:
    """Table -> (row, column) -> setting, the most telling tables first. top_k: k of the model."""
    result: dict[str, dict[tuple[str, str], Setting]] = {}
    result["rules"] = {
        (name, f"{gamma:g}"): rule(name, gamma, top_k)
        for gamma in (1.0, 1.5, 2.0)
        for name in RULES
    }
    result["metrics"] = {
        (metric, f"{gamma:g}"): Setting.of(
            "drop", gamma, **({} if metric == "score" else {"metric": metric})
        )
        for gamma in (1.0, 1.5, 2.0)
        for metric in METRICS
    }
    result["curve"] = {
        (name, f"{gamma:g}"): rule(name, gamma, top_k)
        for gamma in sorted(CURVE)
        for name in ("Token Drop", "reroute", "Expanded, uncapped")
    }
    result["candidates"] = {
        (f"m = {m // top_k}k", limit): Setting.of(
            "expanded",
            1.0,
            max_experts=top_k if limit == "at most k" else "none",
            **({} if m == top_k else {"expanded_experts": m}),
        )
        for m in (top_k, 2 * top_k, 3 * top_k)
        for limit in ("at most k", "uncapped")
    }
    result["scope"] = {
        (name, scope): dataclasses.replace(
            plain, keys=(*plain.keys, *((("scope", "request"),) if scope == "request" else ()))
        )
        for name in ("Token Drop", "reroute", "Expanded, uncapped")
        for plain in (rule(name, 1.0, top_k),)
        for scope in ("batch", "request")
    }
    result["renormalised"] = {
        (name, word): dataclasses.replace(
            plain, keys=(*plain.keys, *((("renormalize", "never"),) if word == "no" else ()))
        )
        for name in ("Token Drop", "Expanded, uncapped")
        for plain in (rule(name, 1.0, top_k),)
        for word in ("as the model", "no")
    }
    return {
        table: {place: setting for place, setting in cells.items() if setting.known}
        for table, cells in result.items()
    }


REQUESTS = (16, 2, 8, 4, 32, 64)  # the most telling first
KEEPS = (4, 6, 5, 3, 2)


def decode_setting(k0: int) -> Setting:
    """Decode keep, without a limit for prompts."""
    return Setting.of("drop", float("inf"), decode_keep=k0)


def auto_keep(requests: int, top_k: int) -> int:
    """k0 of decode keep `auto` in a step of so many requests."""
    by_tokens = CapacityConfig(decode_keep="auto").keeps(top_k) or (top_k,)
    return by_tokens[min(requests, len(by_tokens) - 1)]


def decode_settings(requests: int, top_k: int, keep: Sequence[int | str]) -> list[Setting]:
    """No decode keep, then these k0 below k; "16:4" is for 16 requests only.

    `auto` is measured as the k0 that it is there.
    """
    parts = [str(each).rpartition(":") for each in keep]
    here = [k0 for count, _, k0 in parts if count in ("", str(requests))]
    numbers = [auto_keep(requests, top_k) if k0 == "auto" else int(k0) for k0 in here]
    return [NONE, *(decode_setting(k0) for k0 in dict.fromkeys(numbers) if k0 < top_k)]


def all_settings(top_k: int, chosen: Sequence[str] = TABLES) -> list[Setting]:
    """Every setting of these tables once; no limit first and then again."""
    found = tables(top_k)
    settings = [NONE, AGAIN, *(setting for name in chosen for setting in found[name].values())]
    return list(dict.fromkeys(settings))
