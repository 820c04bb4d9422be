"""`CapacityRouter` around vLLM's own routers, on tensors, without an engine."""

import ast
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routers import BIAS, MIXTRAL, MODELS, E, K, T, forward_context, make, prompt_of_one_request
from torch import Tensor
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.models.phimoe import phimoe_routing_function

from vllm_capmoe import CapacityConfig, route
from vllm_capmoe.integration import custom_ops, families
from vllm_capmoe.integration import router as router_module
from vllm_capmoe.integration.router import CapacityRouter
from vllm_capmoe.integration.stats import MAX_LATER
from vllm_capmoe.integration.step import StepTokens
from vllm_capmoe.plan import resolve
from vllm_capmoe.torch_routing import route_torch


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def asked(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture
def tokens() -> StepTokens:
    return prompt_of_one_request()


@pytest.fixture
def context() -> Iterator[ForwardContext]:
    made = forward_context()
    with override_forward_context(made):
        yield made


def by_expert(weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """float32 [T, E]: the weight of every expert, 0 where it isn't held."""
    dense = torch.zeros(experts.shape[0], E + 1)
    return dense.scatter(1, experts.long() % (E + 1), weights)[:, :E]


@pytest.mark.parametrize("mode", ["drop", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_limit_it_is_vllms_router(asked, tokens, context, mode, dtype):
    made = make(asked, tokens, mode=mode, factor="inf")
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = made.inner._compute_routing(logits, logits, None)
    ours = made.route(logits, theirs[1])
    torch.testing.assert_close(by_expert(*ours), by_expert(*theirs), rtol=1e-2, atol=1e-2)
    if dtype == torch.float32:
        torch.testing.assert_close(by_expert(*ours), by_expert(*theirs), rtol=2e-6, atol=1e-7)


def test_capacity_comes_after_the_models_choice(asked, tokens, context):
    made = make(asked, tokens, mode="drop", factor=0.5, min_capacity=1)
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    _, topk_ids = made.inner._compute_routing(logits, logits, None)
    weights, experts = made.route(logits, topk_ids)
    held = [set(row) - {-1} for row in experts.tolist()]
    assert all(h <= set(top) for h, top in zip(held, topk_ids.tolist(), strict=True))
    loads = torch.bincount(experts[experts >= 0].long(), minlength=E)
    assert loads.max() <= -(-T * K // (2 * E))  # ceil(0.5 * T * k / E)
    if made.expert_scale is not None:
        weights = weights / made.expert_scale()[experts.clamp(min=0).long()]
    sums = weights.sum(1) / asked.get("routed_scaling_factor", 1.0)
    if asked["renormalize"]:
        assert all(s == pytest.approx(1.0) for s, h in zip(sums.tolist(), held, strict=True) if h)
    counters = made.stats.counters()
    assert counters["load_after"] == loads.tolist() and counters["steps"] == 1
    assert counters["dropped"] == T * K - int(loads.sum()) > 0


def test_padding_and_decode_come_from_the_step(tokens, context):
    made = make(MIXTRAL, tokens, mode="drop", factor=0.01, min_capacity=1)
    context.is_padding[30:] = True
    # Request 0 is at its prompt; requests 1 to 5 generate.
    request = torch.tensor([0] * 25 + [1, 2, 3, 4, 5])
    positions = torch.tensor([*range(25), 9, 8, 7, 6, 5])
    tokens.fill(request, positions, torch.tensor([25, 9, 8, 7, 6, 5]))
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(2))
    _, topk_ids = made.inner._compute_routing(logits, logits, None)
    _, experts = made.route(logits, topk_ids)
    assert (experts[30:] == -1).all()
    assert [sorted(r) for r in experts[25:30].tolist()] == [
        sorted(r) for r in topk_ids[25:30].tolist()
    ]
    assert (experts[:25] >= 0).sum() < 25 * K


@pytest.mark.parametrize("keep", ["auto", 1, K])
@pytest.mark.parametrize("mode", ["off", "drop"])
def test_steps_are_the_same_counted_later_or_recorded(asked, tokens, context, keep, mode):
    """Records and padding go the long way, decode steps the short one: the same to the bit."""
    settings = {"mode": mode, "decode_keep": keep} | ({"factor": 0.5} if mode == "drop" else {})
    short, long = make(asked, tokens, **settings), make(asked, tokens, **settings)
    long.stats.recording = True
    for step in range(2 * MAX_LATER // T):
        generator = torch.Generator().manual_seed(step)
        logits = torch.randn(T, E, generator=generator)
        prompts = 0 if step % 3 else 12
        context.is_padding[T - step % 5 :] = step % 7 == 0 and step % 5 > 0
        tokens.is_decode[:T] = torch.arange(T) >= prompts
        _, topk_ids = short.inner._compute_routing(logits, logits, None)
        (weights, experts), (expected, theirs) = (r.route(logits, topk_ids) for r in (short, long))
        assert torch.equal(weights, expected) and torch.equal(experts, theirs)
    assert short.stats.later and not long.stats.later  # the last few wait
    loads = [short.stats.counters()[when] for when in ("load_before", "load_after")]
    assert (loads[0] != loads[1]) == (keep != K or mode == "drop")
    assert not short.stats.records and len(long.stats.records) == 2 * MAX_LATER // T
    assert short.stats.counters() == long.stats.counters()
    short.route(logits, topk_ids)
    short.stats.reset()
    assert not short.stats.counts.any()


SETTINGS: tuple[dict[str, Any], ...] = (
    {"mode": "drop", "metric": "order"},
    {"mode": "drop", "metric": "reverse-order"},
    {"mode": "drop", "metric": "random"},
    {"mode": "drop", "min_tokens": T + 1},
    {"mode": "drop", "renormalize": "always"},
    {"mode": "drop", "renormalize": "never"},
    {"mode": "expanded", "expanded_experts": 1},
    {"mode": "expanded", "candidates": "global", "max_experts": "none"},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_do_in_a_layer_what_they_do_in_route(asked, tokens, context, settings):
    settings = {"factor": 0.5, "min_capacity": 1, **settings}
    made = make(asked, tokens, **settings)
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(4))
    _, topk_ids = made.inner._compute_routing(logits, logits, None)
    scores = families.SCORING[made.scoring_func](logits)
    expected = route(
        scores,
        K,
        CapacityConfig(**settings),
        topk_ids=topk_ids,
        renormalize=asked["renormalize"],
        seed=made.seed,
        backend="torch",
    )
    weights, experts = made.route(logits, topk_ids)
    assert torch.equal(experts.int(), expected.experts)
    if made.expert_scale is not None:
        weights = weights / made.expert_scale()[experts.clamp(min=0).long()]
    torch.testing.assert_close(weights, expected.weights * made.scale)
    assert (expected.dropped > 0) == ("min_tokens" not in settings)


@pytest.mark.parametrize("rows", [T - 1, T + 1, 2 * T])
def test_rows_that_are_not_the_steps_are_never_routed_on_a_guess(tokens, context, rows):
    """A model that routes the rows of images apart: whose tokens they are isn't known."""
    made = make(MIXTRAL, tokens, mode="drop", factor=0.5)
    logits = torch.zeros(rows, E)
    with pytest.raises(RuntimeError, match=rf"routes {rows} rows of a step of {T} \(part 0 of 1\)"):
        made.route(logits, logits.topk(K).indices)
    assert made.stats.counters()["steps"] == 0


def test_a_forward_pass_without_padding_mask_is_refused(tokens, context):
    made = make(MIXTRAL, tokens, mode="drop", factor=0.5)
    context.is_padding = None
    logits = torch.zeros(T, E)
    with pytest.raises(RuntimeError, match=f"routes {T} rows of a pass without padding mask"):
        made.route(logits, logits.topk(K).indices)


@pytest.mark.parametrize("mask", [None, "zeros", "shard"])
@pytest.mark.parametrize("scope", ["batch", "request"])
def test_a_drafts_layer_routes_as_vllm_and_counts_nothing(asked, tokens, context, mask, scope):
    """Whatever mask its pass has, and though the step has fewer requests than the buffers say."""
    made = make(asked, tokens, mode="drop", factor=0.01, min_capacity=1, scope=scope)
    made.bind_draft()
    rows = 5 if mask == "shard" else T
    context.is_padding = None if mask is None else torch.zeros(rows, dtype=torch.bool)
    tokens.request.fill_(99)
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(3))
    expected = made.inner._compute_routing(logits, logits, None)
    got = made.select_experts(hidden_states=logits, router_logits=logits)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert made.stats.counts.sum() == 0


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"custom_routing_function": lambda **_: None}, "custom routing function"),
        ({"custom_routing_function": phimoe_routing_function}, "an expert has no score of its own"),
        ({"zero_expert_type": "identity"}, "zero expert type"),
        ({"num_fused_shared_experts": 1}, "num fused shared experts"),
        ({"scoring_func": "relu"}, "scores by relu"),
    ],
)
def test_routers_whose_scores_are_unknown_are_refused(asked, named):
    with pytest.raises(ValueError, match=f"--moe-capacity-mode is 'drop'.*CPURouter.*{named}"):
        factory(lambda **_: CPURouter(top_k=K, global_num_experts=E), **asked)


def factory(original: Any, **asked: Any) -> Any:
    """What the wrapped factory of routers makes around the router that `original` makes."""

    class VllmConfig:
        additional_config = {"moe_capacity": {"mode": "drop"}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.get_current_vllm_config", lambda: VllmConfig)
        made = router_module._make_router(original)
        return made(**{"top_k": K, "global_num_experts": E, **asked})


def test_a_router_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="route with object"):
        factory(lambda **_: object())


def of_halves(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """A model's own: the best of each half of the experts, by a scoring that the kernel has not."""
    scores = families.SCORING["square"](gating_output.float())
    halves = scores.view(-1, 2, E // 2).topk(topk // 2)
    ids = (halves.indices + torch.tensor([0, E // 2])[:, None]).flatten(1)
    return scores.gather(1, ids), ids.int()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_routing_function_of_a_family_is_served_once_it_is_known(
    monkeypatch, tokens, context, backend
):
    """On the CPU the kernel's part is played by plain torch, which must be handed scores."""
    name = f"{of_halves.__module__}.of_halves"
    asked = {"custom_routing_function": of_halves, "renormalize": False}
    with pytest.raises(ValueError, match="custom routing function"):
        make(asked, tokens, mode="drop", factor=1.0)
    monkeypatch.setitem(families.SCORING, "square", torch.square)
    monkeypatch.setitem(families.FUNCTIONS, name, families.Function("square"))
    routing = SimpleNamespace(
        route_triton=lambda scores, plan, *, scoring, counters, tables, **step: (
            route_torch(scores, plan, **step) if scoring is None else None
        )
    )
    monkeypatch.setitem(sys.modules, "capmoe_kernels.routing", routing)
    made = make(asked, tokens, backend, mode="drop", factor=1.0)
    made.keeps_seats = False  # plain torch has none
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(8))
    _, ids = of_halves(logits, logits, K, False)
    with override_forward_context(context):
        got = made.route(logits, ids)
    expected = route(logits.square(), K, CapacityConfig(mode="drop", factor=1.0), topk_ids=ids)
    assert torch.equal(got[0], expected.weights) and torch.equal(got[1], expected.experts)
    assert made.plain is False and expected.dropped > 0


@pytest.mark.skipif(
    not hasattr(torch.ops._C, "biased_topk_cpu"), reason="vLLM has these kernels for AVX-512 only"
)
@pytest.mark.parametrize("chosen_by", ["hash_indices_table", "e_score_correction_bias"])
def test_layers_of_deepseek_v4_drop_by_their_scores(tokens, context, chosen_by):
    """Tables of token ids, or biases, say which experts; the scores what they weigh."""
    experts, top_k = 128, 6  # vLLM's kernels for the CPU know few sizes
    generator = torch.Generator().manual_seed(9)
    table = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(99)])
    bias = torch.randn(experts, generator=generator)
    asked = {"renormalize": True, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5}
    asked[chosen_by] = table.int() if chosen_by == "hash_indices_table" else bias
    ids = torch.randint(99, (T,), generator=generator)
    logits = torch.randn(T, experts, generator=generator)
    free = make(asked, tokens, mode="drop", factor="inf", size=(experts, top_k))
    theirs = free.inner._compute_routing(logits, logits, None, input_ids=ids)
    if chosen_by == "hash_indices_table":
        assert torch.equal(theirs[1].sort(1).values, asked[chosen_by][ids].sort(1).values)
    ours = free._compute_routing(logits, logits, None, input_ids=ids)
    assert not free.plain and free.scale == 1.5
    dense = [torch.zeros(T, experts).scatter(1, e.long(), w) for w, e in (ours, theirs)]
    torch.testing.assert_close(*dense, rtol=1e-5, atol=1e-6)
    limited = {"mode": "drop", "factor": 0.5, "min_capacity": 1}
    made = make(asked, tokens, size=(experts, top_k), **limited)
    weights, held = made._compute_routing(logits, logits, None, input_ids=ids)
    scores = torch.nn.functional.softplus(logits).sqrt()
    expected = route(scores, top_k, CapacityConfig(**limited), topk_ids=theirs[1], renormalize=True)
    assert torch.equal(held.int(), expected.experts) and expected.dropped > 0
    torch.testing.assert_close(weights, 1.5 * expected.weights)


def test_an_experts_scale_is_that_of_the_moment(tokens, context):
    asked = MODELS["gemma4: softmax by a function, renormalised, each expert scaled"]
    made = make(asked, tokens, mode="drop", factor="inf")
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(7))
    ids = logits.topk(K).indices
    before, _ = made.route(logits, ids)
    with pytest.MonkeyPatch.context() as patch:
        owner = asked["custom_routing_function"].__self__
        patch.setattr(owner, "per_expert_scale", 2 * owner.per_expert_scale)
        assert torch.equal(made.route(logits, ids)[0], 2 * before)


def test_every_function_that_is_named_is_one_of_vllms():
    """Read from its files: some models need packages that aren't here."""
    for full_name in [*families.FUNCTIONS, *families.UNSERVED_FUNCTIONS]:
        module, _, rest = full_name.partition(".models.")
        file, *names = rest.split(".")
        spec = importlib.util.find_spec(f"{module}.models")
        folder = Path(spec.submodule_search_locations[0])
        body: Any = ast.parse((folder / f"{file}.py").read_text()).body
        for name in names:
            (found,) = [node for node in body if getattr(node, "name", None) == name]
            body = getattr(found, "body", [])


def test_capacity_counts_the_models_experts_not_their_replicas():
    def original(**_: Any) -> CPURouter:
        return CPURouter(top_k=K, global_num_experts=E + 4)

    made = factory(original, global_num_experts=E + 4, num_logical_experts=E)
    assert made.num_logical_experts == E
    assert factory(original).num_logical_experts == E  # without replicas vLLM may not say it


def test_which_routers_choose_the_highest_scores_and_which_scale():
    """vLLM's plain router doesn't apply the routed factor; those with groups or biases do."""
    cpu, plain = CPURouter(top_k=K, global_num_experts=E), FusedTopKRouter(K, E)
    biased = FusedTopKBiasRouter(K, E, e_score_correction_bias=BIAS)
    factor = {"routed_scaling_factor": 2.5}
    for inner, asked, is_plain, scale in (
        (plain, {}, True, 1.0),
        (plain, factor, True, 1.0),
        (cpu, factor, True, 1.0),
        (cpu, {**factor, "use_grouped_topk": True}, False, 2.5),
        (cpu, {**factor, "e_score_correction_bias": BIAS}, False, 2.5),
        (cpu, {**factor, "bias_vl": BIAS}, False, 2.5),
        (biased, {**factor, "e_score_correction_bias": BIAS}, False, 2.5),
    ):
        made = factory(lambda inner=inner, **_: inner, **asked)
        assert (made.plain, made.scale) == (is_plain, scale), (inner, asked)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
        ("sqrtsoftplus", lambda x: math.sqrt(math.log(1 + math.exp(x)))),
    ],
)
def test_scores_of_single_experts(name, score):
    logits = [-3.0, -0.5, 0.0, 1.0, 4.0]
    expected = torch.tensor([[score(x) for x in logits]])
    torch.testing.assert_close(families.SCORING[name](torch.tensor([logits])), expected)


def test_scores_are_float32_whatever_the_logits_are(tokens, context):
    """Two logits that differ in bfloat16 have scores that don't."""
    made = make(MIXTRAL, tokens, mode="drop", factor=0.5)
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(4)).bfloat16()
    topk_ids = logits.float().topk(K).indices
    ours = made.route(logits, topk_ids)
    exact = made.route(logits.float(), topk_ids)
    assert torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1])


def test_the_metric_random_follows_the_layers_seed(tokens, context):
    made = make(MIXTRAL, tokens, mode="drop", factor=0.5, min_capacity=1, metric="random")
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(5))
    topk_ids = logits.topk(K).indices
    found = []
    for made.seed in (7, 8, 7):
        _, experts = made.route(logits, topk_ids)
        config = CapacityConfig(mode="drop", factor=0.5, min_capacity=1, metric="random")
        theirs = route(
            torch.softmax(logits, -1), K, config, topk_ids=topk_ids, seed=made.seed, backend="torch"
        )
        assert torch.equal(experts, theirs.experts)
        found.append(experts.tolist())
    assert found[0] == found[2] != found[1]


def test_steps_of_dummy_rows_count_in_nothing(tokens, context):
    made = make(MIXTRAL, tokens, mode="drop", factor=0.5)
    context.is_padding[:] = True
    made.route(torch.zeros(T, E), torch.zeros(T, E).topk(K).indices)
    assert made.stats.counts.sum() == 0


def bound_to_vllms_kernels(tokens: StepTokens, phantom: int | None) -> CapacityRouter:
    made = make(MIXTRAL, tokens, mode="drop", factor=0.25, min_capacity=1)
    made.bind(
        made.layer_name,
        made.plan,
        made.stats,
        tokens,
        seed=0,
        expert_device_E=None,
        own_device=None,
        backend="vllm",
        phantom=phantom,
    )
    return made


def test_dropped_assignments_go_to_the_phantom_where_there_is_one(tokens, context):
    custom_ops.register()
    made = bound_to_vllms_kernels(tokens, phantom=E)
    context.no_compile_layers["layer"] = SimpleNamespace(router=made)
    context.is_padding[30:] = True
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(6))
    _, experts = made.select_experts(hidden_states=logits, router_logits=logits)
    assert int((experts == E).sum()) == T * K - sum(made.stats.counters()["load_after"])
    assert (experts[30:] == E).all() and (experts[:30] == E).any() and (experts >= 0).all()


def test_without_a_mode_padding_has_experts_on_the_cpu(tokens, context):
    made = make(MIXTRAL, tokens, "vllm", mode="off", decode_keep=2)
    context.is_padding[30:] = True
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(6))
    weights, experts = made.route(logits, logits.topk(K).indices)
    assert (experts >= 0).all() and (weights[30:] == 0).all() and (weights[:30] > 0).all()


def test_without_a_phantom_all_places_have_experts_padding_too(tokens, context):
    """vLLM's kernels on the CPU read them all."""
    made = bound_to_vllms_kernels(tokens, phantom=None)
    context.is_padding[30:] = True
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(6))
    weights, experts = made.route(logits, logits.topk(K).indices)
    assert (experts >= 0).all() and all(len(set(row)) == K for row in experts.tolist())
    assert (weights[30:] == 0).all() and (weights[:30] == 0).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, None])
def test_what_torch_compile_is_told_has_the_shape_of_what_comes(tokens, context, dtype):
    made = make(MIXTRAL, tokens, mode="expanded", factor=0.5, max_experts="none")
    assert made.plan is not None and made.plan.width > K
    context.no_compile_layers["layer"] = SimpleNamespace(router=made)
    logits = torch.randn(T, E)
    topk_ids = None if dtype is None else logits.topk(K).indices.to(dtype)
    arguments = (logits, topk_ids, made.plan.width, "layer")
    real, fake = router_module.route_op(*arguments), router_module.route_fake(*arguments)
    for ours, told in zip(real, fake, strict=True):
        assert (ours.shape, ours.dtype) == (told.shape, told.dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "expanded"},
        {"mode": "expanded", "level": "device"},
        {"mode": "expanded", "scope": "request", "min_capacity": 3},
        {"mode": "expanded", "factor": 0.1, "min_capacity": 26},
        {"mode": "expanded", "factor": "inf"},
        {"mode": "expanded", "min_tokens": 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("decoding", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [(1, 2), (37, 11), (64, 300)])
def test_no_rank_holds_more_than_its_workspaces_are_made_for(
    settings: dict[str, Any], decoding: float, rows: tuple[int, int]
) -> None:
    """Two ranks of eight experts route their own tokens, all of which want the first one's."""
    settings = {"factor": 0.7, "min_capacity": 1, **settings}
    generator = torch.Generator().manual_seed(sum(rows))
    tokens = prompt_of_one_request()
    made = make(MIXTRAL, tokens, mode="drop")
    devices = torch.arange(E) // (E // 2)
    made.plan = resolve(
        CapacityConfig(**settings),
        num_experts=E,
        top_k=K,
        expert_device=devices.tolist(),
        has_token_device=True,
        renormalize=True,
    )
    held = torch.zeros(E, dtype=torch.int64)
    for source, count in enumerate(rows):
        logits = torch.randn(count, E, generator=generator) - 3 * devices
        logits[:, 0] += 6
        selection = route_torch(
            logits.softmax(-1),
            made.plan,
            is_decode_T=torch.rand(count, generator=generator) < decoding,
            request_T=torch.arange(count) % tokens.num_groups,
            num_requests=tokens.num_groups if made.plan.scope == "request" else 1,
            device_E=devices,
            token_device_T=torch.full((count,), source),
        )
        held += selection.load_after
    most = made.most_held(sum(rows), E // 2, sources=2)
    assert most is not None and held.view(2, -1).sum(1).max() <= most
    if sum(rows) > 300:
        assert most < sum(rows) * made.plan.width
