"""Decode keep in `vllm_capmoe.route`: decode tokens share the experts that the step loads anyway.

The naive oracle knows the rule too, so the properties of test_route_property.py cover it; here is
what the rule promises, checked without the oracle, and against it where few experts are loaded.
Letters: T tokens, E experts, k experts per token, k0 of them kept.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routing_cases import Case, bits, cases, check, fill_scores, run_route, some

from vllm_capmoe import CapacityConfig, route

COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
MODES = ["off", "drop", "expanded", "reroute"]


@st.composite
def decode_cases(draw: st.DrawFn, modes: Any = MODES) -> Case:
    """A case of scope batch with decode tokens, often all of them, and any k0."""
    case = draw(cases(max_tokens=40, scope="batch", mode=draw(st.sampled_from(modes))))
    rng = random.Random(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1]))
    keep = draw(st.sampled_from(["auto", *range(1, case.top_k + 1)]))
    return case.change(is_decode=some(rng, len(case.scores), share), config={"decode_keep": keep})


def rows(got: Any) -> list[list[int]]:
    return [[e for e in row if e >= 0] for row in got.experts.tolist()]


def decoding(case: Case) -> list[int]:
    padding = case.is_padding or [False] * len(case.scores)
    assert case.is_decode is not None
    return [t for t, decode in enumerate(case.is_decode) if decode and not padding[t]]


def active(got: Any) -> set[int]:
    return {e for row in rows(got) for e in row}


# Four experts, k = 2. Best first the tokens rank 0 1 2 3, 2 0 1 3 and 3 1 2 0.
RANKED = [[0.4, 0.3, 0.2, 0.1], [0.3, 0.2, 0.4, 0.1], [0.1, 0.3, 0.2, 0.4]]


@pytest.mark.parametrize(
    ("is_decode", "config", "experts"),
    [
        ([True, True, True], {"decode_keep": "off"}, [[0, 1], [2, 0], [3, 1]]),
        # 0, 2 and 3 are kept, so loaded; nobody loads 1.
        ([True, True, True], {"decode_keep": 1}, [[0, 2], [2, 0], [3, 2]]),
        # A prompt token's top-k is loaded too: here 0 and 1.
        ([False, True, True], {"decode_keep": 1}, [[0, 1], [2, 0], [3, 1]]),
        ([True, False, True], {"decode_keep": 1}, [[0, 2], [2, 0], [3, 2]]),
        ([True, True, True], {"decode_keep": 2}, [[0, 1], [2, 0], [3, 1]]),
    ],
)
def test_worked_by_hand(is_decode: list[bool], config: dict[str, Any], experts: Any) -> None:
    got = check(Case(RANKED, 4, 2, config, is_decode=is_decode))
    assert got.experts.tolist() == experts
    assert got.load_before.tolist() == [2, 2, 1, 1]


def test_decode_tokens_sit_down_with_what_they_share() -> None:
    """C = 1, tokens 1 and 2 decode: they take 2, 0 and 3, 2, and expert 0 is left to nobody."""
    scores = [[0.4, 0.1, 0.3, 0.2], *RANKED[1:]]
    config = {"mode": "drop", "factor": 0.5, "min_capacity": 1}
    case = Case(scores, 4, 2, {**config, "decode_keep": 1}, is_decode=[False, True, True])
    assert check(case).experts.tolist() == [[-1, -1], [2, 0], [3, 2]]
    off = check(case.change(config={"decode_keep": "off"}))
    assert off.experts.tolist() == [[-1, -1], [2, 0], [3, 1]]


def test_a_choice_that_is_not_the_plain_top_k_is_kept_by_score() -> None:
    """The model chose 3 and 1 for both; 3 is the best of these by score, and is kept."""
    case = Case([[0.4, 0.2, 0.1, 0.3]] * 2, 4, 2, {"decode_keep": 1}, is_decode=[True] * 2)
    assert check(case.change(topk_ids=[[3, 1], [1, 3]])).experts.tolist() == [[3, 1]] * 2
    # A prompt token loads 0, which beats 1, the rest of the choice.
    mixed = case.take([0, 0, 0]).change(
        topk_ids=[[3, 1], [1, 3], [0, 2]], is_decode=[True, True, False]
    )
    assert check(mixed).experts.tolist() == [[0, 3], [0, 3], [0, 2]]


@pytest.mark.parametrize(("tokens", "keep"), [(1, 7), (7, 7), (8, 6), (15, 6), (16, 5), (40, 5)])
def test_auto_goes_by_the_decode_tokens_of_the_step(tokens: int, keep: int) -> None:
    """Padding and prompt tokens don't count."""
    rng = random.Random(tokens)
    case = Case(fill_scores(rng, "softmax", tokens + 9, 64), 64, 8, {"decode_keep": "auto"})
    case = case.change(
        is_decode=[True] * (tokens + 4) + [False] * 5,
        is_padding=[False] * tokens + [True] * 7 + [False] * 2,
    )
    got = check(case)
    fixed = run_route(case.change(config={"decode_keep": keep}))
    assert got.experts.tolist() == fixed.experts.tolist()


@settings(max_examples=1500, **COMMON)
@given(decode_cases())
def test_equals_the_oracle(case: Case) -> None:
    check(case)


@settings(max_examples=600, **COMMON)
@given(decode_cases())
def test_a_decode_token_holds_exactly_k_and_its_best_k0(case: Case) -> None:
    got, off = run_route(case), run_route(case.change(config={"mode": "off", "decode_keep": "off"}))
    tokens, plain, held = decoding(case), rows(off), rows(got)
    (*_, k0) = CapacityConfig(**case.config).keeps(case.top_k) or (case.top_k,)
    for t in tokens:
        assert len(held[t]) == case.top_k
        assert set(plain[t][:k0]) <= set(held[t])  # auto keeps more than its last number in others
    assert got.load_before.tolist() == off.load_before.tolist()


@settings(max_examples=400, **COMMON)
@given(decode_cases())
def test_keeping_all_is_off_to_the_bit(case: Case) -> None:
    off = run_route(case.change(config={"decode_keep": "off"}))
    got = run_route(case.change(config={"decode_keep": case.top_k}))
    assert got.experts.tolist() == off.experts.tolist()
    assert bits(got.weights) == bits(off.weights)
    assert got.load_after.tolist() == off.load_after.tolist()
    assert (got.dropped, got.expanded) == (off.dropped, off.expanded)


@settings(max_examples=300, **COMMON)
@given(decode_cases(), st.integers(0, 2**32))
def test_one_decode_token_alone_is_off_to_the_bit(case: Case, pick: int) -> None:
    """Padding beside it is nobody."""
    tokens = decoding(case)
    if not tokens:
        return
    one = random.Random(pick).choice(tokens)
    alone = case.change(is_padding=[t != one for t in range(len(case.scores))])
    off = run_route(alone.change(config={"decode_keep": "off"}))
    got = run_route(alone)
    assert got.experts.tolist() == off.experts.tolist()
    assert bits(got.weights) == bits(off.weights)


@settings(max_examples=600, **COMMON)
@given(decode_cases(modes=["off", "drop"]))
def test_never_more_active_experts(case: Case) -> None:
    """Of those that the step would load, in mode off and where Token Drop bounds experts."""
    case = case.change(config={"level": "expert"})
    got, off = run_route(case), run_route(case.change(config={"decode_keep": "off"}))
    assert active(got) <= active(off)
    if case.config["mode"] == "off":
        keep = set(range(len(case.scores))) - set(decoding(case))
        assert all(rows(got)[t] == rows(off)[t] for t in keep)


def test_fewer_active_experts_the_fewer_are_kept() -> None:
    """A guard of the rule: what the trial saw, 16 tokens on 64 experts with top-8."""
    rng = random.Random(0)
    counts = []
    for keep in (8, 6, 4, 2, 1):
        total = 0
        for _ in range(20):
            scores = fill_scores(rng, "softmax", 16, 64)
            case = Case(scores, 64, 8, {"decode_keep": keep}, is_decode=[True] * 16)
            total += len(active(run_route(case)))
        counts.append(total / 20)
    assert counts == sorted(counts, reverse=True)
    assert counts[2] < 0.8 * counts[0] and counts[4] < 0.35 * counts[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_than_k_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="decode-keep is 3, but a token has 2 experts"):
        route(torch.rand(4, 4), 2, CapacityConfig(decode_keep=3), backend=backend)
