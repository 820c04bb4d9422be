"""The counters of several workers together."""

from collections.abc import Iterable
from typing import Any


def layers_of(engines: Iterable[list[list[dict[str, Any]]]]) -> Iterable[dict[str, Any]]:
    """The layers' counters of all data parallel engines; every engine answers worker by worker.

    Within an engine each layer is taken once, since its tensor parallel ranks all count the same
    tokens; under sequence parallelism once for each part of the tokens.
    """
    for workers in engines:
        counted = {(layer["layer"], layer["part"]): layer for each in workers for layer in each}
        yield from counted.values()
