"""Capacity-aware routing told slowly, with loops and lists: the oracle of the property tests.

Source: arXiv 2503.05066, algorithms 1 (Token Drop) and 2 (Expanded Drop), with this project's rules
for ties, decode tokens, padding, requests and devices, its fill rule and its mode reroute. Nothing
is shared with the package: no torch, no vectorised arithmetic. Limits are exact fractions, weights
are numpy float32 scalars.

Letters: T tokens, E experts, k experts per token, C capacity, m extra candidates, D devices,
R requests, K' places in a row. A `pair` is (row of a token, expert).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

NO_LIMIT = 2**31 - 1

DEFAULTS: dict[str, Any] = {
    "mode": "off",
    "factor": 1.5,
    "metric": "score",
    "level": "expert",
    "scope": "batch",
    "candidates": "auto",
    "expanded_experts": None,
    "fill": "auto",
    "max_experts": "auto",
    "renormalize": "auto",
    "priority": "uniform",
    "min_capacity": 4,
    "min_tokens": 0,
    "decode_keep": "off",
}


class NaiveRouting(NamedTuple):
    """What `naive_route` returns; shapes as of `vllm_capmoe.route`, in lists."""

    weights: list[list[np.float32]]  # [T][K']
    experts: list[list[int]]  # [T][K'], -1 where unused
    load_before: list[int]  # [E]
    load_after: list[int]  # [E]
    capacity: Any  # None, int, [D], [R] or [R][D]


def best_first(score: float) -> tuple[int, float]:
    """A key that sorts scores from best to worst: NaN behind everything, -0.0 equal to 0.0."""
    if math.isnan(score):
        return (1, 0.0)
    return (0, -score)


def fmix32(x: int) -> int:
    """The finaliser of murmur3 on 32 bits."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def draw(seed: int, token_index: int, expert: int) -> int:
    """The random metric: a hash of (seed, token index, expert); the highest draws are kept."""
    by_seed = fmix32(seed % 2**32)
    by_token = fmix32((by_seed + token_index) % 2**32)
    return fmix32((by_token + expert) % 2**32)


def limit_of(experts_in_bin: int, factor: float, tokens: int, k: int, n: int, floor: int) -> int:
    """C of a bin that holds `experts_in_bin` of the n experts; `factor` is finite, as written."""
    exact = experts_in_bin * Fraction(repr(factor)) * tokens * k / n
    return max(experts_in_bin * floor, math.ceil(exact))


def naive_route(
    scores: Sequence[Sequence[float]],
    top_k: int,
    config: Mapping[str, Any],
    *,
    num_experts: int,
    topk_ids: Sequence[Sequence[int]] | None = None,
    is_padding: Sequence[bool] | None = None,
    is_decode: Sequence[bool] | None = None,
    request_ids: Sequence[int] | None = None,
    is_image: Sequence[bool] | None = None,
    expert_device: Sequence[int] | None = None,
    token_device: Sequence[int] | None = None,
    renormalize: bool = False,
    seed: int = 0,
) -> NaiveRouting:
    """Route T tokens; the arguments are those of `vllm_capmoe.route`, as lists.

    `config` holds the keys that differ from `DEFAULTS`; `num_experts` is E (T may be 0).
    """
    want = {**DEFAULTS, **config}
    factor = float(want["factor"])
    with np.errstate(over="ignore"):
        S = [[np.float32(score) for score in row] for row in scores]
    T, E, k = len(S), num_experts, top_k
    padding = [False] * T if is_padding is None else is_padding
    decode = [False] * T if is_decode is None else is_decode
    real = [t for t in range(T) if not padding[t]]
    prompt = {t for t in real if not decode[t]}

    def by_score(t: int, experts: Any) -> list[int]:
        return sorted(experts, key=lambda e: (best_first(float(S[t][e])), e))

    # Step 1: the top-k of every real token.
    top: dict[int, list[int]] = {}
    for t in real:
        top[t] = by_score(t, range(E))[:k] if topk_ids is None else by_score(t, topk_ids[t])

    # Decode keep: a decode token keeps its best, and shares what the step loads for the rest.
    decoding = [t for t in real if t not in prompt]
    k0 = want["decode_keep"]
    if k0 == "auto":
        share = Fraction(3, 4)
        if len(decoding) >= 8:
            share = Fraction(5, 8)
        if len(decoding) >= 16:
            share = Fraction(1, 2)
        k0 = math.ceil(share * k)
    if k0 == "off":
        k0 = k
    loaded = {e for t in prompt for e in top[t]} | {e for t in decoding for e in top[t][:k0]}
    claims = dict(top)  # what a token holds where nothing is dropped
    for t in decoding:
        mine = top[t][:k0]
        others = by_score(t, [e for e in loaded if e not in mine])
        others += [e for e in top[t] if e not in mine and e not in others]
        claims[t] = by_score(t, mine + others[: k - k0])

    # Step 2: whose tokens are counted together, and in which order.
    groups: list[list[int]] = [real]
    if want["mode"] != "off" and want["scope"] == "request":
        assert request_ids is not None
        ids = sorted({request_ids[t] for t in real})
        groups = [[t for t in real if request_ids[t] == i] for i in ids]

    # Step 3: the bins. Bin b of a group is one expert, or all experts of one device.
    bin_of = list(range(E))
    if want["mode"] != "off" and want["level"] == "device":
        assert expert_device is not None
        bin_of = list(expert_device)
    bins = range(max(bin_of) + 1)
    size = [bin_of.count(b) for b in bins]

    # Step 4: the widths, from shapes and configuration alone.
    local = token_device is not None
    if want["candidates"] != "auto":
        local = want["candidates"] == "local"
    m = want["expanded_experts"]
    if m is None:
        m = "all" if local else k
    if m == "all":
        m = E
    most: int | None = want["max_experts"] if isinstance(want["max_experts"], int) else None
    if want["max_experts"] == "auto" and len(set(expert_device or [0])) == 1:
        most = k
    width = k
    if want["mode"] == "expanded":
        reach = E - k
        if local:
            assert expert_device is not None
            reach = max(list(expert_device).count(d) for d in expert_device)
        width = min(E, k + min(m, reach))
        if most is not None:
            width = min(width, most)

    # Step 5: group by group, who holds what.
    held: dict[int, list[int]] = {t: list(claims[t]) for t in real}
    limits: list[list[int] | None] = []
    for group in groups:
        limit = None
        if want["mode"] != "off" and not math.isinf(factor) and len(group) >= want["min_tokens"]:
            floor = want["min_capacity"]
            limit = [limit_of(n, factor, len(group), k, E, floor) for n in size]
            if all(limit[b] >= len(group) * min(k, size[b]) for b in bins):
                limit = None  # no load can pass it
            elif not any(t in prompt for t in group):
                limit = None  # decode tokens are never dropped
        if limit is not None and want["mode"] != "drop":
            # Nobody is filled above the busiest, but in Expanded Drop under fill `capacity`.
            load = [sum(bin_of[e] == b for t in group for e in claims[t]) for b in bins]
            if want["mode"] == "reroute" or want["fill"] != "capacity":
                limit = [min(number, max(load)) for number in limit]
        limits.append(limit)
        if limit is None:
            continue

        # Decode tokens sit down first; what they leave is for the prompt tokens.
        seats = list(limit)
        for t in group:
            if t not in prompt:
                for e in claims[t]:
                    seats[bin_of[e]] = max(0, seats[bin_of[e]] - 1)

        # Candidates of the prompt tokens.
        pairs: list[tuple[int, int]] = []
        for t in group:
            if t not in prompt:
                continue
            pairs += [(t, e) for e in top[t]]
            if want["mode"] == "expanded":
                others = [e for e in range(E) if e not in top[t]]
                if local:
                    assert expert_device is not None and token_device is not None
                    others = [e for e in others if expert_device[e] == token_device[t]]
                pairs += [(t, e) for e in by_score(t, others)[:m]]
            held[t] = []

        # Every bin fills its seats, the best candidate first.
        place = {t: index for index, t in enumerate(group)}

        def claim(pair: tuple[int, int], place: dict[int, int] = place) -> tuple[Any, ...]:
            t, e = pair
            overflows_first = False
            if want["priority"] != "uniform":
                assert is_image is not None
                overflows_first = bool(is_image[t]) == (want["priority"] == "image-first")
            metric: Any = {
                "score": best_first(float(S[t][e])),
                "order": place[t],
                "reverse-order": -place[t],
                "random": -draw(seed, place[t], e),
            }[want["metric"]]
            never_over_a_number = math.isnan(float(S[t][e]))
            return (never_over_a_number, overflows_first, metric, place[t], e)

        for t, e in sorted(pairs, key=claim):
            if seats[bin_of[e]] > 0:
                seats[bin_of[e]] -= 1
                held[t].append(e)

        # Reroute: a token that lost l bids makes l more where seats are free, and bins choose.
        if want["mode"] == "reroute":
            more: list[tuple[int, int]] = []
            for t in group:
                if t not in prompt:
                    continue
                others = [e for e in range(E) if e not in top[t] and seats[bin_of[e]] > 0]
                if local:
                    assert expert_device is not None and token_device is not None
                    others = [e for e in others if expert_device[e] == token_device[t]]
                more += [(t, e) for e in by_score(t, others)[: k - len(held[t])]]
            for t, e in sorted(more, key=claim):
                if seats[bin_of[e]] > 0:
                    seats[bin_of[e]] -= 1
                    held[t].append(e)

        # A token over max-experts gives back its worst; nobody takes those seats.
        for t in group:
            if t in prompt and want["mode"] == "expanded" and most is not None:
                held[t] = by_score(t, held[t])[:most]

    # Step 6: rows, weights and loads.
    scale = want["renormalize"] == "always" or (want["renormalize"] == "auto" and renormalize)
    weights: list[list[np.float32]] = []
    experts: list[list[int]] = []
    load_before, load_after = [0] * E, [0] * E
    for t in range(T):
        row = by_score(t, held.get(t, []))
        w = [S[t][e] for e in row]
        if scale and w:
            with np.errstate(all="ignore"):
                total = w[0]
                for value in w[1:]:
                    total = total + value
                if total != 0:
                    w = [value / total for value in w]
        unused = width - len(row)
        weights.append(w + [np.float32(0.0)] * unused)
        experts.append(row + [-1] * unused)
        for e in top.get(t, []):
            load_before[e] += 1
        for e in row:
            load_after[e] += 1

    # Step 7: the limit as it is reported.
    capacity: Any = None
    if any(limit is not None for limit in limits):
        rows = [[NO_LIMIT] * len(bins) if limit is None else limit for limit in limits]
        if want["level"] == "expert":
            rows = [row[0] for row in rows]  # the same for every expert
        capacity = rows if want["scope"] == "request" else rows[0]
    return NaiveRouting(weights, experts, load_before, load_after, capacity)
