"""vLLM's keys of compiled graphs: what is in the graph is in them, what isn't is not."""

from typing import Any

import pytest
from vllm.compilation import caching
from vllm.compilation.backends import VllmBackend
from vllm.engine.arg_utils import EngineArgs

from vllm_capmoe import CapacityConfig, register
from vllm_capmoe.integration import compat, compile_cache

register()
compat.apply(compile_cache.patches)

DROP = {"mode": "drop", "factor": 1.5}
EXPANDED = {"mode": "expanded", "factor": 1.5}


@pytest.fixture(scope="module")
def stock(example_model) -> Any:
    return EngineArgs(model=str(example_model)).create_engine_config()


def keys(stock: Any, capacity: dict[str, Any] | None, **other: Any) -> tuple[list[str], str, str]:
    """Of the compiled model, of its pieces, and of everything."""
    with pytest.MonkeyPatch.context() as patch:
        given = other if capacity is None else {"moe_capacity": capacity, **other}
        patch.setattr(stock, "additional_config", given)
        backend = VllmBackend(stock)
        whole = caching.aot_compile_hash_factors(stock)
        return whole, backend.vllm_config.compute_hash(), stock.compute_hash()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DROP, {**DROP, "factor": 1.1}),
        (DROP, {**DROP, "factor": "inf", "metric": "order", "min_capacity": 1, "min_tokens": 9}),
        (DROP, {**DROP, "scope": "request", "level": "device", "renormalize": "always"}),
        (DROP, {**DROP, "max_experts": 3, "expanded_experts": 2, "candidates": "global"}),
        (EXPANDED, {**EXPANDED, "factor": 2, "fill": "capacity"}),
        (DROP, {**DROP, "layers": {"0-1": {"factor": 2}}}),
        (DROP, CapacityConfig(**DROP).to_dict()),  # as the flags give it
    ],
)
def test_what_is_not_in_the_graph(stock, one, other):
    (model, pieces, all_), (model_too, pieces_too, all_too) = keys(stock, one), keys(stock, other)
    assert (model, pieces) == (model_too, pieces_too)
    assert all_ != all_too  # memory plans, and the fingerprint in answers


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (None, DROP),
        (DROP, EXPANDED),
        (DROP, {**DROP, "backend": "vllm"}),
        (DROP, {**DROP, "observe": True}),
        (DROP, {**DROP, "layers": {"1": {"mode": "expanded"}}}),
        (EXPANDED, {**EXPANDED, "max_experts": 3}),
        (EXPANDED, {**EXPANDED, "expanded_experts": 3}),
        (EXPANDED, {**EXPANDED, "candidates": "global"}),
        (EXPANDED, {**EXPANDED, "level": "device"}),
        (DROP, {**DROP, "decode_keep": 2}),
    ],
)
def test_what_is_in_the_graph(stock, one, other):
    (model, pieces, _), (model_too, pieces_too, _) = keys(stock, one), keys(stock, other)
    assert model != model_too and pieces != pieces_too


def test_other_settings_and_other_releases_are_in_the_key(stock, monkeypatch):
    first = keys(stock, DROP, other=1)
    assert first[:2] != keys(stock, DROP, other=2)[:2]
    monkeypatch.setattr(compile_cache, "own_version", lambda: "99.0")
    assert first[:2] != keys(stock, DROP, other=1)[:2]


def test_the_key_is_computed_of_a_copy(stock):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "additional_config", {"moe_capacity": DROP})
        backend = VllmBackend(stock)
        assert stock.additional_config == {"moe_capacity": DROP}
        assert backend.vllm_config.compilation_config is stock.compilation_config


@pytest.mark.parametrize(
    "off", [{}, {"mode": "off"}, {"mode": "off", "factor": 1.1}, {"factor": 2}]
)
def test_off_written_out_is_as_absent(example_model, stock, off):
    config = EngineArgs(
        model=str(example_model), additional_config={"moe_capacity": off, "other": 1}
    ).create_engine_config()
    assert config.additional_config == {"other": 1}
    plain = EngineArgs(model=str(example_model), moe_capacity_mode="off").create_engine_config()
    assert plain.compute_hash() == stock.compute_hash()
