"""`route` on small cases that were worked out by hand; the reasoning stands beside the numbers."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from capmoe_kernels.capacity import capacity, capacity_table
from capmoe_kernels.contract import NO_LIMIT, fmix32
from vllm_capmoe import CapacityConfig, Routing, route
from vllm_capmoe.plan import resolve

NAN, INF = math.nan, math.inf
METRICS = ("score", "order", "reverse-order", "random")


def config(mode: str = "drop", **options: object) -> CapacityConfig:
    """gamma = 1 and no floor, unless a test says otherwise."""
    return CapacityConfig(mode=mode, **({"factor": 1.0, "min_capacity": 1} | options))


def rest_to_one(*first: float) -> Tensor:
    """[T, 2]: the scores of expert 0, and the rest to one for expert 1."""
    scores = torch.tensor(first)
    return torch.stack([scores, 1 - scores], dim=1)


def mask(*rows: int, size: int) -> Tensor:
    return torch.tensor([row in rows for row in range(size)])


def held(r: Routing) -> list[list[int]]:
    """The experts of each token, without the unused places (which must come last)."""
    for row, weights in zip(r.experts.tolist(), r.weights.tolist(), strict=True):
        used = [expert for expert in row if expert >= 0]
        assert row == used + [-1] * (len(row) - len(used))
        assert all(weight == 0 for weight in weights[len(used) :])
    return [[expert for expert in row if expert >= 0] for row in r.experts.tolist()]


def counts(r: Routing) -> tuple[int, int, int]:
    return r.dropped, r.expanded, r.left_without


# --- The worked example -----------------------------------------------------------------------


def test_worked_example_drop() -> None:
    r = route(rest_to_one(0.9, 0.8, 0.7, 0.2), 1, config())
    assert r.capacity == 2  # ceil(1.0 * 4 * 1 / 2)
    assert held(r) == [[0], [0], [], [1]]
    assert torch.equal(r.weights, torch.tensor([[0.9], [0.8], [0.0], [0.8]]))
    assert r.load_before.tolist() == [3, 1]
    assert r.load_after.tolist() == [2, 1]
    assert counts(r) == (1, 0, 1)
    assert (r.experts.dtype, r.weights.dtype) == (torch.int32, torch.float32)
    assert (r.load_before.dtype, r.load_after.dtype) == (torch.int32, torch.int32)


def test_worked_example_expanded() -> None:
    settings = config("expanded", candidates="global", expanded_experts=1)
    r = route(rest_to_one(0.9, 0.8, 0.7, 0.2), 1, settings)
    assert r.capacity == 2
    assert held(r) == [[0], [0], [1], [1]]
    assert r.load_after.tolist() == [2, 2]
    assert counts(r) == (1, 1, 0)  # token 2 lost its top expert and got the other


# --- Reroute and fill -------------------------------------------------------------------------

# Tokens 0 to 4 choose expert 0, token 5 expert 1; C = ceil(6 * 1 / 3) = 2.
LOST = torch.tensor(
    [[0.9, 0.1, 0], [0.8, 0.2, 0], [0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.1, 0.9, 0]]
)


def test_reroute_gives_once_to_the_best_of_those_who_lost() -> None:
    # Tokens 2, 3 and 4 lose. Expert 1 has one seat left, for which 2 and 3 bid: 3 has the better
    # score (order: 2 comes first). Token 4 gets expert 2, where a seat stays empty: one round.
    r = route(LOST, 1, config("reroute"))
    assert held(r) == [[0], [0], [], [1], [2], [1]]
    assert r.weights[:, 0].tolist() == pytest.approx([0.9, 0.8, 0, 0.3, 0.3, 0.9])
    assert (r.capacity, counts(r)) == (2, (3, 2, 1))
    assert held(route(LOST, 1, config("reroute", metric="order"))) == [[0], [0], [1], [], [2], [1]]


def test_reroute_bids_only_where_seats_are_free_and_may_stay_on_its_device() -> None:
    # k = 2, C = ceil(0.5 * 4 * 2 / 4) = 1: all choose experts 0 and 1, token 3 keeps both. The
    # others lost two bids each and bid for 2 and 3, one seat each: token 0 has the better scores.
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]] + [[0.5, 0.4, 0.06, 0.04]] * 2 + [[1, 1, 0, 0]])
    settings = config("reroute", factor=0.5)
    r = route(scores, 2, settings)
    assert held(r) == [[2, 3], [], [], [0, 1]]
    assert (r.experts.shape[1], counts(r)) == (2, (6, 2, 2))
    # Experts 0 and 2 are on device 0, where tokens 0 and 3 are: expert 3 goes to token 1.
    devices = {"expert_device": torch.tensor([0, 1, 0, 1])}
    r = route(scores, 2, settings, token_device=torch.tensor([0, 1, 1, 0]), **devices)
    assert held(r) == [[2], [3], [], [0, 1]]
    # At level device each device has two seats, for tokens 3 and 1: none is left to bid for.
    r = route(scores, 2, config("reroute", factor=0.5, level="device"), **devices)
    assert held(r) == [[], [0, 1], [], [0, 1]]


def test_reroute_leaves_decode_tokens_as_they_are() -> None:
    # Tokens 0 and 1 are decode tokens: both seats of expert 0 are theirs, nobody else is kept.
    r = route(LOST, 1, config("reroute"), is_decode=mask(0, 1, size=6))
    assert held(r) == [[0], [0], [], [1], [2], [1]]
    r = route(LOST, 1, config("reroute"), is_decode=mask(2, 3, 4, size=6))
    assert held(r) == [[], [1], [0], [0], [0], [1]]


def test_fill_busiest_fills_no_expert_above_the_largest_load_before() -> None:
    # gamma = 2: C = 4, but no expert has more than 3 before: tokens 0 to 2, 3 and 4, 5.
    scores = LOST[[0, 1, 2, 5, 5, 5]].clone()
    scores[5] = torch.tensor([0.2, 0.3, 0.5])
    options = {"factor": 2.0, "max_experts": "none", "expanded_experts": "all"}
    r = route(scores, 1, config("expanded", fill="capacity", **options))
    assert (r.capacity, r.load_after.tolist()) == (4, [4, 4, 4])
    r = route(scores, 1, config("expanded", fill="busiest", **options))
    assert (r.capacity, r.load_after.tolist()) == (3, [3, 3, 3])
    assert held(r) == [[0, 2], [0], [0, 2], [1], [1], [2, 1]]


# --- Metrics, ties, numbers -------------------------------------------------------------------

# All four tokens choose expert 0, C = ceil(4 / 2) = 2.
CROWDED = rest_to_one(0.6, 0.9, 0.7, 0.8)


@pytest.mark.parametrize(
    ("metric", "kept"), [("score", [1, 3]), ("order", [0, 1]), ("reverse-order", [2, 3])]
)
def test_metric(metric: str, kept: list[int]) -> None:
    r = route(CROWDED, 1, config(metric=metric))
    assert held(r) == [[0] if token in kept else [] for token in range(4)]


def mix(x: int) -> int:
    """murmur3's finaliser, in plain Python."""
    x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
    x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
    return x ^ x >> 16


def test_fmix32_known_values() -> None:
    # 0 stays 0; 1 gives 0x514e28b7 in every murmur3.
    assert fmix32(torch.tensor([0, 1])).tolist() == [0, 0x514E28B7]
    numbers = [2, 12345, 2**31, 2**32 - 1]
    assert fmix32(torch.tensor(numbers)).tolist() == [mix(number) for number in numbers]


@pytest.mark.parametrize("seed", [0, 1, 42, -1, 2**32 - 1, 2**40 + 5])
def test_metric_random(seed: int) -> None:
    draws = [mix(mix(mix(seed % 2**32) + token) % 2**32) for token in range(4)]  # expert 0
    kept = sorted(range(4), key=lambda token: -draws[token])[:2]
    r = route(CROWDED, 1, config(metric="random"), seed=seed)
    assert held(r) == [[0] if token in kept else [] for token in range(4)]


def test_ties_go_to_the_lower_token_and_expert() -> None:
    # Five tokens, all scores equal: all choose expert 0, C = ceil(5 / 2) = 3.
    scores = torch.full((5, 2), 0.5)
    assert held(route(scores, 1, config())) == [[0], [0], [0], [], []]
    # Expanded: both experts see the same five tokens and keep the same three.
    r = route(scores, 1, config("expanded", max_experts="none"))
    assert held(r) == [[0, 1], [0, 1], [0, 1], [], []]
    # At most k = 1: expert 0 stays (lower expert), and the freed seats are not given to 3 and 4.
    r = route(scores, 1, config("expanded"))
    assert held(r) == [[0], [0], [0], [], []]
    assert r.load_after.tolist() == [3, 0]


def test_nan_ranks_after_minus_infinity() -> None:
    # Expert 0 is asked by all (k = 2 of 2); C = ceil(0.5 * 3 * 2 / 2) = 2.
    # Expert 0: NaN loses to -1 and to -inf. Expert 1: .1 is the least.
    scores = torch.tensor([[NAN, 0.1], [-1.0, 0.2], [-INF, 0.3]])
    r = route(scores, 2, config(factor=0.5))
    assert held(r) == [[], [1, 0], [1, 0]]


def test_plain_top_k_order_of_special_numbers() -> None:
    scores = torch.tensor(
        [[NAN, -INF, NAN], [-0.0, 0.0, -1.0], [-2.0, -1.0, NAN], [1e-45, 0.0, INF]]
    )
    r = route(scores, 2, config("off"))
    # NaN after -inf, then the lower expert; -0.0 equals 0.0; negative numbers; a subnormal.
    assert held(r) == [[1, 0], [0, 1], [1, 0], [2, 0]]


def test_a_negative_nan_is_a_nan() -> None:
    scores = torch.tensor([[NAN, -INF]])
    scores[0, 0] = -scores[0, 0]
    assert held(route(scores, 1, config("off"))) == [[1]]


# --- Capacity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "mean", "expected"),
    [
        (1.1, 10, 11),  # the float product is 11.000000000000002
        (0.07, 100, 7),  # 7.000000000000001
        (0.3, 10, 3),
        (0.1 + 0.2, 10, 4),  # written 0.30000000000000004: more than 3
        (1 / 3, 3, 1),  # written 0.3333333333333333: just below 1
        (1 / 3, 30, 10),
        (1 / 3, 2048, 683),  # 682.67; its numerator times 8192 tokens passes 2^64
        (1.5, 3, 5),  # 4.5
        (2, 10, 20),
        (1e-300, 10, 1),  # any seat at all, since it is above 0
    ],
)
def test_capacity_is_exact(factor: float, mean: int, expected: int) -> None:
    # k = 2 of E = 8: T = 4 * mean.
    gamma = CapacityConfig(factor=factor).gamma
    assert gamma is not None
    assert capacity(4 * mean, num_experts=8, top_k=2, gamma=gamma) == expected
    scores = torch.rand(4 * mean, 8, generator=torch.Generator().manual_seed(0))
    assert route(scores, 2, config(factor=factor)).capacity == expected


def test_capacity_of_very_many_tokens() -> None:
    # 1.1 * 10^20 * 1 / 10 is 1.1 * 10^19, beyond float and int64.
    size = capacity(10**20, num_experts=10, top_k=1, gamma=Fraction("1.1"))
    assert size == 11 * 10**18


def test_capacity_floor() -> None:
    # C = 2 by the formula. At the default of 4 no load of four tokens can pass it.
    assert route(CROWDED, 1, config(min_capacity=3)).capacity == 3
    r = route(CROWDED, 1, config(min_capacity=4))
    assert (r.capacity, held(r)) == (None, [[0]] * 4)


def test_capacity_table() -> None:
    plan = resolve(config(factor=1.1, min_capacity=2), num_experts=8, top_k=2)
    table, first = capacity_table(plan, 40, torch.device("cpu"))
    # C(T) = max(2, ceil(1.1 * T / 4)): T <= 2 can't pass 2; C(3) = 2; C(40) = 11.
    assert table[[0, 1, 2, 3, 40], 0].tolist() == [NO_LIMIT, NO_LIMIT, NO_LIMIT, 2, 11]
    assert first == 3


@pytest.mark.parametrize("mode", ["drop", "expanded"])
def test_no_limit_is_plain_top_k(mode: str) -> None:
    for settings in (
        config(mode, factor=INF),
        config(mode, factor=2),  # C = 4 = T
        config(mode, min_tokens=5),
    ):
        r = route(CROWDED, 1, settings)
        assert (r.capacity, held(r), counts(r)) == (None, [[0]] * 4, (0, 0, 0))
    assert route(CROWDED, 1, config(mode, min_tokens=4)).capacity == 2


def test_min_tokens_counts_real_tokens_of_the_group() -> None:
    padded = torch.cat([CROWDED, CROWDED[:2]])
    r = route(padded, 1, config(min_tokens=5), is_padding=mask(4, 5, size=6))
    assert (r.capacity, held(r)) == (None, [[0]] * 4 + [[]] * 2)
    r = route(padded, 1, config(min_tokens=4), is_padding=mask(4, 5, size=6))
    assert (r.capacity, held(r)) == (2, [[], [0], [], [0], [], []])
    # In scope request another request must not lend its tokens: two of them here, of 3 and of 1.
    ids = torch.tensor([0, 0, 0, 1])
    r = route(CROWDED, 1, config(scope="request", min_tokens=3), request_ids=ids)
    assert isinstance(r.capacity, Tensor) and r.capacity.tolist() == [2, NO_LIMIT]


# --- Device level -----------------------------------------------------------------------------


def test_device_level() -> None:
    # C_d = ceil(2 * 1.0 * 3 * 2 / 4) = 3. Device 0 is asked by (t0: .4 .3), (t1: .45 .25) and
    # (t2: .35) and keeps .45, .4 and .35. Device 1 is asked once.
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.45, 0.2, 0.1], [0.35, 0.15, 0.3, 0.2]])
    r = route(scores, 2, config(level="device"), expert_device=torch.tensor([0, 0, 1, 1]))
    assert held(r) == [[0], [1], [0, 2]]
    assert isinstance(r.capacity, Tensor)
    assert (r.capacity.tolist(), r.capacity.dtype) == ([3, 3], torch.int32)
    assert r.load_before.tolist() == [3, 2, 1, 0]
    assert r.load_after.tolist() == [2, 1, 1, 0]


def test_device_level_floor_and_empty_device() -> None:
    # Devices of 3, 0 and 1 experts, floor 2 each: 6, 0 and 2. Device 0 can't get more than
    # 3 * 2 = 6, device 2 can get 3.
    scores = torch.tensor([[0.1, 0.2, 0.0, 0.7], [0.1, 0.2, 0.0, 0.6], [0.1, 0.2, 0.0, 0.5]])
    settings = config(level="device", factor=0.1, min_capacity=2)
    r = route(scores, 2, settings, expert_device=torch.tensor([0, 0, 0, 2]))
    assert isinstance(r.capacity, Tensor) and r.capacity.tolist() == [6, 0, 2]
    assert held(r) == [[3, 1], [3, 1], [1]]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        # C = ceil(2 * 0.75 * 2 * 2 / 2) = 3 of the 4 assignments; all scores equal.
        ("score", [[0, 1], [0]]),  # (t0, e0), (t0, e1), (t1, e0)
        ("order", [[0, 1], [0]]),
        ("reverse-order", [[0], [0, 1]]),  # t1 first, and within a token the lower expert
    ],
)
def test_device_level_ties_within_a_token(metric: str, expected: list[list[int]]) -> None:
    settings = config(level="device", factor=0.75, metric=metric)
    r = route(torch.full((2, 2), 0.5), 2, settings, expert_device=torch.tensor([0, 0]))
    assert held(r) == expected


def test_order_at_device_level_is_by_expert_not_by_score() -> None:
    # t1 loses expert 1, although it has its higher score: order compares token, then expert.
    scores = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    settings = config(level="device", factor=0.75, metric="order")
    r = route(scores, 2, settings, expert_device=torch.tensor([0, 0]))
    assert held(r) == [[0, 1], [0]]


def test_extra_candidates_may_tie_with_a_model_choice() -> None:
    # One device of three experts: C = max(3, ceil(3 * .5 * 4 / 3)) = 3 seats. All scores are
    # equal, the model chose expert 2, m = 2 makes all experts candidates. By (token, expert) the
    # seats go to (t0, e0), (t0, e1), (t0, e2).
    options = {"level": "device", "factor": 0.5, "expanded_experts": 2}
    arguments = {
        "topk_ids": torch.full((4, 1), 2),
        "expert_device": torch.zeros(3, dtype=torch.int64),
    }
    scores = torch.full((4, 3), 0.2)
    r = route(scores, 1, config("expanded", max_experts="none", **options), **arguments)
    assert (held(r), counts(r)) == ([[0, 1, 2], [], [], []], (3, 2, 3))
    # At most one: t0 keeps expert 0, and so loses what the model had chosen.
    r = route(scores, 1, config("expanded", **options), **arguments)
    assert (held(r), counts(r)) == ([[0], [], [], []], (4, 1, 3))


# --- Scope request ----------------------------------------------------------------------------

# Requests 7 (rows 0, 2, 4) and 3 (rows 1, 3, 5), all choose expert 0: C = ceil(3 / 2) = 2 each.
REQUESTS = torch.tensor([7, 3, 7, 3, 7, 3])


def test_scope_request() -> None:
    # Request 7: .9 .7 .8 keeps rows 0 and 4. Request 3: .6 .8 .7 keeps rows 3 and 5.
    scores = rest_to_one(0.9, 0.6, 0.7, 0.8, 0.8, 0.7)
    r = route(scores, 1, config(scope="request"), request_ids=REQUESTS)
    assert held(r) == [[0], [], [], [0], [0], [0]]
    assert isinstance(r.capacity, Tensor)
    assert (r.capacity.tolist(), r.capacity.dtype) == ([2, 2], torch.int32)


def test_scope_request_capacity_rows_are_by_ascending_id() -> None:
    # Request 9: 1 token, which can't be too many. Request -4: 4 tokens, C = 2.
    scores = rest_to_one(0.9, 0.9, 0.8, 0.7, 0.6)
    ids = torch.tensor([9, -4, -4, -4, -4])
    r = route(scores, 1, config(scope="request"), request_ids=ids)
    assert isinstance(r.capacity, Tensor) and r.capacity.tolist() == [2, NO_LIMIT]
    assert held(r) == [[0], [0], [0], [], []]


def test_scope_request_at_device_level() -> None:
    # One device of two experts. Request 0: T = 3, C = max(2, ceil(2 * .5 * 3 / 2)) = 2 < 3.
    # Request 1: T = 1, no limit.
    settings = config(scope="request", level="device", factor=0.5)
    r = route(
        rest_to_one(0.9, 0.2, 0.7, 0.6),
        1,
        settings,
        request_ids=torch.tensor([0, 0, 0, 1]),
        expert_device=torch.tensor([0, 0]),
    )
    assert isinstance(r.capacity, Tensor) and r.capacity.tolist() == [[2], [NO_LIMIT]]
    assert held(r) == [[0], [1], [], [0]]  # .9, .8 (expert 1), not .7


@pytest.mark.parametrize("mode", ["drop", "expanded"])
@pytest.mark.parametrize("metric", METRICS)
def test_other_requests_change_nothing(mode: str, metric: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(40, 4, generator=generator).softmax(1)
    ids = torch.randint(0, 3, (40,), generator=generator)
    settings = config(mode, metric=metric, scope="request", factor=0.6)
    together = route(scores, 2, settings, request_ids=ids, seed=5)
    for request in range(3):
        own = ids == request
        alone = route(scores[own], 2, settings, request_ids=ids[own], seed=5)
        batch = route(scores[own], 2, config(mode, metric=metric, factor=0.6), seed=5)
        for other in (alone, batch):
            assert torch.equal(together.experts[own], other.experts)
            assert torch.equal(together.weights[own], other.weights)


# --- Padding and decode -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "drop", "expanded"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scope", ["batch", "request"])
def test_padding_changes_nothing(mode: str, metric: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(2)
    real, T = torch.arange(24) % 3 != 1, 16
    scores = torch.rand(T, 4, generator=generator)
    arguments = {
        "topk_ids": scores.topk(2).indices.flip(1).int(),
        "is_decode": torch.arange(T) % 5 == 0,
        "is_image": torch.arange(T) % 2 == 0,
        "request_ids": torch.arange(T) % 2,
        "token_device": torch.arange(T) % 2,
    }
    junk = {
        "topk_ids": torch.full((24, 2), -7, dtype=torch.int32),
        "is_decode": torch.ones(24, dtype=torch.bool),
        "is_image": torch.ones(24, dtype=torch.bool),
        "request_ids": torch.full((24,), 10**12),
        "token_device": torch.full((24,), -1),
    }
    padded_scores = torch.full((24, 4), NAN)
    padded_scores[real] = scores
    for name, values in arguments.items():
        junk[name][real] = values
    settings = config(mode, metric=metric, scope=scope, priority="image-first", factor=0.7)
    devices = torch.tensor([0, 0, 1, 1])
    plain = route(scores, 2, settings, expert_device=devices, seed=3, **arguments)
    padded = route(
        padded_scores, 2, settings, expert_device=devices, seed=3, is_padding=~real, **junk
    )
    assert torch.equal(padded.experts[real], plain.experts)
    assert torch.equal(padded.weights[real], plain.weights)
    assert (padded.experts[~real] == -1).all() and (padded.weights[~real] == 0).all()
    assert torch.equal(padded.load_before, plain.load_before)
    assert torch.equal(padded.load_after, plain.load_after)
    assert counts(padded) == counts(plain)
    assert str(padded.capacity) == str(plain.capacity)


def test_decode_tokens_are_seated_first() -> None:
    # All choose expert 0, C = ceil(5 / 2) = 3 counts decode tokens. Rows 1 and 3 decode and sit,
    # with the lowest scores. One seat is left for .6, .9, .7.
    scores = rest_to_one(0.6, 0.51, 0.9, 0.51, 0.7)
    r = route(scores, 1, config(), is_decode=mask(1, 3, size=5))
    assert (r.capacity, held(r)) == (3, [[], [0], [0], [0], []])
    # Expanded: expert 1 has three seats. Row 0 (.4), row 2 (.1) and row 4 (.3) are candidates of
    # it; the decode tokens are not. Row 2 holds both.
    r = route(scores, 1, config("expanded", max_experts="none"), is_decode=mask(1, 3, size=5))
    assert held(r) == [[1], [0], [0, 1], [0], [1]]


def test_decode_tokens_may_pass_the_limit() -> None:
    # Four decode tokens on C = 3: all sit, and max(0, 3 - 4) = 0 seats are left.
    scores = rest_to_one(0.9, 0.6, 0.6, 0.6, 0.6)
    r = route(scores, 1, config(), is_decode=mask(1, 2, 3, 4, size=5))
    assert (r.capacity, held(r)) == (3, [[], [0], [0], [0], [0]])
    assert r.load_after.tolist() == [4, 0]


@pytest.mark.parametrize("mode", ["drop", "expanded"])
def test_decode_alone_is_plain_top_k(mode: str) -> None:
    r = route(CROWDED, 1, config(mode), is_decode=mask(0, 1, 2, 3, size=4))
    assert (r.capacity, held(r), counts(r)) == (None, [[0]] * 4, (0, 0, 0))
    # A padding row is no prompt token.
    r = route(CROWDED, 1, config(mode), is_decode=mask(0, 1, 2, size=4), is_padding=mask(3, size=4))
    assert (r.capacity, held(r)) == (None, [[0], [0], [0], []])
    # Request 3 only decodes, request 7 has rows 0, 2, 4 to seat on C = 2.
    scores = rest_to_one(0.9, 0.6, 0.7, 0.8, 0.8, 0.7)
    settings = config("drop", scope="request")
    r = route(scores, 1, settings, request_ids=REQUESTS, is_decode=REQUESTS == 3)
    assert isinstance(r.capacity, Tensor) and r.capacity.tolist() == [NO_LIMIT, 2]
    assert held(r) == [[0], [0], [], [0], [0], [0]]


# --- Priority ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "kept"),
    [
        # Rows 0 and 2 are images; two seats.
        ("uniform", [0, 1]),
        ("image-first", [1, 3]),  # images are dropped first
        ("text-first", [0, 2]),
    ],
)
def test_priority(priority: str, kept: list[int]) -> None:
    scores = rest_to_one(0.9, 0.8, 0.7, 0.6)
    r = route(scores, 1, config(priority=priority), is_image=mask(0, 2, size=4))
    assert held(r) == [[0] if token in kept else [] for token in range(4)]


def test_within_a_class_the_metric_decides() -> None:
    # Three seats of six, two text tokens: they sit, and the best image (row 4) with them.
    scores = rest_to_one(0.6, 0.7, 0.65, 0.6, 0.9, 0.8)
    settings = config(priority="image-first")
    r = route(scores, 1, settings, is_image=mask(1, 2, 4, 5, size=6))
    assert held(r) == [[0], [], [], [0], [0], []]


# --- Candidates -------------------------------------------------------------------------------

# Devices {0, 1} and {2, 3}; tokens 0, 1 on device 0, tokens 2, 3 on device 1. C = ceil(4/4) = 1.
# The top expert of every token is 0, which keeps token 2 (.7).
OWNED = torch.tensor(
    [[0.5, 0.3, 0.1, 0.1], [0.6, 0.2, 0.15, 0.05], [0.7, 0.05, 0.15, 0.1], [0.4, 0.1, 0.2, 0.3]]
)
OWNERS = {
    "expert_device": torch.tensor([0, 0, 1, 1]),
    "token_device": torch.tensor([0, 0, 1, 1]),
}


@pytest.mark.parametrize("candidates", ["auto", "local"])
def test_local_candidates(candidates: str) -> None:
    # All local ones: t0 and t1 on expert 1 (.3 wins over .2), t2 and t3 on experts 2 (.15, .2)
    # and 3 (.1, .3): t3 wins both. No maximum, since there are two devices.
    r = route(OWNED, 1, config("expanded", candidates=candidates), **OWNERS)
    assert held(r) == [[1], [], [0], [3, 2]]
    assert r.experts.shape == (4, 3)  # k + the two experts of a device
    assert counts(r) == (3, 3, 1)


def test_fewer_local_candidates() -> None:
    # m = 1: t2 asks expert 2 only (.15), t3 expert 3 only (.3).
    r = route(OWNED, 1, config("expanded", expanded_experts=1), **OWNERS)
    assert (held(r), r.experts.shape[1]) == ([[1], [], [0, 2], [3]], 2)


def test_global_candidates() -> None:
    # m = k = 1: the second best of each is t0: 1 (.3), t1: 1 (.2), t2: 2 (.15), t3: 3 (.3).
    for settings, arguments in (
        (config("expanded", candidates="global"), OWNERS),
        (config("expanded"), {"expert_device": OWNERS["expert_device"]}),
    ):
        r = route(OWNED, 1, settings, **arguments)
        assert (held(r), r.experts.shape[1]) == ([[1], [], [0, 2], [3]], 2)
    # On one device a token holds at most k: t2 keeps expert 0.
    for devices in (None, torch.zeros(4, dtype=torch.int32), torch.full((4,), 3)):
        r = route(OWNED, 1, config("expanded"), expert_device=devices)
        assert (held(r), r.experts.shape[1]) == ([[1], [], [0], [3]], 1)


def test_a_token_on_a_device_without_experts_has_no_extra_candidates() -> None:
    arguments = OWNERS | {"token_device": torch.tensor([5, 5, 5, 5])}
    r = route(OWNED, 1, config("expanded"), **arguments)
    assert held(r) == [[], [], [0], []]


@pytest.mark.parametrize(
    ("options", "arguments", "width"),
    [
        ({"mode": "off"}, {}, 2),
        ({"mode": "drop", "max_experts": 3}, {}, 2),
        ({"mode": "expanded"}, {}, 2),
        ({"max_experts": "none"}, {}, 4),  # k + m, m = k
        ({"max_experts": "none", "expanded_experts": 1}, {}, 3),
        ({"max_experts": "none", "expanded_experts": "all"}, {}, 6),
        ({"max_experts": "none", "expanded_experts": 64}, {}, 6),
        ({"max_experts": 3, "expanded_experts": "all"}, {}, 3),
        ({}, {"expert_device": [0, 0, 0, 1, 1, 2]}, 4),
        ({}, {"expert_device": [0, 0, 0, 1, 1, 2], "token_device": [0] * 5}, 5),  # k + 3
        ({}, {"expert_device": [0] * 6, "token_device": [0] * 5}, 2),
        ({"max_experts": "none"}, {"expert_device": [0] * 6, "token_device": [0] * 5}, 6),
    ],
)
def test_width(options: dict[str, object], arguments: dict[str, list[int]], width: int) -> None:
    # E = 6, k = 2. The same with a limit in effect (gamma 0.5) and without.
    tensors = {name: torch.tensor(values) for name, values in arguments.items()}
    for factor in (0.5, INF):
        settings = config(**({"mode": "expanded", "factor": factor} | options))
        assert route(torch.rand(5, 6), 2, settings, **tensors).experts.shape == (5, width)
        assert route(torch.rand(5, 6), 2, settings, **tensors).weights.shape == (5, width)


def test_topk_ids_are_the_choice() -> None:
    # The model chose against the scores. Expert 1 is asked by tokens 0 to 2 and keeps .3, .2.
    ids = torch.tensor([[1], [1], [1], [0]], dtype=torch.int32)
    r = route(rest_to_one(0.9, 0.8, 0.7, 0.2), 1, config(), topk_ids=ids)
    assert held(r) == [[], [1], [1], [0]]
    assert r.load_before.tolist() == [1, 3]
    # Rows come out by score.
    r = route(torch.tensor([[0.1, 0.2, 0.3]]), 2, config("off"), topk_ids=torch.tensor([[0, 2]]))
    assert held(r) == [[2, 0]]
