"""The expert kernels against plain torch: under Triton's interpreter, or on a GPU where one is.

Every tensor that a kernel gets lies between walls of NaN (or of indices that lead to NaN), and
every tensor that it writes starts as NaN: a read out of bounds spoils the result, a write out of
bounds the wall. Under the interpreter each address is checked, too, so that a stray read whose
value is thrown away is seen as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naive_activations import activate
from torch import Tensor

from capmoe_kernels import experts as ours
from capmoe_kernels.launch import Chip, CombineConfig, ExpertsConfig, GemmConfig

DEVICE = "cpu" if ours.INTERPRETED else "cuda"
WALL = 96  # elements; more than a row of most shapes here
EPS = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25}

_TILE = GemmConfig(16, 32, 16, group_m=2, num_warps=4, num_stages=2)
_SMALL = CombineConfig(32, 1)


def _config(**changes: Any) -> ExpertsConfig:
    split = changes.pop("split_k", 1)
    tile = dataclasses.replace(_TILE, **changes)
    return ExpertsConfig(tile, dataclasses.replace(tile, split_k=split), _SMALL)


CONFIGS = {
    "descriptors": _config(),
    "pointers": _config(use_tma=False),
    "swapped": _config(swap_ab=True, split_k=2),
    "swapped-pointers": _config(swap_ab=True, use_tma=False, split_k=3),
}


class Walled:
    """Tensors with walls around them, which `check` finds untouched."""

    def __init__(self) -> None:
        self.walls: list[tuple[Tensor, Tensor]] = []
        self.spans: list[tuple[int, int]] = []  # first and past the last address of each tensor

    def __call__(self, values: Tensor, wall: float | None = None) -> Tensor:
        fill = torch.nan if wall is None else wall
        base = torch.full((values.numel() + 2 * WALL,), fill, dtype=values.dtype, device=DEVICE)
        inner = base[WALL : WALL + values.numel()].view(values.shape)
        inner.copy_(values)
        for part in (base[:WALL], base[WALL + values.numel() :]):
            self.walls.append((part, part.clone()))
        self.allow(inner)
        return inner

    def allow(self, tensor: Tensor) -> Tensor:
        """Let kernels read and write the elements of `tensor` (and what lies between them)."""
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            self.spans.append((begin, begin + (last + 1) * tensor.element_size()))
        return tensor

    def nans(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self(torch.full(shape, torch.nan, dtype=dtype))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Fail at an access outside of all tensors, under the interpreter."""
        if not ours.INTERPRETED:
            yield
            return
        from triton.runtime.interpreter import InterpreterBuilder

        def watch(original: Any, mask_index: int) -> Any:
            def access(builder: Any, pointers: Any, *args: Any, **options: Any) -> Any:
                at = pointers.data[args[mask_index].data].astype(np.uint64)
                size = pointers.get_element_ty().primitive_bitwidth // 8
                begins, ends = np.array(sorted(self.spans), dtype=np.uint64).reshape(-1, 2).T
                tensor = np.searchsorted(begins, at, side="right").astype(np.int64) - 1
                assert at.size == 0 or ((tensor >= 0) & (at + size <= ends[tensor])).all()
                return original(builder, pointers, *args, **options)

            return access

        with pytest.MonkeyPatch.context() as patch:
            for name, index in (("create_masked_load", 0), ("create_masked_store", 1)):
                original = getattr(InterpreterBuilder, name)
                patch.setattr(InterpreterBuilder, name, watch(original, index))
            yield

    def check(self) -> None:
        for now, before in self.walls:
            torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


@dataclasses.dataclass
class Case:
    """One layer and one routing, on the device and walled in."""

    hidden: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    experts: Tensor
    options: dict[str, Any]
    walled: Walled

    def run(self, config: ExpertsConfig | None = None, **changes: Any) -> Tensor:
        """Ours, with seats, workspaces and result walled in and poisoned."""
        tokens, width = self.experts.shape
        (num_experts, num_hidden, intermediate), dtype = self.w2.shape, self.hidden.dtype
        made = ours.make_seats(self.experts, num_experts, self.options.get("expert_map"))
        slots = tokens * width
        order = torch.where(
            torch.arange(slots, device=DEVICE) < made.offsets[-1], made.order, slots
        )
        seats = ours.Seats(self.walled(order, slots), self.walled(made.offsets, slots))
        sizes = ours.workspace_sizes(
            tokens, width, num_hidden, intermediate, dtype, config, changes.get("most_held")
        )
        spaces = tuple(self.walled.nans(size, dtype=dtype) for size in sizes)
        out = self.walled.nans(tokens, num_hidden, dtype=dtype)
        options = {"config": config, "out": out, "workspaces": spaces, **self.options, **changes}
        full = torch.full  # makes the one tensor that can't be handed in
        with pytest.MonkeyPatch.context() as patch, self.walled.watched():
            patch.setattr(torch, "full", lambda *a, **k: self.walled.allow(full(*a, **k)))
            result = ours.fused_experts(
                self.hidden, self.w13, self.w2, self.weights, self.experts, seats, **options
            )
        assert result.data_ptr() == out.data_ptr()
        self.walled.check()
        return result


def make_case(
    tokens: int = 9,
    width: int = 2,
    num_experts: int = 3,
    hidden: int = 40,
    intermediate: int = 24,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu",
    experts: Tensor | None = None,
    global_experts: int | None = None,
    bias: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    torch.manual_seed(seed)
    walled = Walled()
    gated = not activation.endswith("_no_mul")
    wide = 2 * intermediate if gated else intermediate
    if global_experts is not None:
        expert_map = torch.full((global_experts,), -1, dtype=torch.int32)
        here = torch.randperm(global_experts)[:num_experts]
        expert_map[here] = torch.arange(num_experts, dtype=torch.int32)
        options["expert_map"] = walled(expert_map, -1)
    if experts is None:
        ids = max(num_experts, global_experts or 0, width)
        experts = torch.stack([torch.randperm(ids)[:width] for _ in range(tokens)])
        experts[experts >= (global_experts or num_experts)] = -1
        experts[torch.rand(tokens, width) < 0.2] = -1
    weights = torch.rand(tokens, width)
    weights[experts < 0] = torch.nan  # never read
    if bias is not None:
        options["w13_bias"] = walled(torch.randn(num_experts, wide).to(bias))
        options["w2_bias"] = walled(torch.randn(num_experts, hidden).to(bias))
    return Case(
        walled(torch.randn(tokens, hidden).to(dtype)),
        walled((torch.randn(num_experts, wide, hidden) * hidden**-0.5).to(dtype)),
        walled((torch.randn(num_experts, hidden, intermediate) * intermediate**-0.5).to(dtype)),
        walled(weights),
        walled(experts.to(torch.int32), 0),
        {"activation": activation, **options},
        walled,
    )


def reference(case: Case, dtype: torch.dtype) -> Tensor:
    """The formula, expert by expert, computed in `dtype`."""
    options, out = case.options, torch.zeros_like(case.hidden, dtype=dtype)
    local = case.experts.long()
    if (expert_map := options.get("expert_map")) is not None:
        local = torch.where(local < 0, -1, expert_map[local.clamp(min=0)].long())
    b13, b2 = options.get("w13_bias"), options.get("w2_bias")
    parameters = {key: v for key, v in options.items() if key.startswith(("swiglu_", "situ_"))}
    for e in range(case.w13.shape[0]):
        rows, places = (local == e).nonzero(as_tuple=True)
        weight = case.weights[rows, places].unsqueeze(1).to(dtype)
        on_input = options.get("apply_router_weight_on_input", False)
        x = case.hidden[rows].to(dtype)
        x = x * weight if on_input else x
        h = F.linear(x, case.w13[e].to(dtype), None if b13 is None else b13[e].to(dtype))
        y = activate(options["activation"], h, **parameters)
        y = F.linear(y, case.w2[e].to(dtype), None if b2 is None else b2[e].to(dtype))
        out.index_add_(0, rows, y if on_input else y * weight)
    return out


def assert_as_good_as_torch(case: Case, result: Tensor) -> None:
    """Ours errs at most twice as much as torch in the same dtype, against float64."""
    truth = reference(case, torch.float64)
    torchs = reference(case, case.hidden.dtype).double()
    scale = truth.norm() + 1e-30
    error, allowed = (result.double() - truth).norm() / scale, (torchs - truth).norm() / scale
    assert bool(result.isfinite().all())
    # The floor: one rounding of the result, for the cases where torch happens to be exact.
    assert error <= 2 * allowed + EPS[result.dtype], f"ours {error:.2e}, torch {allowed:.2e}"


ACTIVATION_OPTIONS: dict[str, dict[str, float]] = {
    "swigluoai_uninterleave": {"swiglu_limit": 0.7, "swiglu_alpha": 1.3, "swiglu_beta": 0.5},
    "swiglustep": {"swiglu_limit": 0.5},
    "situ": {"situ_beta": 0.8, "situ_linear_beta": 1.2},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("activation", ours.ACTIVATIONS)
def test_activations(activation: str, config: str) -> None:
    options = ACTIVATION_OPTIONS.get(activation, {})
    case = make_case(activation=activation, bias=torch.float32, **options)
    assert_as_good_as_torch(case, case.run(CONFIGS[config]))


@pytest.mark.parametrize("name", ["silu", "silu_no_mul"])
def test_no_activation_falls_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table whose formula the kernels don't have is refused, not taken for another."""
    act = dataclasses.replace(ours.resolve_activation(name), kind="cube")
    monkeypatch.setattr(ours, "resolve_activation", lambda *args: act)
    with pytest.raises(Exception, match="unknown activation"):
        make_case(activation=name).run(CONFIGS["pointers"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes(dtype: torch.dtype, config: str, bias: bool) -> None:
    case = make_case(11, 3, 4, 48, 40, dtype=dtype, bias=dtype if bias else None, swiglu_limit=2.0)
    assert_as_good_as_torch(case, case.run(CONFIGS[config]))


@pytest.mark.parametrize("tokens,width,num_experts,hidden,intermediate", [
    (1, 1, 1, 1, 1),
    (1, 2, 5, 16, 16),
    (7, 3, 4, 33, 17),
    (5, 2, 2, 100, 9),
    (35, 1, 1, 24, 50),  # three m-tiles of one expert: the last group of m-tiles is short
    (40, 4, 6, 16, 33),
    (2, 9, 3, 20, 20),  # wider than the experts
])  # fmt: skip
@pytest.mark.parametrize("config", CONFIGS)
def test_odd_sizes(
    tokens: int, width: int, num_experts: int, hidden: int, intermediate: int, config: str
) -> None:
    case = make_case(tokens, width, num_experts, hidden, intermediate)
    assert_as_good_as_torch(case, case.run(CONFIGS[config]))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["nobody", "all-to-one", "only-last", "one-row"])
def test_lopsided_routing(name: str, config: str) -> None:
    experts = torch.full((37, 2), -1)
    if name == "all-to-one":
        experts[:, 1] = 2
    elif name == "only-last":
        experts[:, 0] = torch.where(torch.arange(37) % 3 == 0, 4, -1)
    elif name == "one-row":
        experts[20] = torch.tensor([3, 0])
    case = make_case(37, 2, 5, 24, 16, experts=experts)
    result = case.run(CONFIGS[config])
    assert_as_good_as_torch(case, result)
    assert not result[(experts < 0).all(1).to(DEVICE)].any()  # exactly zero, not just small


@pytest.mark.skipif(not ours.INTERPRETED, reason="counts what the interpreter reads")
@pytest.mark.parametrize("config", CONFIGS)
def test_only_experts_with_tokens_are_read(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen decode tokens on three of nine experts: each weight of these is read once, no other.

    So an expert without a token has no tile, in whatever program it would have been.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    busy, idle = [1, 4, 8], [0, 2, 3, 5, 6, 7]
    choice = torch.tensor([[t % 3, (t + 1 + t % 2) % 3] for t in range(16)])
    case = make_case(16, 2, 9, 32, 48, experts=torch.tensor(busy)[choice])
    expected = case.run(CONFIGS[config]).clone()
    reads = [np.zeros(w.shape, dtype=np.int64) for w in (case.w13, case.w2)]
    load = InterpreterBuilder.create_masked_load

    def counting(builder: Any, pointers: Any, mask: Any, *args: Any, **options: Any) -> Any:
        addresses = pointers.data[mask.data].astype(np.int64)
        for weights, count in zip((case.w13, case.w2), reads, strict=True):
            at = (addresses - weights.data_ptr()) // weights.element_size()
            np.add.at(count.reshape(-1), at[(at >= 0) & (at < count.size)], 1)
        return load(builder, pointers, mask, *args, **options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting)
    for weights in (case.w13, case.w2):
        weights[idle] = torch.nan
    assert torch.equal(case.run(CONFIGS[config]), expected)
    for count in reads:
        assert (count[busy] == 1).all() and not count[idle].any()


@pytest.mark.parametrize("config", ["descriptors", "swapped-pointers"])
@pytest.mark.parametrize("on_input", [False, True])
def test_expert_map_and_weight_on_input(on_input: bool, config: str) -> None:
    case = make_case(
        13,
        4,
        3,
        24,
        16,
        global_experts=8,
        bias=torch.bfloat16,
        apply_router_weight_on_input=on_input,
    )
    assert_as_good_as_torch(case, case.run(CONFIGS[config]))


@pytest.mark.parametrize("activation", ["swigluoai", "swiglustep"])
def test_the_limit_that_is_not_given_is_vllms(activation: str) -> None:
    """Gates and ups far beyond 7."""
    case = make_case(activation=activation)
    case.hidden *= 16
    assert bool((F.linear(case.hidden, case.w13[0]).abs() > 14).any())
    assert_as_good_as_torch(case, case.run(CONFIGS["descriptors"]))


def test_parts_of_a_split_sum_are_added_in_float32() -> None:
    """1001 - 1000 = 1; in bfloat16 the first part alone would be 1000."""
    case = make_case(1, 1, 1, 1, 32, activation="relu2_no_mul", experts=torch.zeros(1, 1).long())
    for tensor in (case.hidden, case.w13, case.weights):
        tensor.fill_(1)
    case.w2.zero_()
    case.w2[0, 0, [0, 1, 16]] = torch.tensor([1000, 1, -1000]).to(case.w2)
    for config in (CONFIGS["swapped"], _config(split_k=2)):
        assert case.run(config).tolist() == [[1.0]]


def test_rows_of_the_result_may_lie_far_apart() -> None:
    """The third row begins 2^31 elements after the first. (The pages between are never touched.)"""
    case = make_case(3, 1, 1, 16, 16, experts=torch.zeros(3, 1).long())
    expected = case.run(CONFIGS["pointers"]).clone()
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (3, 16), (2**30, 1)
    )
    for row in far:
        case.walled.allow(row)
    args = (case.hidden, case.w13, case.w2, case.weights, case.experts)
    sizes = ours.workspace_sizes(3, 1, 16, 16, torch.bfloat16, CONFIGS["pointers"])
    spaces = tuple(case.walled.nans(size, dtype=torch.bfloat16) for size in sizes)
    seats = ours.make_seats(case.experts, 1)
    for tensor in (seats.order, seats.offsets):
        case.walled.allow(tensor)
    with case.walled.watched():
        ours.fused_experts(
            *args, seats, activation="silu", config=CONFIGS["pointers"], workspaces=spaces, out=far
        )
    assert torch.equal(far, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_workspaces_hold_what_is_held(config: str) -> None:
    """Rows wide as under expert parallelism, most of whose places are elsewhere or unused."""
    case = make_case(13, 6, 3, 40, 24, global_experts=12, bias=torch.bfloat16)
    expected = case.run(CONFIGS[config]).clone()
    held = int(ours.make_seats(case.experts, 3, case.options["expert_map"]).offsets[-1])
    assert 0 < held < 13 * 6 // 2
    for most in (held, held + 5, 13 * 6 + 1):
        assert torch.equal(case.run(CONFIGS[config], most_held=most), expected)
    rows = [ours.workspace_sizes(13, 6, 40, 24, torch.bfloat16, None, m)[0] for m in (held, None)]
    assert rows == [held * 24, 13 * 6 * 24]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_over_the_promise_is_left_out(config: str) -> None:
    """Not read, and nothing is written outside: the walls and addresses are checked."""
    case = make_case(37, 2, 5, 24, 16)
    seats = ours.make_seats(case.experts, 5)
    held = int(seats.offsets[-1])
    result = case.run(CONFIGS[config], most_held=held - 9)
    late = seats.order[held - 9 : held].long()
    case.experts.view(-1)[late] = -1
    assert torch.equal(result, case.run(CONFIGS[config]))


def test_configuration_by_heuristics() -> None:
    case = make_case(6, 2, 4, 48, 32)
    assert_as_good_as_torch(case, case.run())
    assert_as_good_as_torch(case, case.run(max_rows_per_expert=6))


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_launch_options_of_the_tuner(flatten: bool, pdl: bool) -> None:
    """They order loads and launches anew, which the interpreter knows nothing of."""
    case = make_case(40, 3, 4, 48, 40)
    config = dataclasses.replace(_config(flatten=flatten), pdl=pdl)
    assert_as_good_as_torch(case, case.run(config))


@pytest.mark.parametrize("config", CONFIGS)
def test_repeats_bitwise(config: str) -> None:
    case = make_case(12, 3, 4, 40, 24)
    first = case.run(CONFIGS[config]).clone()
    assert torch.equal(first, case.run(CONFIGS[config]))
    # Neither the grid nor the order of the tiles has a say.
    bounded = case.run(CONFIGS[config], max_rows_per_expert=12)
    assert torch.equal(first, bounded)
    tile = CONFIGS[config]
    other = dataclasses.replace(
        tile,
        gate_up=dataclasses.replace(tile.gate_up, group_m=1, programs_per_sm=4),
        down=dataclasses.replace(tile.down, group_m=7),
    )
    assert torch.equal(first, case.run(other))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 300])
def test_a_cuda_graph_holds_the_call(tokens: int) -> None:
    """Captured once, it serves other tokens, other experts and other loads."""
    case = make_case(tokens, 2, 8, 256, 128)
    case.weights.uniform_()  # no NaN where an expert may come to stand

    def call() -> Tensor:
        args = (case.hidden, case.w13, case.w2, case.weights, case.experts)
        return ours.fused_experts(*args, activation="silu")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for highest in (8, 3, 0):
        case.hidden.copy_(torch.randn(case.hidden.shape))
        case.experts.copy_(torch.randint(-1, highest, case.experts.shape))
        graph.replay()
        assert torch.equal(captured, call())
        assert_as_good_as_torch(case, captured)


def test_makes_what_is_not_given() -> None:
    case = make_case()
    args = (case.hidden, case.w13, case.w2, case.weights, case.experts)
    config = CONFIGS["descriptors"]
    result = ours.fused_experts(*args, activation="silu", config=config)
    assert torch.equal(result, case.run(config))


def test_strided_input_and_result_in_place() -> None:
    case = make_case(10, 2, 3, 24, 16)
    expected = case.run(CONFIGS["descriptors"]).clone()
    wide = torch.full((10, 64), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[:, 8:32] = case.hidden
    view = wide[:, 8:32]
    for config in ("descriptors", "pointers"):
        case.hidden = view.clone(memory_format=torch.preserve_format)
        wide[:, 8:32] = case.hidden
        case.hidden = case.walled.allow(view)
        result = case.run(CONFIGS[config])
        assert torch.equal(result, expected)
    args = (view, case.w13, case.w2, case.weights, case.experts)
    result = ours.fused_experts(*args, activation="silu", config=CONFIGS["pointers"], out=view)
    assert result is view
    assert torch.equal(view, expected)
    assert bool(wide[:, :8].isnan().all()) and bool(wide[:, 32:].isnan().all())


def test_no_tokens_no_places_no_experts() -> None:
    case = make_case(0, 2, 3, experts=torch.empty(0, 2))
    assert case.run().shape == (0, 40)
    case = make_case(4, 0, 3)
    assert torch.equal(case.run(), torch.zeros_like(case.hidden))
    case = make_case(4, 2, 0, experts=torch.full((4, 2), -1))
    assert torch.equal(case.run(), torch.zeros_like(case.hidden))


def test_example_of_the_docstring() -> None:
    one = torch.tensor([[[1.0]], [[2.0]]], device=DEVICE)
    ten = torch.tensor([[[1.0]], [[10.0]]], device=DEVICE)
    result = ours.fused_experts(
        torch.tensor([[3.0]], device=DEVICE),
        one,
        ten,
        torch.tensor([[0.5, 0.1]], device=DEVICE),
        torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE),
        activation="relu2_no_mul",
    )
    torch.testing.assert_close(result, torch.tensor([[40.5]], device=DEVICE))


@pytest.mark.parametrize("global_experts", [None, 7])
def test_seats_are_made_where_none_are_given(global_experts: int | None) -> None:
    case = make_case(global_experts=global_experts)
    config = CONFIGS["descriptors"]
    arguments = case.hidden, case.w13, case.w2, case.weights, case.experts
    made = ours.fused_experts(*arguments, config=config, **case.options)
    assert torch.equal(made, case.run(config))


BIG = 2**31 + 2**12  # elements: row and expert offsets past int32


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """BIG bfloat16 elements in a file with a hole: memory only where something is written."""
    if not ours.INTERPRETED:
        return torch.empty(BIG, dtype=torch.bfloat16, device=DEVICE)
    path = tmp_path_factory.mktemp("sparse") / "elements"
    return torch.from_file(str(path), shared=True, size=BIG, dtype=torch.bfloat16)


CHIP = Chip((9, 0), 2)


@pytest.mark.parametrize("use_tma", [True, False])
def test_expert_offsets_beyond_int32(sparse: Tensor, use_tma: bool) -> None:
    case = make_case(3, 2, 2, 16, 16, experts=torch.tensor([[0, 1]] * 3))
    expected = case.run(CONFIGS["descriptors"]).clone()
    for name, start in (("w13", 0), ("w2", 2**11)):
        values = getattr(case, name)
        far = sparse.as_strided(values.shape, (2**31, values.stride(1), 1), start)
        setattr(case, name, case.walled.allow(far.copy_(values)))
        assert torch.equal(case.run(_config(use_tma=use_tma)), expected)
    far = sparse.as_strided((3, 16), (2**30, 1), 2**11 + 2**10)
    case.hidden = case.walled.allow(far.copy_(case.hidden))
    assert torch.equal(case.run(_config(use_tma=use_tma)), expected)


def test_seat_and_slot_offsets_beyond_int32(sparse: Tensor) -> None:
    """One seat far along the intermediate buffer, then one far along the result."""
    case = make_case(1, 1, 1, 32, 32, experts=torch.tensor([[0]]))
    far = 2**31 // 32 + 5
    rows = sparse[: BIG // 32 * 32].view(-1, 32)
    act = ours.resolve_activation("silu")
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def offsets(begin: int) -> Tensor:
        return torch.tensor([begin, begin + 1], dtype=torch.int32, device=DEVICE)

    def gate_up(seats: ours.Seats, out: Tensor) -> None:
        ours.launch_gate_up(
            case.hidden,
            case.w13,
            None,
            case.weights,
            seats,
            out,
            act,
            _TILE,
            CHIP,
            mul_weight=False,
        )

    near = case.walled.nans(1, 32, dtype=torch.bfloat16)
    gate_up(ours.Seats(zero, offsets(0)), near)
    order = torch.zeros(far + 1, dtype=torch.int32, device=DEVICE)
    gate_up(ours.Seats(order, offsets(far)), rows)
    assert torch.equal(rows[far], near[0])

    def down(x: Tensor, seats: ours.Seats, out: Tensor, use_tma: bool) -> None:
        tile = dataclasses.replace(_TILE, use_tma=use_tma)
        ours.launch_down(x, case.w2, None, case.weights, seats, out, tile, CHIP, mul_weight=False)

    expected = case.walled.nans(1, 32, dtype=torch.bfloat16)
    down(near, ours.Seats(zero, offsets(0)), expected, True)
    for use_tma in (True, False):
        result = case.walled.nans(1, 32, dtype=torch.bfloat16)
        down(rows, ours.Seats(order, offsets(far)), result, use_tma)  # reads far, writes slot 0
        assert torch.equal(result, expected)
    down(near, ours.Seats(zero + far, offsets(0)), rows.view(-1), True)  # writes far
    assert torch.equal(rows[far], expected[0])
