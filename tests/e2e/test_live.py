"""Settings that change in a running `LLM`: it is then as one that was started with them."""

from typing import Any

import pytest

pytestmark = pytest.mark.engine

PROMPTS = [
    f"{topic} {ending}"
    for topic in ("The oldest bridge of the town", "A recipe for bread", "def fibonacci(n):")
    for ending in ("", "is", "and then", "because")
]
STARTED = {
    "moe_capacity_mode": "expanded",
    "moe_capacity_factor": 0.5,
    "moe_capacity_min_capacity": 1,
    "moe_capacity_max_experts": "none",  # rows wider than those of mode off
    "moe_capacity_decode_keep": 1,
}
CHANGES: list[dict[str, Any] | None] = [
    None,
    {"factor": 1.0},
    {"mode": "off"},
    {"mode": "expanded", "decode_keep": "off"},
    {"observe": True, "decode_keep": 1},
    {"observe": False},
]


@pytest.fixture(scope="module")
def changed(run) -> dict[str, Any]:
    return run([PROMPTS] * len(CHANGES), changes=CHANGES, **STARTED)


@pytest.mark.parametrize(
    "batches, settings",
    [
        ([1, 5], {"factor": 1.0}),
        ([2, 4], {"factor": "inf", "decode_keep": "off"}),
        ([3], {"factor": 1.0, "decode_keep": "off"}),
    ],
)
def test_a_changed_engine_is_as_one_that_was_started_so(run, changed, batches, settings):
    """To the bit. While it only observes (batch 4), it is as without a limit."""
    fresh = run([PROMPTS], **STARTED | {f"moe_capacity_{k}": v for k, v in settings.items()})
    for batch in batches:
        assert changed["batches"][batch] == fresh["batches"][0]
    if 1 in batches:  # what it decides while it observes: layer 0 has the same input in both
        observed = [step for step in changed["records"][4] if ".0." in step["layer"]][0]
        applied = [step for step in fresh["records"][0] if ".0." in step["layer"]][0]
        assert observed == applied and observed["load_after"] != observed["load_before"]


def test_every_change_makes_a_difference_and_is_told(changed):
    first, *others = changed["batches"]
    assert all(batch != first for batch in others)
    assert others[0] != others[1] != others[2] != others[0]
    off = {"mode": "off", "factor": 1.0, "decode_keep": 1, "observe": False}
    assert changed["now"] == [
        off | {"mode": "expanded"},
        off,
        off | {"mode": "expanded", "decode_keep": "off"},
        off | {"mode": "expanded", "observe": True},
        off | {"mode": "expanded"},
    ]
    told = [line for line in changed["log"].splitlines() if "MoE capacity changed: " in line]
    assert [line.split("changed: ")[1] for line in told] == [
        "factor 0.5 -> 1.0",
        "mode expanded -> off",
        "mode off -> expanded, decode_keep 1 -> off",
        "decode_keep off -> 1, observe False -> True",
        "observe True -> False",
    ]
