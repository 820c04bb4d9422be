"""The host side of the routing kernels: limits, launch sizes, refusals. Nothing is launched."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import triton
from triton.runtime import interpreter

from capmoe_kernels import _routing_bids, capacity, routing
from capmoe_kernels import _routing_launch as launch
from capmoe_kernels.contract import NO_LIMIT
from capmoe_kernels.routing import route_triton
from vllm_capmoe import CapacityConfig, ranking, reference
from vllm_capmoe.config import OPTIONS
from vllm_capmoe.plan import Plan, resolve

DEVICE = "cpu" if routing.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the title promises: a launch, compiled or interpreted, fails the test."""

    def launched(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a kernel was launched")

    monkeypatch.setattr(triton.runtime.JITFunction, "run", launched)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


def test_the_guard_sees_a_launch() -> None:
    with pytest.raises(pytest.fail.Exception, match="a kernel was launched"):
        route_triton(torch.rand(4, 8, device=DEVICE), make_plan(8, 2))


def make_plan(E: int, k: int, **config: Any) -> Plan:
    config = {"mode": "drop", "factor": 1.0, "min_capacity": 1, **config}
    return resolve(CapacityConfig(**config), num_experts=E, top_k=k, renormalize=True)


def test_all_backends_know_the_metrics_of_the_configuration() -> None:
    (accepted,) = (option.choices for option in OPTIONS if option.key == "metric")
    assert accepted is not None
    assert set(accepted) == set(ranking.METRICS) == set(_routing_bids.METRICS)


def test_the_first_draw_is_one_of_32_bits() -> None:
    for seed in (0, 1, -1, 2**31, 2**32 + 5, -(2**70)):
        got = launch.first_draw(seed)
        assert -(2**31) <= got < 2**31 and got & 0xFFFFFFFF == reference.fmix32(seed & 0xFFFFFFFF)


@pytest.mark.parametrize("factor", [0.001, 0.3, 1.0, 1.1, 7.0, 1e300, 1 / 3])
@pytest.mark.parametrize("sizes", [(1,), (3, 0, 5), (8,)])
@pytest.mark.parametrize("min_capacity", [1, 4, 2**40])
def test_limits_are_exact(factor: float, sizes: tuple[int, ...], min_capacity: int) -> None:
    plan = make_plan(8, 3, factor=factor, min_capacity=min_capacity)
    plan = dataclasses.replace(plan, bin_sizes=sizes)
    table, first = capacity.capacity_table(plan, 300, torch.device("cpu"))
    want = []
    for tokens in range(301):
        limits = [reference.capacity_of(n, factor, tokens, 3, 8, min_capacity) for n in sizes]
        bind = any(limit < tokens * min(3, n) for limit, n in zip(limits, sizes, strict=True))
        want.append([min(limit, NO_LIMIT) if bind else NO_LIMIT for limit in limits])
    assert table[:301].tolist() == want and table.dtype == torch.int32
    limited = [tokens for tokens, row in enumerate(want) if row != [NO_LIMIT] * len(sizes)]
    assert first == limited[0] if limited else first > 300


def test_launches_fit_all_sizes() -> None:
    for T, E, L in itertools.product(
        [1, 256, 257, 16384, 16385, 65536], [1, 2, 8, 60, 128, 512, 1024], [1, 2, 16, 24, 512]
    ):
        config = launch.launch_config(T, E, L)
        for size in dataclasses.astuple(config):
            assert size & (size - 1) == 0 and size > 0
        assert config.rows % config.pack_rows == config.rows % config.seat_rows == 0
        assert config.choose_rows * launch.power_of_two(E) <= 8192
        assert max(config.choose_warps, config.limit_warps, config.pack_warps) <= 16


def bad_calls() -> list[tuple[str, Any]]:
    """What the message must say, and a call."""
    scores = torch.rand(4, 8, device=DEVICE)
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    plan, request = make_plan(8, 2), make_plan(8, 2, scope="request")
    meta = torch.zeros(8, dtype=torch.int64, device="meta")
    wide = torch.rand(1, 1025, device=DEVICE)
    long = torch.rand(1, 1, device=DEVICE).expand(2**30, 1)
    devices = dataclasses.replace(plan, level="device", bin_sizes=(1,) * 2**28)
    calls = [
        (r"scores_TE has the shape \[4, 8\].*\[T, 9\]", (scores, make_plan(9, 2)), {}),
        (r"scores_TE is torch.int64", (scores.long(), plan), {}),
        (r"scores_TE is a list", (scores.tolist(), plan), {}),
        (r"request_T is None", (scores, request), {}),
        (r"num_requests is 0", (scores, request), {"request_T": ids, "num_requests": 0}),
        (r"num_requests is 67108", (scores, request), {"request_T": ids, "num_requests": 2**26}),
        (r"request_T has the shape \[3\].*\[4\]", (scores, request), {"request_T": ids[:3]}),
        (r"is_padding_T is torch.int64.*torch.bool", (scores, plan), {"is_padding_T": ids}),
        (r"is_decode_T is a bool", (scores, plan), {"is_decode_T": True}),
        (r"topk_TK has the shape \[4, 1\].*\[4, 2\]", (scores, plan), {"topk_TK": ids[:, None]}),
        (r"counters has the shape \[4\].*\[29\]", (scores, plan), {"counters": ids}),
        (
            r"counters has the strides .2., but it must be contiguous",
            (scores, plan),
            {"counters": ids.new_empty(58)[::2]},
        ),
        (r"device_E is on meta", (scores, plan), {"device_E": meta}),
        (r"plan.num_experts is 1025.*1024", (wide, make_plan(1025, 2)), {}),
        (r"T \* E is 1073741824 \* 1", (long, make_plan(1, 1)), {}),
        (r"T is 4 with 268435456 devices", (scores, devices), {"device_E": ids.repeat(2)}),
        (r"plan.metric is 'best'", (scores, dataclasses.replace(plan, metric="best")), {}),
        (r"plan.keeps is \(3,\).*1 to 2", (scores, dataclasses.replace(plan, keeps=(3,))), {}),
        (r"plan.extra 7", (scores, dataclasses.replace(plan, extra=7)), {}),
    ]
    return [(pattern, lambda a=a, k=k: route_triton(*a, **k)) for pattern, a, k in calls] + [
        (r"scoring is 'tanh'", lambda: route_triton(scores, plan, scoring="tanh")),
        (r"scores_TE has the shape \[8\]", lambda: route_triton(
            scores[0], plan, scoring="sigmoid")),
    ]  # fmt: skip


def test_bad_arguments_are_named() -> None:
    for pattern, call in bad_calls():
        with pytest.raises(ValueError, match=pattern):
            call()


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "INTERPRETED", False)
    with pytest.raises(ValueError, match="scores_TE is on cpu.*TRITON_INTERPRET=1"):
        route_triton(torch.rand(4, 8), make_plan(8, 2))
