"""Tables of limits and k0 that change in place: what a captured graph does after a change.

A graph replays the launches of its capture, with all that was a number then. So a call with the
plan of the start and tables that were set to another must be as a call with that other plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from routing_walls import DEVICE, assert_same, make_case, make_plan, run

from capmoe_kernels.routing import Selection, Tables, route_triton
from vllm_capmoe import CapacityConfig
from vllm_capmoe.torch_routing import route_torch

CASES = list(itertools.product(["drop", "expanded", "reroute"], ["expert", "device"], range(6)))


@pytest.mark.parametrize(("mode", "level", "seed"), CASES)
def test_with_the_plan_of_the_start_it_is_as_with_what_the_tables_were_set_to(
    mode: str, level: str, seed: int
) -> None:
    rng = random.Random(f"{mode} {level} {seed}")
    scores, plan, tensors = make_case(rng, mode=mode, level=level)
    int64 = {n: v.long() for n, v in tensors.items() if n in ("device_E", "token_device_T")}
    tables = Tables.of(plan, len(scores) + rng.choice([0, 100]), torch.device(DEVICE))
    pointers = [each.data_ptr() for each in (tables.limits, tables.keeps) if each is not None]
    keeps: list[Any] = ["off", "auto", 1] if len(plan.keeps) > 1 else ["off", 1]
    for gamma in (plan.gamma, None, Fraction(1, 10), Fraction(3, 4), Fraction(9)):
        keep = rng.choice(keeps) if plan.keeps else "off"
        now = dataclasses.replace(
            plan, gamma=gamma, keeps=CapacityConfig(decode_keep=keep).keeps(plan.top_k)
        )
        tables.set(now)
        got = run(route_triton, scores, plan, tables=tables, **tensors)
        assert_same(got, route_torch(scores, now, **{**tensors, **int64}), plan.num_experts)
    assert pointers == [
        each.data_ptr() for each in (tables.limits, tables.keeps) if each is not None
    ]


def test_what_has_no_table_is_refused() -> None:
    device = torch.device(DEVICE)
    free = Tables.of(make_plan(8, 2, factor="inf"), 16, device)
    assert free.limits is None and free.keeps is None
    with pytest.raises(ValueError, match="plan has gamma 1 and keeps .., but these tables were"):
        free.set(make_plan(8, 2))
    fixed = Tables.of(make_plan(8, 4, decode_keep=1), 16, device)
    with pytest.raises(ValueError, match="these tables were made for gamma 1 and keeps .1,."):
        fixed.set(make_plan(8, 4, decode_keep="auto"))


def test_tables_of_another_plan_or_for_fewer_tokens_are_refused() -> None:
    scores, plan = torch.rand(9, 8, device=DEVICE), make_plan(8, 2)
    tables = Tables.of(plan, 8, torch.device(DEVICE))
    with pytest.raises(ValueError, match="tables are for 8 tokens, but they must be for 9"):
        route_triton(scores, plan, tables=tables)
    with pytest.raises(ValueError, match="tables were made for Plan.mode='drop'.*'expanded'"):
        route_triton(scores[:8], make_plan(8, 2, mode="expanded"), tables=tables)
    other_gamma = dataclasses.replace(plan, gamma=Fraction(2), keeps=(1,))
    route_triton(scores[:8], other_gamma, tables=tables)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["drop", "expanded", "reroute"])
def test_a_captured_graph_follows_its_tables(mode: str) -> None:
    plan = make_plan(8, 2, mode=mode, decode_keep="auto")
    scores, decode = torch.rand(300, 8, device="cuda"), torch.arange(300, device="cuda") < 40
    tables = Tables.of(plan, 512, torch.device("cuda"))

    def call() -> Selection:
        return route_triton(scores, plan, tables=tables, is_decode_T=decode)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for gamma, keeps in ((None, ()), (Fraction(1, 2), (1,)), (Fraction(3), plan.keeps)):
        now = dataclasses.replace(plan, gamma=gamma, keeps=keeps)
        tables.set(now)
        scores.copy_(torch.rand(300, 8))
        graph.replay()
        assert_same(got, route_torch(scores, now, is_decode_T=decode), 8)
