"""The router of a layer by the kernels against the router in plain torch, as vLLM calls both."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from capmoe_kernels import experts as kernels
from capmoe_kernels import routing
from capmoe_kernels.contract import TOTALS

pytest.importorskip("vllm")
if not routing.INTERPRETED:
    pytest.skip(
        "the routers of these tests are on the CPU: see test_interpreted.py",
        allow_module_level=True,
    )

from routers import MIXTRAL, MODELS, E, K, T, forward_context, make, prompt_of_one_request
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig as ApplyMoEActivation,
)
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG

from vllm_capmoe.experts import fused_experts_torch
from vllm_capmoe.integration import custom_ops
from vllm_capmoe.integration import router as router_module
from vllm_capmoe.integration.experts import TritonExperts


@pytest.mark.parametrize("asked", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mode", ["drop", "expanded"])
def test_kernels_route_as_plain_torch(
    asked: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding and generated tokens included. The kernels choose the plain top-k by themselves."""
    custom_ops.register()
    tokens = prompt_of_one_request()
    request, positions = torch.tensor([0] * 25 + [1, 2]), torch.tensor([*range(25), 9, 8])
    tokens.fill(request, positions, torch.tensor([25, 9, 8]))
    context = forward_context()
    assert context.is_padding is not None
    context.is_padding[27:] = True
    settings = {"mode": mode, "factor": 0.5, "min_capacity": 1}
    plain, ours = (make(asked, tokens, backend, **settings) for backend in ("torch", "triton"))
    context.no_compile_layers["layer"] = type("Layer", (), {"router": ours})()
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    _, topk_ids = plain.inner._compute_routing(logits, logits, None)
    if not {"use_grouped_topk", "custom_routing_function"} & asked.keys():
        monkeypatch.setattr(ours.inner, "_compute_routing", None)
    with override_forward_context(context):
        weights, experts = plain.route(logits, topk_ids)
        for got in (ours._compute_routing(logits, logits, None) for _ in range(2)):
            assert got[1].dtype == torch.int32 and torch.equal(got[1], experts)
            torch.testing.assert_close(got[0], weights, rtol=1e-6, atol=1e-7)
    assert (experts[:25] >= 0).sum() < 25 * K and (experts[27:] == -1).all()
    counted, expected = ours.stats.counters(), plain.stats.counters()
    for key in ("mass", "lost"):  # the last bits of the scores differ: of each by a unit or two
        assert counted.pop(key) == pytest.approx(2 * expected.pop(key), abs=4 * T * K)
    assert torch.equal(ours.stats.counts[: 2 * E], 2 * plain.stats.counts[: 2 * E])
    numbers = [key for key in expected if key in TOTALS]
    assert [counted[key] for key in numbers] == [2 * expected[key] for key in numbers]


def test_a_rank_takes_its_part_of_the_seats_and_only_with_the_experts_they_came_with() -> None:
    """Ranks of five and eleven experts. Where nothing is taken, `make_seats` would do it again."""
    loads, heads = [], []
    for first, count in ((0, 5), (5, E - 5)):
        tokens = prompt_of_one_request()
        made = make(MIXTRAL, tokens, "triton", mode="drop", factor=0.5, min_capacity=1)
        made.first_local = first
        logits = torch.randn(T, E, generator=torch.Generator().manual_seed(3))
        expert_map = torch.full((E,), -1, dtype=torch.int32)
        expert_map[first : first + count] = torch.arange(count, dtype=torch.int32)
        with override_forward_context(forward_context()):
            _, experts = made.route(logits, None)
            with pytest.raises(RuntimeError, match=f"routed {T} rows, and its experts got {2 * T}"):
                made.seats_of(torch.cat((experts, experts)), count, expert_map)
            _, experts = made.route(logits, None)
        # With ids of another type, as some of vLLM's kernels want them: a copy has the same seats.
        seats = made.seats_of(experts.long(), count, expert_map)
        assert seats is not None and seats.offsets.shape == (count + 1,)
        held = [(experts == first + e).nonzero()[:, 0].tolist() for e in range(count)]
        spans = zip(seats.offsets.tolist(), seats.offsets.tolist()[1:], strict=False)
        assert [(seats.order[a:b] // K).tolist() for a, b in spans] == held
        loads += seats.offsets.diff().tolist()
        heads.append(int(seats.offsets[0]))
        assert made.seats_of(experts, count, expert_map) is None, "taken already"
    assert heads == [0, sum(loads[:5])] and sum(loads) == int((experts >= 0).sum()) > 0


@pytest.mark.parametrize(
    ("settings", "gathered", "most"),
    [
        ({}, False, 5),  # ceil(0.5 * 37 * 4 / 16)
        ({"factor": "inf"}, False, None),
        ({"scope": "request"}, False, None),  # every request has a limit of its own
        ({}, True, None),  # so has every rank
    ],
    ids=["batch", "no limit", "requests", "gathered rows"],
)
def test_the_capacity_bounds_the_grid(
    settings: dict[str, Any],
    gathered: bool,
    most: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the layer's experts under vLLM tell the kernels, and that the kernels launch by it."""
    settings = {"mode": "drop", "factor": 0.5, "min_capacity": 1, **settings}
    router = make(MIXTRAL, prompt_of_one_request(), "triton", **settings)
    layer = TritonExperts.__new__(TritonExperts)
    layer.quant_config, layer.activation_config = FUSED_MOE_UNQUANTIZED_CONFIG, ApplyMoEActivation()
    parallel = SimpleNamespace(dp_size=1, sp_size=1)
    layer.moe_config = SimpleNamespace(activation=MoEActivation.SILU, moe_parallel_config=parallel)
    bounds: list[int | None] = []

    def grid_size(*arguments: Any) -> int:
        bounds.append(arguments[-1])
        return launched(*arguments)

    launched = kernels.grid_size
    monkeypatch.setattr(kernels, "grid_size", grid_size)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(T, 32, generator=generator)
    w13 = torch.randn(E, 32, 32, generator=generator) / 6
    w2 = torch.randn(E, 32, 16, generator=generator) / 4
    with override_forward_context(forward_context()):
        weights, experts = router.route(torch.randn(T, E, generator=generator), None)
    if gathered:
        router.first_local = None  # as `bind` is told where rows come from several ranks
    out = torch.full_like(hidden, torch.nan)
    layer.compute(router, out, hidden, w13, w2, weights, experts, None)
    assert bounds == [most, most]  # of both products
    plain = fused_experts_torch(hidden, w13, w2, weights, experts, activation="silu")
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


def test_rows_of_padding_are_not_filled_where_vllm_leaves_them_empty() -> None:
    """On CUDA: routed by the kernels, computed by vLLM's, which know no phantom here."""
    router = make(MIXTRAL, prompt_of_one_request(), "vllm", mode="drop", factor=0.5, min_capacity=1)
    router.by_kernel = True
    context = forward_context()
    assert context.is_padding is not None
    context.is_padding[30:] = True
    with override_forward_context(context):
        weights, experts = router.route(
            torch.randn(T, E, generator=torch.Generator().manual_seed(5)), None
        )
    assert (experts[30:] == -1).all() and (experts[:30] >= 0).all()
    assert (weights[:30] == 0).any()


def test_where_no_mode_is_nothing_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA: every place but those of padding has an expert."""
    router = make(MIXTRAL, prompt_of_one_request(), "vllm", mode="off", decode_keep=2)
    router.by_kernel = True
    monkeypatch.setattr(router_module, "fill_unused", None)
    context = forward_context()
    assert context.is_padding is not None
    context.is_padding[30:] = True
    with override_forward_context(context):
        _, experts = router.route(
            torch.randn(T, E, generator=torch.Generator().manual_seed(5)), None
        )
    assert (experts[30:] == -1).all() and (experts[:30] >= 0).all()


def test_a_changed_router_routes_by_kernels_as_one_that_was_bound_so() -> None:
    """Its plan and its tables, which a captured graph reads; and while it only observes, top-k."""
    settings = {"mode": "expanded", "min_capacity": 1, "max_experts": "none", "decode_keep": 2}
    tokens = prompt_of_one_request()
    tokens.is_decode[20:] = True
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(6))
    changed = make(MIXTRAL, tokens, "triton", factor=0.5, **settings)
    with override_forward_context(forward_context()):
        first = changed.route(logits, None)
        for now in ({"factor": 1.0, "decode_keep": 1}, {"factor": "inf", "decode_keep": "off"}):
            bound = make(MIXTRAL, tokens, "triton", **settings | now)
            assert changed.plan is not None and bound.plan is not None
            plan = dataclasses.replace(changed.plan, gamma=bound.plan.gamma, keeps=bound.plan.keeps)
            changed.change(plan, observes=False)
            got, want = changed.route(logits, None), bound.route(logits, None)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
            assert not torch.equal(got[1], first[1])
        top_k = got
        assert changed.stats is not None
        changed.change(dataclasses.replace(plan, gamma=Fraction(1, 2), keeps=(2,)), observes=True)
        before = changed.stats.counts.clone()
        got = changed.route(logits, None)
        assert all(torch.equal(one, other) for one, other in zip(got, top_k, strict=True))
        observed = changed.stats.counts - before
        changed.change(changed.plan, observes=False)
        before = changed.stats.counts.clone()
        got = changed.route(logits, None)
        assert all(torch.equal(one, other) for one, other in zip(got, first, strict=True))
        assert torch.equal(changed.stats.counts - before, observed)
