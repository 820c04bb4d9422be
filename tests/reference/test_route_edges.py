"""`route` at its edges: weights, odd sizes, refusals, and what the core must not do."""

import dataclasses
import doctest
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import capmoe_kernels.capacity
import vllm_capmoe.ops
from vllm_capmoe import CapacityConfig, Routing, route
from vllm_capmoe.plan import resolve
from vllm_capmoe.torch_routing import route_torch

METRICS = ("score", "order", "reverse-order", "random")


def config(mode: str = "drop", **options: object) -> CapacityConfig:
    """gamma = 1 and no floor, unless a test says otherwise."""
    return CapacityConfig(mode=mode, **({"factor": 1.0, "min_capacity": 1} | options))


def rest_to_one(*first: float) -> Tensor:
    """[T, 2]: the scores of expert 0, and the rest to one for expert 1."""
    scores = torch.tensor(first)
    return torch.stack([scores, 1 - scores], dim=1)


def held(r: Routing) -> list[list[int]]:
    """The experts of each token, without the unused places (which must come last)."""
    for row, weights in zip(r.experts.tolist(), r.weights.tolist(), strict=True):
        used = [expert for expert in row if expert >= 0]
        assert row == used + [-1] * (len(row) - len(used))
        assert all(weight == 0 for weight in weights[len(used) :])
    return [[expert for expert in row if expert >= 0] for row in r.experts.tolist()]


def counts(r: Routing) -> tuple[int, int, int]:
    return r.dropped, r.expanded, r.left_without


CROWDED = rest_to_one(0.6, 0.9, 0.7, 0.8)  # all choose expert 0; C = 2

# --- Weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("renormalize", "model", "scaled"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("always", False, True),
        ("never", True, False),
    ],
)
@pytest.mark.parametrize("mode", ["off", "drop"])
def test_weights(renormalize: str, model: bool, scaled: bool, mode: str) -> None:
    # Drop: C = ceil(3 * 2 / 3 * .5) = 1 seat per expert. Expert 0: .6 .5 .1 keeps t0. Expert 1:
    # .3 .4 keeps t1. Expert 2: t2. Token 2 asked experts 2 (.8) and 0 or 1: 0, the lower one.
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.1, 0.8]])
    settings = config(mode, factor=0.5, renormalize=renormalize)
    r = route(scores, 2, settings, renormalize=model)
    if mode == "drop":
        assert held(r) == [[0], [1], [2]]
        expected = torch.tensor([[0.6, 0], [0.4, 0], [0.8, 0]])
        expected = expected.sign() if scaled else expected
    else:
        expected = torch.tensor([[0.6, 0.3], [0.5, 0.4], [0.8, 0.1]])
        if scaled:
            expected = expected / (expected[:, :1] + expected[:, 1:])
    assert torch.equal(r.weights, expected)


def test_weights_of_sum_zero_stay() -> None:
    r = route(torch.zeros(1, 3), 2, config("off", renormalize="always"))
    assert r.weights.tolist() == [[0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_compared_as_float32(dtype: torch.dtype) -> None:
    scores = rest_to_one(0.5, 0.75, 0.625, 0.875).to(dtype)
    r = route(scores, 1, config())
    assert r.weights.dtype == torch.float32
    assert held(r) == [[], [0], [], [0]]
    # Two doubles that are one float32 are a tie.
    close = torch.tensor([[0.1, 0.1 + 1e-12]], dtype=torch.float64)
    assert held(route(close, 1, config("off"))) == [[0]]


# --- Odd sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "drop", "expanded", "reroute"])
@pytest.mark.parametrize("scope", ["batch", "request"])
@pytest.mark.parametrize("level", ["expert", "device"])
def test_no_tokens(mode: str, scope: str, level: str) -> None:
    settings = config(mode, scope=scope, level=level)
    devices = torch.tensor([0, 0, 1])
    for T in (0, 3):
        r = route(
            torch.rand(T, 3),
            2,
            settings,
            is_padding=torch.ones(T, dtype=torch.bool),
            request_ids=torch.zeros(T, dtype=torch.int64),
            expert_device=devices,
        )
        assert r.experts.shape[0] == T and held(r) == [[]] * T
        assert r.load_before.tolist() == r.load_after.tolist() == [0, 0, 0]
        assert (r.capacity, counts(r)) == (None, (0, 0, 0))


def test_one_expert() -> None:
    # E = k = 1: C = ceil(0.5 * 3) = 2, and there are no extra candidates.
    for mode in ("drop", "expanded", "reroute"):
        r = route(torch.tensor([[0.1], [0.3], [0.2]]), 1, config(mode, factor=0.5))
        assert held(r) == [[], [0], [0]]


def test_an_unknown_metric_is_not_taken_for_another() -> None:
    plan = resolve(config("drop", factor=0.5), num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="metric is 'best', but it must be one of score, order"):
        route_torch(torch.rand(16, 4), dataclasses.replace(plan, metric="best"))


@pytest.mark.parametrize("mode", ["drop", "expanded", "reroute"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_core_reads_nothing_back_to_the_host(mode: str, metric: str) -> None:
    # Fake tensors have no values: a branch, a shape or a read that depends on one raises.
    settings = config(
        mode,
        metric=metric,
        scope="request",
        level="device",
        factor=0.8,
        min_tokens=1,
        priority="text-first",
    )
    plan = resolve(
        settings, num_experts=4, top_k=2, expert_device=[0, 0, 1, 1], has_token_device=True
    )
    capmoe_kernels.capacity.capacity_table(plan, 8, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        selection = route_torch(
            torch.rand(8, 4),
            plan,
            topk_TK=torch.zeros(8, 2, dtype=torch.int64),
            is_padding_T=torch.zeros(8, dtype=torch.bool),
            is_decode_T=torch.zeros(8, dtype=torch.bool),
            request_T=torch.zeros(8, dtype=torch.int64),
            num_requests=3,
            is_image_T=torch.zeros(8, dtype=torch.bool),
            device_E=torch.zeros(4, dtype=torch.int64),
            token_device_T=torch.zeros(8, dtype=torch.int64),
        )
    assert selection.experts.shape == (8, plan.width)
    assert selection.capacity.shape == (3, 2)


# --- Refusals ---------------------------------------------------------------------------------

BOOL = torch.zeros(4, dtype=torch.bool)
INT = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"scores": [[0.5, 0.5]]}, ["scores", "list", "tensor"]),
        ({"scores": torch.rand(4)}, ["scores", "[4]", "[T, E]"]),
        ({"scores": torch.rand(4, 0)}, ["scores", "[4, 0]", "E must be at least 1"]),
        ({"scores": torch.ones(4, 2).int()}, ["scores", "torch.int32", "torch.float32"]),
        ({"top_k": 0}, ["top_k", "0", "from 1 to 2"]),
        ({"top_k": 3}, ["top_k", "3", "from 1 to 2"]),
        ({"top_k": 1.0}, ["top_k", "1.0", "int"]),
        ({"top_k": True}, ["top_k", "True", "int"]),
        ({"config": {"mode": "drop"}}, ["config", "dict", "CapacityConfig"]),
        ({"config": config("expanded", max_experts=1), "top_k": 2}, ["max_experts", "1", "2"]),
        ({"seed": 1.5}, ["seed", "1.5", "int"]),
        ({"renormalize": 1}, ["renormalize", "1", "True or False"]),
        ({"backend": "vllm"}, ["backend", "'vllm'", "auto, torch, triton"]),
        ({"topk_ids": torch.zeros(4, 2).long()}, ["topk_ids", "[4, 2]", "[4, 1]"]),
        ({"topk_ids": torch.zeros(4).long()}, ["topk_ids", "[4]", "[4, 1]"]),
        ({"topk_ids": torch.zeros(4, 1)}, ["topk_ids", "torch.float32", "torch.int32"]),
        ({"topk_ids": torch.full((4, 1), 2)}, ["topk_ids", "2", "from 0 to 1"]),
        ({"topk_ids": torch.full((4, 1), -1)}, ["topk_ids", "-1", "from 0 to 1"]),
        ({"topk_ids": torch.ones(4, 2).long(), "top_k": 2}, ["topk_ids", "[1, 1]", "differ"]),
        ({"is_padding": BOOL[:3]}, ["is_padding", "[3]", "[4]"]),
        ({"is_padding": INT}, ["is_padding", "torch.int64", "torch.bool"]),
        ({"is_padding": [False] * 4}, ["is_padding", "list", "tensor"]),
        ({"is_decode": BOOL[:, None]}, ["is_decode", "[4, 1]", "[4]"]),
        ({"is_decode": INT}, ["is_decode", "torch.int64", "torch.bool"]),
        ({"is_image": BOOL[:0]}, ["is_image", "[0]", "[4]"]),
        ({"request_ids": BOOL}, ["request_ids", "torch.bool", "torch.int64"]),
        ({"request_ids": INT[:2]}, ["request_ids", "[2]", "[4]"]),
        ({"expert_device": INT}, ["expert_device", "[4]", "[2]"]),
        ({"expert_device": torch.tensor([0, -1])}, ["expert_device", "-1", "from 0"]),
        ({"expert_device": torch.tensor([0, 2**40])}, ["expert_device", str(2**40), "4095"]),
        (
            {"token_device": INT - 1, "expert_device": INT[:2]},
            ["token_device", "-1", "from 0"],
        ),
        ({"token_device": INT[:1], "expert_device": INT[:2]}, ["token_device", "[1]", "[4]"]),
        ({"is_padding": BOOL.to("meta")}, ["is_padding", "meta", "cpu"]),
        ({"token_device": INT}, ["expert_device", "None", "token_device"]),
        ({"config": config(level="device")}, ["expert_device", "None", "'device'"]),
        ({"config": config(scope="request")}, ["request_ids", "None", "'request'"]),
        ({"config": config(priority="text-first")}, ["is_image", "None", "'text-first'"]),
        ({"config": config(candidates="local")}, ["expert_device", "None", "'local'"]),
        (
            {"config": config(candidates="local"), "expert_device": INT[:2]},
            ["token_device", "None", "'local'"],
        ),
    ],
)
def test_refuses(changes: dict[str, object], parts: Sequence[str]) -> None:
    arguments = {"scores": CROWDED, "top_k": 1, "config": config()} | changes
    with pytest.raises(ValueError) as error:
        route(**arguments)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(error.value)


def test_refuses_sizes_that_sort_keys_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def core(*_: object, **__: object) -> None:
        raise AssertionError("computed")  # it would take all memory

    monkeypatch.setattr(vllm_capmoe.ops, "route_torch", core)
    with pytest.raises(ValueError, match=r"2 x 268435456 elements in 1 requests, but T \* E"):
        route(torch.zeros(1).expand(2, 2**28), 1, config())
    # 2^17 requests on 2^12 devices: 2^29 bins, though T * E is 2^18 only.
    T = 2**17
    with pytest.raises(ValueError, match=r"131072 x 2 elements in 131072 requests"):
        route(
            torch.zeros(1).expand(T, 2),
            1,
            config(scope="request", level="device"),
            request_ids=torch.arange(T),
            expert_device=torch.tensor([0, 2**12 - 1]),
        )


def test_what_an_option_needs_is_not_asked_for_when_off() -> None:
    settings = config(
        "off", level="device", scope="request", priority="text-first", candidates="local"
    )
    assert held(route(CROWDED, 1, settings, token_device=INT)) == [[0]] * 4


def test_a_missing_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "capmoe_kernels.routing", None)
    with pytest.raises(ValueError, match="backend is 'triton', but its routing kernel"):
        route(CROWDED, 1, config(), backend="triton")


def test_on_the_cpu_nothing_but_torch_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "capmoe_kernels.routing", None)
    for backend in ({}, {"backend": "auto"}, {"backend": "torch"}):
        assert held(route(CROWDED, 1, config(), **backend)) == [[], [0], [], [0]]


@pytest.mark.parametrize("module", [capmoe_kernels.capacity, vllm_capmoe.ops])
def test_examples_of_the_docstrings(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0 and result.failed == 0


def test_a_huge_min_capacity_is_no_limit() -> None:
    config = CapacityConfig(mode="drop", factor=0.5, min_capacity=2**70)
    r = route(torch.rand(8, 4), 2, config)
    assert r.capacity is None and r.dropped == 0
