"""Cases for the tests of routing: random or given, run through `route` and the naive oracle.

Hypothesis draws whole cases (shapes, scores, flags, optional arguments); only allowed combinations
are drawn. Bulky arrays are filled from a drawn seed, so that examples stay cheap and replayable.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from vllm_capmoe import CapacityConfig, reference, route

NO_LIMIT = 2**31 - 1
INF, NAN = math.inf, math.nan
BACKEND = "torch"  # the reference; the kernel has tests of its own
METRICS = ["score", "order", "reverse-order", "random"]
PRIORITIES = ["uniform", "image-first", "text-first"]
PER_TOKEN = ("topk_ids", "is_padding", "is_decode", "request_ids", "is_image", "token_device")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `route`, in lists (so that a failing example prints whole)."""

    scores: list[list[float]]  # [T][E]
    num_experts: int  # E
    top_k: int
    config: dict[str, Any]
    topk_ids: list[list[int]] | None = None
    is_padding: list[bool] | None = None
    is_decode: list[bool] | None = None
    request_ids: list[int] | None = None
    is_image: list[bool] | None = None
    expert_device: list[int] | None = None
    token_device: list[int] | None = None
    renormalize: bool = False
    seed: int = 0
    dtype: str = "float32"  # of scores
    ids: str = "int64"  # dtype of the integer arguments

    def tensors(self) -> dict[str, Any]:
        """The tensor arguments of `route` by name."""
        T, E, k = len(self.scores), self.num_experts, self.top_k
        scores = torch.tensor(self.scores, dtype=torch.float64).reshape(T, E)
        kwargs: dict[str, Any] = {"scores": scores.to(getattr(torch, self.dtype))}
        for name in (*PER_TOKEN, "expert_device"):
            dtype = torch.bool if name.startswith("is_") else getattr(torch, self.ids)
            values = getattr(self, name)
            kwargs[name] = None if values is None else torch.tensor(values, dtype=dtype)
        if kwargs["topk_ids"] is not None:
            kwargs["topk_ids"] = kwargs["topk_ids"].reshape(T, k)
        return kwargs

    def plain(self) -> dict[str, Any]:
        return {"renormalize": self.renormalize, "seed": self.seed}

    def change(self, **changes: Any) -> Case:
        """This case with other fields; `config` is merged, not replaced."""
        changes["config"] = {**self.config, **changes.get("config", {})}
        return dataclasses.replace(self, **changes)

    def take(self, rows: list[int]) -> Case:
        """This case with these rows of the tokens, in this order."""
        changes: dict[str, Any] = {}
        for name in ("scores", *PER_TOKEN):
            values = getattr(self, name)
            changes[name] = None if values is None else [values[t] for t in rows]
        return dataclasses.replace(self, **changes)


def run_route(case: Case) -> Any:
    kwargs = case.tensors()
    config = CapacityConfig(**case.config)
    got = route(top_k=case.top_k, config=config, **case.plain(), **kwargs, backend=BACKEND)
    for name, fresh in case.tensors().items():  # the arguments are left as they were
        assert fresh is None or repr(fresh.tolist()) == repr(kwargs[name].tolist())
    return got


def run_naive(case: Case) -> Any:
    kwargs = {n: None if v is None else v.tolist() for n, v in case.tensors().items()}
    E, config = case.num_experts, case.config
    return reference.route_by_loops(
        top_k=case.top_k, config=config, num_experts=E, **case.plain(), **kwargs
    )


def bits(weights: Any) -> list[list[Any]]:
    """Raw float32 bits of weights [T, K']; every NaN is the same."""
    array = np.asarray(weights, dtype=np.float32)
    words = array.view(np.int32).tolist()
    return [
        ["nan" if math.isnan(value) else word for value, word in zip(*pair, strict=True)]
        for pair in zip(array.tolist(), words, strict=True)
    ]


def assert_same(case: Case, got: Any, want: Any) -> None:
    """`got` of route equals `want` of the oracle bit for bit, types and shapes included."""
    T, E = len(case.scores), case.num_experts
    assert got.experts.dtype == torch.int32
    assert got.weights.dtype == torch.float32
    assert got.load_before.dtype == got.load_after.dtype == torch.int32
    assert got.experts.tolist() == want.experts
    assert got.weights.shape == got.experts.shape
    assert got.experts.shape[0] == T
    assert tuple(got.load_before.shape) == tuple(got.load_after.shape) == (E,)
    assert got.load_before.tolist() == want.load_before
    assert got.load_after.tolist() == want.load_after
    if want.capacity is None or isinstance(want.capacity, int):
        assert type(got.capacity) is type(want.capacity)
        assert got.capacity == want.capacity
    else:
        assert got.capacity.dtype == torch.int32
        assert got.capacity.tolist() == want.capacity
    if T:
        assert bits(got.weights.numpy()) == bits(want.weights)


def check(case: Case) -> Any:
    got = run_route(case)
    assert_same(case, got, run_naive(case))
    return got


# ------------------------------------------------------------------------------- making of cases

SCORE_STYLES = ("normal", "softmax", "few", "equal", "hot", "special", "nan-some", "sigmoid")
DEVICE_STYLES = ("linear", "round-robin", "uneven", "one", "one-not-first", "gap")
SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3.4e38, 0.1]
FACTORS: list[Any] = [0.001, 0.1, 0.25, 0.5, 1.0, 1, 1.1, 1.5, 2.0, 100, INF, "inf"]
SEEDS = [0, 1, -1, -(2**31), 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 2**70 + 3, -(2**70)]


def fill_scores(rng: random.Random, style: str, T: int, E: int) -> list[list[float]]:
    """T rows of E scores."""
    if style in ("softmax", "nan-some"):
        rows = []
        for _ in range(T):
            row = [math.exp(rng.gauss(0, 2)) for _ in range(E)]
            rows.append([value / sum(row) for value in row])
        if style == "nan-some":
            rows = [[NAN if rng.random() < 0.2 else value for value in row] for row in rows]
        return rows
    if style == "hot":  # all tokens want the same expert most
        hot = rng.randrange(E)
        return [[2.0 if e == hot else rng.random() for e in range(E)] for _ in range(T)]
    values = {
        "normal": lambda: rng.gauss(0, 1),
        "sigmoid": lambda: 1 / (1 + math.exp(-rng.gauss(0, 3))),
        "few": lambda: rng.choice([0.125, 0.3, 0.3 + 1e-12]),  # the last two: one float32
        "equal": lambda: 0.25,
        "special": lambda: rng.choice(SPECIAL),
    }[style]
    return [[values() for _ in range(E)] for _ in range(T)]


def fill_devices(rng: random.Random, style: str, E: int) -> list[int]:
    """The device of each of E experts."""
    D = rng.randint(1, min(E, 4))
    return {
        "linear": lambda: [e * D // E for e in range(E)],
        "round-robin": lambda: [e % D for e in range(E)],
        "uneven": lambda: [rng.randrange(D) for _ in range(E)],
        "one": lambda: [0] * E,
        "one-not-first": lambda: [1] * E,
        "gap": lambda: [rng.choice([0, 2, 5]) for _ in range(E)],
    }[style]()


def fill_topk(rng: random.Random, T: int, E: int, k: int) -> list[list[int]]:
    """Distinct experts for every token."""
    return [rng.sample(range(E), k) for _ in range(T)]


def some(rng: random.Random, T: int, share: float) -> list[bool]:
    return [rng.random() < share for _ in range(T)]


def fill_requests(rng: random.Random, T: int) -> list[int]:
    """Request ids of T tokens: few, not dense, not sorted, interleaved or in runs."""
    names = rng.sample([-7, 0, 3, 4, 1000, 2**31 - 1], rng.randint(1, 4))
    ids = [rng.choice(names) for _ in range(T)]
    return ids if rng.random() < 0.5 else sorted(ids, key=names.index)


@st.composite
def cases(draw: st.DrawFn, *, max_tokens: int = 40, bite: bool = False, **fixed: Any) -> Case:
    """An allowed case. `bite`: enough tokens and so little room that limits are mostly in effect.

    `fixed`: configuration keys that are given, not drawn.
    """
    rng = random.Random(draw(st.integers(0, 2**32)))
    E = draw(st.one_of(st.integers(1, 6), st.integers(1, 16)))
    k = draw(st.one_of(st.integers(1, min(E, 3)), st.integers(1, E), st.just(E)))
    few = st.integers(4, 12) if bite else st.sampled_from([0, 1, 2, 3, 4, 5, 8, 12])
    T = draw(st.one_of(few, st.integers(4 if bite else 0, max_tokens)))

    style = draw(st.sampled_from((*SCORE_STYLES, "drawn")))
    if style == "drawn" and 0 < T * E <= 24:
        number = st.floats(width=32)
        flat = draw(st.lists(number, min_size=T * E, max_size=T * E))
        scores = [flat[t * E : t * E + E] for t in range(T)]
    else:
        scores = fill_scores(rng, "few" if style == "drawn" else style, T, E)

    flag = st.booleans()
    share = st.sampled_from([0.1, 0.3, 0.6] if bite else [0.1, 0.3, 0.6, 1.0])
    is_padding = some(rng, T, draw(share)) if draw(flag) else None
    topk_ids = fill_topk(rng, T, E, k) if draw(flag) else None
    if topk_ids is not None and is_padding is not None and draw(flag):
        topk_ids = [[-1] * k if is_padding[t] else topk_ids[t] for t in range(T)]
    mode = fixed.get("mode") or draw(
        st.sampled_from(["drop", "expanded", "expanded", "reroute", "reroute", "off"])
    )
    off = mode == "off"
    scope = fixed.get("scope") or draw(st.sampled_from(["batch", "request"]))
    needs_requests = scope == "request" and not off
    expert_device = None
    if draw(st.integers(0, 3)):
        expert_device = fill_devices(rng, draw(st.sampled_from(DEVICE_STYLES)), E)
    token_device = None
    if expert_device is not None and draw(flag):
        token_device = [rng.randint(0, max(expert_device)) for _ in range(T)]
    is_image = some(rng, T, 0.5) if draw(flag) else None

    levels = ["expert", "device"] if off or expert_device is not None else ["expert"]
    places = ["auto", "global", "local"] if off or token_device is not None else ["auto", "global"]
    priorities = ["uniform"] if is_image is None and not off else PRIORITIES
    factors = [0.1, 0.25, 0.5, 0.75, 1.0, 1.1] if bite else FACTORS
    minima = st.just(0) if bite else st.sampled_from([0, 0, 0, 1, T, T + 1, max(T - 3, 0)])
    config: dict[str, Any] = {
        "mode": mode,
        "factor": draw(st.sampled_from(factors)),
        "metric": draw(st.sampled_from(METRICS)),
        "level": draw(st.sampled_from(levels)),
        "scope": scope,
        "candidates": draw(st.sampled_from(places)),
        "expanded_experts": draw(st.sampled_from([None, "all", 1, 2, E, E + 5])),
        "fill": draw(st.sampled_from(["auto", "busiest", "capacity"])),
        "max_experts": draw(st.sampled_from(["auto", "none", k, k + 1, E + 3])),
        "renormalize": draw(st.sampled_from(["auto", "always", "never"])),
        "priority": draw(st.sampled_from(priorities)),
        "min_capacity": draw(st.just(1) if bite else st.integers(1, 6)),
        "min_tokens": draw(minima),
    }
    if scope == "batch":
        config["decode_keep"] = draw(st.sampled_from(["off", "auto", *range(1, k + 1)]))
    return Case(
        scores=scores,
        num_experts=E,
        top_k=k,
        config={**config, **fixed},
        topk_ids=topk_ids,
        is_padding=is_padding,
        is_decode=some(rng, T, draw(share)) if draw(flag) else None,
        request_ids=fill_requests(rng, T) if needs_requests or draw(flag) else None,
        is_image=is_image,
        expert_device=expert_device,
        token_device=token_device,
        renormalize=draw(flag),
        seed=draw(st.one_of(st.sampled_from(SEEDS), st.integers(-(2**40), 2**40))),
        dtype=draw(st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"])),
        ids=draw(st.sampled_from(["int64", "int32"])),
    )


def seeded_case(rng: random.Random, config: dict[str, Any], T: int, E: int, k: int) -> Case:
    """A case with every optional argument, so that any flags are allowed."""
    expert_device = fill_devices(rng, rng.choice(DEVICE_STYLES), E)
    token_device = [rng.randint(0, max(expert_device)) for _ in range(T)]
    given_local = config["candidates"] == "local" or rng.random() < 0.5
    return Case(
        scores=fill_scores(rng, rng.choice(SCORE_STYLES), T, E),
        num_experts=E,
        top_k=k,
        config=config,
        topk_ids=fill_topk(rng, T, E, k) if rng.random() < 0.3 else None,
        is_padding=some(rng, T, 0.15),
        is_decode=some(rng, T, 0.2),
        request_ids=fill_requests(rng, T),
        is_image=some(rng, T, 0.5),
        expert_device=expert_device,
        token_device=token_device if given_local else None,
        renormalize=rng.random() < 0.5,
        seed=rng.choice(SEEDS),
    )
