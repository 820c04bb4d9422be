"""The routing kernels against the torch reference: the same integers, and weights to the last bit.

Under Triton's interpreter, or on a GPU where there is one; every tensor between walls of garbage.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from routing_walls import DEVICE, INF, NAN, assert_same, check, make_case, make_plan, run
from torch import Tensor

from capmoe_kernels import _routing_checks, routing
from capmoe_kernels import _routing_launch as launch
from capmoe_kernels.routing import Selection, route_triton
from vllm_capmoe import CapacityConfig, route
from vllm_capmoe.plan import resolve
from vllm_capmoe.torch_routing import route_torch

# Many small steps, so that a few rows go through every loop.
SMALL = launch.RoutingLaunch(
    choose_rows=8,
    choose_warps=1,
    limit_rows=16,
    limit_warps=1,
    rows=16,
    pack_rows=8,
    pack_warps=1,
    seat_rows=4,
    seat_warps=1,
    seat_chunk=2,
)


@pytest.fixture(params=["small", "shipped"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the launch as shipped, and with one of many small steps."""
    if request.param == "small":
        monkeypatch.setattr(routing, "launch_config", lambda T, E, L: SMALL)
    return request.param


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "launch_config", lambda T, E, L: SMALL)


# --- Random cases ---------------------------------------------------------------------------


GRID = list(
    itertools.product(
        ["drop", "expanded", "reroute"],
        ["score", "order", "reverse-order", "random"],
        ["expert", "device"],
        ["batch", "request"],
    )
)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("mode", "metric", "level", "scope"), GRID)
def test_random_cases_equal_the_reference(mode: str, metric: str, level: str, scope: str) -> None:
    rng = random.Random("-".join([mode, metric, level, scope]))
    for _ in range(4):
        scores, plan, tensors = make_case(rng, mode=mode, metric=metric, level=level, scope=scope)
        check(scores, plan, **tensors)


@pytest.mark.parametrize("seed", range(12))
def test_random_cases_with_the_shipped_launch(seed: int) -> None:
    scores, plan, tensors = make_case(random.Random(seed))
    check(scores, plan, **tensors)


@pytest.mark.parametrize("seed", range(4))
def test_mode_off_is_plain_top_k(seed: int, launches: str) -> None:
    scores, plan, tensors = make_case(random.Random(seed))
    plan = dataclasses.replace(
        plan, mode="off", extra=0, max_experts=None, bin_sizes=(1,), keeps=()
    )
    check(scores, plan, **tensors)


# --- Decode keep ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "drop", "expanded"])
@pytest.mark.parametrize("seed", range(6))
def test_decode_keep_equals_the_reference(seed: int, mode: str, launches: str) -> None:
    rng = random.Random(f"{mode} {seed}")
    keep = rng.choice(["auto", 1, 1, 2])
    scores, plan, tensors = make_case(rng, T=rng.choice([1, 17, 40]), mode=mode, scope="batch")
    keeps = CapacityConfig(decode_keep=min(keep, plan.top_k) if keep != "auto" else keep)
    plan = dataclasses.replace(plan, keeps=keeps.keeps(plan.top_k))
    for share in (1.0, 0.5):
        decode = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)) < share
        check(scores, plan, **{**tensors, "is_decode_T": decode.to(DEVICE)})


@pytest.mark.parametrize(("E", "k"), [(64, 8), (128, 8), (60, 4), (8, 2)])
def test_decode_keep_at_the_sizes_of_models(E: int, k: int) -> None:
    """A step of 24 decode tokens, 3 of them padding: fewer experts are active; k0 as `auto`."""
    logits = 2 * torch.randn(24, E, generator=torch.Generator().manual_seed(E)).to(DEVICE)
    decode, padding = torch.ones(2, 24, dtype=torch.bool, device=DEVICE)
    padding[:21] = False
    tensors = {"is_decode_T": decode, "is_padding_T": padding}
    off, auto = make_plan(E, k, mode="off"), make_plan(E, k, mode="off", decode_keep="auto")
    got = check(logits.softmax(1), auto, **tensors)
    without = check(logits.softmax(1), off, **tensors)
    assert int((got.load_after > 0).sum()) < int((without.load_after > 0).sum()) or E == 8
    assert torch.equal(got.load_before, without.load_after)
    by_logits = run(route_triton, logits, auto, scoring="softmax", **tensors)
    assert torch.equal(by_logits.experts, got.experts)


# --- Sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "E", "k", "config"),
    [
        (0, 8, 2, {}),
        (0, 8, 2, {"mode": "expanded", "scope": "request"}),
        (1, 8, 2, {"factor": 0.1}),
        (1, 1, 1, {}),
        (70, 1, 1, {"factor": 0.3}),
        (130, 60, 4, {"mode": "expanded"}),
        (40, 160, 6, {"mode": "expanded", "max_experts": "none", "metric": "random"}),
        (9, 512, 16, {"mode": "expanded", "metric": "order"}),
        (12, 12, 12, {"factor": 0.5, "scope": "request"}),
        (20, 16, 2, {"mode": "expanded", "expanded_experts": "all", "max_experts": "none"}),
        (2200, 4, 2, {}),  # more than one step of each kernel
        (2200, 4, 2, {"mode": "reroute"}),
        (130, 60, 4, {"mode": "reroute", "scope": "request"}),
        (40, 160, 6, {"mode": "reroute", "metric": "random"}),
        (2200, 4, 2, {"scope": "request", "metric": "random"}),
    ],
)
def test_sizes(T: int, E: int, k: int, config: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(T + E)
    scores = torch.randn(T, E, generator=generator).softmax(dim=1).to(DEVICE)
    request = torch.arange(T, device=DEVICE) // 700
    got = check(scores, make_plan(E, k, **config), request_T=request, num_requests=4)
    if config.get("mode") == "reroute":
        assert got.dropped > got.expanded > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_larger_tensors(dtype: torch.dtype, launches: str) -> None:
    """Rows with a stride, columns with a stride, and masks that are every other element."""
    base = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    padding = torch.zeros(80, dtype=torch.bool, device=DEVICE)
    padding[6:20] = True
    topk = torch.stack([torch.arange(40), torch.arange(1, 41), torch.arange(40)], 1).to(DEVICE) % 8
    plan = make_plan(8, 2)
    check(base[:, 8:16], plan, is_padding_T=padding[::2], topk_TK=topk[:, :2])
    check(base[:, ::3], plan, is_padding_T=padding[::2], topk_TK=topk.flip(1).t().t()[:, 1:])
    check(base.t()[:8].t(), plan)


# --- Corners --------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", ["drop", "expanded", "reroute"])
@pytest.mark.parametrize(
    ("value", "metric"),
    [(0.25, "score"), (0.0, "random"), (NAN, "score"), (NAN, "reverse-order"), (INF, "score")]
    + [(-INF, "score"), (-INF, "order")],
)
def test_all_scores_equal(value: float, metric: str, mode: str) -> None:
    scores = torch.full((33, 6), value, device=DEVICE)
    got = check(scores, make_plan(6, 2, mode=mode, metric=metric))
    assert int(got.capacity) == 11


def test_equal_scores_of_either_sign_of_zero_go_to_lower_tokens(launches: str) -> None:
    scores = torch.tensor([[-0.0, 0.0]] * 4 + [[0.0, -0.0]] * 4, device=DEVICE)
    got = check(scores, dataclasses.replace(make_plan(2, 1), renormalize=False))
    assert got.experts[:, 0].tolist() == [0] * 4 + [-1] * 4
    assert torch.signbit(got.weights[:4]).all()  # the weight is the score as it came


@pytest.mark.parametrize("k", [1, 2, 5])
def test_one_expert_takes_all(k: int, launches: str) -> None:
    scores = torch.rand(50, 5, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    scores[:, 3] = 2.0
    got = check(scores, make_plan(5, k, factor=0.5))
    assert got.load_before[3] == 50 and got.load_after[3] == 5 * k


@pytest.mark.parametrize("level", ["expert", "device"])
def test_reroute_where_fewer_experts_are_open_than_a_token_lost(launches: str, level: str) -> None:
    """A token that lost two bids and finds one open expert bids for that one, and once."""
    given = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(24, 8, generator=generator).to(DEVICE)
        config = CapacityConfig(mode="reroute", factor=0.7, min_capacity=1, level=level)
        devices = None if level == "expert" else torch.arange(8, device=DEVICE) // 2
        owners = None if devices is None else devices.tolist()
        plan = resolve(config, num_experts=8, top_k=2, expert_device=owners)
        got = check(scores, plan, **({} if devices is None else {"device_E": devices}))
        if level == "expert":
            assert int(got.load_after.max()) <= int(got.capacity.max())
        given += int(got.expanded)
    assert given > 0


def test_a_step_of_decode_tokens_alone_and_one_of_padding_alone(launches: str) -> None:
    scores = torch.rand(20, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones(20, dtype=torch.bool, device=DEVICE)
    for scope in ("batch", "request"):
        plan = make_plan(4, 2, mode="expanded", scope=scope, factor=0.1)
        request = torch.arange(20, device=DEVICE) // 6
        tensors = {"request_T": request, "num_requests": 5}
        assert int(check(scores, plan, is_decode_T=mask, **tensors).dropped) == 0
        assert int(check(scores, plan, is_padding_T=mask, **tensors).load_after.sum()) == 0


def test_decode_tokens_may_fill_more_than_the_limit(launches: str) -> None:
    scores = torch.tensor([[0.9, 0.1]] * 12, device=DEVICE)
    is_decode = torch.tensor([False] * 4 + [True] * 8, device=DEVICE)
    got = check(scores, make_plan(2, 1, factor=0.5), is_decode_T=is_decode)
    assert got.experts[:, 0].tolist() == [-1] * 4 + [0] * 8


def test_rows_of_unknown_requests_are_padding(launches: str) -> None:
    scores = torch.rand(24, 4, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    request = torch.arange(24, device=DEVICE) // 8
    outside = request.clone()
    outside[[3, 9, 23]] = torch.tensor([-1, 3, 2**40], device=DEVICE)
    padding = outside != request
    plan = make_plan(4, 2, mode="expanded", scope="request", metric="random")
    want = route_torch(scores, plan, request_T=request, is_padding_T=padding, num_requests=3)
    got = run(route_triton, scores, plan, request_T=outside, num_requests=3)
    assert_same(got, want, 4)


def test_ids_out_of_range_stay_inside(launches: str) -> None:
    """Values that the contract forbids give some result, but no access outside."""
    scores = torch.rand(24, 4, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    far = torch.tensor([-(2**31), 2**31 - 1] * 12, device=DEVICE)
    topk = torch.stack([far, far.flip(0)], dim=1)
    for mode, level in itertools.product(("expanded", "reroute"), ("device", "expert")):
        config = CapacityConfig(mode=mode, factor=0.5, min_capacity=1, level=level)
        plan = resolve(config, num_experts=4, top_k=2, expert_device=[0, 0, 1, 1])
        plan = dataclasses.replace(plan, local=True)
        got = run(route_triton, scores, plan, topk_TK=topk, device_E=far[:4], token_device_T=far)
        assert got.experts.shape == (24, plan.width)
        assert bool(((got.experts >= -1) & (got.experts < 4)).all())
        assert not bool(got.weights[got.experts < 0].any())
        assert bool(got.weights.isfinite().all())
        assert int(got.load_after.sum()) == int((got.experts >= 0).sum())


def test_worked_example_through_the_public_door() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]], device=DEVICE)
    config = CapacityConfig(mode="drop", factor=1.0, min_capacity=1)
    got = route(scores, 1, config, backend="triton")
    assert got.experts.tolist() == [[0], [0], [-1], [1]]
    assert got.capacity == 2 and got.dropped == 1 and got.left_without == 1
    expanded = CapacityConfig(
        mode="expanded", factor=1.0, min_capacity=1, candidates="global", expanded_experts=1
    )
    got = route(scores, 1, expanded, backend="triton")
    assert got.experts.tolist() == [[0], [0], [1], [1]]
    assert got.load_after.tolist() == [2, 2] and got.expanded == 1


# --- Router logits --------------------------------------------------------------------------


def torch_scores(logits: Tensor, scoring: str) -> Tensor:
    logits = logits.double()
    if scoring == "softmax":
        return logits.softmax(dim=1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    assert scoring == "sqrtsoftplus"
    return torch.nn.functional.softplus(logits, threshold=100).sqrt()


@pytest.mark.parametrize("scoring", routing.SCORINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_logits(scoring: str, dtype: torch.dtype, launches: str) -> None:
    """Scores within a few roundings of float64; routing as the reference's from these scores."""
    E = 6
    logits = 4 * torch.randn(40, E, generator=torch.Generator().manual_seed(4))
    logits[0] = torch.tensor([0.0, -0.0, 80.0, -80.0, 20.0, -20.0])
    logits = logits.to(DEVICE, dtype)
    everything = resolve(CapacityConfig(), num_experts=E, top_k=E)
    all_scores = run(route_triton, logits, everything, scoring=scoring)
    scores = torch.zeros(40, E, device=DEVICE)
    scores.scatter_(1, all_scores.experts.long(), all_scores.weights)
    # A rounding of x moves exp(x) by x times as much; 8 more for the rest. Below 1e-30 it may be 0.
    x = logits.double()
    x = x - x.amax(dim=1, keepdim=True) if scoring == "softmax" else x
    want = torch_scores(logits, scoring)
    error = (scores - want).abs()
    assert bool((error <= want * 2.0**-24 * (8 + 2 * x.abs()) + 1e-30).all()), error / want

    for config in ({}, {"mode": "expanded", "metric": "random", "max_experts": "none"}):
        plan = make_plan(E, 2, **config)
        others = torch.rand(40, E, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :2]
        for topk_TK in (None, others.to(DEVICE)):
            options = {"topk_TK": topk_TK, "seed": 5}
            got = run(route_triton, logits, plan, scoring=scoring, **options)
            assert_same(got, route_torch(scores, plan, **options), E)


@pytest.mark.parametrize("word", ["metric", "scoring"])
def test_no_word_falls_through(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that the checks let through and the kernels don't know is not taken for another."""
    plan, logits = make_plan(8, 2), torch.rand(16, 8, device=DEVICE)
    scoring = "sigmoid"
    if word == "metric":
        plan = dataclasses.replace(plan, metric="best")
        monkeypatch.setattr(_routing_checks, "METRICS", ("best",))
    else:
        scoring = "best"
        monkeypatch.setattr(routing, "SCORINGS", ("best",))
    with pytest.raises(Exception, match=f"unknown {word}"):
        route_triton(logits, plan, scoring=scoring)


@pytest.mark.parametrize("scoring", routing.SCORINGS)
def test_logits_that_are_no_numbers(scoring: str) -> None:
    logits = torch.tensor([[NAN, 1.0], [INF, 1.0], [-INF, 1.0], [-INF, -INF]], device=DEVICE)
    plan = resolve(CapacityConfig(), num_experts=2, top_k=2)
    got = run(route_triton, logits, plan, scoring=scoring)
    scores = torch.zeros(4, 2, device=DEVICE).scatter_(1, got.experts.long(), got.weights)
    want = torch_scores(logits, scoring).float()
    assert torch.equal(scores.isnan(), want.isnan())
    assert torch.allclose(scores, want, rtol=1e-6, equal_nan=True)


# --- CUDA graphs ----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["expanded", "reroute"])
def test_a_cuda_graph_holds_the_call(mode: str) -> None:
    plan = make_plan(8, 2, mode=mode, metric="random", decode_keep="auto")
    scores = torch.rand(300, 8, device="cuda")
    decode = torch.arange(300, device="cuda") < 40
    padding = torch.zeros(300, dtype=torch.bool, device="cuda")
    counters = torch.zeros(22, dtype=torch.int64, device="cuda")

    def call() -> tuple[Selection, Selection]:
        options = {"is_padding_T": padding, "is_decode_T": decode, "counters": counters}
        by_logits = route_triton(scores, plan, scoring="sigmoid", **options)
        return route_triton(scores, plan, **options), by_logits

    call()
    counters.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, by_logits = call()
    for steps, rows in enumerate((300, 11), start=1):
        scores.copy_(torch.rand(300, 8))
        padding.copy_(torch.arange(300) >= rows)
        graph.replay()
        options = {"is_padding_T": padding, "is_decode_T": decode}
        assert_same(got, route_torch(scores, plan, **options), 8)
        assert counters[16] == 2 * steps
        again = route_triton(scores, plan, scoring="sigmoid", **options)
        assert torch.equal(by_logits.experts, again.experts)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
