"""Dropped assignments under vLLM's own kernels: a phantom expert, or weight zero."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routers import MIXTRAL, MODELS, E, K, T, forward_context, make, prompt_of_one_request
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import (
    OAITritonExperts,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_capmoe import CapacityConfig, route
from vllm_capmoe.integration import phantom

CPU = torch.device("cpu")


class OurTritonExperts(TritonExperts):
    """What a subclass does is not known."""


def layer(
    experts: type = TritonExperts,
    prepare: type = MoEPrepareAndFinalizeNoDPEPModular,
    ranks: int = 1,
    strategy: Any = "linear",
    total: int = E,
) -> Any:
    """A layer with vLLM's own `RoutedExperts`, as far as its map and its kernel go."""
    routed = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(routed)
    count, expert_map, _ = determine_expert_map(ranks, ranks - 1, total, strategy)
    routed.register_buffer("_expert_map", expert_map, persistent=False)
    routed.global_num_experts, routed.local_num_experts = total, count
    parts = {"fused_experts": experts, "prepare_finalize": prepare}
    kernel = SimpleNamespace(**{name: kind.__new__(kind) for name, kind in parts.items()})
    routed.quant_method = SimpleNamespace(moe_kernel=kernel)
    return SimpleNamespace(routed_experts=routed)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_the_phantom_is_one_more_expert_that_lives_nowhere(ranks, strategy):
    made = layer(ranks=ranks, strategy=strategy)
    routed = made.routed_experts
    before = routed.expert_map
    assert phantom.install(made, CPU) == E
    assert routed.global_num_experts == E + 1
    expected = torch.arange(E, dtype=torch.int32) if before is None else before
    assert routed.expert_map.tolist() == [*expected.tolist(), -1]
    assert routed.expert_map.dtype == torch.int32


@pytest.mark.parametrize(
    "made",
    [
        layer(experts=OurTritonExperts),
        layer(experts=CPUUnquantizedExperts),
        layer(prepare=object),
        layer(total=992),
    ],
    ids=["subclass", "kernel without map", "another all-to-all", "too many for the alignment"],
)
def test_no_phantom_where_it_is_not_known_to_be_skipped(made):
    routed = made.routed_experts
    before = routed.expert_map, routed.global_num_experts
    assert phantom.install(made, CPU) is None
    assert (routed.expert_map, routed.global_num_experts) == before


def test_no_phantom_beside_a_map_that_does_not_fit():
    """A map of other experts than the layer's, or none though some experts live elsewhere."""
    longer, without = layer(ranks=2), layer(ranks=2)
    longer.routed_experts._expert_map = torch.cat([longer.routed_experts._expert_map] * 2)
    without.routed_experts._expert_map = None
    for made in (longer, without):
        assert phantom.install(made, CPU) is None
        assert made.routed_experts.global_num_experts == E


def test_no_phantom_for_a_method_without_a_modular_kernel():
    made = layer()
    made.routed_experts.quant_method.moe_kernel = None
    assert phantom.install(made, CPU) is None


def test_all_named_classes_are_vllms():
    folder = Path(fused_moe.__file__).parent
    sources = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    classes = set(re.findall(r"^class (\w+)", sources, re.MULTILINE))
    assert classes >= phantom.GPT_OSS | phantom.PREPARING


@pytest.mark.parametrize(("version", "expected"), [("3.5.1", E), ("3.6", E), ("3.8", None)])
def test_gpt_oss_kernels_skip_but_for_one_version_of_their_library(version, expected, monkeypatch):
    monkeypatch.setattr(phantom.import_utils, "get_triton_kernels_version", lambda: version)
    assert phantom.install(layer(experts=OAITritonExperts), CPU) == expected


def test_padding_stays_empty_where_vllm_leaves_it_so():
    experts = torch.tensor([[2, -1], [-1, -1]])
    loads = torch.tensor([0, 3, 1])
    assert phantom.fill_unused(experts, loads).tolist() == [[2, 0], [0, 2]]
    padding = torch.tensor([False, True])
    assert phantom.fill_unused(experts, loads, padding).tolist() == [[2, 0], [-1, -1]]
    assert phantom.fill_unused(experts[:0], loads).shape == (0, 2)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_what_an_expert_dropped_does_not_come_back_to_it(factor):
    """The filled places even the loads out: the busiest expert has hardly more than its limit."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_experts, top_k = 2048, 64, 6
    scores = (torch.randn(num_tokens, num_experts, generator=generator)).add(
        torch.linspace(0, 2, num_experts)
    )
    held = route(scores.softmax(-1), top_k, CapacityConfig(mode="drop", factor=factor))
    filled = phantom.fill_unused(held.experts, held.load_after)
    assert torch.equal(filled.masked_fill(held.experts < 0, -1), held.experts)
    assert all(len(set(row)) == top_k and min(row) >= 0 for row in filled.tolist())
    loads = torch.bincount(filled.flatten(), minlength=num_experts)
    assert held.load_before.max() > 2 * held.capacity
    assert loads.max() <= 1.2 * held.capacity
    busiest = held.load_before.topk(8).indices
    assert (loads[busiest] <= held.load_after[busiest] + 0.05 * held.capacity).all()


@pytest.mark.parametrize("mode", ["drop", "expanded"])
def test_the_router_sends_unused_places_to_the_phantom(mode):
    with override_forward_context(forward_context()):
        settings = {"mode": mode, "factor": 0.5, "min_capacity": 1}
        tokens = prompt_of_one_request()
        made = make(MIXTRAL, tokens, **settings)
        logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
        topk_ids = made.inner._compute_routing(logits, logits, None)[1]
        _, experts = made.route(logits, topk_ids)
        made.phantom = E
        ids = made._apply_eplb_mapping(experts)
        bound = make(MIXTRAL, tokens, "vllm", phantom=E, **settings)
        assert torch.equal(bound.route(logits, topk_ids)[1], experts), "filled, and skipped too"
    assert ids.dtype == experts.dtype and (experts < 0).any()
    assert torch.equal(ids, torch.where(experts < 0, E, experts).to(ids.dtype))


@pytest.mark.parametrize("asked", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mode", ["drop", "expanded"])
def test_without_a_phantom_a_row_holds_distinct_experts_with_weight_zero(asked, mode):
    settings = {"mode": mode, "factor": 0.5, "min_capacity": 1}
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    logits[3] = torch.nan
    logits[4] = -torch.inf
    logits[5, 2:] = torch.inf
    with override_forward_context(forward_context()):
        plain, filled = (
            make(asked, prompt_of_one_request(), backend, **settings)
            for backend in ("torch", "vllm")
        )
        _, topk_ids = plain.inner._compute_routing(logits, logits, None)
        weights, experts = plain.route(logits, topk_ids)
        more_weights, more = filled.route(logits, topk_ids)
    assert torch.equal(more_weights.nan_to_num(9), weights.nan_to_num(9))
    assert torch.equal(more.masked_fill(experts < 0, -1), experts)
    assert (experts < 0).any() and (more_weights[experts < 0] == 0).all()
    for row in more.tolist():
        assert len(set(row)) == len(row) >= K and set(row) <= set(range(E))


def test_vllms_triton_experts_skip_the_phantom():
    """Their real code, interpreted, with poisoned workspaces."""
    script = Path(__file__).with_name("vllm_triton_experts.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
