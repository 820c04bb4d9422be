"""Read a GGUF file: its metadata, and its tensors as float32 arrays.

Only what the example model needs: GGUF versions 2 and 3, tensors of type F32, F16, Q4_1 and Q8_0.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
# Tensor types: number -> (name, values per block, bytes per block).
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}


class GGUF:
    """An open GGUF file.

    metadata: the keys of its header with their values, arrays as lists.

    Raises ValueError where the file is no GGUF of a version that is read here.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        magic, version, tensors, pairs = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(
                f"{path} begins with {magic!r}, version {version}, but GGUF 2 or 3 is accepted."
            )
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._unpack("<I")[0])
        self._tensors = []
        for _ in range(tensors):
            name, (dimensions,) = self._string(), self._unpack("<I")
            sizes = self._unpack(f"<{dimensions}Q")
            self._tensors.append((name, sizes[::-1], *self._unpack("<IQ")))
        alignment = self.metadata.get("general.alignment", 32)
        self._start = math.ceil(self._at / alignment) * alignment

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Name and float32 value of every tensor, the slowest dimension first.

        Raises ValueError for a tensor of a type that isn't read here.
        """
        for name, shape, number, offset in self._tensors:
            if number not in TYPES:
                accepted = ", ".join(kind for kind, _, _ in TYPES.values())
                raise ValueError(f"Tensor {name} has type {number}, but {accepted} are accepted.")
            kind, values, size = TYPES[number]
            blocks = math.prod(shape) // values
            raw = np.frombuffer(self._data, np.uint8, blocks * size, self._start + offset)
            yield name, dequantize(kind, raw.reshape(blocks, size)).reshape(shape)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return found

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            kind, count = self._unpack("<IQ")
            return [self._value(kind) for _ in range(count)]
        return self._unpack(SCALARS[kind])[0]


def dequantize(kind: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values of blocks: uint8 [blocks, bytes of each] -> float32 [blocks, values of each].

    Q8_0: a float16 scale d, 32 int8 q; d * q. Q4_1: float16 d and m, 32 q of four bits, value i and
    i + 16 in byte i (the first in its low half); d * q + m.
    """
    if kind == "F32":
        return blocks.view("<f4")
    if kind == "F16":
        return blocks.view("<f2").astype(np.float32)
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    if kind == "Q8_0":
        return scale * blocks[:, 2:].view(np.int8)
    least = blocks[:, 2:4].view("<f2").astype(np.float32)
    quarters = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * quarters + least
