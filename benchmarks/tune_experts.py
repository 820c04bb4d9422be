"""Tune the launches of the expert kernels on this device: one JSON per shape, as launch.py loads.

    python benchmarks/tune_experts.py --shapes mixtral-8x7b --tokens 16 4096
    python benchmarks/tune_experts.py --quick --interpret      # tiny, on a CPU

The products are independent, so each is tuned on its own: from the heuristics, one field at a
time, keeping what is faster, until nothing is (or the budget is used up). Configurations that
can't hold their tiles in shared memory or registers are left out before they are compiled; the
others are compiled by several processes at once, pass the gate (twice torch's own error against
float32) and are timed on an even routing and one of skew 3. Then the combine, then programmatic
dependent launch. What is not faster in the whole than the heuristics isn't written.

The JSON goes to $OUT/configs, or to kernels/capmoe_kernels/configs where OUT is not set. The CSV
has a row for each entry, with its times before and after; what has a row is not tuned again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _common as common
import _shapes
import _tables

TOKENS = (16, 4096, 1, 1024, 64, 8192, 256, 16384)  # what is most often asked for first
SKEWS = (1.0, 3.0)
FIELDS: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (32, 64, 128, 256),
    "block_k": (32, 64, 128, 256),
    "num_stages": (2, 3, 4, 5, 6),
    "num_warps": (4, 8),
    "group_m": (1, 4, 8, 16, 32),
    "programs_per_sm": (1, 2, 3, 4),
    "split_k": (1, 2, 4, 8),
    "swap_ab": (False, True),
    "use_tma": (False, True),
    "flatten": (False, True),
}
COMBINES = ((256, 1), (512, 2), (1024, 4), (1024, 8), (2048, 8))
MAX_ACCUMULATOR = 128  # float32 numbers per thread: with more, registers spill
GAIN = 0.01  # less than this is noise
COLUMNS = ("shape", "tokens", "heuristic_ms", "tuned_ms", "speedup", "tried", "failed", "config")


def parse_args() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--folder", type=Path, help="where the JSON files go")
    parser.add_argument("--rounds", type=int, default=3, help="most rounds over the fields")
    parser.add_argument("--seconds", type=float, default=0.04, help="time for each median")
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2))
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.rounds = ["tiny"], [4], 1
    return args


def valid(config: Any, product: str, chip: Any, itemsize: int, assignments: int) -> bool:
    """Whether the chip can hold the tiles, and the kernels take the configuration."""
    from capmoe_kernels.launch import MAX_SPLIT_ROWS, fit

    if fit(config, chip, itemsize) != config:
        return False
    if config.block_m * config.block_n > MAX_ACCUMULATOR * 32 * config.num_warps:
        return False
    if product == "gate_up":
        return bool(config.block_n >= 32 and config.split_k == 1)
    return bool(config.split_k == 1 or assignments * config.split_k <= MAX_SPLIT_ROWS)


def neighbours(config: Any, field: str, *limits: Any) -> list[Any]:
    """The configurations that differ in one field; for block_m above 16, weights stay unswapped."""
    found = []
    for value in FIELDS[field]:
        if value != getattr(config, field):
            other = replace(config, **{field: value})
            if valid(other, *limits):
                found.append(other)
    return found


# --- compiling in several processes -------------------------------------------------------------


_held: dict[_shapes.Shape, tuple[Any, ...]] = {}


def _empty(shape: _shapes.Shape) -> tuple[Any, ...]:
    """Tensors of a shape in which no expert has a token: a launch compiles, and does nothing.

    Those of one shape only are kept, since every process has its own.
    """
    import torch

    if shape not in _held:
        _held.clear()
        torch.cuda.empty_cache()
        T, W, A = 16, shape.top_k, 16 * shape.top_k
        E, H, I = shape.experts, shape.hidden, shape.intermediate  # noqa: E741
        new = functools.partial(torch.empty, device="cuda", dtype=torch.bfloat16)
        zeros = functools.partial(torch.zeros, device="cuda", dtype=torch.int32)
        _held[shape] = (
            *(new(T, H), new(E, 2 * I, H), new(E, H, I), torch.zeros(T, W, device="cuda")),
            *(new(A, I), torch.empty(8 * A * H, device="cuda"), zeros(A), zeros(E + 1)),
        )
    return _held[shape]


def compile_only(shape: _shapes.Shape, product: str, config: Any) -> str:
    """Compile one configuration into Triton's cache on the disk. Returns what went wrong."""
    from capmoe_kernels import experts

    try:
        hidden, w13, w2, weights, acts_AI, rows, order, offsets = _empty(shape)
        seats = experts.Seats(order, offsets)
        chip, _ = experts.chip_of(hidden.device)
        if product == "gate_up":
            act = experts.resolve_activation("silu")
            experts.launch_gate_up(
                *(hidden, w13, None, weights, seats, acts_AI, act, config, chip), mul_weight=False
            )
        else:
            out = rows if config.split_k > 1 else rows.view(hidden.dtype)
            experts.launch_down(
                *(acts_AI, w2, None, weights, seats, out, config, chip), mul_weight=True
            )
    except Exception as error:  # whatever a compiler may say: the configuration is out
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


# --- tuning one shape at one T ------------------------------------------------------------------


class Tuner:
    """One shape at one number of tokens."""

    def __init__(
        self, shape: _shapes.Shape, tokens: int, layers: list[_shapes.Layer], args: Any, device: Any
    ) -> None:
        import torch
        from _timing import rotations

        from capmoe_kernels import experts
        from capmoe_kernels.routing import route_triton

        self.shape, self.tokens, self.layers, self.args, self.device = (
            *(shape, tokens, layers, args, device),
        )
        self.lib = experts
        self.dtype = torch.bfloat16
        plan = _shapes.make_plan(shape, "off", float("inf"))
        self.assignments = tokens * shape.top_k
        busy = min(shape.experts, self.assignments)
        sets = rotations(shape.bytes(tokens, busy), device)
        self.hidden = [
            torch.randn(tokens, shape.hidden, device=device, dtype=self.dtype) for _ in range(sets)
        ]
        self.routed = {
            skew: [
                route_triton(
                    _shapes.router_logits(tokens, shape, skew, device, self.dtype, seed=r),
                    plan,
                    scoring="softmax",
                )
                for r in range(sets)
            ]
            for skew in SKEWS
        }
        self.chip, _ = experts.chip_of(device)
        self.base = heuristics(shape, tokens, self.chip)
        self.act = experts.resolve_activation("silu")
        self.acts_AI = torch.empty(
            self.assignments, shape.intermediate, device=device, dtype=self.dtype
        )
        parts = min(8 * self.assignments, 512)
        size = max(self.assignments * shape.hidden, 2 * parts * shape.hidden)
        self.rows = torch.empty(size, device=device, dtype=self.dtype)
        self.out = torch.empty_like(self.hidden[0])
        self.times: dict[tuple[str, Any], float] = {}
        self.expected: Any = None  # all rows as they should be, once asked for
        self.failed: list[str] = []
        self.wrong: list[str] = []

    def whole(self, config: Any, skew: float, r: int) -> Any:
        layer, routed = self.layers[r % len(self.layers)], self.routed[skew][r]
        return self.lib.fused_experts(
            *(self.hidden[r], layer.w13, layer.w2, routed.weights, routed.experts, routed.seats),
            activation="silu",
            config=config,
            out=self.out,
            workspaces=(self.acts_AI.view(-1), self.rows),
        )

    def part(self, product: str, config: Any, skew: float, r: int) -> None:
        """One launch: gate_up, down, or combine of an ExpertsConfig."""
        layer, routed = self.layers[r % len(self.layers)], self.routed[skew][r]
        assert routed.seats is not None
        shared = (None, routed.weights, routed.seats)
        if product == "gate_up":
            self.lib.launch_gate_up(
                *(self.hidden[r], layer.w13, *shared, self.acts_AI, self.act, config, self.chip),
                mul_weight=False,
            )
        elif product == "down":
            rows = self._rows(config.split_k)
            self.lib.launch_down(
                *(self.acts_AI, layer.w2, *shared, rows, config, self.chip), mul_weight=True
            )
        else:
            rows = self._rows(config.down.split_k)
            self.lib.launch_combine(rows, routed.experts, None, self.out, config)

    def _rows(self, split_k: int) -> Any:
        import torch

        return self.rows.view(torch.float32) if split_k > 1 else self.rows

    def seconds(self, call: Any, *args: Any) -> float:
        """Milliseconds, summed over the skews."""
        from _timing import time_calls

        total = 0.0
        for skew in SKEWS:
            calls = [functools.partial(call, *args, skew, r) for r in range(len(self.routed[skew]))]
            graph = self.tokens <= 1024
            total += time_calls(
                calls, self.device, graph=graph, seconds=self.args.seconds
            ).ms  # fmt: skip
        return total

    def evaluate(self, product: str, config: Any) -> float:
        """Gate and time of a configuration of one launch; infinite where it fails. Remembered."""
        from _gates import GateError

        key = product, config
        if key not in self.times:
            self.times[key] = float("inf")
            whole = replace(self.base, **{product: config})
            try:
                self.gate(whole)
                self.times[key] = self.seconds(
                    self.part, product, whole if product == "combine" else config
                )
            except GateError as error:
                self.wrong.append(f"{product} {config}: {error}")
            except Exception as error:  # out of resources, by the compiler's or the driver's word
                self.failed.append(f"{product} {config}: {type(error).__name__}")
        return self.times[key]

    def gate(self, config: Any) -> None:
        import _gates as gates

        for tensor in (self.acts_AI, self.rows, self.out):
            tensor.fill_(float("nan"))
        skew = SKEWS[-1]
        routed = self.routed[skew][0]
        out = self.whole(config, skew, 0)
        if self.expected is None:
            given = self.layers[0], self.hidden[0], routed.weights, routed.experts
            self.expected = gates.reference(*given)
        gates.gate_experts("tuned", out, self.expected)

    def tune(self, pool: Any, deadline: common.Deadline) -> Any:
        """The fastest ExpertsConfig that was found."""
        best = self.base
        for product in ("gate_up", "down"):
            best = replace(best, **{product: self.descend(product, pool, deadline)})
        for block_h, warps in COMBINES if not self.args.quick else COMBINES[:1]:
            combine = replace(best.combine, block_h=block_h, num_warps=warps)
            if self.evaluate("combine", combine) < self.evaluate("combine", best.combine):
                best = replace(best, combine=combine)
        if self.chip.has_tma and self.device.type == "cuda":
            other = replace(best, pdl=True)
            if self.seconds(self.whole, other) < self.seconds(self.whole, best):
                best = other
        return best

    def descend(self, product: str, pool: Any, deadline: common.Deadline) -> Any:
        """Field by field, as long as something is faster."""
        best = getattr(self.base, product)
        time = self.evaluate(product, best)
        limits = product, self.chip, self.dtype.itemsize, self.assignments
        for _ in range(self.args.rounds):
            before = best
            for field in self.fields():
                if deadline.passed():
                    return best
                found = neighbours(best, field, *limits)
                if pool is not None:
                    jobs = [pool.submit(compile_only, self.shape, product, c) for c in found]
                    failures = [job.result() for job in jobs]
                    self.failed += [f for f in failures if f]
                    found = [c for c, f in zip(found, failures, strict=True) if not f]
                for config in found:
                    if self.evaluate(product, config) < time * (1 - GAIN):
                        best, time = config, self.evaluate(product, config)
            if best == before:
                break
        return best

    def fields(self) -> Iterator[str]:
        yield from ("num_stages", "block_k") if self.args.quick else FIELDS


# --- files --------------------------------------------------------------------------------------


def heuristics(shape: _shapes.Shape, tokens: int, chip: Any) -> Any:
    """What launch.py chooses without a file."""
    from capmoe_kernels.launch import default_config

    return default_config(
        *(tokens, shape.top_k, shape.experts, shape.hidden, shape.intermediate), chip=chip
    )


def save(path: Path, shape: _shapes.Shape, tokens: int, config: Any, chip: Any) -> None:
    """Put an entry into a JSON file of launch.py's format; the others stay as they are.

    A new file gets the heuristics at all of TOKENS first: the nearest entry is used for any T, so
    with a few entries only, a T far from them would get what suits another.
    """
    import triton

    from capmoe_kernels.launch import load_configs

    configs = {t: heuristics(shape, t, chip) for t in TOKENS}
    if path.exists():
        configs = load_configs(path)
    configs[tokens] = config
    values = {str(t): configs[t].to_dict() for t in sorted(configs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(
        json.dumps({"triton_version": triton.__version__, **values}, indent=2) + "\n"
    )
    scratch.replace(path)
    if load_configs(path) != configs:
        sys.exit(f"{path} doesn't read back as it was written")


def folder_of(args: argparse.Namespace) -> Path:
    if args.folder is not None:
        return Path(args.folder)
    if args.quick:
        return Path(args.out).parent / "configs"
    if os.environ.get("OUT"):
        return _tables.output_folder() / "configs"
    return Path(__file__).resolve().parent.parent / "kernels" / "capmoe_kernels" / "configs"


def main() -> None:
    args = parse_args()
    device = common.setup(args, "tuning")
    import torch

    from capmoe_kernels.experts import chip_of
    from capmoe_kernels.launch import config_file_name

    device_name = chip_of(device)[1]
    folder = folder_of(args)
    table = _tables.Table(args.out, COLUMNS, ("shape", "tokens"), _tables.header(device))
    deadline = common.Deadline(args.budget)
    shapes = {**_shapes.SHAPES, "tiny": _shapes.TINY}
    jobs = [(shapes[name], tokens) for tokens in args.tokens for name in args.shapes]
    pool = None
    if device.type == "cuda" and args.workers > 1:
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context)
    wrong = []
    for shape, tokens in common.progress(jobs, "tune"):
        if deadline.passed() or table.has({"shape": shape.name, "tokens": tokens}):
            continue
        table.begin({"shape": shape.name, "tokens": tokens})
        path = folder / config_file_name(shape.experts, shape.intermediate, device_name)
        try:
            layers = [_shapes.make_layer(shape, device, torch.bfloat16) for _ in range(2)]
            tuner = Tuner(shape, tokens, layers, args, device)
            tuner.gate(tuner.base)
            best = tuner.tune(pool, deadline)
            before = tuner.seconds(tuner.whole, tuner.base)
            after = tuner.seconds(tuner.whole, best) if best != tuner.base else before
            if after > before * (1 - GAIN):
                best, after = tuner.base, before
            tuner.gate(best)
        except Exception as error:
            wrong.append(f"{shape.name} T={tokens}: {error}")
            if not common.goes_on(error, f"{shape.name} T={tokens}", device):
                break
            continue
        save(path, shape, tokens, best, tuner.chip)
        failed = len(tuner.failed)
        values = (
            *(shape.name, tokens, before, after, before / after, len(tuner.times), failed),
            json.dumps(best.to_dict()),
        )
        table.add(dict(zip(COLUMNS, values, strict=True)))
        wrong += tuner.wrong
        print(f"{shape.name} T={tokens}: {before:.4g} -> {after:.4g} ms; {path}", flush=True)
        for line in tuner.failed[:3]:
            print(f"  left out: {line}")
    if pool is not None:
        pool.shutdown(cancel_futures=True)
    for line in wrong:
        print(f"GATE: {line}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
