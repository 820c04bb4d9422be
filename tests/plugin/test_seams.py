"""What the router makes of scores and of a seed, what a graph holds on to, and patches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routers import MIXTRAL, E, K, T, forward_context, make, prompt_of_one_request
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name

from vllm_capmoe import CapacityConfig, route
from vllm_capmoe.integration import checks, compat, custom_ops, layers, worker
from vllm_capmoe.integration import router as router_module
from vllm_capmoe.integration.experts import TorchExperts
from vllm_capmoe.integration.stats import LayerStats
from vllm_capmoe.integration.step import StepTokens

LOGITS = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
TOPK = LOGITS.topk(K).indices
LIMITED: dict[str, Any] = {"mode": "drop", "factor": 0.5, "min_capacity": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_weights_are_scores_in_float32(scoring, dtype):
    asked = {"renormalize": False, "scoring_func": scoring}
    made = make(asked, prompt_of_one_request(), mode="drop", factor="inf")
    logits = (3 * LOGITS).to(dtype)
    x = logits.double()
    scores = {
        "softmax": x.exp() / x.exp().sum(1, keepdim=True),
        "sigmoid": 1 / (1 + (-x).exp()),
        "sqrtsoftplus": (1 + x.exp()).log().sqrt(),
    }[scoring]
    with override_forward_context(forward_context()):
        weights, experts = made.route(logits, TOPK)
    expected = scores.gather(1, experts.long()).float()
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-7)


def test_a_random_choice_is_by_the_routers_seed():
    settings = {**LIMITED, "metric": "random"}
    made = make(MIXTRAL, prompt_of_one_request(), **settings)
    held = []
    for made.seed in (1, 2):
        with override_forward_context(forward_context()):
            _, experts = made.route(LOGITS, TOPK)
        plain = route(LOGITS.softmax(1), K, CapacityConfig(**settings), seed=made.seed)
        assert torch.equal(experts, plain.experts)
        held.append(experts)
    assert not torch.equal(*held)


def test_seeds_differ_by_layer_and_by_engine():
    seed_of = layers.layer_seed
    seeds = {seed_of(seed, f"layers.{n}.mlp") for seed in (0, 1, 2) for n in range(3)}
    assert len(seeds) == 9 and seed_of(None, "a") == seed_of(0, "a")


def test_replicas_are_no_experts_of_their_own(monkeypatch):
    class Config:
        additional_config = {"moe_capacity": LIMITED}

    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: Config)

    def original(**kwargs: Any) -> Any:
        return CPURouter(top_k=K, global_num_experts=kwargs["global_num_experts"])

    made = router_module._make_router(original)(
        top_k=K, global_num_experts=E + 2, num_logical_experts=E
    )
    assert (made.num_logical_experts, made.global_num_experts) == (E, E + 2)
    assert made.scale == 1.0
    # vLLM's plain router leaves the factor to the model; those with groups or a bias apply it.
    for asked, scale in (({}, 1.0), ({"use_grouped_topk": True}, 2.0)):
        made = router_module._make_router(original)(
            top_k=K, global_num_experts=E, routed_scaling_factor=2.0, **asked
        )
        assert made.scale == scale
    for original, named in ((lambda **_: SimpleNamespace(), "SimpleNamespace"),):
        with pytest.raises(ValueError, match=f"route with {named}"):
            router_module._make_router(original)(top_k=K, global_num_experts=E)


def test_a_compiled_graph_is_told_the_true_shapes():
    custom_ops.register()
    made = make(MIXTRAL, prompt_of_one_request(), **{**LIMITED, "mode": "expanded"})
    context = forward_context()
    context.no_compile_layers["layer"] = SimpleNamespace(router=made)
    name, width = _encode_layer_name("layer"), made.plan.width
    with override_forward_context(context):
        real = torch.ops.capmoe.route(LOGITS, TOPK, width, name)
    with FakeTensorMode() as mode:
        told = torch.ops.capmoe.route(mode.from_tensor(LOGITS), mode.from_tensor(TOPK), width, name)
    assert [(t.shape, t.dtype) for t in told] == [(t.shape, t.dtype) for t in real]


def test_what_a_graph_holds_keeps_its_address():
    tokens = prompt_of_one_request()
    stats = LayerStats.allocate("layer", E, torch.device("cpu"))

    def addresses() -> list[int]:
        return [t.data_ptr() for t in (tokens.request, tokens.is_decode, stats.counts)]

    before = addresses()
    tokens.fill(torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.tensor([3]))
    stats.summed += 1
    stats.reset()
    assert addresses() == before and not stats.counts.any()


def test_groups_of_a_graph_are_as_many_as_a_step_can_have():
    tokens = prompt_of_one_request()
    assert tokens.num_groups == 1
    with FakeTensorMode():
        tokens.request = torch.empty(T, dtype=torch.int64, device="cuda")
    assert tokens.num_groups == 8


def test_a_step_of_padding_alone_is_no_step():
    made = make(MIXTRAL, prompt_of_one_request(), **LIMITED)
    context = forward_context()
    context.is_padding[:] = True
    with override_forward_context(context):
        made.route(LOGITS, TOPK)
    assert made.stats.counters()["steps"] == 0


@pytest.mark.parametrize(("decode", "kind"), [(T, "decode"), (T - 1, "prompt")])
def test_active_experts_are_counted_by_kind_of_step(decode, kind):
    tokens = prompt_of_one_request()
    tokens.is_decode[:decode] = True
    made = make(MIXTRAL, tokens, mode="off", decode_keep=1)
    scores = LOGITS.scatter_add(1, torch.arange(T)[:, None] % K, torch.full((T, 1), 30.0))
    with override_forward_context(forward_context()):
        _, experts = made.route(scores, scores.topk(K).indices)
    counted = made.stats.counters()
    other = "prompt" if kind == "decode" else "decode"
    assert counted[f"{kind}_active_before"] == E
    assert counted[f"{kind}_active_after"] == len(set(experts.flatten().tolist())) < E
    assert counted[f"{other}_active_before"] == counted[f"{other}_active_after"] == 0
    assert counted["prompt_steps"] == (kind == "prompt")


def test_a_token_without_an_expert_is_one_that_lost_all():
    made = make(MIXTRAL, prompt_of_one_request(), **{**LIMITED, "factor": 0.1})  # a seat an expert
    with override_forward_context(forward_context()):
        _, experts = made.route(LOGITS, TOPK)
    counted = made.stats.counters()
    assert counted["left_without"] == int((experts < 0).all(1).sum()) >= T - E
    assert counted["dropped"] == T * K - E


def test_an_attribute_is_replaced_once():
    class Here:
        def method(self) -> int:
            return 0

    def one_more(original: compat.Function) -> compat.Function:
        return lambda self: original(self) + 1

    for _ in range(2):
        compat.apply(lambda: [compat.Patch(Here, "method", one_more, ("self",))])
    assert Here().method() == 1


def test_another_platform_is_refused(monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: False)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(quantization=None))
    with pytest.raises(ValueError, match="but the platform is .*: it is accepted on CUDA and on"):
        checks.resolve_backend(CapacityConfig(mode="drop"), config)


def test_a_worker_looks_at_its_own_environment(monkeypatch):
    """It may be on another machine than the front end."""
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    monkeypatch.setattr(checks, "check_engine", lambda *_: pytest.fail("it went on"))
    with pytest.raises(ValueError, match="VLLM_MOE_SKIP_PADDING=0 hides"):
        worker.activate(SimpleNamespace(vllm_config=None), CapacityConfig(mode="drop"))


# --- What is bound when the model is loaded ---------------------------------------------------


def bind(monkeypatch: pytest.MonkeyPatch, router: Any, on_input: bool = False) -> StepTokens:
    """Bind one layer of plain torch experts, as `load_model` does; returns the step's facts."""
    kernel = SimpleNamespace(
        fused_experts=TorchExperts.__new__(TorchExperts), prepare_finalize=object()
    )
    method = SimpleNamespace(moe_kernel=kernel, experts_cls=TorchExperts)
    layer = SimpleNamespace(
        layer_name="layer",
        router=router,
        routed_experts=SimpleNamespace(
            quant_method=method, apply_router_weight_on_input=on_input, expert_substitution=None
        ),
        is_monolithic=False,
        do_naive_dispatch_combine=False,
        moe_config=SimpleNamespace(
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        ),
    )
    monkeypatch.setattr(layers, "layers_of_model", lambda *_: [layer])
    vllm_config: Any = SimpleNamespace(model_config=SimpleNamespace(seed=3))
    tokens = StepTokens.allocate(T, 8, torch.device("cpu"))
    layers.bind(CapacityConfig(**LIMITED), vllm_config, SimpleNamespace(device="cpu"), tokens)
    return tokens


def test_the_first_step_forgets_what_the_start_counted(monkeypatch):
    router = make(MIXTRAL, prompt_of_one_request(), **LIMITED)
    tokens = bind(monkeypatch, router)
    assert router.seed == layers.layer_seed(3, "layer")
    router.stats.summed += 1
    tokens.begin()
    assert not router.stats.counts.any()


def test_layers_that_would_compute_something_else_are_refused(monkeypatch):
    router = make(MIXTRAL, prompt_of_one_request(), **LIMITED)
    with pytest.raises(ValueError, match="weighs the experts' input, and 4 experts per token"):
        bind(monkeypatch, router, on_input=True)
    with pytest.raises(ValueError, match="routes by itself"):
        bind(monkeypatch, router.inner)
