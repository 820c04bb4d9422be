"""An estimate, not a measurement: what tiles, waves and traffic make of the expert products.

    python benchmarks/estimate_experts.py               # what launch.py chooses, on an H100
    python benchmarks/estimate_experts.py --before      # beside the earlier heuristics
    python benchmarks/estimate_experts.py --tail 64     # if last tiles could be this small

The model, for loads of an even random router (mean of --draws): a product has tiles, in the order
of `_gemm_kernels.find_tile`, and as many programs at work as the grid has; all tiles of one turn of
the programs run at once.

    padding   rows of all tiles over the rows that are asked for
    waves     turns of the programs over what the tiles would fill exactly: 1 is a full last turn
    traffic   weight tiles read from memory over those of the busy experts: a tile that is needed
              again is read again, unless it is in the same turn, or less than --l2 was read since
    us        the larger of the time of the padded operations, with the waves' loss, and of the
              bytes; roofs by --tflops and --gbps, the H100's as others have measured them

Nothing here knows of latencies, epilogues, activations that leave L2, or clocks: a GPU decides.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import _shapes  # noqa: E402

from capmoe_kernels.launch import (  # noqa: E402
    Chip,
    ExpertsConfig,
    GemmConfig,
    ceil_div,
    default_config,
)

SHAPES = ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe", "deepseek-v2-lite")
TOKENS = (1, 16, 64, 128, 1024, 4096, 8192)


@dataclass(frozen=True)
class Product:
    """A grouped product of `loads` rows per expert, with `columns` rows of weights of `depth`."""

    loads: tuple[int, ...]
    columns: int
    depth: int
    config: GemmConfig


def estimate(
    product: Product, chip: Chip, roofs: tuple[float, float], l2: float, tail: int | None = None
) -> dict[str, float]:
    """Padding, waves, traffic and seconds of one product. roofs: FLOP/s, bytes/s. l2: bytes."""
    config = product.config
    n_tiles = ceil_div(product.columns, config.block_n) * config.split_k
    programs = chip.num_sms * config.programs_per_sm
    asked = sum(product.loads)
    padded = sum(_rows(load, config.block_m, tail) for load in product.loads)
    tile_bytes = 2 * config.block_n * product.depth / config.split_k
    last: dict[tuple[int, int], tuple[int, int]] = {}  # weight tile -> turn and reads at its use
    reads = tile = 0
    for expert, load in enumerate(product.loads):
        m_tiles = ceil_div(load, config.block_m)
        for block in range(0, m_tiles, config.group_m):
            for n in range(n_tiles):
                for _ in range(min(config.group_m, m_tiles - block)):
                    turn = tile // programs
                    used, before = last.get((expert, n), (-1, 0))
                    gone = used < turn and (reads - before) * tile_bytes > l2
                    reads += used < 0 or gone
                    last[expert, n] = turn, reads
                    tile += 1
    traffic = reads / len(last)
    waves = ceil_div(tile, programs) * programs / tile if tile > programs else 1.0
    busy = sum(load > 0 for load in product.loads)
    operations = 2 * padded * product.columns * product.depth
    weights = 2 * busy * product.columns * product.depth * traffic
    seconds = max(operations * waves / roofs[0], (weights + 2 * asked * product.depth) / roofs[1])
    return {"padding": padded / asked, "waves": waves, "traffic": traffic, "seconds": seconds}


def _rows(load: int, block_m: int, tail: int | None) -> int:
    """Rows of an expert's tiles; `tail`: a last tile of at most so many rows is so large."""
    rest = load % block_m
    if tail is not None and 0 < rest <= tail < block_m:
        return load - rest + tail
    return ceil_div(load, block_m) * block_m


def loads_of(shape: _shapes.Shape, tokens: int, draws: int) -> list[tuple[int, ...]]:
    """Rows per expert of an even router."""
    rng = random.Random(0)
    found = []
    for _ in range(draws):
        loads = [0] * shape.experts
        for _ in range(tokens):
            for expert in rng.sample(range(shape.experts), shape.top_k):
                loads[expert] += 1
        found.append(tuple(loads))
    return found


def before(config: ExpertsConfig, shape: _shapes.Shape, tokens: int) -> ExpertsConfig:
    """As the heuristics chose at first: BLOCK_M for the mean, GROUP_M 1 up to 32 rows."""
    mean = ceil_div(tokens * shape.top_k, shape.experts)
    rows = next((m for m in (16, 32, 64) if mean <= m), 128)
    group = 1 if mean <= 32 else 8
    gate_up = replace(config.gate_up, block_m=rows, group_m=group, flatten=False)
    return replace(
        config,
        gate_up=gate_up,
        down=replace(config.down, block_m=rows, group_m=group, flatten=False),
    )


def layer(
    shape: _shapes.Shape,
    tokens: int,
    config: ExpertsConfig,
    args: argparse.Namespace,
    chip: Chip,
) -> dict[str, float]:
    """Both products: padding and traffic of gate/up, the larger loss of waves, microseconds."""
    roofs = 1e12 * args.tflops, 1e9 * args.gbps
    found: dict[str, list[float]] = {"padding": [], "waves": [], "traffic": [], "us": []}
    for loads in loads_of(shape, tokens, args.draws):
        products = (
            Product(loads, 2 * shape.intermediate, shape.hidden, config.gate_up),
            Product(loads, shape.hidden, shape.intermediate, config.down),
        )
        one, two = (
            estimate(product, chip, roofs, 1e6 * args.l2, args.tail) for product in products
        )
        found["padding"].append(one["padding"])
        found["waves"].append(max(one["waves"], two["waves"]))
        found["traffic"].append((2 * one["traffic"] + two["traffic"]) / 3)
        found["us"].append(1e6 * (one["seconds"] + two["seconds"]))
    return {name: statistics.fmean(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", choices=list(_shapes.SHAPES), default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--before", action="store_true", help="the earlier heuristics, too")
    parser.add_argument("--tail", type=int, help="rows of a last tile that is not full")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--tflops", type=float, default=700, help="bf16 products")
    parser.add_argument("--gbps", type=float, default=3000, help="of a copy")
    parser.add_argument("--l2", type=float, default=50, help="of the cache, MB")
    args = parser.parse_args()
    chip = Chip((9, 0), 132)
    print("ESTIMATE by a model, nothing measured: padding, waves, traffic, us")
    for name in args.shapes:
        shape = _shapes.SHAPES[name]
        for tokens in args.tokens:
            config = default_config(
                tokens, shape.top_k, shape.experts, shape.hidden, shape.intermediate, chip=chip
            )
            pairs = [("now", config)]
            if args.before:
                pairs.insert(0, ("before", before(config, shape, tokens)))
            for label, launches in pairs:
                values = layer(shape, tokens, launches, args, chip)
                cells = "  ".join(f"{key} {value:.3g}" for key, value in values.items())
                print(f"estimate {name:18} T={tokens:<5} {label:6} {cells}")


if __name__ == "__main__":
    main()
