"""The paper to be read: the method of arXiv 2503.05066 in loops, lists and exact numbers.

    T          tokens of a group (real ones, padding is nowhere)       S[t][e]  gating score
    E, k       experts of the layer, experts per token                 gamma    capacity factor
    N_e        load of expert e: the tokens that it is assigned        C        capacity of a bin
    m          extra candidates per token in Expanded Drop

The steps, a function each:

    capacity_of      C = ceil(gamma * T * k / E)
    token_drop       algorithm 1: top-k, and every expert keeps its C best
    expanded_drop    algorithm 2: m more candidates per token, and every expert keeps its C best
    reroute          this project's: what Token Drop took goes once to where seats are free
    decode_keep      this project's: decode tokens share the experts that a step loads
    route_by_loops   the whole, with `vllm_capmoe.route`'s rules for ties, decode tokens, padding,
                     requests and devices

It is what `torch_routing.py` and the kernels are held to, integer by integer, so nothing is shared
with them: no torch, no vectorised arithmetic. Limits are fractions, weights numpy's float32.

A *pair* is (token, expert): a bid for a seat. A *bin* has seats: an expert, or all experts of a
device. A *group* is the tokens that are counted together: the step, or one request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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

Pair = tuple[int, int]
Held = dict[int, list[int]]  # the experts that a token holds


# --- The paper ------------------------------------------------------------------------------


def capacity_of(n: int, factor: float, T: int, k: int, E: int, floor: int) -> int:
    """C of a bin that holds n of the E experts; `factor` is finite, and meant as it is written."""
    return max(n * floor, math.ceil(n * Fraction(repr(factor)) * T * k / E))


def token_drop(step: Step, tokens: Sequence[int], seats: list[int]) -> Held:
    """Algorithm 1. Every token bids for its top-k, and every bin keeps the best bids."""
    bids = [(t, e) for t in tokens for e in step.top[t]]
    return give(step, bids, seats, {t: [] for t in tokens})


def expanded_drop(step: Step, tokens: Sequence[int], seats: list[int]) -> Held:
    """Algorithm 2. Every token bids for its top-k and for its m best others."""
    bids = [(t, e) for t in tokens for e in step.top[t] + step.others(t)[: step.m]]
    held = give(step, bids, seats, {t: [] for t in tokens})
    # A token over max-experts gives back its worst; nobody takes those seats.
    return {t: step.by_score(t, experts)[: step.most] for t, experts in held.items()}


def reroute(step: Step, tokens: Sequence[int], seats: list[int]) -> Held:
    """Token Drop; then a token that lost l bids makes l more, where seats are free."""
    held = token_drop(step, tokens, seats)
    bids: list[Pair] = []
    for t in tokens:
        free = [e for e in step.others(t) if seats[step.bin_of[e]] > 0]
        bids += [(t, e) for e in free[: step.k - len(held[t])]]
    return give(step, bids, seats, held)


def give(step: Step, bids: list[Pair], seats: list[int], held: Held) -> Held:
    """Every bin gives its seats to the best of the bids. Changes `seats` and `held`."""
    for t, e in sorted(bids, key=step.rank):
        if seats[step.bin_of[e]] > 0:
            seats[step.bin_of[e]] -= 1
            held[t].append(e)
    return held


MODES = {"drop": token_drop, "expanded": expanded_drop, "reroute": reroute}


# --- Who is better --------------------------------------------------------------------------


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


@dataclass
class Step:
    """What the algorithms read of a step.

    top: the top-k of each real token, best first. bin_of: the bin of an expert. want: the
    settings. place: the position of a token in its group. m: extra candidates. most: what a token
    may hold; None for no bound. local: candidates are on the token's own device.
    """

    S: list[list[np.float32]]
    k: int
    want: Mapping[str, Any]
    top: dict[int, list[int]]
    bin_of: Sequence[int]
    place: dict[int, int]
    m: int
    most: int | None
    local: bool
    is_image: Sequence[bool] | None
    expert_device: Sequence[int] | None
    token_device: Sequence[int] | None
    seed: int

    def by_score(self, t: int, experts: Iterable[int]) -> list[int]:
        return sorted(experts, key=lambda e: (best_first(float(self.S[t][e])), e))

    def others(self, t: int) -> list[int]:
        """The experts outside of a token's top-k that it may bid for, best first."""
        others = [e for e in range(len(self.bin_of)) if e not in self.top[t]]
        if self.local:
            assert self.expert_device is not None and self.token_device is not None
            others = [e for e in others if self.expert_device[e] == self.token_device[t]]
        return self.by_score(t, others)

    def rank(self, pair: Pair) -> tuple[Any, ...]:
        """Bids in the order in which a bin takes them. A NaN never wins over a number."""
        t, e = pair
        overflows_first = False
        if self.want["priority"] != "uniform":
            assert self.is_image is not None
            overflows_first = bool(self.is_image[t]) == (self.want["priority"] == "image-first")
        metric: Any = {
            "score": best_first(float(self.S[t][e])),
            "order": self.place[t],
            "reverse-order": -self.place[t],
            "random": -draw(self.seed, self.place[t], e),
        }[self.want["metric"]]
        return (math.isnan(float(self.S[t][e])), overflows_first, metric, self.place[t], e)


# --- Decode tokens --------------------------------------------------------------------------


def decode_keep(step: Step, prompt: Sequence[int], decoding: Sequence[int]) -> Held:
    """What decode tokens hold. Each keeps its k0 best, and shares what the step loads for the rest.

    (Oncescu et al., arXiv 2511.02237, filled up to k.)
    """
    k, k0 = step.k, step.want["decode_keep"]
    if k0 == "auto":
        share = Fraction(7, 8)
        if len(decoding) >= 8:
            share = Fraction(3, 4)
        if len(decoding) >= 16:
            share = Fraction(5, 8)
        k0 = math.ceil(share * k)
    if k0 == "off":
        k0 = k
    kept = {t: step.top[t][:k0] for t in decoding}
    loaded = {e for t in prompt for e in step.top[t]} | {e for t in decoding for e in kept[t]}
    held = {}
    for t in decoding:
        others = step.by_score(t, [e for e in loaded if e not in kept[t]])
        others += [e for e in step.top[t] if e not in kept[t] and e not in others]
        held[t] = step.by_score(t, kept[t] + others[: k - k0])
    return held


# --- The whole ------------------------------------------------------------------------------


class LoopRouting(NamedTuple):
    """What `route_by_loops` returns; shapes as of `vllm_capmoe.route`, in lists."""

    weights: list[list[np.float32]]  # [T][K']
    experts: list[list[int]]  # [T][K'], -1 where unused
    load_before: list[int]  # [E]
    load_after: list[int]  # [E]
    capacity: Any  # None, int, [D], [R] or [R][D]


def route_by_loops(
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
) -> LoopRouting:
    """Route T rows; the arguments are those of `vllm_capmoe.route`, as lists.

    `config` holds the keys that differ from `DEFAULTS`; `num_experts` is E (T may be 0).
    """
    want = {**DEFAULTS, **config}
    with np.errstate(over="ignore"):
        S = [[np.float32(score) for score in row] for row in scores]
    T, E, k, drops = len(S), num_experts, top_k, want["mode"] != "off"
    real = [t for t in range(T) if is_padding is None or not is_padding[t]]
    decoding = [t for t in real if is_decode is not None and is_decode[t]]
    prompt = [t for t in real if t not in decoding]

    # Whose tokens are counted together, and in which order.
    groups = [real]
    if drops and want["scope"] == "request":
        assert request_ids is not None
        ids = sorted({request_ids[t] for t in real})
        groups = [[t for t in real if request_ids[t] == i] for i in ids]

    # The bins of a group: each expert, or all experts of each device.
    bin_of: Sequence[int] = range(E)
    if drops and want["level"] == "device":
        assert expert_device is not None
        bin_of = expert_device
    bins = range(max(bin_of) + 1)
    size = [list(bin_of).count(b) for b in bins]

    local = token_device is not None
    if want["candidates"] != "auto":
        local = want["candidates"] == "local"
    m, most, width = widths(want, k, E, local, expert_device)
    place = {t: index for group in groups for index, t in enumerate(group)}
    step = Step(
        S, k, want, {}, bin_of, place, m, most, local, is_image, expert_device, token_device, seed
    )
    for t in real:
        experts = range(E) if topk_ids is None else topk_ids[t]
        step.top[t] = step.by_score(t, experts)[:k]
    held: Held = {**step.top, **decode_keep(step, prompt, decoding)}

    limits: list[list[int] | None] = []
    for group in groups:
        limit = limits_of(step, group, prompt, size, held) if drops else None
        limits.append(limit)
        if limit is not None:
            # Decode tokens sit down first; what they leave is for the prompt tokens.
            taken = [bin_of[e] for t in group if t in decoding for e in held[t]]
            seats = [max(0, limit[b] - taken.count(b)) for b in bins]
            held |= MODES[want["mode"]](step, [t for t in group if t in prompt], seats)

    # Rows, weights and loads.
    scale = want["renormalize"] == "always" or (want["renormalize"] == "auto" and renormalize)
    rows = [step.by_score(t, held.get(t, [])) for t in range(T)]
    weights = [weights_of([S[t][e] for e in rows[t]], scale) for t in range(T)]
    before = [sum(e in step.top[t] for t in real) for e in range(E)]
    after = [sum(e in row for row in rows) for e in range(E)]

    capacity: Any = None
    if any(limit is not None for limit in limits):
        filled = [[NO_LIMIT] * len(bins) if limit is None else limit for limit in limits]
        each = filled if want["level"] == "device" else [row[0] for row in filled]
        capacity = each if want["scope"] == "request" else each[0]
    return LoopRouting(
        [w + [np.float32(0.0)] * (width - len(w)) for w in weights],
        [row + [-1] * (width - len(row)) for row in rows],
        before,
        after,
        capacity,
    )


def widths(
    want: Mapping[str, Any], k: int, E: int, local: bool, expert_device: Sequence[int] | None
) -> tuple[int, int | None, int]:
    """m, the most experts of a token (None: no bound), and K', from shapes and settings alone."""
    m = want["expanded_experts"]
    if m is None:
        m = "all" if local else k
    if m == "all":
        m = E
    most: int | None = want["max_experts"] if isinstance(want["max_experts"], int) else None
    if want["max_experts"] == "auto" and len(set(expert_device or [0])) == 1:
        most = k
    if want["mode"] != "expanded":
        return m, most, k
    reach = E - k
    if local:
        assert expert_device is not None
        reach = max(list(expert_device).count(d) for d in expert_device)
    width = min(E, k + min(m, reach))
    return m, most, width if most is None else min(width, most)


def limits_of(
    step: Step, group: Sequence[int], prompt: Sequence[int], size: list[int], held: Held
) -> list[int] | None:
    """The limit of each bin of a group, None where none is in effect.

    held: what the tokens hold where nothing is dropped.
    """
    want, k, bins = step.want, step.k, range(len(size))
    if math.isinf(float(want["factor"])) or len(group) < want["min_tokens"]:
        return None
    if not any(t in prompt for t in group):
        return None  # decode tokens are never dropped
    numbers = (float(want["factor"]), len(group), k, len(step.bin_of), want["min_capacity"])
    limit = [capacity_of(n, *numbers) for n in size]
    if all(limit[b] >= len(group) * min(k, size[b]) for b in bins):
        return None  # no load can pass it
    if want["mode"] == "reroute" or (want["mode"] == "expanded" and want["fill"] != "capacity"):
        # Nobody is filled above the busiest.
        load = [sum(step.bin_of[e] == b for t in group for e in held[t]) for b in bins]
        limit = [min(number, max(load)) for number in limit]
    return limit


def weights_of(scores: list[np.float32], scale: bool) -> list[np.float32]:
    """The scores as they are, or over their sum, taken in row order."""
    if not scale or not scores:
        return scores
    with np.errstate(all="ignore"):
        total = scores[0]
        for score in scores[1:]:
            total = total + score
        return scores if total == 0 else [score / total for score in scores]
