"""What `layers.bind` makes of the layers that a model has, on vLLM's real layers, on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe import layer as fused_moe

import vllm_capmoe
from vllm_capmoe.integration import compat, custom_ops, experts, layers, router, rpc, step
from vllm_capmoe.integration.settings import KEY, capacity_config

vllm_capmoe.register()
pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def group(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """The configuration of an engine, and its process group of one."""
    config = EngineArgs(
        model=str(example_model), max_model_len=128, dtype="float32", moe_capacity_mode="drop"
    ).create_engine_config()
    compat.apply(router.patches, experts.patches)
    custom_ops.register()
    file = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{file}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield config
    cleanup_dist_env_and_memory()


@pytest.fixture
def config(group: VllmConfig) -> Iterator[VllmConfig]:
    """Settings and layers of a test go with it."""
    before = group.additional_config
    group.additional_config = {KEY: {"mode": "drop", "factor": 0.5, "min_capacity": 1}}
    yield group
    group.additional_config = before
    group.compilation_config.static_forward_context.clear()


def layer(name: str = FIRST, **more: Any) -> Any:
    """A layer with weights, as a model makes one."""
    made = fused_moe.FusedMoEFactory(
        num_experts=8,
        hidden_size=32,
        intermediate_size=64,
        params_dtype=torch.float32,
        renormalize=True,
        prefix=name,
        **{"top_k": 2, **more},
    )
    for parameter in made.parameters():
        parameter.data.normal_()
    routed = made.routed_experts
    routed.quant_method.process_weights_after_loading(routed)
    return made


def bind(config: VllmConfig, *model: torch.nn.Module, draft: Any = None) -> step.StepTokens:
    """As a worker does when its model is loaded."""
    runner = SimpleNamespace(
        device=CPU,
        get_model=lambda: torch.nn.ModuleList(model),
        get_draft_model=lambda: draft if draft is None else torch.nn.ModuleList([draft]),
    )
    tokens = step.attach(runner, config)
    layers.bind(capacity_config(config.additional_config), config, runner, tokens)
    return tokens


def routed(config: VllmConfig, one: Any, rows: int) -> torch.Tensor:
    """The experts of a step of prompt tokens: int [rows, k]."""
    context = ForwardContext(
        no_compile_layers=config.compilation_config.static_forward_context,
        attn_metadata={},
        slot_mapping={},
        is_padding=torch.zeros(rows, dtype=torch.bool),
    )
    logits = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 5.0  # a hot expert
    with override_forward_context(context):
        return one.router.select_experts(hidden_states=logits, router_logits=logits)[1]


def test_a_drafts_layers_are_known_by_the_model_they_belong_to(config):
    """Its k may pass max-experts, which is said of the model."""
    config.additional_config[KEY] |= {"max_experts": 2}
    mine, drafts = layer(FIRST), layer("draft_model." + FIRST, top_k=3)
    tokens = bind(config, mine, draft=drafts)
    assert layers.moe_layers(config) == [mine]
    assert drafts.router.is_draft and not mine.router.is_draft
    tokens.fill(torch.zeros(16, dtype=torch.int64), torch.arange(16), torch.tensor([16]))
    held, whole = routed(config, mine, 16), routed(config, drafts, 16)
    assert (held == 0).sum() == 2 and (held < 0).any()  # ceil(0.5 * 16 * 2 / 8)
    assert (whole == 0).sum() == 16 and (whole >= 0).all()


def test_what_the_model_and_its_draft_share_is_the_models(config):
    shared = layer()
    bind(config, shared, draft=shared)
    assert layers.moe_layers(config) == [shared] and not shared.router.is_draft


def test_a_drafts_layer_may_route_by_itself(config):
    drafts = layer("draft_model." + FIRST)
    drafts.router = drafts.router.inner
    bind(config, layer(), draft=drafts)


def test_a_stage_without_moe_layers_binds_nothing(config):
    bind(config, torch.nn.Linear(2, 2))
    assert layers.moe_layers(config) == [] == rpc.moe_capacity_counters(config)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"mode": "drop"}, 2),
        ({"mode": "drop", "layers": {"0": {"mode": "off"}}}, 1),
        ({"layers": {"1": {"decode_keep": 1}}}, 1),
        ({"layers": {"2": {"mode": "expanded"}}}, 0),
    ],
)
def test_what_is_asked_of_the_layers_is_counted_and_said(config, monkeypatch, settings, asked):
    config.additional_config[KEY] = settings
    said: list[Any] = []
    monkeypatch.setattr(layers, "log_start", lambda *what: said.extend(what))
    bind(config, layer(FIRST), layer(SECOND))
    assert layers.num_asked(capacity_config(config.additional_config), config) == asked
    assert said[1].acts is (asked > 0) and said[-1] == 2


@pytest.mark.parametrize("name", ["experts", "a.3.b.7.experts"])
def test_a_layers_name_needs_no_single_number(config, name):
    bind(config, one := layer(name))
    assert layers.moe_layers(config) == [one]


def test_seeds_differ_by_layer_and_by_the_engines_seed(config):
    one, two = layer(FIRST), layer(SECOND)
    bind(config, one, two)
    assert one.router.seed != two.router.seed
    before = one.router.seed
    config.model_config.seed += 1
    bind(config, one, two)
    config.model_config.seed -= 1
    assert one.router.seed not in (before, two.router.seed)
    assert layers.layer_seed(None, FIRST) == layers.layer_seed(0, FIRST)


def test_who_computes_a_layer_is_read_from_the_layer(config):
    """Some by our experts, some by vLLM's, which get experts in all places."""
    ours = layer(FIRST)
    config.additional_config[KEY] |= {"backend": "vllm"}
    theirs = layer(SECOND)
    config.additional_config[KEY] |= {"backend": "auto"}
    tokens = bind(config, ours, theirs)
    tokens.fill(torch.zeros(16, dtype=torch.int64), torch.arange(16), torch.tensor([16]))
    assert layers.backend_of(ours) == "torch" and layers.backend_of(theirs) == "vllm"
    assert (routed(config, ours, 16) < 0).any() and (routed(config, theirs, 16) >= 0).all()


def test_seats_go_only_to_experts_that_get_the_routers_rows(config):
    one, other = layer(FIRST), layer(SECOND)
    other.routed_experts.quant_method.moe_kernel.impl.prepare_finalize = object()
    bind(config, one, other)
    assert one.router.first_local == 0 and other.router.first_local is None


def test_counts_of_the_start_are_forgotten_where_they_stand(config):
    """A captured graph goes on counting at that address, and reading the step's facts at theirs."""
    one = layer()
    tokens = bind(config, one)
    counts = one.router.stats.counts
    before = [each.data_ptr() for each in (counts, tokens.is_decode, tokens.request)]
    routed(config, one, 16)  # the profiling run
    assert counts.sum() > 0
    for rows in (16, 8):
        tokens.fill(torch.zeros(rows, dtype=torch.int64), torch.arange(rows), torch.tensor([4]))
        assert tokens.is_decode[:rows].tolist() == [n >= 4 for n in range(rows)]
    assert one.router.stats.counts is counts and counts.sum() == 0
    assert before == [each.data_ptr() for each in (counts, tokens.is_decode, tokens.request)]
    routed(config, one, 8)
    tokens.begin()
    assert one.router.stats.counters()["steps"] == 1


class MyMegaMoEExperts(torch.nn.Module):
    """As vLLM calls its own."""


def by_itself(one: Any) -> None:
    one.router = one.router.inner


def monolithic(one: Any) -> None:
    method = one.routed_experts.quant_method
    method.moe_kernel = SimpleNamespace(is_monolithic=True)


def dispatched(one: Any) -> None:
    one.routed_experts.quant_method.moe_kernel = None
    one.moe_config.moe_parallel_config.dp_size = 2


def replaced(one: Any) -> None:
    one.routed_experts.expert_substitution = object()


def weighs_input(one: Any) -> None:
    one.routed_experts.apply_router_weight_on_input = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (by_itself, "routes by itself, or needs what no mode serves (CPURouter, Unquantiz"),
        (monolithic, "routes by itself, or needs what no mode serves (CapacityRouter, Unquanti"),
        (dispatched, "gathers the rows of all ranks before they are routed"),
        (replaced, "has experts that were replaced by constants (MoNE)"),
        (weighs_input, "weighs the experts' input, and 2 experts per token by backend 'torch'"),
    ],
)
def test_layers_that_are_not_served(config, change, message):
    one = layer()
    change(one)
    with pytest.raises(ValueError) as error:
        bind(config, one)
    assert f"mode is 'drop', but layer {FIRST} {message}" in str(error.value)


def test_one_expert_per_token_may_weigh_its_input_by_our_experts_only(config):
    one = layer(top_k=1, apply_router_weight_on_input=True)
    bind(config, one)
    config.additional_config[KEY] |= {"backend": "vllm"}
    two = layer(SECOND, top_k=1, apply_router_weight_on_input=True)
    with pytest.raises(ValueError, match="1 experts per token by backend 'vllm' can't"):
        bind(config, one, two)


def test_layers_and_experts_of_another_kind_are_refused(config):
    one = layer()
    with pytest.raises(ValueError, match=f"layer {FIRST} belongs neither to the model nor to its"):
        bind(config)
    with pytest.raises(ValueError, match="but 1 is a MyMegaMoEExperts, which routes by itself"):
        bind(config, one, MyMegaMoEExperts())
