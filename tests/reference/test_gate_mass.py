"""The gate mass that a step counts, against sums of Python's own integers."""

import math
import random
from typing import Any

import pytest
import torch

from vllm_capmoe import CapacityConfig
from vllm_capmoe.plan import resolve
from vllm_capmoe.ranking import fixed_point
from vllm_capmoe.torch_routing import route_torch

ODD = [math.nan, math.inf, -math.inf, -0.5, 5000.0, 1e-45]


def mass(score: float) -> int:
    """floor(S * 2^20) of S from 0 to 1024; NaN is nothing."""
    return 0 if math.isnan(score) else math.floor(min(max(score, 0.0), 1024.0) * 2**20)


def test_fixed_point_of_scores() -> None:
    scores = [0.0, 2.0**-20, 2.0**-20 * 0.999, 0.1, 1.0, 1023.9, *ODD]
    expected = [0, 1, 0, math.floor(torch.tensor(0.1).item() * 2**20), 2**20]
    expected += [mass(torch.tensor(1023.9).item()), 0, 2**30, 0, 0, 2**30, 0]
    assert fixed_point(torch.tensor(scores)).tolist() == expected


@pytest.mark.parametrize("asked", [False, True], ids=["top-k", "another choice"])
@pytest.mark.parametrize(
    "config",
    [
        {"mode": "off", "decode_keep": 1},
        {"mode": "drop", "factor": 0.5},
        {"mode": "drop", "factor": "inf"},
        {"mode": "expanded", "factor": 0.75, "max_experts": 3, "decode_keep": 1},
        {"mode": "reroute", "factor": 0.75},
    ],
    ids=str,
)
def test_mass_is_of_the_models_choice_and_lost_what_of_it_is_not_held(
    config: dict[str, Any], asked: bool
) -> None:
    """Padding counts in nothing. What decode keep takes from a decode token is lost, too."""
    E, k = 8, 3
    plan = resolve(CapacityConfig(min_capacity=1, **config), num_experts=E, top_k=k)
    rng, all_lost = random.Random(str(config)), 0
    generator = torch.Generator().manual_seed(0)
    for T in (1, 7, 7, 30, 30):
        scores = (2 * torch.randn(T, E, generator=generator)).softmax(1)
        scores[0, :5] = torch.tensor(rng.sample(ODD, 5))
        topk = torch.tensor([rng.sample(range(E), k) for _ in range(T)]) if asked else None
        padding = torch.tensor([rng.random() < 0.2 for _ in range(T)])
        decode = torch.tensor([rng.random() < 0.5 for _ in range(T)])
        got = route_torch(scores, plan, topk_TK=topk, is_padding_T=padding, is_decode_T=decode)
        chosen = route_torch(
            scores, resolve(CapacityConfig(), num_experts=E, top_k=k), topk_TK=topk
        ).experts.tolist()
        rows = [t for t in range(T) if not padding[t]]
        held = [set(row) for row in got.experts.tolist()]
        masses = {(t, e): mass(scores[t, e].item()) for t in rows for e in chosen[t]}
        lost = sum(units for (t, e), units in masses.items() if e not in held[t])
        assert (int(got.mass), int(got.lost)) == (sum(masses.values()), lost)
        assert int(got.prompts) == sum(not decode[t] for t in rows)
        all_lost += lost
    assert (all_lost > 0) == (config.get("factor") != "inf")
