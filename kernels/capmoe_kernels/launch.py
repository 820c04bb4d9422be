"""How the expert kernels are launched: frozen configurations, heuristics, files of tuned values.

Standard library only, so everything here can be tested without a GPU. Letters: T tokens, W places
per token, E experts here, H hidden size, I intermediate size, M/N/K the sides of a tile.

A file of tuned values looks as vLLM's for its fused MoE, and such a file can be read as it is:

    {"1": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1,
           "num_warps": 4, "num_stages": 4}, "4096": {...}}

A key is a number of tokens T; the nearest key is used. BLOCK_SIZE_N counts rows of w13, gates and
ups together, as there. Beyond that format: the optional keys of ``_KEYS`` and ``PDL``, and the
optional sub-dictionaries ``gate_up`` and ``down`` (what differs for one of the two products) and
``combine`` (fields of :class:`CombineConfig`).
The name of a file is that of vLLM, too: ``E=8,N=14336,device_name=NVIDIA_H200.json``.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = [
    "Chip",
    "CombineConfig",
    "ExpertsConfig",
    "GemmConfig",
    "choose_config",
    "config_file_name",
    "default_config",
    "fit",
    "load_configs",
    "nearest_config",
    "num_tiles_bound",
    "shared_bytes",
]

CONFIG_FOLDER = Path(__file__).resolve().parent / "configs"
# Tuned files of the user, searched first; vLLM's counterpart is VLLM_TUNED_CONFIG_FOLDER.
CONFIG_FOLDER_VARIABLE = "CAPMOE_TUNED_CONFIG_FOLDER"

PRECISIONS = ("tf32", "tf32x3", "ieee")
WARPS = (1, 2, 4, 8, 16)

# JSON key -> field of GemmConfig. The first six are vLLM's.
_KEYS = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
    "PROGRAMS_PER_SM": "programs_per_sm",
    "SPLIT_K": "split_k",
    "SWAP_AB": "swap_ab",
    "USE_TMA": "use_tma",
    "FLATTEN": "flatten",
    "WARP_SPECIALIZE": "warp_specialize",
    "input_precision": "input_precision",
}
_REQUIRED = tuple(_KEYS)[:6]

# Most shared memory of one program, bytes, by compute capability (CUDA programming guide, table
# "technical specifications per compute capability"). Others get the least of these.
_SHARED_LIMITS = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (12, 0): 99 * 1024,
}
_SHARED_RESERVED = 1024  # what the system keeps of each program's share, compute capability 8.0+


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Chip:
    """What the heuristics know of a device.

    capability: CUDA compute capability, None for other makes. num_sms: multiprocessors.
    """

    capability: tuple[int, int] | None
    num_sms: int

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors become bulk copies by hardware."""
        return self.capability is not None and self.capability >= (9, 0)

    @property
    def shared_limit(self) -> int:
        """Most shared memory of one program, bytes."""
        if self.capability is None:
            return 64 * 1024  # AMD's LDS up to MI300
        return _SHARED_LIMITS.get(self.capability, 99 * 1024)


@dataclass(frozen=True)
class GemmConfig:
    """Launch of one grouped product.

    block_m: seats per tile. block_n: rows of the weight matrix per tile; for a gated w13 half of
    them are gates, half ups. block_k: columns per step. group_m: m-tiles that share a weight tile
    before the next one is read. programs_per_sm: programs of the persistent grid for each
    multiprocessor. split_k: parts of the sum over I (down product only). swap_ab: weights on the
    tensor core's long side. use_tma: tensor descriptors where shapes and chip allow them.
    flatten, warp_specialize: options of ``tl.range`` for the loop over tiles; Triton warp
    specialises on Blackwell only. input_precision: products of float32 inputs, as ``tl.dot``: in
    float32 (``ieee``), or by the tensor cores with less of it.

    Raises ValueError where a value is out of range.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 1
    split_k: int = 1
    swap_ab: bool = False
    use_tma: bool = True
    flatten: bool = False
    warp_specialize: bool = False
    input_precision: str = "ieee"

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            value = getattr(self, name)
            if not _is_int(value) or value < 16 or value > 512 or value & (value - 1):
                raise ValueError(
                    f"{name} is {value!r}, but it must be a power of two from 16 to 512."
                )
        if self.num_warps not in WARPS:
            raise ValueError(f"num_warps is {self.num_warps!r}, but it must be one of {WARPS}.")
        for name in ("group_m", "num_stages", "programs_per_sm", "split_k"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least 1.")
        for name in ("swap_ab", "use_tma", "flatten", "warp_specialize"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, but it must be true or false.")
        if self.input_precision not in PRECISIONS:
            raise ValueError(
                f"input_precision is {self.input_precision!r}, but it must be one of "
                f"{', '.join(PRECISIONS)}."
            )


@dataclass(frozen=True)
class CombineConfig:
    """Launch of the sum over a token's places. block_h: columns of one program."""

    block_h: int = 1024
    num_warps: int = 4

    def __post_init__(self) -> None:
        if not _is_int(self.block_h) or self.block_h < 16 or self.block_h & (self.block_h - 1):
            raise ValueError(
                f"block_h is {self.block_h!r}, but it must be a power of two of at least 16."
            )
        if self.num_warps not in WARPS:
            raise ValueError(f"num_warps is {self.num_warps!r}, but it must be one of {WARPS}.")


@dataclass(frozen=True)
class ExpertsConfig:
    """Launches of the three kernels. The tiles of the two products are independent.

    pdl: each kernel may be set up while the one before still runs (programmatic dependent launch,
    Hopper and later; ignored elsewhere).
    """

    gate_up: GemmConfig
    down: GemmConfig
    combine: CombineConfig = CombineConfig()
    pdl: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pdl, bool):
            raise ValueError(f"pdl is {self.pdl!r}, but it must be true or false.")
        if self.gate_up.split_k != 1:
            raise ValueError(
                f"gate_up has split_k {self.gate_up.split_k}, but it must be 1: its activation "
                "needs the whole sum."
            )

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ExpertsConfig:
        """Build from one value of a configuration file. ValueError for what does not belong."""
        parts = ("gate_up", "down", "combine", "PDL")
        shared = {k: v for k, v in values.items() if k not in parts}
        # SPLIT_K of a shared dictionary means the product that can be split.
        own = {k: v for k, v in shared.items() if k != "SPLIT_K"}
        return ExpertsConfig(
            _gemm_from_dict({**own, **values.get("gate_up", {})}),
            _gemm_from_dict({**shared, **values.get("down", {})}),
            CombineConfig(**values.get("combine", {})),
            values.get("PDL", False),
        )

    def to_dict(self) -> dict[str, Any]:
        """The value of a configuration file: ``from_dict(c.to_dict()) == c``."""
        gate_up, down = _gemm_to_dict(self.gate_up), _gemm_to_dict(self.down)
        result: dict[str, Any] = dict(gate_up)
        result["down"] = {k: v for k, v in down.items() if v != gate_up[k]}
        result["combine"] = asdict(self.combine)
        result["PDL"] = self.pdl
        return result


def _gemm_from_dict(values: Mapping[str, Any]) -> GemmConfig:
    unknown = [k for k in values if k not in _KEYS]
    if unknown:
        raise ValueError(
            f"configuration has the key {unknown[0]!r}, but they must be of {', '.join(_KEYS)}."
        )
    missing = [k for k in _REQUIRED if k not in values]
    if missing:
        raise ValueError(
            f"configuration has no key {missing[0]!r}, but it must have {', '.join(_REQUIRED)}."
        )
    return GemmConfig(**{_KEYS[k]: v for k, v in values.items()})


def _gemm_to_dict(config: GemmConfig) -> dict[str, Any]:
    return {key: getattr(config, field) for key, field in _KEYS.items()}


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for b > 0."""
    return -(-a // b)


def num_tiles_bound(
    assignments: int, num_experts: int, block_m: int, max_rows: int | None = None
) -> int:
    """Most m-tiles that any routing can need.

    Each expert with tokens has at most one tile that is not full. `max_rows`: no expert holds
    more (the capacity). Example: 100 assignments, 8 experts, block_m 16: (100 + 8 * 15) // 16 = 13.
    """
    busy = min(num_experts, assignments)
    bound = (assignments + busy * (block_m - 1)) // block_m
    if max_rows is not None:
        bound = min(bound, num_experts * ceil_div(max_rows, block_m))
    return bound


def shared_bytes(config: GemmConfig, itemsize: int) -> int:
    """Shared memory that the pipeline of one program holds, bytes: all its stages of tiles.

    A little more than Triton allocates for the loop, where the first stage may be shared. With
    `flatten` another tile of weights is on its way while the last one's epilogue runs.
    """
    weights = config.block_n * config.block_k * itemsize
    tile = config.block_m * config.block_k * itemsize + weights
    held = max(1, config.num_stages) * tile + config.flatten * weights
    return held + 1024  # barriers and reductions


def fit(config: GemmConfig, chip: Chip, itemsize: int) -> GemmConfig:
    """`config` with as few stages less, then as small a K-step, as the chip's memory asks for."""
    while shared_bytes(config, itemsize) > chip.shared_limit and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    while shared_bytes(config, itemsize) > chip.shared_limit and config.block_k > 16:
        config = replace(config, block_k=config.block_k // 2)
    # Programs of one multiprocessor share its memory, which is 1 KiB more than one may use.
    room = chip.shared_limit + _SHARED_RESERVED
    resident = room // (shared_bytes(config, itemsize) + _SHARED_RESERVED)
    return replace(config, programs_per_sm=max(1, min(config.programs_per_sm, resident)))


# Tiles by rows per expert: (most rows, gate/up, down). GROUP_M is 8 everywhere: where an expert
# has a second m-tile, it runs beside the first, and the weights are read from L2, not again. The
# rest is derived from the compiled kernels (registers, shared memory) and the chip's data sheet,
# not tuned: see kernels/README.md.
_Table = tuple[tuple[int | None, GemmConfig, GemmConfig], ...]
_HALF = GemmConfig(64, 128, 64, 8, 4, 4, programs_per_sm=2)
_TWIN = GemmConfig(128, 128, 64, 8, 8, 3, programs_per_sm=2)
_FULL = GemmConfig(128, 256, 64, 8, 8, 4)
# Hopper and Blackwell, by tensor descriptors.
_BULK: _Table = (
    (
        16,
        GemmConfig(16, 128, 128, 8, 4, 3, programs_per_sm=2, swap_ab=True),
        GemmConfig(16, 64, 128, 8, 4, 5, programs_per_sm=2, swap_ab=True),
    ),
    (
        32,
        GemmConfig(32, 128, 64, 8, 4, 5, programs_per_sm=2, swap_ab=True),
        GemmConfig(32, 64, 128, 8, 4, 4, programs_per_sm=2, swap_ab=True),
    ),
    (64, _HALF, _HALF),
    (128, _TWIN, _TWIN),
    (None, _FULL, _FULL),
)


def _both(most: int | None, config: GemmConfig) -> tuple[int | None, GemmConfig, GemmConfig]:
    config = replace(config, use_tma=False)
    return most, config, config


# By pointers: Ampere, Ada, and rows that are no multiple of 16 bytes.
_POINTERS: _Table = (
    _both(16, GemmConfig(16, 64, 128, 8, 4, 3, programs_per_sm=2)),
    _both(32, GemmConfig(32, 64, 128, 8, 4, 3, programs_per_sm=2)),
    _both(64, GemmConfig(64, 128, 64, 8, 4, 3, programs_per_sm=2)),
    _both(None, GemmConfig(128, 128, 64, 8, 8, 4)),
)
_OTHER: _Table = (
    _both(16, GemmConfig(16, 64, 64, 8, 4, 2, programs_per_sm=2)),
    _both(None, GemmConfig(64, 64, 32, 8, 4, 2, programs_per_sm=2)),
)
# float32 without tensor cores, as torch multiplies it by default: operands in registers, so small
# tiles. Two stages are enough for the larger one: its step of 64 * 64 * 32 multiplications takes
# 1024 cycles or more, longer than a load should (not measured). A third has ptxas spill on sm_80
# (Triton 3.7 and 3.8).
_FLOAT32: _Table = (
    _both(16, GemmConfig(16, 64, 32, 8, 4, 3, programs_per_sm=2)),
    _both(None, GemmConfig(64, 64, 32, 8, 8, 2)),
)
# A sum over fewer columns than this takes about as long as a tile's start and end: two programs
# per multiprocessor then hide each other's.
_SHORT_SUM = 1024
# From so many columns on the large tile takes the next tile's first loads before its own epilogue
# (`flatten`). It has one program per multiprocessor, so nothing else would hide the epilogue. On
# Hopper: what Blackwell's tensor memory makes of it is not known.
_LONG_SUM = 4096
# Loads of an even router scatter: a tile for the mean alone would leave half of the experts with a
# second one that is nearly empty. Up to 128 rows the tile is for _SCATTER halves of the mean.
_SCATTER = 3
# Parts of a split sum are float32 rows of their own, so they are for few assignments: at most
# MAX_SPLIT parts, and MAX_SPLIT_ROWS rows in all parts together. They bound the workspace.
MAX_SPLIT = 8
MAX_SPLIT_ROWS = 512


def default_config(
    tokens: int,
    width: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    *,
    chip: Chip,
    itemsize: int = 2,
    global_experts: int | None = None,
    max_rows: int | None = None,
) -> ExpertsConfig:
    """Launches by heuristics, from what the host knows: shapes, never loads.

    tokens T, width W, num_experts E, hidden H, intermediate I. itemsize: bytes of an element of
    the weights. global_experts: experts of the layer on all ranks (the share E / G of the
    assignments is expected here). max_rows: most rows of one expert (the capacity).
    """
    assignments = tokens * width
    expected = ceil_div(assignments * num_experts, max(num_experts, global_experts or 0))
    rows = ceil_div(expected, num_experts)
    if max_rows is not None:
        rows = min(rows, max_rows)

    largest = max(rows, min(ceil_div(rows * _SCATTER, 2), 128))
    if max_rows is not None:
        largest = min(largest, max_rows)
    aligned = hidden * itemsize % 16 == 0 and intermediate * itemsize % 16 == 0
    gate_up, down = _by_rows(largest, chip, itemsize, aligned)
    if gate_up == _FULL and hidden <= _SHORT_SUM:
        gate_up = _TWIN
    if down == _FULL and intermediate <= _SHORT_SUM:
        down = _TWIN
    if chip.capability == (9, 0):
        gate_up = replace(gate_up, flatten=gate_up == _FULL and hidden >= _LONG_SUM)
        down = replace(down, flatten=down == _FULL and intermediate >= _LONG_SUM)
    gate_up = fit(gate_up, chip, itemsize)
    down = fit(down, chip, itemsize)

    # Fewer tiles than programs: cut the sum over I until all multiprocessors read weights.
    if rows <= 32:
        busy = min(num_experts, expected)
        tiles = busy * ceil_div(hidden, down.block_n) * ceil_div(rows, down.block_m)
        split = 1
        while (
            tiles * split * 2 <= chip.num_sms * down.programs_per_sm
            and split * 2 <= MAX_SPLIT
            and assignments * split * 2 <= MAX_SPLIT_ROWS
            and intermediate >= 4 * down.block_k * split * 2  # keeps the pipeline filled
        ):
            split *= 2
        down = replace(down, split_k=split)
    return ExpertsConfig(gate_up, down, _combine(hidden))


def _by_rows(rows: int, chip: Chip, itemsize: int, aligned: bool) -> tuple[GemmConfig, GemmConfig]:
    """The tiles for up to about `rows` per expert."""
    if chip.capability is None:
        table = _OTHER
    elif itemsize > 2:
        table = _FLOAT32
    elif chip.has_tma and aligned:
        table = _BULK
    else:
        table = _POINTERS
    return next((gate_up, down) for most, gate_up, down in table if most is None or rows <= most)


def _combine(hidden: int) -> CombineConfig:
    """Columns of one program: the power of two at or above H, 256 to 1024 (16 bytes a thread)."""
    block = min(1024, max(256, 1 << max(0, hidden - 1).bit_length()))
    return CombineConfig(block, block // 256)


def config_file_name(
    num_experts: int, intermediate: int, device_name: str, dtype: str | None = None
) -> str:
    """Name of the file for a layer on one rank; `dtype` where it is not a 16-bit float."""
    suffix = f",dtype={dtype}" if dtype else ""
    name = device_name.replace(" ", "_")
    if "H200" in name.split("_"):
        name = "NVIDIA_H200"  # one name for its variants, as vLLM
    return f"E={num_experts},N={intermediate},device_name={name}{suffix}.json"


def load_configs(path: Path) -> dict[int, ExpertsConfig]:
    """Read a configuration file. ValueError that names the file where it does not fit."""
    try:
        values = json.loads(path.read_text())
        return {
            int(key): ExpertsConfig.from_dict(value)
            for key, value in values.items()
            if key != "triton_version"  # newer files of vLLM carry it
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration file: {error}") from error


def nearest_config(configs: Mapping[int, ExpertsConfig], tokens: int) -> ExpertsConfig:
    """The configuration whose key is nearest to `tokens`, the larger key of two."""
    return configs[min(configs, key=lambda key: (abs(key - tokens), -key))]


@functools.lru_cache(maxsize=256)
def _tuned(name: str, folder: str | None) -> dict[int, ExpertsConfig] | None:
    """The tuned file of that name, from the user's folder, else from this package's."""
    for place in (folder, str(CONFIG_FOLDER)):
        if place and (path := Path(place) / name).is_file():
            return load_configs(path) or None
    return None


@functools.lru_cache(maxsize=4096)
def choose_config(
    tokens: int,
    width: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    *,
    chip: Chip,
    device_name: str,
    itemsize: int = 2,
    global_experts: int | None = None,
    max_rows: int | None = None,
) -> ExpertsConfig:
    """Tuned values for this device and layer where there are any, else the heuristics.

    Both are cut to what the chip can hold (:func:`fit`), so a tuner should time what that gives.
    """
    name = config_file_name(
        num_experts, intermediate, device_name, "float32" if itemsize > 2 else None
    )
    configs = _tuned(name, os.environ.get(CONFIG_FOLDER_VARIABLE))
    if configs is not None:
        config = nearest_config(configs, tokens)
        return replace(
            config,
            gate_up=fit(config.gate_up, chip, itemsize),
            down=fit(config.down, chip, itemsize),
        )
    return default_config(
        tokens,
        width,
        num_experts,
        hidden,
        intermediate,
        chip=chip,
        itemsize=itemsize,
        global_experts=global_experts,
        max_rows=max_rows,
    )
