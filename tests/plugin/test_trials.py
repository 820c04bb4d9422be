"""Trials beside the real routing: what they count is what the settings do on the same steps."""

from typing import Any

import pytest
import torch
from routers import MIXTRAL, E, K, T, forward_context, make, prompt_of_one_request
from vllm.forward_context import override_forward_context

from vllm_capmoe import CapacityConfig, route
from vllm_capmoe.integration.trials import LayerTrials
from vllm_capmoe.layer_settings import layer_number
from vllm_capmoe.plan import resolve

TRIALS: dict[str, dict[str, Any]] = {
    "drop 1": {"mode": "drop", "factor": 1.0, "min_capacity": 1},
    "reroute 0.75": {"mode": "reroute", "factor": 0.75, "min_capacity": 1},
    "expanded 1": {"mode": "expanded", "factor": 1.0, "min_capacity": 1, "max_experts": "none"},
}
RANKS = 2


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.17.mlp.experts", 17),
        ("language_model.model.layers.0.block_sparse_moe.experts", 0),
        ("backbone.2.mixer.experts", 2),
        ("model.layers.3.mlp.experts.1", 3),
        ("experts", -1),
    ],
)
def test_the_number_of_a_layer_is_in_its_name(name: str, number: int) -> None:
    assert layer_number(name) == number


def test_trials_count_what_the_settings_do() -> None:
    """Two steps of prompts and one of decode tokens, through a router that observes."""
    rank_E = torch.arange(E) // (E // RANKS)
    configs = {name: CapacityConfig(**settings) for name, settings in TRIALS.items()}
    tokens = prompt_of_one_request()
    router = make(MIXTRAL, tokens, mode="drop", factor=0.5)
    router.trials = LayerTrials(
        {
            name: resolve(
                config, num_experts=E, top_k=K, expert_device=rank_E.tolist(), renormalize=True
            )
            for name, config in configs.items()
        },
        rank_E,
    )
    generator = torch.Generator().manual_seed(3)
    steps = [2 * torch.randn(T, E, generator=generator) for _ in range(3)]
    with override_forward_context(forward_context()):
        for number, logits in enumerate(steps):
            tokens.is_decode[:] = number == 2
            router.decide(logits, None)

    assert len(router.trials.loads) == 2
    for name, config in configs.items():
        expected: dict[str, float] = dict.fromkeys(router.trials.counts["prompt"][name], 0)
        for logits in steps[:2]:
            scores = logits.softmax(1)
            r = route(
                scores, K, config, expert_device=rank_E, renormalize=True,
            )  # fmt: skip
            top = scores.topk(K, dim=1)
            held = torch.zeros(T, E + 1).scatter(1, r.experts.long() % (E + 1), 1.0)[:, :E].bool()
            chosen = torch.zeros(T, E).scatter(1, top.indices, 1.0).bool()
            for key, value in {
                "steps": 1,
                "assignments": T * K,
                "dropped": r.dropped,
                "added": int((held & ~chosen).sum()),
                "left_without": r.left_without,
                "mass": float(scores[chosen].double().sum()),
                "lost": float(scores[chosen & ~held].double().sum()),
                "missing": float(
                    ((scores * chosen).double().sum(1) - (scores * held).double().sum(1))
                    .clamp(0)
                    .sum()
                ),
                "peak_before": int(r.load_before.max()),
                "peak_after": int(r.load_after.max()),
                "rank_before": int(r.load_before.view(RANKS, -1).sum(1).max()),
                "rank_after": int(r.load_after.view(RANKS, -1).sum(1).max()),
                "active_before": int((r.load_before > 0).sum()),
                "active_after": int((r.load_after > 0).sum()),
            }.items():
                expected[key] += value
        assert router.trials.counts["prompt"][name] == pytest.approx(expected, rel=1e-4)
        assert expected["dropped"] > 0 and expected["lost"] > 0
        decode = router.trials.counts["decode"][name]
        assert (decode["steps"], decode["dropped"], decode["added"]) == (1, 0, 0)
