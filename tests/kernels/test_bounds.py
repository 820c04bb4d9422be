"""No kernel touches memory outside of its tensors, at every shape of the benchmarks' grid.

The grid is that of benchmarks/bench_moe_layer.py: six models, 1 to 16384 tokens, each without a
capacity, with Token Drop and with Expanded Drop; its capacities and skews, which change the loads
and at most the number of programs, take turns. The kernels run under Triton's interpreter with the
launches that the heuristics choose, those of the experts for an H100 or H200 (tensor descriptors)
and for an A100 (pointers). Every address of every load, store, atomic and descriptor box is checked
against the one tensor that its pointer came from: a pointer carries the number of that tensor in
its top byte. What a mask or the shape of a descriptor cuts off is not touched, so not checked.
Tiles fill nearly all rows and columns of these models, so two odd shapes are added (`ODD`).

What does not run, and why the rest is safe:

Experts. Integers are read and written. Floats are not, and nothing is multiplied: no address
depends on a float. So weights of any size cost nothing. Of a loop over K the first, second and last
step run; of the tiles, and of the tokens of the combine kernel, a selection. An address is a sum of
terms, each of which rises with one of expert, seat or slot, column of the tile, step of K, and is
bounded by a mask of its own; so the lowest and the highest address are where all of these are. The
selection has the corner tiles of the first and the last expert with tokens, of the fullest and of
two drawn at random, the tiles with the first and the last slot, and six drawn at random. Where no
place is empty and no expert without tokens, the test asserts that the first and the last element of
every tensor have been touched: the ends are among what runs.

Routing. Up to 1024 tokens all programs run. Above, these are hundreds that differ in their rows
alone, so there are two calls: one in larger blocks, which runs all rows, and one as launched, which
runs few programs of each kernel, the first and the last two among them, and takes the results of
the others from the first call. An address depends on the row and the column, or on an integer that
an earlier kernel left for them; the block they are in only decides which rows past the last one a
mask has to cut off, in the last program.

Seats of `make_seats`. All programs run, but above 32 blocks only few of the kernel that writes the
seats, the first and the last two among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from bounds import Checker, OutOfBoundsError, few, zeros
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from capmoe_kernels import _gemm_kernels, routing
from capmoe_kernels import experts as ours
from capmoe_kernels._routing_launch import launch_config
from capmoe_kernels.launch import Chip
from capmoe_kernels.routing import TOTALS, route_triton
from vllm_capmoe import CapacityConfig
from vllm_capmoe.plan import resolve
from vllm_capmoe.torch_routing import route_torch

if not ours.INTERPRETED:
    pytest.skip(
        "checks addresses under Triton's interpreter; on a GPU see test_interpreted.py",
        allow_module_level=True,
    )

with pytest.MonkeyPatch.context() as with_path:
    with_path.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    bench: Any = importlib.import_module("bench_moe_layer")
SHAPES, TOKENS = bench._shapes.SHAPES, bench.TOKENS
# Of the benchmarks' whole grid every run takes one small and one middle size; the rest is slow.
GRID = [
    pytest.param(tokens, marks=() if tokens in (16, 1024) else pytest.mark.slow)
    for tokens in TOKENS
]
ODD = {  # hidden, intermediate, experts, top-k
    "ragged": bench._shapes.Shape("ragged", 1000, 776, 12, 3),
    "unaligned": bench._shapes.Shape("unaligned", 1001, 777, 12, 3),
}
ALL = {**SHAPES, **ODD}

CHIPS = {"descriptors": Chip((9, 0), 132), "pointers": Chip((8, 0), 108)}
CPU = torch.device("cpu")


# --- Experts --------------------------------------------------------------------------------


def ends_of_range(*args: int) -> Iterable[int]:
    """In place of `range` in the experts' kernels: of a loop over K the first, second, last step.

    Other loops (over places) have one argument and run in full.
    """
    steps = range(*args)
    return steps if len(args) == 1 else sorted({*steps[:2], *steps[-1:]})


class ExpertsChecker(Checker):
    """Runs a selection of tiles, tokens and steps of K (see above), without arithmetic."""

    floats = False

    def __init__(self) -> None:
        super().__init__()
        self.described: set[str] = set()  # kernels with tensor descriptors
        self.given: dict[str, Any] = {}  # arguments of the launch that runs
        self.chosen: list[int] = []  # its tiles
        self.rng = random.Random(0)

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        super().patch(patch)
        builder = interpreter.InterpreterBuilder

        def convert(this: Any, value: Any, dtype: Any, *rest: Any) -> Any:
            return zeros(dtype, value.data.shape)

        for name in ("create_fp_to_fp", "create_fp_ext", "create_fp_trunc"):
            patch.setattr(builder, name, convert)
        patch.setattr(builder, "create_dot", lambda this, a, b, total, *rest: total)
        patch.setattr(_gemm_kernels, "range", ends_of_range, raising=False)

    def run(self, kernel: Any, grid: Any, given: Any, arguments: Any) -> None:
        if any(isinstance(value, TensorDescriptor) for value in given.values()):
            self.described.add(self.kernel)
        if "num_programs" not in given:
            tokens = few(grid[0], self.rng)
            indices = itertools.product(tokens, range(grid[1]))
            return self.run_programs(indices, kernel, grid, arguments)
        self.given = given
        assert grid == (given["num_programs"],)
        self.run_programs([(0,)], kernel, grid, arguments)  # chooses the tiles
        owners = {tile % grid[0] for tile in self.chosen} | {grid[0] - 1}
        self.run_programs(((p,) for p in sorted(owners - {0})), kernel, grid, arguments)

    def tiles(self, first: Any, count: Any, step: Any, **options: Any) -> list[int]:
        """The chosen ones of the program."""
        first, count, step = int(first), int(count), int(step)
        assert step == self.given["num_programs"]
        if first == 0:
            self.chosen = self.choose_tiles(count)
        return [tile for tile in self.chosen if tile % step == first]

    def choose_tiles(self, count: int) -> list[int]:
        """Numbers of tiles below `count`, in the order of the kernels' find_tile."""
        offsets, order = (self.given[name].numpy() for name in ("offsets_ptr", "order_ptr"))
        size_m, group = self.given["BLOCK_M"], self.given["GROUP_M"]
        m_tiles = -(-np.diff(offsets) // size_m)
        total = int(m_tiles.sum())
        if total == 0:
            assert count == 0
            return []
        n_tiles, rest = divmod(count, total)
        assert rest == 0
        before = (np.cumsum(m_tiles) - m_tiles) * n_tiles

        def number(expert: int, m: int, n: int) -> int:
            first = m // group * group
            width = min(int(m_tiles[expert]) - first, group)
            return int(before[expert]) + first * n_tiles + n * width + m - first

        busy = np.flatnonzero(m_tiles).tolist()
        picked = {busy[0], busy[-1], int(m_tiles.argmax()), *self.rng.choices(busy, k=2)}
        chosen = set(self.rng.sample(range(count), min(6, count)))
        for expert in picked:
            for m, n in itertools.product((0, int(m_tiles[expert]) - 1), (0, n_tiles - 1)):
                chosen.add(number(expert, m, n))
        held = order[: offsets[-1]]
        for seat in (int(held.argmin()), int(held.argmax())):
            expert = int(np.searchsorted(offsets, seat, side="right")) - 1
            m = (seat - int(offsets[expert])) // size_m
            chosen |= {number(expert, m, 0), number(expert, m, n_tiles - 1)}
        return sorted(chosen)


class Point(NamedTuple):
    """One of the grid, beside its shape and tokens."""

    plan: Any
    capacity: int | None
    skew: float


def points(name: str, tokens: int) -> list[Point]:
    """Three points, or one where no capacity limits."""
    shape, turn = ALL[name], list(ALL).index(name) + TOKENS.index(tokens)
    off = bench._shapes.make_plan(shape, "off", float("inf"))
    found = [Point(off, None, (bench.SKEWS[0], bench.SKEWS[-1])[turn % 2])]
    for i, mode in enumerate(("drop", "expanded")):
        plan = bench._shapes.make_plan(shape, mode, bench.GAMMAS[(turn + i) % 3])
        capacity = bench._shapes.capacity_of(plan, tokens)
        if capacity is not None:
            found.append(Point(plan, capacity, bench.SKEWS[(turn // 3 + i) % 3]))
    return found


def logits_of(name: str, tokens: int, skew: float) -> Tensor:
    return bench._shapes.router_logits(tokens, ALL[name], skew, CPU, torch.bfloat16)


def plain_seats(experts: Tensor, num_experts: int) -> ours.Seats:
    """Seats by a sort."""
    local = torch.where(experts < 0, num_experts, experts).reshape(-1).long()
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    offsets[1:] = local.bincount(minlength=num_experts + 1)[:-1].cumsum(0)
    order = local.argsort(stable=True).to(torch.int32)
    order[offsets[-1] :] = 2**31 - 1  # never read
    return ours.Seats(order, offsets)


def run_experts(checker: ExpertsChecker, name: str, tokens: int, point: Point) -> ours.Seats:
    """One layer within `checker`; its seats."""
    shape = ALL[name]
    E, H, I = shape.experts, shape.hidden, shape.intermediate  # noqa: E741
    routed = route_torch(logits_of(name, tokens, point.skew).float().softmax(-1), point.plan)
    seats = plain_seats(routed.experts, E)
    empty = torch.empty(0, dtype=torch.bfloat16)
    with checker:
        ours.fused_experts(
            empty.new_empty(tokens, H),
            empty.new_empty(E, 2 * I, H),
            empty.new_empty(E, H, I),
            routed.weights,
            routed.experts,
            seats,
            activation="silu",
            max_rows_per_expert=point.capacity,
        )
    return seats


@pytest.fixture(params=CHIPS)
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Launches are chosen for this chip."""
    monkeypatch.setattr(ours, "chip_of", lambda device: (CHIPS[request.param], "not tuned"))
    return request.param


def check_experts(name: str, tokens: int, has_descriptors: bool) -> None:
    """The points of a shape and a number of tokens."""
    described = {"gate_up_kernel", "down_kernel"} if has_descriptors else set()
    for point in points(name, tokens):
        checker = ExpertsChecker()
        seats = run_experts(checker, name, tokens, point)
        assert checker.described == described
        all_busy = bool((seats.offsets.diff() > 0).all())
        if all_busy and int(seats.offsets[-1]) == seats.order.numel():
            checker.assert_ends_reached(("gate_up_kernel", "weights_ptr"))  # not read there


@pytest.mark.parametrize("tokens", GRID)
@pytest.mark.parametrize("name", SHAPES)
def test_experts(name: str, tokens: int, chip: str) -> None:
    check_experts(name, tokens, chip == "descriptors")


@pytest.mark.parametrize("tokens", [1, 16, 1024])
@pytest.mark.parametrize("name", ODD)
def test_experts_of_odd_sizes(name: str, tokens: int, chip: str) -> None:
    """Tiles that stick out of rows and columns, of which the grid has few; rows off 16 bytes."""
    check_experts(name, tokens, chip == "descriptors" and name == "ragged")


# --- Routing and seats ----------------------------------------------------------------------


class RecordingChecker(Checker):
    """Keeps copies of the tensors of each launch as the kernel left them."""

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, dict[str, Tensor]] = {}

    def run(self, kernel: Any, grid: Any, given: Any, arguments: Any) -> None:
        super().run(kernel, grid, given, arguments)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        self.left[self.kernel] = {name: tensor.clone() for name, tensor in tensors.items()}


class FewChecker(Checker):
    """Runs few programs of each routing kernel; the others' results come from a recorded call."""

    def __init__(self, left: dict[str, dict[str, Tensor]]) -> None:
        super().__init__()
        self.left = left

    def run(self, kernel: Any, grid: Any, given: Any, arguments: Any) -> None:
        indices = ((program,) for program in few(grid[0], random.Random(0)))
        self.run_programs(indices, kernel, grid, arguments)
        for name, values in self.left[self.kernel].items():
            if given[name].shape == values.shape:  # not the loads of blocks of other sizes
                given[name].copy_(values)
        if self.kernel == "pack_kernel":
            blocks = given["experts_ptr"].split(given["ROWS"])
            loads = [block[block >= 0].bincount(minlength=given["E"]) for block in blocks]
            given["counts_ptr"].copy_(torch.stack(loads))


class SeatsChecker(Checker):
    """Runs few programs of the kernel that writes the seats where it has hundreds."""

    def run(self, kernel: Any, grid: Any, given: Any, arguments: Any) -> None:
        if self.kernel != "place_kernel" or grid[0] <= 32:
            return super().run(kernel, grid, given, arguments)
        indices = itertools.product(few(grid[0], random.Random(0)), range(grid[1]))
        self.run_programs(indices, kernel, grid, arguments)


def wide_launch(T: int, E: int, L: int) -> Any:
    """The launch with large blocks of rows: few programs with few steps."""
    return dataclasses.replace(
        launch_config(T, E, L),
        choose_rows=1024,
        limit_rows=16384,
        rows=1024,
        pack_rows=1024,
        seat_rows=1024,
    )


# Of these a call of all programs need not touch both ends.
NOT_TO_THE_ENDS = (
    ("choose_kernel", "load_before_ptr"),  # no load is added to experts without one
    ("choose_kernel", "bin_loads_ptr"),
    ("choose_kernel", "groups_ptr"),  # int32 [4, 1], the end of a tensor with room for padding
    ("limit_kernel", "groups_ptr"),
    ("limit_kernel", "table_ptr"),  # has rows for other numbers of tokens
    ("limit_kernel", "cand_ptr"),  # not read at level expert
    ("limit_kernel", "cand_score_ptr"),
    ("pack_kernel", "load_after_ptr"),
    ("pack_kernel", "last_bid_ptr"),
    ("pack_kernel", "totals_ptr"),  # the beginning of a tensor
    ("seats_kernel", "totals_ptr"),
    ("share_kernel", "totals_ptr"),
    ("seats_kernel", "counts_ptr"),  # those of the last block are nobody's before
    ("seats_kernel", "counters_ptr"),  # ends in those of decode steps, which these are not
)


def run_routing(
    checker: Checker, name: str, tokens: int, point: Point, *, decode: bool = False
) -> None:
    logits = logits_of(name, tokens, point.skew)
    is_decode = torch.ones(tokens, dtype=torch.bool) if decode else None
    counters = torch.zeros(2 * SHAPES[name].experts + len(TOTALS), dtype=torch.int64)
    with checker:
        route_triton(
            logits, point.plan, scoring="softmax", counters=counters, is_decode_T=is_decode
        )


@pytest.mark.parametrize("tokens", GRID)
@pytest.mark.parametrize("name", SHAPES)
def test_routing(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for point in points(name, tokens):
        whole = RecordingChecker()
        with monkeypatch.context() as patch:
            if tokens > 1024:
                patch.setattr(routing, "launch_config", wide_launch)
            run_routing(whole, name, tokens, point)
        whole.assert_ends_reached(*NOT_TO_THE_ENDS)
        if tokens > 1024:
            run_routing(FewChecker(whole.left), name, tokens, point)


@pytest.mark.parametrize("name", SHAPES)
def test_routing_of_an_engine(name: str) -> None:
    """Given top-k, padding, decode tokens, requests, images, devices; rows that fill no block."""
    shape, tokens = SHAPES[name], 200
    generator = torch.Generator().manual_seed(0)
    scores = logits_of(name, tokens, 3.0).float().softmax(-1)
    devices = torch.arange(shape.experts) % 4
    counters = torch.zeros(2 * shape.experts + len(TOTALS), dtype=torch.int64)

    def some(share: float) -> Tensor:
        return torch.rand(tokens, generator=generator) < share

    configs: list[dict[str, Any]] = [
        {"mode": "expanded", "metric": "random", "priority": "text-first"},
        {"mode": "reroute", "level": "device"},
        {"mode": "reroute"},
    ]
    for config in configs:
        plan = resolve(
            CapacityConfig(factor=1.0, min_capacity=1, scope="request", **config),
            num_experts=shape.experts,
            top_k=shape.top_k,
            expert_device=devices.tolist(),
            has_token_device=True,
        )
        with Checker():
            route_triton(
                scores,
                plan,
                topk_TK=scores.topk(shape.top_k).indices,
                is_padding_T=some(0.1),
                is_decode_T=some(0.2),
                request_T=torch.arange(tokens) // 57,
                num_requests=5,
                is_image_T=some(0.5),
                device_E=devices,
                token_device_T=torch.randint(4, (tokens,), generator=generator),
                counters=counters,
            )


@pytest.mark.parametrize("tokens", GRID)
@pytest.mark.parametrize("name", SHAPES)
def test_make_seats(name: str, tokens: int) -> None:
    """With all experts here, and with every other one."""
    E = SHAPES[name].experts
    plan, _, skew = points(name, tokens)[-1]
    routed = route_torch(logits_of(name, tokens, skew).float().softmax(-1), plan)
    expert_map = torch.arange(E, dtype=torch.int32)
    expert_map = torch.where(expert_map % 2 == 0, expert_map // 2, -1)
    with SeatsChecker():
        ours.make_seats(routed.experts, E)
        ours.make_seats(routed.experts, E // 2, expert_map)


# --- That it can fail -----------------------------------------------------------------------

EXPERTS_TENSORS = {
    "gate_up_kernel": ("hidden_ptr", "w13", "order_ptr", "offsets_ptr", "out_ptr"),
    "down_kernel": ("x", "w2", "weights_ptr", "order_ptr", "offsets_ptr", "out_ptr"),
    "combine_kernel": ("rows_ptr", "experts_ptr", "out_ptr"),
}
ROUTING_TENSORS = {
    "choose_kernel": ("scores_ptr", "cand_ptr", "cand_score_ptr", "keys_ptr", "tags_ptr"),
    "limit_kernel": ("tags_ptr", "keys_ptr", "limits_ptr", "last_bid_ptr"),
    "pack_kernel": ("tags_ptr", "cand_ptr", "experts_ptr", "weights_ptr", "counts_ptr"),
    "seats_kernel": ("experts_ptr", "order_ptr", "offsets_ptr", "seat_ptr", "counters_ptr"),
}


def pairs(tensors: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(kernel, name) for kernel, names in tensors.items() for name in names]


@pytest.mark.parametrize("short", pairs(EXPERTS_TENSORS), ids="-".join)
def test_experts_with_a_tensor_too_short(short: tuple[str, str], chip: str) -> None:
    """An element less than there is, weights and workspaces among them."""
    checker = ExpertsChecker()
    checker.short = short
    with pytest.raises(OutOfBoundsError, match=f"{short[0]} [a-z]+ {short[1]} "):
        run_experts(checker, "mixtral-8x7b", 16, points("mixtral-8x7b", 16)[0])


@pytest.mark.parametrize("short", pairs(ROUTING_TENSORS), ids="-".join)
def test_routing_with_a_tensor_too_short(short: tuple[str, str]) -> None:
    checker = Checker()
    checker.short = short
    with pytest.raises(OutOfBoundsError, match=f"{short[0]} [a-z]+ {short[1]} "):
        decode = short[1] == "counters_ptr"  # those of decode steps are its end
        run_routing(checker, "olmoe", 64, points("olmoe", 64)[-1], decode=decode)


def read(x_ptr, place):  # type: ignore[no-untyped-def]
    tl.load(x_ptr + place)


@pytest.mark.parametrize("place", [-1, 0, 3, 4])
def test_both_ends_of_a_tensor(place: int) -> None:
    """Neighbours in memory don't count: the tensor is the middle of a larger one."""
    tensor = torch.zeros(12, dtype=torch.int32)[4:8]
    outside = pytest.raises(OutOfBoundsError, match=f"reads x_ptr at elements {place} to {place}")
    with outside if place in (-1, 4) else contextlib.nullcontext(), Checker():
        triton.jit(read)[(1,)](tensor, place)
