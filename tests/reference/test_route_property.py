"""Properties of `vllm_capmoe.route`: bit for bit the naive routing, and its invariants.

The last part walks through every combination of flags with seeded cases.
Letters: T tokens, E experts, k experts per token, K' places in a row (see reference.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from routing_cases import (
    BACKEND,
    INF,
    METRICS,
    NAN,
    PRIORITIES,
    Case,
    assert_same,
    bits,
    cases,
    check,
    fill_scores,
    fill_topk,
    run_naive,
    run_route,
    seeded_case,
)

from vllm_capmoe import CapacityConfig, reference, route

# The same examples wherever the same modules are loaded (Hypothesis takes constants from
# them); no deadline, since CI's cores are slow.
COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


# ------------------------------------------------------------------- the oracle, checked by hand

WORKED = Case(
    scores=[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]],
    num_experts=2,
    top_k=1,
    config={"mode": "drop", "factor": 1.0, "min_capacity": 1},
)
WORKED_EXPANDED = WORKED.change(config={"mode": "expanded", "candidates": "global"})
HOT = WORKED.change(scores=[[0.6, 0.4]] * 4, config={"min_capacity": 1})  # C = 2


@pytest.mark.parametrize("run", [run_naive, run_route])
def test_worked_example_of_the_design(run: Any) -> None:
    drop = run(WORKED)
    assert np.asarray(drop.experts).tolist() == [[0], [0], [-1], [1]]
    assert np.asarray(drop.load_before).tolist() == [3, 1]
    assert np.asarray(drop.load_after).tolist() == [2, 1]
    assert drop.capacity == 2
    expanded = run(WORKED_EXPANDED)
    assert np.asarray(expanded.experts).tolist() == [[0], [0], [1], [1]]
    assert np.asarray(expanded.load_after).tolist() == [2, 2]
    kept = [[np.float32(value)] for value in (0.9, 0.8, 0.3, 0.8)]
    assert bits(expanded.weights) == bits(kept)


@pytest.mark.parametrize("run", [run_naive, run_route])
@pytest.mark.parametrize(
    ("changes", "experts"),
    [
        ({}, [[0], [0], [-1], [-1]]),  # equal scores: lower tokens
        ({"config": {"metric": "order"}}, [[0], [0], [-1], [-1]]),
        ({"config": {"metric": "reverse-order"}}, [[-1], [-1], [0], [0]]),
        # Text before images, and the other way round.
        (
            {"config": {"priority": "image-first"}, "is_image": [True, True, False, True]},
            [[0], [-1], [0], [-1]],
        ),
        (
            {"config": {"priority": "text-first"}, "is_image": [False, True, False, True]},
            [[-1], [0], [-1], [0]],
        ),
        # The decode token is seated first, whatever its place; padding is no token (T=3, C=2).
        ({"is_decode": [False, False, False, True]}, [[0], [-1], [-1], [0]]),
        ({"is_padding": [True, False, False, False]}, [[-1], [0], [0], [-1]]),
        # Two requests of two tokens: C = 1 each.
        (
            {"config": {"scope": "request"}, "request_ids": [5, 9, 5, 9]},
            [[0], [0], [-1], [-1]],
        ),
        # One bin of both experts: ceil(2 * 0.5 * 4 * 1 / 2) = 2 seats.
        (
            {"config": {"level": "device", "factor": 0.5}, "expert_device": [0, 0]},
            [[0], [0], [-1], [-1]],
        ),
        # Enough room (C = 4 = T), or too few tokens for a limit.
        ({"config": {"factor": 2.0}}, [[0], [0], [0], [0]]),
        ({"config": {"min_tokens": 5}}, [[0], [0], [0], [0]]),
        # Expanded: two more places for every token, cut to one by max_experts auto (= k).
        ({"config": {"mode": "expanded"}}, [[0], [0], [-1], [-1]]),
        (
            {"config": {"mode": "expanded", "max_experts": "none"}},
            [[0, 1], [0, 1], [-1, -1], [-1, -1]],
        ),
    ],
)
def test_small_cases_worked_by_hand(run: Any, changes: dict[str, Any], experts: Any) -> None:
    assert np.asarray(run(HOT.change(**changes)).experts).tolist() == experts


def test_oracle_draws_as_the_written_hash() -> None:
    """MurmurHash3_x86_32 of no bytes is fmix32(seed); its published value for seed 1 is below."""
    assert reference.fmix32(0) == 0
    assert reference.fmix32(1) == 0x514E28B7
    assert reference.draw(0, 0, 1) == 0x514E28B7
    assert reference.draw(-1, 2, 3) == reference.draw(2**32 - 1, 2, 3)


def test_oracle_limit_is_exact_for_the_factor_as_written() -> None:
    """1.1 * 10 is 11.000000000000002 in floats; the limit is 11, not 12."""
    assert reference.capacity_of(1, 1.1, 40, 2, 8, 1) == 11
    assert reference.capacity_of(3, 1.1, 40, 2, 8, 1) == 33
    assert reference.capacity_of(2, 0.001, 4, 1, 8, 3) == 6


# ----------------------------------------------------------------------- route against the oracle

EMPTY = Case(scores=[], num_experts=3, top_k=2, config={"mode": "expanded", "min_capacity": 1})
SHARP = WORKED.change(config={"factor": 0.001})
# One expert is left to a token of two: the unused place is +0.0, whatever the sum is.
LEFT = Case([[-1, -2], [-2, -1]], 2, 2, {"mode": "drop", "factor": 0.5, "min_capacity": 1})
LEFT = LEFT.change(config={"renormalize": "always"})
LEFT_NAN = dataclasses.replace(
    LEFT, scores=[[NAN, 0.1, 0.0], [0.0, 0.2, 0.3]], num_experts=3, topk_ids=[[0, 1], [1, 2]]
)


@settings(max_examples=1500, **COMMON)
@given(cases(max_tokens=12))
@example(EMPTY)
@example(EMPTY.change(config={"scope": "request"}, request_ids=[]))
@example(EMPTY.change(config={"level": "device"}, expert_device=[0, 1, 1], token_device=[]))
@example(EMPTY.change(config={"mode": "off"}, topk_ids=[]))
@example(WORKED.change(config={"mode": "off"}, token_device=[0, 1, 2, 3]))
@example(WORKED.take([0]))
@example(WORKED.take([3, 1]))
@example(WORKED.change(top_k=2))
@example(WORKED_EXPANDED.change(top_k=2))
@example(SHARP)
@example(SHARP.change(config={"mode": "expanded", "max_experts": "none"}))
@example(WORKED.change(config={"factor": INF}))
@example(WORKED.change(config={"factor": 1e300, "level": "device"}, expert_device=[0, 3]))
@example(WORKED.change(config={"factor": 1e-300}))
@example(WORKED.change(config={"min_capacity": 2**40}))
@example(WORKED.change(config={"expanded_experts": 2**40, "mode": "expanded"}))
@example(WORKED.change(config={"max_experts": 2**40, "mode": "expanded"}))
@example(LEFT)
@example(LEFT_NAN)
@example(HOT)
@example(HOT.change(seed=-5, config={"metric": "random"}))
@example(HOT.change(is_padding=[True] * 4))
@example(HOT.change(is_decode=[True] * 4))
@example(HOT.change(is_decode=[True, True, True, False]))
@example(HOT.change(scores=[[NAN, NAN]] * 4, config={"renormalize": "always"}))
@example(HOT.change(scores=[[0.0, -0.0]] * 4, config={"renormalize": "always"}))
@example(HOT.change(scores=[[-0.0, 0.0]] * 4, top_k=2, config={"renormalize": "always"}))
@example(HOT.change(scores=[[1.0, -1.0]] * 4, top_k=2, config={"renormalize": "always"}))
@example(HOT.change(scores=[[INF, -INF]] * 4, top_k=2, config={"renormalize": "always"}))
def test_route_equals_the_oracle(case: Case) -> None:
    check(case)


@settings(max_examples=700, **COMMON)
@given(cases(max_tokens=40, bite=True))
def test_route_equals_the_oracle_under_tight_limits(case: Case) -> None:
    check(case)


@settings(max_examples=300, **COMMON)
@given(cases(max_tokens=16, bite=True, mode="expanded", scope="request"))
def test_route_equals_the_oracle_per_request(case: Case) -> None:
    check(case)


@settings(max_examples=700, **COMMON)
@given(cases(max_tokens=24, bite=True, mode="reroute"))
def test_reroute_equals_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("style", ["softmax", "few", "hot"])
@pytest.mark.parametrize("scope", ["batch", "request"])
def test_route_equals_the_oracle_on_a_larger_step(scope: str, style: str) -> None:
    rng = random.Random(f"{scope} {style}")
    T, E = 257, 60
    for metric in METRICS:
        config = {"metric": metric, "scope": scope, "level": "device", "max_experts": "none"}
        config |= {"mode": "expanded", "factor": 0.7, "candidates": "local", "min_capacity": 1}
        case = seeded_case(rng, config, T, E, 6).change(scores=fill_scores(rng, style, T, E))
        check(case)
        check(case.change(config={"level": "expert", "candidates": "global"}))
        check(case.change(config={"mode": "drop"}))
        check(case.change(config={"mode": "reroute"}))
        check(case.change(config={"mode": "reroute", "level": "expert", "candidates": "global"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_need_not_be_contiguous(dtype: torch.dtype) -> None:
    rng = random.Random(3)
    case = Case(fill_scores(rng, "softmax", 12, 6), 6, 2, {"mode": "expanded", "min_capacity": 1})
    wide = torch.full((6, 24), NAN, dtype=dtype)
    wide[:, ::2] = torch.tensor(case.scores, dtype=dtype).T
    got = route(wide.T[::2], 2, CapacityConfig(**case.config), backend=BACKEND)
    assert_same(case, got, run_naive(case))


# ------------------------------------------------------- invariants, without help from the oracle


def held_rows(got: Any) -> list[set[int]]:
    return [{e for e in row if e >= 0} for row in got.experts.tolist()]


def masks(case: Case) -> tuple[list[bool], list[bool]]:
    """(real, decode) flags of all tokens; padding is neither."""
    T = len(case.scores)
    real = [not pad for pad in case.is_padding or [False] * T]
    decode = case.is_decode or [False] * T
    return real, [r and bool(d) for r, d in zip(real, decode, strict=True)]


@settings(max_examples=400, **COMMON)
@given(cases(max_tokens=24))
def test_rows_are_well_formed(case: Case) -> None:
    """Distinct experts, best first, then -1 with weight +0.0; loads are counts of the rows."""
    got = run_route(case)
    scores = case.tensors()["scores"].to(torch.float32).tolist()
    real, _ = masks(case)
    load = [0] * case.num_experts
    for t, row in enumerate(got.experts.tolist()):
        held = [e for e in row if e >= 0]
        assert row == held + [-1] * (len(row) - len(held))
        assert len(set(held)) == len(held)
        assert all(e < case.num_experts for e in held)
        assert real[t] or not held
        for a, b in itertools.pairwise(held):
            x, y = scores[t][a], scores[t][b]
            assert x > y or (x == y and a < b) or (math.isnan(y) and (not math.isnan(x) or a < b))
        for e in held:
            load[e] += 1
        assert all(word == 0 for word in bits(got.weights[t : t + 1])[0][len(held) :])
    assert got.load_after.tolist() == load
    assert int(got.load_before.sum()) == sum(real) * case.top_k


@settings(max_examples=400, **COMMON)
@given(cases(max_tokens=24, bite=True))
def test_no_load_passes_its_limit(case: Case) -> None:
    """Per bin: load <= max(capacity, load of decode tokens); decode tokens keep their top-k."""
    got = run_route(case)
    plain = held_rows(run_route(case.change(config={"mode": "off"})))
    held = held_rows(got)
    real, decode = masks(case)
    for t in range(len(held)):
        if decode[t] or got.capacity is None:
            assert held[t] == plain[t]
        if case.config["mode"] == "drop":
            assert held[t] <= plain[t]
    if got.capacity is None:
        return
    by_device = case.config["level"] == "device"
    by_request = case.config["scope"] == "request"
    ids = case.request_ids if by_request else [0] * len(held)
    assert ids is not None
    names = sorted({ids[t] for t in range(len(held)) if real[t]})
    limits = np.asarray(got.capacity).tolist()
    limits = limits if by_request else [limits]
    assert len(limits) == len(names)
    for name, limit in zip(names, limits, strict=True):
        rows = [t for t in range(len(held)) if real[t] and ids[t] == name]
        bin_of = case.expert_device if by_device else list(range(case.num_experts))
        assert bin_of is not None
        for b in range(max(bin_of) + 1):
            load = sum(bin_of[e] == b for t in rows for e in held[t])
            seated = sum(bin_of[e] == b for t in rows if decode[t] for e in held[t])
            assert load <= max(limit[b] if by_device else limit, seated)


def bin_loads(case: Case, held: list[set[int]]) -> dict[int, list[int]]:
    """The load of every bin, by request (one request 0 at scope batch)."""
    bin_of = case.expert_device if case.config["level"] == "device" else range(case.num_experts)
    ids = case.request_ids if case.config["scope"] == "request" else [0] * len(held)
    assert bin_of is not None and ids is not None
    loads = {name: [0] * (max(bin_of) + 1) for name in ids}
    for name, experts in zip(ids, held, strict=True):
        for e in experts:
            loads[name][bin_of[e]] += 1
    return loads


def assert_none_above_the_busiest(case: Case, got: Any) -> None:
    """No bin of a group holds more than the largest load of one before the limit."""
    before = bin_loads(case, held_rows(run_route(case.change(config={"mode": "off"}))))
    for name, loads in bin_loads(case, held_rows(got)).items():
        assert max(loads) <= max(before[name])


@settings(max_examples=300, **COMMON)
@given(cases(max_tokens=24, bite=True, mode="expanded", fill="busiest"))
def test_expanded_drop_fills_no_bin_above_the_busiest(case: Case) -> None:
    assert_none_above_the_busiest(case, run_route(case))


@settings(max_examples=400, **COMMON)
@given(cases(max_tokens=24, bite=True, mode="reroute"))
def test_reroute_takes_from_nobody_and_gives_what_was_lost(case: Case) -> None:
    """Token Drop's seats stay; at most k each; the fill rule is nothing to it. Limits: above."""
    got, drop = run_route(case), run_route(case.change(config={"mode": "drop"}))
    assert tuple(got.experts.shape) == (len(case.scores), case.top_k)
    assert got.dropped == drop.dropped and 0 <= got.expanded <= got.dropped
    assert all(kept <= held for kept, held in zip(held_rows(drop), held_rows(got), strict=True))
    assert_none_above_the_busiest(case, got)
    for fill in ("busiest", "capacity"):
        other = run_route(case.change(config={"fill": fill}))
        assert other.experts.tolist() == got.experts.tolist()


@settings(max_examples=300, **COMMON)
@given(cases(max_tokens=24, bite=True, mode="drop", level="expert", scope="batch", metric="score"))
def test_token_drop_keeps_the_best_and_no_seat_stays_empty(case: Case) -> None:
    """Each expert keeps min(takers, seats) prompt tokens, none worse than one it turned away."""
    got = run_route(case)
    if got.capacity is None:
        return
    plain = held_rows(run_route(case.change(config={"mode": "off"})))
    held = held_rows(got)
    scores = case.tensors()["scores"].to(torch.float32).tolist()
    real, decode = masks(case)
    last = {"uniform": None, "image-first": True, "text-first": False}[case.config["priority"]]

    def bid(t: int, e: int) -> tuple[bool, bool, float]:
        """Lower is seated first: numbers before NaN, then the modality, then the score."""
        late = case.is_image is not None and case.is_image[t] == last
        return (True, late, 0.0) if math.isnan(scores[t][e]) else (False, late, -scores[t][e])

    for e in range(case.num_experts):
        takers = [t for t in range(len(held)) if real[t] and not decode[t] and e in plain[t]]
        seated = sum(decode[t] and e in plain[t] for t in range(len(held)))
        kept = [t for t in takers if e in held[t]]
        assert len(kept) == min(len(takers), max(0, got.capacity - seated))
        for t, other in itertools.product(kept, set(takers) - set(kept)):
            assert bid(t, e) <= bid(other, e)


@settings(max_examples=200, **COMMON)
@given(cases(max_tokens=24, factor=INF))
def test_infinite_factor_is_mode_off(case: Case) -> None:
    got, off = run_route(case), run_route(case.change(config={"mode": "off"}))
    assert got.capacity is None and off.capacity is None
    assert held_rows(got) == held_rows(off)
    assert got.load_before.tolist() == off.load_before.tolist()
    assert got.load_after.tolist() == off.load_after.tolist()


@settings(max_examples=200, **COMMON)
@given(cases(max_tokens=16), st.integers(0, 2**32))
def test_padding_changes_nothing(case: Case, noise: int) -> None:
    """Padded rows anywhere among the tokens leave rows, loads and limits as they are."""
    rng = random.Random(noise)
    T, extra = len(case.scores), rng.randint(1, 4)
    slots = [True] * T + [False] * extra
    rng.shuffle(slots)
    own = iter(range(T))
    rows = [next(own) if slot else T for slot in slots]
    blank: dict[str, Any] = {
        "scores": case.scores + fill_scores(rng, "special", 1, case.num_experts),
        "is_padding": (case.is_padding or [False] * T) + [True],
    }
    if case.topk_ids is not None:
        blank["topk_ids"] = case.topk_ids + fill_topk(rng, 1, case.num_experts, case.top_k)
    for name, value in (("is_decode", True), ("is_image", False), ("request_ids", -99)):
        if getattr(case, name) is not None:
            blank[name] = [*getattr(case, name), value]
    if case.token_device is not None:
        blank["token_device"] = [*case.token_device, 0]
    got, padded = run_route(case), run_route(case.change(**blank).take(rows))
    keep = [index for index, t in enumerate(rows) if t < T]
    assert padded.experts[keep].tolist() == got.experts.tolist()
    assert bits(padded.weights[keep]) == bits(got.weights)
    assert padded.load_before.tolist() == got.load_before.tolist()
    assert padded.load_after.tolist() == got.load_after.tolist()
    assert np.array_equal(np.asarray(padded.capacity), np.asarray(got.capacity))


@settings(max_examples=300, **COMMON)
@given(cases(max_tokens=20, bite=True, scope="request", min_tokens=0), st.integers(0, 2**32))
def test_a_request_never_sees_the_others(case: Case, noise: int) -> None:
    """Scope request: others may change, move, come or go; a request's rows stay the same."""
    rng = random.Random(noise)
    assert case.request_ids is not None or case.config["mode"] == "off"
    if case.request_ids is None:
        return
    T, E = len(case.scores), case.num_experts
    mine = rng.choice(case.request_ids)
    own = [t for t in range(T) if case.request_ids[t] == mine]
    others = [t for t in range(T) if case.request_ids[t] != mine]
    others = [rng.choice(others) for _ in range(rng.randint(0, T))] if others else []
    slots = [True] * len(own) + [False] * len(others)
    rng.shuffle(slots)
    left, right = iter(own), iter(others)
    moved = case.take([next(left) if slot else next(right) for slot in slots])
    fresh = fill_scores(rng, "special", len(slots), E)
    flip = {
        name: [
            value if slot else rng.random() < 0.5
            for slot, value in zip(slots, getattr(moved, name), strict=True)
        ]
        for name in ("is_padding", "is_decode", "is_image")
        if getattr(case, name) is not None
    }
    if moved.topk_ids is not None and "is_padding" in flip:
        # Padding may have any top-k, -1 too: such a row can't become a real one.
        valid = [all(0 <= expert < E for expert in row) for row in moved.topk_ids]
        flip["is_padding"] = [
            padding or not good for padding, good in zip(flip["is_padding"], valid, strict=True)
        ]
    scores = [moved.scores[t] if slot else fresh[t] for t, slot in enumerate(slots)]
    before, after = run_route(case), run_route(moved.change(scores=scores, **flip))
    keep = [index for index, slot in enumerate(slots) if slot]
    assert after.experts[keep].tolist() == before.experts[own].tolist()
    assert bits(after.weights[keep]) == bits(before.weights[own])


@settings(max_examples=200, **COMMON)
@given(cases(max_tokens=24, bite=True, renormalize="always"))
def test_renormalised_weights_sum_to_one(case: Case) -> None:
    """For positive scores: a token with any expert sums to 1, one without to 0."""
    rng = random.Random(case.seed)
    scores = fill_scores(rng, "softmax", len(case.scores), case.num_experts)
    got = run_route(case.change(scores=scores, dtype="float32"))
    for total, held in zip(got.weights.sum(1).tolist(), held_rows(got), strict=True):
        # 16 float32 roundings of at most 2**-24 each, twice (division and this sum).
        assert abs(total - bool(held)) <= 2**-19


# --------------------------------------------------------------------- every combination of flags

INNER = list(
    itertools.product(
        ["auto", "local", "global"],  # candidates
        ["auto", "always", "never"],  # renormalize
        PRIORITIES,
        ["auto", "none", 0, 1],  # max_experts; an int is added to k
    )
)


@pytest.mark.parametrize("scope", ["batch", "request"])
@pytest.mark.parametrize("level", ["expert", "device"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mode", ["off", "drop", "expanded", "reroute"])
def test_every_combination_of_flags(mode: str, metric: str, level: str, scope: str) -> None:
    outer = {"mode": mode, "metric": metric, "level": level, "scope": scope}
    rng = random.Random(repr(outer))
    limited = changed = 0
    for candidates, renormalize, priority, most in INNER:
        for _ in range(2 if mode in ("expanded", "reroute") else 1):
            E, T = rng.randint(2, 8), rng.randint(4, 14)
            k = rng.randint(1, min(E, 4))
            config = {
                **outer,
                "fill": rng.choice(["auto", "busiest", "capacity"]),
                "candidates": candidates,
                "renormalize": renormalize,
                "priority": priority,
                "max_experts": k + most if isinstance(most, int) else most,
                "expanded_experts": rng.choice([None, None, "all", 1, 2]),
                "factor": rng.choice([0.1, 0.25, 0.5, 1.0, 1.1]),
                "min_capacity": rng.choice([1, 1, 2]),
            }
            if scope == "batch":
                config["decode_keep"] = rng.choice(["off", "auto", 1, k])
            got = check(seeded_case(rng, config, T, E, k))
            limited += got.capacity is not None
            changed += got.dropped > 0
    # A guard of the test itself: limits must be in effect and bite in a good share of the cases.
    assert (limited > 50 and changed > 40) if mode != "off" else limited == changed == 0
