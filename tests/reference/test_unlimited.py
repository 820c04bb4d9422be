"""Steps without a limit on the CPU are `route_torch`'s, bit for bit."""

import dataclasses
import random

import torch

from capmoe_kernels.contract import Selection
from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.plan import resolve
from vllm_capmoe.torch_routing import route_torch
from vllm_capmoe.unlimited import route_unlimited

CASES = 3000
FIELDS = [field.name for field in dataclasses.fields(Selection) if field.name != "seats"]


def scores_of(draw: random.Random, T: int, E: int) -> torch.Tensor:
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(draw.getrandbits(40)))
    kind = draw.choice(("smooth", "ties", "signed", "odd"))
    if kind == "ties":
        scores = (scores * 4).floor() / 4
    if kind == "signed":
        scores = scores - 0.5
    if kind == "odd":
        for value in (0.0, -0.0, float("nan"), float("inf"), -float("inf")):
            scores[draw.randrange(T), draw.randrange(E)] = value
    return scores


def test_every_step_without_a_limit_is_that_of_plain_torch() -> None:
    """Thousands of steps: modes, decode keep, mixed rows, padding, choices of the model's own."""
    draw, shared, limited = random.Random(0), 0, 0
    torch.manual_seed(0)
    for _ in range(CASES):
        E = draw.choice((2, 3, 8, 16, 64))
        k = draw.randint(1, min(E, 8))
        T = draw.choice((1, 2, 3, 8, 33))
        mode = draw.choice(("off", "drop", "expanded", "reroute"))
        keep = draw.choice(("off", "auto", draw.randint(1, k)))
        if mode == keep == "off":
            keep = k
        config = CapacityConfig(
            mode=mode,
            factor=draw.choice((0.5, 1.0, float("inf"))),
            min_capacity=1,
            decode_keep=keep,
            scope=draw.choice(("batch", "request")) if keep == "off" else "batch",
        )
        plan = resolve(config, num_experts=E, top_k=k, renormalize=draw.random() < 0.5)
        scores = scores_of(draw, T, E)
        topk = torch.stack([torch.randperm(E)[:k] for _ in range(T)]).int()
        if draw.random() < 0.5:
            topk = scores.nan_to_num().topk(k).indices.int()
        padding = torch.tensor([draw.random() < 0.2 for _ in range(T)])
        topk[padding] = draw.choice((-1, 0, 10**6))
        decode = torch.tensor([True] * T)
        if draw.random() < 0.4:
            decode = torch.tensor([draw.random() < 0.7 for _ in range(T)])
        given = {
            "topk_TK": topk,
            "is_padding_T": padding if draw.random() < 0.8 or bool(padding.any()) else None,
            "is_decode_T": decode if draw.random() < 0.9 else None,
            "request_T": torch.zeros(T, dtype=torch.int64),
            "num_requests": 2,
        }
        ours = route_unlimited(scores, plan, **given)
        theirs = route_torch(scores, plan, **given)
        prompts = given["is_decode_T"] is None or bool((~decode & ~padding).any())
        if ours is None:
            assert mode != "off" and plan.gamma is not None and prompts
            limited += 1
            continue
        shared += not torch.equal(theirs.load_before, theirs.load_after)
        for name in FIELDS:
            left, right = getattr(ours, name), getattr(theirs, name)
            assert left.dtype == right.dtype, name
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=name)
    assert shared > CASES / 20 and limited > CASES / 10
