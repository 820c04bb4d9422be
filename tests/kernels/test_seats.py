"""Seats against a plain loop: under Triton's interpreter, or on a GPU where one is.

Every tensor that a kernel gets lies between walls of garbage, and every tensor that it writes holds
garbage before: a read out of bounds spoils the result, a write out of bounds the wall. Under the
interpreter each address is checked, too.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from capmoe_kernels import experts as public
from capmoe_kernels import seats as ours
from capmoe_kernels.seats import SeatsLaunch, make_seats, seats_launch

DEVICE = "cpu" if ours.INTERPRETED else "cuda"
GARBAGE = 0x5A5A5A5A
WALL = 64  # elements
SMALL = SeatsLaunch(span=8, experts=2, step=4, count_step=4)  # many blocks, several programs each


class Walls:
    """Tensors with walls around; stands in for torch.empty and torch.zeros."""

    def __init__(self) -> None:
        self.bases: list[tuple[Tensor, int]] = []
        self.spans: list[tuple[int, int]] = []  # first and past the last address of each tensor

    def surround(self, values: Tensor) -> Tensor:
        size = values.numel()
        base = torch.full((size + 2 * WALL,), GARBAGE, dtype=values.dtype, device=DEVICE)
        base[WALL : WALL + size] = values.reshape(-1)
        self.bases.append((base, size))
        inner = base[WALL : WALL + size].view(values.shape)
        self.spans.append((inner.data_ptr(), inner.data_ptr() + size * inner.element_size()))
        return inner

    def empty(self, size: int, dtype: torch.dtype, device: Any) -> Tensor:
        return self.surround(torch.full((size,), GARBAGE, dtype=dtype, device=device))

    def zeros(self, size: int, dtype: torch.dtype, device: Any) -> Tensor:
        return self.surround(torch.full((size,), 0, dtype=dtype, device=device))

    def check(self) -> None:
        for base, size in self.bases:
            for wall in (base[:WALL], base[WALL + size :]):
                assert bool((wall == GARBAGE).all()), "a kernel wrote outside of a tensor"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Fail at an access outside of all tensors, under the interpreter."""
        if not ours.INTERPRETED:
            yield
            return
        from triton.runtime.interpreter import InterpreterBuilder

        def watch(original: Any, first: int, mask_at: int) -> Any:
            def access(builder: Any, *args: Any, **options: Any) -> Any:
                mask = args[mask_at].data
                size = args[first].get_element_ty().primitive_bitwidth // 8
                for at in args[first].data[mask].tolist():
                    inside = any(begin <= at and at + size <= end for begin, end in self.spans)
                    assert inside, "an access outside of all tensors"
                return original(builder, *args, **options)

            return access

        with pytest.MonkeyPatch.context() as patch:
            for name, first, mask_at in (
                ("create_masked_load", 0, 1),
                ("create_masked_store", 0, 2),
                ("create_atomic_rmw", 1, 3),
            ):
                original = getattr(InterpreterBuilder, name)
                patch.setattr(InterpreterBuilder, name, watch(original, first, mask_at))
            yield


def by_hand(experts: Tensor, num_experts: int, expert_map: Tensor | None) -> list[list[int]]:
    """The assignments of each expert here, ascending."""
    held: list[list[int]] = [[] for _ in range(num_experts)]
    here = None if expert_map is None else expert_map.tolist()
    for a, expert in enumerate(experts.reshape(-1).tolist()):
        if here is not None:
            expert = here[expert] if 0 <= expert < len(here) else -1
        if 0 <= expert < num_experts:
            held[expert].append(a)
    return held


def check(experts: Tensor, num_experts: int, expert_map: Tensor | None = None) -> None:
    """Twice the seats that the loop gives, and nothing else is written."""
    held = by_hand(experts, num_experts, expert_map)
    order = [a for mine in held for a in mine]
    offsets = [0, *itertools.accumulate(len(mine) for mine in held)]
    for _ in range(2):
        walls = Walls()
        ids = walls.surround(experts) if experts.is_contiguous() else experts.to(DEVICE)
        map_G = None if expert_map is None else walls.surround(expert_map)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", walls.empty)
            patch.setattr(torch, "zeros", walls.zeros)
            with walls.watched() if experts.is_contiguous() else contextlib.nullcontext():
                seats = make_seats(ids, num_experts, map_G)
        walls.check()
        assert (seats.order.dtype, seats.offsets.dtype) == (torch.int32, torch.int32)
        assert seats.offsets.tolist() == offsets
        empty = experts.numel() - len(order)
        assert seats.order.tolist() == order + [GARBAGE] * empty
        assert torch.equal(ids.cpu(), experts.cpu())


def random_case(rng: random.Random) -> tuple[Tensor, int, Tensor | None]:
    """Rows with the same expert twice, ids out of range, experts elsewhere."""
    E = rng.choice([1, 2, 3, 5, 8])
    G = rng.choice([None, E, E + 3, 4 * E])
    T, W = rng.choice([1, 2, 7, 16, 33]), rng.choice([1, 2, 3, 8])
    dtype = rng.choice([torch.int32, torch.int64])
    ids = E if G is None else G
    odd = [-1, -1, -2, ids, ids + 1, 2**31 - 1, -(2**31)]
    odd += [2**32, 2**40 + 1, -(2**63), 2**63 - 1] if dtype == torch.int64 else []
    share = rng.choice([0.0, 0.2, 0.9])
    draw = [rng.choice(odd) if rng.random() < share else rng.randrange(ids) for _ in range(T * W)]
    experts = torch.tensor(draw, dtype=dtype).view(T, W)
    if G is None:
        return experts, E, None
    here = rng.sample([*range(E), *[-1] * (G - E)], G)
    if rng.random() < 0.3:
        here[rng.randrange(G)] = rng.choice([E, -7, 2**31 - 1, -(2**31)])
    return experts, E, torch.tensor(here, dtype=torch.int32)


@pytest.fixture(params=["small", "shipped"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the launch as shipped, and with one of many small steps."""
    if request.param == "small":
        monkeypatch.setattr(ours, "seats_launch", lambda A, E: SMALL)


def test_example_of_the_docstring() -> None:
    experts = torch.tensor([[1, 0], [1, -1]], dtype=torch.int32, device=DEVICE)
    seats = make_seats(experts, 2)
    assert seats.order[:3].tolist() == [1, 0, 2]
    assert seats.offsets.tolist() == [0, 1, 3]
    assert public.make_seats is make_seats and public.Seats is ours.Seats


@pytest.mark.parametrize("seed", range(12))
def test_random_cases(seed: int, launches: None) -> None:
    check(*random_case(random.Random(seed)))


@pytest.mark.parametrize(
    "T,W,E", [(0, 3, 4), (3, 0, 4), (0, 0, 0), (3, 2, 0), (1, 1, 1), (5, 1, 1)]
)
def test_little_of_everything(T: int, W: int, E: int, launches: None) -> None:
    experts = torch.zeros((T, W), dtype=torch.int64)
    check(experts, E)
    check(experts, E, torch.tensor([0], dtype=torch.int32))
    check(experts, E, torch.zeros(0, dtype=torch.int32))


def test_all_alike(launches: None) -> None:
    for expert in (-1, 0, 4, 5):
        check(torch.full((19, 3), expert, dtype=torch.int32), 5)


def test_neither_rows_nor_a_map_need_be_contiguous(launches: None) -> None:
    experts = torch.tensor([[0, 3, 1, -1], [2, 2, 0, 1], [1, 0, 9, 3]]).T
    expert_map = torch.tensor([1, 9, -1, 9, 0, 9, 1, 9], dtype=torch.int32)[::2]
    for given in (None, expert_map):
        held = by_hand(experts, 2, given)
        map_G = None if given is None else given.to(DEVICE)
        seats = make_seats(experts.to(DEVICE), 2, map_G)
        assert seats.offsets.tolist() == [0, len(held[0]), len(held[0]) + len(held[1])]
        assert seats.order[: seats.offsets[-1]].tolist() == held[0] + held[1]


@pytest.mark.parametrize("E,share", [(4, 1.0), (16, 0.125), (130, 0.5)])
def test_many_rows(E: int, share: float) -> None:
    """Rows gathered from several ranks: several blocks, more than one program for E = 130."""
    G = int(E / share)
    generator = torch.Generator().manual_seed(E)
    experts = torch.randint(-1, G, (1500, 4), generator=generator)
    expert_map = torch.full((G,), -1, dtype=torch.int32)
    expert_map[torch.randperm(G, generator=generator)[:E]] = torch.arange(E, dtype=torch.int32)
    seats = make_seats(experts.to(DEVICE), E, expert_map.to(DEVICE))
    local = torch.where(experts < 0, -1, expert_map[experts]).reshape(-1)
    key = torch.where(local < 0, E, local)
    loads = key.bincount(minlength=E + 1)[:E]
    assert seats.offsets.tolist() == [0, *loads.cumsum(0).tolist()]
    order = key.argsort(stable=True)[: int(loads.sum())]
    assert torch.equal(seats.order[: order.numel()].cpu().long(), order)


def test_launches_fit_all_sizes() -> None:
    sizes = [1, 2, 63, 64, 65, 4096, 4097, 524288, 2**20, 2**30, 2**30 + 1, 2**31 - 1]
    for E in (1, 2, 3, 8, 60, 64, 65, 256, 1024, ours.MAX_EXPERTS):
        compiled = set()
        for A in sizes:
            launch = seats_launch(A, E)
            compiled.add((launch.experts, launch.step, launch.count_step))
            for size in (launch.span, launch.experts, launch.step, launch.count_step):
                assert size & (size - 1) == 0 and size > 0
            assert launch.step * launch.experts <= 2048 and launch.span % launch.step == 0
            blocks = -(-A // launch.span)
            assert blocks * launch.span <= 2**31  # assignments have int32 numbers
            assert blocks * E < 2**31
            assert blocks * (blocks - 1) <= A  # loads of earlier blocks: at most A * E / 2
            assert launch.span <= max(512, 2 * A**0.5 + 2)
        assert len(compiled) == 1, "another number of assignments is no other kernel"


def ints(*shape: int, dtype: torch.dtype = torch.int32, device: str = DEVICE) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("call,words", [
    (lambda: (ints(6), 4), ["experts", "[6]", "[T, W]"]),
    (lambda: (ints(3, 2).short(), 4), ["experts", "int16", "torch.int32 or torch.int64"]),
    (lambda: (ints(3, 2, device="meta"), 4), ["experts", "meta", f"must be on {DEVICE}"]),
    (lambda: (ints(1, 1).expand(2**16, 2**15), 4), ["experts", f"{2**31} elements", "below"]),
    (lambda: (ints(3, 2), -1), ["num_experts", "-1", "from 0 to 32768"]),
    (lambda: (ints(3, 2), 32769), ["num_experts", "32769", "from 0 to 32768"]),
    (lambda: (ints(3, 2), 4, ints(8).long()), ["expert_map", "int64", "torch.int32"]),
    (lambda: (ints(3, 2), 4, ints(8, 1)), ["expert_map", "[8, 1]", "must be [E]"]),
    (lambda: (ints(3, 2), 4, ints(8, device="meta")), ["expert_map", "meta", DEVICE]),
])  # fmt: skip
def test_refuses(
    call: Callable[[], tuple[Any, ...]], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "kernels", None)  # nothing is launched
    with pytest.raises(ValueError) as error:
        make_seats(*call())
    for word in words:
        assert word in str(error.value)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match="experts is on cpu, but it must be on cuda without TRITON_INTER"
    ):
        make_seats(ints(3, 2, device="cpu"), 4)


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_call() -> None:
    experts = torch.randint(-1, 8, (3000, 2), device="cuda")
    make_seats(experts, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seats = make_seats(experts, 8)
    for low in (-1, 3):
        experts.copy_(torch.randint(low, 8, (3000, 2)))
        graph.replay()
        held = by_hand(experts, 8, None)
        order = [a for mine in held for a in mine]
        assert seats.offsets.tolist() == [0, *itertools.accumulate(map(len, held))]
        assert seats.order[: len(order)].tolist() == order
