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


def layer_number(layer_name: str) -> int:
    """The number of the decoder layer that an MoE layer belongs to, by the name vLLM gives it.

    `model.layers.17.mlp.experts` is 17; -1 for a name without a number.
    """
    found = re.search(r"\blayers?\.(\d+)\b", layer_name) or re.search(r"\.(\d+)\b", layer_name)
    return int(found[1]) if found else -1


def to_dict(entries: Iterable[LayerSettings]) -> dict[str, dict[str, Any]]:
    """The JSON object of some settings by layer; `parse` reads it back."""
    return {entry.name: dict(entry.values) for entry in entries}


def shown(value: Any) -> str:
    """What came, for the sentence that refuses it: as Python writes it, of at most 100 letters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; a deep nest
        text = f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= 100 else f"{text[:97]}..."


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
        raise ValueError(
            f"it is {shown(value)}, but a JSON object of settings by layer is accepted"
        )
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
        source = f"the file {shown(text[1:])}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it isn't UTF-8 text"
            raise ValueError(
                f"{source} can't be read ({reason}), but a file with a JSON object is accepted"
            ) from None
    return read_json(text, source)


def read_json(text: str | bytes, source: str) -> Any:
    """The JSON of a text, in whose objects each name stands once.

    source: what the text is, for the error.

    Raises:
        ValueError: it isn't JSON, or nothing that could be meant; in words that end without a stop.
    """
    accepted = "but a JSON object is accepted"
    try:
        return json.loads(text, object_pairs_hook=_only_once, parse_int=_short_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} isn't JSON (line {error.lineno}), {accepted}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{source} isn't UTF-8 text, {accepted}") from None
    except RecursionError:
        raise ValueError(f"{source} isn't JSON that ends (a deep nest), {accepted}") from None


def _only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} stands in it twice, but each name is accepted once")
    return found


def _short_integer(digits: str) -> int:
    if len(digits) > 400:
        raise ValueError(f"it has an integer of {len(digits)} digits, but up to 400 are accepted")
    return int(digits)


def _entry(name: Any, settings: Any, accepted: tuple[str, ...]) -> LayerSettings:
    match = _RANGE.fullmatch(name) if isinstance(name, str) else None
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise ValueError(
            f"it names the layers {shown(name)}, but '17' or a range '0-3' is accepted"
        )
    if not isinstance(settings, Mapping) or not settings:
        raise ValueError(
            f"layer {name!r} has {shown(settings)}, but an object with at least one setting is "
            "accepted"
        )
    for key, value in settings.items():
        if key not in accepted:
            raise ValueError(
                f"layer {name!r} has the setting {shown(key)}, but "
                f"{', '.join(accepted)} are accepted"
            )
        if not isinstance(value, _SCALARS):
            raise ValueError(
                f"layer {name!r} has {shown(value)} as {key}, but a word or a number is accepted"
            )
    return LayerSettings(first, last, tuple(sorted(settings.items())))
