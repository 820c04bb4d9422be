"""Settings by layer: the value of `--moe-capacity-layers`. Standard library only.

A JSON object names decoder layers, one by its number or several by a range, and what differs there
from the general settings; what a planner writes and an engine reads:

    {"0-3": {"mode": "off"}, "17": {"factor": 1.2}}

Numbers are those of the model's layers as vLLM names them (`model.layers.17.mlp.experts` is 17).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class LayerSettings:
    """What is set for the layers `first` to `last` (both included): pairs of key and value."""

    first: int
    last: int
    values: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The layers as they are written, "17" or "0-3"."""
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


def to_dict(entries: Iterable[LayerSettings]) -> dict[str, dict[str, Any]]:
    """The JSON object of some settings by layer; `parse` reads it back."""
    return {entry.name: dict(entry.values) for entry in entries}


def parse(value: Any, accepted: Iterable[str]) -> tuple[LayerSettings, ...]:
    """The settings by layer, in the order of the layers.

    Args:
        value: the JSON object as a mapping or as text, `@` and the name of a file with it, or
            "none"; what this function returned passes through.
        accepted: the keys that a layer may have of its own.

    Raises:
        ValueError: with one sentence that says what came and what is accepted.
    """
    if value in ("none", None, ()):
        return ()
    if isinstance(value, tuple) and all(isinstance(entry, LayerSettings) for entry in value):
        return value
    if isinstance(value, str):
        value = _read(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"it is {value!r}, but a JSON object of settings by layer is accepted")
    keys = tuple(accepted)
    entries = sorted(
        (_entry(name, settings, keys) for name, settings in value.items()),
        key=lambda entry: entry.first,
    )
    for left, right in zip(entries, entries[1:], strict=False):
        if right.first <= left.last:
            raise ValueError(
                f"{left.name!r} and {right.name!r} both name layer {right.first}, but one setting "
                "for each layer is accepted"
            )
    return tuple(entries)


def _read(text: str) -> Any:
    """The JSON of a text, or of the file that it names after `@`."""
    source = "it"
    if text.startswith("@"):
        source = f"the file {text[1:]!r}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it isn't UTF-8 text"
            raise ValueError(
                f"{source} can't be read ({reason}), but a file with a JSON object is accepted"
            ) from None
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{source} isn't JSON{where}, but a JSON object is accepted") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose names stands in it once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands in it twice, but each name is accepted once")
    return found


def _entry(name: Any, settings: Any, accepted: tuple[str, ...]) -> LayerSettings:
    match = _RANGE.fullmatch(name) if isinstance(name, str) else None
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise ValueError(f"it names the layers {name!r}, but '17' or a range '0-3' is accepted")
    if not isinstance(settings, Mapping) or not settings:
        raise ValueError(
            f"layer {name!r} has {settings!r}, but an object with at least one setting is accepted"
        )
    for key, value in settings.items():
        if key not in accepted:
            raise ValueError(
                f"layer {name!r} has the setting {key!r}, but {', '.join(accepted)} are accepted"
            )
        if not isinstance(value, _SCALARS):
            raise ValueError(
                f"layer {name!r} has {value!r} as {key}, but a word or a number is accepted"
            )
    return LayerSettings(first, last, tuple(sorted(settings.items())))
